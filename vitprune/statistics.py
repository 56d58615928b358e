"""What importance criteria ask for, from passes over images: second moments, and gradients at gates.

Both work block by block, so that memory does not grow with depth: the moments keep the tokens that enter one block
and those that leave it, the gradients the tokens that enter each block, for one batch of images at a time.

A half is a block's attention (``attn``, units: heads) or its MLP (``mlp``, units: hidden units). Its units are groups
of consecutive columns of the Linear that writes to the residual stream, ``proj`` or ``fc2``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def unit_sizes(block: Block) -> dict[Half, int]:
    """Columns of ``out_layers`` that belong to one unit."""
    sizes: dict[Half, int] = {} if block.attn is None else {"attn": block.attn.v_dim}
    return sizes if block.mlp is None else {**sizes, "mlp": 1}


@torch.no_grad()
def stream_blocks(model: Vit, images: Tensor, *, moments: bool) -> Iterator[BlockPass]:
    """Each block in turn, with the tokens that enter it and, where asked for, its second moments.

    The model may be changed between two steps if it is restored before the next one: a block is run before it is
    handed out.
    """
    states = [model.embed(batch) for batch in batches(model, images)]
    for number, block in enumerate(blocks_of(model)):
        sums: dict[Half, Tensor] = {}
        tokens: dict[Half, int] = {}
        leaving = []
        for state in states:
            with captured_inputs(block) as seen:
                leaving.append(block(state))
            for half, x in seen.items() if moments else ():
                flat = x.flatten(0, -2)
                sums[half] = sums.get(half, 0) + (flat.T @ flat).double()
                tokens[half] = tokens.get(half, 0) + len(flat)
        yield BlockPass(number, states, {half: total / tokens[half] for half, total in sums.items()})
        states = leaving


@contextmanager
def captured_inputs(block: Block) -> Iterator[dict[Half, Tensor]]:
    """While open, what the Linear of each half read last: [B, N, H D] for ``attn``, [B, N, F] for ``mlp``."""
    seen: dict[Half, Tensor] = {}

    def watch(half: Half) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[half] = inputs[0]

        return keep

    handles = [layer.register_forward_pre_hook(watch(half)) for half, layer in out_layers(block).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(
    model: Vit, images: Tensor, *, seed: int = 0, progress: Progress | None = None
) -> list[dict[Half, Tensor]]:
    """Gradient of the loss of each image at a gate of 1 on every unit: per block and half, [M, units].

    The loss is the negative log-likelihood of an output drawn from the model's own distribution: a label from the
    softmax or, for models without classifier, features with Gaussian noise. The gradient of the KL to one's own
    output would be zero; this one is the score whose mean square is the Fisher information, and it needs no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[dict[Half, Tensor]]] = []
    done = 0
    for batch in batches(model, images):
        parts.append(_batch_gates(model, batch, generator))
        done += len(batch)
        if progress is not None:
            progress(done, len(images), "gradients at gates")
    joined: list[dict[Half, Tensor]] = []
    for per_block in zip(*parts, strict=True):
        joined.append({half: torch.cat([part[half] for part in per_block]) for half in per_block[0]})
    return joined


def _batch_gates(model: Vit, images: Tensor, generator: torch.Generator) -> list[dict[Half, Tensor]]:
    """``gate_gradients`` of one batch: forward keeping what enters each block, backward running each block again."""
    states = []
    with torch.no_grad():
        state = model.embed(images)
        for block in model.blocks:
            states.append(state)
            state = block(state)
    gates: list[dict[Half, Tensor]] = []
    with torch.enable_grad():
        x = state.x.detach().requires_grad_()
        loss = _own_loss(model, model.classify(state._replace(x=x)), generator)
        (slope,) = torch.autograd.grad(loss, x)
        for block, entering in zip(reversed(blocks_of(model)), reversed(states), strict=True):
            found, slope = _block_gates(block, entering, slope)
            gates.append(found)
    return gates[::-1]


def _block_gates(block: Block, entering: TokenState, slope: Tensor) -> tuple[dict[Half, Tensor], Tensor]:
    """Gate gradients of one block, and the gradient at its input, from ``slope`` at its output."""
    sizes = unit_sizes(block)
    if not sizes:
        return {}, slope
    x = entering.x.detach().requires_grad_()
    with captured_inputs(block) as seen:
        leaving = block(entering._replace(x=x))
    slopes = torch.autograd.grad(leaving.x, [x, *seen.values()], slope)
    gates = {}
    for (half, value), gradient in zip(seen.items(), slopes[1:], strict=True):
        columns = (value.detach() * gradient).sum(1)
        gates[half] = columns.unflatten(-1, (-1, sizes[half])).sum(-1)
    return gates, slopes[0]


def _own_loss(model: Vit, output: Tensor, generator: torch.Generator) -> Tensor:
    """Summed negative log-likelihood of outputs drawn from the model's own distribution (see ``gate_gradients``)."""
    if not model.config.classes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return -(F.normalize(output, dim=-1) * noise).sum()
    shares = output.detach().softmax(-1).cpu()
    labels = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(output.device)
    return F.cross_entropy(output, labels, reduction="sum")
