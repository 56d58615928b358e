"""Patch tokens that leave each block of a model: a token method's published schedules, or counts of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from . import parts
from .errors import InputError
from .tokens.base import Reducer, Schedule

Wanted = str | Mapping[int, int] | Sequence[int]


class Found(NamedTuple):
    """What a method's own search found.

    Attributes:
        patches: patch tokens that leave each block, as ``counts`` and ``reduce_tokens`` take them.
        method_weights: what else the method must be told, by names in the model with the method.
    """

    patches: tuple[int, ...]
    method_weights: dict[str, Tensor]


def counts(method: str, wanted: Wanted, depth: int, patches: int, prefix: int) -> tuple[int, ...]:
    """Patch tokens that leave each of ``depth`` blocks.

    Args:
        method: name of a file in ``vitprune/tokens``.
        wanted: the name of one of its published schedules; or the patch tokens that leave some blocks, by the block's
            index; or one number for each block.
        patches: patch tokens that enter the first block.
        prefix: class, distillation and register tokens, which are not counted.

    Raises:
        InputError: there is no such method or schedule, a block does not exist, or the method cannot leave so many.
    """
    kind = parts.load("vitprune.tokens", method, Reducer)  # type: ignore[type-abstract]
    if isinstance(wanted, str):
        left = _published(method, kind, wanted)(depth, patches)
    elif isinstance(wanted, Mapping):
        left = _filled(wanted, depth, patches)
    else:
        left = list(wanted)
    if len(left) != depth:
        raise InputError(f"a schedule of {len(left)} blocks does not fit a model of {depth}")
    for block, (entering, leaving) in enumerate(pairwise([patches, *left])):
        if leaving != entering and not kind.reaches(entering, leaving, prefix):
            fewest = kind.fewest(entering, prefix)
            which = f"{fewest} or {entering}" if kind.grid else f"{fewest} to {entering}"
            raise InputError(
                f"schedule: {method} can leave {which} patch tokens of the {entering} that enter block {block}, "
                f"not {leaving}"
            )
    return tuple(left)


def _published(method: str, kind: type[Reducer], name: str) -> Schedule:
    if name in kind.schedules:
        return kind.schedules[name]
    close = get_close_matches(name, kind.schedules, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    known = ", ".join(kind.schedules) or "none, give the counts of the blocks"
    raise InputError(f"{method} has no published schedule {name!r}, it has {known}{hint}")


def _filled(wanted: Mapping[int, int], depth: int, patches: int) -> list[int]:
    """One number for each block; one that is not named leaves what enters it."""
    strange = [block for block in wanted if not 0 <= block < depth]
    if strange:
        raise InputError(f"schedule: there is no block {strange[0]}, the model has blocks 0 to {depth - 1}")
    left = []
    for block in range(depth):
        patches = wanted.get(block, patches)
        left.append(patches)
    return left
