"""What an importance criterion is: given one half of a block as plain tensors, it ranks the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import InputError

T = TypeVar("T")
Needs = Literal["moments", "gates", "activations", "influence"] | None


@dataclass(frozen=True)
class LayerView:
    """The Linear through which the units of one half write to the residual stream, and what is known of its inputs.

    Attributes:
        weight: [C, units * unit_size], LayerScale folded in; a unit is ``unit_size`` consecutive columns.
        unit_size: columns of a unit: the size of a head's values, or 1 for MLP units.
        levels: kept counts at which compensated weights are wanted.
        moments: [units * unit_size, the same] mean of x x^T over calibration tokens x; for criteria that need it.
        gates: [M, units] gradient of the loss of each image at a gate of 1; for criteria that need it.
        number: the half's number within the model, so that random choices differ between halves.
        kind: what the units are: ``attn``: heads, ``mlp``: hidden units.
        reads: [units, n] the weights that each unit reads with, biases left out.
        reading_gates: as ``gates``, of a gate on all weights and biases that a unit reads with; comes with them.
        labels: [M] the class that each image's loss was of; comes with ``gates``, None without a classifier.
        activations: [M, units * unit_size] mean of |x| over the tokens x of each image; for criteria that need it.
        influence: 1 - cosine of the tokens in front of the half's block and behind it; for criteria that need it.
    """

    weight: Tensor
    unit_size: int
    levels: tuple[int, ...] = ()
    moments: Tensor | None = None
    gates: Tensor | None = None
    number: int = 0
    kind: Literal["attn", "mlp"] = "mlp"
    reads: Tensor | None = None
    reading_gates: Tensor | None = None
    labels: Tensor | None = None
    activations: Tensor | None = None
    influence: float | None = None

    @property
    def units(self) -> int:
        """Heads or hidden units."""
        return self.weight.shape[1] // self.unit_size


@dataclass(frozen=True)
class Ranking:
    """In which order the units of one half go, and what that costs.

    Attributes:
        order: [units] units in order of removal.
        error: [units + 1] loss proxy after the removal of the first i units: 0 at first, never falling.
        weights: kept count -> compensated weight [C, kept * unit_size] of the kept columns, units ascending; empty
            for criteria that leave weights as they are.
        scores: [units] importance as the criterion counts it, to compare with that of other halves; None: it has none.
    """

    order: Tensor
    error: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None

    @classmethod
    def from_scores(cls, scores: Tensor) -> Ranking:
        """The least important first; the error is the share of all importance that has been removed."""
        scores = scores.double()
        order = scores.argsort(stable=True)
        sums = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
        return cls(order, sums / sums[-1].clamp_min(torch.finfo(torch.float64).tiny), scores=scores)

    def importances(self) -> list[float]:
        """Of each unit in order of removal: its score, or without scores by how much the error rises."""
        found = self.error.diff() if self.scores is None else self.scores[self.order]
        return [float(value) for value in found]

    def kept(self, count: int) -> tuple[int, ...]:
        """The ``count`` units that go last, ascending.

        Raises:
            InputError: there are not so many units.
        """
        if not 0 <= count <= len(self.order):
            raise InputError(f"cannot keep {count} units of {len(self.order)}")
        return tuple(sorted(self.order[len(self.order) - count :].tolist()))


class Criterion(ABC):
    """An importance criterion for heads and MLP units.

    Attributes:
        needs: what of ``LayerView`` must be there besides the weights.
        whole_blocks: it tells blocks apart, not the units of a half.
    """

    needs: ClassVar[Needs] = None
    whole_blocks: ClassVar[bool] = False

    @abstractmethod
    def rank(self, layer: LayerView) -> Ranking:
        """The ranking of all units of ``layer``."""

    def cross_terms(self, gates: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:  # noqa: ARG002
        """For each two kinds of units what removing all of both costs beyond their scores; {} where that is no matter.

        Args:
            gates: per block, as ``LayerView.gates`` of its halves by kind.
        """
        return {}


def required(value: T | None, criterion: str, name: str) -> T:
    """``value``, which must be there.

    Raises:
        InputError: it is None.
    """
    if value is None:
        raise InputError(f"the criterion {criterion} needs the layer's {name}, got none")
    return value


def batch_means(gates: Tensor, batch: int) -> Tensor:
    """``gates`` [M, units] of single images as [batches, units], the gradients of the mean loss of ``batch`` images.

    A last batch that is smaller is left out, unless there is no other.
    """
    whole = gates[: len(gates) // batch * batch] if len(gates) >= batch else gates
    return torch.stack([some.mean(0) for some in whole.double().split(batch)])
