"""X-Pruner, a reconstruction: gates for each class say what a unit contributes, learned thresholds how many stay.

Yu and Xiang, X-Pruner: eXplainable Pruning for Vision Transformers, CVPR 2023, https://arxiv.org/abs/2303.04935. The
authors published no code (their repository says that it is to come), and what is known of the method is known from its
abstract and from what others wrote of it: this is a reconstruction, and their figures are not claimed for it.
Known: a mask value for each class and unit, learned end to end with penalties on size and smoothness; the importance of
a unit is the sum of its values over the classes; a threshold for each layer is searched under a budget; fine-tuning.
Ours: of the values, absolute ones are summed. In the first half of the training the gates of an image's class multiply
what heads and MLP units give (of mixed classes, their mean). In the second half the gates of the classes are gone, a
unit is kept where its importance is above the layer's threshold, straight through a sigmoid, and the budget is
WDPruning's augmented Lagrangian. The label is not known when the model answers, so the gates of the classes only score:
they are in no model that comes out of this. Images without labels belong to the class that the teacher takes them for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.vit import Block, Vit
from ..tokens.base import Recipe
from ._gates import BlockGates
from ._lagrangian import Lagrangian
from ._settle import block_plans, settle
from .base import MULTIPLES, Amounts, Budget, Group, Kept, Moment, Multiples, StructureMethod, Target, parameters

MASK_LR, THRESHOLD_LR = 1e-3, 0.025
SPARSITY, SMOOTHNESS = 1e-4, 1e-4  # weights of the penalties
SEARCH_FROM = 0.5  # share of the training in which the gates of the classes learn
LOWEST = -3.0  # threshold at first, in standard deviations of a layer's importances from their mean
KINDS = ("heads", "mlp")


class XPruner(StructureMethod):
    """Gates of the classes first, thresholds afterwards."""

    recipe = Recipe(lr=1e-4, last_lr=0.01, weight_decay=0.05)
    labels = True

    def __init__(self, model: Vit, budget: Budget, multiples: Multiples = MULTIPLES, steps: int = 1) -> None:
        super().__init__(model, budget, multiples, steps)
        classes, blocks = model.config.classes, model.config.blocks
        self.masks = nn.ModuleDict(
            {kind: parameters(torch.ones(classes, getattr(block, kind)) for block in blocks) for kind in KINDS}
        )
        self.thresholds = nn.ModuleDict({kind: parameters(torch.tensor(LOWEST) for _ in blocks) for kind in KINDS})
        self.lagrangian = Lagrangian()
        self.register_buffer("searching", torch.tensor(False))
        self._classes: Tensor | None = None  # weights of the classes of the images at hand, [B, classes]

    def groups(self) -> list[Group]:
        masks = Group(list(self.masks.parameters()), self.lr_at_least(MASK_LR, 0.1))
        lr = self.lr_at_least(THRESHOLD_LR, -LOWEST, SEARCH_FROM)
        thresholds = Group(list(self.thresholds.parameters()), lr, begins=SEARCH_FROM)
        return [masks, thresholds, self.lagrangian.group(SEARCH_FROM)]

    def attach(self, model: Vit) -> list[RemovableHandle]:
        def gate(kind: str, number: int) -> Any:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                if self._classes is None:
                    return None
                factors = self._classes.to(given[0]) @ cast(Any, self.masks[kind])[number].to(given[0])
                return (given[0] * factors.repeat_interleave(given[0].shape[-1] // factors.shape[-1], 1)[:, None],)

            return hook

        layers = [(b.attn.proj, b.mlp.fc2) for b in (cast(Block, block) for block in model.blocks)]
        return [
            layer.register_forward_pre_hook(gate(kind, number))
            for number, pair in enumerate(layers)
            for kind, layer in zip(KINDS, pair, strict=True)
        ]

    def begin(self, moment: Moment, target: Target) -> None:
        cast(Tensor, self.searching).fill_(moment.done >= SEARCH_FROM)
        self._classes = None if self.searching else target.classes()

    def train(self, mode: bool = True) -> XPruner:
        """Without the gates of the classes, when a model is judged: nobody tells it the class."""
        self._classes = None
        super().train(mode)
        return self

    def importances(self, kind: str) -> list[Tensor]:
        """The sum over the classes of the absolute gates, of each unit of each block."""
        return [mask.detach().abs().sum(0) for mask in cast(Any, self.masks[kind])]

    def kept(self, kind: str) -> list[Tensor]:
        """1 for each unit whose importance is above the threshold, at least the best, straight through a sigmoid."""
        found = []
        for importance, threshold in zip(self.importances(kind), cast(Any, self.thresholds[kind]), strict=True):
            spread = importance.std(correction=0).clamp_min(1e-12)
            soft = ((importance - importance.mean()) / spread - threshold).sigmoid()
            hard = (soft >= 0.5).to(soft)
            hard[importance.argmax()] = 1
            found.append(hard + soft - soft.detach())
        return found

    def gates(self) -> list[BlockGates]:
        if not self.searching:
            return []
        pairs = zip(self.config.blocks, *(self.kept(kind) for kind in KINDS), strict=True)
        return [{"proj": heads[:, None].expand(-1, b.v_dim), "fc2": units} for b, heads, units in pairs]

    def penalty(self, model: Vit, target: Target) -> Tensor:
        if self.searching:
            return self.lagrangian(self.budget.cost(self.amounts()), self.budget.share)
        masks = [mask for kind in KINDS for mask in cast(Any, self.masks[kind])]
        size = sum(mask.abs().mean() for mask in masks)
        unlike = sum((mask - mask.mean(0)).square().sum() for mask in masks)
        return SPARSITY * size + SMOOTHNESS * unlike

    def amounts(self) -> Amounts:
        """What the thresholds leave."""
        dense = Amounts.dense(self.config)._asdict()
        found = {name: value.to(self.lagrangian.lam1.device) for name, value in dense.items()}
        return Amounts(**found | {kind: torch.stack([one.sum() for one in self.kept(kind)]) for kind in KINDS})

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        scores = {kind: self.importances(kind) for kind in KINDS}
        wanted = {kind: [float(one.sum()) for one in self.kept(kind)] for kind in KINDS}
        return Kept(block_plans(settle(wanted, scores, self.config, self.budget, self.multiples), scores, self.config))
