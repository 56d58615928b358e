"""Weights removed while a model is trained: ``recover`` calls after each of its steps what stands here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from .errors import InputError
from .model.vit import Vit
from .sparsify import Thinner, chosen_layers, cubic, geometric
from .weights.base import Pattern, WeightMethod

PRUNINGS = 8  # in a training, unless it is told another number
RULES: dict[str, Callable[[float, float, float], float]] = {"cubic": cubic, "geometric": geometric}


class KeptZeros:
    """Weights of a student that are 0 when its training begins stay 0: recovery after ``sparsify``.

    Args:
        model: the student.
        layers: regular expression for the names of the layers; None: those of the blocks.
    """

    done = True

    def __init__(self, model: Vit, layers: str | None = None) -> None:
        self.chosen = chosen_layers(model, Pattern(), layers)
        self.masks = {name: layer.weight.detach() != 0 for name, layer in self.chosen.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.chosen)})"

    @torch.no_grad()
    def after_step(self, share: float) -> None:
        """Make the weights 0 again that an optimiser step has changed; ``share`` of the training is over."""
        for name, layer in self.chosen.items():
            layer.weight.mul_(self.masks[name].to(layer.weight))

    def state_dict(self) -> dict[str, Tensor]:
        """What an interrupted training needs to go on."""
        return {f"mask {name}": mask.cpu() for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.masks = {name: state[f"mask {name}"] for name in self.masks}


class Gradual(KeptZeros):
    """Weights go in several prunings while the student trains, and the training makes up for each.

    Args:
        model: the student, which is changed in place.
        images, method, pattern, sparsity, layers, labels, seed: as ``sparsify`` takes them.
        steps: prunings.
        end: share of the training after which the last of them is made; the first is made at once.
        rule: how the sparsity rises from pruning to pruning.

    Raises:
        InputError: as ``sparsify``, or the pruning in steps is not possible.
    """

    def __init__(
        self,
        model: Vit,
        images: Tensor | None,
        method: str | WeightMethod,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
        *,
        steps: int = PRUNINGS,
        end: float = 0.5,
        rule: Literal["cubic", "geometric"] = "cubic",
        layers: str | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        self.thinner = Thinner(model, images, method, pattern, sparsity, layers=layers, labels=labels, seed=seed)
        self.chosen, self.masks = self.thinner.chosen, self.thinner.masks()
        if steps < 1 or not 0 <= end <= 1 or rule not in RULES:
            raise InputError(
                f"gradual pruning takes 1 step or more, an end from 0 to 1 and one of {', '.join(RULES)}, "
                f"got {steps}, {end} and {rule!r}"
            )
        if steps > 1 and self.thinner.pattern.of:
            raise InputError(f"the pattern {self.thinner.pattern} is made in one step, got {steps}; set steps to 1")
        self.steps, self.end, self.rule, self.begin = steps, end, rule, self.thinner.zeros

    def __repr__(self) -> str:
        thinner = self.thinner
        what = f"{thinner.method}, {thinner.pattern}, {thinner.sparsity}, seed {thinner.seed}"
        return f"Gradual({', '.join(self.chosen)}, {what}, {self.steps} steps to {self.end} by {self.rule})"

    @property
    def done(self) -> bool:  # type: ignore[override]
        """Whether the student is as sparse as it is to be."""
        return self.thinner.steps >= self.steps

    def after_step(self, share: float) -> None:
        """Prune if a pruning is due after a ``share`` of the training, and keep zeros what they are."""
        super().after_step(share)
        due = self.steps if share >= self.end else 1 + int(share / self.end * (self.steps - 1) + 1e-9)
        if self.thinner.steps < due:
            self._prune(due)

    def _prune(self, due: int) -> None:
        """Go to the sparsity after ``due`` of the prunings, in one."""
        target = RULES[self.rule](self.begin, max(self.begin, self.thinner.sparsity), due / self.steps)
        trains = self.thinner.model.training
        self.thinner.model.eval()
        try:
            self.thinner.thin(target)
        finally:
            self.thinner.model.train(trains)
        self.thinner.steps, self.masks = due, self.thinner.masks()

    def state_dict(self) -> dict[str, Tensor]:
        """The masks, how many prunings were made, and the sparsity before them."""
        numbers = torch.tensor([self.thinner.steps, self.begin], dtype=torch.float64)
        return {**super().state_dict(), "numbers": numbers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""
        super().load_state_dict(state)
        self.thinner.steps, self.begin = int(state["numbers"][0]), float(state["numbers"][1])
