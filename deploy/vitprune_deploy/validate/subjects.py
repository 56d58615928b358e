"""Engines as ``examine`` wants them: files that are loaded here, in another process, and with nothing fused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import MissingError

from ..backends.base import Backend
from ..remote.device import Device
from .examine import Subject
from .shaken import moves


def subject(device: Device, backend: str, model: Path, onnx: Path | None, **load: Any) -> Subject:
    """The engine in a file.

    Args:
        device: where it runs.
        backend: name of the runtime's file in ``backends``.
        model: the engine.
        onnx: the ONNX file that it is or was built from; None: it is not at hand.
        load: further arguments of ``Backend.load``.
    """
    return Subject(
        open=lambda: device.load(backend, model, **load),
        apart=partial(device.answering, backend, model, load=load),
        unfused="the ONNX file is not at hand" if onnx is None else partial(_unfused, onnx, load.get("threads")),
        moves=partial(_moves, onnx),
    )


def _unfused(onnx: Path, threads: int | None) -> Backend:
    """The ONNX file on the CPU, node by node as it is written: what every engine of it must agree with."""
    from ..backends.onnxruntime import OnnxRuntime

    return OnnxRuntime.load(onnx, threads=threads, options={"optimise": False})


def _moves(onnx: Path | None, images: np.ndarray, share: float) -> np.ndarray:
    """As ``shaken.moves``.

    Raises:
        MissingError: there is no ONNX file, or a package that reads it is missing.
    """
    why = "some answers of the engine differ, and telling a tie between scores from a fault takes"
    if onnx is None:
        raise MissingError(f"{why} the ONNX file that it was built from; run the build again")
    try:
        return moves(onnx, images, share)
    except ImportError as error:
        raise MissingError(f"{why} onnx and onnxruntime ({error}); run `pip install onnx onnxruntime`") from error
