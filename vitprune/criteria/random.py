"""Random order: the baseline that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from .base import Criterion, LayerView, Ranking


@final
@dataclass(frozen=True)
class Random(Criterion):
    """An order that depends on ``seed`` and the half's number alone; the error grows by the same for each unit.

    The scores are what has gone of a half with the unit, so that a threshold takes the same share of every half.
    """

    seed: int = 0

    def rank(self, layer: LayerView) -> Ranking:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.number)
        order = torch.randperm(layer.units, generator=generator)
        shares = torch.linspace(0, 1, layer.units + 1, dtype=torch.float64)
        return Ranking(order, shares, scores=torch.empty_like(shares[1:]).index_copy_(0, order, shares[1:]))
