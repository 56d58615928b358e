"""What all that runs in TensorRT's child process shares: refusals, the module, its logger, and the GPU at hand."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from vitprune.errors import MissingError

from ._cuda import open_cuda

TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
SPARSITY = "(Sparsity)"  # in lines of a log about kernels for sparse weights
DRIVER = Path("/proc/driver/nvidia/version")


class Send(Protocol):
    """Sends a message to whoever started the process."""

    def __call__(self, message: Mapping[str, Any]) -> None:
        """One line of JSON."""


class Refused(Exception):
    """The answer is no.

    Attributes:
        kind: whose turn it is: 'missing', 'input', 'refused' (by TensorRT) or 'damaged'.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def load(module: str) -> Any:
    """The Python module of TensorRT."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # its libraries fail in ways of their own
        raise Refused("missing", f"cannot be imported ({' '.join(str(error).split())})") from error


def logger(trt: Any) -> Any:
    """A logger that keeps errors, the only place where TensorRT says why, and what it says of sparse weights."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.sparsity: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))
            elif SPARSITY in message:
                self.sparsity.append(" ".join(message.split()))

    return Log()


def gpu() -> tuple[dict[str, Any] | None, str]:
    """The GPU of this machine with its driver, as a sidecar has it; or None, and why there is none."""
    try:
        device = open_cuda().device()
    except MissingError as error:
        return None, str(error)
    return {
        "name": device.name,
        "compute_capability": device.compute_capability,
        "multiprocessors": device.multiprocessors,
        "memory_bytes": device.memory_bytes,
        "driver": driver(),
        "driver_cuda": device.driver_cuda,
    }, ""


def driver() -> str | None:
    """The version of NVIDIA's kernel module, as in '580.65.06'; None where the system does not tell."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", DRIVER.read_text(errors="replace"))
    except OSError:
        return None
    return found[0] if found else None
