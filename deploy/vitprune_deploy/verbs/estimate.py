"""About how long a build takes, from the time of a few forward passes of its model. Not a measurement."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..build.choose import LANDING_SHARE
from ..build.screen import SEARCHED_METHODS
from ..build.sizes import sizes
from ..validate import Served

if TYPE_CHECKING:
    from ..build import Bench

LEAST_S, BATCH = 0.5, 8  # forward passes are timed for this long, with so many images
EXPORT_S = 4.0  # of a model of twelve blocks, most of it tracing
PIECES = 90  # measured points of a latency table with attention, MLP and reductions
ROUNDS, SAMPLES = 12, 4  # visits of a piece until its interval is narrow, and runs in a visit
CANDIDATES = 5  # models that one round of landing measures
HALF = 0.5  # share of the blocks that a change in an average block makes run again
ALL_LAYERS = 1.5  # times the weights of the MLPs
TRAINING = 3.0  # a step forward and back costs this many passes forward
ENGINE_S = 60.0  # building one
CHECKS = 4  # batches of each shape that the engine's consistency is checked with


def estimate(bench: Bench) -> dict[str, float]:
    """Seconds by stage on this machine, not counting that others use it."""
    profile, image_s = bench.profile, seconds_per_image(bench)
    blocks, batch_s = len(bench.dense.config.blocks), profile.batch * image_s
    return {
        "measure": _measure(bench, batch_s, blocks),
        "learn": _learn(bench, image_s),
        "losses": _losses(bench, image_s, blocks),
        "search": _search(bench, image_s, batch_s, blocks),
        "weights": _weights(bench, image_s),
        "recover": _recover(bench, image_s),
        "export": 2 * EXPORT_S * blocks / 12 + 2 * profile.validation.parity_images * image_s,
        "engines": ENGINE_S * len(profile.runtime.also_build),
        "validate": _validate(bench, image_s, batch_s),
    }


def seconds_per_image(bench: Bench) -> float:
    """Seconds of torch for one image, when nobody else uses the machine: the fastest of some passes."""
    import torch

    config = bench.dense.config
    images = torch.randn(BATCH, config.channels, *config.image_size)
    passes_s: list[float] = []
    with torch.inference_mode():
        bench.dense(images)
        while sum(passes_s) < LEAST_S:
            start = time.perf_counter()
            bench.dense(images)
            passes_s.append(time.perf_counter() - start)
    return min(passes_s) / BATCH


def duration(seconds: float) -> str:
    """'40 s', '7 min' or '2.5 h'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _measure(bench: Bench, batch_s: float, blocks: int) -> float:
    """A piece is half a block, timed between runs of a reference as long as itself or longer."""
    wanted = bench.profile.measure
    if wanted.table is not None:
        return 0.0
    pieces_s = PIECES * ROUNDS * SAMPLES * 2 * batch_s / (2 * blocks)
    seconds = pieces_s + CANDIDATES * ROUNDS * SAMPLES * 2 * batch_s + PIECES * EXPORT_S / 12
    return min(seconds, wanted.max_seconds) if wanted.max_seconds else seconds


def _losses(bench: Bench, image_s: float, blocks: int) -> float:
    """Each measured size of each half of each block is one pass of the probes through the blocks behind it."""
    from vitprune.search.survey import levels_to_measure

    if bench.profile.prune.learned.method:
        return 0.0
    allowed, methods = sizes(bench), min(SEARCHED_METHODS, len(bench.token_methods()))
    widths = sum(len(levels_to_measure(of)) for of in (allowed.heads, allowed.mlp, allowed.qk, allowed.v))
    passes = blocks * (widths + len(allowed.patches) * methods)
    probes = bench.profile.search.probe_images
    return image_s * (HALF * passes * probes + 2 * TRAINING * (bench.profile.data.calibration.images or 0))


def _learn(bench: Bench, image_s: float) -> float:
    """The dense model is trained, with itself as the teacher."""
    profile, wanted = bench.profile, bench.profile.prune.learned
    if wanted.method is None:
        return 0.0
    return _trained(wanted, profile.recover.batch * image_s * (1 + TRAINING))


def _search(bench: Bench, image_s: float, batch_s: float, blocks: int) -> float:
    wanted, methods, limit_s = (
        bench.profile.search,
        min(SEARCHED_METHODS, max(1, len(bench.token_methods()))),
        bench.profile.measure.max_seconds,
    )
    searches = bench.profile.prune.learned.method is None and bench.profile.prune.allocation == "exact"
    seconds = methods * wanted.evaluations * wanted.probe_images * image_s if searches else 0.0
    if wanted.max_seconds:
        seconds = min(seconds, methods * wanted.max_seconds)
    timing_s = CANDIDATES * ROUNDS * SAMPLES * 2 * batch_s
    if limit_s:
        timing_s = min(timing_s, LANDING_SHARE * limit_s)
    return seconds + wanted.landings * (timing_s + CANDIDATES * EXPORT_S * blocks / 12)


def _weights(bench: Bench, image_s: float) -> float:
    """All prunings of single weights of the slim model, those that recovery makes included."""
    from vitprune import parts
    from vitprune.gradual import PRUNINGS
    from vitprune.weights.base import WeightMethod

    profile, wanted = bench.profile, bench.profile.prune.weights
    if not wanted.enabled:
        return 0.0
    method = parts.load("vitprune.weights", wanted.method, WeightMethod)  # type: ignore[type-abstract]
    steps = PRUNINGS if wanted.schedule == "gradual" else method.recompute
    passes = method.passes * (1 if wanted.pattern == "2:4" else steps) * (ALL_LAYERS if wanted.where == "all" else 1)
    return passes * len(bench.search_images) * image_s / (profile.budget.speedup or 1.0)


def _recover(bench: Bench, image_s: float) -> float:
    wanted, speedup = bench.profile.recover, bench.profile.budget.speedup or 1.0
    if not wanted.enabled:
        return 0.0
    return _trained(wanted, wanted.batch * image_s * (1 + TRAINING / speedup))


def _trained(wanted: Any, step_s: float) -> float:
    """Seconds of a training that a section of the profile limits in steps and in seconds."""
    seconds: float = wanted.max_steps * step_s
    return min(seconds, wanted.max_seconds) if wanted.max_seconds else seconds


def _validate(bench: Bench, image_s: float, batch_s: float) -> float:
    wanted = bench.profile.validation
    timing_s = 2.5 * wanted.runs * batch_s
    if wanted.max_seconds:
        timing_s = min(timing_s, wanted.max_seconds)
    checked = CHECKS * sum(shape.batch for shape in Served.of(bench.profile, bench.dense.config.image_size).shapes())
    return timing_s + (2 * len(bench.images.test) + checked) * image_s
