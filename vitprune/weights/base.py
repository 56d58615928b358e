"""What a weight-saliency method is: given linear layers as plain tensors, it says which weights go and what is left.

A method sees layers one after the other and may ask for all of them again (``Layers``), so that no more than the
statistics of one block need be held. Masks are True where a weight stays.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

Needs = Literal["moments", "gradients", "curvature"]
Scope = Literal["uniform", "global"]

FEWEST_SAMPLES = 8  # below, statistics are little but their damping
LEAST_DENSITY = 0.02  # of a layer, where layers compete: global thresholds empty layers of Vision Transformers


@dataclass(frozen=True)
class Pattern:
    """Which weights of a row may go together.

    Attributes:
        group: consecutive weights of a row that go together; 1: each by itself.
        kept, of: of each ``of`` consecutive weights of a row, ``kept`` stay; 0, 0: no such rule.
    """

    group: int = 1
    kept: int = 0
    of: int = 0

    def __post_init__(self) -> None:
        if self.group < 1 or (self.of and (self.group > 1 or not 0 < self.kept < self.of)):
            raise InputError(f"a pattern is 'unstructured', 'block-4' or 'N:M' with 0 < N < M, got {self}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``unstructured``, ``block-4`` or ``2:4``, with any other numbers.

        Raises:
            InputError: it is none of these.
        """
        if text == "unstructured":
            return cls()
        if found := re.fullmatch(r"block-([1-9]\d*)", text):
            return cls(group=int(found[1]))
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            if not 0 < int(found[1]) < int(found[2]):
                raise InputError(f"the pattern {text!r} keeps {found[1]} of {found[2]} weights; N:M wants 0 < N < M")
            return cls(kept=int(found[1]), of=int(found[2]))
        raise InputError(f"there is no pattern {text!r}; it is 'unstructured', 'block-4' or 'N:M' as in '2:4'")

    def __str__(self) -> str:
        if self.of:
            return f"{self.kept}:{self.of}"
        return f"block-{self.group}" if self.group > 1 else "unstructured"

    @property
    def span(self) -> int:
        """Consecutive weights that the pattern speaks of; they divide a row."""
        return self.of or self.group

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern itself asks for; None: any."""
        return 1 - self.kept / self.of if self.of else None

    def check(self, name: str, weight: Tensor) -> None:
        """Whether the layer ``name`` with ``weight`` [out, in] can have the pattern.

        Raises:
            InputError: the pattern does not divide its rows.
        """
        if weight.shape[1] % self.span:
            raise InputError(
                f"{name} reads {weight.shape[1]} values, which the pattern {self} does not divide; leave the layer "
                f"out, or prune its width to a multiple of {self.span}"
            )

    def holds(self, mask: Tensor) -> bool:
        """Whether ``mask`` [out, in], True where a weight stays, keeps to the pattern."""
        if mask.shape[1] % self.span:
            return False
        counts = mask.unflatten(1, (-1, self.span)).sum(-1)
        return bool((counts <= self.kept).all() if self.of else ((counts == 0) | (counts == self.group)).all())


class Read(NamedTuple):
    """What rows of a Linear read of each image, and the gradient of the image's loss at what they wrote."""

    rows: slice
    inputs: Tensor  # [M, T, in]
    slopes: Tensor  # [M, T, rows]


@dataclass(frozen=True)
class LayerView:
    """A Linear, and what is known of it.

    Attributes:
        name: in the model, as ``blocks.3.mlp.fc1``.
        weight: [out, in].
        alive: [out, in], True where a weight may stay; the others have been removed before and are 0.
        moments: [in, in] mean of x x^T over what it read, fp64; for methods that need it.
        reads: its inputs and slopes; for methods that need gradients.
        curvature: [out, in] diagonal of the Hessian of the loss; for methods that need it.
    """

    name: str
    weight: Tensor
    alive: Tensor
    moments: Tensor | None = None
    reads: tuple[Read, ...] = ()
    curvature: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether all of its weights have been removed before, so that its statistics say nothing."""
        return not bool(self.alive.any())

    def gradients(self, rows: slice, batch: int = 1) -> Tensor:
        """Gradients of the loss of ``rows``, [m, rows, in], 0 for weights that have been removed.

        ``batch``: each is the mean over so many images; images that fill no batch are left out.
        """
        whole = self.weight.new_zeros(0)
        for read in self.reads:
            first, last = max(rows.start, read.rows.start), min(rows.stop, read.rows.stop)
            if first >= last:
                continue
            m = len(read.inputs) // batch
            x, dy = (part[: m * batch].unflatten(0, (m, batch)).flatten(1, 2) for part in read[1:])
            part = torch.bmm(dy[..., first - read.rows.start : last - read.rows.start].transpose(1, 2), x).div_(batch)
            if (first, last) == (rows.start, rows.stop) and not whole.numel():
                whole = part
                continue
            whole = whole if whole.numel() else x.new_zeros(m, rows.stop - rows.start, x.shape[-1])
            whole[:, first - rows.start : last - rows.start] += part
        alive = self.alive[rows]
        return whole if bool(alive.all()) else whole.mul_(alive)


Layers = Iterable[LayerView]  # as often as asked, each time the same


class Pruned(NamedTuple):
    """What is left of a layer."""

    name: str
    mask: Tensor  # [out, in], True where a weight stays
    weight: Tensor  # [out, in], 0 where the mask is False


class WeightMethod(ABC):
    """A weight-saliency method.

    Attributes:
        needs: what of ``LayerView`` must be there besides the weight.
        recompute: in how many steps one pruning is made by default, with new statistics for each.
        passes: what a step that prunes the MLPs takes, in forward passes of its images: about, for estimates of time.
    """

    needs: ClassVar[Needs | None] = None
    recompute: ClassVar[int] = 1
    passes: ClassVar[float] = 15

    @abstractmethod
    def prune(self, layers: Layers, pattern: Pattern, sparsity: float) -> Iterator[Pruned]:
        """What is left of each of ``layers``, in their order.

        Args:
            pattern: divides the rows of all layers.
            sparsity: share of zeros in all layers together, those counted that were removed before; in [0, 1), and
                the pattern's own where it has one.

        Raises:
            InputError: the statistics are missing, singular or no numbers; the message names the layer.
        """

    def images_of(self, step: int, count: int) -> slice:
        """Which of ``count`` images are looked at in a ``step`` of several, the first of which is 0."""
        return slice(0, count)

    def samples(self, images: int) -> int:
        """How many samples for its statistics ``images`` give."""
        return images


@dataclass(frozen=True)
class Scoring(WeightMethod):
    """A method that scores every group of weights by itself, so that scores of several layers may be compared.

    Attributes:
        scope: 'uniform': each layer gets the same sparsity; 'global': one threshold for all layers.
    """

    scope: Scope = field(default="global", kw_only=True)

    @abstractmethod
    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        """What the loss of each group is worth, [out, in / group] in fp64; the least goes first."""

    def weights(self, layer: LayerView, mask: Tensor, pattern: Pattern) -> Tensor:
        """The weight of ``layer`` where ``mask`` is True, changed to make up for the rest if the method does that."""
        return layer.weight * mask

    def prune(self, layers: Layers, pattern: Pattern, sparsity: float) -> Iterator[Pruned]:
        if self.scope == "uniform" or pattern.of:
            for layer in layers:
                mask = masked(self._scores(layer, pattern), pattern, sparsity)
                yield self._pruned(layer, mask & layer.alive, pattern)
            return
        masks = compete({layer.name: self._scores(layer, pattern) for layer in layers}, pattern, sparsity)
        for layer in layers:
            yield self._pruned(layer, masks[layer.name] & layer.alive, pattern)

    def _scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        """The scores, checked; groups that have been removed go first."""
        alive = layer.alive.unflatten(1, (-1, pattern.group)).any(-1)
        if layer.empty:
            return torch.full(alive.shape, -math.inf, dtype=torch.float64, device=alive.device)
        return torch.where(alive, finite(self.scores(layer, pattern), layer.name), -math.inf)

    def _pruned(self, layer: LayerView, mask: Tensor, pattern: Pattern) -> Pruned:
        if not bool(mask.any()):
            return Pruned(layer.name, mask, torch.zeros_like(layer.weight))
        weight = finite(self.weights(layer, mask, pattern), layer.name)
        return Pruned(layer.name, mask, torch.where(mask, weight, 0).to(layer.weight))


def masked(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask [out, in] of a layer that keeps the best of ``scores`` [out, in / group]."""
    if pattern.of:
        best = scores.unflatten(1, (-1, pattern.of)).argsort(dim=-1, stable=True)[..., -pattern.kept :]
        mask = torch.zeros_like(scores, dtype=torch.bool).unflatten(1, (-1, pattern.of))
        return mask.scatter(-1, best, True).flatten(1)
    stay = ~smallest(scores.flatten(), round(sparsity * scores.numel()))
    return stay.view_as(scores).repeat_interleave(pattern.group, 1)


def compete(scores: dict[str, Tensor], pattern: Pattern, sparsity: float) -> dict[str, Tensor]:
    """The masks of layers that share one threshold, by name; each keeps ``LEAST_DENSITY`` of its weights.

    Groups whose score is -inf have been removed before: they are never kept for that.
    """
    least = min(LEAST_DENSITY, 1 - sparsity)
    spared = {}
    for name, one in scores.items():
        best = ~smallest(one.flatten(), one.numel() - math.ceil(least * one.numel()))
        spared[name] = one.flatten().masked_fill(best & (one.flatten() > -math.inf), math.inf)
    together = torch.cat(list(spared.values()))
    stay = ~smallest(together, round(sparsity * len(together)))
    split = stay.split([one.numel() for one in scores.values()])
    shaped = (part.view_as(one) for part, one in zip(split, scores.values(), strict=True))
    return {name: part.repeat_interleave(pattern.group, 1) for name, part in zip(scores, shaped, strict=True)}


def smallest(values: Tensor, count: int) -> Tensor:
    """True for exactly ``count`` of ``values`` [n], the smallest; of equal ones, the first."""
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    limit = values.kthvalue(count).values
    chosen = values < limit
    ties = (values == limit).nonzero().squeeze(1)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def finite(values: Tensor, name: str) -> Tensor:
    """``values``, all of which must be numbers.

    Raises:
        InputError: one is not.
    """
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            f"{name}: what its images say of the layer is no number (NaN or infinite); look for such values in the "
            "model and the images, or raise the damping"
        )
    return values


def required(value: Tensor | None, layer: LayerView, name: str) -> Tensor:
    """``value``, which must be there.

    Raises:
        InputError: it is None.
    """
    if value is None:
        raise InputError(f"{layer.name}: this method needs the layer's {name}, got none")
    return value


Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done
