"""IA-RED2: interpreters in front of some blocks keep patches by what the class token asks for; learned by reward.

Pan et al., IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers, NeurIPS 2021,
https://arxiv.org/abs/2106.12620. The authors published no training code: the interpreter is as copies of their model
file have it, the reward and its baseline as the paper states them, the curriculum and the learning rate are from
memory.
Differs from the paper: in evaluation so many patches as are told stay, those of the highest probabilities, where theirs
are those above one half, so that their number depends on the image (``count_per_image`` decides so); distillation and
register tokens are protected like the class token; the third of the interpreter's projection that nothing reads is left
out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.state import TokenState
from .base import NOWHERE, Place, Recipe, Reducer, keep_best, leaves_all

EVEN = 0.5  # a patch that is as likely dropped as kept


class IARED2(Reducer):
    """Leaves the ``keep`` patches that are the most probable to be kept, in that order.

    A training takes the interpreters in turn, from the first block on: those before decide by probability above one
    half, those behind keep all, and the one in question draws, so that its draws can be rewarded. In the last turn all
    decide.
    """

    where = "before"
    needs_class_token = True
    drops = True
    rewarded = True
    own_counts = True
    stand_in = "evit_drop"
    recipe = Recipe(
        lr=1e-3, backbone_lr=0.01, backbone_from=0.75, last_lr=0.01, weight_decay=0.05, mixup=0.0, cutmix=0.0
    )  # a mixed image has no right answer to be rewarded for

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__(place)
        self.qk = nn.Linear(place.dim, 2 * place.dim)

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: None, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        if self.training or self.per_image:
            return self._marked(state)
        return keep_best(state, self.chances(state.x)[:, prefix:], keep)

    def chances(self, x: Tensor) -> Tensor:
        """The probability of each token of ``x`` [B, N, C] to be kept, [B, N]: the mean over heads of sigmoids."""
        heads = max(1, self.place.heads)
        parts = self.qk(F.layer_norm(x, x.shape[-1:])).chunk(2, dim=-1)
        q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        return (q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).sigmoid().mean(1).squeeze(1)

    def _marked(self, state: TokenState) -> TokenState:
        """All tokens, with a policy that draws or decisions made stricter, and the draws' probability."""
        prefix, turn = state.prefix, int((self.done if self.training else 1.0) * (self.place.stages + 1))
        if turn < self.place.stage:
            return state
        before = state.marks()
        chance = self.chances(state.x * before)[:, prefix:, None]
        kept = (chance > EVEN).to(before.dtype)
        log_chance = state.log_chance
        if turn == self.place.stage and not self.decided:
            kept = torch.bernoulli(chance.detach())
            drawn = torch.where(kept > 0, chance, 1 - chance).clamp(min=1e-6).log() * before[:, prefix:]
            log_chance = drawn.sum((1, 2)) if log_chance is None else log_chance + drawn.sum((1, 2))
        return state.marked(kept)._replace(log_chance=log_chance)

    def macs(self, patches: int) -> int:
        dim = self.place.dim
        return 2 * patches * dim * dim + patches * dim
