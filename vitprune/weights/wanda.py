"""Wanda: weights that are small and read little go. Sun et al., A Simple and Effective Pruning Approach for Large
Language Models, ICLR 2024, https://arxiv.org/abs/2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from .base import LayerView, Pattern, Scope, Scoring, finite, required


@final
@dataclass(frozen=True)
class Wanda(Scoring):
    """Squared weight times the mean square of its input. Every row loses the same share, whatever the scope."""

    needs = "moments"
    passes = 3
    scope: Scope = field(default="uniform", kw_only=True)

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        squares = required(layer.moments, layer, "moments").diagonal() * layer.weight.double().square()
        grouped = finite(squares, layer.name).unflatten(1, (-1, pattern.group)).sum(-1)
        return grouped.argsort(dim=1, stable=True).argsort(dim=1).double() / grouped.shape[1]  # ranks within the row
