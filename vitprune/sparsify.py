"""Removes single weights of a model's linear layers, and lets the others make up for them. Shapes stay as they are."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import parts
from .errors import InputError
from .model.vit import Vit
from .weights._layers import Curvatures, Gradients, Moments, Plain, linears
from .weights.base import FEWEST_SAMPLES, Layers, Pattern, Progress, Pruned, WeightMethod

MLP = r"blocks\.\d+\.mlp\.fc[12]"
BLOCKS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"


class Sparse(NamedTuple):
    """A model with zeros.

    Attributes:
        model: of the same shapes as the one it was made of.
        masks: True where a weight stays, [out, in], by the layer's name.
    """

    model: Vit
    masks: Mapping[str, Tensor]

    @property
    def sparsity(self) -> float:
        """Share of zeros in the layers that were pruned."""
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / sum(m.numel() for m in self.masks.values())


def sparsify(
    model: Vit,
    images: Tensor | None,
    method: str | WeightMethod,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    *,
    layers: str | None = None,
    labels: Tensor | None = None,
    recompute: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sparse:
    """``model`` with weights removed, as a new model; the given one stays as it is. Weights that are 0 stay 0.

    Args:
        images: calibration images [M, C, H, W]; None for methods that need none.
        method: name of a file in ``vitprune/weights``, or a method with options of one's own.
        pattern: as ``Pattern.parse`` takes it.
        sparsity: share of zeros among the weights of all chosen layers, in [0, 1); may be left out with N:M.
        layers: regular expression for the names of the layers; by default the MLPs' for N:M, else all of the blocks.
        labels: classes of the images [M], where gradients are to be those of the training loss (the empirical
            Fisher); None: drawn from the model's own output.
        recompute: in how many steps, 1 or more, with new statistics for each; by default the method's.

    Raises:
        InputError: an argument is out of range, the pattern does not divide a layer's rows, or the statistics cannot
            be used.
    """
    if recompute is not None and recompute < 1:
        raise InputError(f"recompute is the number of steps, 1 or more, got {recompute}")
    thinner = Thinner(
        copy.deepcopy(model).eval(), images, method, pattern, sparsity, layers=layers, labels=labels, seed=seed
    )
    steps = 1 if thinner.pattern.of else recompute or thinner.method.recompute
    begin = thinner.zeros
    for step in range(steps):
        thinner.thin(geometric(begin, max(begin, thinner.sparsity), (step + 1) / steps), progress)
    return Sparse(thinner.model, thinner.masks())


class Thinner:
    """Removes weights of a model in place, once or again and again. The arguments are those of ``sparsify``.

    Attributes:
        chosen: the layers, by name.
    """

    def __init__(
        self,
        model: Vit,
        images: Tensor | None,
        method: str | WeightMethod,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
        *,
        layers: str | None = None,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(method, str):
            method = parts.load("vitprune.weights", method, WeightMethod)()  # type: ignore[type-abstract]
        self.model, self.method, self.images, self.seed = model, method, images, seed
        self.pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        self.sparsity = wanted_sparsity(self.pattern, sparsity)
        self.chosen = chosen_layers(model, self.pattern, layers)
        self.steps = 0
        _check_images(method, images, labels)
        self.labels = None if labels is None else _checked_labels(labels, model.config.classes)

    @property
    def zeros(self) -> float:
        """Share of zeros in the weights of the layers."""
        weights = [layer.weight for layer in self.chosen.values()]
        return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)

    def masks(self) -> dict[str, Tensor]:
        """True where a weight is not 0, [out, in], by the layer's name."""
        return {name: layer.weight.detach() != 0 for name, layer in self.chosen.items()}

    @torch.no_grad()
    def thin(self, sparsity: float, progress: Progress | None = None) -> None:
        """Make a share ``sparsity`` of the weights 0, with new statistics; the model is in eval mode.

        Whatever is raised meanwhile, the weights are then as they were.
        """
        before: dict[str, Tensor] = {}
        waiting: list[Pruned] = []
        try:
            for pruned in self.method.prune(self._layers(progress), self.pattern, sparsity):
                if self.method.needs == "moments":  # later layers shall read what is left in front of them
                    weight = self.chosen[pruned.name].weight
                    before[pruned.name] = weight.clone()
                    weight.copy_(pruned.weight)
                else:
                    waiting.append(pruned)
        except BaseException:
            for name, weight in before.items():
                self.chosen[name].weight.copy_(weight)
            raise
        for pruned in waiting:
            self.chosen[pruned.name].weight.copy_(pruned.weight)
        self.steps += 1

    def _layers(self, progress: Progress | None) -> Layers:
        if self.method.needs is None or self.images is None:
            return Plain(self.chosen)
        some = self.method.images_of(self.steps, len(self.images))
        images, labels = self.images[some], None if self.labels is None else self.labels[some]
        if self.method.needs == "moments":
            return Moments(self.model, self.chosen, images, progress)
        kind = Gradients if self.method.needs == "gradients" else Curvatures
        return kind(self.model, self.chosen, images, labels, self.seed + self.steps, progress)


def wanted_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The share of zeros that is asked for.

    Raises:
        InputError: it is outside of [0, 1), missing, or not the pattern's own.
    """
    own = pattern.sparsity
    if sparsity is None:
        if own is None:
            raise InputError(f"the pattern {pattern} needs a sparsity, a share of zeros from 0 to below 1")
        return own
    if not 0 <= sparsity < 1:
        raise InputError(f"the sparsity is a share of zeros from 0 to below 1, got {sparsity}")
    if own is not None and not math.isclose(sparsity, own):
        raise InputError(
            f"the pattern {pattern} makes a share of {own:g} zeros, not {sparsity}; leave the sparsity out"
        )
    return sparsity


def chosen_layers(model: Vit, pattern: Pattern, names: str | None) -> dict[str, nn.Linear]:
    """The layers of ``model`` whose names match, each of which can have the pattern.

    Raises:
        InputError: no name matches, or the pattern does not divide a layer's rows.
    """
    wanted = names or (MLP if pattern.of else BLOCKS)
    known = linears(model)
    try:
        chosen = {name: layer for name, layer in known.items() if re.fullmatch(wanted, name)}
    except re.error as error:
        raise InputError(f"layers: {wanted!r} is no regular expression: {error}") from error
    if not chosen:
        raise InputError(f"layers: no linear layer is named {wanted!r}; there are {', '.join(known)}")
    for name, layer in chosen.items():
        pattern.check(name, layer.weight)
    return chosen


def geometric(begin: float, end: float, done: float) -> float:
    """Sparsity after a share ``done`` of the way, the density falling by the same factor in each step."""
    return 1.0 if begin >= 1 else 1 - (1 - begin) * ((1 - end) / (1 - begin)) ** done


def cubic(begin: float, end: float, done: float) -> float:
    """Sparsity after a share ``done`` of the way, rising fast at first.

    Zhu and Gupta, To prune, or not to prune, 2017, https://arxiv.org/abs/1710.01878.
    """
    return end + (begin - end) * (1 - done) ** 3


def _check_images(method: WeightMethod, images: Tensor | None, labels: Tensor | None) -> None:
    if method.needs is None:
        return
    count = 0 if images is None else len(images)
    if count < FEWEST_SAMPLES:
        raise InputError(
            f"{type(method).__name__} takes {method.needs} of at least {FEWEST_SAMPLES} images, got {count}"
        )
    if method.samples(count) < FEWEST_SAMPLES:
        raise InputError(
            f"{method} takes at least {FEWEST_SAMPLES} {method.needs}, and {count} images give "
            f"{method.samples(count)}; give more images, or a smaller grad_batch"
        )
    if labels is not None and len(labels) != count:
        raise InputError(f"there are {count} calibration images and {len(labels)} labels")


def _checked_labels(labels: Tensor, classes: int) -> Tensor:
    """``labels`` as int64.

    Raises:
        InputError: they are no whole numbers, or one is no class of the model.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"labels are the numbers of classes, whole ones [M], got {labels.dtype} of shape {list(labels.shape)}"
        )
    wrong = labels[(labels < 0) | (labels >= classes)] if classes else labels[:0]
    if len(wrong):
        raise InputError(f"labels are classes from 0 to {classes - 1} of the model, got {int(wrong[0])}")
    return labels.long()
