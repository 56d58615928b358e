"""Zeros that stay zero while a model is trained, and that become more and more where a schedule says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError
from .model.vit import Vit
from .sparsify import Sparse, cubic


class Growth(NamedTuple):
    """How zeros become more during a training: in steps along a cubic, fast at first.

    Attributes:
        prune: the model with so large a share of zeros, weights that are 0 among them.
        sparsity: share of zeros at the end.
        steps: so often weights are removed, the first time after the first optimiser step.
        until: share of the training after which no more are; what is left of it trains with all zeros in place.
    """

    prune: Callable[[Vit, float], Sparse]
    sparsity: float
    steps: int = 8
    until: float = 0.7

    def due(self, done: float) -> int:
        """Removals that are due after a share ``done`` of the training."""
        return min(self.steps, 1 + int(done / self.until * (self.steps - 1) + 1e-9))

    def __str__(self) -> str:  # tells trainings apart
        return f"{self.sparsity} in {self.steps} steps until {self.until}"


class Zeros:
    """The zeros in the weights of some layers of a model, put back after each optimiser step.

    Args:
        model: is changed in place.
        layers: names of the layers; what is 0 in them now stays so.
        growth: None: there will be no more.

    Raises:
        InputError: the model has no such layer.

    Attributes:
        removals: how often weights were removed.
    """

    def __init__(self, model: Vit, layers: Iterable[str], growth: Growth | None = None) -> None:
        self.model, self.growth, self.removals = model, growth, 0
        known = dict(model.named_modules())
        self.layers: dict[str, nn.Linear] = {}
        for name in layers:
            layer = known.get(name)
            if not isinstance(layer, nn.Linear):
                raise InputError(f"zeros: the model has no linear layer {name}")
            self.layers[name] = layer
        self.masks: Mapping[str, Tensor] = {}
        self.note()

    def note(self) -> None:
        """What is 0 now stays so: to be told after weights were loaded or moved."""
        self.masks = {name: layer.weight.detach() != 0 for name, layer in self.layers.items()}

    def mask_gradients(self) -> None:
        """No step moves a weight that is to stay 0, nor is clipped for its sake."""
        for name, layer in self.layers.items():
            if layer.weight.grad is not None:
                layer.weight.grad.mul_(self.masks[name])

    @torch.no_grad()
    def hold(self, done: float) -> bool:
        """Put the zeros back after an optimiser step, and remove what is due; whether more was removed.

        ``done``: share of the training that is over.
        """
        for name, layer in self.layers.items():
            layer.weight.mul_(self.masks[name])
        growth = self.growth
        if growth is None or growth.due(done) <= self.removals:
            return False
        self.removals = growth.due(done)
        sparse = growth.prune(self.model, cubic(0.0, growth.sparsity, self.removals / growth.steps))
        self.model.load_state_dict(sparse.model.state_dict())
        self.note()
        return True
