"""DiffRate: rank patches by the class token's attention, drop the last of them, merge the middle into the first.

Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023,
https://arxiv.org/abs/2305.17997.
Differs from the authors' code: tokens are summed by a product with a 0/1 matrix (a reducing scatter does not parse in
TensorRT); distillation and register tokens are protected like the class token; a patch unlike all others adds nothing
to the size of the one it merges into, where theirs may subtract; with counts that are neither published nor found by
the authors' own search (``vitprune.search.diffrate``), two fifths of the patches that go are dropped and the others
merged, about as in the published ones (in block 1 of t-0.7 one patch is merged that theirs drops).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..model.state import AttentionView, TokenState, wide
from .base import NOWHERE, Place, Reducer, Schedule, gather_tokens, leaves_all

# what the authors' search found for DeiT-T, -S and -B and a target in 10^9 multiply-accumulates: tokens with the class
# token that each of twelve blocks keeps after dropping, and after merging, of the 197 of 224 pixels
# fmt: off
FOUND = {
    "t-0.6": ([197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3],
              [197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3]),
    "t-0.7": ([197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3],
              [197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3]),
    "t-0.8": ([197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3],
              [197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3]),
    "t-0.9": ([197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3],
              [197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3]),
    "t-1.0": ([197, 197, 196, 194, 188, 184, 178, 164, 156, 137, 129, 21],
              [197, 197, 196, 190, 186, 154, 148, 156, 145, 135, 125, 21]),
    "s-2.3": ([197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3],
              [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3]),
    "s-2.5": ([197, 192, 174, 156, 131, 115, 111, 99, 76, 50, 39, 3],
              [197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3]),
    "s-2.7": ([197, 196, 182, 160, 141, 127, 115, 105, 88, 66, 49, 3],
              [197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3]),
    "s-2.9": ([197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3],
              [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]),
    "s-3.1": ([197, 197, 194, 180, 160, 147, 137, 129, 115, 92, 76, 3],
              [197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3]),
    "b-8.7": ([197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3],
              [197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3]),
    "b-10.0": ([197, 194, 182, 168, 148, 129, 113, 101, 82, 49, 25, 3],
               [197, 186, 174, 156, 137, 117, 105, 90, 66, 31, 19, 3]),
    "b-10.4": ([197, 196, 188, 174, 156, 141, 121, 103, 90, 58, 25, 3],
               [197, 190, 184, 164, 145, 131, 107, 94, 74, 31, 21, 3]),
    "b-11.5": ([197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3],
               [197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3]),
    "b-12.5": ([197, 197, 196, 192, 184, 170, 154, 139, 129, 94, 58, 3],
               [197, 196, 194, 190, 176, 160, 145, 131, 115, 68, 47, 3]),
}
# fmt: on


def _published(name: str) -> Schedule:
    """The counts that the authors found for 196 patches and 12 blocks."""

    def counts(depth: int, patches: int) -> list[int]:
        if (depth, patches) != (12, 196):
            raise InputError(f"diffrate's schedules are for 12 blocks and 196 patches, not {depth} and {patches}")
        return [left for _, _, left in _steps(name)]

    return counts


def _steps(name: str) -> list[tuple[int, int, int]]:
    """Patches that enter each block, that are left after dropping, and after merging."""
    steps, entering = [], 196
    for dropping, merging in zip(*FOUND[name], strict=True):
        ranked = min(entering, dropping - 1)
        steps.append((entering, ranked, min(ranked, merging - 1)))
        entering = steps[-1][2]
    return steps


WIDTHS = {"t": 192, "s": 384, "b": 768}  # of DeiT's models
RANKED = {
    (WIDTHS[name[0]], block, entering, left): ranked
    for name in FOUND
    for block, (entering, ranked, left) in enumerate(_steps(name))
}


UNTOLD = -1  # how many patches dropping leaves: as published, or by the rule


class DiffRate(Reducer):
    """Leaves the ``keep`` patches of highest attention, in that order, with some of the others merged into them.

    A patch is merged into the one most alike in its features; all that are merged weigh the same in the mean. A size
    grows by the sizes of what was merged, each times its likeness.

    Attributes:
        ranked: patches that are left when the last have been dropped, before merging, where a search has found that
            too; else ``UNTOLD``.
    """

    proportional = True
    needs_class_token = True
    drops = True
    schedules: ClassVar[Mapping[str, Schedule]] = {f"published-{name}": _published(name) for name in FOUND}

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__(place)
        self.ranked: Tensor
        self.register_buffer("ranked", torch.tensor(UNTOLD))
        self._told = UNTOLD  # the same as a number, since a graph must not depend on a value

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._told = int(self.ranked)

    @staticmethod
    def fewest(patches: int, prefix: int) -> int:
        return 1

    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        prefix, patches = state.prefix, state.x.shape[1] - state.prefix
        if leaves_all(keep, patches):
            return state
        order = attention.class_row().mean(1)[:, prefix:].topk(patches, dim=1).indices
        first, rest = order[:, :keep], order[:, keep:][:, : self._merged(patches, keep)]

        def both(of: Tensor) -> tuple[Tensor, Tensor]:
            """What of the patches stays, [B, keep, C], and is merged, [B, R, C]."""
            return wide(gather_tokens(of[:, prefix:], first)), wide(gather_tokens(of[:, prefix:], rest))

        stay, go = (F.normalize(patches.detach(), dim=-1) for patches in both(state.x))
        alike, into = (go @ stay.transpose(1, 2)).topk(1, dim=2)  # [B, R, 1]
        into = into.transpose(1, 2) == torch.arange(keep, device=into.device)[:, None]
        merge = into.to(go.dtype)  # [B, keep, R]
        size = torch.ones_like(state.x[..., :1]) if state.size is None else state.size

        def behind_prefix(before: Tensor, patches: Tensor) -> Tensor:
            return torch.cat([before[:, :prefix], patches.to(before.dtype)], dim=1)

        def means(tokens: Tensor) -> Tensor:
            stay, go = both(tokens)
            return behind_prefix(tokens, (stay + merge @ go) / (1 + merge.sum(2, keepdim=True)))

        stay, go = both(size)
        return state._replace(
            x=means(state.x),
            size=behind_prefix(size, stay + merge @ (go * alike.clamp(min=0))),
            source=None if state.source is None else means(state.source),
        )

    @classmethod
    def official(cls, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # what their search learned says how many are kept, which a schedule says here
        return {name: w for name, w in weights.items() if "prune_ddp" not in name and "merge_ddp" not in name}, {}

    def _merged(self, patches: int, keep: int) -> int:
        """How many of ``patches`` are merged into the ``keep`` that are left; the others are dropped."""
        if self._told != UNTOLD:
            return max(0, self._told - keep)
        if isinstance(patches, int) and isinstance(keep, int):
            ranked = RANKED.get((self.place.dim, self.place.block, patches, keep))
            if ranked is not None:
                return ranked - keep
        return (3 * (patches - keep) + 4) // 5
