"""Parts and whole models timed at one speed of the machine, and what a call of the runtime costs by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from vitprune.search.landing import SLOW

from ..backends.base import Backend
from .protocol import ANCHOR_HALF_WIDTH, TABLE_HALF_WIDTH, Measurement, Progress, measure
from .visits import Subject

LEAST_S = 15.0  # for the parts, and for the whole models, however long exporting took
CALLS = 400
LEAST_WORK = 0.1  # of a part's time: never less is left of it without its call


def time_both(
    parts: Sequence[Subject],
    wholes: Sequence[Subject],
    reference: Subject,
    *,
    end: float,
    seed: int,
    progress: Progress | None = None,
) -> tuple[list[Measurement], list[Measurement]]:
    """Measurements of ``parts`` and of ``wholes``, at the speed that the machine had for the whole models.

    Args:
        reference: timed between visits in both.
        end: moment of ``time.monotonic`` at which to be done.
        seed: draws the order of visits.
        progress: told of each visit, in steps of 1000 for both together.
    """
    time_parts = partial(
        measure,
        parts,
        reference,
        relative_half_width=TABLE_HALF_WIDTH,
        max_seconds=max(2 * LEAST_S, end - time.monotonic()) / 2,
        seed=seed,
    )
    pieces = time_parts(progress=_half(progress, 0))
    time_wholes = partial(
        measure,
        wholes,
        reference,
        relative_half_width=ANCHOR_HALF_WIDTH,
        max_seconds=max(LEAST_S, end - time.monotonic()),
        seed=seed,
    )
    found = time_wholes(progress=_half(progress, 500))
    # what was measured while the machine was slow is measured again, once
    if pieces[0].reference_ms > SLOW * found[0].reference_ms:
        pieces = time_parts()
    elif found[0].reference_ms > SLOW * pieces[0].reference_ms:
        found = time_wholes()
    return [piece.at(found[0].reference_ms) for piece in pieces], found


def time_call(nothing: Backend) -> float:
    """Milliseconds of a call that does no work; a model pays it once, and parts that are timed singly once each."""
    with nothing:
        feed = {spec.name: np.ones((1, 1), spec.dtype) for spec in nothing.inputs}
        return float(np.median(nothing.time_ms(feed, CALLS)[CALLS // 2 :]))


def without_call(part_ms: float, call_ms: float) -> float:
    """What a part adds to the time of a model."""
    return max(part_ms - call_ms, LEAST_WORK * part_ms)


def _half(progress: Progress | None, start: int) -> Progress | None:
    """Progress of one of two phases, in 500 of 1000 steps."""
    if progress is None:
        return None
    return lambda done, total, what: progress(start + 500 * done // max(1, total), 1000, what)
