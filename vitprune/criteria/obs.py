"""Structured OBS: remove the unit whose loss the others can make up for best, let them do so, and go on.

Kurtic, Frantar and Alistarh, ZipLM: Inference-Aware Structured Pruning of Language Models, NeurIPS 2023,
https://arxiv.org/abs/2302.04089, after Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain
Surgeon, NeurIPS 1992. With H the second moment of the inputs and V its inverse, removing the columns S costs
tr(W_S V_SS^-1 W_S^T) of squared output error; then W -= W_S V_SS^-1 V_S: and V -= V_:S V_SS^-1 V_S:.

Differs from the ports of ZipLM: the damping is always there, where theirs adds 1% of the mean diagonal when a
factorisation fails; the error of each step is exact for the undamped H, not read off re-run layers; the updates of
single columns are gathered and applied ``LAZY`` at a time, as SparseGPT does (Frantar and Alistarh, ICML 2023,
https://arxiv.org/abs/2301.00774), so that a step reads the weight once and the inverse hardly at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import InputError
from .base import Criterion, LayerView, Ranking, required

LAZY = 64  # single columns removed between two updates of the whole inverse


@final
@dataclass(frozen=True)
class Obs(Criterion):
    """Greedy structured OBS with exact joint compensation; the error is relative to the layer's squared output.

    Attributes:
        damping: share of the mean diagonal of H that is added to its diagonal.
    """

    needs = "moments"
    compensates = True
    damping: float = 1e-4

    def rank(self, layer: LayerView) -> Ranking:
        moments = required(layer.moments, "obs", "moments").double()
        weight = layer.weight.detach().double()
        dead = moments.diagonal() <= 0
        weight = torch.where(dead, 0.0, weight)  # columns that read zeros only: what they hold does not matter
        sweep = _Sweep(weight, moments, self.damping, layer.unit_size)
        weights = {}
        for kept in sorted((n for n in layer.levels if 0 < n < layer.units), reverse=True):
            sweep.run_to(kept)
            weights[kept] = sweep.weight.to(layer.weight)
        sweep.run_to(0)
        total = ((weight @ moments) * weight).sum()
        error = torch.tensor([0.0, *sweep.errors], dtype=torch.float64, device=weight.device)
        relative = (error / total if total > 0 else error).cummax(0).values
        return Ranking(torch.tensor(sweep.order), relative.cpu(), weights, float(total))


def made_up(layer: LayerView, columns: Sequence[int], damping: float = Obs.damping) -> Tensor:
    """The weight [C, kept] of the kept ``columns`` with which the layer's output changes least when the others go.

    What the sweep's weight is for columns that were not removed by it: W H_:S (H_SS + ridge)^-1, drawn to W_S.
    """
    moments = required(layer.moments, "obs", "moments").double()
    weight = layer.weight.detach().double()
    kept = torch.as_tensor(columns, device=weight.device)
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    inverse, _ = _damped_inverse(moments[kept][:, kept], damping, _mean_of_alive(moments))
    return (weight[:, kept] + weight[:, gone] @ moments[gone][:, kept] @ inverse).to(layer.weight)


class _Sweep:
    """The state of one greedy pass: the units left, their compensated weight, and the inverse restricted to them."""

    def __init__(self, weight: Tensor, moments: Tensor, damping: float, unit_size: int) -> None:
        self.weight, self.dense, self.size = weight, weight, unit_size
        self.inverse, self.ridge = _damped_inverse(moments, damping, _mean_of_alive(moments))
        self.left = torch.arange(weight.shape[1] // unit_size, device=weight.device)
        self.order: list[int] = []
        self.errors: list[float] = []
        self.cost = 0.0  # sum of the steps' costs: squared output error under the damped H
        self.norm = float(weight.square().sum())
        self.overlap = self.norm  # <compensated weight, dense weight>

    def run_to(self, kept: int) -> None:
        """Remove units until ``kept`` are left."""
        while len(self.left) > kept:
            if self.size == 1:
                self._remove_columns(min(LAZY, len(self.left) - kept))
            else:
                self._remove_group()

    def _remove_columns(self, count: int) -> None:
        """Remove ``count`` single columns, then bring the weight and the inverse up to date."""
        updates = _Updates(self.weight, self.inverse, count)
        picked = list(updates.remove(count))
        removed = torch.tensor(picked, device=self.left.device)
        lost = (updates.of_weight * (self.dense[:, self.left] @ updates.of_inverse)).sum(0)
        for step in range(count):
            self.overlap -= float(lost[step])
            self._record(updates.costs[step], updates.squares[step])
        self.order += self.left[removed].tolist()
        self.weight = self.weight - updates.of_weight @ updates.of_inverse.T
        self.inverse = self.inverse - updates.of_inverse @ updates.of_inverse.T
        self._drop(removed)

    def _remove_group(self) -> None:
        """Remove the one unit of several columns that costs least."""
        units = len(self.left)
        blocks = self.inverse.unflatten(0, (units, self.size)).unflatten(2, (units, self.size))
        blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, size, size]
        columns = self.weight.unflatten(1, (units, self.size)).permute(1, 2, 0)  # [units, size, C]
        factor = torch.linalg.cholesky(blocks)
        share = torch.cholesky_solve(columns, factor)
        costs = (columns * share).sum((1, 2))
        unit = int(costs.argmin())
        rows = self.inverse[unit * self.size : (unit + 1) * self.size]  # [size, n]
        update = share[unit].T @ rows
        self.overlap -= float((update * self._dense_left()).sum())
        self.order.append(int(self.left[unit]))
        self.weight = self.weight - update
        self.inverse = self.inverse - rows.T @ torch.cholesky_solve(rows, factor[unit])
        self._drop(torch.tensor([unit], device=self.left.device))
        self._record(float(costs[unit]), float(self.weight.square().sum()))

    def _record(self, cost: float, square: float) -> None:
        """Note the exact squared output error after a step; the damping's share of ``cost`` is taken out again."""
        self.cost += cost
        moved = square - 2 * self.overlap + self.norm  # squared distance of the weight from the dense one
        self.errors.append(max(0.0, self.cost - self.ridge * moved))

    def _dense_left(self) -> Tensor:
        """The dense weight's columns of the units left."""
        return self.dense.unflatten(1, (-1, self.size))[:, self.left].flatten(1)

    def _drop(self, units: Tensor) -> None:
        """Forget the columns of ``units`` (positions among those left)."""
        stay = torch.ones(len(self.left), dtype=torch.bool, device=self.left.device)
        stay[units] = False
        self.left = self.left[stay]
        columns = stay.repeat_interleave(self.size)
        self.weight = self.weight[:, columns]
        self.inverse = self.inverse[columns][:, columns]


class _Updates:
    """Removals of single columns that are not yet applied: weight - A U^T and inverse - U U^T are meant.

    Attributes:
        of_weight: A, [C, steps].
        of_inverse: U, [n, steps].
        costs: squared output error of each step, under the damped H.
        squares: squared norm of the weight after each step.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, steps: int) -> None:
        self.weight, self.inverse = weight, inverse
        self.of_weight = weight.new_zeros(weight.shape[0], steps)
        self.of_inverse = weight.new_zeros(weight.shape[1], steps)
        self.costs: list[float] = []
        self.squares: list[float] = []

    def remove(self, steps: int) -> Iterator[int]:
        """Positions of the columns that go, the cheapest first."""
        norms = self.weight.square().sum(0)  # of the columns
        diagonal = self.inverse.diagonal().clone()
        gone = torch.zeros_like(norms)
        for step in range(steps):
            column = int((norms / diagonal + gone).argmin())
            cross = self._apply(step, column)
            u = self.of_inverse[:, step]
            w2 = float(self.of_weight[:, step].square().sum())
            norms = (norms - 2 * cross * u + w2 * u.square()).clamp_min_(0)
            diagonal = diagonal - u.square()
            norms[column], diagonal[column], gone[column] = 0.0, 1.0, torch.inf
            self.costs.append(w2)
            self.squares.append(float(norms.sum()))
            yield column

    def _apply(self, step: int, column: int) -> Tensor:
        """Note the update that removes ``column``; products of its part of the weight with all columns, [n]."""
        A, U = self.of_weight[:, :step], self.of_inverse[:, :step]
        of_inverse = self.inverse[:, column] - U @ U[column]
        of_weight = self.weight[:, column] - A @ U[column]
        root = of_inverse[column].sqrt()
        self.of_inverse[:, step] = of_inverse / root
        self.of_weight[:, step] = of_weight / root
        a = self.of_weight[:, step]
        return self.weight.T @ a - U @ (A.T @ a)


def _mean_of_alive(moments: Tensor) -> float:
    """Mean of the positive diagonal entries."""
    diagonal = moments.diagonal()
    return float(diagonal[diagonal > 0].mean()) if (diagonal > 0).any() else 1.0


def _damped_inverse(moments: Tensor, damping: float, mean: float) -> tuple[Tensor, float]:
    """Inverse of ``moments`` plus a ridge, a share of ``mean``, grown tenfold until there is one; and the ridge."""
    if not moments.isfinite().all():
        raise InputError(
            "the calibration images lead to activations that are no numbers; look at the weights and the preprocessing"
        )
    alive = moments.diagonal() > 0
    ridge = damping * mean
    while True:
        damped = moments + torch.diag(torch.where(alive, ridge, mean))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.cholesky_inverse(factor), ridge
        ridge = max(10 * ridge, 1e-10 * mean)
