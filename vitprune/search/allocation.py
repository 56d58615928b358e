"""The published ways to share a budget between layers and kinds of units, to compare with the exact search.

Each removes units in the order of their half's ranking, in whole steps from one allowed size to the next, so that
multiples are kept to before steps are compared. It goes on until the budget is met. Dims of heads all stay.

* ``global``: the steps of least mean importance, whatever they are of; needs scores that compare between kinds.
* ``per_kind``: the same share of every kind of unit, ranked within the kind over all layers by scores as multiples of
  their layer's mean. Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, https://arxiv.org/abs/2407.04616.
* ``uniform``: the same share of every half, as near as its sizes come to it.
* ``greedy``: the steps that lose least importance for the time they save in what is left; the importance of each kind
  adds up to 1, since few scores compare between kinds.
* ``nvit``: the steps of least importance less ``ETA`` times what they save; some of each half stays. Yang et al., NViT,
  CVPR 2023, https://arxiv.org/abs/2110.04869. Differs from the code: all steps are taken on the same scores.
* ``savit``: a share of each kind, ranked within the kind, so that the second-order estimate of the loss is least:
  scores and ``cross_terms``; the best 5% of each half stay. Zheng et al., SAViT, NeurIPS 2022,
  https://openreview.net/forum?id=w5DacXWzQ-Q. Differs from the code: all pairs of shares are tried, not an evolution;
  the scores are part of the estimate, as in the paper; the embedding keeps its width.

    allocation = Allocation.of("global", rankings, sizes, dense)
    allocation.within(problem.predict_ms, budget_ms)
    allocation.within(counted(model.config, "macs"), 2e9)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from ..errors import BudgetUnreachable, InputError
from .counts import Counts, Sizes
from .frontier import Point

if TYPE_CHECKING:
    from ..model.config import VitConfig
    from .losses import LossTable
    from .rankings import Rankings

Rule = Literal["global", "per_kind", "uniform", "greedy", "nvit", "savit"]
RULES: tuple[Rule, ...] = get_args(Rule)
Cost = Callable[[Counts], float]  # milliseconds, or whatever the budget is of
Half = tuple[int, str]  # (block, "attn" | "mlp")

ETA = 5e-4  # importance that NViT gives for a millisecond of its table
PROTECTED = 0.05  # of the units of each half, which SAViT never removes


class Step(NamedTuple):
    """Units of one half that go together: from one of its sizes to the next smaller one."""

    half: Half
    left: int  # units of the half once it is done
    units: int
    importance: float  # of these units, added up

    @property
    def mean(self) -> float:
        """Importance of one of them."""
        return self.importance / self.units


class Offer(NamedTuple):
    """A plan that a rule allows; of those within a budget it wants the one of least ``loss``."""

    counts: Counts
    cost: float
    loss: float


@dataclass(frozen=True)
class Allocation:
    """A rule with what it needs to know of a model.

    Attributes:
        dense: what is kept before anything is removed.
        steps: of each half, in their order.
        cross_terms: of the rankings; see ``Criterion.cross_terms``.
    """

    rule: Rule
    dense: Counts
    steps: Mapping[Half, Sequence[Step]]
    cross_terms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rule: Rule, rankings: Rankings, sizes: Sizes, dense: Counts, losses: LossTable | None = None
    ) -> Allocation:
        """The rule for a model whose units are ranked by ``rankings``, and whose halves may have ``sizes``.

        Args:
            dense: what is kept before anything is removed; its patch tokens stay in every plan.
            losses: where they are given, sizes that have none are passed over.

        Raises:
            InputError: there is no such rule, or the criterion does not tell what it needs to know.
        """
        if rule not in RULES:
            raise InputError(f"an allocation is exact or one of {', '.join(RULES)}, got {rule!r}")
        if rule == "savit" and not rankings.cross_terms:
            raise InputError(
                "the allocation savit weighs heads against hidden units by what the criterion savit alone tells; "
                "use both or neither"
            )
        steps: dict[Half, list[Step]] = {}
        for (block, kind), ranking in rankings.halves.items():
            wanted = sizes.below(kind, len(ranking.order))
            known = None if losses is None else (losses.heads if kind == "attn" else losses.mlp)[block]
            levels = [n for n in wanted if _may_leave(rule, n, len(ranking.order)) and (known is None or n in known)]
            scores = ranking.importances()
            steps[block, kind] = _steps((block, kind), levels, _over_mean(scores) if rule == "per_kind" else scores)
        return cls(rule, dense, steps, rankings.cross_terms)

    def within(self, cost: Cost, budget: float) -> Counts:
        """The plan that the rule leads to where ``cost`` may be at most ``budget``.

        Raises:
            BudgetUnreachable: it leads to none.
        """
        return pick(self.offers(cost), budget).counts

    def offers(self, cost: Cost) -> list[Offer]:
        """All plans that the rule would choose from, the dense one first."""
        if self.rule == "savit":
            return [Offer(counts, cost(counts), loss) for counts, loss in self._pairs()]
        path = [self.dense]
        for steps in self._in_order(cost):
            path.append(after(path[-1], steps))
        return [Offer(counts, cost(counts), float(number)) for number, counts in enumerate(path)]

    def _in_order(self, cost: Cost) -> Iterator[Sequence[Step]]:
        """What goes first, and what goes with it."""
        if self.rule == "greedy":
            whole = {kind: math.fsum(s.importance for s in self._of(kind)) or 1.0 for kind in self._kinds()}
            return self._cheapest_first(cost, lambda s, saved: _ratio(s.importance / whole[s.half[1]], saved))
        if self.rule == "nvit":
            return self._cheapest_first(cost, lambda s, saved: s.importance - ETA * saved)
        if self.rule == "uniform":
            return self._same_share()
        if self.rule == "global":
            return ([step] for step in _ranked(self.steps))
        return self._same_share_of_kinds()

    def _cheapest_first(self, cost: Cost, price: Callable[[Step, float], float]) -> Iterator[Sequence[Step]]:
        """Step by step, the one of least price, which depends on what it saves of what is left."""
        counts, done = self.dense, dict.fromkeys(self.steps, 0)
        while open_halves := [half for half, steps in self.steps.items() if done[half] < len(steps)]:
            now = cost(counts)
            following = [self.steps[half][done[half]] for half in open_halves]
            step = min(following, key=lambda s: (price(s, now - cost(after(counts, [s]))), s.half))
            counts = after(counts, [step])
            done[step.half] += 1
            yield [step]

    def _same_share(self) -> Iterator[Sequence[Step]]:
        """At each share that is the next for some half, all steps that do not remove more than it."""
        shares: dict[float, list[Step]] = {}
        for steps in self.steps.values():
            whole = sum(step.units for step in steps) + (steps[-1].left if steps else 0)
            for step in steps:
                shares.setdefault(round(1 - step.left / whole, 9), []).append(step)
        for share in sorted(shares):
            yield shares[share]

    def _same_share_of_kinds(self) -> Iterator[Sequence[Step]]:
        """The lowest step of the kind of which the smallest share has gone with it."""
        found = []
        for kind in self._kinds():
            ranked = _ranked(self._halves(kind))
            gone, whole = accumulate(step.units for step in ranked), self._units()[kind]
            found += [(units / whole, step) for units, step in zip(gone, ranked, strict=True)]
        return ([step] for _, step in sorted(found, key=lambda one: one[0]))

    def _pairs(self) -> Iterator[tuple[Counts, float]]:
        """Every two shares of heads and hidden units, and the second-order estimate of what that loses."""
        rows = {kind: _ranked(self._halves(kind)) for kind in ("attn", "mlp")}
        lost = {kind: [0.0, *accumulate(s.importance for s in row)] for kind, row in rows.items()}
        gone = {kind: [0, *accumulate(s.units for s in row)] for kind, row in rows.items()}
        whole = self._units()
        terms, heads = self.cross_terms, self.dense
        for i in range(len(rows["attn"]) + 1):
            heads = after(heads, rows["attn"][i - 1 : i]) if i else heads
            counts = heads
            for j in range(len(rows["mlp"]) + 1):
                counts = after(counts, rows["mlp"][j - 1 : j]) if j else counts
                shares = {"attn": gone["attn"][i] / whole["attn"], "mlp": gone["mlp"][j] / whole["mlp"]}
                cross = sum(shares[a] * shares[b] * terms[a][b] for a in terms for b in terms[a])
                yield counts, max(0.0, lost["attn"][i] + lost["mlp"][j] + cross)

    def _units(self) -> dict[str, int]:
        """How many there are of a kind."""
        return {"attn": max(1, sum(self.dense.heads)), "mlp": max(1, sum(self.dense.mlp))}

    def _kinds(self) -> list[str]:
        return sorted({kind for _, kind in self.steps})

    def _halves(self, kind: str) -> dict[Half, Sequence[Step]]:
        return {half: steps for half, steps in self.steps.items() if half[1] == kind}

    def _of(self, kind: str) -> Iterable[Step]:
        return (step for steps in self._halves(kind).values() for step in steps)


class Allocated:
    """What an allocation makes of a problem's table: a plan for every budget, as ``Plans`` gives them.

    Attributes:
        fastest: the fastest plan that the rule leads to, whatever it loses.
    """

    def __init__(self, allocation: Allocation, predict_ms: Cost, loss: Cost) -> None:
        self._offers, self._loss = allocation.offers(predict_ms), loss
        quickest = min(self._offers, key=lambda offer: offer.cost)
        self.fastest = self._point(quickest, quickest.cost)

    def best(self, budget_ms: float) -> Point:
        """The plan for ``budget_ms``.

        Raises:
            BudgetUnreachable: the rule leads to none.
        """
        return self._point(pick(self._offers, budget_ms), budget_ms)

    def points(self, most: int = 200) -> list[Point]:
        """Plans for up to ``most`` budgets from the fastest plan's time to the dense model's, fastest first."""
        low, high = self.fastest.predicted_ms, self._offers[0].cost
        budgets = [high - (high - low) * i / max(1, most - 1) for i in range(most)]
        found = {offer.counts: offer for offer in (pick(self._offers, max(low, budget)) for budget in budgets)}
        return [self._point(offer, offer.cost) for offer in sorted(found.values(), key=lambda offer: offer.cost)]

    def _point(self, offer: Offer, budget_ms: float) -> Point:
        return Point(budget_ms, offer.cost, self._loss(offer.counts), offer.counts, None)


def pick(offers: Sequence[Offer], budget: float) -> Offer:
    """The offer of least loss that costs no more than ``budget``.

    Raises:
        BudgetUnreachable: none does.
    """
    found = min((offer for offer in offers if offer.cost <= budget), key=lambda offer: offer.loss, default=None)
    if found is None:
        least = min(offer.cost for offer in offers)
        raise BudgetUnreachable(
            f"this allocation leads to no plan within {budget:.4g}: the least one takes {least:.4g}; allow smaller "
            "sizes, whole halves too, or a larger budget",
            least,
        )
    return found


def after(counts: Counts, steps: Iterable[Step]) -> Counts:
    """``counts`` once ``steps`` are done."""
    heads, mlp = list(counts.heads), list(counts.mlp)
    for (block, kind), left, _, _ in steps:
        (heads if kind == "attn" else mlp)[block] = left
    return replace(counts, heads=tuple(heads), mlp=tuple(mlp))


def counted(config: VitConfig, what: Literal["macs", "params"]) -> Cost:
    """Multiply-accumulates of an image, or parameters, of a plan of the dense model that ``config`` describes."""
    from ..macs import macs, params

    count = {"macs": macs, "params": params}[what]

    def cost(counts: Counts) -> float:
        kept = zip(config.blocks, counts.heads, counts.mlp, counts.patches_out(config.patches), strict=True)
        blocks = [replace(block, heads=heads, mlp=mlp, patches=left) for block, heads, mlp, left in kept]
        return count(config.with_blocks(blocks, config.reducer))

    return cost


def _may_leave(rule: Rule, left: int, units: int) -> bool:
    least = {"nvit": 1, "savit": max(1, int(PROTECTED * units))}
    return left >= least.get(rule, 0)


def _steps(half: Half, levels: Sequence[int], importances: Sequence[float]) -> list[Step]:
    """From all units over ``levels``, which descend; ``importances`` are in order of removal."""
    steps, units = [], len(importances)
    for before, left in zip((units, *levels), levels, strict=False):
        going = importances[units - before : units - left]
        steps.append(Step(half, left, before - left, math.fsum(going)))
    return steps


def _over_mean(scores: Sequence[float]) -> list[float]:
    mean = math.fsum(scores) / max(1, len(scores))
    return [score / mean if mean > 0 else score for score in scores]


def _ranked(halves: Mapping[Half, Sequence[Step]]) -> list[Step]:
    """All steps by their mean importance, none before an earlier one of its half."""
    rows = []
    for half, steps in halves.items():
        worth = accumulate((step.mean for step in steps), max)
        rows += [(value, half, number, step) for number, (value, step) in enumerate(zip(worth, steps, strict=True))]
    return [step for *_, step in sorted(rows, key=lambda row: row[:3])]


def _ratio(lost: float, saved: float) -> float:
    """What each millisecond costs; steps that save nothing come last."""
    return lost / saved if saved > 0 else math.inf
