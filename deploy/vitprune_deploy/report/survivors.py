"""Which token holds each patch of an image after each block of a model that reduces tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitprune.model.state import TokenState
from vitprune.model.vit import Vit
from vitprune.tokens.base import track_sources


@dataclass(frozen=True)
class BlockMap:
    """Where the patches of B images are when they leave a block.

    Attributes:
        block: its index.
        tokens: patch tokens that leave it.
        holder: int64 [B, P], index of the patch token that holds each patch; -1: none does.
        fused: bool [B, P], patches that no token holds but that a mixture (or a prefix token) still has a share of.
        parked: bool [B, P], patches that no block works on for now, and that may come back.
    """

    block: int
    tokens: int
    holder: np.ndarray
    fused: np.ndarray
    parked: np.ndarray


@torch.no_grad()
def survivors(model: Vit, images: Tensor) -> list[BlockMap]:
    """One map for each block, for normalised ``images`` [B, channels, height, width]."""
    state = track_sources(model.embed(images))
    maps = []
    for number, block in enumerate(model.blocks):
        state = block(state)
        maps.append(_read(number, state))
    return maps


def _read(number: int, state: TokenState) -> BlockMap:
    """The map of the tokens that leave block ``number``.

    A method that keeps token sizes stands by its merges: the token with most of a patch holds it. Without sizes a token
    counts as one patch, so one made of several is a mixture that holds none of them.
    """
    assert state.source is not None  # tracked from the start
    share = state.source if state.size is None else state.source * state.size
    most, place = share.max(dim=1)
    holder, somewhere = place - state.prefix, most > 0
    fused = holder < 0
    if state.size is None:
        mixture = (state.source > 0).sum(dim=2) > 1
        fused = fused | mixture.gather(1, place)
    fused = fused & somewhere
    held = torch.where(somewhere & ~fused, holder, -1)
    parked = torch.zeros_like(fused)
    if state.parked is not None:
        assert state.parked.source is not None
        parked = (state.parked.source > 0).any(dim=1)
    tokens = state.x.shape[1] - state.prefix
    return BlockMap(number, tokens, held.cpu().numpy(), fused.cpu().numpy(), parked.cpu().numpy())
