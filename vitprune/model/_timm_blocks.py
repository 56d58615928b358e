"""timm's kinds of blocks: their weights under the names, and in the order, that a ``Vit`` block has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import NotSupported
from .config import BlockConfig

Weights = dict[str, Tensor]


def convert_block(block: Any) -> tuple[BlockConfig, Weights, dict[str, Any]]:
    """Sizes of one block, its weights under our names, and what must be the same in all blocks."""
    residual, adapt = BLOCKS[type(block).__name__]
    heads, weights = adapt(block)
    hidden = weights["mlp.fc2.weight"].shape[1]
    head_dim = weights["attn.proj.weight"].shape[1] // heads
    for name, rows in (("mlp.fc1", "mlp.fc2"), ("mlp.fc2", "mlp.fc1")):
        if f"{rows}.bias" in weights and f"{name}.bias" not in weights:  # one flag stands for both
            weights[f"{name}.bias"] = weights[f"{name}.weight"].new_zeros(len(weights[f"{name}.weight"]))
    traits = {
        "residual": residual,
        "layer_scale": "ls1.gamma" in weights,
        "qkv_bias": "attn.qkv.bias" in weights,
        "proj_bias": "attn.proj.bias" in weights,
        "mlp_bias": "mlp.fc1.bias" in weights,
        "qk_norm": "attn.q_norm.weight" in weights,
        "attn_norm": "attn.norm.weight" in weights,
        "gated": len(weights["mlp.fc1.weight"]) == 2 * hidden,
        "mlp_norm": "mlp.norm.weight" in weights,
    }
    return BlockConfig(heads, head_dim, head_dim, head_dim**-0.5, hidden), weights, traits


def _plain_block(block: Any) -> tuple[int, Weights]:
    return block.attn.num_heads, _gate_first(dict(block.state_dict()), block.mlp)


def _gate_first(weights: Weights, mlp: Any) -> Weights:
    """Weights of a block in which a gated MLP's ``fc1`` has all gates, then all values."""
    for kind in ("weight", "bias"):
        name = f"mlp.fc1.{kind}"
        if f"mlp.fc1_g.{kind}" in weights:
            weights[name] = torch.cat([weights.pop(f"mlp.fc1_g.{kind}"), weights.pop(f"mlp.fc1_x.{kind}")])
        elif getattr(mlp, "gate_last", False) and name in weights:
            value, gate = weights[name].chunk(2)
            weights[name] = torch.cat([gate, value])
    return weights


def _parallel_scaling_block(block: Any) -> tuple[int, Weights]:
    """One normalisation and one projection feed both halves; here each half has its own."""
    theirs = dict(block.state_dict())
    hidden = block.in_split[0]
    ours = {"mlp.fc1.weight": theirs["in_proj.weight"][:hidden], "attn.qkv.weight": theirs["in_proj.weight"][hidden:]}
    if "in_proj.bias" in theirs:
        ours |= {"mlp.fc1.bias": theirs["in_proj.bias"][:hidden], "attn.qkv.bias": theirs["in_proj.bias"][hidden:]}
    else:
        ours["mlp.fc1.bias"] = theirs["mlp_bias"]
    for name, value in theirs.items():
        part, _, kind = name.partition(".")
        if part == "out_proj" and kind == "weight":
            ours["attn.proj.weight"], ours["mlp.fc2.weight"] = value.split([value.shape[1] - hidden, hidden], dim=1)
        else:
            ours |= {f"{new}.{kind}": value for new in _PARALLEL_SCALING_NAMES.get(part, ())}
    return block.num_heads, ours


_PARALLEL_SCALING_NAMES = {
    "in_norm": ("norm1", "norm2"),
    "ls": ("ls1", "ls2"),
    "q_norm": ("attn.q_norm",),
    "k_norm": ("attn.k_norm",),
    "attn_out_proj": ("attn.proj",),
    "mlp_out_proj": ("mlp.fc2",),
    "out_proj": ("attn.proj",),
}


def _parallel_things_block(block: Any) -> tuple[int, Weights]:
    """x + f(norm_f(x)) + g(norm_g(x)) is one half of both widths, with scales and shifts of the norms folded in.

    Touvron et al., Three things everyone should know about Vision Transformers, ECCV 2022,
    https://arxiv.org/abs/2203.09795.
    """
    attentions, mlps = ([_folded(half) for half in halves] for halves in (block.attns, block.ffns))
    if any(".norm." in name or "_norm." in name for half in attentions + mlps for name in half):
        raise unsupported("parallel attentions or MLPs with inner norms", "those without")
    ours: Weights = {}
    for name, value in block.attns[0].norm.state_dict().items():
        neutral = torch.ones_like(value) if name == "weight" else torch.zeros_like(value)
        ours |= {f"norm1.{name}": neutral, f"norm2.{name}": neutral}
    for kind in ("weight", "bias"):
        rows = [half[f"attn.qkv.{kind}"].unflatten(0, (3, -1)) for half in attentions]
        ours[f"attn.qkv.{kind}"] = torch.cat(rows, dim=1).flatten(0, 1)
        ours[f"mlp.fc1.{kind}"] = torch.cat([half[f"mlp.fc1.{kind}"] for half in mlps])
    for halves, name in ((attentions, "attn.proj"), (mlps, "mlp.fc2")):
        ours[f"{name}.weight"] = torch.cat([half[f"{name}.weight"] for half in halves], dim=1)
        ours[f"{name}.bias"] = torch.stack([half[f"{name}.bias"] for half in halves]).sum(dim=0)
    return sum(half.attn.num_heads for half in block.attns), ours


def _folded(half: Any) -> Weights:
    """Weights of norm, attention or MLP, and LayerScale in a row, as those of the attention or MLP alone."""
    weights = dict(half.state_dict())
    gain, shift = weights.pop("norm.weight"), weights.pop("norm.bias", None)
    scale = weights.pop("ls.gamma", None)
    first, last = ("attn.qkv", "attn.proj") if hasattr(half, "attn") else ("mlp.fc1", "mlp.fc2")
    for name in (first, last):
        weights.setdefault(f"{name}.bias", gain.new_zeros(len(weights[f"{name}.weight"])))
    if shift is not None:
        weights[f"{first}.bias"] = weights[f"{first}.bias"] + weights[f"{first}.weight"] @ shift
    weights[f"{first}.weight"] = weights[f"{first}.weight"] * gain
    if scale is not None:
        weights[f"{last}.weight"] = weights[f"{last}.weight"] * scale[:, None]
        weights[f"{last}.bias"] = weights[f"{last}.bias"] * scale
    return weights


BLOCKS: dict[str, tuple[str, Callable[[Any], tuple[int, Weights]]]] = {
    "Block": ("pre", _plain_block),
    "ResPostBlock": ("post", _plain_block),
    "ParallelScalingBlock": ("parallel", _parallel_scaling_block),
    "ParallelThingsBlock": ("pre", _parallel_things_block),
}


def same_in_all(traits: list[dict[str, Any]]) -> dict[str, Any]:
    """What all blocks have in common."""
    for number, block in enumerate(traits):
        for name, value in block.items():
            if value != traits[0][name]:
                raise unsupported(f"block {number} with {name}={value}", f"that of block 0, {name}={traits[0][name]}")
    return traits[0]


def unsupported(what: str, known: str) -> NotSupported:
    """The error for a part that has no counterpart here, and those that have one."""
    return NotSupported(f"vitprune cannot convert {what}; it knows {known}")
