"""ViT-Slim: soft masks on dims of heads, MLP units and patches learn under an L1 penalty, and are cut off globally.

Chavan, Shen, Liu et al., Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space, CVPR
2022, https://arxiv.org/abs/2201.00814. One mask multiplies a dim's query, key and value alike; one threshold over all
blocks says which masks of a kind stay, ``>=`` it; masks are dropped then, and what is left trains on.
Differs from the authors' code: it leaves other dims in each head, which no dense product can use; here each head of a
block keeps equally many, the best of its own, their number rounded to a multiple. The share that stays is the one that
fits the budget, the same for dims and units (theirs: 0.7 of each). Penalties have the weights of DeiT-S, divided by the
four processes that the authors' code divides them by. Zeroing what a patch gives to a block does not remove it, as it
still is a key: patches that are pruned (``patches`` below 1) leave by ``psvit``, in whose block they no longer ask and
are read for a last time, so that the model computes something else than the masks did; that takes a class token.
The masks are not decayed. In a short training their learning rate is raised so that they can move by a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, NotSupported
from ..model.config import VitConfig
from ..model.vit import Block, Vit
from ..plan import BlockPlan
from ..tokens.base import Recipe
from ._gates import BlockGates
from ._settle import Counts, block_plans, full, nearest, settle
from .base import MULTIPLES, Budget, Group, Kept, Multiples, StructureMethod, Target, parameters

LR = 5e-4
DIMS, UNITS, PATCHES = 2e-4 / 4, 5e-5 / 4, 1e-4 / 4  # weights of the penalties
OPEN = 3.0  # a patch's mask at first: tanh(3) = 0.995
SHARES = 200  # how finely the share that fits the budget is looked for


def threshold(masks: Sequence[Tensor], share: float) -> Tensor:
    """The mask at ``int((1 - share) n)`` of all n in ascending order: those that are not below it stay."""
    every = torch.cat([mask.flatten() for mask in masks]).sort().values
    return every[min(int((1 - share) * len(every)), len(every) - 1)]


def monotone(kept: Sequence[Tensor]) -> list[Tensor]:
    """Which patches [P] each block keeps, so that those of a later block are there in all earlier ones."""
    found = list(kept)
    for number in reversed(range(len(found) - 1)):
        found[number] = found[number] | found[number + 1]
    return found


class VitSlim(StructureMethod):
    """Args: ``patches``: the share of all blocks' patches that stays; 1: patches have no masks."""

    recipe = Recipe(lr=LR, last_lr=1.0, weight_decay=1e-3)
    dims = ("qk", "v")

    def __init__(
        self,
        model: Vit,
        budget: Budget,
        multiples: Multiples = MULTIPLES,
        steps: int = 1,
        *,
        patches: float = 1.0,
    ) -> None:
        super().__init__(model, budget, multiples, steps)
        config = model.config
        if not 0 < patches <= 1:
            raise InputError(f"vitslim keeps a share of the patches above 0 and up to 1, not {patches}")
        if patches < 1 and (not config.class_token or config.dynamic_image_size):
            raise NotSupported("vitslim drops patches by psvit, which takes a class token and images of one size")
        self.patches = patches
        self.heads = parameters(torch.ones(block.heads, block.v_dim) for block in config.blocks)
        self.units = parameters(torch.ones(block.mlp) for block in config.blocks)
        self.positions = parameters(torch.full((config.patches,), OPEN) for _ in config.blocks if patches < 1)

    @classmethod
    def check(cls, config: VitConfig, budget: Budget) -> None:
        super().check(config, budget)
        if any(block.qk_dim != block.v_dim for block in config.blocks):
            raise NotSupported(
                "vitslim prunes queries, keys and values alike, and this model's values are of another size"
            )

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.patches}"

    def groups(self) -> list[Group]:
        return [Group(list(self.parameters()), self.lr_at_least(LR, 0.5))]

    def attach(self, model: Vit) -> list[RemovableHandle]:
        """Patches' masks multiply what attention and MLP read of each token."""

        def gate(number: int) -> Any:
            def hook(_: nn.Module, __: Any, x: Tensor) -> Tensor:
                of_patches = self.positions[number].tanh()
                factors = torch.cat([of_patches.new_ones(x.shape[1] - len(of_patches)), of_patches])
                return x * factors[:, None].to(x)

            return hook

        blocks = [cast(Block, block) for block in model.blocks]
        return [
            norm.register_forward_hook(gate(number))
            for number, block in enumerate(blocks[: len(self.positions)])
            for norm in (block.norm1, block.norm2)
        ]

    def gates(self) -> list[BlockGates]:
        pairs = zip(cast(Any, self.heads), cast(Any, self.units), strict=True)
        return [{"q": heads, "k": heads, "v": heads, "fc2": units} for heads, units in pairs]

    def penalty(self, model: Vit, target: Target) -> Tensor:
        loss = DIMS * sum(mask.abs().sum() for mask in self.heads) + UNITS * sum(
            mask.abs().sum() for mask in self.units
        )
        return cast(Tensor, loss + PATCHES * sum(mask.tanh().abs().sum() for mask in self.positions))

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        masks = {"v": [mask.detach() for mask in self.heads], "mlp": [mask.detach() for mask in self.units]}
        scores = {kind: [mask - min(map(torch.min, of)) + 1e-6 for mask in of] for kind, of in masks.items()}
        counts = settle(self._wanted(masks), scores, self.config, self.budget, self.multiples, tied=True)
        blocks = block_plans(counts, scores, self.config, tied=True)
        return self._without_patches(blocks) if self.positions else Kept(blocks)

    def _wanted(self, masks: dict[str, list[Tensor]]) -> dict[str, list[float]]:
        """What the thresholds of the largest share leave that fits the budget, of dims for each head on average."""
        for step in range(SHARES, 0, -1):
            limits = {kind: threshold(of, step / SHARES) for kind, of in masks.items()}
            wanted = {
                kind: [float((mask >= limits[kind]).sum()) / (len(mask) if kind == "v" else 1) for mask in of]
                for kind, of in masks.items()
            }
            if float(self.budget.cost(self._aligned(wanted).amounts(self.config))) <= self.budget.share:
                break
        return wanted

    def _aligned(self, wanted: dict[str, list[float]]) -> Counts:
        counts = Counts.dense(self.config)
        for kind, as_kind in (("v", "v"), ("v", "qk"), ("mlp", "mlp")):
            for block, units in enumerate(full(self.config, as_kind)):
                near = nearest(wanted[kind][block], units, self.multiples, kind)
                counts = counts.with_one(as_kind, block, near)
        return counts

    def _without_patches(self, blocks: tuple[BlockPlan, ...]) -> Kept:
        """The plan with the patches that stay, and which they are."""
        limit = threshold([one.tanh() for one in self.positions], self.patches)
        kept = monotone([one.tanh() >= limit for one in self.positions])
        left, plans, weights = self.config.patches, [], {}
        for number, (block, of_block) in enumerate(zip(blocks, kept, strict=True)):
            count = max(1, int(of_block.sum()))
            plans.append(BlockPlan(block.heads, block.mlp, count if count < left else None, block.qk, block.v))
            left = count
            if plans[-1].patches is not None:
                weights[f"blocks.{number}.reducer.significance"] = (
                    of_block.float() + self.positions[number].sigmoid() / 2
                )
        return Kept(tuple(plans), "psvit" if weights else None, weights)
