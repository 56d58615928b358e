"""SAViT: the mean squared gradient of a batch at a unit's gate, and how heads and hidden units go together.

Zheng et al., SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization, NeurIPS 2022,
https://openreview.net/forum?id=w5DacXWzQ-Q. Unlike in ``fisher``, the gradients of a batch of 32 are averaged before
they are squared, as in the official code: the score depends on that number. ``cross_terms`` is the Hessian that its
allocation needs (``savit`` in ``vitprune.search.allocation``).

Differs from the code: the labels are drawn from the model's own output, where gradients average to zero, so that the
squares of batches measure their spread alone; for such labels the expected Hessian is the Fisher information, which
the gradients give without the Hessian-vector products of the code; the Hessian is summed over all pairs of layers,
where the code draws pairs and divides by E, 4 E and 6 E L; there is no gate on the embedding. The code's option
``pruning_protect`` mixes up which units it protects; here the best 5% of a layer stay, as it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..statistics import Half, Kind
from .base import Criterion, LayerView, Ranking, batch_means, required

HALVES: tuple[Half, Half] = ("attn", "mlp")


@final
@dataclass(frozen=True)
class Savit(Criterion):
    """Mean over batches of the squared gradient of their mean loss at the gates.

    Attributes:
        batch: images of a batch; 1 makes it ``fisher``.
    """

    needs = "gates"
    batch: int = 32

    def rank(self, layer: LayerView) -> Ranking:
        gates = required(layer.gates, "savit", "gates")
        return Ranking.from_scores(batch_means(gates, self.batch).square().mean(0))

    def cross_terms(self, gates: Sequence[Mapping[Kind, Tensor]]) -> dict[str, dict[str, float]]:
        """For each two kinds of units the sum of the Hessian over all pairs of different units of the model."""
        batches: dict[Half, Tensor] = {}
        for kind in HALVES:
            of_blocks = [batch_means(block[kind], self.batch) for block in gates if kind in block]
            batches |= {kind: torch.cat(of_blocks, dim=1)} if of_blocks else {}
        sums = {kind: one.sum(1) for kind, one in batches.items()}
        terms: dict[str, dict[str, float]] = {a: {b: float((sums[a] * sums[b]).mean()) for b in sums} for a in sums}
        for kind, one in batches.items():  # each unit with itself is its score
            terms[kind][kind] -= float(one.square().mean(0).sum())
        return terms
