"""SparseGPT's sweep: the columns of a matrix in order, each row's later weights making up for its earlier ones.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023,
https://arxiv.org/abs/2301.00774. With U the upper Cholesky factor of the inverse Hessian of a row, removing the group
Q in its turn costs |U_QQ^-T w_Q|^2 and changes what comes later by -w_Q U_QQ^-1 U_Q:. Differs from the official code:
counts are rounded over all column blocks so far, so a layer's sparsity is the one asked for; groups have their joint
cost, of which single weights are the simplest case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._fisher import factorised
from .base import Pattern, masked

COLUMNS = 128  # whose masks are chosen, and whose updates are gathered, at a time


def sweep_columns(
    weights: Tensor, inverse: Tensor, alive: Tensor, pattern: Pattern, sparsity: float, name: str
) -> Tensor:
    """``weights`` [rows, n] with zeros where weights went and the others changed to make up for it; fp64.

    Args:
        inverse: [n, n], of the Hessian that all rows share.
        alive: [rows, n], False where weights have been removed before.
        name: of the layer.
    """
    weights, mask = weights.clone(), alive.clone()
    factor = factorised(inverse[None], name)[0].T
    rows, width = weights.shape
    wide = COLUMNS // pattern.span * pattern.span or pattern.span
    for first in range(0, width, wide):
        last = min(width, first + wide)
        if not pattern.of:
            removed = int((~mask[:, :first]).sum())
            share = (sparsity * rows * last - removed) / (rows * (last - first))
            costs = _costs(weights[:, first:last], factor[first:last, first:last], pattern.group)
            chosen = _chosen(costs, alive[:, first:last], pattern, min(1.0, max(0.0, share)))
            mask[:, first:last] &= chosen
        errors = torch.zeros_like(weights[:, first:last])
        for start in range(first, last, pattern.span):
            some = slice(start, start + pattern.span)
            if pattern.of:
                costs = _costs(weights[:, some], factor[some, some], 1)
                mask[:, some] &= _chosen(costs, alive[:, some], pattern, sparsity)
            for column in range(start, start + pattern.span):
                gone = weights[:, column] * ~mask[:, column]
                error = gone / factor[column, column]
                weights[:, column:last] -= error[:, None] * factor[column, column:last]
                errors[:, column - first] = error
            weights[:, some] *= mask[:, some]
        weights[:, last:] -= errors @ factor[first:last, last:]
    return weights * mask


def _chosen(costs: Tensor, alive: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Mask of the dearest groups; those removed before go first."""
    grouped = alive.unflatten(1, (-1, pattern.group)).any(-1)
    return masked(torch.where(grouped, costs, -torch.inf), pattern, sparsity)


def _costs(weights: Tensor, factor: Tensor, size: int) -> Tensor:
    """Cost of each group of ``size`` columns, [rows, n / size]."""
    if size == 1:
        return (weights / factor.diagonal()).square()
    parts = weights.unflatten(1, (-1, size))
    squares = torch.stack([factor[i : i + size, i : i + size] for i in range(0, len(factor), size)])
    solved = torch.linalg.solve_triangular(squares, parts.transpose(0, 1), upper=True, left=False)
    return solved.square().sum(-1).T
