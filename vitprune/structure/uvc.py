"""UVC: heads, MLP units, dims of values and whole blocks are dropped by one constrained problem, primal and dual.

Yu, Chen, Gan et al., Unified Visual Transformer Compression, ICLR 2022, https://arxiv.org/abs/2203.08243. For each
block the numbers s of heads and units to drop, for each head the number r of dims, and a gate that skips the block
learn beside the weights: groups that are to go shrink by a proximal step, as many as fit the multipliers y and p; the
multiplier z of the budget rises while it is missed.
Differs from the authors' code, where it is known to be wrong: the step size of z goes through 1, 5, 9, 13 and 17 in
equal parts of the training, as they set it (their scheduler looks for a key that nothing has, and it stays 1); the step
of the multiplier is clamped, not the gap to the budget, whose gradient vanishes in the code while the gap is above 0.5.
At the end dims of values are dropped equally many from each head of a block, since other numbers cannot be computed as
one product; each kind's gradient is clipped on its own. What drops from queries and keys are whole heads. In a training
of less than their 75,000 steps, s and r follow the gradient per share of the units instead of per unit, fast enough to
cross their range. Their gates on patches are left out: token methods are for that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.state import TokenState
from ..model.vit import Block, Vit
from ..tokens.base import Recipe
from ._settle import block_plans, settle
from .base import MULTIPLES, Amounts, Budget, Kept, Mean, Moment, Multiples, StructureMethod, Target, drawn

PUBLISHED_STEPS = 30 * 1_281_167 // 512
WARMUP = 5 / 30  # share of the training in which the gates of the blocks stand at a half
DROP_LR, Y_LR, Z_LRS = 0.02, 1e-4, (1.0, 5.0, 9.0, 13.0, 17.0)
MOST_GAP = 0.5  # of the budget, in a step of z
START = 1e-3  # of all multipliers
GATE_LR, GATE_MOMENTUM, GATE_DECAY, GATE_WEIGHT, GATE_EVERY = 0.1, 0.9, 1e-4, 5e-4, 50
TEMPERATURE = 0.5  # of the Gumbel softmax
KINDS = ("heads", "mlp", "v")


def shrink(lr: float, multiplier: Tensor) -> Tensor:
    """The factor of a group's weights: the proximal step for ``multiplier`` times their squared length."""
    return 1 / (1 + 2 * lr * multiplier)


def drop_gradient(scores: Tensor, drop: Tensor, multiplier: Tensor) -> Tensor:
    """Of ``multiplier`` times the least ceil(drop) of ``scores`` [..., n]: it times the next score; drop [...]."""
    place = drop.ceil().long().clamp_max(scores.shape[-1] - 1)
    return multiplier * scores.sort(dim=-1).values.gather(-1, place[..., None])[..., 0]


def least(scores: Tensor, drop: Tensor) -> Tensor:
    """True for the ceil(drop) [...] least of ``scores`` [..., n]."""
    rank = scores.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return rank < drop.ceil()[..., None]


def ascended(multiplier: Tensor, lr: float, by: Tensor) -> Tensor:
    """A dual variable after a step upwards; never negative."""
    return (multiplier + lr * by).clamp_min(0)


def z_lr(done: float) -> float:
    """Step size of the budget's multiplier after a share ``done`` of the training."""
    return Z_LRS[min(int(done * len(Z_LRS)), len(Z_LRS) - 1)]


class UVC(StructureMethod):
    """``drop_heads`` and ``drop_mlp`` [L] are s, ``drop_v`` [L, H] is r, ``logits`` [L, 2] the gates: skip and run."""

    recipe = Recipe(labels=0.9, answers=0.1, lr=1e-4, last_lr=0.01, weight_decay=0.05)

    def __init__(self, model: Vit, budget: Budget, multiples: Multiples = MULTIPLES, steps: int = 1) -> None:
        super().__init__(model, budget, multiples, steps)
        blocks = model.config.blocks
        self.kinds = KINDS if budget.dims else KINDS[:2]
        self.sizes = {
            "heads": [b.heads for b in blocks],
            "mlp": [b.mlp for b in blocks],
            "v": [b.v_dim for b in blocks],
        }
        heads = max(self.sizes["heads"])
        for kind in KINDS:
            shape = (len(blocks), heads) if kind == "v" else (len(blocks),)
            self.register_buffer(f"drop_{kind}", torch.zeros(shape))
            self.register_buffer(f"y_{kind}", torch.full(shape, START))
        self.register_buffer("z", torch.tensor(START))
        self.logits = nn.Parameter(torch.tensor([[-1.0, 1.0]] * len(blocks)))
        self.register_buffer("gate_gradient", torch.zeros(len(blocks), 2))
        self.register_buffer("velocity", torch.zeros(len(blocks), 2))
        self.gate_every = max(1, min(GATE_EVERY, steps // 100))
        self._moment: Moment | None = None

    def begin(self, moment: Moment, target: Target) -> None:
        self._moment = moment

    def attach(self, model: Vit) -> list[RemovableHandle]:
        def gate(number: int) -> Any:
            def hook(_: nn.Module, given: tuple[TokenState], state: TokenState) -> TokenState:
                run = self.run_share()[number].to(state.x)
                return state._replace(x=given[0].x + run * (state.x - given[0].x))

            return hook

        return [block.register_forward_hook(gate(number)) for number, block in enumerate(model.blocks)]

    def run_share(self) -> Tensor:
        """How much of what each block does is added to its input, [L]."""
        if not self.training or self._moment is None:
            return (self.logits[:, 1] > self.logits[:, 0]).float()
        if self._moment.done < WARMUP:
            return torch.full_like(self.logits[:, 1], 0.5)
        noise = -(-drawn(self._moment.step, *self.logits.shape, device=self.logits.device).log()).log()
        return ((self.logits + noise) / TEMPERATURE).softmax(1)[:, 1]

    def amounts(self, drops: dict[str, Tensor], logits: Tensor) -> Amounts:
        """What is left; the ceiling of what drops passes gradients straight through."""
        left = {name: value.to(logits) for name, value in Amounts.dense(self.config)._asdict().items()}
        for kind, drop in drops.items():
            whole = drop + (drop.ceil() - drop).detach()
            left[kind] = left[kind] - (self._mean_of_heads(whole) if kind == "v" else whole)
        left["runs"] = logits.softmax(1)[:, 1]
        return Amounts(**left)

    @torch.no_grad()
    def after_step(self, model: Vit, moment: Moment, mean: Mean) -> None:
        for number, block in enumerate(model.blocks):
            self._shrink(cast(Block, block), number, moment.lr)
        _, slopes, gate_slope = self._cost_gradients()
        scores = self._scores(model)
        for kind in self.kinds:
            self._move(kind, scores[kind], slopes[kind])
        self._move_gates(moment, gate_slope)
        for kind in self.kinds:
            for number, one in enumerate(scores[kind]):
                drop, y = (
                    buffer[number][..., : len(one)] if kind == "v" else buffer[number] for buffer in self._pair(kind)
                )
                y.copy_(ascended(y, Y_LR, (one * least(one, drop)).sum(-1)))
        z = cast(Tensor, self.z)
        gap = self._cost_gradients()[0] - self.budget.share
        z.copy_(ascended(z, z_lr(moment.done), gap.clamp(-MOST_GAP, MOST_GAP)))

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        runs = (self.logits[:, 1] > self.logits[:, 0]).tolist()
        left = self.amounts(self.drops(), self.logits)
        wanted = {kind: getattr(left, kind).tolist() for kind in self.kinds}
        scores = {kind: of for kind, of in self._scores(model).items() if kind in self.kinds}
        if not any(runs):
            runs[int((self.logits[:, 1] - self.logits[:, 0]).argmax())] = True
        counts = settle(wanted, scores, self.config, self.budget, self.multiples, runs=runs)
        return Kept(block_plans(counts, scores, self.config))

    def drops(self) -> dict[str, Tensor]:
        """What drops, by kind."""
        return {kind: self._pair(kind)[0] for kind in self.kinds}

    def _pair(self, kind: str) -> tuple[Tensor, Tensor]:
        """What drops of a kind, and its multipliers."""
        return cast(Tensor, getattr(self, f"drop_{kind}")), cast(Tensor, getattr(self, f"y_{kind}"))

    def _mean_of_heads(self, values: Tensor) -> Tensor:
        """[L] of [L, H], over the heads that a block has."""
        return torch.stack([row[:heads].mean() for row, heads in zip(values, self.sizes["heads"], strict=True)])

    def _scores(self, model: Vit) -> dict[str, list[Tensor]]:
        """Squared lengths of columns: of each head [H] and dim [H, V] in ``proj``, of each unit [M] in ``fc2``."""
        found: dict[str, list[Tensor]] = {"heads": [], "mlp": [], "v": []}
        for block in (cast(Block, one) for one in model.blocks):
            dims = block.attn.proj.weight.float().square().sum(0).unflatten(0, (block.attn.heads, -1))
            found["v"].append(dims)
            found["heads"].append(dims.sum(1))
            found["mlp"].append(block.mlp.fc2.weight.float().square().sum(0))
        return found

    def _shrink(self, block: Block, number: int, lr: float) -> None:
        """The proximal step on the weakest groups of a block: of heads and units, then of dims."""
        proj, fc2, heads = block.attn.proj.weight, block.mlp.fc2.weight, block.attn.heads
        columns = proj.view(len(proj), heads, -1)
        for kind in self.kinds:
            drop, y = (buffer[number] for buffer in self._pair(kind))
            if kind == "mlp":
                fc2[:, least(fc2.square().sum(0), drop)] *= shrink(lr, y)
            elif kind == "heads":
                columns[:, least(columns.square().sum((0, 2)), drop)] *= shrink(lr, y)
            else:
                weakest = least(columns.square().sum(0), drop[:heads])
                columns *= torch.where(weakest, shrink(lr, y[:heads])[:, None], 1.0)

    def _cost_gradients(self) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The cost, and its gradients at what drops and at the gates."""
        with torch.enable_grad():
            drops = {kind: drop.clone().requires_grad_() for kind, drop in self.drops().items()}
            logits = self.logits.detach().clone().requires_grad_()
            cost = self.budget.cost(self.amounts(drops, logits))
            slopes = torch.autograd.grad(cost, [*drops.values(), logits], allow_unused=True, materialize_grads=True)
        return cost.detach(), dict(zip(drops, slopes, strict=False)), slopes[-1]

    def _move(self, kind: str, scores: list[Tensor], slope: Tensor) -> None:
        """A step of what drops down the gradient, within what is there less one."""
        drop, y = self._pair(kind)
        z = cast(Tensor, self.z)
        short = self.steps < PUBLISHED_STEPS
        for number, (one, units) in enumerate(zip(scores, self.sizes[kind], strict=True)):
            place = (number, slice(self.sizes["heads"][number])) if kind == "v" else (number,)
            gradient = drop_gradient(one, drop[place], y[place]) + z * slope[place]
            slope[place] = gradient * (units if short else 1)
        slope = slope / slope.abs().max().clamp_min(1)
        for number, units in enumerate(self.sizes[kind]):
            lr = self.lr_at_least(DROP_LR, units) if short else DROP_LR
            drop[number] = (drop[number] - lr * slope[number]).clamp(0, units - 1)

    def _move_gates(self, moment: Moment, slope: Tensor) -> None:
        """A step of the gates by the mean of their gradients, now and then."""
        gathered, velocity = cast(Tensor, self.gate_gradient), cast(Tensor, self.velocity)
        if self.logits.grad is not None:
            gathered += self.logits.grad
            self.logits.grad = None
        if moment.done < WARMUP:
            gathered.zero_()
        elif (moment.step + 1) % self.gate_every == 0:
            gradient = gathered / self.gate_every + cast(Tensor, self.z) * GATE_WEIGHT * slope
            velocity.copy_(GATE_MOMENTUM * velocity + gradient + GATE_DECAY * self.logits)
            self.logits.sub_(GATE_LR * velocity)
            gathered.zero_()
