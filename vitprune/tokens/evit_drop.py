"""EViT without fusion: keep the patches that the class token attends to most, drop the rest.

Liang et al., Not All Patches Are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022,
https://arxiv.org/abs/2202.07800, with the authors' option to fuse switched off.
Differs from the authors' code: the distillation and register tokens are protected like the class token, where theirs
may drop them; only the class token's row of the attention is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from ..model.state import AttentionView, TokenState
from .base import Reducer, Schedule, keep_best, leaves_all, stepwise, thrice


def _keeping(rate: float) -> Schedule:
    """Three blocks keep ``rate`` of what enters them, rounded up."""
    return stepwise(lambda block, depth, n: math.ceil(rate * n) if block in thrice(depth) else n)


class EViTDrop(Reducer):
    """Leaves the ``keep`` patches that the class token attends to most, in that order."""

    needs_class_token = True
    drops = True
    schedules: ClassVar[Mapping[str, Schedule]] = {
        f"published-{rate}": _keeping(rate) for rate in (0.5, 0.6, 0.7, 0.8, 0.9)
    }

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        return keep_best(state, attention.class_row().mean(1)[:, prefix:], keep)
