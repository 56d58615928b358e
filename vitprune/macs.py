"""Multiply-accumulates and parameters of a model, from its configuration alone."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from . import parts
from .model.config import BlockConfig, VitConfig
from .tokens.base import Place, Reducer


def macs(config: VitConfig) -> int:
    """Multiply-accumulates of all matrix products for one image of ``config.image_size``.

    What papers call FLOPs of a Vision Transformer. Norms, activations and the scoring of tokens are left out: below
    1% of DeiT; the weights of a token method count.
    """
    tokens = config.prefix + config.patches
    total = config.patches * config.dim * config.channels * config.patch_size[0] * config.patch_size[1]
    reducers = _reducers(config)
    for number, block in enumerate(config.blocks):
        left = tokens if block.patches is None else config.prefix + block.patches
        read, asking = tokens, left if block.patches == 0 else tokens
        if number in reducers:
            where = reducers[number].where
            total += reducers[number].macs(tokens - config.prefix)
            read, asking = left if where == "before" else tokens, tokens if where == "after" else left
        total += block_macs(config, block, read, asking, asking if config.residual == "parallel" else left)
        tokens = left
    if config.pool == "map":
        pooled = tokens if config.pool_prefix else tokens - config.prefix
        total += pooled * 2 * config.dim * (config.dim + 1) + config.dim * (config.dim + 2 * config.pool_mlp)
    return total + _heads(config) * config.dim * config.classes


Amount = TypeVar("Amount", int, Tensor)


def block_macs(config: VitConfig, block: BlockConfig, tokens: Amount, queries: Amount, in_mlp: Amount) -> Amount:
    """Those of a block in which ``queries`` of ``tokens`` ask, all are read, and ``in_mlp`` pass the MLP."""
    both = block.heads * (block.qk_dim + block.v_dim)
    attention = (queries + tokens) * config.dim * both + queries * tokens * both
    return attention + in_mlp * config.dim * block.mlp * (3 if config.gated else 2)


def params(config: VitConfig) -> int:
    """Parameters of the model, those of its token method included."""
    dim, norm = config.dim, _norm(config, config.dim)
    total = dim * config.channels * config.patch_size[0] * config.patch_size[1] + dim * config.embed_bias
    total += dim * (config.prefix + config.patches * config.pos_embed)
    total += norm * (config.embed_norm + config.pre_norm + (config.final_norm != "none"))
    total += sum(_block_params(config, block) for block in config.blocks)
    total += sum(p.numel() for reducer in _reducers(config).values() for p in reducer.parameters())
    if config.pool == "map":
        total += dim + _linear(dim, 2 * dim) + _linear(dim, dim) + norm
        total += _linear(dim, config.pool_mlp) + _linear(config.pool_mlp, dim)
    return total + (_heads(config) * _linear(dim, config.classes) if config.classes else 0)


def _reducers(config: VitConfig) -> dict[int, Reducer]:
    """The token method of each block that reduces, without memory for its weights."""
    if config.reducer is None:
        return {}
    kind = parts.load("vitprune.tokens", config.reducer, Reducer)  # type: ignore[type-abstract]
    with torch.device("meta"):
        return {n: kind(Place.of(config, n)) for n, block in enumerate(config.blocks) if block.patches}


def _block_params(config: VitConfig, block: BlockConfig) -> int:
    half = _norm(config, config.dim) + config.dim * config.layer_scale  # what both halves have besides their layers
    total = 0
    if block.heads:
        values = block.heads * block.v_dim
        total += half + _linear(config.dim, 2 * block.heads * block.qk_dim + values, config.qkv_bias)
        total += _linear(values, config.dim, config.proj_bias)
        total += 2 * _norm(config, block.qk_dim) * config.qk_norm + _norm(config, values) * config.attn_norm
    if block.mlp:
        total += half + _linear(config.dim, block.mlp * (1 + config.gated), config.mlp_bias)
        total += _linear(block.mlp, config.dim, config.mlp_bias) + _norm(config, block.mlp) * config.mlp_norm
    return total


def _linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + outputs * bias


def _norm(config: VitConfig, size: int) -> int:
    return size if config.norm == "rms" else 2 * size


def _heads(config: VitConfig) -> int:
    """Classifiers: a distilled model has two."""
    return 1 + config.distilled
