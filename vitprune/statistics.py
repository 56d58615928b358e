"""What importance criteria ask for, from passes over images: second moments, and gradients at gates.

Both work block by block, so that memory does not grow with depth: the moments keep the tokens that enter one block
and those that leave it, the gradients the tokens that enter each block, for one batch of images at a time.

A half is a block's attention (``attn``, units: heads) or its MLP (``mlp``, units: hidden units). Its units are groups
of consecutive columns of the Linear that writes to the residual stream, ``proj`` or ``fc2``. Within the heads there are
units of two more kinds: a dim of a head's values (``v``) is one column of ``proj``; a dim of its queries and keys
(``qk``) is one index of both, which meet in a product.
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
Kind = Literal["attn", "mlp", "qk", "v"]
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being done

ELEMENTS_PER_BATCH = 1 << 22  # hidden activations of one batch: 16 MiB in fp32 stay near the cores


class BlockPass(NamedTuple):
    """What one block saw of the images."""

    number: int  # of the block
    entering: list[TokenState]  # the tokens that enter the block, batch after batch
    moments: dict[Half, Tensor]  # [F, F] mean of x x^T over all tokens x that the half's Linear read, in fp64
    products: Tensor | None = (
        None  # [H, D, D] mean of (q^T q) * (k^T k) over pairs of tokens, in fp64; see ``_products``
    )


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
def stream_blocks(model: Vit, images: Tensor, *, moments: bool, dims: bool = False) -> Iterator[BlockPass]:
    """Each block in turn, with the tokens that enter it and, where asked for, its second moments.

    ``dims``: with those of the products of queries and keys, where ``moments`` are asked for.

    The model may be changed between two steps if it is restored before the next one: a block is run before it is
    handed out.
    """
    states = [model.embed(batch) for batch in batches(model, images)]
    for number, block in enumerate(blocks_of(model)):
        sums: dict[Half, Tensor] = {}
        tokens: dict[Half, int] = {}
        products: list[Tensor] = []
        leaving = []
        for state in states:
            with captured_inputs(block) as seen, captured_products(block) as pair:
                leaving.append(block(state))
            for half, x in seen.items() if moments else ():
                flat = x.flatten(0, -2)
                sums[half] = sums.get(half, 0) + (flat.T @ flat).double()
                tokens[half] = tokens.get(half, 0) + len(flat)
            if moments and dims and block.attn is not None:
                products.append(_products(pair["q"], pair["k"]))
        means = {half: total / tokens[half] for half, total in sums.items()}
        yield BlockPass(number, states, means, torch.cat(products).mean(0) if products else None)
        states = leaving


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

    handles = [layer.register_forward_pre_hook(watch(half)) for half, layer in out_layers(block).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_products(block: Block) -> Iterator[dict[str, Tensor]]:
    """While open, the queries ``q`` and keys ``k`` that met last, [B, H, N, D]; empty for a block without attention."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output

        return keep

    norms = {} if block.attn is None else {"q": block.attn.q_norm, "k": block.attn.k_norm}
    handles = [norm.register_forward_hook(watch(name)) for name, norm in norms.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(
    model: Vit, images: Tensor, *, dims: bool = False, seed: int = 0, progress: Progress | None = None
) -> list[dict[Kind, Tensor]]:
    """Gradient of the loss of each image at a gate of 1 on every unit: per block and kind, [M, units].

    The loss is the negative log-likelihood of an output drawn from the model's own distribution: a label from the
    softmax or, for models without classifier, features with Gaussian noise. The gradient of the KL to one's own
    output would be zero; this one is the score whose mean square is the Fisher information, and it needs no labels.

    Args:
        dims: also at the dims of queries and keys, where the gate is on their product, and of values.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[dict[Kind, Tensor]]] = []
    done = 0
    for batch in batches(model, images):
        parts.append(_batch_gates(model, batch, generator, dims))
        done += len(batch)
        if progress is not None:
            progress(done, len(images), "gradients at gates")
    joined: list[dict[Kind, Tensor]] = []
    for per_block in zip(*parts, strict=True):
        joined.append({kind: torch.cat([part[kind] for part in per_block]) for kind in per_block[0]})
    return joined


def _batch_gates(model: Vit, images: Tensor, generator: torch.Generator, dims: bool) -> list[dict[Kind, Tensor]]:
    """``gate_gradients`` of one batch: forward keeping what enters each block, backward running each block again."""
    states = []
    with torch.no_grad():
        state = model.embed(images)
        for block in model.blocks:
            states.append(state)
            state = block(state)
    gates: list[dict[Kind, Tensor]] = []
    with torch.enable_grad():
        x = state.x.detach().requires_grad_()
        loss = _own_loss(model, model.classify(state._replace(x=x)), generator)
        (slope,) = torch.autograd.grad(loss, x)
        for block, entering in zip(reversed(blocks_of(model)), reversed(states), strict=True):
            found, slope = _block_gates(block, entering, slope, dims)
            gates.append(found)
    return gates[::-1]


def _block_gates(block: Block, entering: TokenState, slope: Tensor, dims: bool) -> tuple[dict[Kind, Tensor], Tensor]:
    """Gate gradients of one block, and the gradient at its input, from ``slope`` at its output."""
    sizes = unit_sizes(block)
    if not sizes:
        return {}, slope
    x = entering.x.detach().requires_grad_()
    with captured_inputs(block) as seen, captured_products(block) as pair:
        leaving = block(entering._replace(x=x))
    queries = [pair["q"]] if dims and pair else []
    slopes = torch.autograd.grad(leaving.x, [x, *seen.values(), *queries], slope)
    gates: dict[Kind, Tensor] = {}
    for (half, value), gradient in zip(seen.items(), slopes[1:], strict=False):
        columns = (value.detach() * gradient).sum(1)
        gates[half] = columns.unflatten(-1, (-1, sizes[half])).sum(-1)
        if dims and half == "attn":
            gates["v"] = columns
    for q in queries:
        gates["qk"] = (q.detach() * slopes[-1]).sum(-2).flatten(1)
    return gates, slopes[0]


def _own_loss(model: Vit, output: Tensor, generator: torch.Generator) -> Tensor:
    """Summed negative log-likelihood of outputs drawn from the model's own distribution (see ``gate_gradients``)."""
    if not model.config.classes:
        noise = torch.randn(output.shape, generator=generator).to(output)
        return -(F.normalize(output, dim=-1) * noise).sum()
    shares = output.detach().softmax(-1).cpu()
    labels = torch.multinomial(shares, 1, generator=generator).squeeze(1).to(output.device)
    return F.cross_entropy(output, labels, reduction="sum")
