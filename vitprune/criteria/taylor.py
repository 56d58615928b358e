"""Taylor: the first-order change of the loss when a unit's gate closes, averaged over images in absolute value.

Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017,
https://arxiv.org/abs/1611.06440; for heads, Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019,
https://arxiv.org/abs/1905.10650. Differs from both: the labels are drawn from the model's own output, so none are
needed. The absolute value is taken per image, as they do: the mean of the signed terms tends to 0 for such labels.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking, required


@final
class Taylor(Criterion):
    """Mean absolute gradient at the gates."""

    needs = "gates"

    def rank(self, layer: LayerView) -> Ranking:
        return Ranking.from_scores(required(layer.gates, "taylor", "gates").double().abs().mean(0))
