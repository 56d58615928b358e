"""One at a time from the same inverse: saliencies and updates that know nothing of what else goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ._fisher import Blocks, FisherMethod
from .base import LayerView, Pattern


class Inverse(ABC):
    """The inverse of the Fisher information of n blocks of B weights."""

    @abstractmethod
    def groups(self, size: int) -> Tensor:
        """Its diagonal in squares of ``size``, [n, B / size, size, size]."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """Its products with ``x``, both [n, B]."""


@dataclass(frozen=True)
class SummedMethod(FisherMethod):
    """Groups Q scored w_Q^T (V_QQ)^-1 w_Q / 2 with V the inverse Fisher information, their updates added up."""

    @abstractmethod
    def inverse(self, blocks: Blocks, layer: LayerView) -> Inverse:
        """The inverse for ``blocks``."""

    def block_scores(self, blocks: Blocks, layer: LayerView, pattern: Pattern) -> Tensor:
        w = blocks.weights.unflatten(1, (-1, pattern.group))
        return (w * _share(self.inverse(blocks, layer), w)).sum(-1) / 2

    def block_weights(self, blocks: Blocks, mask: Tensor, layer: LayerView, pattern: Pattern) -> Tensor:
        inverse, w = self.inverse(blocks, layer), blocks.weights.unflatten(1, (-1, pattern.group))
        gone = ~mask.unflatten(1, w.shape[1:])
        return blocks.weights - inverse.times((_share(inverse, w) * gone).flatten(1))


def _share(inverse: Inverse, w: Tensor) -> Tensor:
    """(V_QQ)^-1 w_Q of each group, as ``w`` [n, groups, size]."""
    squares = inverse.groups(w.shape[-1])
    if w.shape[-1] == 1:
        return w / squares[..., 0]
    return torch.linalg.solve(squares, w)


def squares_of(matrices: Tensor, size: int) -> Tensor:
    """The diagonal of ``matrices`` [n, B, B] in squares, [n, B / size, size, size]."""
    parts = matrices.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
