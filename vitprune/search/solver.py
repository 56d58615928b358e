"""The exact search: one choice for every part of every block, tokens never rising, least loss within a time budget.

A dynamic programme over (block, token level, time bucket). Times are rounded up, so that no solution exceeds its
budget, and the buckets are so small that all roundings of a path together stay under a stated share of the smallest
budget. One pass answers every budget from the smallest to the largest.

The solver knows nothing of heads or tokens: it sees rows of stages whose choices have a loss, a time and a label, and
levels that fall from stage to stage. The multiple-choice knapsack by buckets follows Frantar and Alistarh, SPDY:
Accurate Pruning with Speedup Guarantees, ICML 2022, https://arxiv.org/abs/2201.13096. Differs from their code: token
levels are a second dimension of the state, and times are rounded up, where theirs are rounded to the nearest bucket and
may exceed the budget.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BudgetUnreachable, InputError
from .choices import Block, Choice, Either, Move, Part, Stay, check, kept_choices, most_loss, roundings, undominated
from .dynamic import (
    LOSS_BITS,
    UNREACHED,
    Arc,
    Arcs,
    Band,
    Fork,
    Stage,
    Trail,
    Way,
    backward,
    fastest,
    forward,
    room_before,
)

SNAP = 1e-9  # of a bucket: a time that is this close to a whole number of buckets is that number


@dataclass(frozen=True)
class Solution:
    """What the solver chose.

    Attributes:
        labels: by block, the labels of its choices in the order of its parts; a move that stays has none.
        levels: the token level that leaves each block.
        loss: sum of the choices' losses.
        ms_exact: sum of the choices' times and the constant part.
        ms_rounded: the same with every time rounded up, which the budget was compared with.
    """

    labels: tuple[tuple[Hashable, ...], ...]
    levels: tuple[int, ...]
    loss: float
    ms_exact: float
    ms_rounded: float


class Frontier:
    """Every budget's best solution, found in one pass; ``solve`` makes it.

    Attributes:
        bucket_ms: size of a time bucket.
        slack_ms: the most that all roundings of one solution add up to.
        fastest: the fastest solution there is, whatever it loses.
        largest_ms: the largest budget that can be asked for.
    """

    def __init__(self, grid: _Grid, kept: list[list[Arc]] | None, largest_ms: float) -> None:
        self.bucket_ms = grid.bucket_ms
        self.slack_ms = grid.roundings * grid.bucket_ms
        self.largest_ms = largest_ms
        self.fastest = grid.solution(grid.fastest())
        self._kept = None if kept is None else grid.solution(kept)
        self._grid = grid
        self._final, self._trails = grid.run(largest_ms)

    def best(self, budget_ms: float) -> Solution:
        """The solution of least loss within ``budget_ms``; of two as good as each other, the faster one.

        Where everything can be kept within the budget and nothing loses less, everything is kept.

        Raises:
            BudgetUnreachable: no solution is that fast.
            InputError: the budget is larger than the largest that was solved for.
        """
        if not budget_ms <= self.largest_ms * (1 + 1e-12):
            raise InputError(
                f"a budget of {budget_ms} ms was asked for, and solved were those up to {self.largest_ms} ms"
            )
        if budget_ms < self.fastest.ms_exact * (1 - 1e-12):
            outside = self._grid.constant_ms[self.fastest.levels[-1]]
            raise BudgetUnreachable(
                f"no plan takes {budget_ms:.4g} ms or less: the fastest takes {self.fastest.ms_exact:.4g} ms, "
                f"{outside:.4g} ms of it outside the blocks",
                self.fastest.ms_exact,
            )
        found = self._within(budget_ms)
        if found is None or self.fastest.loss <= found.loss:
            found = self.fastest
        if self._kept is not None and self._kept.ms_exact <= budget_ms and self._kept.loss <= found.loss:
            found = self._kept
        return found

    def points(self, most: int = 200) -> list[Solution]:
        """The Pareto frontier of loss against rounded time, fastest first; at most ``most`` points, spread evenly."""
        better = self._better()
        numbers = sorted({round(i) for i in np.linspace(0, len(better) - 1, most)}) if better else []
        found = [self._solution(*better[i]) for i in numbers] or [self.fastest]
        if self._kept is not None and self._kept.ms_exact <= self.largest_ms:
            found = [one for one in found if one.loss > self._kept.loss] + [self._kept]
        # they come by rounded time: one may be a hair slower than another that loses less
        return [one for i, one in enumerate(found) if all(one.ms_exact < other.ms_exact for other in found[i + 1 :])]

    def _within(self, budget_ms: float) -> Solution | None:
        """The best solution whose rounded time is within the budget."""
        rows = []
        for level, band in enumerate(self._final):
            cells = band.cells[: self._grid.buckets_left(budget_ms, level) - band.first + 1] if band is not None else ()
            if band is not None and len(cells) and self._grid.buckets_left(budget_ms, level) >= band.first:
                least = int(np.argmin(cells))
                rows.append((int(cells[least]), band.first + least, level))
        loss, spent, level = min(rows, default=(int(UNREACHED), 0, 0))
        return None if loss >= UNREACHED else self._solution(level, spent)

    def _better(self) -> list[tuple[int, int]]:
        """(level, buckets spent) of everything that loses less than all that is faster, fastest first."""
        ms, loss, level, spent = [], [], [], []
        for number, band in enumerate(self._final):
            if band is not None:
                buckets = band.first + np.arange(len(band.cells))
                ms.append(self._grid.constant_ms[number] + buckets * self.bucket_ms)
                loss.append(band.cells)
                level.append(np.full(len(buckets), number))
                spent.append(buckets)
        if not ms:
            return []
        order = np.lexsort((np.concatenate(loss), np.concatenate(ms)))
        sorted_loss = np.concatenate(loss)[order]
        before = np.concatenate([[UNREACHED], np.minimum.accumulate(sorted_loss)[:-1]])
        order = order[sorted_loss < before]
        return list(zip(np.concatenate(level)[order].tolist(), np.concatenate(spent)[order].tolist(), strict=True))

    def _solution(self, level: int, spent: int) -> Solution:
        path = []
        for stages, trail in zip(reversed(self._grid.blocks), reversed(self._trails), strict=True):
            arcs, level, spent = backward(stages, trail, level, spent)
            path.append(arcs)
        return self._grid.solution(path[::-1])


def solve(
    blocks: Sequence[Block],
    constant_ms: Sequence[float],
    budgets_ms: Sequence[float],
    *,
    slack: float = 0.002,
    bucket_ms: float | None = None,
) -> Frontier:
    """The frontier from the smallest to the largest of ``budgets_ms``.

    Args:
        blocks: one row of parts per block; the levels of all parts are those of ``constant_ms``.
        constant_ms: by the token level that leaves the last block, the time of everything that is no choice.
        budgets_ms: milliseconds of the whole model. Smaller ones may be asked for later, and get more slack.
        slack: the most that all roundings may add up to, as a share of the smallest budget that can be met.
        bucket_ms: the size of a bucket, in place of the one that follows from ``slack``.

    Raises:
        InputError: a loss or time is negative or not finite, a part has other levels, or no path leads through.
    """
    if not len(blocks) or not len(constant_ms) or not len(budgets_ms) or not all(ms > 0 for ms in budgets_ms):
        raise InputError(f"a search needs blocks, token levels and budgets above 0 ms, got {list(budgets_ms)}")
    if not all(math.isfinite(ms) for ms in constant_ms) or not 0 < slack < 1:
        raise InputError(
            f"the constant part must be finite times and slack in (0, 1), got {list(constant_ms)}, {slack}"
        )
    for number, block in enumerate(blocks):
        check(block, len(constant_ms), f"block {number}")
    if bucket_ms is None:
        exact = _Grid(blocks, constant_ms, math.inf)
        smallest = max(min(budgets_ms), exact.solution(exact.fastest()).ms_exact)
        bucket_ms = slack * smallest / max(1, exact.roundings)
    grid = _Grid(blocks, constant_ms, bucket_ms)
    rows = [kept_choices(block) for block in blocks]
    arcs = None if any(row is None for row in rows) else [[grid.arc(0, 0, c) for c in row or ()] for row in rows]
    return Frontier(grid, arcs, float(max(budgets_ms)))


class _Grid:
    """The blocks as arcs, with whole numbers for times and losses."""

    def __init__(self, blocks: Sequence[Block], constant_ms: Sequence[float], bucket_ms: float) -> None:
        self.constant_ms = [float(ms) for ms in constant_ms]
        self.bucket_ms = bucket_ms
        total = sum(most_loss(block) for block in blocks)
        # a power of two, so that scaling by itself rounds nothing
        self._scale = 2.0 ** math.floor(LOSS_BITS - 1 - math.log2(total)) if total > 0 else 1.0
        self.blocks = [self._stages(block) for block in blocks]
        moves = min(len(self.constant_ms) - 1, sum(roundings(block, Move) for block in blocks))
        self.roundings = moves + sum(roundings(block, Stay) for block in blocks)

    def arc(self, source: int, target: int, choice: Choice | None) -> Arc:
        """The arc of a choice; None: nothing happens."""
        if choice is None:
            return Arc(source, target, 0, 0, None)
        buckets = math.ceil(choice.ms / self.bucket_ms - SNAP)
        return Arc(source, target, buckets, round(choice.loss * self._scale), choice)

    def _stages(self, block: Block) -> tuple[Stage, ...]:
        return tuple(self._stage(part) for part in block)

    def _stage(self, part: Part) -> Stage:
        if isinstance(part, Either):
            return Fork(tuple(self._stages(branch) for branch in part.branches))
        if isinstance(part, Stay):
            useful = [undominated(choices) for choices in part.choices]
            return Arcs(tuple(tuple(self.arc(n, n, c) for c in choices) for n, choices in enumerate(useful)))
        into = [[self.arc(n, n, None)] for n in range(len(self.constant_ms))]
        for (source, target), choice in sorted(part.steps.items(), key=lambda step: step[0]):
            into[target].append(self.arc(source, target, choice))
        return Arcs(tuple(tuple(arcs) for arcs in into))

    def buckets_left(self, budget_ms: float, level: int) -> int:
        """Buckets within the budget for a path that ends at ``level``; negative: none."""
        return math.floor(min((budget_ms - self.constant_ms[level]) / self.bucket_ms + SNAP, 1e18))

    def run(self, largest_ms: float) -> tuple[list[Band | None], list[list[Trail]]]:
        """The bands after the last block, and each block's trails."""
        rooms: list[list[float]] = [[self.buckets_left(largest_ms, n) for n in range(len(self.constant_ms))]]
        for stages in reversed(self.blocks):
            for_block = rooms[-1]
            for stage in reversed(stages):
                for_block = room_before(stage, for_block)
            rooms.append(for_block)
        rooms.reverse()
        bands: list[Band | None] = [None] * len(self.constant_ms)
        if rooms[0][0] >= 0:
            bands[0] = Band(0, np.zeros(1, np.int64))
        trails = []
        for stages, room in zip(self.blocks, rooms[1:], strict=True):
            bands, trail = forward(stages, bands, room)
            trails.append(trail)
        return bands, trails

    def fastest(self) -> list[list[Arc]]:
        """The arcs of the fastest path, block by block.

        Raises:
            InputError: no path leads through all blocks.
        """
        ways: list[Way | None] = [Way(0.0, 0.0, ())] + [None] * (len(self.constant_ms) - 1)
        for stages in self.blocks:
            ways = fastest(stages, [way and way._replace(blocks=(*way.blocks, ())) for way in ways])
        ends = [way._replace(ms=way.ms + ms) for way, ms in zip(ways, self.constant_ms, strict=True) if way]
        if not ends:
            raise InputError("no path leads through all blocks: some part has no choice at any level that reaches it")
        return [list(arcs) for arcs in min(ends, key=lambda way: way[:2]).blocks]

    def solution(self, path: list[list[Arc]]) -> Solution:
        """What the arcs of each block amount to."""
        levels, level = [], 0
        for arcs in path:
            level = arcs[-1].target if arcs else level
            levels.append(level)
        taken = [[arc.choice for arc in arcs if arc.choice is not None] for arcs in path]
        spent = sum(arc.buckets for arcs in path for arc in arcs)
        return Solution(
            labels=tuple(tuple(choice.label for choice in block) for block in taken),
            levels=tuple(levels),
            loss=math.fsum(choice.loss for block in taken for choice in block),
            ms_exact=math.fsum([self.constant_ms[level], *(choice.ms for block in taken for choice in block)]),
            ms_rounded=self.constant_ms[level] + (spent * self.bucket_ms if spent else 0.0),
        )
