"""Gates on units, as factors of the rows and columns of weights that surgery cuts out when the gate is 0.

Names of gates of a block, and what they multiply:

    q, k, v   [H, D]   rows of ``qkv`` and their biases
    proj      [H, V]   columns of ``proj``
    fc1       [M]      rows of ``fc1`` and their biases, gate and value alike where the MLP is gated
    fc2       [M]      columns of ``fc2``
    attn_out  [C]      rows of ``proj`` and their biases
    mlp_out   [C]      rows of ``fc2`` and their biases
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..model.vit import Block, Vit

T = TypeVar("T")
BlockGates = Mapping[str, Tensor]


class _Factors(NamedTuple):
    """Of a Linear's rows, with its bias, and of its columns; None: 1."""

    rows: Tensor | None
    columns: Tensor | None


def gated_weights(model: Vit, gates: Sequence[BlockGates], *, straight: bool = False) -> dict[str, Tensor]:
    """The weights of ``model`` that gates change, multiplied, by their names.

    Args:
        gates: one entry for each block; none at all: nothing is gated.
        straight: the weights get the gradient of what they were multiplied to, closed gates or not, and the gates none.
    """
    found: dict[str, Tensor] = {}
    for number, (block, of_block) in enumerate(zip(model.blocks, gates, strict=True) if gates else ()):
        for name, factors in _factors(cast(Block, block), of_block).items():
            for part, value in _multiplied(cast(nn.Linear, block.get_submodule(name)), factors).items():
                weight = getattr(block.get_submodule(name), part)
                found[f"blocks.{number}.{name}.{part}"] = weight + (value - weight).detach() if straight else value
    return found


def with_weights(model: Vit, weights: Mapping[str, Tensor], compute: Callable[[], T]) -> T:
    """What ``compute`` returns while ``model`` has ``weights``, by name, in place of its own."""
    if not weights:
        return compute()
    return functional_call(_Holder(model), {f"model.{name}": value for name, value in weights.items()}, (compute,))


class _Holder(nn.Module):
    """A model whose methods are called through ``functional_call``."""

    def __init__(self, model: Vit) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def _factors(block: Block, gates: BlockGates) -> dict[str, _Factors]:
    """By the name of a Linear in the block."""
    found: dict[str, _Factors] = {}
    if gates.keys() & {"q", "k", "v"}:
        attn = block.attn
        sizes = {"q": attn.qk_dim, "k": attn.qk_dim, "v": attn.v_dim}
        ones = attn.qkv.weight.new_ones
        parts = [gates[name] if name in gates else ones(attn.heads, size) for name, size in sizes.items()]
        found["attn.qkv"] = _Factors(torch.cat([part.flatten() for part in parts]), None)
    if "fc1" in gates:
        found["mlp.fc1"] = _Factors(gates["fc1"].repeat(2 if block.mlp.gated else 1), None)
    for name, rows, columns in (("attn.proj", "attn_out", "proj"), ("mlp.fc2", "mlp_out", "fc2")):
        if gates.keys() & {rows, columns}:
            found[name] = _Factors(gates.get(rows), gates[columns].flatten() if columns in gates else None)
    return found


def _multiplied(layer: nn.Linear, factors: _Factors) -> dict[str, Tensor]:
    """Weight and bias of ``layer`` that change."""
    weight = layer.weight if factors.columns is None else layer.weight * factors.columns
    if factors.rows is None:
        return {"weight": weight}
    found = {"weight": weight * factors.rows[:, None]}
    return found if layer.bias is None else found | {"bias": layer.bias * factors.rows}
