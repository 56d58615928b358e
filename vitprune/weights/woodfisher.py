"""WoodFisher: OBS with the empirical Fisher information of blocks of weights in place of the Hessian.

Singh and Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression, NeurIPS 2020,
https://arxiv.org/abs/2004.14340; groups of weights as in Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022,
https://arxiv.org/abs/2203.07259. Differs from the official code: the Fisher information is one matrix product and
inverted once in fp64, where theirs makes one rank-1 update of the inverse for each gradient; it is the same matrix.
Blocks do not cross rows or fill whole ones; recomputations thin by equal factors; labels are drawn from the model's
output unless given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ._fisher import Blocks, inverted
from ._summed import Inverse, SummedMethod, squares_of
from .base import LayerView


@final
@dataclass(frozen=True)
class WoodFisher(SummedMethod):
    """Block-wise Fisher information, inverted densely."""

    recompute = 4

    def inverse(self, blocks: Blocks, layer: LayerView) -> Inverse:
        return Dense(inverted(blocks.fisher(), layer.name))


@final
class Dense(Inverse):
    """Inverses [n, B, B] as they are."""

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices

    def groups(self, size: int) -> Tensor:
        return squares_of(self.matrices, size)

    def times(self, x: Tensor) -> Tensor:
        return torch.bmm(self.matrices, x[..., None])[..., 0]
