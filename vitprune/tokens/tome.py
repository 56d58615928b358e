"""ToMe: merge the pairs of patches whose keys are most alike, by bipartite soft matching.

Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, https://arxiv.org/abs/2210.09461. Written from the paper's
equations. Differs from the authors' code: tokens are summed by a product with a 0/1 matrix (a reducing scatter does
not parse in TensorRT); the keys are the ones that attention used, after a q/k norm; LayerScale applies; register
tokens neither merge nor are merged into; unmerged patches keep their order even without a class token, where theirs
go by similarity; a token that nothing was merged into is copied, not multiplied and divided by its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, Schedule, gather_tokens, leaves_all, stepwise


def _merging(first: int, last: int) -> Schedule:
    """Merges of the first and of the last block, as many as there can be; in between they change evenly."""
    return stepwise(lambda block, depth, n: n - min(int(first + (last - first) * block / max(1, depth - 1)), n // 2))


class ToMe(Reducer):
    """Merges N - prefix - ``keep`` patches at even positions into their best match at odd ones: size-weighted means.

    Positions count from the first token of the sequence, the class token. Out come the prefix, the unmerged even
    patches and then the odd ones, both in the order in which they came.
    """

    proportional = True
    schedules: ClassVar[Mapping[str, Schedule]] = {
        **{f"published-r{merges}": _merging(merges, merges) for merges in (7, 8, 13, 16, 23, 40, 45)},
        "published-r13-decreasing": _merging(26, 0),
    }

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return patches - patches // 2

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix = state.prefix
        if leaves_all(keep, state.x.shape[1] - prefix):
            return state
        keys = F.normalize(wide(attention.k).mean(1), dim=-1)
        even, odd = _halves(keys, prefix)
        alike, match = (even @ odd.transpose(1, 2)).topk(1, dim=2)
        order = alike.squeeze(2).topk(even.shape[1], dim=1).indices
        # both halves by their own lengths: an exporter with symbolic sizes sees then that ``keep`` patches come out
        merges = even.shape[1] + odd.shape[1] - keep
        gone, left = order[:, :merges], order[:, merges:].sort(dim=1).values
        into = gather_tokens(match, gone).transpose(1, 2)  # [B, 1, R]
        merge = (into == torch.arange(odd.shape[1], device=odd.device)[:, None]).to(keys.dtype)  # [B, odd, R]

        size = torch.ones_like(state.x[..., :1]) if state.size is None else state.size
        even_size, odd_size = _halves(wide(size), prefix)
        gone_size = gather_tokens(even_size, gone)
        total = odd_size + merge @ gone_size

        def merged(tokens: Tensor) -> Tensor:
            even, odd = _halves(tokens, prefix)
            mean = (wide(odd) * odd_size + merge @ (wide(gather_tokens(even, gone)) * gone_size)) / total
            return joined(tokens, even, mean)

        def joined(tokens: Tensor, even: Tensor, odd: Tensor) -> Tensor:
            patches = torch.cat([gather_tokens(even, left), odd], dim=1).to(tokens.dtype)
            return torch.cat([tokens[:, :prefix], patches], dim=1)

        return state._replace(
            x=merged(state.x),
            size=joined(size, even_size, total),
            source=None if state.source is None else merged(state.source),
        )


def _halves(tokens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The patches among ``tokens`` [B, N, C] at even and at odd positions of the sequence."""
    return tokens[:, prefix + prefix % 2 :: 2], tokens[:, prefix + 1 - prefix % 2 :: 2]
