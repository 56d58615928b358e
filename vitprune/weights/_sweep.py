"""OBS within blocks of weights: remove what costs least, let the others make up for it, and go on.

Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon, NeurIPS 1992, for groups as in
Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, https://arxiv.org/abs/2203.07259. With V the inverse Hessian of a
block, removing the group Q costs w_Q^T (V_QQ)^-1 w_Q / 2; then w -= V_:Q (V_QQ)^-1 w_Q, V -= V_:Q (V_QQ)^-1 V_Q:.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._fisher import factorised
from ._summed import squares_of
from .base import Pattern

Merge = Literal["hull", "cumulative"]

SMALL_BYTES = 1 << 22  # of the inverses that are swept together: they stay in a core's cache
TIE = 1e-12  # relative: later steps of equal slope go later


class Trace(NamedTuple):
    """What went from n blocks, step by step.

    Attributes:
        order: [n, steps] the group that went; -1 once there was none left that might.
        costs: [n, steps] what each step added to the loss.
    """

    order: Tensor
    costs: Tensor


def sweep(weights: Tensor, inverse: Tensor, alive: Tensor, pattern: Pattern, steps: int | None = None) -> Trace:
    """Remove groups from every block by itself until ``steps`` are gone, or as many as the pattern lets go.

    Args:
        weights, alive: [n, B].
        inverse: [n, B, B], or [1, B, B] where the blocks share it; stays as it is.
    """
    n, width = weights.shape
    groups = width // pattern.group
    steps = steps or (width // pattern.of * (pattern.of - pattern.kept) if pattern.of else groups)
    together = max(1, SMALL_BYTES // (8 * width * width))
    parts = []
    for first in range(0, n, together):
        some = slice(first, min(n, first + together))
        own = inverse.expand(n, -1, -1)[some].clone()
        state = _State(weights[some].clone(), own, alive[some], pattern)
        parts.append([state.step() for _ in range(steps)])
    order, costs = (torch.cat([torch.stack([step[which] for step in part], 1) for part in parts]) for which in (0, 1))
    return Trace(order, costs)


class _State:
    """Blocks on their way: the compensated weights, the inverses restricted to what is left, and what may go."""

    def __init__(self, weights: Tensor, inverse: Tensor, alive: Tensor, pattern: Pattern) -> None:
        self.weights, self.inverse, self.pattern = weights, inverse, pattern
        self.every = torch.arange(len(weights), device=weights.device)
        self.may_go = alive.unflatten(1, (-1, pattern.group)).any(-1)
        if pattern.of:
            self.room = alive.unflatten(1, (-1, pattern.of)).sum(-1) - pattern.kept  # that may still go of each N:M
            self.may_go &= (self.room > 0).repeat_interleave(pattern.of, 1)

    def step(self) -> tuple[Tensor, Tensor]:
        """Remove the cheapest group of each block; which, and its cost, [n]."""
        size = self.pattern.group
        costs = self._costs(size).masked_fill_(~self.may_go, torch.inf)
        cost, group = costs.min(1)
        some = torch.isfinite(cost)
        if size == 1:
            self._remove_one(group, some)
        else:
            self._remove_group(group, some)
        self.may_go[self.every, group] = False
        if self.pattern.of:
            self._close(group, some)
        return torch.where(some, group, -1), torch.where(some, cost, 0)

    def _costs(self, size: int) -> Tensor:
        if size == 1:
            return self.weights.square() / (2 * self.inverse.diagonal(dim1=1, dim2=2))
        squares = squares_of(self.inverse, size).clone()
        squares[~self.may_go] = torch.eye(size).to(squares)
        w = self.weights.unflatten(1, (-1, size))
        return (w * torch.linalg.solve(squares, w)).sum(-1) / 2

    def _remove_one(self, index: Tensor, some: Tensor) -> None:
        column = self.inverse[self.every, index]
        pivot = torch.where(some, column[self.every, index], torch.inf)
        self.weights -= column * (self.weights[self.every, index] / pivot)[:, None]
        scaled = column * pivot.rsqrt()[:, None]
        self.inverse.addcmul_(scaled[:, :, None], scaled[:, None, :], value=-1)

    def _remove_group(self, group: Tensor, some: Tensor) -> None:
        size = self.pattern.group
        places = group[:, None] * size + torch.arange(size, device=group.device)
        rows = self.inverse[self.every[:, None], places]  # [n, size, B]
        square = rows.gather(2, places[:, None].expand(-1, size, -1))
        square = torch.where(some[:, None, None], square, torch.eye(size).to(square))
        halved = torch.linalg.solve_triangular(factorised(square, "a group of weights"), rows, upper=False)
        halved = halved * some[:, None, None]
        w = torch.linalg.solve_triangular(
            torch.linalg.cholesky(square), self.weights.gather(1, places)[..., None], upper=False
        )
        self.weights -= (halved * w).sum(1)
        self.inverse.baddbmm_(halved.transpose(1, 2), halved, alpha=-1)

    def _close(self, index: Tensor, some: Tensor) -> None:
        """Nothing more may go of an N:M group that has lost its share."""
        bucket = index // self.pattern.of
        self.room[self.every, bucket] -= some.long()
        full = (self.room <= 0).repeat_interleave(self.pattern.of, 1)
        self.may_go &= ~full


def step_scores(trace: Trace, groups: int, merge: Merge, pattern: Pattern) -> Tensor:
    """Scores of all groups of the blocks, [n, groups]: any threshold takes the first steps of each block.

    Of groups that did not go they are above all others.
    """
    if pattern.of:
        keys = torch.arange(trace.order.shape[1], device=trace.order.device).double().expand(trace.order.shape)
        last = float(trace.order.shape[1])
    else:
        # steps that took nothing are no cheap ones: at the dearest step's cost they leave the hull in front as it is
        costs = torch.where(trace.order < 0, trace.costs.max(1, keepdim=True).values, trace.costs)
        keys = hull_slopes(costs) if merge == "hull" else costs.cumsum(1)
        steps = torch.arange(keys.shape[1], device=keys.device).to(keys)
        keys = keys.cummax(1).values * (1 + TIE * steps)
        last = float(keys.max()) * 2 + 1
    scores = keys.new_full((len(keys), groups + 1), last)
    places = torch.where(trace.order < 0, groups, trace.order)
    return scores.scatter(1, places, keys)[:, :groups]


def hull_slopes(costs: Tensor) -> Tensor:
    """Slopes of the lower convex hull of the summed ``costs`` [n, steps] over the steps, one for each step.

    Thinning blocks by the least slope gives the least sum of losses wherever the last segment is used up; the costs
    themselves need not rise, so the least cost next may hide a cheap one behind a dear one.
    """
    n, steps = costs.shape
    sums = torch.cat([costs.new_zeros(n, 1), costs.cumsum(1)], 1)
    slopes = costs.new_full((n, steps), -torch.inf)
    counts = torch.arange(1, steps + 1, device=costs.device).to(costs)
    for first in range(steps):
        chords = (sums[:, first + 1 :] - sums[:, first : first + 1]) / counts[: steps - first]
        least = chords.flip(1).cummin(1).values.flip(1)
        torch.maximum(slopes[:, first:], least, out=slopes[:, first:])
    return slopes


def joint(hessian: Tensor, weights: Tensor, mask: Tensor, name: str) -> Tensor:
    """The weights [n, B] under ``mask`` that least add to the quadratic loss: w_K += H_KK^-1 H_KQ w_Q.

    ``hessian`` [n, B, B], or [1, B, B] where the blocks share it.
    """
    kept = mask.to(hessian)
    lost = torch.bmm(hessian.expand(len(weights), -1, -1), (weights * (1 - kept))[..., None])[..., 0]
    system = hessian * (kept[:, :, None] * kept[:, None, :])
    system.diagonal(dim1=1, dim2=2).add_(1 - kept)
    update = torch.cholesky_solve((lost * kept)[..., None], factorised(system, name))[..., 0]
    return (weights + update) * kept
