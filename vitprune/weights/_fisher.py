"""The Fisher information of a layer in blocks of consecutive weights, built by matrix products of gradients.

A few rows at a time: neither the gradients of a whole layer nor its blocks are ever held, so memory does not depend
on the size of the blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .base import LayerView, Pattern, Scoring

CHUNK_BYTES = 1 << 27  # of the gradients of some rows, and of their blocks


class Blocks(NamedTuple):
    """Consecutive blocks of a layer's weights, in fp64."""

    rows: slice  # of the layer
    weights: Tensor  # [n, B]
    gradients: Tensor  # [n, m, B]
    damping: float  # what is added to the diagonal of gradients^T gradients / m

    def fisher(self) -> Tensor:
        """[n, B, B], damped."""
        product = torch.bmm(self.gradients.transpose(1, 2), self.gradients) / self.gradients.shape[1]
        product.diagonal(dim1=1, dim2=2).add_(self.damping)
        return product


@dataclass(frozen=True)
class FisherMethod(Scoring):
    """A method that looks at the Fisher information of blocks of weights.

    Attributes:
        block: weights of a block at least; blocks are equal parts of a row or some whole rows.
        damp_rel: what is added to the diagonal, as a share of the mean diagonal of the layer's Fisher information.
        damp: what is added in place of this, as an absolute number.
        grad_batch: images whose mean gradient counts as one.
    """

    needs = "gradients"
    block: int = 64
    damp_rel: float = 1e-2
    damp: float | None = None
    grad_batch: int = 1

    def __post_init__(self) -> None:
        if self.block < 1 or self.grad_batch < 1 or self.damp_rel < 0 or (self.damp or 0) < 0:
            raise InputError(f"block and grad_batch are 1 or more, damping is 0 or more, got {self}")

    def blocks(self, layer: LayerView, pattern: Pattern) -> Iterator[Blocks]:
        """All of the layer's blocks, in order.

        Raises:
            InputError: there is not one gradient, or no gradient but 0 and so nothing that damping could be a share of.
        """
        size = block_size(self.block, layer.weight, pattern)
        rows_each = max(1, size // layer.weight.shape[1])
        damping = self.damping(layer)
        for rows in row_chunks(layer, self.held(image_count(layer) // self.grad_batch), size, rows_each):
            gradients = layer.gradients(rows, self.grad_batch).double()
            m = len(gradients)
            weights = layer.weight[rows].double().reshape(-1, size)
            yield Blocks(rows, weights, gradients.reshape(m, -1, size).transpose(0, 1), damping)

    def damping(self, layer: LayerView) -> float:
        """What is added to the diagonal of all the layer's blocks."""
        images = image_count(layer)
        if images < self.grad_batch:
            raise InputError(f"{layer.name}: {images} images make no gradient of {self.grad_batch}; give more images")
        if self.damp is not None:
            return self.damp
        m = images // self.grad_batch
        squares = sum(
            float(layer.gradients(rows, self.grad_batch).square().sum(dtype=torch.float64))
            for rows in row_chunks(layer, m)
        )
        return self.damp_rel * squares / m / layer.weight.numel()

    def held(self, gradients: int) -> int:
        """How many gradients are held of some rows at a time, where ``gradients`` have been made."""
        return gradients

    def samples(self, images: int) -> int:
        return images // self.grad_batch

    def scores(self, layer: LayerView, pattern: Pattern) -> Tensor:
        parts = [self.block_scores(blocks, layer, pattern) for blocks in self.blocks(layer, pattern)]
        return torch.cat(parts).view(layer.weight.shape[0], -1)

    def weights(self, layer: LayerView, mask: Tensor, pattern: Pattern) -> Tensor:
        parts = [
            self.block_weights(blocks, mask[blocks.rows].reshape(blocks.weights.shape), layer, pattern)
            for blocks in self.blocks(layer, pattern)
        ]
        return torch.cat(parts).view(layer.weight.shape)

    @abstractmethod
    def block_scores(self, blocks: Blocks, layer: LayerView, pattern: Pattern) -> Tensor:
        """Scores of the blocks' groups, [n, B / group]."""

    @abstractmethod
    def block_weights(self, blocks: Blocks, mask: Tensor, layer: LayerView, pattern: Pattern) -> Tensor:
        """New weights of the blocks under ``mask``, both [n, B]."""


def block_size(wanted: int, weight: Tensor, pattern: Pattern) -> int:
    """Weights of a block, at least ``wanted`` where there are so many: an equal part of a row, or some whole rows."""
    out, width = weight.shape
    if wanted <= width:
        return next(size for size in range(wanted, width + 1) if width % size == 0 and size % pattern.span == 0)
    return width * next((rows for rows in range(-(-wanted // width), out) if out % rows == 0), out)


def image_count(layer: LayerView) -> int:
    """How many images the layer's gradients are of."""
    return len(layer.reads[0].inputs) if layer.reads else 0


def row_chunks(layer: LayerView, gradients: int, size: int = 1, rows_each: int = 1) -> Iterator[slice]:
    """The rows of ``layer`` in parts of which ``gradients``, and blocks of ``size`` weights, take ``CHUNK_BYTES``."""
    out, width = layer.weight.shape
    per_row = 8 * width * max(gradients, size)
    rows = max(1, CHUNK_BYTES // (per_row * rows_each)) * rows_each
    return (slice(first, min(out, first + rows)) for first in range(0, out, rows))


def inverted(matrices: Tensor, name: str) -> Tensor:
    """The inverses of positive definite ``matrices`` [n, B, B].

    Raises:
        InputError: one is singular or holds what is no number.
    """
    return torch.cholesky_inverse(factorised(matrices, name))


def factorised(matrices: Tensor, name: str) -> Tensor:
    """Lower Cholesky factors of ``matrices`` [n, B, B]; raises as ``inverted``."""
    if not bool(torch.isfinite(matrices).all()):
        raise InputError(
            f"{name}: its second-order statistics are no numbers (NaN or infinite); look for such values in the "
            "model's weights and in the images"
        )
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise InputError(
            f"{name}: its second-order statistics are a singular matrix; raise the damping, or give more images"
        )
    return factors
