"""SparseGPT: layer by layer, columns in order, each row's later weights making up for its earlier ones. Needs neither
labels nor gradients.

Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023,
https://arxiv.org/abs/2301.00774; see ``_columns`` for what differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ._columns import sweep_columns
from ._fisher import inverted
from .base import Layers, Pattern, Pruned, WeightMethod, finite
from .obc import damped_moments, read_weights


@final
@dataclass(frozen=True)
class SparseGpt(WeightMethod):
    """Every layer gets the same sparsity.

    Attributes:
        damping: share of the mean square of the inputs that is added to the diagonal of their second moments.
    """

    needs = "moments"
    passes = 3
    damping: float = 1e-2

    def prune(self, layers: Layers, pattern: Pattern, sparsity: float) -> Iterator[Pruned]:
        for layer in layers:
            inverse = inverted(damped_moments(layer, self.damping)[None], layer.name)[0]
            read = read_weights(layer)
            weight = sweep_columns(read, inverse, read != 0, pattern, sparsity, layer.name)
            weight = finite(weight, layer.name).to(layer.weight)
            yield Pruned(layer.name, weight != 0, weight)
