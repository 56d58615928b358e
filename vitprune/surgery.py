"""A model and a plan make a model that really is smaller."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from . import parts
from .errors import InputError, NotSupported
from .model.config import BlockConfig, VitConfig
from .model.vit import Attention, Block, Mlp, Vit, fingerprint
from .plan import BlockPlan, Dims, Plan
from .schedules import Wanted, counts
from .tokens.base import Place, Reducer

CompensatedWeights = Mapping[tuple[int, str], Tensor]
ACROSS = re.compile(r"\.(attn|mlp)\.norm\.(weight|bias)$")  # norms that see all heads or hidden units at once
HEADWISE = re.compile(r"\.attn\.[qk]_norm\.(weight|bias)$")
METHOD_WEIGHT = re.compile(r"^blocks\.\d+\.reducer\.")  # names of a token method's own weights


def prune(
    model: Vit,
    plan: Plan,
    weights: CompensatedWeights | None = None,
    method_weights: Mapping[str, Tensor] | None = None,
) -> Vit:
    """What ``plan`` leaves of ``model``, as a new model with weights of its own.

    Zeroing in ``model`` the columns of ``proj`` and ``fc2`` that belong to removed heads and units gives the same
    outputs; so does zeroing the rows of ``qkv`` and their biases that belong to removed dims of queries and keys, and
    the columns of ``proj`` of removed values: the softmax scale stays the original model's. A half that is removed
    altogether adds nothing to the tokens: its output bias goes with it. No mask equals a narrower residual stream,
    whose norms see the kept channels alone.

    Args:
        model: the model that the plan was made for; it stays as it is.
        plan: what stays.
        weights: for (block, 'attn') the weight of ``proj``, for (block, 'mlp') that of ``fc2``, [C, kept columns],
            with what the removed columns did made up for; for (block, 'qk') factors of the kept queries, [heads, dims],
            with which the logits make up for the removed ones.
        method_weights: of the token method, by their names in the new model; those not named are as they start out.

    Raises:
        InputError: the plan was made for another model, or does not fit this one.
        NotSupported: a norm across heads, dims or hidden units, which some of them cannot leave without changing the
            rest; or channels are to leave a residual stream to whose width something else is bound.
    """
    if plan.model_sha256 != fingerprint(model):
        raise InputError(
            f"the plan was made for the model with hash {plan.model_sha256[:12]}, this one has "
            f"{fingerprint(model)[:12]}; load the weights that the plan was made for, or search again"
        )
    slim = build(_pruned_config(model.config, plan))
    slim.to(next(model.parameters()))
    state = model.state_dict()
    for number, (block, kept) in enumerate(zip(model.blocks, plan.blocks, strict=True)):
        for name, tensor in _kept_weights(cast(Block, block), kept, number, weights or {}).items():
            state[f"blocks.{number}.{name}"] = tensor
    if plan.embed is not None and slim.config.dim < model.config.dim:
        state = {name: _kept_channels(name, tensor, plan.embed) for name, tensor in state.items()}
    state |= method_weights or {}
    given = {
        name: _same_shape(state[name], tensor, name)
        for name, tensor in slim.state_dict().items()
        if name in state or not METHOD_WEIGHT.search(name)
    }
    slim.load_state_dict(given, strict=False)
    return slim


def build(config: VitConfig, state_dict: Mapping[str, Tensor] | None = None) -> Vit:
    """The model that ``config`` describes, with its token method, in eval mode; weights are copied from ``state_dict``.

    Raises:
        InputError: the token counts are more than one application of the method can do, a block leaves no patch though
            something reads them, or the weights do not fit.
        NotSupported: the token method needs a class token and the model has none.
    """
    _check_prefix_only(config)
    model = Vit(config, _reducers(config)).eval()
    if state_dict is None:
        return model
    floats = [tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()]
    try:
        model.to(floats[0] if floats else torch.float32).load_state_dict(dict(state_dict))
    except RuntimeError as error:  # torch lists everything that does not fit
        raise InputError(f"the weights do not belong to this architecture: {error}") from error
    return model


def reduce_tokens(model: Vit, method: str, schedule: Wanted, method_weights: Mapping[str, Tensor] | None = None) -> Vit:
    """``model`` with a token method in it, and all of its heads, units and weights.

    Args:
        method: name of a file in ``vitprune/tokens``.
        schedule: as ``schedules.counts`` takes it: ``"published-0.7"``, or ``{3: 139, 6: 99}``.
        method_weights: as ``prune`` takes them.

    Raises:
        InputError: the schedule does not fit the method or the model.
        NotSupported: the method needs a class token and the model has none.
    """
    config, plan = model.config, dense_plan(model)
    left = counts(method, schedule, len(config.blocks), config.patches, config.prefix)
    entering = (config.patches, *left)
    kept = [
        block if after == before else replace(block, patches=after)
        for block, before, after in zip(plan.blocks, entering, left, strict=False)
    ]
    return prune(model, replace(plan, reducer=method, blocks=tuple(kept)), method_weights=method_weights)


def dense_plan(model: Vit) -> Plan:
    """The plan that keeps all of ``model``."""
    blocks = model.config.blocks
    return Plan.dense(fingerprint(model), model.config.patches, [b.heads for b in blocks], [b.mlp for b in blocks])


def check_method(method: str, config: VitConfig) -> None:
    """Raise NotSupported where the token method ``method`` cannot act on such a model."""
    kind = parts.load("vitprune.tokens", method, Reducer)  # type: ignore[type-abstract]
    if config.dynamic_image_size and not kind.any_size:
        raise NotSupported(f"{method} keeps the same positions in every image, so all images must be of one size")
    if kind.grid and config.grid[0] != config.grid[1]:
        grid = " x ".join(map(str, config.grid))
        raise NotSupported(f"{method} merges neighbours of a square grid, and this model's patches are {grid}")
    if kind.needs_class_token and not config.class_token:
        raise NotSupported(
            f"{method} scores patches by the class token's attention, and this model has no class token; "
            f"use {_without_class_token()}"
        )


def _reducers(config: VitConfig) -> dict[int, nn.Module]:
    """A reducer for each block whose token count falls, once it is clear that the counts can be reached."""
    if config.reducer is None:
        return {}
    check_method(config.reducer, config)
    kind = parts.load("vitprune.tokens", config.reducer, Reducer)  # type: ignore[type-abstract]
    reducers: dict[int, nn.Module] = {}
    entering = config.patches
    for number, block in enumerate(config.blocks):
        if not block.patches:
            if kind.watches and block.heads:
                reducers[number] = make_reducer(config.reducer, config, number)
            continue
        if kind.watches and number == 0:
            raise InputError(f"block 0: {config.reducer} has seen no attention yet; let it act from block 1 on")
        if block.patches != entering and not kind.reaches(entering, block.patches, config.prefix):
            fewest = kind.fewest(entering, config.prefix)
            raise InputError(
                f"block {number}: {config.reducer} can leave {fewest} to {entering} of {entering} patch tokens, "
                f"not {block.patches}"
            )
        reducers[number] = make_reducer(config.reducer, config, number)
        entering = block.patches
    return reducers


def make_reducer(method: str, config: VitConfig, block: int, weights: Mapping[str, Tensor] | None = None) -> Reducer:
    """The token method ``method`` for a block of a model, in eval mode.

    Args:
        weights: as ``prune`` takes them; where the block has none among them, they are as they start out.
    """
    kind = parts.load("vitprune.tokens", method, Reducer)  # type: ignore[type-abstract]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(block)  # a method's weights start out the same wherever the model is built
        reducer = kind(Place.of(config, block))
    prefix = f"blocks.{block}.reducer."
    own = {name.removeprefix(prefix): value for name, value in (weights or {}).items() if name.startswith(prefix)}
    if own:
        reducer.load_state_dict(own)
    return reducer.eval()


def _check_prefix_only(config: VitConfig) -> None:
    for number, block in enumerate(config.blocks):
        if block.patches == 0 and not (config.reads_prefix_only and number + 1 == len(config.blocks)):
            raise InputError(f"block {number} cannot leave the prefix tokens alone: something behind it reads patches")


def _without_class_token() -> str:
    """The token methods that need neither a class token nor training, as the end of a sentence."""
    kinds = {name: parts.load("vitprune.tokens", name, Reducer) for name in parts.names("vitprune.tokens")}  # type: ignore[type-abstract]
    return " or ".join(name for name, kind in kinds.items() if not (kind.needs_class_token or kind.stand_in))


def _pruned_config(config: VitConfig, plan: Plan) -> VitConfig:
    if len(plan.blocks) != len(config.blocks):
        raise InputError(f"the plan is for {len(plan.blocks)} blocks, the model has {len(config.blocks)}")
    if plan.patches != config.patches:
        raise InputError(
            f"the plan counts tokens of images with {plan.patches} patches, the model is made for {config.patches}; "
            f"load the model at the image size of the budget"
        )
    if config.reducer and plan.reducer and config.reducer != plan.reducer:
        raise InputError(f"the model already reduces tokens by {config.reducer}, and the plan by {plan.reducer}")
    blocks, entering, reducer = [], config.patches, config.reducer or plan.reducer
    for number, (block, kept) in enumerate(zip(config.blocks, plan.blocks, strict=True)):
        pruned = _pruned_block(block, kept, number, entering)
        if pruned.patches is None and pruned.heads and entering < config.patches and reducer:
            kind = parts.load("vitprune.tokens", reducer, Reducer)  # type: ignore[type-abstract]
            pruned = replace(pruned, patches=entering if kind.again(number, len(config.blocks)) else None)
        entering = entering if pruned.patches is None else pruned.patches
        blocks.append(pruned)
    slim = config.with_blocks(blocks, reducer if any(block.patches for block in blocks) else None)
    return slim if plan.embed is None else narrowed(slim, plan.embed)


def narrowed(config: VitConfig, channels: tuple[int, ...]) -> VitConfig:
    """``config`` with a residual stream of ``channels`` alone.

    Raises:
        InputError: the model has fewer.
        NotSupported: something is bound to the width of the stream.
    """
    if channels[-1] >= config.dim:
        raise InputError(f"the plan keeps channels up to {channels[-1]}, the model has {config.dim}")
    if len(channels) == config.dim:
        return config
    if config.pool == "map" or not config.classes:
        what = "attention pooling splits into heads" if config.pool == "map" else "the features are the output"
        raise NotSupported(f"no channel can leave the residual stream of this model: {what}; keep all of them")
    if config.reducer and any(next(reducer.parameters(), None) is not None for reducer in _reducers(config).values()):
        raise NotSupported(
            f"{config.reducer} has weights for all channels; prune the embedding without it, then add it"
        )
    return replace(config, dim=len(channels))


def _pruned_block(block: BlockConfig, kept: BlockPlan, number: int, entering: int) -> BlockConfig:
    for name, indices, count in (("heads", kept.heads, block.heads), ("MLP units", kept.mlp, block.mlp)):
        if indices and indices[-1] >= count:
            raise InputError(f"block {number}: the plan keeps {name} up to {indices[-1]}, the model has {count}")
    sizes = {"qk_dim": block.qk_dim, "v_dim": block.v_dim}
    for (name, size), rows in zip(list(sizes.items()), (kept.qk, kept.v), strict=True):
        highest = max((dims[-1] for dims in rows or ()), default=-1)
        if highest >= size:
            raise InputError(f"block {number}: the plan keeps {name}s up to {highest}, a head of the model has {size}")
        sizes[name] = len(rows[0]) if rows else size
    counts = [patches for patches in (block.patches, kept.patches) if patches is not None]
    patches = min(counts, default=entering) if kept.heads or 0 in counts else entering
    left = patches if patches < entering else None  # a block that leaves what enters needs no reducer
    return replace(block, heads=len(kept.heads), mlp=len(kept.mlp), patches=left, **sizes)


def _kept_weights(block: Block, kept: BlockPlan, number: int, weights: CompensatedWeights) -> dict[str, Tensor]:
    """The block's tensors that lose rows or columns, by their name in the block."""
    tensors: dict[str, Tensor] = {}
    if block.attn is not None and kept.heads:
        factors, proj = (weights.get((number, name)) for name in ("qk", "attn"))
        tensors |= _kept_attention(block.attn, kept, factors, proj)
    if block.mlp is not None and kept.mlp:
        tensors |= _kept_mlp(block.mlp, kept.mlp, weights.get((number, "mlp")))
    return tensors


def _kept_attention(attn: Attention, kept: BlockPlan, factors: Tensor | None, proj: Tensor | None) -> dict[str, Tensor]:
    """What is left of ``qkv`` and ``proj``; ``factors`` [heads, dims] of the queries, ``proj`` [C, kept columns]."""
    queries = rows_of(kept.heads, kept.qk, attn.qk_dim)
    values = rows_of(kept.heads, kept.v, attn.v_dim)
    keys = [attn.sizes[0] + row for row in queries]
    tensors = _rows("attn.qkv", attn.qkv, queries + keys + [2 * attn.sizes[0] + row for row in values])
    if factors is not None:
        scale = _same_shape(factors, factors.new_empty(len(kept.heads), len(queries) // len(kept.heads)), "queries")
        scale = scale.to(attn.qkv.weight)  # a store reads them to the CPU
        scale = torch.cat([scale.flatten(), scale.new_ones(len(keys) + len(values))])
        tensors = {name: tensor * scale.view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in tensors.items()}
    return tensors | {"attn.proj.weight": attn.proj.weight[:, values] if proj is None else proj}


def rows_of(heads: Sequence[int], dims: Dims | None, size: int) -> list[int]:
    """Rows of the kept ``dims`` of the kept ``heads``, of a matrix with ``size`` rows for each head; None: all dims."""
    kept = dims or [range(size)] * len(heads)
    return [head * size + dim for head, some in zip(heads, kept, strict=True) for dim in some]


def _kept_mlp(mlp: Mlp, units: tuple[int, ...], fc2: Tensor | None) -> dict[str, Tensor]:
    columns = list(units)
    rows = columns + [unit + mlp.fc2.in_features for unit in units] if mlp.gated else columns
    return _rows("mlp.fc1", mlp.fc1, rows) | {"mlp.fc2.weight": mlp.fc2.weight[:, columns] if fc2 is None else fc2}


def _rows(name: str, layer: nn.Linear, rows: list[int]) -> dict[str, Tensor]:
    tensors = {f"{name}.weight": layer.weight[rows]}
    return tensors if layer.bias is None else tensors | {f"{name}.bias": layer.bias[rows]}


CHANNELS_FIRST = re.compile(r"(patch_embed|\.proj|\.fc2)\.(weight|bias)$")  # rows that write to the residual stream
INSIDE = re.compile(r"\.(q_norm|k_norm|attn\.norm|mlp\.norm)\.|\.(qkv|fc1)\.bias$|^head(_dist)?\.bias$|\.reducer\.")


def _kept_channels(name: str, tensor: Tensor, channels: tuple[int, ...]) -> Tensor:
    """The weight ``name`` of a model whose residual stream has ``channels`` alone."""
    if INSIDE.search(name):
        return tensor
    return tensor[list(channels)] if CHANNELS_FIRST.search(name) else tensor[..., list(channels)]


def _same_shape(tensor: Tensor, slim: Tensor, name: str) -> Tensor:
    """``tensor``, if it has the shape that the slim model needs."""
    if tensor.shape == slim.shape:
        return tensor
    if ACROSS.search(name):
        raise NotSupported(
            f"{name} normalises across what would be pruned, so the rest would change; keep all of that half, or none"
        )
    if HEADWISE.search(name):
        raise NotSupported(
            f"{name} normalises each head's dims, so the rest would change if some went; keep all dims of queries and "
            "keys, or none of the half"
        )
    raise InputError(f"the compensated weight for {name} is {tuple(tensor.shape)}, the plan keeps {tuple(slim.shape)}")
