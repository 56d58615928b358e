"""What methods share whose small network judges each patch, itself and beside the mean of all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import NOWHERE, Place, Reducer, blocks_in, thrice


class Predictor(Reducer):
    """A token method with such a network, as DynamicViT's authors built it.

    Args:
        size: channels that it looks at.

    Attributes:
        official_names: the authors' names of its layers within ``score_predictor.0`` and so on, and ours.
    """

    official_names: ClassVar[Mapping[str, str]]

    def __init__(self, place: Place = NOWHERE, size: int = 0) -> None:
        super().__init__(place)
        self.norm = nn.LayerNorm(size)
        self.inner = nn.Linear(size, size)
        self.outer = nn.Sequential(
            nn.Linear(size, size // 2), nn.GELU(), nn.Linear(size // 2, size // 4), nn.GELU(), nn.Linear(size // 4, 2)
        )

    def start_small(self) -> None:
        """The weights that the authors start from."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def scores(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Logits of keeping and dropping, [B, n, ..., 2], from ``x`` [B, n, ..., size].

        The second half of the channels is averaged over the patches, so that each is judged among the others;
        ``policy`` [B, n, ..., 1] weights the mean.
        """
        local, pooled = F.gelu(self.inner(self.norm(x))).chunk(2, dim=-1)
        if policy is None:
            pooled = pooled.mean(1, keepdim=True)
        else:
            pooled = (pooled * policy).sum(1, keepdim=True) / policy.sum(1, keepdim=True)
        return self.outer(torch.cat([local, pooled.expand_as(local)], dim=-1))

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        own, backbone = {}, {}
        blocks = sorted(thrice(blocks_in(weights)))
        for name, value in weights.items():
            found = re.fullmatch(r"score_predictor\.(\d+)\.(.+)\.(weight|bias)", name)
            if found is None or found[2] not in cls.official_names:
                backbone[name] = value  # a name that nobody knows is refused there
            elif int(found[1]) < len(blocks):
                own[f"blocks.{blocks[int(found[1])]}.reducer.{cls.official_names[found[2]]}.{found[3]}"] = value
        return backbone, own


def predictor_macs(size: int) -> int:
    """Multiply-accumulates of a predictor of ``size`` channels for one patch."""
    return size * size + size * (size // 2) + (size // 2) * (size // 4) + (size // 4) * 2
