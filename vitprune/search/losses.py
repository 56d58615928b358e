"""What each single change of a model costs, in one unit: nats of KL(dense || changed) per image.

For models without a classifier the unit is the mean cosine distance of the features instead.

Width: a criterion's ranking gives the shape of the curve over sizes; KLs measured at a few sizes and with the half
removed give its scale. Tokens: E_l(k), the KL when block l alone leaves k patch tokens, is measured at every level;
going from n to k costs max(0, E_l(k) - E_l(n)), so that keeping n costs nothing and a gradual schedule is not charged
twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import parts
from ..criteria.base import Criterion, DimRanking, Ranking
from ..errors import InputError, NotSupported
from ..model.vit import Vit
from ..statistics import Half, Progress, blocks_of, gate_gradients, stream_blocks
from ..surgery import check_method
from .counts import Sizes
from .evaluate import Evaluator, evaluate_counts
from .probes import cosine_distance, kl_to_dense
from .rankings import DIMS, Dim, Rankings, save_dim_ranking, save_index, save_ranking
from .survey import Curve, Survey

__all__ = [
    "Evaluator",
    "LossTable",
    "Rankings",
    "Sizes",
    "cosine_distance",
    "evaluate_counts",
    "kl_to_dense",
    "measure_losses",
    "with_token_method",
]


@dataclass(frozen=True)
class LossTable:
    """Losses of single changes, block by block.

    Attributes:
        heads, mlp: per block, kept units -> loss; all units -> 0, none (0) -> that of removing the half.
        tokens: per block, patch tokens left -> E_l(k); an empty dict where there is no token method. A level that no
            plan can reach at that block is missing.
        token_method: name of the token method.
        qk, v: per block, kept dims of its heads' queries and keys, and of their values -> loss; empty where all stay.
    """

    heads: list[Curve]
    mlp: list[Curve]
    tokens: list[Curve]
    token_method: str | None
    qk: list[Curve] = field(default_factory=list)
    v: list[Curve] = field(default_factory=list)

    def head_loss(self, block: int, kept: int) -> float:
        """Loss when ``block`` keeps ``kept`` heads.

        Raises:
            InputError: the count was not among the levels.
        """
        return _entry(self.heads, block, kept, "heads")

    def mlp_loss(self, block: int, kept: int) -> float:
        """Loss when ``block`` keeps ``kept`` hidden units.

        Raises:
            InputError: the count was not among the levels.
        """
        return _entry(self.mlp, block, kept, "hidden units")

    def token_loss(self, block: int, entering: int, leaving: int) -> float:
        """Loss when ``block`` turns ``entering`` patch tokens into ``leaving``; infinite where it cannot.

        Raises:
            InputError: ``entering`` was not among the levels.
        """
        if leaving == entering:
            return 0.0
        if leaving > entering or leaving not in self.tokens[block]:
            return float("inf")
        return max(0.0, self.tokens[block][leaving] - _entry(self.tokens, block, entering, "patch tokens"))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        names = [*_CURVES, *(name for name in DIMS if getattr(self, name))]
        curves = {name: [{str(k): v for k, v in curve.items()} for curve in getattr(self, name)] for name in names}
        return {**curves, "token_method": self.token_method}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LossTable:
        """The table that ``to_dict`` wrote.

        Raises:
            InputError: a key is missing or has another type.
        """
        try:
            given = {name: plain[name] for name in _CURVES} | {name: plain[name] for name in DIMS if name in plain}
            curves = {
                name: [{int(k): float(v) for k, v in curve.items()} for curve in found] for name, found in given.items()
            }
            return cls(**curves, token_method=plain["token_method"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is not a loss table: {type(error).__name__} {error}") from error


_CURVES = ("heads", "mlp", "tokens")


def measure_losses(
    model: Vit,
    images: Tensor,
    sizes: Sizes,
    *,
    criterion: str = "obs",
    token_method: str | None = None,
    method_weights: Mapping[str, Tensor] | None = None,
    probes: int = 64,
    progress: Progress | None = None,
    store: Path | None = None,
) -> tuple[LossTable, Rankings]:
    """The loss of every single change of ``model`` to one of ``sizes``, and the rankings behind them.

    Args:
        model: the dense model; changed and restored meanwhile.
        images: calibration images [M, channels, height, width].
        criterion: name of a file in ``vitprune/criteria``.
        token_method: name of a file in ``vitprune/tokens``.
        method_weights: of the token method, as ``surgery.prune`` takes them.
        probes: how many of the images the KLs are measured on.
        store: folder for the rankings and compensated weights; None keeps them in memory.

    Raises:
        NotSupported: the token method cannot act on this model.
    """
    kind: Any = Criterion  # an abstract class is no type[...] to mypy
    rank: Criterion = parts.load("vitprune.criteria", criterion, kind)()
    _check_token_method(model, token_method)
    dims = bool(sizes.qk or sizes.v)
    gates = gate_gradients(model, images, dims=dims, progress=progress) if rank.needs == "gates" else None
    survey = Survey(model, sizes, token_method, progress, widths=True, method_weights=method_weights)
    table = LossTable([], [], [], token_method)
    halves: dict[tuple[int, Half], Ranking] = {}
    ranked: dict[tuple[int, Dim], DimRanking] = {}
    for step in stream_blocks(model, images, moments=rank.needs == "moments", dims=dims):
        found = survey.rank(step, rank, gates[step.number] if gates else {})
        survey.enter(step, probes)
        table.heads.append(survey.width_curve(step.number, "attn", found.get("attn")))
        table.mlp.append(survey.width_curve(step.number, "mlp", found.get("mlp")))
        table.tokens.append(survey.token_curve(step.number) if token_method else {})
        for half, ranking in found.items():
            halves[step.number, half] = save_ranking(store, step.number, half, ranking) if store else ranking
        if dims:
            of_dims = survey.rank_dims(step, rank, gates[step.number] if gates else {})
            table.qk.append(survey.dims_curve(step.number, "qk", of_dims.get("qk")))
            table.v.append(survey.dims_curve(step.number, "v", of_dims.get("v")))
            for kind, found_dims in of_dims.items():
                ranked[step.number, kind] = (
                    save_dim_ranking(store, step.number, kind, found_dims) if store else found_dims
                )
    rankings = Rankings(halves, ranked)
    if store:
        save_index(store, rankings)
    return table, rankings


def with_token_method(
    table: LossTable,
    token_method: str,
    model: Vit,
    images: Tensor,
    sizes: Sizes,
    *,
    method_weights: Mapping[str, Tensor] | None = None,
    probes: int = 64,
    progress: Progress | None = None,
) -> LossTable:
    """``table``, with the losses of another token method: those of heads and hidden units are not measured again.

    Args:
        model, images, sizes, probes: as they were given to ``measure_losses`` for ``table``.
        method_weights: of the token method, as ``surgery.prune`` takes them.

    Raises:
        NotSupported: the token method cannot act on this model.
    """
    _check_token_method(model, token_method)
    survey = Survey(model, sizes, token_method, progress, widths=False, method_weights=method_weights)
    curves = []
    for step in stream_blocks(model, images[:probes], moments=False):
        survey.enter(step, probes)
        curves.append(survey.token_curve(step.number))
    return replace(table, tokens=curves, token_method=token_method)


def _check_token_method(model: Vit, name: str | None) -> None:
    """Raise NotSupported where the token method ``name`` cannot act on ``model``."""
    if name is None:
        return
    check_method(name, model.config)
    if any(block.keep is not None for block in blocks_of(model)):
        raise NotSupported(
            f"this model already reduces tokens with {model.config.reducer}; {name} needs one that does not"
        )


def _entry(curves: list[Curve], block: int, count: int, what: str) -> float:
    if count not in curves[block]:
        raise InputError(f"block {block} has no loss for {count} {what}; it has {', '.join(map(str, curves[block]))}")
    return curves[block][count]
