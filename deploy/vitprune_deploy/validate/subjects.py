"""Engines as ``examine`` wants them: files that are loaded here, in another process, and with nothing fused."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vitprune import parts
from vitprune.errors import MissingError

from ..backends.base import Backend
from .examine import Subject
from .shaken import moves

LONGEST_S = 600.0  # that the other process may take
# Loads an engine in a process of its own, and writes what the batches of a file get into another
_APART = """
import json, pathlib, sys
import numpy
from vitprune import parts
from vitprune_deploy.backends.base import Backend

what = json.loads(sys.argv[1])
kind = parts.load("vitprune_deploy.backends", what["backend"], Backend)
batches = numpy.load(what["batches"])
with kind.load(pathlib.Path(what["model"]), **what["load"]) as engine:
    dtype = engine.inputs[0].dtype
    numpy.save(what["answers"], numpy.stack([engine.run(batch.astype(dtype)) for batch in batches]))
"""


def subject(backend: str, model: Path, onnx: Path | None, **load: Any) -> Subject:
    """The engine in a file.

    Args:
        backend: name of the runtime's file in ``backends``.
        model: the engine.
        onnx: the ONNX file that it is or was built from; None: it is not at hand.
        load: further arguments of ``Backend.load``.
    """
    kind = parts.load("vitprune_deploy.backends", backend, Backend)  # type: ignore[type-abstract]
    return Subject(
        open=lambda: kind.load(model, **load),
        apart=partial(_apart, backend, model, load),
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


@contextlib.contextmanager
def _apart(
    backend: str, model: Path, load: Mapping[str, Any], batches: np.ndarray
) -> Iterator[Callable[[], np.ndarray]]:
    """A process that runs ``batches``, as a function that waits for what they get; it ends with the block at last."""
    with tempfile.TemporaryDirectory(prefix="vitprune-") as folder:
        given, answers = Path(folder) / "batches.npy", Path(folder) / "answers.npy"
        np.save(given, batches)
        what = {"backend": backend, "model": str(model), "load": load, "batches": str(given), "answers": str(answers)}
        command = [sys.executable, "-c", _APART, json.dumps(what)]
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=paths
        ) as process:

            def wait() -> np.ndarray:
                _, said = process.communicate(timeout=LONGEST_S)
                if process.returncode:
                    raise RuntimeError((said.strip().splitlines() or [f"it ended with code {process.returncode}"])[-1])
                return np.load(answers)

            try:
                yield wait
            finally:
                process.kill()
