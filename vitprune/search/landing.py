"""Closes the loop: plans near the budget are built and measured, the prediction refitted, until one lands just under.

A plan is within its budget only because it was measured to be. Every call measures the dense model along with the
candidates, so that a relative budget is judged against the dense model of the same interleave; times of later calls
are then scaled to the dense model's time in the first. The dense model's time also tells when the whole machine is slow
for a while, as virtual ones are: ratios differ then (seen: 0.62 in place of 0.51), and the call is made once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import BudgetUnreachable, InputError
from .allocation import Allocated
from .correct import Evaluate
from .counts import Counts
from .frontier import Point
from .latency import LatencyTable, Timed
from .problem import Plans, Problem


class Measured(NamedTuple):
    """A measured time with its 95% interval, in milliseconds."""

    ms: float
    low_ms: float
    high_ms: float


Measure = Callable[[list[Counts]], list[Measured]]  # plans, the dense one first -> their times, interleaved
Refine = Callable[[Problem, float], Sequence[Point]]  # with its table corrected, a budget in ms -> its best plans
Status = Literal["landed", "under", "dense", "over", "unreachable"]

SLOW = 1.15  # the dense model takes so many times what it took before: the machine is not itself


@dataclass(frozen=True)
class Target:
    """A budget: ``latency_ms``, or ``speedup`` over the dense model measured in the same interleave."""

    latency_ms: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.latency_ms, self.speedup) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise InputError(f"a target is either a positive latency_ms or a positive speedup, got {self}")

    def budget_ms(self, dense_ms: float) -> float:
        """The budget in milliseconds, where the dense model takes ``dense_ms``."""
        return self.latency_ms if self.latency_ms is not None else dense_ms / (self.speedup or 1.0)


@dataclass(frozen=True)
class Approach:
    """How the budget is approached.

    Attributes:
        window: a plan has landed when it takes at least 1 - window of the budget, and no more than the budget.
        candidates: plans measured in a round, the dense one aside.
        rounds: rounds at most.
    """

    window: float = 0.03
    candidates: int = 4
    rounds: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.window < 1 or self.candidates < 1 or self.rounds < 1:
            raise InputError(f"landing needs a window in (0, 1), candidates and rounds, got {self}")


class Row(NamedTuple):
    """One measurement of one plan, and what had been predicted of it when it was chosen."""

    round: int
    point: Point
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for reports."""
        return {
            "round": self.round,
            "predicted_ms": self.point.predicted_ms,
            "measured_ms": self.measured.ms,
            "low_ms": self.measured.low_ms,
            "high_ms": self.measured.high_ms,
            "loss": self.point.loss,
            "counts": self.point.counts.to_dict(),
        }


@dataclass(frozen=True)
class Landed:
    """Where the approach ended.

    Attributes:
        status: 'landed'; 'under': within the budget, but not in its window; 'dense': the dense model is within the
            budget; 'over': nothing measured is; 'unreachable': not even the fastest plan is.
        chosen: the plan; for 'over' and 'unreachable' the fastest one measured.
        budget_ms, dense_ms: as resolved and measured; all times are on the scale of ``dense_ms``.
        rows: every measurement, in order; the dense model's have round numbers too.
        table: the table, corrected by all of them.
        reason: one sentence for the report.
    """

    status: Status
    chosen: Row
    budget_ms: float
    dense_ms: float
    rows: tuple[Row, ...]
    table: LatencyTable
    reason: str


def land(
    problem: Problem,
    target: Target,
    measure: Measure,
    approach: Approach = Approach(),
    *,
    first: Sequence[Point] = (),
    anchors: Sequence[Timed] = (),
    true_loss: Evaluate | None = None,
    refine: Refine | None = None,
) -> Landed:
    """The measured plan that lies just under the budget, of those the one that loses least.

    Args:
        first: plans to measure in the first round before others, such as the finalists of a refinement.
        anchors: whole models measured earlier, the dense one among them, with whatever token method, for the first fit.
        true_loss: decides among plans that landed; without it, the search's own losses do.
        refine: finds the plans of later rounds by their true losses; without it, they are the frontier's.

    Raises:
        InputError: ``measure`` gave other than one positive time per plan.
    """
    run = _Run(problem, target, measure, approach, list(anchors))
    for number in range(1, approach.rounds + 1):
        candidates = run.candidates(first if number == 1 else run.refined(refine))
        if not candidates and number > 1:
            break
        fresh = run.measure(number, candidates)
        if run.dense_ms <= run.budget_ms:
            return run.end("dense", run.dense_row(), "the dense model is within the budget: nothing is pruned")
        inside = [row for row in fresh if run.inside(row.measured)]
        for row in _by_loss(inside, true_loss):
            again = run.measure(number, [row.point])[0]
            both = _mean([row.measured, again.measured])
            if run.inside(both, sessions=2):
                share = 100 * both.ms / run.budget_ms
                return run.end("landed", Row(number, row.point, both), f"measured twice, at {share:.1f}% of the budget")
    return run.nearest(true_loss)


@dataclass
class _Run:
    problem: Problem
    target: Target
    times: Measure
    approach: Approach
    anchors: list[Timed]
    rows: list[Row] = field(default_factory=list)
    ratio: float = 1.0  # of measured to predicted times near the budget, after the fit
    exhausted: bool = False  # not even the fastest plan is predicted to be fast enough

    def __post_init__(self) -> None:
        self.dense = self.problem.dense()
        if self.anchors:
            self.problem = self.problem.on(self.problem.table.fit_correction(self.anchors))
        self.anchor_ms = next((one.ms for one in self.anchors if one.counts == self.dense), None)  # of the dense model
        self.dense_ms = self.anchor_ms or self.problem.predict_ms(self.dense)
        self.least_dense_ms = self.anchor_ms or math.inf  # measured so far

    @property
    def budget_ms(self) -> float:
        return self.target.budget_ms(self.dense_ms)

    def refined(self, refine: Refine | None) -> Sequence[Point]:
        """The best plans for the middle of the window; none where nothing is that fast, or nobody refines."""
        if refine is None or self.dense_ms <= self.budget_ms:
            return ()
        try:
            return refine(self.problem, self.budget_ms / self.ratio * (1 - self.approach.window / 2))
        except BudgetUnreachable:
            return ()

    def candidates(self, first: Sequence[Point]) -> list[Point]:
        """Plans not measured yet that are predicted around the budget, ``first`` before others.

        Where no new one lies in the window, those below it; where the budget seems out of reach, the fastest plan,
        since the prediction may be wrong. None where the dense model seems to be within the budget.
        """
        if self.dense_ms <= self.budget_ms:
            return []
        window, wanted = self.approach.window, self.approach.candidates
        seen = {self.dense} | {row.point.counts for row in self.rows}
        found = [replace(point, predicted_ms=self.problem.predict_ms(point.counts)) for point in first]
        found = [point for point in found if point.counts not in seen]
        aim = self.budget_ms / self.ratio
        plans = self.problem.solve([aim * (1 - 4 * window), aim * (1 + window)])
        self.exhausted = plans.fastest.predicted_ms > aim
        for low, high in ((1 - window, 1 - window / 4), (1 - 4 * window, 1 - window)):
            fresh = _between(plans, aim * low, aim * high, seen | {point.counts for point in found})
            if len(found) < wanted and fresh:
                spread = np.linspace(0, len(fresh) - 1, min(wanted - len(found), len(fresh)))
                found += [fresh[round(i)] for i in spread]
            if found:
                return found[:wanted]
        return [plans.fastest] if plans.fastest.counts not in seen else []

    def measure(self, number: int, points: Sequence[Point]) -> list[Row]:
        """Measures the points along with the dense model, and learns from it."""
        plans = [self.dense, *(point.counts for point in points)]
        times = self._timed(plans)
        if times[0].ms > SLOW * self.least_dense_ms:
            times = min(times, self._timed(plans), key=lambda some: some[0].ms)
        dense = Point(times[0].ms, self.problem.predict_ms(self.dense), 0.0, self.dense, None)
        if self.target.speedup is not None and self.rows:
            scale = self.dense_ms / times[0].ms
            times = [Measured(*(scale * value for value in time)) for time in times]
        fresh = [Row(number, point, time) for point, time in zip((dense, *points), times, strict=True)]
        self.rows += fresh
        self.dense_ms = float(np.median([row.measured.ms for row in self.rows if row.point.counts == self.dense]))
        self._learn(number)
        return fresh[1:]

    def _timed(self, plans: list[Counts]) -> list[Measured]:
        times = [Measured(*one) for one in self.times(plans)]
        if len(times) != len(plans) or not all(0 < time.ms < math.inf for time in times):
            raise InputError(f"measuring {len(plans)} plans must give as many positive times, got {times}")
        self.least_dense_ms = min(self.least_dense_ms, times[0].ms)
        return times

    def _learn(self, number: int) -> None:
        """Refits a, b and kappa, and the ratio that they leave near the budget."""
        # the machine may have changed its pace since the anchors were measured
        scale = self.dense_ms / self.anchor_ms if self.anchor_ms else 1.0
        wholes = [one._replace(ms=scale * one.ms) for one in self.anchors]
        wholes += [Timed(row.point.counts, row.measured.ms, self.problem.method) for row in self.rows]
        self.problem = self.problem.on(self.problem.table.fit_correction(wholes))
        last = [row for row in self.rows if row.round == number and row.point.counts != self.dense]
        if last:
            ratios = [row.measured.ms / self.problem.predict_ms(row.point.counts) for row in last]
            self.ratio = float(np.median(ratios))

    def inside(self, time: Measured, sessions: int = 1) -> bool:
        """Whether a time, measured in so many sessions, lies in the window, clear of its upper end."""
        guard_ms = self.guard_ms(time) / math.sqrt(sessions)
        return (1 - self.approach.window) * self.budget_ms <= time.ms <= self.budget_ms - guard_ms

    def guard_ms(self, time: Measured) -> float:
        """About one sigma: of the time's own interval, or of what sets sessions of one model apart (1% was seen)."""
        return max((time.high_ms - time.low_ms) / 4, self.approach.window / 3 * self.budget_ms)

    def dense_row(self) -> Row:
        """The dense model's measurements as one."""
        rows = [row for row in self.rows if row.point.counts == self.dense]
        return rows[0]._replace(measured=_mean([row.measured for row in rows]))

    def nearest(self, true_loss: Evaluate | None) -> Landed:
        """The best that was measured, where nothing landed."""
        times: dict[Counts, list[Row]] = {}
        for row in self.rows:
            if row.point.counts != self.dense:
                times.setdefault(row.point.counts, []).append(row)
        means = [rows[0]._replace(measured=_mean([row.measured for row in rows])) for rows in times.values()]
        # of many noisy times the one closest below the budget is likely one that came out too low, hence the guard
        under = [row for row in means if row.measured.ms <= self.budget_ms - self.guard_ms(row.measured)]
        under = under or [row for row in means if row.measured.ms <= self.budget_ms]
        if under:
            best = _by_loss(under, true_loss)[0]
            share = 100 * best.measured.ms / self.budget_ms
            return self.end(
                "under", best, f"no plan landed in the window; the best one measured takes {share:.1f}% of the budget"
            )
        fastest = min([*means, self.dense_row()], key=lambda row: row.measured.ms)
        took = f"the fastest plan measured takes {fastest.measured.ms:.4g} ms of a budget of {self.budget_ms:.4g} ms"
        if self.exhausted:
            return self.end("unreachable", fastest, f"{took}, and no faster one is allowed")
        return self.end("over", fastest, f"{took} after {self.rows[-1].round} rounds")

    def end(self, status: Status, chosen: Row, reason: str) -> Landed:
        """The outcome, with all that was learnt."""
        rows = tuple(self.rows)
        return Landed(status, chosen, self.budget_ms, self.dense_ms, rows, self.problem.table, reason)


def _between(plans: Plans | Allocated, low_ms: float, high_ms: float, seen: set[Counts]) -> list[Point]:
    """The distinct best plans for budgets from ``high_ms`` down to ``low_ms`` that are not in ``seen``."""
    found: dict[Counts, Point] = {}
    for budget_ms in np.linspace(high_ms, low_ms, 24):
        try:
            point = plans.best(float(budget_ms))
        except BudgetUnreachable:
            break
        if point.counts not in seen:
            found.setdefault(point.counts, point)
    return list(found.values())


def _by_loss(rows: list[Row], true_loss: Evaluate | None) -> list[Row]:
    """The rows, least loss first."""
    losses = true_loss([row.point.counts for row in rows]) if true_loss and rows else [row.point.loss for row in rows]
    return [rows[i] for i in np.argsort(losses, kind="stable")]


def _mean(times: Sequence[Measured]) -> Measured:
    return Measured(*(float(np.mean(values)) for values in zip(*times, strict=True)))
