"""Fisher: the mean squared gradient at a unit's gate, that is the second-order change of the loss when it closes.

Zheng et al., SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization, NeurIPS 2022,
https://openreview.net/forum?id=w5DacXWzQ-Q, for the gates on heads and hidden units; Theis et al., Faster gaze
prediction with dense networks and Fisher pruning, 2018, https://arxiv.org/abs/1801.05787, for the criterion. Differs
from SAViT's code: squared per image where theirs squares a batch's sum, which depends on the batch size; and the labels
are drawn from the model's own output, which makes it the true Fisher information and needs none.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking, required


@final
class Fisher(Criterion):
    """Mean squared gradient at the gates."""

    needs = "gates"

    def rank(self, layer: LayerView) -> Ranking:
        return Ranking.from_scores(required(layer.gates, "fisher", "gates").double().square().mean(0))
