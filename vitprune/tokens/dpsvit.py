"""DPS-ViT: the patches that each image needs least are dropped, by what PS-ViT measures once for all images.

Tang et al., Patch Slimming for Efficient Vision Transformers, CVPR 2022, https://arxiv.org/abs/2106.02852, which names
this dynamic variant of PS-ViT. A reconstruction: neither the authors' code nor the paper's account of it could be
read. The significance is PS-ViT's, of each image by itself; since neither this block's attention nor the blocks behind
have run, what these will read is taken to be what the class token reads here, and a patch's values stand for what
attention makes of it. Distillation and register tokens are protected like the class token.
"""

from __future__ import annotations

from ..model.state import AttentionView, TokenState, wide
from .base import Reducer, keep_best, leaves_all


class DPSViT(Reducer):
    """Leaves the ``keep`` most significant patches of each image, best first; those alone ask, and all are read.

    The significance is the class token's attention, squared, times the squared length of the values, summed over heads.
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
        score = (attention.class_row().square() * wide(attention.v).square().sum(-1)).sum(1)
        return keep_best(state, score[:, prefix:], keep)
