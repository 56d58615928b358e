"""Block influence: blocks that turn their tokens least go first, both halves alike; says nothing of single units.

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
https://arxiv.org/abs/2403.03853: 1 - cosine between a token in front of the block and behind it, averaged over tokens
and images. Needs no labels and no gradients. Minitron ranks its layers by it too. Differs from the paper: a budget may
be met with one half of the last block that goes still there.
"""

from __future__ import annotations

from typing import final

import torch

from .base import Criterion, LayerView, Ranking, required


@final
class Bi(Criterion):
    """The same score for all units of a block."""

    needs = "influence"
    ranks_dims = False
    whole_blocks = True

    def rank(self, layer: LayerView) -> Ranking:
        influence = required(layer.influence, "bi", "influence")
        return Ranking.from_scores(torch.full((layer.units,), influence, dtype=torch.float64))
