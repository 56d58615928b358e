"""The contest of token methods: each searches plans on predicted times, and the one that loses least goes on."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vitprune.errors import BudgetUnreachable

from .bench import RANKINGS, Bench
from .embedding import searched_share
from .several import dense_ms, searched_table
from .sizes import sizes

if TYPE_CHECKING:
    from torch import Tensor

    from vitprune.search.correct import Refined
    from vitprune.search.counts import TokenMethod
    from vitprune.search.frontier import Point
    from vitprune.search.landing import Refine
    from vitprune.search.losses import Evaluator, Rankings
    from vitprune.search.problem import Problem


@dataclass(frozen=True)
class Contest:
    """One token method's search on predicted times.

    Attributes:
        method: None where tokens are not reduced.
        problem: with the weights that the refinement found.
        refined: None where no plan is predicted to meet the budget.
        held_out_loss: of the winner, on images that the search did not see.
        held_out: computes it for any plan.
        refine_again: gives the finalists of another refinement, once the table is corrected.
    """

    method: TokenMethod | None
    rankings: Rankings
    problem: Problem
    refined: Refined | None
    held_out_loss: float
    held_out: Evaluator
    refine_again: Refine


class Entry:
    """A token method that enters the contest: its problem, and what computes true losses of its plans."""

    def __init__(self, bench: Bench, method: TokenMethod | None) -> None:
        from vitprune.search.correct import Effort
        from vitprune.search.losses import LossTable, Rankings
        from vitprune.search.problem import Problem

        wanted = bench.profile.search
        table = searched_table(bench)
        losses = LossTable.from_dict(bench.json("losses", losses_file(method.judged_as if method else None)))
        losses = _only_blocks(losses, bench.token_blocks(), method)
        self.bench, self.method, self.name = bench, method, method.name if method else "none"
        self.problem = Problem(table, losses, method, sizes(bench), schedule=bench.schedule())
        self.rankings = Rankings.load(bench.folders["losses"] / RANKINGS)
        self.effort = Effort(max(1, wanted.evaluations), wanted.max_seconds, seed=bench.profile.seed)
        self.budget_ms = target(bench).budget_ms(dense_ms(bench))

    def search(self) -> Contest:
        """The search on predicted times."""
        from vitprune.search.correct import refine

        tell = _tell(self.bench, self.name)
        evaluate, held_out = self._evaluator(self._probes()), self._evaluator(self.bench.holdout_images)

        def refine_again(corrected: Problem, budget_ms: float) -> list[Point]:
            limit = self.effort.seconds and self.effort.seconds / 2
            less = replace(self.effort, evaluations=max(1, self.effort.evaluations // 2), seconds=limit)
            return [one.point for one in refine(corrected, budget_ms, evaluate, less, progress=tell).finalists]

        found = Contest(self.method, self.rankings, self.problem, None, math.inf, held_out, refine_again)
        try:
            refined = refine(self.problem, self.budget_ms, evaluate, self.effort, held_out=held_out, progress=tell)
        except BudgetUnreachable as error:
            self.bench.shows.say(f"{self.name}: {error}")
            return found
        loss, problem = held_out([refined.winner.point.counts])[0], self.problem.reweighted(refined.winner.weights)
        return replace(found, problem=problem, refined=refined, held_out_loss=loss)

    def _probes(self) -> Tensor:
        return self.bench.search_images[: self.bench.profile.search.probe_images]

    def _evaluator(self, images: Tensor) -> Evaluator:
        from vitprune.search.losses import Evaluator

        name = self.method.judged_as if self.method else None
        weights = self.bench.method_weights(name)
        return Evaluator(self.bench.base, self.rankings, images, token_method=name, method_weights=weights)


def _tell(bench: Bench, name: str) -> Any:
    return lambda done, total, loss: bench.shows.progress(
        done, total, f"{name}: plans evaluated, least loss {loss:.4f}"
    )


def _only_blocks(losses: Any, blocks: Collection[int] | None, method: TokenMethod | None) -> Any:
    """The losses without those of reducing tokens in other blocks than ``blocks``, or where ``method`` cannot."""
    first = 1 if method is not None and method.watches else 0
    allowed = [i >= first and (blocks is None or i in blocks) for i in range(len(losses.tokens))]
    return replace(losses, tokens=[curve if ok else {} for curve, ok in zip(losses.tokens, allowed, strict=True)])


def target(bench: Bench) -> Any:
    """The latency that the profile asks for; a speed-up over the model that is searched."""
    from vitprune.search.landing import Target

    budget = bench.profile.budget
    return Target(budget.latency_ms, budget.speedup and budget.speedup * searched_share(bench))


def losses_file(token_method: str | None) -> str:
    """Where the stage ``losses`` leaves the losses with a token method."""
    return f"losses-{token_method or 'none'}.json"
