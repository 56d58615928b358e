"""Accuracy and agreement of engines on the same images, with the intervals that the numbers deserve."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..data import ImageSet, batches
from ..runtime import Model

Z_95 = 1.959963984540054  # of the normal distribution, two-sided
RESAMPLES = 10_000
WORST_CLASSES = 5

Progress = Callable[[int, int, str], None]  # images done, expected, and what is at hand


class Outputs(NamedTuple):
    """What several models say of the same images."""

    logits: dict[str, np.ndarray]  # by model, float32 [N, classes]
    labels: np.ndarray  # int64 [N], -1 where unknown


@dataclass(frozen=True)
class Share:
    """How many of ``images`` it holds for, in percent, with Wilson's 95% interval.

    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22, 1927.
    """

    percent: float
    low: float
    high: float
    images: int

    @classmethod
    def of(cls, right: int, images: int) -> Share:
        """``right`` of ``images``."""
        share, z2 = right / images, Z_95**2 / images
        centre = (share + z2 / 2) / (1 + z2)
        half = Z_95 / (1 + z2) * math.sqrt((share * (1 - share) + z2 / 4) / images)
        # at none or all the interval ends there exactly; rounding would leave it a hair inside
        low, high = 0.0 if right == 0 else centre - half, 1.0 if right == images else centre + half
        return cls(100 * share, 100 * low, 100 * high, images)


@dataclass(frozen=True)
class Paired:
    """Two models on the same images.

    Attributes:
        drop: points of top-1 that the second has less than the first.
        low, high: the 95% bootstrap interval of ``drop``, over images.
        lost: images that only the first gets right.
        gained: images that only the second gets right.
        p_value: of McNemar's exact test that neither is better (McNemar, Psychometrika 12, 1947).
    """

    drop: float
    low: float
    high: float
    lost: int
    gained: int
    p_value: float

    @classmethod
    def of(cls, first_right: np.ndarray, second_right: np.ndarray, seed: int = 0) -> Paired:
        """Bool [N] each: which images the models get right."""
        images = len(first_right)
        lost, gained = int((first_right & ~second_right).sum()), int((~first_right & second_right).sum())
        # resampling images is drawing how many of them are lost, gained or neither
        chances = np.array([lost, gained, images - lost - gained]) / images
        draws = np.random.default_rng(seed).multinomial(images, chances, RESAMPLES)
        low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / images, [2.5, 97.5])
        return cls(100 * (lost - gained) / images, float(low), float(high), lost, gained, mcnemar(lost, gained))


@dataclass(frozen=True)
class ClassDrop:
    """One class, in percent of its images that each model gets right."""

    label: int
    name: str
    images: int
    dense: float
    pruned: float


@dataclass(frozen=True)
class Accuracy:
    """The pruned engine against the dense one, on the test images.

    Attributes:
        dense, pruned: top-1; None without labels.
        paired: dense first, pruned second; None without labels.
        agreement: images for which both name the same class.
        worst: the classes that lose most, largest loss first.
        non_finite: images for which the pruned engine gave NaN or infinity.
        unreadable: images that were left out.
    """

    dense: Share | None
    pruned: Share | None
    paired: Paired | None
    agreement: Share
    worst: tuple[ClassDrop, ...]
    non_finite: int
    unreadable: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest and the report."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Parity:
    """How far an engine and torch are apart on the same images: logits, and percent that name the same class."""

    max_abs: float
    top1_agreement: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return asdict(self)


def run_models(
    models: Mapping[str, Model],
    images: ImageSet,
    *,
    batch: int = 64,
    threads: int = 0,
    progress: Progress | None = None,
) -> Outputs:
    """What each of ``models`` says of ``images``; each image is decoded once. The models share one preprocessing.

    Args:
        models: by name.
        images: unreadable ones are left out.
        batch: images given at once.
        threads: threads that decode images.
        progress: told of images done.

    Raises:
        InputError: too many images cannot be read.
    """
    preprocess = next(iter(models.values())).preprocess
    logits: dict[str, list[np.ndarray]] = {name: [] for name in models}
    labels = []
    for inputs, known in batches(images, preprocess, batch, threads=threads):
        for name, model in models.items():
            logits[name].append(model.predict(inputs).logits)
        labels.append(known)
        if progress:
            progress(sum(map(len, labels)), len(images), "test images")
    return Outputs({name: np.concatenate(rows) for name, rows in logits.items()}, np.concatenate(labels))


def compare_accuracy(
    dense: np.ndarray,
    pruned: np.ndarray,
    labels: np.ndarray,
    *,
    names: tuple[str, ...] | None = None,
    unreadable: int = 0,
    seed: int = 0,
) -> Accuracy:
    """Compare logits [N, classes] of two models on the same images.

    Args:
        dense, pruned: the logits.
        labels: int64 [N], -1 where unknown; images without a class count for the agreement alone.
        names: of the classes.
        unreadable: images that were left out, to be told.
        seed: of the bootstrap.
    """
    first, second = _named(dense), _named(pruned)
    agreement = Share.of(int(((first == second) & (second >= 0)).sum()), len(first))
    non_finite = int((~np.isfinite(pruned)).any(axis=1).sum())
    known = labels >= 0
    if not known.any():
        return Accuracy(None, None, None, agreement, (), non_finite, unreadable)
    right, still_right = (first == labels)[known], (second == labels)[known]
    images = int(known.sum())
    return Accuracy(
        dense=Share.of(int(right.sum()), images),
        pruned=Share.of(int(still_right.sum()), images),
        paired=Paired.of(right, still_right, seed),
        agreement=agreement,
        worst=_worst(right, still_right, labels[known], names),
        non_finite=non_finite,
        unreadable=unreadable,
    )


def compare_with_torch(logits: np.ndarray, by_torch: np.ndarray) -> Parity:
    """How far ``logits`` are from torch's for the first images, [N, classes] and [M, classes], M <= N."""
    logits = logits[: len(by_torch)]
    with np.errstate(invalid="ignore"):
        gaps = np.abs(logits.astype(np.float64) - by_torch)
    # a gap that is no number is no agreement; JSON has no infinity, the largest number says it as well
    largest = float(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf).max())
    ours = _named(logits)
    same = 100 * float(((ours == _named(by_torch)) & (ours >= 0)).mean())
    return Parity(min(largest, sys.float_info.max), same, len(by_torch))


def mcnemar(lost: int, gained: int) -> float:
    """P-value, two-sided and exact, of ``lost`` against ``gained`` if either way were a coin's toss."""
    tosses, term, tail = lost + gained, 1, 0
    for heads in range(min(lost, gained) + 1):
        tail += term
        term = term * (tosses - heads) // (heads + 1)
    return min(1.0, 2 * tail / 2**tosses)  # Python divides integers of any size


def _named(logits: np.ndarray) -> np.ndarray:
    """The class that each row names, int64 [N]; -2 for one with NaN or infinity, which names none."""
    finite = np.isfinite(logits).all(axis=1)
    return np.where(finite, np.where(np.isfinite(logits), logits, 0).argmax(axis=1), -2)


def _worst(
    right: np.ndarray, still_right: np.ndarray, labels: np.ndarray, names: tuple[str, ...] | None
) -> tuple[ClassDrop, ...]:
    """The classes that lose most, at most ``WORST_CLASSES``, none that loses nothing."""
    drops = []
    for label in np.unique(labels):
        of_it = labels == label
        before, after = 100 * right[of_it].mean(), 100 * still_right[of_it].mean()
        if after < before:
            name = str(label) if names is None else names[label]
            drops.append(ClassDrop(int(label), name, int(of_it.sum()), float(before), float(after)))
    return tuple(sorted(drops, key=lambda d: d.pruned - d.dense)[:WORST_CLASSES])
