"""Is the engine the same whatever is beside an image, and did pruning break what the runtime had fused?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError

from .. import validate as checks
from ..backends.openvino import HINTS
from ..data import picked
from ..runtime import Model
from ..validate import fusion
from . import runtimes
from .bench import INT8_MODEL, Bench
from .make import onnx_name


def consistency(bench: Bench, backend: str, engine: Path) -> checks.Consistency:
    """All checks of the product's engine, on a few test images.

    Args:
        backend: name of the runtime's file in ``backends``.
        engine: the file.
    """
    profile, tested = bench.profile, bench.images.test
    runtime, options = profile.runtime, runtimes.load_options(profile)
    int8 = bench.int8_file()
    exported = bench.folders["export"] / onnx_name(profile, profile.graph_precision)
    onnx = bench.folders["int8"] / INT8_MODEL if int8 else exported
    images, _ = picked(tested, bench.preprocess, range(min(checks.FEW, len(tested))))
    return checks.check_consistency(
        checks.subject(runtimes.on(profile), backend, engine, onnx, threads=profile.budget.threads, options=options),
        images,
        checks.Served.of(profile, bench.pruned.config.image_size),
        checks.arithmetic("int8" if int8 else runtime.precision, runtime.name, options),
    )


def fusions(bench: Bench, models: Mapping[str, Model], files: Mapping[str, Path]) -> dict[str, Any]:
    """What became of the attention of each block in the dense and in the pruned engine, as plain data.

    Args:
        models: the loaded engines, 'dense' and 'pruned' among them.
        files: of the same names.
    """
    runtime = bench.profile.runtime.name
    try:
        dense, pruned = (_attention(bench, models[name], files[name], name) for name in ("dense", "pruned"))
    except VitpruneError as error:  # the report has less to say, and the engine is no worse
        return {"runtime": runtime, "dense": [], "pruned": [], "warnings": [], "unread": str(error)}
    found = {name: [one.to_dict() for one in many] for name, many in (("dense", dense), ("pruned", pruned))}
    return {"runtime": runtime, **found, "warnings": fusion.broken(dense, pruned), "unread": None}


def _attention(bench: Bench, model: Model, file: Path, name: str) -> tuple[fusion.Attention, ...]:
    profile = bench.profile
    if profile.runtime.name == "openvino":
        return fusion.in_openvino(file, {"INFERENCE_PRECISION_HINT": HINTS[profile.runtime.precision]})
    if not runtimes.is_tensorrt(profile.runtime.name):
        options = runtimes.load_options(profile)
        return fusion.in_onnxruntime(file, threads=profile.budget.threads, options=options)
    engine: Any = model.backend  # which is TensorRT
    onnx = {"dense": "dense.onnx", "pruned": onnx_name(profile, profile.graph_precision)}[name]
    return fusion.in_tensorrt(engine.layers(), bench.folders["export"] / onnx)
