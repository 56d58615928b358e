"""ATS with fixed counts: of the patches, those that the class token sees most of are computed on, all are read.

Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, https://arxiv.org/abs/2111.15667.
Differs from the authors' code: it samples patches by the inverse cumulative distribution of the score, so that their
number depends on the image, which no static graph can have (``count_per_image`` samples so); here those of the highest
scores are taken, as many as told, best first. Distillation and register tokens are protected like the class token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, keep_best, leaves_all


class ATSFixed(Reducer):
    """Leaves the ``keep`` patches of the highest attention of the class token times the length of their values.

    Attention is summed over heads, and a value's length is that of all heads' together. Patches that are left out ask
    nothing, and are read for the last time.
    """

    where = "q_rows"
    needs_class_token = True
    drops = True
    own_counts = True

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        score = attention.class_row(state.policy).sum(1) * wide(attention.v).square().sum((1, 3)).sqrt()
        if self.per_image:
            return self._sampled(state, score[:, prefix:])
        return keep_best(state, score[:, prefix:], keep)

    def _sampled(self, state: TokenState, score: Tensor) -> TokenState:
        """All patches, with a policy that keeps those that samples of ``score`` [B, n] fall on.

        There is one sample for each patch of the image, at even steps of the cumulative score.
        """
        ranked, order = (score * state.marks()[:, state.prefix :, 0]).sort(dim=1)
        summed = ranked.cumsum(1)
        summed = (summed - summed[:, :1]) / (summed[:, -1:] - summed[:, :1])
        start = summed.masked_fill(summed == 0, torch.inf).amin(1, keepdim=True)
        samples = start + (1 - start) * torch.linspace(0, 1, state.patches, device=score.device)
        nearest = (samples[:, :, None] - summed[:, None]).abs().argmin(2)
        kept = torch.zeros_like(score).scatter(1, order.gather(1, nearest), 1.0)[..., None]
        return state.marked(kept.to(state.x.dtype))
