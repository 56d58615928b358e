"""PS-ViT: the same patch positions are dropped in all images, those that least reaches the class token from.

Tang et al., Patch Slimming for Efficient Vision Transformers, CVPR 2022, https://arxiv.org/abs/2106.02852. The authors
published no code; written from the paper's equations as others quote them.
Differs from the paper: how many positions a block keeps is told from outside (by a search on measured time, or by the
paper's own, ``vitprune.search.psvit``); where it is told by measured time, the significance is that of the dense model,
in which no position is masked yet; and products of attention over several blocks are means over the heads of each,
where the paper sums over all paths of heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.state import AttentionView, TokenState
from .base import NOWHERE, Place, Reducer, leaves_all


class PSViT(Reducer):
    """Leaves the ``keep`` patches at the most significant positions, in order; those alone ask, and all are read.

    With the dense block's weights this gives exactly the dense block's result for the tokens that are left.
    """

    where = "q_rows"
    needs_class_token = True
    keeps_order = True
    drops = True
    any_size = False

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__(place)
        self.significance: Tensor
        self.register_buffer("significance", torch.arange(place.patches, 0, -1, dtype=torch.float32))

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        ids = torch.arange(patches, device=state.x.device) if state.ids is None else state.ids
        kept = self.significance[ids].topk(patches).indices[:keep].sort().values
        rows = torch.cat([torch.arange(prefix, device=kept.device), prefix + kept])
        return state.select(lambda tokens: tokens[:, rows])._replace(ids=ids[kept])

    @classmethod
    @torch.no_grad()
    def calibrated(cls, model: Any, images: Tensor) -> dict[str, Tensor]:
        """Significance of each position for every block: the paper's s, a mean over ``images``."""
        sums: list[Tensor | float] = [0.0] * len(model.blocks)
        for batch in images.split(16):
            for block, found in enumerate(significances(model, batch)):
                sums[block] = sums[block] + found.sum(0)
        first = model.config.prefix
        return {
            f"blocks.{block}.reducer.significance": (total / len(images))[first:].float()
            for block, total in enumerate(sums)
            if isinstance(total, Tensor)
        }


def significances(model: Any, images: Tensor) -> list[Tensor]:
    """For each block of a dense model the significance of each token that leaves it, [B, N].

    That is how much of it the class token reads at last, through the attention of the blocks behind, times the squared
    length of what attention made it of.
    """
    state, maps, lengths = model.embed(images), [], []
    for block in model.blocks:
        seen = block.attend(state)[2].all_rows() if block.attn is not None else None
        if seen is not None:
            maps.append(seen)
            lengths.append((seen @ state.x.abs()[:, None]).square().sum(-1).mean(1))
        state = block(state)
    reach = torch.zeros_like(maps[0][:, 0])
    reach[:, 0, 0] = 1.0
    found = []
    for seen, length in zip(reversed(maps), reversed(lengths), strict=True):
        found.append(reach.diagonal(dim1=-2, dim2=-1) * length)
        reach = (seen.transpose(-2, -1) @ reach[:, None] @ seen).mean(1)
    return found[::-1]
