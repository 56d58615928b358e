"""The measuring behind a ``LossTable``: rankings and single changes of one model, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import parts
from ..criteria.base import (
    NO_GATES,
    Criterion,
    DimRanking,
    LayerView,
    Ranking,
    layer_scale,
    query_key_view,
    value_view,
)
from ..criteria.obs import made_up
from ..errors import InputError
from ..model.state import TokenState
from ..model.vit import Attention, Vit
from ..statistics import BlockPass, Gates, Half, Progress, blocks_of, by_unit, in_layers, out_layers, unit_sizes
from ..surgery import make_reducer, rows_of
from ..tokens.base import Reducer
from .counts import Sizes
from .probes import Probes, columns_kept, columns_of, counts_on_the_way, put_in, queries_kept, reducing, take
from .rankings import DIMS, Dim

Curve = dict[int, float]  # what is left -> loss


class Survey:
    """Goes through the blocks of one model; each must be ranked, then entered, before its curves are asked for.

    Args:
        method: name of the token method; None where tokens are not reduced.
        method_weights: of the token method, as ``surgery.prune`` takes them.
        widths: whether heads and hidden units are surveyed too, or tokens alone: progress counts what is to come.
    """

    def __init__(
        self,
        model: Vit,
        sizes: Sizes,
        method: str | None,
        progress: Progress | None,
        *,
        widths: bool,
        method_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.blocks, self.sizes = model, blocks_of(model), sizes
        self.method, self.method_weights, self.widths = method, method_weights, widths
        self.patches, self.progress, self.done = model.config.patches, progress, 0
        self.entering: dict[int, list[TokenState]] = {}  # tokens of the probes that enter recent blocks
        self.probes: Probes | None = None
        self.whole_routes: dict[tuple[int, int], float] = {}  # (block, level) -> loss of all applications on the way
        self.routes: dict[int, list[int]] = {}  # token level -> patch tokens after each application on the way to it
        if method is not None:
            kind = parts.load("vitprune.tokens", method, Reducer)  # type: ignore[type-abstract]
            self.routes = _routes(kind, self.patches, model.config.prefix, sizes.patches)
        self.steps = sum(self._steps(index) for index in range(len(self.blocks)))

    def rank(self, step: BlockPass, criterion: Criterion, gates: Gates | None) -> dict[Half, Ranking]:
        """The rankings of a block's halves, with weights as the block's Linears take them.

        Args:
            gates: what ``gate_gradients`` found for the model; None where the criterion needs none.

        Raises:
            InputError: the criterion tells whole blocks apart, and there are sizes between all and nothing.
        """
        block = self.blocks[step.number]
        found = {}
        for half in out_layers(block):
            view = self._view(step, half, gates)
            if criterion.whole_blocks and any(view.levels):
                raise InputError(
                    f"block {step.number}: this criterion ranks whole blocks, it cannot say which {max(view.levels)} "
                    f"of {view.units} {half} units to keep; allow all or none of them"
                )
            found[half] = _unscaled(criterion.rank(view), layer_scale(block, half))
            self._tell(f"block {step.number}: {half} ranked")
        return found

    def _view(self, step: BlockPass, half: Half, gates: Gates | None) -> LayerView:
        """What a criterion may know of one half of a block."""
        block = self.blocks[step.number]
        weight, size = out_layers(block)[half].weight.detach(), unit_sizes(block)[half]
        reads = by_unit(block, half, in_layers(block)[half].weight.detach().T)  # [C, units, rows of a unit]
        of_block = gates.blocks[step.number] if gates else NO_GATES
        return LayerView(
            weight=weight * layer_scale(block, half),
            unit_size=size,
            levels=tuple(self._levels(half, weight.shape[1] // size)),
            moments=step.moments.get(half),
            gates=of_block.writing.get(half),
            number=2 * step.number + (half == "mlp"),
            kind=half,
            reads=reads.transpose(0, 1).flatten(1),
            reading_gates=of_block.reading.get(half),
            labels=gates.labels if gates else None,
            activations=step.activations.get(half),
            influence=step.influence,
        )

    def rank_dims(self, step: BlockPass, criterion: Criterion, gates: Gates | None) -> dict[Dim, DimRanking]:
        """The rankings of the dims of a block's heads, of those that may go. Arguments as of ``rank``.

        Raises:
            InputError: the criterion does not rank dims.
        """
        if not criterion.ranks_dims:
            raise InputError("this criterion does not rank the dims of heads; let heads keep all of them")
        block = self.blocks[step.number]
        attn, found = block.attn, {}
        if attn is None:
            return {}
        for kind in DIMS:
            found[kind] = DimRanking.held(attn.heads, _dims_of(attn, kind))
        number = 2 * (len(self.blocks) + step.number)
        of_block, labels = (gates.blocks[step.number], gates.labels) if gates else (NO_GATES, None)
        if self._dims(step.number, "qk"):
            levels = tuple(self._dims(step.number, "qk"))
            found["qk"] = criterion.rank_dims(query_key_view(block, step, of_block, levels, number, labels))
            self._tell(f"block {step.number}: dims of queries and keys ranked")
        if self._dims(step.number, "v"):
            ranking = criterion.rank_dims(value_view(block, step, of_block, number + 1, labels))
            if criterion.compensates:
                layer = LayerView(attn.proj.weight.detach().clone(), 1, (), step.moments["attn"])
                ranking = replace(ranking, layer=lambda: layer)
            found["v"] = ranking
            self._tell(f"block {step.number}: dims of values ranked")
        return found

    def enter(self, step: BlockPass, probes: int) -> None:
        """Get ready to measure at a block that the images have just reached."""
        self.entering[step.number] = take(step.entering, probes)
        if self.probes is None:
            self.probes = Probes(self.model, self.entering[step.number])
        longest = max((len(counts) for counts in self.routes.values()), default=1)
        oldest = min([step.number, *self._able(step.number)[-longest:]])
        self.entering = {index: states for index, states in self.entering.items() if index >= oldest}

    def width_curve(self, index: int, half: Half, ranking: Ranking | None) -> Curve:
        """Loss over the sizes of one half of block ``index``; {0: 0.0} for a half that it lacks."""
        if ranking is None:
            return {0: 0.0}
        units = len(ranking.order)
        levels = self._levels(half, units)
        measured = {count: self._width_loss(index, half, ranking, count) for count in levels_to_measure(levels)}
        return {units: 0.0, **curve_through(ranking.error, levels, measured)}

    def dims_curve(self, index: int, kind: Dim, ranking: DimRanking | None) -> Curve:
        """Loss over the dims of all heads of block ``index``; {all: 0.0} where none may go, {} without a ranking."""
        if ranking is None:
            return {}
        dims, levels = ranking.order.shape[1], self._dims(index, kind)
        measured = {count: self._dims_loss(index, kind, ranking, count) for count in levels_to_measure(levels)}
        return {dims: 0.0, **curve_through(ranking.error, levels, measured)}

    def token_curve(self, index: int) -> Curve:
        """E_l(k) at block ``index``: what leaving k patch tokens there costs, and nowhere else; made monotone.

        A method that cannot leave so few in one application (ToMe: half of them) is also applied at the blocks right
        before, at as few of them as it takes, over levels, each doing as little as it may. What the last application
        adds to the loss is then added to E_l of the tokens that it got, so that the share of the earlier blocks is not
        charged to this one. A level that needs more blocks than there are is left out: no plan can reach it either.
        """
        curve, worst = {self.patches: 0.0}, 0.0
        for keep, counts in self.routes.items():
            blocks = self._able(index)[-len(counts) :]
            if not self._reaches(index, counts):
                continue
            route = dict(zip(blocks, counts, strict=True))
            with reducing(self.model, self._reducer, route):
                loss = self._loss(blocks[0], f"block {index}: {keep} of {self.patches} patches")
            self.whole_routes[index, keep] = loss
            if len(counts) > 1:
                loss = curve[counts[-2]] + max(0.0, loss - self.whole_routes[blocks[-2], counts[-2]])
            worst = max(worst, loss)
            curve[keep] = worst
        return curve

    def _reducer(self, index: int) -> Reducer:
        assert self.method is not None  # routes lead nowhere without one
        made = make_reducer(self.method, self.model.config, index, self.method_weights)
        return made.to(next(self.model.parameters()).device)

    def _width_loss(self, index: int, half: Half, ranking: Ranking, count: int) -> float:
        """Measured loss when one half keeps ``count`` units."""
        block, size = self.blocks[index], len(ranking.order)
        change = put_in(block, **{half: None})
        if count:
            columns = columns_of(ranking.kept(count), unit_sizes(block)[half])
            change = columns_kept(block, half, columns, ranking.weights.get(count))
        with change:
            return self._loss(index, f"block {index}: {count} of {size} {half} units")

    def _dims_loss(self, index: int, kind: Dim, ranking: DimRanking, count: int) -> float:
        """Measured loss when all heads keep ``count`` dims."""
        block = self.blocks[index]
        heads, size = range(block.attn.heads), _dims_of(block.attn, kind)
        rows = rows_of(heads, tuple(ranking.kept(head, count) for head in heads), size)
        if kind == "qk":
            factors = ranking.factors.get(count)
            change = queries_kept(block, rows, None if factors is None else factors.flatten())
        else:
            change = columns_kept(block, "attn", rows, made_up(ranking.layer(), rows) if ranking.layer else None)
        with change:
            return self._loss(index, f"block {index}: {count} of {size} {kind} dims")

    def _loss(self, first: int, what: str) -> float:
        """Measured loss of the model as it is now, run from block ``first`` on."""
        assert self.probes is not None  # a block is entered before it is measured
        loss = self.probes.loss(first, self.entering[first])
        self._tell(what)
        return loss

    def _able(self, index: int) -> list[int]:
        """The blocks up to ``index`` that can reduce tokens: one for the prefix alone has none left."""
        most = len(self.blocks) - (0 in self.sizes.patches)
        return [i for i in range(min(index + 1, most)) if self.blocks[i].attn is not None]

    def _reaches(self, index: int, counts: list[int]) -> bool:
        able = self._able(index)
        return len(able) >= len(counts) and able[-1] == index

    def _steps(self, index: int) -> int:
        """Steps of progress that block ``index`` takes."""
        block = self.blocks[index]
        halves = out_layers(block) if self.widths else {}
        units = {half: layer.in_features // unit_sizes(block)[half] for half, layer in halves.items()}
        widths = sum(1 + len(levels_to_measure(self._levels(half, n))) for half, n in units.items())
        dims = [self._dims(index, kind) for kind in DIMS] if self.widths else []
        widths += sum(1 + len(levels_to_measure(levels)) for levels in dims if levels)
        return widths + sum(self._reaches(index, counts) for counts in self.routes.values())

    def _levels(self, half: Half, units: int) -> list[int]:
        """The sizes of a half other than all of it; under a norm across its units, none or all are left."""
        config = self.model.config
        norm = config.attn_norm if half == "attn" else config.mlp_norm
        return [count for count in self.sizes.below(half, units) if not (norm and count)]

    def _dims(self, index: int, kind: Dim) -> list[int]:
        """The dims that each head of a block may keep, other than all; a norm over them holds all of them fast."""
        attn, config = self.blocks[index].attn, self.model.config
        if attn is None or (config.qk_norm if kind == "qk" else config.attn_norm):
            return []
        return [count for count in self.sizes.below(kind, _dims_of(attn, kind)) if count]

    def _tell(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps, what)


def _dims_of(attn: Attention, kind: Dim) -> int:
    """Dims that each head has."""
    return attn.qk_dim if kind == "qk" else attn.v_dim


def _routes(method: type[Reducer], patches: int, prefix: int, levels: Sequence[int]) -> dict[int, list[int]]:
    """Patch tokens after each application on the way to each of ``levels``, from the most on; {} without any."""
    wanted = sorted({keep for keep in levels if 0 < keep < patches}, reverse=True)
    ladder = [patches, *wanted]
    found = {keep: counts_on_the_way(lambda n, left: method.reaches(n, left, prefix), ladder, keep) for keep in wanted}
    return {keep: counts for keep, counts in found.items() if counts}


def levels_to_measure(levels: Sequence[int]) -> list[int]:
    """Which of the sizes ``levels`` (descending, without all) get a measured loss: middle, least, removed."""
    partial = [count for count in levels if count]
    chosen = {partial[len(partial) // 2], partial[-1]} if partial else set()
    return sorted(chosen | {0}.intersection(levels), reverse=True)


def curve_through(error: Tensor, levels: Sequence[int], measured: Mapping[int, float]) -> Curve:
    """Loss over ``levels`` (descending): piecewise linear in the ranking's error, through 0 and what was measured.

    Linear, since a small change of a layer's output moves the KL by its square. Never falls as less is left, for
    which a measured loss below that of a milder size is raised to it.

    Args:
        error: [units + 1] of a ``Ranking``.
        measured: kept units -> loss.
    """
    units = len(error) - 1
    points = sorted(measured, reverse=True)
    known = np.maximum.accumulate([0.0, *(float(error[units - count]) for count in points)])
    losses = np.maximum.accumulate([0.0, *(measured[count] for count in points)])
    exact = dict(zip(points, losses[1:].tolist(), strict=True))
    curve, worst = {}, 0.0
    for count in levels:
        worst = max(worst, exact.get(count, float(np.interp(float(error[units - count]), known, losses))))
        curve[count] = worst
    return curve


def _unscaled(ranking: Ranking, scale: Tensor) -> Ranking:
    """``ranking`` with weights that a LayerScale still follows; rows that it mutes are zero."""
    factor = torch.where(scale == 0, 0, 1 / scale)
    return replace(ranking, weights={count: weight * factor for count, weight in ranking.weights.items()})
