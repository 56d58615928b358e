"""Where engines are built, run and measured: this machine, or a board that ssh reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitprune import parts

from ..backends import _apart
from ..backends.base import Backend
from ..latency.fingerprint import device_fingerprint
from ._tools import raw_state

if TYPE_CHECKING:
    from ..backends.tensorrt import EngineOptions


class Device(ABC):
    """What a build asks of the machine that the engine is for."""

    @abstractmethod
    def fingerprint(self, runtime: str, provider: str = "cpu", threads: int | None = None) -> dict[str, Any]:
        """As ``latency.fingerprint.device_fingerprint``."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What its tools and counters say of clocks, power and heat now, as ``state.read_state`` takes it."""

    @abstractmethod
    def version(self, distributions: Sequence[str]) -> str | None:
        """The version of the first of these packages that it has; None: it has none of them."""

    @abstractmethod
    def has(self, module: str) -> bool:
        """Whether its Python has a module."""

    @abstractmethod
    def load(
        self, backend: str, path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Backend:
        """A model file in the runtime ``backend``; raises as ``Backend.load`` does."""

    @abstractmethod
    def build(self, onnx: Path, plan: Path, options: EngineOptions) -> dict[str, Any]:
        """Build the TensorRT engine ``plan`` and its sidecar; as ``backends.tensorrt.build_engine``."""

    @abstractmethod
    def memory_mb(self, backend: str, model: Path, inputs: np.ndarray, **load: Any) -> float | None:
        """Most memory that loading and running ``model`` on ``inputs`` adds to a fresh process; as ``_apart``'s."""

    @abstractmethod
    def answering(
        self, backend: str, model: Path, batches: np.ndarray, load: Mapping[str, Any]
    ) -> AbstractContextManager[Callable[[], np.ndarray]]:
        """A second process that runs ``batches``; as ``_apart.answering``."""


class Here(Device):
    """The machine that this process runs on."""

    def fingerprint(self, runtime: str, provider: str = "cpu", threads: int | None = None) -> dict[str, Any]:
        """As ``latency.fingerprint.device_fingerprint``."""
        return device_fingerprint(runtime, provider, threads)

    def state(self) -> dict[str, Any]:
        """As ``_tools.raw_state``."""
        return raw_state()

    def version(self, distributions: Sequence[str]) -> str | None:
        """The version of the first of these packages that is installed."""
        for name in distributions:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    def has(self, module: str) -> bool:
        """Whether a module is installed."""
        return find_spec(module) is not None

    def load(
        self, backend: str, path: Path, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Backend:
        """A model file, loaded into this process."""
        kind = parts.load("vitprune_deploy.backends", backend, Backend)  # type: ignore[type-abstract]
        return kind.load(path, threads=threads, options=options)

    def build(self, onnx: Path, plan: Path, options: EngineOptions) -> dict[str, Any]:
        """Build the engine for the GPU in this machine, or for others where the runtime can."""
        from ..backends.tensorrt import build_engine

        return build_engine(onnx, plan, options)

    def memory_mb(self, backend: str, model: Path, inputs: np.ndarray, **load: Any) -> float | None:
        """As ``_apart.memory_mb``."""
        return _apart.memory_mb(backend, model, inputs.shape, inputs.dtype.name, load)

    def answering(
        self, backend: str, model: Path, batches: np.ndarray, load: Mapping[str, Any]
    ) -> AbstractContextManager[Callable[[], np.ndarray]]:
        """As ``_apart.answering``."""
        return _apart.answering(backend, model, batches, load)
