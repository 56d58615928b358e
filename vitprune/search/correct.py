"""Corrects the sum of single losses by the true loss of whole plans: re-weight, solve again, evaluate, repeat.

The idea, a sensitivity per unit that is found by solving and evaluating, is that of Frantar and Alistarh, SPDY:
Accurate Pruning with Speedup Guarantees, ICML 2022, https://arxiv.org/abs/2201.13096, and of Kurtic, Frantar and
Alistarh, ZipLM: Inference-Aware Structured Pruning of Language Models, NeurIPS 2023, https://arxiv.org/abs/2302.04089.
Differs from theirs: it begins with measured losses (all weights 1) in place of random weights; candidates come in
generations, so that their evaluations can be spread over machines; besides single units, a kind of unit or its trend
over depth is re-weighted at once, and one candidate of each generation takes the weights that fit all evaluations best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..errors import InputError
from .counts import Counts
from .frontier import Point
from .problem import Problem, Unit

Evaluate = Callable[[list[Counts]], list[float]]  # plans -> the true loss of each, in nats per image
Progress = Callable[[int, int, float], None]  # evaluations done, evaluations at most, least true loss so far
PULL = 0.1  # a unit's loss that is off by all of itself counts as one good plan that is off by this share


@dataclass(frozen=True)
class Effort:
    """How much a refinement may spend.

    Attributes:
        evaluations: true losses at most, the unrefined plan's among them.
        seconds: no generation begins after so long; None: no limit. With one, results depend on the machine's speed.
        generation: plans evaluated together.
        finalists: plans among which the held-out images decide.
        slack: rounding of the solver, coarser than the unrefined plan's since it solves so often.
    """

    evaluations: int = 96
    seconds: float | None = None
    generation: int = 8
    finalists: int = 4
    slack: float = 0.004
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.evaluations, self.generation, self.finalists) < 1:
            raise InputError(f"a refinement needs at least 1 evaluation, candidate and finalist, got {self}")


class Tried(NamedTuple):
    """A plan, the weights that it is the best one for, and its losses."""

    point: Point
    weights: Mapping[Unit, float]
    sum_loss: float  # of its single changes, unweighted
    true_loss: float


@dataclass(frozen=True)
class Refined:
    """What came of a refinement.

    Attributes:
        winner: the finalist that loses least on the held-out images; without them, on the search's.
        unrefined: the plan that the sum of single losses alone leads to.
        finalists: the best plans, least true loss first; none loses more than the unrefined one.
        tried: every plan evaluated, in order.
        rank_correlation: Spearman's, between sums and true losses of all plans tried; nan for fewer than three.
    """

    winner: Tried
    unrefined: Tried
    finalists: tuple[Tried, ...]
    tried: tuple[Tried, ...]
    rank_correlation: float


def refine(
    problem: Problem,
    budget_ms: float,
    evaluate: Evaluate,
    effort: Effort = Effort(),
    *,
    held_out: Evaluate | None = None,
    progress: Progress | None = None,
) -> Refined:
    """The plan of least true loss within ``budget_ms`` that re-weighted solving finds.

    Args:
        evaluate: the true loss of plans on the search's images; called with up to ``effort.generation`` at once.
        held_out: the same on images that the search does not see; decides among the finalists.

    Raises:
        BudgetUnreachable: no plan is that fast.
        InputError: ``evaluate`` gave other than one finite loss per plan.
    """
    run = _Run(problem, budget_ms, evaluate, effort)
    first = problem.solve([budget_ms]).best(budget_ms)
    run.evaluate([(first, problem.weights)])
    begun = time.monotonic()
    while first.counts != problem.dense() and len(run.tried) < effort.evaluations:
        if progress is not None:
            progress(len(run.tried), effort.evaluations, run.ranked()[0].true_loss)
        late = effort.seconds is not None and time.monotonic() - begun > effort.seconds
        candidates = [] if late else run.generation()
        if not candidates:
            break
        run.evaluate(candidates)
    unrefined = run.tried[0]
    finalists = [one for one in run.ranked()[: effort.finalists] if one.true_loss <= unrefined.true_loss]
    winner = finalists[0]
    if held_out is not None and len(finalists) > 1:
        losses = held_out([one.point.counts for one in finalists])
        winner = finalists[int(np.argmin(_checked(losses, len(finalists))))]
    return Refined(winner, unrefined, tuple(finalists), tuple(run.tried), run.rank_correlation())


@dataclass
class _Run:
    problem: Problem
    budget_ms: float
    true_loss: Evaluate
    effort: Effort
    tried: list[Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.effort.seed)
        self.units = self.problem.units()
        self.single: dict[Counts, dict[Unit, float]] = {}  # of every plan tried

    def evaluate(self, candidates: Sequence[tuple[Point, Mapping[Unit, float]]]) -> None:
        """Adds the candidates with their true losses to what was tried."""
        losses = _checked(self.true_loss([point.counts for point, _ in candidates]), len(candidates))
        for (point, weights), loss in zip(candidates, losses, strict=True):
            self.single[point.counts] = single = self.problem.losses_of(point.counts)
            self.tried.append(Tried(point, weights, math.fsum(single.values()), loss))

    def ranked(self) -> list[Tried]:
        """What was tried, least true loss first."""
        return sorted(self.tried, key=lambda one: one.true_loss)

    def generation(self) -> list[tuple[Point, Mapping[Unit, float]]]:
        """New plans to evaluate; fewer than a generation, or none, where new weights lead to no new plan."""
        wanted = min(self.effort.generation, self.effort.evaluations - len(self.tried))
        found: list[tuple[Point, Mapping[Unit, float]]] = []
        for attempt in range(6 * wanted):
            weights = self._fitted() if attempt == 0 else self._mutated(spread=0.5 + attempt / (3 * wanted))
            plans = self.problem.reweighted(weights).solve([self.budget_ms], slack=self.effort.slack)
            point = plans.best(self.budget_ms)
            if point.counts not in self.single and all(point.counts != other.counts for other, _ in found):
                found.append((point, weights))
            if len(found) == wanted:
                break
        return found

    def _fitted(self) -> dict[Unit, float]:
        """The weights that explain all true losses best, those of the better plans above all; never negative.

        Each is one factor for its kind of unit, one for the trend of the kind over depth, and one of its own. The last
        is pulled toward 1 harder than the others, for there are as many as units.
        """
        kinds = [kind for _, kind in self.units]
        depth = np.array([block for block, _ in self.units]) / max(1, self.units[-1][0]) - 0.5
        kind = np.array([[name == other for other in dict.fromkeys(kinds)] for name in kinds], dtype=float)
        factors = np.concatenate([np.eye(len(kinds)), kind, kind * depth[:, None]], axis=1)
        pull = np.diag(np.where(np.arange(factors.shape[1]) < len(kinds), PULL, PULL / 5))
        start = np.array([self.problem.weights.get(unit, 1.0) for unit in self.units])
        sums = np.array([[self.single[t.point.counts][u] for u in self.units] for t in self.tried]) * start
        true = np.array([max(one.true_loss, 1e-12) for one in self.tried])
        trust = true.min() / true
        matrix = np.concatenate([(sums @ factors) * (trust / true)[:, None], pull])
        target = np.concatenate([(1 - sums.sum(axis=1) / true) * trust, np.zeros(len(pull))])
        found, *_ = np.linalg.lstsq(matrix, target, rcond=None)
        return dict(zip(self.units, (start * np.maximum(1 + factors @ found, 0.02)).tolist(), strict=True))

    def _mutated(self, spread: float) -> dict[Unit, float]:
        """A change of the weights of one of the best plans, or of the fitted ones; larger with ``spread``."""
        best = self.ranked()[:3]
        parent = self._fitted() if self.rng.random() < 0.5 else best[int(self.rng.integers(len(best)))].weights
        log = np.log([max(parent.get(unit, 1.0), 1e-6) for unit in self.units])
        how, kind = self.rng.random(), self.units[int(self.rng.integers(len(self.units)))][1]
        of_kind = np.array([unit[1] == kind for unit in self.units])
        if how < 0.25:
            log[of_kind] += spread * self.rng.standard_normal()
        elif how < 0.4:
            depth = np.array([block for block, _ in self.units]) / max(1, self.units[-1][0])
            log[of_kind] += 2 * spread * self.rng.standard_normal() * (depth[of_kind] - 0.5)
        else:
            chosen = self.rng.random(len(log)) < 0.15
            chosen[int(self.rng.integers(len(log)))] = True
            log[chosen] += 2 * spread * self.rng.standard_normal(int(chosen.sum()))
        return dict(zip(self.units, np.exp(np.clip(log, -7, 7)).tolist(), strict=True))

    def rank_correlation(self) -> float:
        """Spearman's, between the sums of single losses and the true losses."""
        if len(self.tried) < 3:
            return math.nan
        sums, true = (_ranks([getattr(one, name) for one in self.tried]) for name in ("sum_loss", "true_loss"))
        return float(np.corrcoef(sums, true)[0, 1]) if sums.std() and true.std() else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0 on, the mean rank for equal values."""
    order = np.asarray(values)
    return (order[:, None] > order).sum(axis=1) + ((order[:, None] == order).sum(axis=1) - 1) / 2


def _checked(losses: Sequence[float], wanted: int) -> list[float]:
    found = [float(loss) for loss in losses]
    if len(found) != wanted or not all(math.isfinite(loss) for loss in found):
        raise InputError(f"an evaluation of {wanted} plans must give as many finite losses, got {found}")
    return found
