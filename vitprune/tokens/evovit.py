"""Evo-ViT: the patches that the class token has attended to most are computed on, the others wait and may come back.

Xu et al., Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer, AAAI 2022,
https://arxiv.org/abs/2108.01390, as the official code has it for DeiT: patches that wait stay as they are, and the mean
that is classified counts them.
Differs from the authors' code: attention is averaged over heads, where theirs is summed, which ranks alike and holds
where blocks have fewer heads; a model whose classifier reads the class token keeps it, and trains no second one;
distillation and register tokens are protected like the class token; counts that a search found may fall from stage to
stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..model.state import AttentionView, TokenState
from .base import Recipe, Reducer, Schedule, gather_tokens, keep_patches, leaves_all

LAYERWISE = 200 / 300  # of a training, in which every block from the first on that reduces chooses anew


def _keeping(rate: float) -> Schedule:
    """From a third of the blocks on ``rate`` of the image's patches, rounded down."""

    def counts(depth: int, patches: int) -> list[int]:
        return [patches if block < depth // 3 else int(patches * rate) for block in range(depth)]

    return counts


class EvoViT(Reducer):
    """Leaves the ``keep`` patches of highest class attention so far, in that order; the others are parked.

    All patches, the parked ones too, are ranked anew where a count falls, and from then on at each third of the blocks.
    """

    where = "before"
    watches = True
    needs_class_token = True
    drops = True
    stand_in = "evit_drop"
    recipe = Recipe(labels=0.5, second=0.5, lr=1e-3, warmup=5 / 300, last_lr=0.01, weight_decay=0.05)
    schedules: ClassVar[Mapping[str, Schedule]] = {"published-0.5": _keeping(0.5)}
    official_args: ClassVar[Mapping[str, object]] = {"global_pool": "avg"}

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    @staticmethod
    def again(block: int, depth: int) -> bool:
        return depth >= 3 and block % (depth // 3) == 0

    def keep_anyway(self, state: TokenState) -> int | None:
        chooses = self.training and self.done < LAYERWISE and state.parked is not None
        return state.x.shape[1] - state.prefix if chooses else None

    def forward(self, state: TokenState, attention: None, keep: int) -> TokenState:
        state, prefix = state.unparked(), state.prefix
        patches = state.x.shape[1] - prefix
        if leaves_all(keep, patches):
            return state
        assert state.score is not None  # no block in front of the first can act
        order = state.score[:, prefix:, 0].topk(patches, dim=1).indices

        parked = state.select(lambda of: gather_tokens(of[:, prefix:], order[:, keep:]))
        return keep_patches(state, order[:, :keep])._replace(parked=parked)

    def watch(self, state: TokenState, attention: AttentionView) -> TokenState:
        now = attention.class_row().mean(1)[..., None].to(state.x.dtype)
        if state.score is None or self.place.block < self.place.depth // 3:
            return state._replace(score=now)
        return state._replace(score=0.5 * state.score + 0.5 * now)

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if "qks.0.qk.weight" not in weights:
            raise InputError("this is no checkpoint of Evo-ViT for DeiT: it has no weights named qks")
        named = {"norms": "norm1", "projs": "attn.proj"}
        backbone: dict[str, Tensor] = {}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            block, _, last = rest.partition(".")
            if part in named:
                backbone[f"blocks.{block}.{named[part]}.{last}"] = value
            elif part == "qks":
                kind = last.removeprefix("qk.")
                backbone[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([value, weights[f"vs.{block}.v.{kind}"]])
            elif part == "norm":
                backbone[f"fc_norm.{rest}"] = value
            elif part not in ("vs", "norm_cls", "head_cls"):
                backbone[name] = value
        return backbone, {}
