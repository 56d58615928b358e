"""CAIT's token merging, a reconstruction: neighbours are merged, first across and then down, so that a grid stays one.

Wang et al., CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable Transferability For ViTs,
https://arxiv.org/abs/2309.15755.
Reconstructed from the abstract, since neither the paper's details nor code could be had: where the authors merge, how
they join two tokens and what becomes of an odd row are assumptions; their pruning of channels is not here, heads and
hidden units are pruned by the other axes of a search.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model.state import TokenState
from .base import NOWHERE, Place, Reducer, Schedule, leaves_all, stepwise


def _assumed() -> Schedule:
    """Merges across at a third of the blocks, and down at two thirds."""
    return stepwise(lambda block, depth, n: _folded(n) if block in (depth // 3, 2 * depth // 3) else n)


def _folded(patches: int) -> int:
    """Patches that are left of a square grid, or of one that was merged across before; all of any other number."""
    side = isqrt(patches)
    if side * side == patches:
        return side * -(-side // 2)
    rows = isqrt(2 * patches)  # of which each has half as many patches
    if rows * -(-rows // 2) == patches:
        return (-(-rows // 2)) ** 2
    return patches


class CAIT(Reducer):
    """Merges each patch with its right neighbour, where the grid is square, or else with the one below.

    Two tokens become what a Linear layer makes of them, the mean until it is trained. An odd last column or row is
    merged with itself.
    """

    where = "before"
    keeps_order = True
    grid = True
    any_size = False
    schedules: ClassVar[Mapping[str, Schedule]] = {"assumed": _assumed()}

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__(place)
        self.merge = nn.Linear(2 * place.dim, place.dim)
        with torch.no_grad():
            half = torch.eye(place.dim) / 2
            self.merge.weight.copy_(torch.cat([half, half], dim=1))
            self.merge.bias.zero_()

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return _folded(patches)

    def forward(self, state: TokenState, attention: None, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        rows, columns = self._grid(patches)

        def pairs(of: Tensor) -> tuple[Tensor, Tensor]:
            grid = of[:, prefix:].unflatten(1, (rows, columns))
            grid = grid if rows == columns else grid.transpose(1, 2)  # the pairs lie side by side then
            if grid.shape[2] % 2:
                grid = torch.cat([grid, grid[:, :, -1:]], dim=2)
            first, second = grid[:, :, ::2], grid[:, :, 1::2]
            if rows != columns:
                first, second = first.transpose(1, 2), second.transpose(1, 2)
            return first.flatten(1, 2), second.flatten(1, 2)

        x = torch.cat([state.x[:, :prefix], self.merge(torch.cat(pairs(state.x), dim=-1))], dim=1)
        if state.source is None:
            return state._replace(x=x)
        first, second = pairs(state.source)
        return state._replace(x=x, source=torch.cat([state.source[:, :prefix], (first + second) / 2], dim=1))

    def _grid(self, patches: int) -> tuple[int, int]:
        """Rows and columns of what is left of the image's square grid."""
        rows = columns = isqrt(self.place.patches)
        while rows * columns > patches:
            rows, columns = (rows, -(-columns // 2)) if rows == columns else (-(-rows // 2), columns)
        if rows * columns != patches:
            raise InputError(f"{patches} patches are no grid that merging of {self.place.patches} leads to")
        return rows, columns

    def macs(self, patches: int) -> int:
        return _folded(patches) * 2 * self.place.dim**2
