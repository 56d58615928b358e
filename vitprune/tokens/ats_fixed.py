"""ATS with fixed counts: of the patches, those that the class token sees most of are computed on, all are read.

Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, https://arxiv.org/abs/2111.15667.
Differs from the authors' code: it samples patches by the inverse cumulative distribution of the score, so that their
number depends on the image, which no static graph can have; here those of the highest scores are taken, as many as
told, best first. Distillation and register tokens are protected like the class token.
"""

from __future__ import annotations

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, keep_patches, leaves_all


class ATSFixed(Reducer):
    """Leaves the ``keep`` patches of the highest attention of the class token times the length of their values.

    Attention is summed over heads, and a value's length is that of all heads' together. Patches that are left out ask
    nothing, and are read for the last time.
    """

    where = "q_rows"
    needs_class_token = True
    drops = True

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        score = attention.class_row().sum(1) * wide(attention.v).square().sum((1, 3)).sqrt()
        kept = score[:, prefix:].topk(patches, dim=1).indices[:, :keep]
        return keep_patches(state, kept)
