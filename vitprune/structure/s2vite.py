"""S2ViTE: a random part of the heads and MLP units trains; now and then the weakest die, and others grow instead.

Chen, Cheng, Gan et al., Chasing Sparsity in Vision Transformers: An End-to-End Exploration, NeurIPS 2021,
https://arxiv.org/abs/2106.04533. Every block keeps the same share of its heads and of its units all the time.
Differs from the authors' code: it starts from the weights that the model has, where the authors train for 600 epochs
from scratch; the share is what fits the budget (theirs: 0.7 for DeiT-T, 0.5 for DeiT-S, 0.7 of the heads and 0.6 of the
units for DeiT-B), in the multiples that are told; units die and grow every 15,000 steps, or in a training of less than
1.5 million steps after each hundredth of it, which is the same share of theirs. Their token selector is left out. A
head that died still gives the bias of its values, since only weights are masked: at the end it is folded into that of
``proj``, so that cutting the head changes nothing.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import NotSupported
from ..model.config import VitConfig
from ..model.vit import Attention, Block, Mlp, Vit
from ..tokens.base import Recipe
from ._settle import block_plans, uniform
from .base import MULTIPLES, Budget, Kept, Mean, Moment, Multiples, StructureMethod, Target, drawn

EVERY, LONG = 15_000, 100  # steps between two changes, and changes in a whole training
T_END = 0.8  # share of the training after which nothing dies
MOST, LEAST = 0.5, 0.005  # share of what is active that dies, at first and at last
KINDS = ("heads", "mlp")
UNITS_SEED, HEADS_SEED = 1 << 20, 1 << 21  # numbers that no step has


def death_rate(done: float) -> float:
    """Share of the active units that die after a share ``done`` of the training."""
    return LEAST + (MOST - LEAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / T_END)))


def drop_and_grow(active: Tensor, strength: Tensor, promise: Tensor, rate: float) -> Tensor:
    """The units [n] that are active next: ``ceil(rate * active)`` of the least strength die, as many grow.

    Those grow that promise most of all that are not active then, the dead among them.
    """
    count = math.ceil(rate * int(active.sum()))
    dying = strength.masked_fill(~active, math.inf).argsort(stable=True)[:count]
    left = active.clone()
    left[dying] = False
    growing = promise.masked_fill(left, -math.inf).argsort(descending=True, stable=True)[:count]
    left[growing] = True
    return left


class S2ViTE(StructureMethod):
    """Masks are on weights alone, biases and ``proj`` stay."""

    recipe = Recipe(lr=5e-4, warmup=5 / 600, last_lr=0.02, weight_decay=0.05)

    def __init__(self, model: Vit, budget: Budget, multiples: Multiples = MULTIPLES, steps: int = 1) -> None:
        super().__init__(model, budget, multiples, steps)
        self.every = max(1, min(EVERY, steps // LONG))
        self.counts = uniform(model.config, budget, multiples, KINDS, tied=False)
        for number, block in enumerate(model.config.blocks):
            self._start(f"heads{number}", block.heads, self.counts.heads[number], HEADS_SEED + number)
            self._start(f"mlp{number}", block.mlp, self.counts.mlp[number], UNITS_SEED + number)
            self.register_buffer(f"strength{number}", torch.ones(block.heads))
        self._changing = False
        self._seen: dict[int, Tensor] = {}  # what the heads of a block give, [B, N, H V]

    @classmethod
    def check(cls, config: VitConfig, budget: Budget) -> None:
        super().check(config, budget)
        if config.qkv_bias and not config.proj_bias:
            raise NotSupported(
                "s2vite leaves the bias of dead heads' values to proj, and this model's proj has no bias"
            )

    def attach(self, model: Vit) -> list[RemovableHandle]:
        self._close(model)

        def watch(number: int) -> Any:
            def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                if self.training and self._changing:
                    given[0].retain_grad()
                    self._seen[number] = given[0]

            return hook

        return [
            cast(Block, block).attn.proj.register_forward_pre_hook(watch(number))
            for number, block in enumerate(model.blocks)
        ]

    def begin(self, moment: Moment, target: Target) -> None:
        self._changing = (moment.step + 1) % self.every == 0 and moment.done < T_END

    @torch.no_grad()
    def after_step(self, model: Vit, moment: Moment, mean: Mean) -> None:
        if self._changing:
            rate = death_rate(moment.done)
            for number, block in enumerate(model.blocks):
                strength, promise = head_scores(self._seen.pop(number), cast(Block, block).attn.heads)
                self._of(f"strength{number}").copy_(mean(strength))
                self._change(f"heads{number}", self._of(f"strength{number}"), mean(promise), rate)
                self._change(f"mlp{number}", *unit_scores(cast(Block, block).mlp), rate)
        self._close(model)

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        self._close(model)
        for number, block in enumerate(model.blocks):
            fold_value_bias(cast(Block, block).attn, ~self._of(f"heads{number}"))
        counts = uniform(self.config, self.budget, self.multiples, KINDS, tied=False).no_more_than(self.counts)
        blocks = [cast(Block, block) for block in model.blocks]
        heads = [self._ranked(f"heads{number}", self._of(f"strength{number}")) for number in range(len(blocks))]
        units = [self._ranked(f"mlp{number}", weight_sums(block.mlp)) for number, block in enumerate(blocks)]
        return Kept(block_plans(counts, {"heads": heads, "mlp": units}, self.config))

    def _ranked(self, name: str, strength: Tensor) -> Tensor:
        """Scores of units of which those that are not active are the least, and then the weakest."""
        return self._of(name) * (1 + strength / strength.max().clamp_min(1e-30))

    def _of(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))

    def _start(self, name: str, units: int, count: int, seed: int) -> None:
        active = torch.zeros(units, dtype=torch.bool)
        active[drawn(seed, units).argsort()[:count]] = True
        self.register_buffer(name, active)

    def _change(self, name: str, strength: Tensor, promise: Tensor, rate: float) -> None:
        self._of(name).copy_(drop_and_grow(self._of(name), strength, promise, rate))

    @torch.no_grad()
    def _close(self, model: Vit) -> None:
        """Zeros in the weights of what is not active."""
        for number, block in enumerate(model.blocks):
            attn, mlp = cast(Block, block).attn, cast(Block, block).mlp
            heads, units = self._of(f"heads{number}"), self._of(f"mlp{number}")
            of_q, of_v = (heads.repeat_interleave(size) for size in (attn.qk_dim, attn.v_dim))
            attn.qkv.weight[~torch.cat([of_q, of_q, of_v])] = 0
            mlp.fc1.weight[~units.repeat(2 if mlp.gated else 1)] = 0
            mlp.fc2.weight[:, ~units] = 0


def head_scores(given: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of what the heads give, A [B, N, H V] with its gradient: means over the images of |sum A dA| and of sum |dA|."""
    assert given.grad is not None
    a, grad = (x.unflatten(-1, (heads, -1)).float() for x in (given, given.grad))
    return (a * grad).sum((1, 3)).abs().mean(0), grad.abs().sum((1, 3)).mean(0)


def unit_scores(mlp: Mlp) -> tuple[Tensor, Tensor]:
    """The absolute sums of each unit's weights, of ``fc1`` and of ``fc2``, and of their gradients."""
    return weight_sums(mlp), _sums(cast(Tensor, mlp.fc1.weight.grad), cast(Tensor, mlp.fc2.weight.grad))


def weight_sums(mlp: Mlp) -> Tensor:
    """The first of ``unit_scores``."""
    return _sums(mlp.fc1.weight, mlp.fc2.weight)


def _sums(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.abs().sum(1).unflatten(0, (-1, columns.shape[1])).sum(0) + columns.abs().sum(0)


@torch.no_grad()
def fold_value_bias(attn: Attention, dead: Tensor) -> None:
    """Put what the bias of the values of ``dead`` heads [H] adds to the tokens into the bias of ``proj``.

    Their weights are zeros: all keys and values are alike, whatever attention they give, it is the bias.
    """
    if attn.qkv.bias is None:
        return
    columns = dead.repeat_interleave(attn.v_dim)
    attn.proj.bias.add_(attn.proj.weight[:, columns] @ attn.qkv.bias[-attn.sizes[2] :][columns])
