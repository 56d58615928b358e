"""New weights in a TensorRT engine: those of a model of the same plan that was trained on."""

from __future__ import annotations

from pathlib import Path

from vitprune.errors import InputError

from ..backends.tensorrt import refit_engine
from .answer import Answer


def refit(engine: Path, onnx: Path, output: Path) -> Answer:
    """Writes ``output``, the ``engine`` with the weights of ``onnx``, and its sidecar.

    Raises:
        InputError: the two are the same file; or as ``refit_engine``, which raises more.
    """
    if output.resolve() == engine.resolve():
        raise InputError(f"--output {output} is the engine itself; give another name, and replace it when it is proven")
    sidecar = refit_engine(engine, onnx, output)
    return Answer(f"{output}\nbuilt, not run: compare its answers before it replaces {engine}", sidecar)
