"""What a learned method's budget is told in: parameters, multiply-accumulates, or measured milliseconds.

Each is the share of the dense model's, differentiable in what is left of each block, between whole numbers too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from .errors import InputError
from .macs import block_macs, macs
from .model.config import VitConfig
from .search.counts import Counts
from .search.latency import LatencyTable
from .structure.base import Amounts, Budget


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


def latency_budget(config: VitConfig, table: LatencyTable, milliseconds: float) -> Budget:
    """At most ``milliseconds`` as ``table`` predicts them, with straight lines between its entries.

    Raises:
        InputError: the budget is no time below the dense model's, or the table is of another model.
    """
    patches = table.tokens[0]
    a, b, kappa = table.correction
    attention = {heads: table.attn_ms(patches, heads) for heads in table.levels.heads}
    mlp = {units: table.mlp_ms(patches, units) for units in table.levels.mlp}
    fixed = a + b * (table.stem_ms + table.head_ms(patches))

    def ms(left: Amounts) -> Tensor:
        halves = _between(attention, left.heads) + _between(mlp, left.mlp)
        megabytes = (table.levels.head_bytes * left.heads + table.levels.unit_bytes * left.mlp) / 1e6
        return fixed + (left.runs * (b * halves + kappa * megabytes)).sum()

    blocks = config.blocks
    dense = Counts.dense([one.heads for one in blocks], [one.mlp for one in blocks], patches)
    dense_ms = table.predict_ms(dense)
    if patches != config.patches:
        raise InputError(f"the latency table is of a model with {patches} patches, this one has {config.patches}")
    return Budget(lambda left: ms(left) / dense_ms, _checked(milliseconds / dense_ms), "milliseconds", dims=False)


def _between(entries: Mapping[int, float], counts: Tensor) -> Tensor:
    """Times of ``counts`` units [L], on straight lines between ``entries`` and 0 for none."""
    levels = sorted(entries)
    x = counts.new_tensor([0, *levels])
    y = counts.new_tensor([0.0, *(entries[level] for level in levels)])
    right = torch.searchsorted(x, counts.detach().contiguous()).clamp(1, len(levels))
    share = (counts - x[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + share * (y[right] - y[right - 1])


def _checked(share: float) -> float:
    if not 0 < share <= 1:
        raise InputError(f"a budget is a share above 0 and up to 1 of the dense model's cost, got {share:.4g}")
    return share
