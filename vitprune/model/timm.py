"""Vision Transformers of timm's modules ``vision_transformer`` and ``deit`` as ``Vit``.

Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models. What timm names as ``Vit`` does
goes through by name; the rest is listed here. Folded on the way, without any change of the output: the position
embedding of prefix tokens into these tokens, the projection of attention pooling's latent into its query, and blocks
of two attentions followed by two MLPs into blocks of one attention and one MLP of twice the width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError, MissingError
from ._timm_blocks import BLOCKS, Weights, convert_block, same_in_all, unsupported
from .checkpoint import load_weights, read_checkpoint
from .config import VitConfig
from .vit import Vit


class Converted(NamedTuple):
    """A model, and what timm knows about the images that it was trained on."""

    model: Vit
    data: dict[str, Any]  # input_size, interpolation, mean, std, crop_pct, crop_mode
    classes: list[str] | None  # names of the outputs in their order (WordNet ids for ImageNet); None: not known


def from_timm(
    name: str,
    *,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    to_timm: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    **model_args: Any,
) -> Converted:
    """The architecture that timm calls ``name``, with the weights of ``checkpoint``, timm's own, or random ones.

    ``model_args`` are those of timm's ``create_model``. A checkpoint of another image or patch size is resampled, as
    timm does it. ``to_timm`` gives the weights of one in a layout of its own the names that timm has for them.

    Raises:
        InputError: timm has no such name or argument, or the checkpoint is of another model.
        NotSupported: the architecture has a part that ``Vit`` does not have.
        DamagedFile: the checkpoint is cut off.
        MissingError: timm is not installed, or its weights cannot be had.
    """
    source = _create(name, pretrained and checkpoint is None, model_args)
    if checkpoint is not None:
        _check_supported(source)
        weights = read_checkpoint(checkpoint)
        weights = to_timm(weights) if to_timm else weights
        load_weights(source, _timm_layout(weights, source), checkpoint)
    model = convert(source)
    return Converted(model, _data_config(source, model.config), _class_names(source, model.config))


def convert(module: Any) -> Vit:
    """The ``Vit`` that computes what timm's ``module`` does in evaluation, with copies of its weights.

    Raises:
        NotSupported: the module has a part that ``Vit`` does not have; the message names it.
    """
    _check_supported(module)
    blocks = [convert_block(block) for block in module.blocks]
    config = VitConfig(
        image_size=tuple(module.patch_embed.img_size),
        patch_size=tuple(module.patch_embed.patch_size),
        channels=module.patch_embed.proj.in_channels,
        dim=module.embed_dim,
        classes=module.head.out_features if isinstance(module.head, nn.Linear) else 0,
        blocks=tuple(config for config, _, _ in blocks),
        **same_in_all([traits for _, _, traits in blocks]),
        **_stem(module),
        **_pooling(module),
    )
    weights = _outer_weights(module, config)
    for number, (_, block_weights, _) in enumerate(blocks):
        weights |= {f"blocks.{number}.{name}": value for name, value in block_weights.items()}
    with torch.device("meta"):
        model = Vit(config)
    copies = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
    missing, unknown = model.load_state_dict(copies, strict=False, assign=True)
    if unknown:
        raise unsupported(f"the part with the weights {unknown[0]}", "those that timm builds by default")
    if missing:
        raise unsupported(f"a model without the weights {missing[0]}", "those that timm builds by default")
    return model.eval()


def _check_supported(module: Any) -> None:
    """Raise NotSupported for the first part of ``module`` that has no counterpart here."""
    if not type(module).__module__.startswith("timm.") or type(module).__name__ not in _MODELS:
        raise unsupported(f"a {type(module).__module__}.{type(module).__name__}", f"timm's {', '.join(_MODELS)}")
    for what, part, known in _parts(module):
        if type(part).__name__ not in known:
            raise unsupported(f"{what} of class {type(part).__name__}", ", ".join(known))
    if not module.blocks:
        raise unsupported("a model without blocks", "those with one at least")
    if module.attn_pool is None and module.global_pool not in ("token", "avg", "max", "avgmax"):
        raise unsupported(f"global_pool={module.global_pool!r}", "token, avg, max, avgmax, map")
    if module.patch_embed.dynamic_img_pad:
        raise unsupported("dynamic_img_pad=True", "images whose sides are multiples of the patch size")


def _parts(module: Any) -> Iterator[tuple[str, Any, Iterable[str]]]:
    """What each part is, the part, and the classes that it may be of; the larger ones first."""
    yield "a patch embedding", module.patch_embed, ["PatchEmbed"]
    for block in module.blocks:
        yield "a block", block, BLOCKS
    for name, part in module.blocks.named_modules():
        if name.endswith("attn"):
            yield "attention", part, ["Attention"]
        if name.endswith("mlp"):
            yield "an MLP", part, ["Mlp", "GluMlp", "SwiGLU"]
    if module.attn_pool is not None:
        yield "pooling", module.attn_pool, ["AttentionPoolLatent"]
    yield "a head", module.head, ["Linear", "Identity"]
    yield from (("an activation", part, _ACTIVATIONS) for part in _activations(module))
    yield from (("a norm", part, _NORMS) for part in _norms(module))


def _stem(module: Any) -> dict[str, Any]:
    """The part of the configuration that concerns tokens and norms."""
    norms, acts = _norms(module), _activations(module)
    return {
        "class_token": module.has_class_token,
        "distilled": hasattr(module, "dist_token"),
        "registers": module.num_reg_tokens,
        "pos_embed": module.pos_embed is not None,
        "dynamic_image_size": module.dynamic_img_size,
        "embed_bias": module.patch_embed.proj.bias is not None,
        "embed_norm": not isinstance(module.patch_embed.norm, nn.Identity),
        "pre_norm": not isinstance(module.norm_pre, nn.Identity),
        "norm": _only("norms", (_NORMS[type(n).__name__] for n in norms)),
        "norm_eps": _only("epsilons of norms", (n.eps for n in norms)),
        "activation": _only("activations", (_ACTIVATIONS[type(a).__name__](a) for a in acts)),
    }


def _pooling(module: Any) -> dict[str, Any]:
    """The part of the configuration that concerns pooling and the last norm."""
    pooled, tokens = (not isinstance(norm, nn.Identity) for norm in (module.fc_norm, module.norm))
    pool = module.attn_pool
    return {
        "pool": "map" if pool is not None else "token" if hasattr(module, "dist_token") else module.global_pool,
        "pool_prefix": module.pool_include_prefix,
        "pool_heads": 0 if pool is None else pool.num_heads,
        "pool_mlp": 0 if pool is None else pool.mlp.fc1.out_features,
        "final_norm": "pooled" if pooled else "tokens" if tokens else "none",
    }


def _outer_weights(module: Any, config: VitConfig) -> Weights:
    """All weights that are in no block, under our names."""
    weights = {name: value for name, value in module.state_dict().items() if not name.startswith("blocks.")}
    weights = {_renamed(name): value for name, value in weights.items()}
    tokens = [weights.pop(name) for name in ("cls_token", "dist_token", "reg_token") if name in weights]
    if tokens:
        weights["prefix_tokens"] = torch.cat(tokens, dim=1)
    positions = weights.get("pos_embed")
    if positions is not None and positions.shape[1] > config.patches:
        ahead, weights["pos_embed"] = positions.split([config.prefix, config.patches], dim=1)
        weights["prefix_tokens"] = weights["prefix_tokens"] + ahead
    if config.pool == "map":
        latent, weight, bias = (weights.pop(f"pool.{name}") for name in ("latent", "q.weight", "q.bias"))
        weights["pool.query"] = F.linear(latent, weight, bias)
    return weights


def _renamed(name: str) -> str:
    for theirs, ours in (
        ("patch_embed.proj.", "patch_embed."),
        ("patch_embed.norm.", "embed_norm."),
        ("fc_norm.", "norm."),
        ("attn_pool.", "pool."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _only(what: str, values: Iterable[Any]) -> Any:
    """The one value that there is."""
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        raise unsupported(f"{what} that differ within a model ({', '.join(map(str, distinct))})", "one for all")
    return distinct[0]


def _norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if "norm" in type(m).__name__.lower()]


def _activations(module: nn.Module) -> list[Any]:
    return [m for name, m in module.named_modules() if name.rpartition(".")[2] in ("act", "mlp_act")]


_MODELS = ("VisionTransformer", "VisionTransformerDistilled")
_NORMS = {
    "LayerNorm": "layer",
    "LayerNormFp32": "layer",
    "RmsNorm": "rms",
    "RmsNormFp32": "rms",
    "RMSNorm": "rms",
}
_ACTIVATIONS: dict[str, Callable[[Any], str]] = {
    "GELU": lambda act: "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else "gelu",
    "GELUTanh": lambda act: "gelu_tanh",
    "QuickGELU": lambda act: "quick_gelu",
    "SiLU": lambda act: "silu",
    "ReLU": lambda act: "relu",
    "Sigmoid": lambda act: "sigmoid",
}


def _create(name: str, pretrained: bool, model_args: dict[str, Any]) -> Any:
    """timm's model ``name``, its errors in our words."""
    try:
        import timm
    except ImportError as error:
        raise MissingError('timm is not installed; run `pip install "vitprune[prune]"`') from error
    if ":" not in name:  # hf-hub:... and local-dir:... are looked up by timm
        _check_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except (OSError, RuntimeError) as error:
        if pretrained:
            reason = str(error).splitlines()[0]
            way_out = "name a checkpoint file instead"
            raise MissingError(f"timm's weights of {name} cannot be had ({reason}); {way_out}") from error
        raise InputError(f"timm cannot make {name} with {model_args}: {error}") from error
    except (TypeError, AssertionError, ValueError) as error:
        raise InputError(f"timm cannot make {name} with {model_args}: {error}") from error


def _check_name(name: str) -> None:
    """Raise InputError for an architecture, or for a tag of its weights, that timm does not have."""
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        known = [n for module in ("vision_transformer", "deit") for n in timm.list_models(module=module)]
    else:
        known = [architecture, *timm.list_models(f"{architecture}.*", pretrained=True)]
    if name in known:
        return
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise InputError(f"timm {timm.__version__} has no model {name!r}{hint}")


def _timm_layout(weights: Mapping[str, Tensor], module: Any) -> Weights:
    """``weights`` in the names and sizes that timm's ``module`` expects: original DeiT, DINOv2 and CLIP files too."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    try:
        return dict(checkpoint_filter_fn(dict(weights), module, adapt_layer_scale=True))
    except (RuntimeError, KeyError, ValueError, IndexError, AttributeError):
        return dict(weights)  # of another model, as the comparison by name and shape will tell better than timm


def _data_config(module: Any, config: VitConfig) -> dict[str, Any]:
    """What timm's evaluation transform needs to know, with the image size of this very model."""
    from timm.data import resolve_model_data_config

    data = resolve_model_data_config(module)
    for name in ("mean", "std"):
        if len(data[name]) != config.channels:
            data[name] = [sum(data[name]) / len(data[name])] * config.channels
    data["input_size"] = (config.channels, *config.image_size)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def _class_names(module: Any, config: VitConfig) -> list[str] | None:
    """WordNet ids of an ImageNet model's outputs."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module) if config.classes else None
    return ImageNetInfo(subset).label_names() if subset else None
