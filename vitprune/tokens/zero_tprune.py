"""Zero-TPrune, a reconstruction: drop patches much like more important ones, then those of least PageRank.

Wang, Dedhia and Jha, Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
Transformers, CVPR 2024, https://arxiv.org/abs/2305.17328.
Reconstructed from the abstract and the authors' page, since their code could not be had: the numbers of iterations are
from memory, the filter that leaves out heads by the variance of their scores is left out, and half of the patches that
go are chosen by likeness, where the authors' shares are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, gather_tokens, keep_patches, leaves_all

ITERATIONS = (30, 5, 1)  # of the weighted PageRank, in the first, second and last third of the blocks


class ZeroTPrune(Reducer):
    """Leaves the ``keep`` patches that are important and unlike each other, most important first.

    Importance is a token's PageRank when each votes by what it attends to: a root mean square over the heads' graphs.
    Of the less important half of the patches those go whose keys are most like one of the other half's; then the least
    important of all that are left. The class token votes, and stays.
    """

    drops = True

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        order = self._importance(attention)[:, prefix:].topk(patches, dim=1).indices
        keys = F.normalize(wide(attention.k).mean(1), dim=-1)[:, prefix:]
        kept = order.gather(1, self._unlike(gather_tokens(keys, order), (patches - keep) // 2)[:, :keep])
        return keep_patches(state, kept)

    def _importance(self, attention: AttentionView) -> Tensor:
        """PageRank of each token, [B, N]."""
        votes = attention.all_rows()
        rank = torch.full_like(votes[:, :, :1], 1.0) / votes.shape[-1]
        for _ in range(ITERATIONS[3 * self.place.block // self.place.depth]):
            rank = rank @ votes
        return rank.squeeze(2).square().mean(1).sqrt()

    def _unlike(self, keys: Tensor, gone: int) -> Tensor:
        """Which patches are left without the ``gone`` that are most like others, [B, n - gone].

        ``keys`` [B, n, D] come in the order of importance, and so do the numbers of those that are left.
        """
        patches = keys.shape[1]
        half = patches - patches // 2
        first, second = keys[:, :half], keys[:, half:]
        alike = (second @ first.transpose(1, 2)).amax(2)
        stay = (-alike).topk(patches - half, dim=1).indices[:, : patches - half - gone].sort(dim=1).values
        whole = torch.arange(half, device=keys.device).expand(keys.shape[0], -1)
        return torch.cat([whole, half + stay], dim=1)
