"""What an importance criterion is: given one half of a block as plain tensors, it ranks the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError


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
    """

    weight: Tensor
    unit_size: int
    levels: tuple[int, ...] = ()
    moments: Tensor | None = None
    gates: Tensor | None = None
    number: int = 0

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
    """

    order: Tensor
    error: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def from_scores(cls, scores: Tensor) -> Ranking:
        """The least important first; the error is the share of all importance that has been removed."""
        scores = scores.double()
        order = scores.argsort(stable=True)
        sums = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
        return cls(order, sums / sums[-1].clamp_min(torch.finfo(torch.float64).tiny))

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
        needs: what of ``LayerView`` must be there besides the weight.
    """

    needs: ClassVar[Literal["moments", "gates"] | None] = None

    @abstractmethod
    def rank(self, layer: LayerView) -> Ranking:
        """The ranking of all units of ``layer``."""


def required(value: Tensor | None, criterion: str, name: str) -> Tensor:
    """``value``, which must be there.

    Raises:
        InputError: it is None.
    """
    if value is None:
        raise InputError(f"the criterion {criterion} needs the layer's {name}, got none")
    return value
