"""Magnitude: the units whose weights towards the residual stream are smallest go first; needs no images.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, https://arxiv.org/abs/1608.08710. Differs from the paper:
squared instead of absolute weights, of the columns that a unit writes with instead of the rows that it reads with.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking


@final
class Magnitude(Criterion):
    """Sum of a unit's squared output weights."""

    def rank(self, layer: LayerView) -> Ranking:
        return Ranking.from_scores(layer.weight.double().square().sum(0).unflatten(0, (-1, layer.unit_size)).sum(-1))
