"""What a model may become, as the solver's choices: a latency table, a loss table, and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, cast

from ..errors import BudgetUnreachable, InputError
from .choices import Block, Choice, Either, Move, Part, Stay
from .counts import Counts, Sizes, TokenMethod
from .frontier import Point
from .latency import LatencyTable
from .solver import Frontier, Solution, solve

if TYPE_CHECKING:
    from .losses import LossTable

Unit = tuple[int, str]  # (block, "heads" | "mlp" | "tokens" | "qk" | "v"): what has a loss of its own


def multiples(full: int, multiple: int, fewest: int = 0) -> tuple[int, ...]:
    """``full`` and the multiples of ``multiple`` below it that are at least ``fewest``, descending; 0 is one.

    Raises:
        InputError: ``multiple`` is no positive number.
    """
    if multiple < 1:
        raise InputError(f"sizes can be multiples of 1 or more, got {multiple}")
    return (full, *(size for size in range((full - 1) // multiple * multiple, -1, -multiple) if size >= fewest))


def ladder(full: int, rungs: int, fewest: int) -> tuple[int, ...]:
    """At most ``rungs`` token levels from ``full`` down to ``fewest``, each by about the same share fewer.

    Raises:
        InputError: there is no such ladder.
    """
    if not 1 <= fewest <= full or rungs < 1 or (rungs == 1 and fewest < full):
        raise InputError(f"{rungs} token levels cannot lead from {full} down to {fewest}")
    shares = [(fewest / full) ** (rung / max(1, rungs - 1)) for rung in range(rungs)]
    return tuple(sorted({round(full * share) for share in shares}, reverse=True))


@dataclass(frozen=True)
class Problem:
    """One search: a device's table, a model's losses, a token method and the sizes to choose from.

    Attributes:
        method: what reduces tokens; None: nothing does.
        sizes: a size that a block has no loss for is passed over there; patches must be levels of the table.
        weights: what the losses of a unit are multiplied by, 1 where it is not named.
        schedule: patch tokens that leave each block, where that is no choice; None: it is one.
    """

    table: LatencyTable
    losses: LossTable
    method: TokenMethod | None
    sizes: Sizes
    weights: Mapping[Unit, float] = field(default_factory=dict)
    schedule: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.losses.token_method != self.method.judged_as:
            raise InputError(
                f"the losses were measured with {self.losses.token_method}, not with {self.method.judged_as}"
            )
        if self.method is not None and self.method.needs_class_token and self.table.levels.prefix == 0:
            raise InputError(f"{self.method.name} scores by the class token's attention; this model has none")
        if self.ends_early and not self.table.attn_prefix:
            raise InputError("the latency table has no times of a last block for the prefix tokens alone")
        unknown = [n for n in self.sizes.patches if n and n not in self.table.tokens]
        if unknown:
            raise InputError(f"the latency table has no level of {unknown[0]} patch tokens; it has {self.table.tokens}")
        unknown_units = self.weights.keys() - set(self.units())
        if unknown_units or any(not weight >= 0 for weight in self.weights.values()):
            raise InputError(f"weights of losses must be >= 0 and of units of this model, got {dict(self.weights)}")

    def reweighted(self, weights: Mapping[Unit, float]) -> Problem:
        """The same problem with other weights of the losses."""
        return replace(self, weights=dict(weights))

    def on(self, table: LatencyTable) -> Problem:
        """The same problem on another table."""
        return replace(self, table=table)

    @property
    def levels(self) -> tuple[int, ...]:
        """Token levels of the search, descending, all of the patches first; 0 where the last block leaves none."""
        full = self.table.tokens[0]
        fewer = {n for n in self.sizes.patches if n < full and (self.method or n == 0)}
        return (full, *sorted(fewer, reverse=True))

    @property
    def ends_early(self) -> bool:
        """Whether the last block is computed for the prefix tokens alone."""
        return 0 in self.sizes.patches

    @property
    def offers_dims(self) -> bool:
        """Whether heads may lose some of their dims: where both the losses and the times of that are known."""
        return bool(self.losses.qk and self.losses.v and self.table.levels.qk and (self.sizes.qk or self.sizes.v))

    def units(self) -> list[Unit]:
        """The parts whose losses can be weighted."""
        kinds = ("heads", "mlp", *(("tokens",) if self.method else ()), *(("qk", "v") if self.offers_dims else ()))
        return [(block, kind) for block in range(len(self.losses.heads)) for kind in kinds]

    def dense(self) -> Counts:
        """The counts that keep everything."""
        return Counts.dense([max(c) for c in self.losses.heads], [max(c) for c in self.losses.mlp], self.levels[0])

    def all_dims(
        self, heads: Sequence[int], dims: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The dims of every block's queries and keys, and of its values, as ``Counts`` has them.

        ``dims``: by block, those of a block whose heads lack some; () where they have all.
        """
        if not any(dims):
            return None, None
        whole = self.table.levels.qk[0], self.table.levels.v[0]
        pairs = [(some or whole) if count else (0, 0) for count, some in zip(heads, dims, strict=True)]
        return tuple(qk for qk, _ in pairs), tuple(v for _, v in pairs)

    def predict_ms(self, counts: Counts) -> float:
        """What the table says of a plan of this problem."""
        return self.table.predict_ms(counts, self.method)

    def losses_of(self, counts: Counts) -> dict[Unit, float]:
        """The measured loss of every single change of a plan, unweighted; a sum of them is the search's guess.

        Raises:
            InputError: no loss was measured for one of its sizes.
        """
        found, n = {}, self.levels[0]
        for block, (h, m, left) in enumerate(zip(counts.heads, counts.mlp, counts.patches, strict=True)):
            curve = {self.levels[0]: 0.0} | dict(self.losses.tokens[block] if self.method else {})
            try:
                found[block, "heads"] = self.losses.heads[block][h]
                found[block, "mlp"] = self.losses.mlp[block][m]
                if self.offers_dims:
                    dims = counts.dims(block)
                    found[block, "qk"] = self.losses.qk[block][dims[0]] if dims else 0.0
                    found[block, "v"] = self.losses.v[block][dims[1]] if dims else 0.0
                if self.method:
                    found[block, "tokens"] = max(0.0, curve[left] - curve[n]) if left not in (n, 0) else 0.0
            except KeyError as error:
                raise InputError(
                    f"block {block} has no loss for {error} of {h} heads, {m} units, {n} -> {left}"
                ) from error
            n = left
        return found

    def solve(self, budgets_ms: Sequence[float], *, slack: float = 0.002) -> Plans:
        """The best plans from the smallest to the largest budget, in one pass; see ``solver.solve``."""
        return Plans(self, solve(self.blocks(), self.constant_ms(), budgets_ms, slack=slack))

    def constant_ms(self) -> list[float]:
        """By token level, the time of what is no choice: overhead, stem and head."""
        a, b, _ = self.table.correction
        return [a + b * (self.table.stem_ms + self.table.head_ms(n)) for n in self.levels]

    def blocks(self) -> list[Block]:
        """The choices of each block, losses weighted and times corrected, cold weights included."""
        return [self._block(number) for number in range(len(self.losses.heads))]

    def _block(self, number: int) -> Block:
        mlp, (_, b, kappa) = self.losses.mlp[number], self.table.correction
        sizes = [max(mlp), *(size for size in self.sizes.below("mlp", max(mlp)) if size in mlp)]
        weight, cold_ms = self.weights.get((number, "mlp"), 1.0), kappa * self.table.levels.unit_bytes / 1e6
        choices = [
            [Choice(weight * mlp[m], b * self.table.mlp_ms(n, m) + cold_ms * m, ("mlp", m)) for m in sizes]
            if self._may_leave(number, n)
            else []
            for n in self.levels
        ]
        return [*self._attention_and_step(number), Stay(choices)]

    def _may_leave(self, number: int, patches: int) -> bool:
        """Whether a block may have so many patch tokens behind its attention."""
        if self._is_prefix_only(number) or patches == 0:
            return self._is_prefix_only(number) and patches == 0
        return self.schedule is None or patches == self.schedule[number]

    def _is_prefix_only(self, number: int) -> bool:
        return self.ends_early and number + 1 == len(self.losses.heads)

    def _attention_and_step(self, number: int) -> list[Part]:
        """A block whose attention is removed leaves all the tokens that enter it."""
        heads = self.losses.heads[number]
        sizes = [max(heads), *(size for size in self.sizes.below("attn", max(heads)) if size in heads)]
        if self._is_prefix_only(number):
            last = len(self.levels) - 1
            leave = {(level, last): Choice(0.0, 0.0, ("patches", 0)) for level in range(last)}
            return [self._attention(number, sizes), Move(leave)]
        step, branches = Move(self._steps(number)), []
        if sizes[0]:
            present = self._attention(number, [size for size in sizes if size])
            first = self.method is not None and self.method.where != "after"
            branches.append([step, present] if first else [present, step])
        if sizes[-1] == 0:
            branches.append([self._attention(number, [0])])
        return [Either(branches)]

    def _attention(self, number: int, sizes: Sequence[int]) -> Part:
        """Attention of one of ``sizes`` heads. Where tokens have been merged, it carries their sizes."""
        b, kappa = self.table.correction[1:]
        cold_ms, heads = kappa * self.table.levels.head_bytes / 1e6, self.losses.heads[number]
        weight, dims = self.weights.get((number, "heads"), 1.0), self._dims(number)
        rows: list[list[Choice]] = []
        for n in self.levels:
            choices = []
            for h in sizes if n else ():  # no patch is left behind the last attention only
                for some, loss in dims if h else dims[:1]:
                    ms = b * self._attn_ms(number, n, h, some) + cold_ms * h * self.table.share_of_head(some)
                    choices.append(
                        Choice(weight * heads[h] + loss, ms, ("heads", h) if some is None else ("heads", h, *some))
                    )
            rows.append(choices)
        return Stay(rows)

    def _dims(self, number: int) -> list[tuple[tuple[int, int] | None, float]]:
        """Dims that each head of a block may keep, of queries and keys and of values, and their loss; first all."""
        if not self.offers_dims or not self.losses.qk[number]:
            return [(None, 0.0)]
        kinds = []
        for kind in ("qk", "v"):
            curve: Mapping[int, float] = getattr(self.losses, kind)[number]
            levels, weight = getattr(self.table.levels, kind), self.weights.get((number, kind), 1.0)
            below = [size for size in self.sizes.below(kind, max(curve)) if size in curve and size in levels]
            kinds.append([(size, weight * curve[size]) for size in (max(curve), *below)])
        pairs = [((qk, v), loss + more) for qk, loss in kinds[0] for v, more in kinds[1]]
        return [(None, 0.0), *pairs[1:]]

    def _attn_ms(self, number: int, patches: int, heads: int, dims: tuple[int, int] | None) -> float:
        if self._is_prefix_only(number):
            return self.table.attn_prefix_ms(patches, heads, dims)
        merged = self.method is not None and self.method.proportional and patches < self.levels[0]
        return self.table.attn_ms(patches, heads, merged, dims)

    def _steps(self, number: int) -> dict[tuple[int, int], Choice]:
        """E(fewer) - E(entering), where both were measured and one application of the method gets there."""
        if self.method is None:
            return {}
        curve = {self.levels[0]: 0.0} | dict(self.losses.tokens[number])
        weight, b = self.weights.get((number, "tokens"), 1.0), self.table.correction[1]
        steps = {}
        for (i, n), (j, left) in combinations(enumerate(self.levels), 2):
            if n in curve and left in curve and self.method.reaches(n, left, self.table.levels.prefix):
                loss = weight * max(0.0, curve[left] - curve[n])
                steps[i, j] = Choice(loss, b * self.table.reduce_ms(self.method.name, n, left), ("patches", left))
        return steps


class Plans:
    """What a problem's solution means for its model: a frontier of counts.

    Attributes:
        fastest: the fastest plan there is, whatever it loses.
        frontier: the solver's side of it, with the size of the buckets and their slack.
    """

    def __init__(self, problem: Problem, frontier: Frontier) -> None:
        self._problem, self.frontier = problem, frontier
        self.fastest = self._point(frontier.fastest, frontier.fastest.ms_exact)

    def best(self, budget_ms: float) -> Point:
        """The plan of least loss within ``budget_ms``; see ``solver.Frontier.best``.

        Raises:
            BudgetUnreachable: none is that fast; the message says what the fastest one keeps.
            InputError: the budget is larger than the largest that was solved for.
        """
        try:
            return self._point(self.frontier.best(budget_ms), budget_ms)
        except BudgetUnreachable as error:
            least, whole = self.fastest.counts, self._problem.dense()
            patches = min(filter(None, least.patches))
            raise BudgetUnreachable(
                f"{error}; it keeps {sum(least.heads)} of {sum(whole.heads)} heads, {sum(least.mlp)} of "
                f"{sum(whole.mlp)} MLP units and {patches} of {whole.patches[-1]} patch tokens, the least that is "
                f"allowed: allow less, or a larger budget",
                error.fastest_ms,
            ) from error

    def points(self, most: int = 200) -> list[Point]:
        """The frontier, fastest first; at most ``most`` points, spread evenly."""
        return [self._point(one, one.ms_rounded) for one in self.frontier.points(most)]

    def _point(self, solution: Solution, budget_ms: float) -> Point:
        problem = self._problem
        kept: dict[str, list[int]] = {"heads": [], "mlp": [], "patches": []}
        dims: list[tuple[int, ...]] = []
        for kind, size, *some in chain.from_iterable(cast("tuple[tuple[tuple[Any, ...], ...], ...]", solution.labels)):
            kept[kind].append(size)
            if kind == "heads":
                dims.append(tuple(some))
        patches = tuple(problem.levels[level] for level in solution.levels)
        qk, v = problem.all_dims(kept["heads"], dims)
        counts = Counts(tuple(kept["heads"]), tuple(kept["mlp"]), patches, qk, v)
        name = problem.method.name if problem.method else None
        return Point(budget_ms, solution.ms_exact, solution.loss, counts, name)
