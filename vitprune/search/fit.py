"""Small least squares whose signs are known beforehand: more work never takes less time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEAST_SCALE = 0.2
LEVEL_PULL = 0.2  # variance of a measured time about its levels' factors, over the variance of these factors


def fit_nonnegative(features: Array, ms: Array) -> Array:
    """Coefficients >= 0 [F] that bring ``features`` [P, F] closest to ``ms`` [P], errors taken relative to ``ms``.

    Times under a twentieth of the largest count as that twentieth, since they are mostly noise.
    """
    weight = 1 / np.maximum(ms, 0.05 * ms.max()) if ms.max() > 0 else np.ones_like(ms)
    scale = np.maximum(np.abs(features).max(axis=0), 1e-300)
    return _nonnegative(features / scale * weight[:, None], ms * weight) / scale


def level_factors(keys: Sequence[tuple[int, int]], ratios: Mapping[tuple[int, int], float]) -> Array:
    """One factor for each of ``keys``, the product of one for its first number and one for its second.

    Runtimes work in tiles, so times rise by steps that a smooth form misses. Those of token counts and of widths are
    nearly independent: on two x86 cores, a token count was up to a fifth off at all widths alike.

    Args:
        ratios: measured times over those of the form; levels of which none is known keep the factor 1.
    """
    places = {level: i for i, level in enumerate(sorted({(axis, key[axis]) for key in keys for axis in (0, 1)}))}
    columns = np.array([[places[axis, key[axis]] for axis in (0, 1)] for key in keys])
    known = np.zeros((len(ratios), len(places)))
    for row, key in zip(known, ratios, strict=True):
        row[[places[0, key[0]], places[1, key[1]]]] = 1
    logs = np.log(list(ratios.values()))
    found = np.linalg.solve(known.T @ known + LEVEL_PULL * np.eye(len(places)), known.T @ logs)
    return np.exp(found[columns].sum(axis=1))


def fit_whole(sums_ms: Array, megabytes: Array, whole_ms: Array) -> tuple[float, float, float]:
    """(a, b, kappa) of ``whole = a + b * sum + kappa * megabytes``: relative least squares, drawn toward (0, 1, 0).

    The pull is worth one measurement that errs by 1% where a is 3% of the largest whole, b is off by 15%, or the
    megabytes make up 15%: enough to decide what the wholes leave open, too little to bend what they show. a and kappa
    are not negative and b is at least ``LEAST_SCALE``, so that every part of every plan keeps a positive time.
    """
    largest_ms, largest_mb = float(whole_ms.max()), max(float(megabytes.max()), 1e-12)
    rows = np.stack([np.full_like(whole_ms, largest_ms), sums_ms, megabytes / largest_mb * largest_ms], axis=1)
    pull = np.diag(0.01 / np.array([0.03, 0.15, 0.15]))
    system = np.concatenate([rows / whole_ms[:, None], pull])
    target = np.concatenate([np.ones_like(whole_ms), pull[:, 1]]) - LEAST_SCALE * system[:, 1]
    a, b, kappa = _nonnegative(system, target).tolist()
    return a * largest_ms, LEAST_SCALE + b, kappa * largest_ms / largest_mb


def _nonnegative(rows: Array, target: Array) -> Array:
    """The least squares solution >= 0.

    Exact: it is the unconstrained one on the columns that it uses, and all sets of columns are tried, small ones first.
    """
    best, best_error = np.zeros(rows.shape[1]), float(target @ target)
    for size in range(1, min(rows.shape) + 1):
        for chosen in map(list, combinations(range(rows.shape[1]), size)):
            found, *_ = np.linalg.lstsq(rows[:, chosen], target, rcond=None)
            error = float(np.square(rows[:, chosen] @ found - target).sum())
            if found.min() >= 0 and error < best_error * (1 - 1e-9) - 1e-18:
                best, best_error = np.zeros(rows.shape[1]), error
                best[chosen] = found
    return best
