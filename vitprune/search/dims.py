"""What attention takes when its heads have fewer dims: the time that each dim saves, fitted on a few measured sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from ..errors import InputError
from .fit import fit_nonnegative

DimKey = tuple[int, int, int, int]  # patches, heads, dims of queries and keys, dims of values
LEAST_SHARE = 0.05  # of the attention with all its dims: what any prediction leaves
FITTED = 4  # terms of the form


def dim_keys(tokens: Sequence[int], heads: Sequence[int], qk: Sequence[int], v: Sequence[int]) -> list[DimKey]:
    """All sizes of a grid other than those with all dims, the first ones of ``qk`` and ``v``; none without these."""
    return [key for key in product(tokens, heads, qk, v) if key[2:] != (qk[0], v[0])]


def fill_dims(
    keys: Sequence[DimKey],
    whole: tuple[int, int],
    prefix: int,
    attn_ms: Mapping[tuple[int, int], float],
    measured: Mapping[DimKey, float],
) -> dict[DimKey, float]:
    """Milliseconds of attention at all ``keys``, those that were ``measured`` as they are.

    On n = prefix + patches tokens and h heads, each dim of queries and keys that is gone saves c0 n h + c1 n^2 h, each
    of values c2 n h + c3 n^2 h, off the time ``attn_ms`` of (patches, heads) with all dims; all c >= 0. A measured time
    above that counts as nothing saved.

    Args:
        whole: dims of queries and keys, and of values, of a head that has all.

    Raises:
        InputError: a measured size is none of ``keys``, is no time, or there are too few to fit the form.
    """
    for key, ms in measured.items():
        if key not in keys:
            raise InputError(f"latency table: head dims entry {key} lies outside the grid")
        if not np.isfinite(ms) or ms < 0:
            raise InputError(f"latency table: head dims entry {key} must be a time in milliseconds, got {ms}")
    if len(measured) < min(len(keys), FITTED):
        raise InputError(f"latency table: {len(measured)} measured head dims entries are too few, {FITTED} are needed")
    work = np.array([_work(prefix, whole, *key) for key in keys], dtype=float)
    rows = [keys.index(key) for key in measured]
    saved = np.array([max(0.0, attn_ms[key[:2]] - ms) for key, ms in measured.items()])
    predicted = work @ fit_nonnegative(work[rows], saved)
    found = {}
    for key, saves in zip(keys, predicted.tolist(), strict=True):
        full = attn_ms[key[:2]]
        found[key] = float(measured.get(key, max(full - saves, LEAST_SHARE * full)))
    return found


def _work(prefix: int, whole: tuple[int, int], patches: int, heads: int, qk: int, v: int) -> tuple[float, ...]:
    n = prefix + patches
    gone_qk, gone_v = (n * heads * (most - left) for most, left in zip(whole, (qk, v), strict=True))
    return gone_qk, n * gone_qk, gone_v, n * gone_v
