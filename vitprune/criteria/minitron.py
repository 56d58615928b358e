"""Minitron: how large the activations are that a unit writes; needs images, no labels and no gradients.

Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, NeurIPS 2024,
https://arxiv.org/abs/2407.14679, with the aggregation that it chose and NVIDIA ModelOpt implements: the mean absolute
activation over the tokens of an image, then the L2 norm over the images, and for a head the L2 norm over its columns.
"""

from __future__ import annotations

from typing import final

from .base import Criterion, LayerView, Ranking, required


@final
class Minitron(Criterion):
    """L2 norm over images, and over a head's columns, of the mean absolute activation."""

    needs = "activations"
    ranks_dims = False

    def rank(self, layer: LayerView) -> Ranking:
        squares = required(layer.activations, "minitron", "activations").double().square().sum(0)
        return Ranking.from_scores(squares.unflatten(0, (-1, layer.unit_size)).sum(-1).sqrt())
