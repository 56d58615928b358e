"""DynamicViT: small networks in front of some blocks learn which patches go on, the rest are dropped.

Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification, NeurIPS 2021,
https://arxiv.org/abs/2106.02034.
Differs from the authors' code: distillation and register tokens are protected like the class token; patches are ranked
by the difference of the two logits, which orders them as its log-probability does; any image size is taken. The
authors' mixup, drop path and averaging of weights are left to whoever trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..model.state import TokenState
from ._predictor import Predictor, predictor_macs
from .base import NOWHERE, Place, Recipe, Schedule, keep_best, leaves_all, thrice

RATIO_WEIGHT = 2.0  # of the squared error of the kept share; the authors' for DeiT-S, who take 5 for DeiT-B


def _keeping(rate: float) -> Schedule:
    """Three blocks keep ``rate``, its square and its cube of the image's patches, rounded down."""

    def counts(depth: int, patches: int) -> list[int]:
        acting = sorted(thrice(depth))
        done = [sum(block >= first for first in acting) for block in range(depth)]
        return [int(patches * rate**times) for times in done]

    return counts


class DynamicViT(Predictor):
    """Leaves the ``keep`` patches that a predictor gives the highest scores, in that order.

    In training all patches stay. A hard Gumbel sample of the predictor says which of those kept so far are kept on;
    attention reads no other; and the kept share is drawn to the one that ``keep`` is of all patches.
    """

    where = "before"
    drops = True
    stand_in = "evit_drop"
    recipe = Recipe(
        answers=0.5,
        tokens=0.5,
        lr=1e-3,
        backbone_lr=0.01,
        backbone_from=5 / 30,
        warmup=5 / 30,
        last_lr=1e-3,
        weight_decay=0.05,
        frozen=("prefix_tokens", "pos_embed"),
    )
    official_names: ClassVar[Mapping[str, str]] = {
        "in_conv.0": "norm",
        "in_conv.1": "inner",
        "out_conv.0": "outer.0",
        "out_conv.2": "outer.2",
        "out_conv.4": "outer.4",
    }
    schedules: ClassVar[Mapping[str, Schedule]] = {f"published-{rate}": _keeping(rate) for rate in (0.5, 0.7, 0.8, 0.9)}

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__(place, place.dim)
        self.start_small()

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: None, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        if self.training:
            return self._marked(state, keep)
        logits = self.logits(state.x[:, prefix:])
        return keep_best(state, logits[..., 0] - logits[..., 1], keep)

    def logits(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Of keeping and dropping each patch, [B, n, 2], from ``x`` [B, n, C]; ``policy`` [B, n, 1] weights means."""
        return self.scores(x, policy)

    def _marked(self, state: TokenState, keep: int) -> TokenState:
        """All tokens, with a policy that a sample of the predictor made stricter, and the error of its share."""
        prefix = state.prefix
        before = state.marks()
        logits = self.logits(state.x[:, prefix:], before[:, prefix:]).float()
        kept = F.gumbel_softmax(logits, hard=True)[..., :1] * before[:, prefix:]
        error = (kept.mean(1) - keep / state.patches).square().mean() * RATIO_WEIGHT / self.place.stages
        return state.penalised(error)._replace(policy=torch.cat([before[:, :prefix], kept], dim=1))

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone, own = super().official(weights)
        if not own:
            raise InputError("this is no checkpoint of DynamicViT: it has no weights named score_predictor")
        return backbone, own

    def macs(self, patches: int) -> int:
        return patches * predictor_macs(self.place.dim)
