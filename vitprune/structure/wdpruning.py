"""WDPruning: learned saliencies say which units stay, a learned threshold for each layer how many, and the tail is cut.

Yu, Huang, Wang et al., Width & Depth Pruning for Vision Transformers, AAAI 2022,
https://ojs.aaai.org/index.php/AAAI/article/view/20222. Gates are on heads, MLP units and, where the budget counts
parameters, on the channels that ``proj`` and ``fc2`` write; classifiers behind some blocks learn beside the model, so
that the blocks behind one of them can be cut off.
Differs from the authors' code, in which the optimiser's group for the saliencies stays empty because it looks for
another name: here, as in the paper, they have a learning rate of their own and no decay (0.025, of the paper; the code
has 0.0025). In a short training it is raised so far that thresholds can cross their range. Multiples of 16 for MLP
units and written channels are those of the code unless others are told; heads are counted one by one. The share that is
kept is computed from the model's own shapes, where the code has DeiT-B's; blocks that are to be cut count as gone, in
the paper they come on top. The further classifiers are copies of the model's own norm and head at first, not random
ones, and read what these read: class token, both tokens of a distilled model, or the mean. The rows of channels that
are not written become zeros, which is exact and saves no time: as an index into the residual stream they would be
copied about.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from ..model.state import TokenState
from ..model.vit import Block, Vit
from ..tokens.base import Recipe
from ._gates import BlockGates, with_weights
from ._lagrangian import Lagrangian
from ._settle import block_plans, settle
from .base import MULTIPLES, Amounts, Budget, Group, Kept, Multiples, StructureMethod, Target, parameters

THETA = 10.0  # of all thresholds at first: sigmoid(10) of the units stay, which is all of them
WRITES = 16  # kept channels of a half's output are a multiple of it
PARTS = ("heads", "mlp", "attn_out", "mlp_out")
CLASSIFIER = ("norm.", "head.", "head_dist.")  # names of the model's weights behind the last block


def kept_count(theta: float, units: int, multiple: int) -> int:
    """``ceil(sigmoid(theta) * units)``; the nearest multiple, or the larger of two, if ``multiple`` divides it."""
    count = math.ceil(units / (1 + math.exp(min(-theta, 700.0))))  # beyond, exp overflows
    if units % multiple == 0:
        count = max(multiple, (2 * count + multiple) // (2 * multiple) * multiple)
    return min(max(1, count), units)


class _TopMask(torch.autograd.Function):
    """1 for the units of the highest scores, as many as the threshold says.

    Straight through: each score gets its unit's gradient, and the threshold the sum of those that are kept, without the
    derivative of the sigmoid.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor, multiple: int) -> Tensor:
        order = scores.argsort(descending=True, stable=True)
        mask = torch.zeros_like(scores)
        mask[order[: kept_count(float(theta), len(scores), multiple)]] = 1
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grads[0], (grads[0] * mask).sum(), None


class WDPruning(StructureMethod):
    """Args: ``blocks``: so many are left, and one of the further classifiers stands behind them; None: all are."""

    recipe = Recipe(lr=5e-4, last_lr=0.02, weight_decay=0.05)
    own_cost = "params"
    published_lr: ClassVar[float] = 0.025

    def __init__(
        self,
        model: Vit,
        budget: Budget,
        multiples: Multiples = MULTIPLES,
        steps: int = 1,
        *,
        blocks: int | None = None,
    ) -> None:
        super().__init__(model, budget, multiples, steps)
        depth = len(model.config.blocks)
        if blocks is not None and not (1 <= blocks <= depth and model.config.classes):
            raise InputError(f"wdpruning can leave 1 to {depth} blocks of a model with a classifier, not {blocks}")
        self.blocks = depth if blocks is None else blocks
        sizes = {"heads": [b.heads for b in model.config.blocks], "mlp": [b.mlp for b in model.config.blocks]}
        if budget.writes:
            sizes |= dict.fromkeys(("attn_out", "mlp_out"), [model.config.dim] * depth)
        self.scores, self.thresholds = nn.ModuleDict(), nn.ModuleDict()
        for part, counts in sizes.items():
            self.scores[part] = parameters(torch.zeros(count) for count in counts)
            self.thresholds[part] = parameters(torch.tensor(THETA) for _ in counts)
        self.units = (
            "fc2" if model.config.activation == "sigmoid" and not model.config.gated else "fc1"
        )  # sigmoid(0) > 0
        self.lagrangian = Lagrangian()
        places = {depth - 2, depth - 1, self.blocks} if model.config.classes else set()
        self.places = sorted(place for place in places if 0 < place < depth)
        own = {name: value for name, value in model.named_parameters() if name.startswith(CLASSIFIER)}
        self.names = list(own)
        self.classifiers = nn.ModuleList(parameters(v.detach().clone() for v in own.values()) for _ in self.places)
        self._leaving: dict[int, TokenState] = {}

    def attach(self, model: Vit) -> list[RemovableHandle]:
        def keep(place: int) -> Any:
            def hook(_: nn.Module, given: Any, state: TokenState) -> None:
                if self.training:
                    self._leaving[place] = state

            return hook

        return [model.blocks[place - 1].register_forward_hook(keep(place)) for place in self.places]

    @property
    def identity(self) -> str:
        return f"{super().identity} {self.blocks}"

    def groups(self) -> list[Group]:
        lr = self.lr_at_least(self.published_lr, 0.8 * THETA)
        groups = [Group([*self.scores.parameters(), *self.thresholds.parameters()], lr), self.lagrangian.group()]
        return [*groups, Group(list(self.classifiers.parameters()))] if self.places else groups

    def gates(self) -> list[BlockGates]:
        found: list[BlockGates] = []
        for number, block in enumerate(self.config.blocks):
            head = self._mask("heads", number)[:, None]
            gates = {"q": head.expand(-1, block.qk_dim), "v": head.expand(-1, block.v_dim)}
            gates |= {"k": gates["q"], self.units: self._mask("mlp", number)}
            found.append(
                gates | {part: self._mask(part, number) for part in self.scores if part not in ("heads", "mlp")}
            )
        return found

    def amounts(self) -> Amounts:
        """What the thresholds leave, before it is rounded."""
        found = {
            name: value.to(self.lagrangian.lam1.device) for name, value in Amounts.dense(self.config)._asdict().items()
        }
        for part, of in self.thresholds.items():
            found[part] = (torch.stack(list(cast(Any, of))).sigmoid() * found[part]).clamp_min(1)
        found["runs"] = (torch.arange(len(found["runs"])) < self.blocks).to(found["runs"])
        return Amounts(**found)

    def penalty(self, model: Vit, target: Target) -> Tensor:
        loss = self.lagrangian(self.budget.cost(self.amounts()), self.budget.share)
        for place, classifier in zip(self.places, self.classifiers, strict=True):
            weights = dict(zip(self.names, cast(Any, classifier), strict=True))
            state = self._leaving.pop(place)
            loss = loss + target.loss(with_weights(model, weights, lambda state=state: model.classify(state)))  # type: ignore[misc]
        return loss

    @torch.no_grad()
    def finish(self, model: Vit) -> Kept:
        scores = {part: [s - s.min() + 1e-6 for s in cast(Any, self.scores[part])] for part in ("heads", "mlp")}
        wanted = {
            part: [kept_count(float(t), len(s), self._multiple(part)) for s, t in self._pairs(part)] for part in scores
        }
        for number in range(len(model.blocks)):
            self._close_writes(cast(Block, model.blocks[number]), number)
        if self.blocks < len(model.blocks):
            own, place = dict(model.named_parameters()), self.places.index(self.blocks)
            for name, value in zip(self.names, cast(Any, self.classifiers[place]), strict=True):
                own[name].copy_(value)
        runs = [number < self.blocks for number in range(len(model.blocks))]
        counts = settle(wanted, scores, self.config, self._after_writes(), self.multiples, runs=runs)
        return Kept(block_plans(counts, scores, self.config))

    def _after_writes(self) -> Budget:
        """The budget of heads and MLP units, when the channels that are written are settled."""
        if not self.budget.writes:
            return self.budget
        kept = {
            part: torch.tensor([float(kept_count(float(t), len(s), WRITES)) for s, t in self._pairs(part)])
            for part in ("attn_out", "mlp_out")
        }
        return self.budget._replace(cost=lambda amounts: self.budget.cost(amounts._replace(**kept)))

    def _close_writes(self, block: Block, number: int) -> None:
        """Zeros in the rows that write to channels which are not kept."""
        for part, layer in (("attn_out", block.attn.proj), ("mlp_out", block.mlp.fc2)):
            if part in self.scores:
                closed = self._mask(part, number) == 0
                layer.weight[closed] = 0
                if layer.bias is not None:
                    layer.bias[closed] = 0

    def _mask(self, part: str, number: int) -> Tensor:
        scores, theta = (cast(Any, of[part])[number] for of in (self.scores, self.thresholds))
        return cast(Tensor, _TopMask.apply(scores, theta, self._multiple(part)))

    def _multiple(self, part: str) -> int:
        return {"heads": self.multiples.heads, "mlp": self.multiples.mlp}.get(part, WRITES)

    def _pairs(self, part: str) -> Any:
        return list(zip(cast(Any, self.scores[part]), cast(Any, self.thresholds[part]), strict=True))
