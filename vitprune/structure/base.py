"""What a learned method is: gates on the units of a model, what it trains them by, and at the end a plan.

A method attaches gates to heads, dims of queries, keys and values, MLP units, rows of ``proj`` and ``fc2``, or whole
blocks. Gates multiply the very rows and columns of the weights that surgery cuts out (``_gates.py``), so that a mask
and a slice cannot drift apart. ``vitprune.recover`` trains the model and calls the hooks below; there is no other loop.
All that a method knows is in its parameters and buffers, and chance is drawn anew from the number of the step, alike
for every seed of a training: one that is resumed ends as one that was not interrupted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import InputError, NotSupported
from ..model.config import VitConfig
from ..model.vit import Vit
from ..plan import BlockPlan
from ..tokens.base import Recipe
from ._gates import BlockGates, gated_weights, with_weights

T = TypeVar("T")
Mean = Callable[[Tensor], Tensor]  # of a tensor over all processes that train


class Amounts(NamedTuple):
    """How much is left of each block, in units: tensors [L], through which a cost's gradient flows.

    Attributes:
        heads: attention heads.
        qk, v: dims of a head's queries and keys, and of its values.
        mlp: hidden units.
        attn_out, mlp_out: rows of ``proj`` and ``fc2``: channels that the halves write to.
        runs: 1 for a block that is computed, 0 for one that is left out.
    """

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor
    attn_out: Tensor
    mlp_out: Tensor
    runs: Tensor

    @classmethod
    def dense(cls, config: VitConfig) -> Amounts:
        """All of the model that ``config`` describes."""
        blocks = config.blocks
        counts = [[float(getattr(b, name)) for b in blocks] for name in ("heads", "qk_dim", "v_dim", "mlp")]
        heads, qk, v, mlp = (torch.tensor(values) for values in counts)
        return cls(heads, qk, v, mlp, *(torch.full_like(heads, value) for value in (config.dim, config.dim, 1.0)))


Cost = Callable[[Amounts], Tensor]  # what is left costs, as a share of what the dense model does


class Budget(NamedTuple):
    """What may be left.

    Attributes:
        cost: in which terms; ``vitprune.budgets`` has parameters, multiply-accumulates and measured latency.
        share: of the dense model's cost.
        unit: what it is told in.
        writes: the cost knows of channels that a half does not write to, so that methods which can may learn them. They
            save parameters and no time: the rows of ``proj`` and ``fc2`` become zeros.
        dims: the cost knows of the dims of heads.
    """

    cost: Cost
    share: float
    unit: str
    writes: bool = False
    dims: bool = True


class BelowLeast(InputError):
    """The budget is below what the least that may be left of each block costs.

    Attributes:
        least: that cost, as a share of the dense model's.
    """

    def __init__(self, budget: Budget, least: float) -> None:
        super().__init__(
            f"the budget is {budget.share:.1%} of the dense model's cost, and the least that may be left of each "
            f"block costs {least:.1%}; raise the budget, or lower the multiples"
        )
        self.least = least


class Multiples(NamedTuple):
    """What kept counts are multiples of; all of them is always a choice. Of a head at least ``least_head_dim`` stay."""

    heads: int = 1
    mlp: int = 16
    head_dim: int = 8
    least_head_dim: int = 1


MULTIPLES = Multiples()


class Target(NamedTuple):
    """What a batch should be answered with.

    Attributes:
        answers: the teacher's logits [B, classes], or features.
        labels: classes [B] or the weights of all [B, classes], where the training learns them.
    """

    answers: Tensor
    labels: Tensor | None = None

    def loss(self, answers: Tensor) -> Tensor:
        """Cross entropy of logits [B, classes] with the labels; without them, KL to the teacher's."""
        if self.labels is not None:
            return F.cross_entropy(answers.float(), self.labels)
        wanted = self.answers.float().log_softmax(-1)
        return F.kl_div(answers.float().log_softmax(-1), wanted, reduction="batchmean", log_target=True)

    def classes(self) -> Tensor:
        """Weights of the classes, [B, classes]; without labels, the teacher's first choice."""
        labels = self.answers.argmax(-1) if self.labels is None else self.labels
        return labels if labels.ndim > 1 else F.one_hot(labels, self.answers.shape[-1]).to(self.answers.dtype)


class Group(NamedTuple):
    """Parameters of a method that the optimiser trains, without weight decay.

    Attributes:
        lr: peak learning rate; it falls as that of the model's weights does. None: theirs.
        ascent: to make the loss large.
        begins: share of the training from which they learn; the learning rate falls from there.
    """

    parameters: Sequence[nn.Parameter]
    lr: float | None = None
    ascent: bool = False
    begins: float = 0.0


class Kept(NamedTuple):
    """What a method leaves.

    Attributes:
        blocks: of each block.
        reducer: the token method by which patches leave, where some do.
        method_weights: of that, by names in the model that it is pruned to.
    """

    blocks: tuple[BlockPlan, ...]
    reducer: str | None = None
    method_weights: Mapping[str, Tensor] = {}


class Moment(NamedTuple):
    """Where a training is.

    Attributes:
        step: optimiser steps made so far.
        done: share of the training that is over.
        lr: learning rate of the model's weights in this step.
    """

    step: int
    done: float
    lr: float


class StructureMethod(nn.Module, ABC):
    """A method that learns which units of ``model`` stay.

    Args:
        model: what is trained; only its shapes are read here.
        budget: what may be left.
        multiples: of kept counts.
        steps: optimiser steps of the training, by which step sizes are raised where it is shorter than the published.

    Attributes:
        recipe: how the authors train.
        own_cost: what the authors' budget counts.
        dims: dims of heads are pruned: of queries and keys, of values.
        labels: gates belong to classes: a model without a classifier cannot be trained so.
        straight: weights under closed gates learn as if these were open.
    """

    recipe: ClassVar[Recipe] = Recipe()
    own_cost: ClassVar[Literal["params", "macs"]] = "macs"
    dims: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[bool] = False
    straight: ClassVar[bool] = False

    def __init__(self, model: Vit, budget: Budget, multiples: Multiples = MULTIPLES, steps: int = 1) -> None:
        super().__init__()
        self.check(model.config, budget)
        self.config, self.budget, self.multiples, self.steps = model.config, budget, multiples, steps

    @classmethod
    def check(cls, config: VitConfig, budget: Budget) -> None:
        """Raise NotSupported where the method cannot prune such a model, or not in such terms."""
        name = cls.__module__.rpartition(".")[2]
        if config.reducer is not None or any(block.patches is not None for block in config.blocks):
            raise NotSupported(f"{name} prunes a model that keeps all of its tokens; prune first, then reduce tokens")
        if any(not block.heads or not block.mlp for block in config.blocks):
            raise NotSupported(
                f"{name} needs attention and MLP in each block, and some of this model's are gone already"
            )
        if config.attn_norm or config.mlp_norm:
            raise NotSupported(f"{name} prunes heads and hidden units, and this model normalises across them")
        if "qk" in cls.dims and config.qk_norm:
            raise NotSupported(f"{name} prunes dims of queries and keys, and this model normalises across them")
        if cls.labels and not config.classes:
            raise NotSupported(f"{name} learns gates for each class, and this model has no classifier")
        if cls.dims and not budget.dims:
            raise NotSupported(
                f"{name} prunes dims of heads, and the latency table has no times of smaller heads; measure it with "
                "head sizes, or give the budget in multiply-accumulates"
            )

    @property
    def identity(self) -> str:
        """What a checkpoint must have been made with, to be gone on from."""
        half = float(self.budget.cost(Amounts(*(part / 2 for part in Amounts.dense(self.config)))))  # tells costs apart
        budget = f"{self.budget.share} of {self.budget.unit}, {half:.9g}"
        return f"{type(self).__module__} {budget} {self.multiples} {self.steps}"

    # what the training loop calls, in this order

    def attach(self, model: Vit) -> list[RemovableHandle]:
        """Prepare ``model`` for the training; what comes back is removed when it is over."""
        return []

    def groups(self) -> list[Group]:
        """What the optimiser trains besides the model."""
        return []

    def begin(self, moment: Moment, target: Target) -> None:
        """A step begins."""

    def gates(self) -> Sequence[BlockGates]:
        """What the weights of each block are multiplied by; see ``_gates.py``."""
        return ()

    def penalty(self, model: Vit, target: Target) -> Tensor | None:
        """What is added to the loss, in the forward pass; None: nothing."""
        return None

    def after_backward(self, model: Vit) -> None:
        """All gradients are there."""

    def after_step(self, model: Vit, moment: Moment, mean: Mean) -> None:
        """The optimiser has moved the weights; gradients are still there."""

    @abstractmethod
    def finish(self, model: Vit) -> Kept:
        """What stays, within the budget; ``model`` gets the weights with which that equals the mask."""

    # the mechanism that all share

    def computed(self, model: Vit, compute: Callable[[], T]) -> T:
        """What ``compute`` returns while the weights of ``model`` are multiplied by the gates."""
        return with_weights(model, gated_weights(model, self.gates(), straight=self.straight), compute)

    def lr_at_least(self, published: float, travel: float, begins: float = 0.0) -> float:
        """The published learning rate, or as much as moves by ``travel`` within a third of a shorter training.

        ``begins``: of the part of it that is left then.
        """
        return max(published, 3 * travel / (self.steps * (1 - begins)))


def parameters(values: Iterable[Tensor]) -> nn.ParameterList:
    """``values`` as trained parameters."""
    return nn.ParameterList(nn.Parameter(value) for value in values)


def drawn(step: int, *shape: int, device: Any = None) -> Tensor:
    """Uniform numbers in (0, 1) that depend on the number of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.rand(*shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(device)
