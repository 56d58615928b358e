"""What a token method is: told how many patch tokens to leave, it turns scored tokens into fewer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..model.state import AttentionView, TokenState

Schedule = Callable[[int, int], list[int]]  # (blocks, patch tokens that enter) -> patch tokens that leave each block


class Place(NamedTuple):
    """Where in a model a token method acts: in which block of how many."""

    block: int = 0
    depth: int = 1


NOWHERE = Place()


class Reducer(nn.Module, ABC):
    """A token method. It is told how many tokens to leave; published rules for the counts are its ``schedules``.

    Args:
        place: methods that do not work alike in all blocks ask for it.

    Attributes:
        schedules: the authors' hyper-parameters, by name.
        where: 'after': between attention and MLP, so that the attention works on the tokens that come in;
            'before': in front of the block, which works on those that are left.
        proportional: the method keeps token sizes, and attention adds their logarithm from then on.
        needs_class_token: the method scores by the class token's attention, and cannot act without one.
        keeps_order: patches leave in the order in which they came.
        drops: patches may vanish; otherwise each is merged into a token that stays.
    """

    where: ClassVar[Literal["before", "after"]] = "after"
    proportional: ClassVar[bool] = False
    needs_class_token: ClassVar[bool] = False
    keeps_order: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    schedules: ClassVar[Mapping[str, Schedule]] = {}

    def __init__(self, place: Place = NOWHERE) -> None:
        super().__init__()
        self.place = place

    @staticmethod
    @abstractmethod
    def fewest(patches: int, prefix: int) -> int:
        """The fewest patch tokens that one application can leave of ``patches``, at least 1."""

    @abstractmethod
    def forward(self, state: TokenState, attention: AttentionView, keep: int) -> TokenState:
        """Leave ``keep`` patch tokens behind the prefix, ``fewest(...) <= keep <= N - prefix``.

        Nothing changes where ``keep == N - prefix``. Under export ``keep`` and N may be symbolic: no branch may
        depend on them (``leaves_all`` is False then), and each operation must be one that TensorRT-RTX parses.
        """


def stepwise(leaves: Callable[[int, int, int], int]) -> Schedule:
    """The schedule of a rule for one block: (block, blocks, patch tokens that enter) -> those that leave."""

    def counts(depth: int, patches: int) -> list[int]:
        left = []
        for block in range(depth):
            patches = leaves(block, depth, patches)
            left.append(patches)
        return left

    return counts


def thrice(depth: int) -> set[int]:
    """The blocks of a model of ``depth`` in which several methods act: the fourth, seventh and tenth of twelve."""
    return {depth * quarter // 4 for quarter in (1, 2, 3)}


def leaves_all(keep: int, patches: int) -> bool:
    """Whether ``keep`` is all of ``patches``; False where that depends on the size of the image."""
    return isinstance(keep, int) and isinstance(patches, int) and keep == patches


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [B, K] of ``x`` [B, N, C], as [B, K, C]."""
    # indexing, not torch.gather: GatherND copies whole tokens, which ONNX Runtime does 2.6 times as fast on a CPU
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def track_sources(state: TokenState) -> TokenState:
    """``state`` of an image's own patches, made to record which of them end up in which token."""
    patches = state.x.shape[1] - state.prefix
    own = torch.eye(state.x.shape[1], dtype=state.x.dtype, device=state.x.device)[:, state.prefix :]
    return state._replace(source=own.expand(state.x.shape[0], -1, patches))
