"""CAIT's consistent dynamic channel pruning, a reconstruction: dims leave alike in every head, and may return.

Wang, Chen, Lin et al., CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable
Transferability For ViTs, 2023, https://arxiv.org/abs/2309.15755. No code was published, and of the method only the
abstract and what others wrote of it were at hand: this is a reconstruction. The figures of the paper are those of
channels and merged tokens together (``vitprune/tokens/cait.py`` has the merging), and are not claimed for this.
Known: every head of a block keeps equally many channels; queries and keys keep the same ones, values and the columns of
``proj`` that read them too; what is pruned is decided anew during the fine-tuning.
Ours: the score is |weight * gradient| summed over a channel's weights, a moving average over steps; the share that is
pruned grows in a line over the first third of the training, then the masks stand; weights under a closed mask learn
straight through it. MLP units are pruned too, and all blocks keep the same share, which is what fits the budget.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..model.vit import Block, Vit
from ..tokens.base import Recipe
from ._gates import BlockGates
from ._settle import block_plans, full, uniform
from .base import MULTIPLES, Budget, Kept, Moment, Multiples, StructureMethod, Target

RAMP = 1 / 3  # share of the training in which masks grow and change
MEMORY = 0.9  # share of the score so far in the next one
KINDS = ("qk", "v", "mlp")


def ramped(units: int, kept: int, done: float) -> int:
    """How many of ``units`` are kept after a share ``done`` of the training, if ``kept`` are at last."""
    return units - int((units - kept) * min(1.0, done / RAMP) + 1e-9)


def closed(scores: Tensor, kept: int) -> Tensor:
    """0 for all but the ``kept`` highest ``scores`` in the last axis, and 1 for these."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :kept]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


class CaitCdcp(StructureMethod):
    """Masks on dims of heads and MLP units; heads stay."""

    recipe = Recipe(lr=5e-4, last_lr=0.02, weight_decay=0.05)
    dims = ("qk", "v")
    straight = True

    def __init__(self, model: Vit, budget: Budget, multiples: Multiples = MULTIPLES, steps: int = 1) -> None:
        super().__init__(model, budget, multiples, steps)
        self.counts = uniform(model.config, budget, multiples, KINDS, tied=False)
        for number, block in enumerate(model.config.blocks):
            shapes = {"qk": (block.heads, block.qk_dim), "v": (block.heads, block.v_dim), "mlp": (block.mlp,)}
            for kind, shape in shapes.items():
                self.register_buffer(f"score_{kind}{number}", torch.zeros(shape))
                self.register_buffer(f"mask_{kind}{number}", torch.ones(shape))

    def begin(self, moment: Moment, target: Target) -> None:
        if moment.done > RAMP and self._at_last():
            return
        for kind in KINDS:
            for number, units in enumerate(full(self.config, kind)):
                kept = ramped(units, getattr(self.counts, kind)[number], moment.done)
                self._mask(kind, number).copy_(closed(self._score(kind, number), kept))

    def gates(self) -> list[BlockGates]:
        found: list[BlockGates] = []
        for number in range(len(self.config.blocks)):
            qk, v, mlp = (self._mask(kind, number) for kind in KINDS)
            found.append({"q": qk, "k": qk, "v": v, "proj": v, "fc1": mlp, "fc2": mlp})
        return found

    @torch.no_grad()
    def after_backward(self, model: Vit) -> None:
        if self._at_last():
            return
        for number, block in enumerate(model.blocks):
            for kind, fresh in channel_scores(cast(Block, block)).items():
                score = self._score(kind, number)
                score.copy_(MEMORY * score + (1 - MEMORY) * fresh)

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        blocks = range(len(model.blocks))
        scores = {kind: [self._score(kind, number) for number in blocks] for kind in KINDS}
        counts = uniform(self.config, self.budget, self.multiples, KINDS, tied=False).no_more_than(self.counts)
        return Kept(block_plans(counts, scores, self.config))

    def _at_last(self) -> bool:
        """Whether the masks are those of the plan, and stand."""
        return all(
            int(self._mask(kind, number).sum(-1).max()) == getattr(self.counts, kind)[number]
            for kind in KINDS
            for number in range(len(self.config.blocks))
        )

    def _mask(self, kind: str, number: int) -> Tensor:
        return cast(Tensor, getattr(self, f"mask_{kind}{number}"))

    def _score(self, kind: str, number: int) -> Tensor:
        return cast(Tensor, getattr(self, f"score_{kind}{number}"))


def channel_scores(block: Block) -> dict[str, Tensor]:
    """|weight * gradient| summed over the weights of each dim [H, D], [H, V] and hidden unit [M]."""

    def products(layer: torch.nn.Linear) -> Tensor:
        return (layer.weight * cast(Tensor, layer.weight.grad)).abs()

    attn, mlp = block.attn, block.mlp
    q, k, v = products(attn.qkv).sum(1).split(attn.sizes)
    rows = products(mlp.fc1).sum(1).unflatten(0, (-1, mlp.fc2.in_features)).sum(0)
    return {
        "qk": (q + k).unflatten(0, (attn.heads, -1)),
        "v": (v + products(attn.proj).sum(0)).unflatten(0, (attn.heads, -1)),
        "mlp": rows + products(mlp.fc2).sum(0),
    }
