"""int8 as one more choice: the pruned model in int8 is shipped if it is measured to be faster and holds the floors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitprune.errors import VitpruneError

from .. import validate as checks
from ..latency.protocol import Distribution
from ..runtime import Model
from . import runtimes
from .bench import INT8, INT8_MODEL, Bench, write_json
from .judge import engine_files, open_engine
from .make import build_plan, check_2_4, onnx_name

CALIBRATION = 256  # images that fixed scales are found on


def int8_settings(bench: Bench) -> dict[str, Any]:
    """What the stage ``int8`` depends on besides earlier stages."""
    profile = bench.profile
    return {
        "asked": profile.runtime.try_int8,
        "runtime": profile.runtime.model_dump(mode="json"),
        "input": profile.input.model_dump(mode="json"),
        "percentile": profile.budget.percentile,
        "accuracy": profile.accuracy.model_dump(mode="json"),
        "validation": profile.validation.model_dump(mode="json"),
        "device": runtimes.device(profile),
        "seed": profile.seed,
    }


def try_int8(bench: Bench, folder: Path) -> None:
    """Make the file, measure it beside the one that it would replace, and say whether it does."""
    if not bench.profile.runtime.try_int8:
        write_json(folder / INT8, {"kept": False})
        return
    try:
        path = _make(bench, folder)
        found = _compare(bench, path) | {"file": path.name}
    except VitpruneError as error:  # a choice that cannot be had is left out, the build goes on
        found = {"kept": False, "why": str(error)}
    if not found["kept"]:
        for file in folder.glob("model.*"):
            file.unlink()
    bench.shows.say(f"int8 is {'kept' if found['kept'] else 'left out'}: {found['why']}")
    write_json(folder / INT8, found)


def _make(bench: Bench, folder: Path) -> Path:
    """The engine in int8: an ONNX file, or the plan that TensorRT makes of it."""
    from ..export.int8 import quantize, recipe_for

    profile, runtime, path = bench.profile, bench.profile.runtime, folder / INT8_MODEL
    recipe, device = recipe_for(runtime.name, runtime.provider), runtimes.on(profile)
    flags = device.fingerprint("none")["flags"]
    bench.shows.progress(0, 3, f"quantize, {recipe}")
    source = bench.folders["export"] / onnx_name(profile, profile.graph_precision)
    images = bench.search_images[:CALIBRATION].numpy()
    quantize(source, path, recipe, images, frozenset(flags))
    if recipe == "symmetric":
        check_2_4(bench, path)
    if not runtimes.is_tensorrt(runtime.name):
        return path
    options = runtimes.engine_options(profile, bench.pruned.config, runtime.name)
    return build_plan(device, path, folder, "model", options)


def _compare(bench: Bench, path: Path) -> dict[str, Any]:
    """Both engines on the test images and on the clock."""
    profile, files = bench.profile, engine_files(bench)
    with ExitStack() as stack:

        def sessions(which: Path, count: int = checks.SESSIONS) -> Sequence[Model]:
            return [stack.enter_context(open_engine(bench, which)) for _ in range(count)]

        before, after, dense = sessions(files["pruned"]), sessions(path), sessions(files["dense"], 1)
        bench.shows.progress(1, 3, "test images")
        outputs = checks.run_models(
            {"dense": dense[0], "int8": after[0]}, bench.images.test, batch=profile.batch, threads=2
        )
        bench.shows.progress(2, 3, "time")
        times = checks.compare_latency(
            before,
            after,
            checks.one_batch(bench.images.test, bench.preprocess, profile.batch),
            percentile=profile.budget.percentile,
            runs=profile.validation.runs,
            max_seconds=profile.validation.max_seconds,
            seed=profile.seed,
        )
    accuracy = checks.compare_accuracy(outputs.logits["dense"], outputs.logits["int8"], outputs.labels)
    figures = checks.Figures(
        latency=None,
        samples=0,
        top1=accuracy.pruned.percent if accuracy.pruned else None,
        reference_top1=accuracy.dense.percent if accuracy.dense else None,
        agreement=accuracy.agreement.percent,
    )
    missed = checks.missed_floors(checks.Limits.of(profile, math.inf), figures)
    return _decide(profile.budget.percentile, times, missed) | {"accuracy": accuracy.to_dict()}


def _decide(percentile: int, times: tuple[Distribution, Distribution], missed: Sequence[str]) -> dict[str, Any]:
    """Whether int8 is kept, and why."""
    before, after = (one.percentiles.get(percentile) for one in times)
    if before is None or after is None:
        return {"kept": False, "why": "too few runs to tell which is faster"}
    figures = {"before_ms": asdict(before), "after_ms": asdict(after)}
    ratio = f"{before.value_ms:.3g} to {after.value_ms:.3g} ms"
    if after.high_ms >= before.low_ms:
        return {"kept": False, "why": f"it is not faster, p{percentile} went from {ratio}", **figures}
    if missed:
        return {"kept": False, "why": f"{'; '.join(missed)} (p{percentile} went from {ratio})", **figures}
    return {"kept": True, "why": f"p{percentile} went from {ratio}, and the floors hold", **figures}
