"""The inside of the solver: arcs between token levels, and the least loss for every level and every time spent.

Losses are whole numbers in 64 bits, with the number of the arc in the low 16, so that one minimum over arrays finds
both the least loss and the way it was reached, sums are exact in any order, and ties go to the arc that comes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .choices import Choice

ARC_BITS = 16
LOSS_BITS = 44  # of the sum of a whole path; with the arc's bits and one more for what cannot be reached: below 63
UNREACHED = np.int64(1 << (ARC_BITS + LOSS_BITS + 1))
CELLS = 8192  # cells worked on at a time, so that the arrays stay in the cache


class Arc(NamedTuple):
    """A choice between two token levels, its time rounded up to buckets; ``choice`` None: nothing happens."""

    source: int
    target: int
    buckets: int
    cost: int
    choice: Choice | None


@dataclass(frozen=True)
class Arcs:
    """A stage: ``into[n]`` are the arcs that end in token level n."""

    into: tuple[tuple[Arc, ...], ...]


@dataclass(frozen=True)
class Fork:
    """A stage: exactly one of several rows of stages."""

    branches: tuple[tuple[Stage, ...], ...]


Stage = Arcs | Fork


class Band(NamedTuple):
    """Least losses of one token level: ``cells[i]`` belongs to ``first + i`` spent buckets."""

    first: int
    cells: NDArray[np.int64]


class Marks(NamedTuple):
    """As ``Band``, with the number of the arc that led to each cell."""

    first: int
    arcs: NDArray[np.unsignedinteger]


class Trail(NamedTuple):
    """What is needed to walk back through one stage; ``branches`` holds the trails inside a fork."""

    marks: list[Marks | None]
    branches: list[list[Trail]]


class _Source(NamedTuple):
    band: Band
    buckets: int
    packed: int  # cost, and the number of the arc


def forward(
    stages: Sequence[Stage], bands: list[Band | None], room: list[float]
) -> tuple[list[Band | None], list[Trail]]:
    """The bands after ``stages``, and the way back. ``room[n]``: the most buckets spent that may be left after them."""
    rooms = [room]
    for stage in reversed(stages):
        rooms.append(room_before(stage, rooms[-1]))
    trails = []
    for stage, room_after in zip(stages, rooms[-2::-1], strict=True):
        if isinstance(stage, Fork):
            ways = [forward(branch, bands, room_after) for branch in stage.branches]
            sources = [_joined(ways, n) for n in range(len(bands))]
            inner = [trail for _, trail in ways]
        else:
            sources = [_sources(arcs, bands) for arcs in stage.into]
            inner = []
        relaxed = [_relax(into, most) for into, most in zip(sources, room_after, strict=True)]
        bands = [band for band, _ in relaxed]
        trails.append(Trail([marks for _, marks in relaxed], inner))
    return bands, trails


def _joined(ways: list[tuple[list[Band | None], list[Trail]]], level: int) -> list[_Source]:
    bands = [bands[level] for bands, _ in ways]
    return [_Source(band, 0, number) for number, band in enumerate(bands) if band is not None]


def room_before(stage: Stage, room: list[float]) -> list[float]:
    """The most buckets spent, by level, from which ``stage`` can still be passed within ``room``."""
    if isinstance(stage, Fork):
        through = []
        for branch in stage.branches:
            left = room
            for inner in reversed(branch):
                left = room_before(inner, left)
            through.append(left)
        return [max(levels) for levels in zip(*through, strict=True)]
    before = [-math.inf] * len(room)
    for arcs in stage.into:
        for arc in arcs:
            before[arc.source] = max(before[arc.source], room[arc.target] - arc.buckets)
    return before


def _sources(arcs: tuple[Arc, ...], bands: list[Band | None]) -> list[_Source]:
    found = []
    for number, arc in enumerate(arcs):
        band = bands[arc.source]
        if band is not None:
            found.append(_Source(band, arc.buckets, arc.cost << ARC_BITS | number))
    return found


def _relax(sources: list[_Source], most: float) -> tuple[Band | None, Marks | None]:
    """The cell-wise least of the shifted sources, cut off above ``most`` buckets."""
    first = min((source.band.first + source.buckets for source in sources), default=0)
    if not sources or most < first:
        return None, None
    end = max(source.band.first + len(source.band.cells) + source.buckets for source in sources)
    end = int(min(end, most + 1))
    cells = np.full(end - first, UNREACHED)
    scratch = np.empty(min(CELLS, end - first), np.int64)
    for start in range(first, end, CELLS):
        stop = min(start + CELLS, end)
        for band, buckets, packed in sources:
            low, high = max(start, band.first + buckets), min(stop, band.first + buckets + len(band.cells))
            if low < high:
                moved = scratch[: high - low]
                shift = buckets + band.first
                np.add(band.cells[low - shift : high - shift], packed, out=moved)
                here = cells[low - first : high - first]
                np.minimum(here, moved, out=here)
    low_bits = (1 << ARC_BITS) - 1
    narrow: type[np.unsignedinteger[Any]] = np.uint8 if len(sources) <= 256 and _small(sources) else np.uint16
    arcs = (cells & low_bits).astype(narrow)
    cells &= ~np.int64(low_bits)
    return Band(first, cells), Marks(first, arcs)


def _small(sources: list[_Source]) -> bool:
    return max(source.packed & ((1 << ARC_BITS) - 1) for source in sources) < 256


def backward(stages: Sequence[Stage], trails: list[Trail], level: int, spent: int) -> tuple[list[Arc], int, int]:
    """The arcs, in order, that led to ``spent`` buckets at ``level`` after ``stages``, and where they began."""
    path: list[Arc] = []
    for stage, trail in zip(reversed(stages), reversed(trails), strict=True):
        marks = trail.marks[level]
        if marks is None:
            raise AssertionError(f"no path leads to level {level}")
        number = int(marks.arcs[spent - marks.first])
        if isinstance(stage, Fork):
            inner, level, spent = backward(stage.branches[number], trail.branches[number], level, spent)
            path = inner + path
        else:
            arc = stage.into[level][number]
            level, spent = arc.source, spent - arc.buckets
            path.insert(0, arc)
    return path, level, spent


class Way(NamedTuple):
    """The fastest way to a token level: exact milliseconds, its loss, and its arcs by block."""

    ms: float
    loss: float
    blocks: tuple[tuple[Arc, ...], ...]


def fastest(stages: Sequence[Stage], ways: list[Way | None]) -> list[Way | None]:
    """The fastest ways after ``stages``, all of one block: each arc is appended to the last entry of ``blocks``."""
    for stage in stages:
        if isinstance(stage, Fork):
            branches = [fastest(branch, ways) for branch in stage.branches]
            ways = [_first(list(level)) for level in zip(*branches, strict=True)]
        else:
            ways = [_first([_follow(ways[arc.source], arc) for arc in arcs]) for arcs in stage.into]
    return ways


def _first(ways: list[Way | None]) -> Way | None:
    return min((way for way in ways if way is not None), key=lambda way: way[:2], default=None)


def _follow(way: Way | None, arc: Arc) -> Way | None:
    if way is None:
        return None
    loss, ms = (0.0, 0.0) if arc.choice is None else arc.choice[:2]
    return Way(way.ms + ms, way.loss + loss, (*way.blocks[:-1], (*way.blocks[-1], arc)))
