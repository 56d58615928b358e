"""What a learned method's budget is told in: parameters, multiply-accumulates, or measured milliseconds.

Each is the share of the dense model's, differentiable in what is left of each block, between whole numbers too.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .errors import InputError
from .macs import block_macs, macs
from .model.config import VitConfig
from .search.counts import Counts
from .search.latency import LatencyTable
from .structure.base import Amounts, Budget, StructureMethod


def params_budget(config: VitConfig, share: float) -> Budget:
    """At most ``share`` of the parameters of the blocks' matrices, those of channels that are not written included."""
    inputs = config.dim * (2 if config.gated else 1)

    def kept(left: Amounts) -> Tensor:
        attention = config.dim * (2 * left.qk + left.v) + left.v * left.attn_out
        return (left.runs * (left.heads * attention + left.mlp * (inputs + left.mlp_out))).sum()

    dense = float(kept(Amounts.dense(config)))
    return Budget(lambda left: kept(left) / dense, _checked(share), "parameters", writes=True)


def macs_budget(config: VitConfig, share: float) -> Budget:
    """At most ``share`` of the multiply-accumulates of the whole model, as ``vitprune.macs`` counts them."""
    tokens = config.prefix + config.patches

    def of_blocks(left: Amounts) -> Tensor:
        sizes = SimpleNamespace(heads=left.heads, qk_dim=left.qk, v_dim=left.v, mlp=left.mlp)
        many = torch.full_like(left.heads, tokens)
        return (left.runs * block_macs(config, cast(Any, sizes), many, many, many)).sum()

    dense = macs(config)
    fixed = dense - float(of_blocks(Amounts(*(part.double() for part in Amounts.dense(config)))))
    return Budget(lambda left: (fixed + of_blocks(left)) / dense, _checked(share), "multiply-accumulates")


def own_budget(method: type[StructureMethod], config: VitConfig, share: float) -> Budget:
    """At most ``share`` of what the authors of ``method`` count: parameters of wdpruning, else multiply-accumulates.

    The authors of vitslim and s2vite give a share of each kind of unit, and what those of the reconstructions count is
    not known.
    """
    return (params_budget if method.own_cost == "params" else macs_budget)(config, share)


def latency_budget(
    config: VitConfig, table: LatencyTable, milliseconds: float, *, last_for_prefix: bool = False
) -> Budget:
    """At most ``milliseconds`` as ``table`` predicts them, with straight lines between its entries.

    Dims of heads count where the table has times of smaller heads. ``last_for_prefix``: the last block is computed for
    the prefix tokens alone.

    Raises:
        InputError: the budget is no time below the dense model's, or the table is of another model or lacks entries.
    """
    patches, blocks = table.tokens[0], config.blocks
    if patches != config.patches:
        raise InputError(f"the latency table is of a model with {patches} patches, this one has {config.patches}")
    a, b, kappa = table.correction
    whole, last = _Halves.of(table, patches, patches), _Halves.of(table, patches, 0 if last_for_prefix else patches)
    fixed = a + b * (table.stem_ms + table.head_ms(0 if last_for_prefix else patches))

    def ms(left: Amounts) -> Tensor:
        halves = torch.cat([whole.ms(left)[:-1], last.ms(left)[-1:]])
        dims = (left.qk + left.v) / (blocks[0].qk_dim + blocks[0].v_dim)
        megabytes = (table.levels.head_bytes * left.heads * dims + table.levels.unit_bytes * left.mlp) / 1e6
        return fixed + (left.runs * (b * halves + kappa * megabytes)).sum()

    dense_ms = float(
        table.predict_ms(Counts.dense([one.heads for one in blocks], [one.mlp for one in blocks], patches))
    )
    return Budget(
        lambda left: ms(left) / dense_ms, _checked(milliseconds / dense_ms), "milliseconds", dims=bool(table.levels.qk)
    )


class _Halves(NamedTuple):
    """Times of a block's halves: of attention over heads and dims, of the MLP over units; each axis ascends."""

    heads: list[float]
    qk: list[float]
    v: list[float]
    attention: list[list[list[float]]]
    units: list[float]
    mlp: list[float]

    @classmethod
    def of(cls, table: LatencyTable, entering: int, leaving: int) -> _Halves:
        """Those of a block that is entered by so many patches, and leaves so many."""
        levels = table.levels
        heads, units = ([0, *reversed(one)] for one in (levels.heads, levels.mlp))
        qk, v = (list(reversed(one)) or [0] for one in (levels.qk, levels.v))
        ms = table.attn_ms if leaving else table.attn_prefix_ms
        times = [[[ms(entering, h, dims=(d, e) if d else None) for e in v] for d in qk] for h in heads]
        return cls(heads, qk, v, times, units, [table.mlp_ms(leaving, count) for count in units])  # type: ignore[arg-type]

    def ms(self, left: Amounts) -> Tensor:
        """Both halves of each block, [L]."""
        axes = [_Axis.of(*pair) for pair in ((self.heads, left.heads), (self.qk, left.qk), (self.v, left.v))]
        return _between(self.attention, axes) + _between(self.mlp, [_Axis.of(self.units, left.mlp)])


class _Axis(NamedTuple):
    """Where counts [L] lie between two levels: the lower one's place, the higher one's, and how near this is."""

    lower: Tensor
    higher: Tensor
    share: Tensor

    @classmethod
    def of(cls, levels: list[float], counts: Tensor) -> _Axis:
        known = counts.new_tensor(levels)
        if len(levels) == 1:
            nowhere = torch.zeros_like(counts)
            return cls(nowhere.long(), nowhere.long(), nowhere)
        higher = torch.searchsorted(known, counts.detach().contiguous()).clamp(1, len(levels) - 1)
        share = (counts - known[higher - 1]) / (known[higher] - known[higher - 1])
        return cls(higher - 1, higher, share.clamp(0, 1))  # below the least level nothing more is saved


def _between(times: Any, axes: list[_Axis]) -> Tensor:
    """``times``, nested lists over the levels of the axes, on straight lines between them."""
    grid, total = axes[0].share.new_tensor(times), axes[0].share.new_zeros(axes[0].share.shape)
    for corner in product((False, True), repeat=len(axes)):
        places = [axis.higher if high else axis.lower for axis, high in zip(axes, corner, strict=True)]
        shares = [axis.share if high else 1 - axis.share for axis, high in zip(axes, corner, strict=True)]
        total = total + grid[tuple(places)] * torch.stack(shares).prod(0)
    return total


def _checked(share: float) -> float:
    if not 0 < share <= 1:
        raise InputError(f"a budget is a share above 0 and up to 1 of the dense model's cost, got {share:.4g}")
    return share
