"""SPViT: a small network in front of some blocks keeps patches, and packs the others into one token each time.

Kong et al., SPViT: Enabling Faster Vision Transformers via Latency-aware Soft Token Pruning, ECCV 2022,
https://arxiv.org/abs/2112.13890.
Differs from the authors' code: in evaluation so many patches as are told stay, those of the highest scores, where
theirs draws Gumbel noise even then, so that their number depends on image and chance; what that leaves is gathered and
not masked; distillation and register tokens are protected like the class token. A package is the sum of the patches
that leave, each times its probability to be kept, as in the code that the authors train with; elsewhere they divide by
the sum of the probabilities. Weights of heads are taken per patch, as in that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..model.state import TokenState
from ._predictor import Predictor, predictor_macs
from .base import NOWHERE, Place, Recipe, Schedule, gather_tokens, leaves_all, thrice

RATIO_WEIGHT = 2.0  # of the squared error of the kept share


def _keeping(shares: tuple[float, float, float]) -> Schedule:
    """Three blocks keep these shares of the image's patches, and have one, two and three packages beside them."""

    def counts(depth: int, patches: int) -> list[int]:
        left, acting = [patches], sorted(thrice(depth))
        left += [min(left[0], round(patches * share) + number) for number, share in enumerate(shares, start=1)]
        return [left[sum(block >= first for first in acting)] for block in range(depth)]

    return counts


class SPViT(Predictor):
    """Leaves the patches that a selector gives the highest scores, in that order, and all packages, a new one last.

    The selector looks at each head's channels with the same weights, and weighs the heads. In training all patches
    stay; a hard Gumbel sample says which of those kept so far are kept on, and attention reads no other.
    """

    where = "before"
    drops = True
    stand_in = "evit"
    recipe = Recipe(
        answers=0.5,
        tokens=0.5,
        lr=5e-4,
        backbone_lr=0.01,
        backbone_from=5 / 30,
        warmup=5 / 30,
        last_lr=1e-3,
        weight_decay=0.05,
        frozen=("prefix_tokens", "pos_embed"),
    )
    official_names: ClassVar[Mapping[str, str]] = {
        "in_conv.0.0": "norm",
        "in_conv.0.1": "inner",
        "out_conv.0.0": "outer.0",
        "out_conv.0.2": "outer.2",
        "out_conv.0.4": "outer.4",
        "senet.0": "heads.0",
        "senet.2": "heads.2",
    }
    schedules: ClassVar[Mapping[str, Schedule]] = {
        "published-0.617": _keeping((0.617, 0.369, 0.137)),
        "published-0.7": _keeping((0.7, 0.49, 0.343)),
    }

    def __init__(self, place: Place = NOWHERE) -> None:
        heads = max(1, place.heads)
        super().__init__(place, place.dim // heads)
        self.heads = nn.Sequential(nn.Linear(heads, heads // 2), nn.GELU(), nn.Linear(heads // 2, heads), nn.Sigmoid())
        self.start_small()

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return min(patches, 13)  # one patch and the packages of all applications in a model of twelve blocks

    def forward(self, state: TokenState, attention: None, keep: int) -> TokenState:
        prefix, tokens, packages = state.prefix, state.x.shape[1] - state.prefix, state.packages
        if leaves_all(keep, tokens):
            return state
        if isinstance(keep, int) and keep < packages + 2:
            raise InputError(f"block {self.place.block}: {keep} tokens cannot hold {packages + 1} packages and a patch")
        if self.training:
            return self._marked(state, keep)
        logits, chance = self.judge(state.x[:, prefix:])
        patches = tokens - packages
        order = (logits[..., 0] - logits[..., 1])[:, :patches].topk(patches, dim=1).indices
        kept = keep - packages - 1
        weights = chance.gather(1, order)[:, None, kept:]

        def packed(of: Tensor) -> Tensor:
            ranked = gather_tokens(of[:, prefix : prefix + patches], order)
            package = weights @ ranked[:, kept:]
            return torch.cat([of[:, :prefix], ranked[:, :kept], of[:, prefix + patches :], package], dim=1)

        source = None if state.source is None else packed(state.source)
        return state._replace(x=packed(state.x), source=source, packages=packages + 1)

    def judge(self, x: Tensor, policy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of keeping and dropping [B, n, 2], and the probability to be kept [B, n], of patches ``x`` [B, n, C].

        ``policy`` [B, n, 1] weights the mean over patches that each is judged beside.
        """
        by_head = x.unflatten(-1, (max(1, self.place.heads), -1))  # [B, n, H, C / H]
        weights = self.heads(by_head.mean(-1))[..., None]
        weights = weights / weights.sum(2, keepdim=True)
        scores = self.scores(by_head, None if policy is None else policy[..., None])  # [B, n, H, 2]
        chance = (scores.softmax(-1) * weights).sum(2)[..., 0]
        return (scores.log_softmax(-1) * weights).sum(2), chance

    def _marked(self, state: TokenState, keep: int) -> TokenState:
        """All tokens and a new package, a stricter policy, and the error of the share that is kept of the batch."""
        prefix, packages = state.prefix, state.packages
        last = state.x.shape[1] - packages  # behind the patches
        before = state.marks()
        logits, chance = self.judge(state.x[:, prefix:], before[:, prefix:])
        sample = F.gumbel_softmax(logits.float(), hard=True)[..., :1]
        kept = sample[:, : last - prefix] * before[:, prefix:last]
        leaving = before[:, prefix:last] - kept
        package = (state.x[:, prefix:last] * leaving * chance[:, : last - prefix, None]).sum(1, keepdim=True)
        wanted = (keep - packages - 1) / state.patches
        error = (kept.mean() - wanted) ** 2 * RATIO_WEIGHT / self.place.stages
        return state.penalised(error)._replace(
            x=torch.cat([state.x, package.to(state.x.dtype)], dim=1),
            policy=torch.cat([before[:, :prefix], kept, torch.ones_like(before[:, : packages + 1])], dim=1),
            packages=packages + 1,
        )

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone, own = super().official(weights)
        # what is left are the other heads' names for the first one's weights
        backbone = {name: value for name, value in backbone.items() if not name.startswith("score_predictor.")}
        if not any(".reducer.heads." in name for name in own):
            raise InputError("this is no checkpoint of SPViT: its score_predictor weighs no heads (senet)")
        return backbone, own

    def macs(self, patches: int) -> int:
        heads = max(1, self.place.heads)
        size = self.place.dim // heads
        return patches * (heads * predictor_macs(size) + 2 * heads * (heads // 2))
