"""A model that is loaded on a board, as a backend; visits to it are made there, one request each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import Backend
from ..latency.machine import Asked, Machine, Taken
from .device import Device
from .runner import spec_of, unpacked

if TYPE_CHECKING:
    from .board import Board


class Elsewhere(Backend):
    """A model on another machine; its device loads it."""

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        batch: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Elsewhere:
        """A file alone does not say on which machine."""
        raise TypeError("see Device.load")


class DeviceMachine(Machine):
    """Another machine as the protocol sees it: visits are made there, rounds are decided here."""

    def __init__(self, device: Device) -> None:
        super().__init__(waited_ms=None)
        self._device = device

    def fingerprint(self, runtime: str, provider: str, threads: int | None) -> dict[str, Any]:
        """The device's."""
        return self._device.fingerprint(runtime, provider, threads)


class RemoteBackend(Elsewhere):
    """A model on a board."""

    def __init__(self, board: Board, key: int, facts: Mapping[str, Any]) -> None:
        self._board, self._key = board, key
        self._bound: list[int] = []
        self.runtime, self.provider = facts["runtime"], facts["provider"]
        self.inputs = tuple(spec_of(spec) for spec in facts["inputs"])
        self.outputs = tuple(spec_of(spec) for spec in facts["outputs"])
        self.machine = BoardMachine(board)

    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output; the images are sent unless the board has them."""
        self.refuse_misfit({self.inputs[0].name: images})
        return unpacked(self._board.ask("run", model=self._key, images=self._board.put_array(images)))

    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """One run there, by a request of its own."""
        self.refuse_misfit(feed)
        arrays = {name: self._board.put_array(array, kept=True) for name, array in feed.items()}
        key = self._board.number()
        self._board.hold(key, "bind", name="subject", model=self._key, feed=arrays)
        self._bound.append(key)
        return RemoteRun(self._board, key)

    def layers(self) -> Any:
        """What TensorRT's inspector says of the engine."""
        return self._board.ask("layers", model=self._key)

    def close(self) -> None:
        """Let go of the model there."""
        self._board.drop([self._key], self._bound)
        self._bound = []


class RemoteRun:
    """One run of a subject on a board, in milliseconds as the board's clock has them."""

    def __init__(self, board: Board, key: int) -> None:
        self._board, self.key = board, key

    def __call__(self) -> float:
        """Milliseconds."""
        return float(self._board.ask("once", subject=self.key))


class BoardMachine(DeviceMachine):
    """A board with our runner."""

    def __init__(self, board: Board) -> None:
        super().__init__(board)
        self._board = board

    @property
    def gates(self) -> bool:
        """Whether the board can tell a sample during which another process ran."""
        return bool(self._board.facts["gates"])

    def take(self, subject: Any, reference: Any, asked: Asked) -> Taken:
        """One visit, made on the board."""
        wanted = subject.run.key if asked.samples else None
        return Taken(*self._board.ask("take", subject=wanted, reference=reference.run.key, asked=list(asked)))

    def wait_for_quiet(self, limit_s: float) -> float:
        """Seconds waited until nothing else ran there."""
        return float(self._board.ask("quiet", limit_s=limit_s))
