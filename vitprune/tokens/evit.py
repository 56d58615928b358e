"""EViT: keep the patches that the class token attends to most, fuse the rest into one token.

Liang et al., Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022,
https://arxiv.org/abs/2202.07800.
Differs from the authors' code: the distillation and register tokens are protected like the class token, where theirs
may drop them; only the class token's row of the attention is computed; the count includes the fused token, so that
theirs with a keep rate of 0.7 is ``keep = ceil(0.7 n) + 1``; recovery trains as their fine-tuning does, and the ramp of
keep rates belongs to training from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, Schedule, gather_tokens, leaves_all, stepwise, thrice


def _keeping(rate: float) -> Schedule:
    """Three blocks keep ``rate`` of what enters them, rounded up, and fuse the rest into one more."""
    return stepwise(lambda block, depth, n: min(n, math.ceil(rate * n) + 1) if block in thrice(depth) else n)


class EViT(Reducer):
    """Leaves the ``keep - 1`` patches of highest attention, in that order, and the sum of the others, weighted by it.

    The weights are the class token's attention itself, not renormalised; the fused token competes at later blocks.
    """

    needs_class_token = True
    schedules: ClassVar[Mapping[str, Schedule]] = {
        f"published-{rate}": _keeping(rate) for rate in (0.5, 0.6, 0.7, 0.8, 0.9)
    }

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return cast(int, torch.sym_min(2, patches))  # one that is kept, and the fused one

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        score, order = attention.class_row().mean(1)[:, prefix:].topk(patches, dim=1)
        # one patch left over is itself, as if nothing had happened; without a branch, for symbolic counts
        fused = cast(int, torch.sym_min(patches - keep, 1))
        weights = score[:, None, keep - 1 :] * fused + (1 - fused)

        def reduced(tokens: Tensor) -> Tensor:
            ranked = gather_tokens(tokens[:, prefix:], order)
            rest = (weights @ wide(ranked[:, keep - 1 :])).to(tokens.dtype)
            return torch.cat([tokens[:, :prefix], ranked[:, : keep - 1], rest], dim=1)

        return state._replace(x=reduced(state.x), source=None if state.source is None else reduced(state.source))
