"""A Vision Transformer in which every block may have its own heads, head sizes, MLP width and token reduction.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929, with the variants that
timm's ``vision_transformer`` and ``deit`` modules know. Differs from timm's code: the token state is passed on as a
value, one Linear computes q, k and v of whatever sizes, the softmax scale is a number of the block's own, so that it
stays that of the original head size after pruning, and the prefix tokens carry their position embedding in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .config import BlockConfig, VitConfig
from .resample import resample_grid
from .state import AttentionView, TokenState, wide


class Attention(nn.Module):
    """Multi-head self-attention whose heads may be few, and whose values may have another size than its keys.

    Rows of ``qkv`` and columns of ``proj`` are ordered by head: all heads' queries, all keys, all values.
    """

    def __init__(self, config: VitConfig, block: BlockConfig) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim, self.scale = block.heads, block.qk_dim, block.v_dim, block.scale
        self.sizes = [block.heads * size for size in (block.qk_dim, block.qk_dim, block.v_dim)]
        self.qkv = nn.Linear(config.dim, sum(self.sizes), bias=config.qkv_bias)
        self.q_norm = make_norm(config, block.qk_dim) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, block.qk_dim) if config.qk_norm else nn.Identity()
        self.norm = make_norm(config, self.sizes[2]) if config.attn_norm else nn.Identity()
        self.proj = nn.Linear(self.sizes[2], config.dim, bias=config.proj_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, H, N, D] and values [B, H, N, V] of ``x`` [B, N, C]."""
        q, k, v = (_split_heads(part, self.heads) for part in self.qkv(x).split(self.sizes, dim=-1))
        return self.q_norm(q), self.k_norm(k), v

    # slices of the weights, not a split of what all of them give: the exporter makes weights of their own of these

    def queries(self, x: Tensor) -> Tensor:
        """Queries [B, H, N, D] alone."""
        rows = self.sizes[0]
        q = F.linear(x, self.qkv.weight[:rows], None if self.qkv.bias is None else self.qkv.bias[:rows])
        return self.q_norm(_split_heads(q, self.heads))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, H, N, D] and values [B, H, N, V] alone."""
        rows = self.sizes[0]
        both = F.linear(x, self.qkv.weight[rows:], None if self.qkv.bias is None else self.qkv.bias[rows:])
        k, v = (_split_heads(part, self.heads) for part in both.split(self.sizes[1:], dim=-1))
        return self.k_norm(k), v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, policy: Tensor | None = None) -> Tensor:
        """What each query reads, projected, [B, N, C]; ``bias`` [B, 1, 1, N] is added to the scaled logits.

        ``policy`` [B, N, 1]: tokens are read as far as it says, and each by itself; see ``policy_softmax``.
        """
        if policy is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            logits = q @ k.transpose(-2, -1) * self.scale
            out = policy_softmax(logits if bias is None else logits + bias, policy) @ v
        return self.proj(self.norm(out.transpose(1, 2).flatten(2)))


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax of ``logits`` [B, H, Q, N] over the tokens that ``policy`` [B, N, 1] keeps, and each of the Q itself.

    The first Q tokens ask. What a training attends with that only marks the tokens it would remove: smooth in the
    policy, and what is removed is not read. Rao et al., DynamicViT, NeurIPS 2021, https://arxiv.org/abs/2106.02034,
    equation 11 with the ``eps`` of the official code.
    """
    queries, tokens = logits.shape[-2:]
    itself = torch.eye(queries, tokens, dtype=policy.dtype, device=policy.device)
    read = policy[:, None].transpose(-2, -1) * (1 - itself) + itself
    weights = (wide(logits) - wide(logits).amax(-1, keepdim=True)).exp() * read
    return ((weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps)).to(logits.dtype)


class Mlp(nn.Module):
    """Two linear layers around an activation. Rows of a gated ``fc1``: first all gates, then all values."""

    def __init__(self, config: VitConfig, width: int) -> None:
        super().__init__()
        self.gated = config.gated
        self.fc1 = nn.Linear(config.dim, width * (2 if config.gated else 1), bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.activation]()
        self.norm = make_norm(config, width) if config.mlp_norm else nn.Identity()
        self.fc2 = nn.Linear(width, config.dim, bias=config.mlp_bias)

    def hidden(self, x: Tensor) -> Tensor:
        """What ``fc2`` reads, [B, N, F]."""
        x = self.fc1(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            return self.norm(self.act(gate) * value)
        return self.norm(self.act(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


class LayerScale(nn.Module):
    """A learned factor per channel.

    Touvron et al., Going deeper with Image Transformers, ICCV 2021, https://arxiv.org/abs/2103.17239.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention, token reduction, MLP; each of them may be absent. The norms stand in front of the halves."""

    def __init__(self, config: VitConfig, block: BlockConfig, reducer: nn.Module | None) -> None:
        super().__init__()
        self.attn: Any = Attention(config, block) if block.heads else None
        self.norm1 = make_norm(config) if block.heads else nn.Identity()
        self.ls1 = LayerScale(config.dim) if block.heads and config.layer_scale else nn.Identity()
        self.mlp: Any = Mlp(config, block.mlp) if block.mlp else None
        self.norm2 = make_norm(config) if block.mlp else nn.Identity()
        self.ls2 = LayerScale(config.dim) if block.mlp and config.layer_scale else nn.Identity()
        self.reducer: Any = reducer
        self.prefix_only = block.patches == 0
        self.keep, self.reference = block.patches or None, config.patches

    def forward(self, state: TokenState) -> TokenState:
        """The tokens that leave this block."""
        left = self.mix(state, self.kept(state))
        return left if self.mlp is None else left._replace(x=left.x + self.feed(left.x))

    def kept(self, state: TokenState) -> int | None:
        """Patch tokens that the block's token method leaves; None where it has none."""
        if self.keep is None:
            return None if self.reducer is None else self.reducer.keep_anyway(state)
        # The plan's share of the image's patches, rounded up: never 0, never above the share of an earlier block, and
        # half of it is never less than half of what entered. Does not depend on the counts of earlier blocks:
        # expressions for symbolic sizes would double in length from block to block.
        return (state.patches * self.keep + self.reference - 1) // self.reference

    def mix(self, state: TokenState, keep: int | None) -> TokenState:
        """The attention half with its residual, and the token method, which leaves ``keep`` patches; None: all."""
        where = None if keep is None else self.reducer.where
        if where == "before":
            state = self.reducer(state, None, keep)
        if self.attn is None:
            return self.treated(state)
        left, out, attention = self.attend(state, keep if where == "q_rows" else None)
        left = left._replace(x=left.x + out)
        if self.reducer is not None and self.reducer.watches:
            left = self.reducer.watch(left, attention)
        return self.reducer(left, attention, keep) if where == "after" else left

    def treated(self, state: TokenState) -> TokenState:
        """The tokens that the block computes anew."""
        return state.select(lambda tokens: tokens[:, : state.prefix]) if self.prefix_only else state

    def attend(self, state: TokenState, asking: int | None = None) -> tuple[TokenState, Tensor, AttentionView]:
        """The tokens that ask, what attention adds to them, [B, N, C], and what it saw.

        ``asking``: so many patches ask, which the token method chooses; the others are but read.
        """
        x, bias, attn = self.read(state.x), size_bias(state), self.attn
        if asking is None and not self.prefix_only:
            left, (q, k, v) = state, attn.project(x)
        else:
            k, v = attn.keys_values(x)
            left, some = self.treated(state), x[:, : state.prefix]
            if asking is not None:
                left = self.reducer(state, AttentionView(attn.queries(some), k, v, attn.scale, bias), asking)
                some = self.read(left.x)
            q = attn.queries(some)
        return left, self.write(attn(q, k, v, bias, state.policy)), AttentionView(q, k, v, attn.scale, bias)

    def read(self, x: Tensor) -> Tensor:
        """What attention reads of the tokens ``x`` [B, N, C]."""
        return self.norm1(x)

    def write(self, out: Tensor) -> Tensor:
        """What is added to the tokens of attention's result ``out`` [B, N, C]."""
        return self.ls1(out)

    def feed(self, x: Tensor) -> Tensor:
        """What the MLP adds to the tokens ``x``, [B, N, C]."""
        return self.ls2(self.mlp(self.norm2(x)))


class PostNormBlock(Block):
    """A block whose norms stand behind its halves."""

    def read(self, x: Tensor) -> Tensor:
        return x

    def write(self, out: Tensor) -> Tensor:
        return self.ls1(self.norm1(out))

    def feed(self, x: Tensor) -> Tensor:
        return self.ls2(self.norm2(self.mlp(x)))


class ParallelBlock(Block):
    """A block whose MLP reads what its attention reads; tokens are reduced in front of both, or behind both.

    Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters, ICML 2023, https://arxiv.org/abs/2302.05442.
    """

    def forward(self, state: TokenState) -> TokenState:
        return super().forward(state) if self.attn is None else self.mix(state, self.kept(state))

    def attend(self, state: TokenState, asking: int | None = None) -> tuple[TokenState, Tensor, AttentionView]:
        left, out, attention = super().attend(state, asking)
        return left, out if self.mlp is None else out + self.feed(left.x), attention


class AttentionPool(nn.Module):
    """One feature from all tokens: attention with a learned query, then an MLP. Known as map pooling.

    Zhai et al., Scaling Vision Transformers, CVPR 2022, https://arxiv.org/abs/2106.04560. Differs from timm's code:
    the projected query is the parameter, since it depends on no image.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.pool_heads
        self.query = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.kv = nn.Linear(config.dim, 2 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.norm = make_norm(config)
        self.mlp = Mlp(replace(config, gated=False, mlp_bias=True, mlp_norm=False), config.pool_mlp)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Feature [B, C] of tokens ``x`` [B, N, C]; ``bias`` [B, 1, 1, N] is added to the scaled logits."""
        query = self.query.expand(x.shape[0], -1, -1)
        q, k, v = (_split_heads(part, self.heads) for part in (query, *self.kv(x).chunk(2, dim=-1)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        out = self.proj(out)
        return (out + self.mlp(self.norm(out)))[:, 0]


class Vit(nn.Module):
    """The model: patches and prefix tokens, blocks, norm, pooling, head.

    Args:
        config: the architecture.
        reducers: the token method's module for each block whose config reduces tokens, by block index.
    """

    def __init__(self, config: VitConfig, reducers: Mapping[int, nn.Module] | None = None) -> None:
        super().__init__()
        reducers = reducers or {}
        self.config = config
        self.patch_embed = nn.Conv2d(
            config.channels, config.dim, config.patch_size, config.patch_size, bias=config.embed_bias
        )
        self.embed_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.prefix_tokens = nn.Parameter(torch.zeros(1, config.prefix, config.dim)) if config.prefix else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches, config.dim)) if config.pos_embed else None
        self.norm_pre = make_norm(config) if config.pre_norm else nn.Identity()
        kind = {"pre": Block, "post": PostNormBlock, "parallel": ParallelBlock}[config.residual]
        self.blocks = nn.ModuleList(kind(config, b, reducers.get(i)) for i, b in enumerate(config.blocks))
        self.norm = make_norm(config) if config.final_norm != "none" else nn.Identity()
        self.pool = AttentionPool(config) if config.pool == "map" else None
        self.head = _make_head(config)
        self.head_dist = _make_head(config) if config.distilled else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes], or features [B, C], of normalised ``images`` [B, channels, height, width]."""
        return self.classify(self.tokens(images))

    def tokens(self, images: Tensor) -> TokenState:
        """The tokens that leave the last block. Raises as ``embed``."""
        state = self.embed(images)
        for block in self.blocks:
            state = block(state)
        return state

    def embed(self, images: Tensor) -> TokenState:
        """The tokens that enter the first block.

        Raises:
            InputError: the images have another size, and the config does not say ``dynamic_image_size``.
        """
        config = self.config
        if not config.dynamic_image_size and tuple(images.shape[-2:]) != config.image_size:
            got, want = ("x".join(map(str, size)) for size in (images.shape[-2:], config.image_size))
            raise InputError(f"images are {got} pixels, the model takes {want}; other sizes need dynamic_image_size")
        x = self.patch_embed(images)
        height, width = x.shape[-2:]
        x = self.embed_norm(x.flatten(2).transpose(1, 2))
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, height, width)
        if self.prefix_tokens is not None:
            x = torch.cat([self.prefix_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        return TokenState(self.norm_pre(x), config.prefix, height * width)

    def classify(self, state: TokenState) -> Tensor:
        """Logits [B, classes], or features [B, C], from the tokens that leave the last block."""
        if self.head_dist is not None:
            x = self.norm(state.x[:, :2])
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        if self.config.pool == "token":  # the norm works token by token: the others need none
            return self.head(self.norm(state.x[:, 0]))
        if self.config.final_norm == "pooled":
            return self.head(self.norm(self._pool(state)))
        state = state.unparked()  # parked tokens are normalised as the others are
        return self.head(self._pool(state._replace(x=self.norm(state.x))))

    def _positions(self, embedding: Tensor, height: int, width: int) -> Tensor:
        """Position embedding [1, P, C] of a grid of patches."""
        if not self.config.dynamic_image_size:
            return embedding
        return resample_grid(embedding, self.config.grid, (height, width))

    def _pool(self, state: TokenState) -> Tensor:
        """One feature [B, C] of all tokens; a token that stands for several patches counts as often."""
        state = state.unparked()
        first = 0 if self.config.pool_prefix else state.prefix
        x, size = state.x[:, first:], None if state.size is None else state.size[:, first:]
        if self.pool is not None:
            return self.pool(x, size_bias(state._replace(size=size)))
        mean = x.mean(dim=1) if size is None else (x * size).sum(dim=1) / size.sum(dim=1)
        if self.config.pool == "avg":
            return mean
        return x.amax(dim=1) if self.config.pool == "max" else (x.amax(dim=1) + mean) / 2


class QuickGelu(nn.Module):
    """The sigmoid approximation of GELU that CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGelu,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
}


def make_norm(config: VitConfig, size: int | None = None) -> nn.Module:
    """A normalisation of vectors of ``size``; by default, of the residual stream."""
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm]
    return kind(size or config.dim, eps=config.norm_eps)


def fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and values of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def size_bias(state: TokenState) -> Tensor | None:
    """The logarithm of the token sizes, as attention adds it to the logits of its keys: [B, 1, 1, N]."""
    return None if state.size is None or not state.counted else state.size.log().squeeze(-1)[:, None, None]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] as [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _make_head(config: VitConfig) -> nn.Module:
    return nn.Linear(config.dim, config.classes) if config.classes else nn.Identity()
