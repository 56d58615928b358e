"""What the engines cost: latency of both, interleaved; size and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitprune.errors import InputError

from ..data import ImageSet, Preprocess, picked
from ..latency.protocol import Distribution, Progress, percentiles
from ..latency.visits import Subject, quickest
from ..runtime import Model

PERCENTILES = (50, 90, 99)
SESSIONS = 3  # of each engine that is timed: one alone may be a lucky or an unlucky one


def one_batch(images: ImageSet, preprocess: Preprocess, batch: int) -> np.ndarray:
    """As many of the images as the batch has, float32 [B, C, H, W]; again and again if there are fewer."""
    pixels, _ = picked(images, preprocess, range(min(batch, len(images))))
    return np.resize(pixels, (batch, *pixels.shape[1:]))


def compare_latency(
    dense: Sequence[Model],
    pruned: Sequence[Model],
    inputs: np.ndarray,
    *,
    percentile: int = 50,
    runs: int = 1000,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Distribution, Distribution]:
    """Single runs of both engines, interleaved, normalised by the quicker one.

    Args:
        dense, pruned: the engines, each loaded once or several times.
        inputs: one batch, float32 [B, C, H, W].
        percentile: the budget's, reported besides 50, 90 and 99.
        runs: of each.
        max_seconds: none is begun after this.
        seed: of the order.
        progress: told of visits.
    """

    def subjects(name: str, models: Sequence[Model]) -> list[Subject]:
        return [Subject.of(name, m.backend, {m.backend.inputs[0].name: m.as_input(inputs)}) for m in models]

    both = [subjects("dense", dense), subjects("pruned", pruned)]
    first, second = percentiles(
        both,
        quickest([sessions[0] for sessions in both]),
        runs=runs,
        max_seconds=math.inf if max_seconds is None else max_seconds,
        which=sorted({*PERCENTILES, percentile}),
        seed=seed,
        progress=progress,
    )
    return first, second


def latency_dict(found: Distribution) -> dict[str, Any]:
    """Plain data for the manifest: percentiles in milliseconds, their intervals, and the circumstances."""
    numbers = sorted({*PERCENTILES, *found.percentiles})
    values = {f"p{n}": found.percentiles[n].value_ms if n in found.percentiles else None for n in numbers}
    return values | {
        "samples": found.samples,
        "intervals_ms": {f"p{n}": [p.low_ms, p.high_ms] for n, p in found.percentiles.items()},
        "raw_ms": {f"p{n}": ms for n, ms in found.raw_ms.items()},
        "rejected": found.rejected,
        "gated": found.gated,
        "reference_ms": found.reference_ms,
        "reference_drift": found.reference_drift,
    }


def budget_ms(latency_ms: float | None, speedup: float | None, dense: Distribution, percentile: int) -> float:
    """The budget in milliseconds: as given, or the dense engine's percentile over ``speedup``.

    With too few runs behind that percentile it is an estimate, by which nothing can be judged.

    Raises:
        InputError: neither is given.
    """
    if latency_ms is not None:
        return latency_ms
    if speedup is None:
        raise InputError("budget: wanted latency_ms or speedup, got neither")
    known = dense.percentiles.get(percentile)
    return (float(np.percentile(dense.runs_ms, percentile)) if known is None else known.value_ms) / speedup


def size_bytes(model: Path) -> int:
    """Bytes of a model file and of the weights beside it (``model.onnx.data``)."""
    return sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*") if file.suffix != ".json")
