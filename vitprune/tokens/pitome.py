"""PiToMe: merge patches that are one of many alike, by energy, and leave those alone that stand apart.

Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024,
https://arxiv.org/abs/2405.16148. Written from the equations. Differs from the authors' code: tokens are summed by a
product with a 0/1 matrix (a reducing scatter does not parse in TensorRT); distillation and register tokens are
protected like the class token; LayerScale applies; patches that stay keep their order in the first half of the blocks.
As there, attention does not count the sizes of tokens, which weigh in means alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, Schedule, gather_tokens, leaves_all, stepwise


def _keeping(rate: float) -> Schedule:
    """Every block keeps ``rate`` of what enters it, rounded up."""
    return stepwise(lambda block, depth, n: n - math.floor(n - n * rate))


class PiToMe(Reducer):
    """Merges N - prefix - ``keep`` patches of high energy into their best match: means weighted by size.

    The energy of a patch is the mean of ELU(cosine - margin) of its key to all others; the margin falls from 3/4 to 0
    with the depth. Ranked by energy, every other patch may merge into one of those between. In the first half of the
    blocks these are all patches, and the most alike do; in the second half only twice as many as are to go, and all do.
    Out come the prefix, the patches that are left and those that were merged into.
    """

    schedules: ClassVar[Mapping[str, Schedule]] = {
        f"published-{rate}": _keeping(rate) for rate in (0.875, 0.9, 0.9125, 0.925, 0.95)
    }

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return patches - patches // 2

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        keys = F.normalize(wide(attention.k).mean(1), dim=-1)[:, prefix:]
        order = self._energy(keys).topk(patches, dim=1).indices
        gone, left, into, match = self._pairs(keys, order, patches - keep)
        merge = (match[:, None] == torch.arange(into.shape[1], device=into.device)[:, None]).to(keys.dtype)
        size = torch.ones_like(state.x[..., :1]) if state.size is None else state.size

        def picked(tokens: Tensor, index: Tensor) -> Tensor:
            return gather_tokens(tokens[:, prefix:], index)

        gone_size, into_size = wide(picked(size, gone)), wide(picked(size, into))
        total = into_size + merge @ gone_size

        def joined(tokens: Tensor, merged: Tensor) -> Tensor:
            return torch.cat([tokens[:, :prefix], picked(tokens, left), merged.to(tokens.dtype)], dim=1)

        def means(tokens: Tensor) -> Tensor:
            both = wide(picked(tokens, into)) * into_size + merge @ (wide(picked(tokens, gone)) * gone_size)
            return joined(tokens, both / total)

        return state._replace(
            x=means(state.x),
            size=joined(size, total),
            counted=False,
            source=None if state.source is None else means(state.source),
        )

    def _energy(self, keys: Tensor) -> Tensor:
        """How much each patch is one of many, [B, n], from unit keys [B, n, D]."""
        margin = 0.75 - 0.75 * self.place.block / self.place.depth
        return F.elu(keys @ keys.transpose(1, 2) - margin).mean(-1)

    def _pairs(self, keys: Tensor, order: Tensor, merges: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patches that merge [B, R], those left alone, those merged into [B, M], and for each of R which of M."""
        some = cast(int, torch.sym_max(merges, 1))  # one pair even if none merges, for symbolic counts
        among = order if 2 * self.place.block < self.place.depth else order[:, : 2 * some]
        apart, (from_, into) = order[:, among.shape[1] :], (among[:, ::2], among[:, 1::2])
        alike, match = (gather_tokens(keys, from_) @ gather_tokens(keys, into).transpose(1, 2)).topk(1, dim=2)
        ranked = alike.squeeze(2).topk(from_.shape[1], dim=1).indices
        stay = ranked[:, merges:].sort(dim=1).values
        goes = ranked[:, :merges]
        left = torch.cat([from_.gather(1, stay), apart], dim=1)
        return from_.gather(1, goes), left, into, match.squeeze(2).gather(1, goes)
