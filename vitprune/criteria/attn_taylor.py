"""S2ViTE: heads by activation times gradient, hidden units by the size of their weights.

Chen et al., Chasing Sparsity in Vision Transformers: An End-to-End Exploration, NeurIPS 2021,
https://arxiv.org/abs/2106.04533: what decides there which heads and units die. A head: the mean over images of
|sum of A * dL/dA| over its tokens and columns, A what it reads of the values; a hidden unit: the L1 norm of its row of
fc1 and its column of fc2. The two do not compare, and the authors keep the same number in every layer.

Differs from the code: all images, not the last batch alone; the labels are drawn from the model's own output.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking, required


@final
class AttnTaylor(Criterion):
    """|A * dA| of heads, L1 norm of the weights of hidden units."""

    needs = "gates"
    ranks_dims = False

    def rank(self, layer: LayerView) -> Ranking:
        if layer.kind == "attn":
            return Ranking.from_scores(required(layer.gates, "attn_taylor", "gates").double().abs().mean(0))
        reads = required(layer.reads, "attn_taylor", "reading weights")
        return Ranking.from_scores(reads.double().abs().sum(1) + layer.weight.double().abs().sum(0))
