"""What an importance criterion is: given one half of a block as plain tensors, it ranks the units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..model.vit import Block, LayerScale
from ..statistics import BlockPass, Half, Kind, out_layers


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
class DimsView:
    """The dims of all heads of one block: those of their values (``v``), or of queries and keys (``qk``).

    A dim of values is a column of ``proj``. A dim of queries and keys adds the term q_d k_d to a head's logits: its
    ``weight`` is the size of that term, |W_q,d| |W_k,d|, and its moments are those of the terms over their sizes, so
    that weight and moments of both kinds make the same squared error.

    Attributes:
        heads: of the block; each loses equally many dims.
        weight: [C, heads * dims], LayerScale folded in, or [1, heads * dims]; dims of a head side by side.
        levels: kept dims of a head at which factors of the queries are wanted; none for values.
        moments: [heads, dims, dims] of the inputs of each head's columns; for criteria that need it.
        gates: [M, heads * dims] gradient of the loss of each image at a gate of 1; for criteria that need it.
        number: of this kind within the model, as in ``LayerView``.
    """

    heads: int
    weight: Tensor
    levels: tuple[int, ...] = ()
    moments: Tensor | None = None
    gates: Tensor | None = None
    number: int = 0

    def by_head(self) -> list[LayerView]:
        """Each head's dims as the units of a layer of its own."""
        dims = self.weight.shape[1] // self.heads
        weights = self.weight.split(dims, dim=1)
        gates = [None] * self.heads if self.gates is None else self.gates.split(dims, dim=1)
        moments = [None] * self.heads if self.moments is None else self.moments
        return [
            LayerView(weight, 1, self.levels, moment, gate, self.number * self.heads + head)
            for head, (weight, moment, gate) in enumerate(zip(weights, moments, gates, strict=True))
        ]


@dataclass(frozen=True)
class Ranking:
    """In which order the units of one half go, and what that costs.

    Attributes:
        order: [units] units in order of removal.
        error: [units + 1] loss proxy after the removal of the first i units: 0 at first, never falling.
        weights: kept count -> compensated weight [C, kept * unit_size] of the kept columns, units ascending; empty
            for criteria that leave weights as they are.
        total: what an error of 1 stands for, so that errors of several rankings can be added.
    """

    order: Tensor
    error: Tensor
    weights: Mapping[int, Tensor] = field(default_factory=dict)
    total: float = 1.0

    @classmethod
    def from_scores(cls, scores: Tensor) -> Ranking:
        """The least important first; the error is the share of all importance that has been removed."""
        scores = scores.double()
        order = scores.argsort(stable=True)
        sums = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
        return cls(order, sums / sums[-1].clamp_min(torch.finfo(torch.float64).tiny), total=float(sums[-1]))

    def kept(self, count: int) -> tuple[int, ...]:
        """The ``count`` units that go last, ascending.

        Raises:
            InputError: there are not so many units.
        """
        if not 0 <= count <= len(self.order):
            raise InputError(f"cannot keep {count} units of {len(self.order)}")
        return tuple(sorted(self.order[len(self.order) - count :].tolist()))


@dataclass(frozen=True)
class DimRanking:
    """In which order the dims of a block's heads go, one of each head at a time, and what that costs.

    Attributes:
        order: [H, D] dims of each head in order of removal.
        error: [D + 1] loss proxy after the removal of the first i dims of every head, as in ``Ranking``.
        factors: kept count -> [H, kept] factors of the queries of the kept dims, ascending, with which the logits make
            up for the removed ones; empty for values, and for criteria that leave weights as they are.
        layer: of values, where the criterion makes up for removed columns: gives ``proj`` with the moments of what it
            reads, from which the weight for any set of kept heads and dims follows; else None.
    """

    order: Tensor
    error: Tensor
    factors: Mapping[int, Tensor] = field(default_factory=dict)
    layer: Callable[[], LayerView] | None = None

    @classmethod
    def of_heads(cls, heads: list[Ranking]) -> DimRanking:
        """The heads' own rankings side by side; errors are added, each head's by what it stands for."""
        totals = torch.tensor([max(head.total, 1e-300) for head in heads], dtype=torch.float64)
        shares = (totals / totals.sum()).unsqueeze(1)
        error = (torch.stack([head.error.cpu().double() for head in heads]) * shares).sum(0)
        factors = {count: torch.cat([head.weights[count] for head in heads]) for count in heads[0].weights}
        return cls(torch.stack([head.order.cpu() for head in heads]), error, factors)

    def kept(self, head: int, count: int) -> tuple[int, ...]:
        """The ``count`` dims of a head that go last, ascending. Raises as ``Ranking.kept``."""
        return Ranking(self.order[head], self.error).kept(count)


class Criterion(ABC):
    """An importance criterion for heads, their dims, and MLP units.

    Attributes:
        needs: what of ``LayerView`` must be there besides the weight.
        compensates: the units that stay make up for those that go.
    """

    needs: ClassVar[Literal["moments", "gates"] | None] = None
    compensates: ClassVar[bool] = False

    @abstractmethod
    def rank(self, layer: LayerView) -> Ranking:
        """The ranking of all units of ``layer``."""

    def rank_dims(self, dims: DimsView) -> DimRanking:
        """The ranking of the dims of a block's heads: each head's own, so that all lose equally many.

        Weights that ``rank`` makes up, [1, kept], are turned into factors of the dims' sizes.
        """
        heads = []
        for view in dims.by_head():
            ranking = self.rank(view)
            sizes = {count: view.weight[:, list(ranking.kept(count))] for count in ranking.weights}
            factors = {n: weight / sizes[n].clamp_min(1e-30) for n, weight in ranking.weights.items()}
            heads.append(replace(ranking, weights=factors))
        return DimRanking.of_heads(heads)


def layer_scale(block: Block, half: Half) -> Tensor:
    """[C, 1]: the factor of each channel behind a half."""
    module = block.ls1 if half == "attn" else block.ls2
    if isinstance(module, LayerScale):
        return module.gamma.detach()[:, None]
    return out_layers(block)[half].weight.new_ones(1, 1)


def query_key_view(
    block: Block, step: BlockPass, gates: Mapping[Kind, Tensor], levels: tuple[int, ...] = (), number: int = 0
) -> DimsView:
    """The dims of queries and keys of a block with attention, from what ``statistics`` found about it with ``dims``."""
    attn = block.attn
    rows = attn.qkv.weight.detach().double()
    if attn.qkv.bias is not None:  # a key's bias adds the same to all logits of a query
        bias = attn.qkv.bias.detach().double().clone()
        bias[attn.sizes[0] :] = 0
        rows = torch.cat([rows, bias[:, None]], dim=1)
    norms = rows[: 2 * attn.sizes[0]].norm(dim=1)
    sizes = norms[: attn.sizes[0]] * norms[attn.sizes[0] :]
    moments = None
    if step.products is not None:
        by_head = sizes.unflatten(0, (attn.heads, -1)).to(step.products)
        moments = step.products / (by_head[:, :, None] * by_head[:, None]).clamp_min(1e-30)
    return DimsView(attn.heads, sizes[None].to(attn.qkv.weight), levels, moments, gates.get("qk"), number)


def value_view(block: Block, step: BlockPass, gates: Mapping[Kind, Tensor], number: int = 0) -> DimsView:
    """The dims of values of a block with attention, from what ``statistics`` found about it."""
    attn = block.attn
    moments = None
    if "attn" in step.moments:
        sizes = (attn.heads, attn.v_dim)
        moments = step.moments["attn"].unflatten(0, sizes).unflatten(2, sizes).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weight = attn.proj.weight.detach() * layer_scale(block, "attn")
    return DimsView(attn.heads, weight, (), moments, gates.get("v"), number)


def required(value: Tensor | None, criterion: str, name: str) -> Tensor:
    """``value``, which must be there.

    Raises:
        InputError: it is None.
    """
    if value is None:
        raise InputError(f"the criterion {criterion} needs the layer's {name}, got none")
    return value
