"""M-FAC: the inverse of a Fisher information from m gradients, never formed: for large blocks and few gradients.

Frantar, Kurtic and Alistarh, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information, NeurIPS 2021,
https://arxiv.org/abs/2107.03356. With F_i the information of the first i gradients, h_i = F_(i-1)^-1 g_i and
D_i = m + g_i^T h_i, it is F^-1 x = x / damping - sum_i (h_i^T x / D_i) h_i. Differs from the official code: all h_i
come from one Cholesky factor C of (m damping + G G^T), as rows C_ii (C^-1 G)_i / damping: the same numbers without
reading all former rows for each; the last gradient counts, which theirs leaves out; blocks stay where they are when
weights have been removed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ..errors import InputError
from ._fisher import Blocks, factorised
from ._summed import Inverse, SummedMethod
from .base import LayerView, Pattern

REFRESHED = 4  # part of the images whose gradients replace the oldest at each further step of a window


@final
@dataclass(frozen=True)
class Mfac(SummedMethod):
    """Static: from the gradients at hand; dynamic: from a window of the newest ones, kept from pruning to pruning.

    A window is of one model; the first pruning of another empties it.

    Attributes:
        window: gradients that are kept, 4 bytes each for every weight; None: static.
    """

    recompute = 16
    block: int = 2048
    window: int | None = None
    windows: dict[tuple[str, int], Window] = field(default_factory=dict, init=False, repr=False, compare=False)

    def images_of(self, step: int, count: int) -> slice:
        if step == 0:
            self.windows.clear()  # of another model
        if self.window is None or not self.windows:
            return slice(0, count)
        part = max(1, count // REFRESHED)
        first = (step - 1) % REFRESHED * part
        return slice(first, first + part)

    def held(self, gradients: int) -> int:
        """The window, where there is one: its parts are of the same rows however many gradients come anew."""
        return self.window or gradients

    def block_scores(self, blocks: Blocks, layer: LayerView, pattern: Pattern) -> Tensor:
        if self.window is not None:
            key = layer.name, blocks.rows.start
            held = self.windows.get(key)
            if held is None or held.gradients.shape[::2] != blocks.weights.shape:
                held = self.windows[key] = Window(self.window, blocks.weights.shape)
            held.push(blocks.gradients)
        return super().block_scores(blocks, layer, pattern)

    def inverse(self, blocks: Blocks, layer: LayerView) -> Inverse:
        if not blocks.damping > 0:
            raise InputError(f"{layer.name}: M-FAC divides by its damping, which is {blocks.damping}; raise it")
        if self.window is None:
            return MatrixFree(blocks.gradients, blocks.damping, layer.name)
        alive = layer.alive[blocks.rows].reshape(blocks.weights.shape)
        return self.windows[layer.name, blocks.rows.start].inverse(alive, blocks.damping, layer.name)


@final
class MatrixFree(Inverse):
    """Of the damped mean of g g^T over m gradients, from these and a factor of their products.

    Args:
        gradients: [n, m, B], fp64.
        products: [n, m, m], of the gradients with each other; None: computed here.
    """

    def __init__(self, gradients: Tensor, damping: float, name: str, products: Tensor | None = None) -> None:
        gram = torch.bmm(gradients, gradients.transpose(1, 2)) if products is None else products.clone()
        gram.diagonal(dim1=1, dim2=2).add_(gradients.shape[1] * damping)
        self.rows = torch.linalg.solve_triangular(factorised(gram, name), gradients, upper=False)
        self.damping = damping

    def groups(self, size: int) -> Tensor:
        parts = self.rows.unflatten(2, (-1, size))
        unit = torch.eye(size).to(self.rows)
        return (unit - torch.einsum("nmgi,nmgj->ngij", parts, parts)) / self.damping

    def times(self, x: Tensor) -> Tensor:
        return (x - torch.einsum("nmb,nm->nb", self.rows, torch.einsum("nmb,nb->nm", self.rows, x))) / self.damping


@final
class Window:
    """The newest gradients of n blocks of B weights, and their products with each other."""

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        n, width = shape
        self.size, self.filled, self.next = size, 0, 0
        self.gradients = torch.zeros(n, size, width)
        self.products = torch.zeros(n, size, size, dtype=torch.float64)
        self.alive = torch.ones(n, width, dtype=torch.bool)

    def push(self, gradients: Tensor) -> None:
        """Put ``gradients`` [n, m, B] in the place of the oldest: O(size B) for each."""
        for gradient in gradients[:, -self.size :].unbind(1):
            self.gradients = self.gradients.to(gradient.device)
            self.gradients[:, self.next] = gradient.float()
            held = self.gradients[:, self.next].double()
            row = torch.einsum("nmb,nb->nm", self.gradients.double(), held)
            self.products = self.products.to(row)
            self.products[:, self.next] = self.products[:, :, self.next] = row
            self.next = (self.next + 1) % self.size
            self.filled = min(self.size, self.filled + 1)

    def inverse(self, alive: Tensor, damping: float, name: str) -> MatrixFree:
        """The inverse from what is in the window, for the weights that are ``alive`` [n, B]."""
        if not torch.equal(alive, self.alive.to(alive.device)):
            self.alive = alive.clone()
            self.gradients *= alive[:, None]
            whole = self.gradients.double()
            self.products = torch.bmm(whole, whole.transpose(1, 2))
        filled = self.filled
        return MatrixFree(self.gradients[:, :filled].double(), damping, name, self.products[:, :filled, :filled])
