"""What importance criteria ask for, from passes over images: moments and activations, and gradients at gates.

Both work block by block, so that memory does not grow with depth: the first keep the tokens that enter one block and
those that leave it, the gradients the tokens that enter each block, for one batch of images at a time.

A half is a block's attention (``attn``, units: heads) or its MLP (``mlp``, units: hidden units). Its units are groups
of consecutive columns of the Linear that writes to the residual stream, ``proj`` or ``fc2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done

ELEMENTS_PER_BATCH = 1 << 22  # hidden activations of one batch: 16 MiB in fp32 stay near the cores


class BlockPass(NamedTuple):
    """What one block saw of the images."""

    number: int  # of the block
    entering: list[TokenState]  # the tokens that enter the block, batch after batch
    moments: dict[Half, Tensor]  # [F, F] mean of x x^T over all tokens x that the half's Linear read, in fp64
    activations: dict[Half, Tensor]  # [M, F] mean of |x| over the tokens of each image
    influence: float | None  # mean of 1 - cosine between a token in front of the block and behind it


class BlockGates(NamedTuple):
    """Gradients of the loss of each image at gates of 1 on the units of one block, by half: [M, units]."""

    writing: dict[Half, Tensor]  # a gate on what the unit gives to the Linear that writes
    reading: dict[Half, Tensor]  # a gate on all weights and biases that the unit reads with


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
    model: Vit, images: Tensor, *, moments: bool = False, activations: bool = False, influence: bool = False
) -> Iterator[BlockPass]:
    """Each block in turn, with the tokens that enter it and what else of ``BlockPass`` was asked for.

    The model may be changed between two steps if it is restored before the next one: a block is run before it is
    handed out.
    """
    states = [model.embed(batch) for batch in batches(model, images)]
    for number, block in enumerate(blocks_of(model)):
        sums: dict[Half, Tensor] = {}
        tokens: dict[Half, int] = {}
        means: dict[Half, list[Tensor]] = {}
        leaving = []
        for state in states:
            with captured_inputs(block) as seen:
                leaving.append(block(state))
            for half, x in seen.items():
                if activations:
                    means.setdefault(half, []).append(x.abs().mean(1))
                if moments:
                    flat = x.flatten(0, -2)
                    sums[half] = sums.get(half, 0) + (flat.T @ flat).double()
                    tokens[half] = tokens.get(half, 0) + len(flat)
        yield BlockPass(
            number,
            states,
            {half: total / tokens[half] for half, total in sums.items()},
            {half: torch.cat(parts) for half, parts in means.items()},
            _influence(states, leaving) if influence else None,
        )
        states = leaving


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
def _captured_outputs(block: Block) -> Iterator[dict[Half, Tensor]]:
    """While open, what the Linear gave last through which each half reads: [B, N, rows]."""
    seen: dict[Half, Tensor] = {}

    def watch(half: Half) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen[half] = output

        return keep

    with _hooked([layer.register_forward_hook(watch(half)) for half, layer in in_layers(block).items()]):
        yield seen


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """The hooks are gone when closed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def whole_last_block(model: Vit) -> Iterator[None]:
    """Inside, the last block is computed for all tokens, which changes no answer."""
    last: Any = model.blocks[-1]
    before, last.prefix_only = last.prefix_only, False
    try:
        yield
    finally:
        last.prefix_only = before


def gate_gradients(model: Vit, images: Tensor, *, seed: int = 0, progress: Progress | None = None) -> Gates:
    """Gradient of the loss of each image at a gate of 1 on every unit, by block and half.

    The loss is the negative log-likelihood of an output drawn from the model's own distribution: a label from the
    softmax or, for models without classifier, features with Gaussian noise. The gradient of the KL to one's own
    output would be zero; this one is the score whose mean square is the Fisher information, and it needs no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[BlockGates]] = []
    labels: list[Tensor] = []
    done = 0
    with whole_last_block(model):
        for batch in batches(model, images):
            gates, drawn = _batch_gates(model, batch, generator)
            parts.append(gates)
            labels += [] if drawn is None else [drawn]
            done += len(batch)
            if progress is not None:
                progress(done, len(images), "gradients at gates")
    blocks = [BlockGates(*(_joined(rows) for rows in zip(*some, strict=True))) for some in zip(*parts, strict=True)]
    return Gates(blocks, torch.cat(labels) if labels else None)


def _joined(parts: Sequence[dict[Half, Tensor]]) -> dict[Half, Tensor]:
    return {half: torch.cat([part[half] for part in parts]) for half in parts[0]}


def _batch_gates(
    model: Vit, images: Tensor, generator: torch.Generator
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
        x = state.x.detach().requires_grad_()
        loss, labels = _own_loss(model, model.classify(state._replace(x=x)), generator)
        (slope,) = torch.autograd.grad(loss, x)
        for block, entering in zip(reversed(blocks_of(model)), reversed(states), strict=True):
            found, slope = _block_gates(block, entering, slope)
            gates.append(found)
    return gates[::-1], labels


def _block_gates(block: Block, entering: TokenState, slope: Tensor) -> tuple[BlockGates, Tensor]:
    """Gate gradients of one block, and the gradient at its input, from ``slope`` at its output."""
    sizes = unit_sizes(block)
    if not sizes:
        return BlockGates({}, {}), slope
    x = entering.x.detach().requires_grad_()
    with captured_inputs(block) as written, _captured_outputs(block) as read:
        leaving = block(entering._replace(x=x))
    values = [*written.values(), *read.values()]
    slopes = torch.autograd.grad(leaving.x, [x, *values], slope)
    columns = [(value.detach() * gradient).sum(1) for value, gradient in zip(values, slopes[1:], strict=True)]
    writing = {
        half: some.unflatten(-1, (-1, sizes[half])).sum(-1) for half, some in zip(written, columns, strict=False)
    }
    reading = {
        half: by_unit(block, half, some).sum(-1) for half, some in zip(read, columns[len(written) :], strict=True)
    }
    return BlockGates(writing, reading), slopes[0]


def _own_loss(model: Vit, output: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Summed negative log-likelihood of outputs drawn from the model's own distribution (see ``gate_gradients``)."""
    if not model.config.classes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return -(F.normalize(output, dim=-1) * noise).sum(), None
    shares = output.detach().softmax(-1).cpu()
    labels = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(output.device)
    return F.cross_entropy(output, labels, reduction="sum"), labels
