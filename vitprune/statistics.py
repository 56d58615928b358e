"""What importance criteria ask for, from passes over images: moments and activations, and gradients at gates.

Both work block by block, so that memory does not grow with depth: the first keep the tokens that enter one block and
those that leave it, the gradients the tokens that enter each block, for one batch of images at a time.

A half is a block's attention (``attn``, units: heads) or its MLP (``mlp``, units: hidden units). Its units are groups
of consecutive columns of the Linear that writes to the residual stream, ``proj`` or ``fc2``. Within the heads there are
units of two more kinds: a dim of a head's values (``v``) is one column of ``proj``; a dim of its queries and keys
(``qk``) is one index of both, which meet in a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .model.config import VitConfig
from .model.state import TokenState
from .model.vit import Block, Vit

Half = Literal["attn", "mlp"]
Kind = Literal["attn", "mlp", "qk", "v"]
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done

ELEMENTS_PER_BATCH = 1 << 22  # hidden activations of one batch: 16 MiB in fp32 stay near the cores


class BlockPass(NamedTuple):
    """What one block saw of the images."""

    number: int  # of the block
    entering: list[TokenState]  # the tokens that enter the block, batch after batch
    moments: dict[Half, Tensor]  # [F, F] mean of x x^T over all tokens x that the half's Linear read, in fp64
    activations: dict[Half, Tensor]  # [M, F] mean of |x| over the tokens of each image
    influence: float | None  # mean of 1 - cosine between a token in front of the block and behind it
    products: Tensor | None  # [H, D, D] mean of (q^T q) * (k^T k) over pairs of tokens, in fp64; see ``_products``


class BlockGates(NamedTuple):
    """Gradients of the loss of each image at gates of 1 on the units of one block, by kind: [M, units]."""

    writing: dict[Kind, Tensor]  # on what the unit gives to the Linear that writes; on the product of a query and a key
    reading: dict[Kind, Tensor]  # on all weights and biases that the unit reads with; ``qk``: that its queries do


class Gates(NamedTuple):
    """What ``gate_gradients`` found."""

    blocks: list[BlockGates]
    labels: Tensor | None  # [M] the class that each image's loss was of; None without a classifier


def images_per_batch(config: VitConfig) -> int:
    """How many images to run at once, so that the widest activations of a batch stay small."""
    widest = max([config.dim, *(max(b.mlp, b.heads * b.v_dim) for b in config.blocks)])
    return max(1, ELEMENTS_PER_BATCH // ((config.prefix + config.patches) * widest))


def batches(model: Vit, images: Tensor) -> Iterator[Tensor]:
    """``images`` [M, channels, height, width] in batches, on the model's device."""
    device = next(model.parameters()).device
    for batch in images.split(images_per_batch(model.config)):
        yield batch.to(device)


def blocks_of(model: Vit) -> list[Block]:
    """The model's blocks, typed."""
    return [cast(Block, block) for block in model.blocks]


def out_layers(block: Block) -> dict[Half, nn.Linear]:
    """The Linear of each half that writes to the residual stream; a half that the block lacks is left out."""
    layers: dict[Half, nn.Linear] = {}
    if block.attn is not None:
        layers["attn"] = block.attn.proj
    if block.mlp is not None:
        layers["mlp"] = block.mlp.fc2
    return layers


def in_layers(block: Block) -> dict[Half, nn.Linear]:
    """The Linear of each half that reads the residual stream; a half that the block lacks is left out."""
    layers: dict[Half, nn.Linear] = {} if block.attn is None else {"attn": block.attn.qkv}
    return layers if block.mlp is None else {**layers, "mlp": block.mlp.fc1}


def by_unit(block: Block, half: Half, rows: Tensor) -> Tensor:
    """``rows`` [..., R], one entry per row of the half's ``in_layers``, as [..., units, rows of a unit]."""
    if half == "mlp":
        return rows.unflatten(-1, (-1, block.mlp.fc2.in_features)).transpose(-1, -2)
    parts = rows.split(block.attn.sizes, dim=-1)
    return torch.cat([part.unflatten(-1, (block.attn.heads, -1)) for part in parts], dim=-1)


def unit_sizes(block: Block) -> dict[Half, int]:
    """Columns of ``out_layers`` that belong to one unit."""
    sizes: dict[Half, int] = {} if block.attn is None else {"attn": block.attn.v_dim}
    return sizes if block.mlp is None else {**sizes, "mlp": 1}


@torch.no_grad()
def stream_blocks(
    model: Vit,
    images: Tensor,
    *,
    moments: bool = False,
    activations: bool = False,
    influence: bool = False,
    dims: bool = False,
) -> Iterator[BlockPass]:
    """Each block in turn, with the tokens that enter it and what else of ``BlockPass`` was asked for.

    ``dims``: with the second moments of the products of queries and keys, where ``moments`` are asked for.

    The model may be changed between two steps if it is restored before the next one: a block is run before it is
    handed out.
    """
    states = [model.embed(batch) for batch in batches(model, images)]
    for number, block in enumerate(blocks_of(model)):
        sums = _Sums()
        leaving = []
        for state in states:
            with captured_inputs(block) as seen, captured_products(block) as pair:
                leaving.append(block(state))
            for half, x in seen.items():
                sums.add(half, x, moments, activations)
            if moments and dims and block.attn is not None:
                sums.products = sums.products + _products(pair["q"], pair["k"]).sum(0)
        yield sums.seen(number, states, _influence(states, leaving) if influence else None)
        states = leaving


class _Sums:
    """What is added up over the batches of images that pass a block."""

    def __init__(self) -> None:
        self.moments: dict[Half, Tensor] = {}
        self.tokens: dict[Half, int] = {}
        self.activations: dict[Half, list[Tensor]] = {}
        self.products: Tensor | int = 0

    def add(self, half: Half, x: Tensor, moments: bool, activations: bool) -> None:
        """What the half's Linear read of a batch, [B, N, F]."""
        if activations:
            self.activations.setdefault(half, []).append(x.abs().mean(1))
        if moments:
            flat = x.flatten(0, -2)
            self.moments[half] = self.moments.get(half, 0) + (flat.T @ flat).double()
            self.tokens[half] = self.tokens.get(half, 0) + len(flat)

    def seen(self, number: int, entering: list[TokenState], influence: float | None) -> BlockPass:
        """All of it, as means."""
        return BlockPass(
            number,
            entering,
            {half: total / self.tokens[half] for half, total in self.moments.items()},
            {half: torch.cat(parts) for half, parts in self.activations.items()},
            influence,
            self.products / sum(len(state.x) for state in entering) if torch.is_tensor(self.products) else None,
        )


def _influence(entering: list[TokenState], leaving: list[TokenState]) -> float | None:
    """Mean of 1 - cosine between tokens and what a block made of them; where some were removed, of the prefix.

    None where those were removed that could be compared.
    """
    found = []
    for before, after in zip(entering, leaving, strict=True):
        count = before.prefix if before.x.shape[1] != after.x.shape[1] else before.x.shape[1]
        found.append(1 - F.cosine_similarity(before.x[:, :count].double(), after.x[:, :count].double(), dim=-1))
    compared = torch.cat(found)
    return float(compared.mean()) if compared.numel() else None


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Second moments of the terms q_d k_d of the logits, per image, [B, H, D, D], of q and k [B, H, N, D], in fp64.

    Without the dims S, the mean squared error of all logits q_i k_j is the sum of the entries in S x S. Keys are taken
    without their mean over the tokens: what all keys have in common adds the same to all logits of a query, which the
    softmax does not see.
    """
    k = k - k.mean(dim=-2, keepdim=True)
    of_queries, of_keys = ((x.transpose(-2, -1) @ x).double() / x.shape[-2] for x in (q, k))
    return of_queries * of_keys


@contextmanager
def captured_inputs(block: Block) -> Iterator[dict[Half, Tensor]]:
    """While open, what the Linear of each half read last: [B, N, H D] for ``attn``, [B, N, F] for ``mlp``."""
    seen: dict[Half, Tensor] = {}

    def watch(half: Half) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[half] = inputs[0]

        return keep

    with _hooked([layer.register_forward_pre_hook(watch(half)) for half, layer in out_layers(block).items()]):
        yield seen


@contextmanager
def captured_products(block: Block) -> Iterator[dict[str, Tensor]]:
    """While open, the queries ``q`` and keys ``k`` that met last, [B, H, N, D]; empty for a block without attention."""
    with _captured_outputs({} if block.attn is None else {"q": block.attn.q_norm, "k": block.attn.k_norm}) as seen:
        yield seen


@contextmanager
def _captured_outputs(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """While open, what each of ``modules`` gave last, by its name."""
    seen: dict[Any, Tensor] = {}

    def watch(name: Any) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        return keep

    with _hooked([module.register_forward_hook(watch(name)) for name, module in modules.items()]):
        yield seen


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """The hooks are gone when closed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(state: TokenState) -> list[Tensor]:
    """All features that go on from a block: the tokens', then those of parked ones, which come back later."""
    return [state.x] if state.parked is None else [state.x, state.parked.x]


def detached(state: TokenState) -> tuple[TokenState, list[Tensor]]:
    """``state`` on its own, and its ``features``, in which gradients may be asked for."""
    parts = [part.detach().requires_grad_() for part in features(state)]
    parked = None if state.parked is None else state.parked._replace(x=parts[1])
    return state._replace(x=parts[0], parked=parked), parts


@contextmanager
def whole_last_block(model: Vit) -> Iterator[None]:
    """Inside, the last block is computed for all tokens, which changes no answer."""
    last: Any = model.blocks[-1]
    before, last.prefix_only = last.prefix_only, False
    try:
        yield
    finally:
        last.prefix_only = before


def gate_gradients(
    model: Vit, images: Tensor, *, dims: bool = False, seed: int = 0, progress: Progress | None = None
) -> Gates:
    """Gradient of the loss of each image at a gate of 1 on every unit, by block and kind.

    The loss is the negative log-likelihood of an output drawn from the model's own distribution: a label from the
    softmax or, for models without classifier, features with Gaussian noise. The gradient of the KL to one's own
    output would be zero; this one is the score whose mean square is the Fisher information, and it needs no labels.

    Args:
        dims: also at the dims of queries and keys, where the gate is on their product, and of values.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks: list[BlockGates] = []
    labels: list[Tensor] = []
    done = 0
    with whole_last_block(model):
        for batch in batches(model, images):
            gates, drawn = _batch_gates(model, batch, generator, dims)
            blocks = blocks or [_room(len(images), one) for one in gates]
            for room, one in zip(blocks, gates, strict=True):
                _put(room, one, done)
            labels += [] if drawn is None else [drawn]
            done += len(batch)
            if progress is not None:
                progress(done, len(images), "gradients at gates")
    return Gates(blocks, torch.cat(labels) if labels else None)


def _room(images: int, gates: BlockGates) -> BlockGates:
    """Room for all images, made at once.

    Small tensors kept from each batch would lie between large ones that are freed, and scatter the heap until it holds
    several times what is used.
    """
    return BlockGates(*({kind: one.new_empty(images, *one.shape[1:]) for kind, one in part.items()} for part in gates))


def _put(room: BlockGates, gates: BlockGates, first: int) -> None:
    for whole, part in zip(room, gates, strict=True):
        for kind, one in part.items():
            whole[kind][first : first + len(one)] = one


def _batch_gates(
    model: Vit, images: Tensor, generator: torch.Generator, dims: bool
) -> tuple[list[BlockGates], Tensor | None]:
    """``gate_gradients`` of one batch: forward keeping what enters each block, backward running each block again."""
    states = []
    with torch.no_grad():
        state = model.embed(images)
        for block in model.blocks:
            states.append(state)
            state = block(state)
    gates: list[BlockGates] = []
    with torch.enable_grad():
        state, parts = detached(state)
        loss, labels = _own_loss(model, model.classify(state), generator)
        slopes = torch.autograd.grad(loss, parts, materialize_grads=True)  # a class token's head reads no parked ones
        for block, entering in zip(reversed(blocks_of(model)), reversed(states), strict=True):
            found, slopes = _block_gates(block, entering, slopes, dims)
            gates.append(found)
    return gates[::-1], labels


def _block_gates(
    block: Block, entering: TokenState, slopes: tuple[Tensor, ...], dims: bool
) -> tuple[BlockGates, tuple[Tensor, ...]]:
    """Gate gradients of one block, and the gradients at its input, from ``slopes`` at its output."""
    sizes = unit_sizes(block)
    if not sizes:
        return BlockGates({}, {}), slopes
    entering, parts = detached(entering)
    with (
        captured_inputs(block) as written,
        _captured_outputs(in_layers(block)) as read,
        captured_products(block) as pair,
    ):
        leaving = block(entering)
    queries = [pair["q"]] if dims and pair else []
    values = [*written.values(), *read.values(), *queries]
    found = torch.autograd.grad(features(leaving), [*parts, *values], slopes)
    products = [value.detach() * gradient for value, gradient in zip(values, found[len(parts) :], strict=True)]
    columns = dict(zip(written, (product.sum(1) for product in products), strict=False))
    rows = dict(zip(read, (product.sum(1) for product in products[len(written) :]), strict=False))
    writing: dict[Kind, Tensor] = {h: some.unflatten(-1, (-1, sizes[h])).sum(-1) for h, some in columns.items()}
    reading: dict[Kind, Tensor] = {half: by_unit(block, half, some).sum(-1) for half, some in rows.items()}
    if dims and "attn" in columns:
        writing["v"] = columns["attn"]
    if dims and "attn" in rows:
        reading["qk"], _, reading["v"] = rows["attn"].split(block.attn.sizes, dim=-1)
    for product in products[len(values) - len(queries) :]:
        writing["qk"] = product.sum(-2).flatten(1)
    return BlockGates(writing, reading), found[: len(parts)]


def _own_loss(model: Vit, output: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Summed negative log-likelihood of outputs drawn from the model's own distribution (see ``gate_gradients``)."""
    if not model.config.classes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return -(F.normalize(output, dim=-1) * noise).sum(), None
    shares = output.detach().softmax(-1).cpu()
    labels = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(output.device)
    return F.cross_entropy(output, labels, reduction="sum"), labels
