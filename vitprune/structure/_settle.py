"""From learned scores and counts to a plan that meets its budget: aligned, and the least important units gone first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model.config import VitConfig
from ..plan import BlockPlan
from .base import Amounts, BelowLeast, Budget, Multiples

KINDS = ("heads", "qk", "v", "mlp")
Scores = Mapping[str, Sequence[Tensor]]  # kind -> one for each block: [H], [H, D], [H, D], [M]; higher stays


@dataclass(frozen=True)
class Counts:
    """How many units stay in each block; ``runs`` is False for a block that is left out."""

    heads: tuple[int, ...]
    qk: tuple[int, ...]
    v: tuple[int, ...]
    mlp: tuple[int, ...]
    runs: tuple[bool, ...]

    @classmethod
    def dense(cls, config: VitConfig) -> Counts:
        """All of the model that ``config`` describes."""
        of = {kind: tuple(full(config, kind)) for kind in KINDS}
        return cls(**of, runs=(True,) * len(config.blocks))

    def with_one(self, kind: str, block: int, count: int) -> Counts:
        """The same with ``count`` units of one block; of dims that are tied, of both kinds."""
        values = list(getattr(self, kind))
        values[block] = count
        return replace(self, **{kind: tuple(values)})

    def no_more_than(self, other: Counts) -> Counts:
        """The smaller of both, everywhere."""
        least = {kind: tuple(map(min, getattr(self, kind), getattr(other, kind))) for kind in KINDS}
        return replace(self, **least)

    def amounts(self, config: VitConfig) -> Amounts:
        """As a cost takes them."""
        dense = Amounts.dense(config)
        given = {name: torch.tensor(getattr(self, name), dtype=torch.float32) for name in (*KINDS, "runs")}
        return dense._replace(**given)


def full(config: VitConfig, kind: str) -> list[int]:
    """Units of each block of the model."""
    return [getattr(block, {"qk": "qk_dim", "v": "v_dim"}.get(kind, kind)) for block in config.blocks]


def levels(units: int, multiples: Multiples, kind: str) -> list[int]:
    """Counts of ``kind`` to choose from, descending: all ``units``, and the multiples below."""
    dims = kind in ("qk", "v")
    multiple = multiples.head_dim if dims else getattr(multiples, kind)
    least = multiples.least_head_dim if dims else 1
    return [units, *(n for n in range((units - 1) // multiple * multiple, 0, -multiple) if n >= least)]


def nearest(count: float, units: int, multiples: Multiples, kind: str) -> int:
    """The level that is nearest to ``count``; of two that are, the larger."""
    return min(levels(units, multiples, kind), key=lambda level: (abs(level - count), -level))


def settle(
    wanted: Mapping[str, Sequence[float]],
    scores: Scores,
    config: VitConfig,
    budget: Budget,
    multiples: Multiples,
    *,
    runs: Sequence[bool] | None = None,
    tied: bool = False,
) -> Counts:
    """Aligned counts near ``wanted`` that cost at most the budget, and to which no unit can be added within it.

    While they cost too much, the step down goes that loses the least for what it saves; then steps up are taken that
    bring the most for what they cost. Scores of a kind are told as shares of their sum over the whole model, times what
    the kind costs, so that kinds compare.

    Args:
        wanted: kind -> learned counts of the blocks; kinds that are not named stay whole.
        scores: of these kinds, not negative.
        runs: False for blocks that are left out; None: all stay.
        tied: dims of queries and keys are those of the values: ``wanted`` and ``scores`` name ``v`` alone.

    Raises:
        BelowLeast: the least of everything costs more than the budget.
    """
    run = _Settling(scores, config, budget, multiples, tied)
    counts = replace(Counts.dense(config), runs=tuple(runs) if runs else (True,) * len(config.blocks))
    for kind, values in wanted.items():
        for block, value in enumerate(values):
            near = nearest(value, full(config, kind)[block], multiples, kind)
            counts = run.with_one(counts, kind, block, near)
    return run.up(run.down(counts))


def uniform(config: VitConfig, budget: Budget, multiples: Multiples, kinds: Sequence[str], *, tied: bool) -> Counts:
    """The largest counts within the budget that are the same share of each block, rounded down to levels.

    What the rounding leaves of the budget goes to MLP units, the same number in each block.

    Raises:
        BelowLeast: the least of everything costs more than the budget.
    """
    run = _Settling({}, config, budget, multiples, tied)

    def at(shares: Mapping[str, float]) -> Counts:
        counts = Counts.dense(config)
        for kind, share in shares.items():
            for block, units in enumerate(full(config, kind)):
                fitting = [n for n in levels(units, multiples, kind) if n <= share * units + 1e-9]
                least = levels(units, multiples, kind)[-1]
                counts = run.with_one(counts, kind, block, max(fitting, default=least))
        return counts

    of_kind = {
        kind: {n / units for units in full(config, kind) for n in levels(units, multiples, kind)} for kind in kinds
    }
    for share in sorted(set().union(*of_kind.values()), reverse=True):
        if run.fits(at(dict.fromkeys(kinds, share))):
            break
    else:
        raise run.unreachable(at(dict.fromkeys(kinds, 0.0)))
    for more in sorted(of_kind.get("mlp", ()), reverse=True):
        if run.fits(found := at({**dict.fromkeys(kinds, share), "mlp": more})):
            return found
    return at(dict.fromkeys(kinds, share))


def block_plans(counts: Counts, scores: Scores, config: VitConfig, *, tied: bool = False) -> tuple[BlockPlan, ...]:
    """What stays: of each kind the units of the highest scores, of each kept head equally many dims."""
    plans = []
    for number, block in enumerate(config.blocks):
        if not counts.runs[number]:
            plans.append(BlockPlan((), ()))
            continue
        heads = _best(scores["heads"][number], counts.heads[number]) if "heads" in scores else tuple(range(block.heads))
        mlp = _best(scores["mlp"][number], counts.mlp[number]) if "mlp" in scores else tuple(range(block.mlp))
        dims: dict[str, Any] = {}
        for kind, size in (("qk", block.qk_dim), ("v", block.v_dim)):
            of = "v" if tied else kind
            if of in scores and getattr(counts, kind)[number] < size:
                dims[kind] = tuple(_best(scores[of][number][head], getattr(counts, kind)[number]) for head in heads)
        plans.append(BlockPlan(heads, mlp, **dims))
    return tuple(plans)


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    order = scores.detach().double().argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


class _Settling:
    """Moves from counts to counts."""

    def __init__(self, scores: Scores, config: VitConfig, budget: Budget, multiples: Multiples, tied: bool) -> None:
        self.config, self.budget, self.multiples, self.tied = config, budget, multiples, tied
        dense = Counts.dense(config)
        self.sums: dict[tuple[str, int], list[float]] = {}  # what the best so many units are worth
        for kind, of_blocks in scores.items():
            least = dense
            for block, units in enumerate(full(config, kind)):
                least = self.with_one(least, kind, block, levels(units, multiples, kind)[-1])
            total = sum(float(one.double().sum()) for one in of_blocks)
            scale = (self.cost(dense) - self.cost(least)) / max(total, 1e-30)
            for block, one in enumerate(of_blocks):
                ranked = one.detach().double().sort(descending=True, dim=-1).values
                worth = ranked.reshape(-1, ranked.shape[-1]).sum(0).cumsum(0) * scale
                self.sums[kind, block] = [0.0, *worth.tolist()]

    def with_one(self, counts: Counts, kind: str, block: int, count: int) -> Counts:
        counts = counts.with_one(kind, block, count)
        return counts.with_one("qk", block, count) if self.tied and kind == "v" else counts

    def cost(self, counts: Counts) -> float:
        with torch.no_grad():
            return float(self.budget.cost(counts.amounts(self.config)))

    def fits(self, counts: Counts) -> bool:
        return self.cost(counts) <= self.budget.share + 1e-6  # costs are computed in fp32

    def unreachable(self, least: Counts) -> BelowLeast:
        return BelowLeast(self.budget, self.cost(least))

    def down(self, counts: Counts) -> Counts:
        while not self.fits(counts):
            steps = list(self._steps(counts, -1))
            if not steps:
                raise self.unreachable(counts)
            now = self.cost(counts)
            counts = min(steps, key=lambda step: step[1] / max(now - self.cost(step[0]), 1e-12))[0]
        return counts

    def up(self, counts: Counts) -> Counts:
        while True:
            fitting = [step for step in self._steps(counts, 1) if self.fits(step[0])]
            if not fitting:
                return counts
            now = self.cost(counts)
            counts = max(fitting, key=lambda step: step[1] / max(self.cost(step[0]) - now, 1e-12))[0]

    def _steps(self, counts: Counts, way: int) -> Iterator[tuple[Counts, float]]:
        """Counts one level further ``way`` in one place, and the worth of what goes or comes."""
        for (kind, block), worth in self.sums.items():
            if not counts.runs[block]:
                continue
            count = getattr(counts, kind)[block]
            known = levels(full(self.config, kind)[block], self.multiples, kind)
            place = known.index(count) - way
            if 0 <= place < len(known):
                share = counts.heads[block] / self.config.blocks[block].heads if kind in ("qk", "v") else 1.0
                yield self.with_one(counts, kind, block, known[place]), share * abs(worth[known[place]] - worth[count])
