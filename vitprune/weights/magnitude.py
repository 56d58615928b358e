"""Magnitude: the smallest weights go. Han et al., Learning both Weights and Connections for Efficient Neural Networks,
NeurIPS 2015, https://arxiv.org/abs/1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from .base import LayerView, Pattern, Scope, Scoring


@final
@dataclass(frozen=True)
class Magnitude(Scoring):
    """Squared weights, of a group their sum.

    Attributes:
        normalised: divided by the layer's sum, so that layers of different scale may compete.
    """

    passes = 0

    scope: Scope = field(default="uniform", kw_only=True)
    normalised: bool = False

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        squares = layer.weight.double().square().unflatten(1, (-1, pattern.group)).sum(-1)
        return squares / squares.sum().clamp_min(1e-300) if self.normalised else squares
