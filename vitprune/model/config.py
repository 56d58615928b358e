"""The architecture of a ``Vit`` as plain data: written to ``model.json``, readable without torch or timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import InputError


@dataclass(frozen=True)
class BlockConfig:
    """One block. ``heads == 0`` means that it has no attention, ``mlp == 0`` that it has no MLP.

    Attributes:
        heads: attention heads.
        qk_dim: size of a head's queries and keys.
        v_dim: size of a head's values.
        scale: what q k^T is multiplied by; the original model's, whatever has been pruned since.
        mlp: hidden units of the MLP (after the gate, where it has one).
        patches: patch tokens that leave the block at the config's ``patches``; None: all that entered; 0, in the last
            block only: it is computed for the prefix tokens alone, and its attention reads all that entered.
    """

    heads: int
    qk_dim: int
    v_dim: int
    scale: float
    mlp: int
    patches: int | None = None

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class VitConfig:
    """Everything that ``Vit`` needs to be built; what is the same in all blocks stands here once.

    Attributes:
        image_size: height and width that the position embedding belongs to, in pixels.
        patch_size: height and width of a patch, in pixels.
        channels: image channels.
        dim: width of the residual stream.
        classes: outputs of the head; 0: the pooled features are the output.
        class_token, distilled, registers: the prefix tokens, in this order. A distilled model has two heads, one on
            each of the first two tokens, and answers with their mean.
        pos_embed: patches carry a position embedding. That of the prefix tokens is part of these tokens.
        dynamic_image_size: position embeddings are resampled to the image at hand.
        embed_bias: the patch projection has a bias.
        embed_norm: a normalisation of the projected patches, before positions are added.
        pre_norm: a normalisation of all tokens, in front of the first block.
        norm, norm_eps: kind of every normalisation, and what it adds to the variance.
        residual: 'pre': x + f(norm(x)); 'post': x + norm(f(x)); 'parallel': attention and MLP read the same x.
        layer_scale: each half of a block ends in a learned factor per channel.
        qkv_bias, proj_bias, mlp_bias: which linear layers of a block have a bias.
        qk_norm: queries and keys are normalised, head by head.
        attn_norm: what the attention's projection reads is normalised, across the heads.
        gated: the MLP multiplies two projections, the first of them through the activation.
        mlp_norm: what the MLP's second layer reads is normalised.
        pool: how tokens become one feature: the class token, the mean, maximum or both of them, or attention.
        pool_prefix: the prefix tokens take part in the pooling, where it is not by class token.
        pool_heads, pool_mlp: heads and hidden units of attention pooling.
        final_norm: where the last normalisation stands: on the tokens, or on what they were pooled to.
        reducer: token method of the blocks that reduce; None where none does.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dim: int
    classes: int
    blocks: tuple[BlockConfig, ...]
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    pos_embed: bool = True
    dynamic_image_size: bool = False
    embed_bias: bool = True
    embed_norm: bool = False
    pre_norm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    residual: Literal["pre", "post", "parallel"] = "pre"
    layer_scale: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    attn_norm: bool = False
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "sigmoid"] = "gelu"
    gated: bool = False
    mlp_norm: bool = False
    pool: Literal["token", "avg", "max", "avgmax", "map"] = "token"
    pool_prefix: bool = False
    pool_heads: int = 0
    pool_mlp: int = 0
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    reducer: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: class, distillation and register tokens."""
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at ``image_size``."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Patch tokens of an image of ``image_size``."""
        return self.grid[0] * self.grid[1]

    @property
    def reads_prefix_only(self) -> bool:
        """Whether the output depends on the class and distillation tokens alone."""
        return self.distilled or self.pool == "token"

    def with_blocks(self, blocks: list[BlockConfig], reducer: str | None) -> VitConfig:
        """The same model with other blocks."""
        return replace(self, blocks=tuple(blocks), reducer=reducer)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        plain = asdict(self)
        plain |= {name: list(plain[name]) for name in ("image_size", "patch_size", "blocks")}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> VitConfig:
        """The configuration that ``to_dict`` wrote.

        Raises:
            InputError: a key is unknown, missing or has another type.
        """
        known = {field.name for field in fields(cls)}
        unknown = plain.keys() - known
        if unknown:
            raise InputError(f"this is not a model.json: unknown key {sorted(unknown)[0]!r}")
        try:
            values = dict(plain)
            values["blocks"] = tuple(BlockConfig(**block) for block in plain["blocks"])
            for name in ("image_size", "patch_size"):
                values[name] = tuple(plain[name])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise InputError(f"this is not a model.json: {type(error).__name__} {error}") from error


def _check(config: BlockConfig | VitConfig) -> None:
    """Raise InputError for a field whose value is not of its declared type."""
    for name, kind in _types(type(config)).items():  # type: ignore[arg-type]  # mypy takes classes for unhashable
        value = getattr(config, name)
        if not _fits(value, kind):
            choices = " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else None
            raise InputError(f"a model's {name} must be {choices or getattr(kind, '__name__', kind)}, got {value!r}")


@cache
def _types(config: Any) -> dict[str, Any]:
    return get_type_hints(config)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        inner, *more = get_args(kind)
        length_fits = more == [...] or len(more) + 1 == (len(value) if isinstance(value, tuple) else -1)
        return isinstance(value, tuple) and length_fits and all(_fits(item, inner) for item in value)
    if get_args(kind):  # X | None
        return any(_fits(value, choice) for choice in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, kind)
