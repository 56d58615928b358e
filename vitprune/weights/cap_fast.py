"""FastCAP: the Fisher information of a layer's blocks taken for the same, and thinned by columns as SparseGPT does.

Kuznedelev, Kurtic, Frantar and Alistarh, CAP: Correlation-Aware Pruning for Highly-Accurate Sparse Vision Models,
NeurIPS 2023, https://arxiv.org/abs/2210.09223. Needs memory for one block a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..errors import InputError
from ._columns import sweep_columns
from ._fisher import block_size, image_count, inverted, row_chunks
from .base import Layers, LayerView, Pattern, Pruned, WeightMethod, finite


@final
@dataclass(frozen=True)
class CapFast(WeightMethod):
    """Every layer gets the same sparsity.

    Attributes:
        block: weights of a block at least; blocks are equal parts of a row.
        damp_rel: what is added to the diagonal, as a share of the mean diagonal of the Fisher information.
    """

    needs = "gradients"
    passes = 5
    block: int = 192
    damp_rel: float = 1e-2

    def __post_init__(self) -> None:
        if self.block < 1 or self.damp_rel < 0:
            raise InputError(f"block is 1 or more and damp_rel 0 or more, got {self}")

    def prune(self, layers: Layers, pattern: Pattern, sparsity: float) -> Iterator[Pruned]:
        for layer in layers:
            if layer.empty:
                yield Pruned(layer.name, layer.alive, layer.weight)
                continue
            size = block_size(min(self.block, layer.weight.shape[1]), layer.weight, pattern)
            inverse = inverted(self._fisher(layer, size)[None], layer.name)[0]
            weights, alive = layer.weight.double().view(-1, size), layer.alive.view(-1, size)
            weight = finite(sweep_columns(weights, inverse, alive, pattern, sparsity, layer.name), layer.name)
            weight = weight.view(layer.weight.shape).to(layer.weight)
            yield Pruned(layer.name, weight != 0, weight)

    def _fisher(self, layer: LayerView, size: int) -> Tensor:
        """Mean over images and blocks of g g^T, [size, size], damped."""
        total = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
        images = image_count(layer)
        for rows in row_chunks(layer, images):
            flat = layer.gradients(rows).double().reshape(-1, size)
            total += flat.T @ flat / images
        total /= layer.weight.numel() // size
        total.diagonal().add_(self.damp_rel * total.diagonal().mean())
        return total
