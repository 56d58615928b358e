"""What a runtime is to the rest of the package: it loads a model file, runs a batch and times it. Needs numpy only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vitprune.errors import InputError

Self = TypeVar("Self", bound="Backend")


class TensorSpec(NamedTuple):
    """One input or output of a model file."""

    name: str
    shape: tuple[int | str, ...]  # a name stands for a size that is free
    dtype: str  # as numpy calls it: float32, float16, int64; bfloat16


def number_format(name: str) -> np.dtype[Any]:
    """The numpy type of a ``TensorSpec``. That for bfloat16 is of the package ml_dtypes, which onnx brings."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def known_options(runtime: str, options: Mapping[str, Any] | None, known: Collection[str]) -> dict[str, Any]:
    """A copy of the ``options`` of ``Backend.load``.

    Raises:
        InputError: ``runtime`` has no such option.
    """
    given = dict(options or {})
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise InputError(f"{runtime} has no option {unknown[0]!r}, it has {', '.join(known)}")
    return given


class Backend(ABC):
    """One model file, loaded and ready to run; a context manager that frees it.

    Attributes:
        runtime: name and version of the runtime, as in ``onnxruntime 1.31.1``.
        provider: what runs the graph inside the runtime: ``cpu``, ``cuda``, ``tensorrt``.
        inputs, outputs: what the file asks for and gives.
        machine: the ``latency.machine.Machine`` that it runs on, where that is another one; None: in this process.
    """

    runtime: str
    provider: str
    machine: Any = None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    @abstractmethod
    def load(
        cls: type[Self],
        path: Path,
        *,
        threads: int | None = None,
        batch: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """The model in ``path``, ready to run.

        Args:
            path: the model file, in the runtime's format.
            threads: processor threads that work on one batch; None leaves it to the runtime.
            batch: the only batch size that will be asked for, which lets the runtime specialise; None: any.
            options: what only this runtime knows; its file says which keys there are.

        Raises:
            InputError: the file is not there, or an option is not known.
            DamagedFile: the file is cut off, or not of this format.
            MissingError: the runtime, or what it needs, is not on this machine.
        """

    @abstractmethod
    def run(self, images: np.ndarray) -> np.ndarray:
        """The first output for ``images`` as the only input.

        Raises:
            InputError: the shape or type of ``images`` does not fit the model.
        """

    @abstractmethod
    def bind(self, feed: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs the model once on ``feed`` and returns the milliseconds that this took.

        Buffers are allocated here and used again in every call, so that only the run is timed.

        Raises:
            InputError: ``feed`` does not fit the model.
        """

    def time_ms(self, feed: Mapping[str, np.ndarray], runs: int) -> list[float]:
        """Milliseconds of each of ``runs`` runs in a row. Nothing is warmed up, nothing discarded."""
        once = self.bind(feed)
        return [once() for _ in range(runs)]

    def refuse_misfit(self, feed: Mapping[str, np.ndarray]) -> None:
        """Raise InputError where ``feed`` does not fit the inputs: a sentence, where a runtime has a page."""
        wanted = {spec.name: spec for spec in self.inputs}
        if feed.keys() != wanted.keys():
            raise InputError(f"this model's inputs are {', '.join(sorted(wanted))}, got {', '.join(sorted(feed))}")
        for name, array in feed.items():
            spec = wanted[name]
            fits = len(array.shape) == len(spec.shape) and all(
                isinstance(want, str) or want == got for want, got in zip(spec.shape, array.shape)
            )
            if not fits or array.dtype.name != spec.dtype:
                wants = f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
                raise InputError(f"input {name} must be {wants}, got {array.dtype.name} {list(array.shape)}")

    def thread_ids(self) -> list[int]:
        """Kernel ids of the threads that the runtime keeps for this model; empty where they are not known."""
        return []

    @abstractmethod
    def close(self) -> None:
        """Free what the model holds. It cannot run afterwards; closing twice does no harm."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
