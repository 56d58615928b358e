"""What the solver is asked: for every block a row of parts, each with choices that have a loss, a time and a label."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError


class Choice(NamedTuple):
    """One way to treat a part of a block. ``label`` comes back in the solution."""

    loss: float
    ms: float
    label: Hashable


@dataclass(frozen=True)
class Stay:
    """A part that leaves the tokens as they are: one of ``choices[level]``, the first of which keeps all of it.

    A level without choices cannot be at this part.
    """

    choices: Sequence[Sequence[Choice]]


@dataclass(frozen=True)
class Move:
    """Where tokens may leave: ``steps[level, lower level]``, numbered from the most tokens on. Staying is free."""

    steps: Mapping[tuple[int, int], Choice]


@dataclass(frozen=True)
class Either:
    """One of several rows of parts, the first of which keeps the most."""

    branches: Sequence[Sequence[Part]]


Part = Stay | Move | Either
Block = Sequence[Part]


def check(block: Block, levels: int, where: str) -> None:
    """Refuses what is no block on so many token levels; ``where`` names it.

    Raises:
        InputError: a loss or time is negative or not finite, or a level does not exist.
    """
    for part in block:
        if isinstance(part, Either):
            for branch in part.branches:
                check(branch, levels, where)
        elif isinstance(part, Stay):
            if len(part.choices) != levels:
                raise InputError(f"{where} has choices for {len(part.choices)} token levels, there are {levels}")
            _check_choices([choice for choices in part.choices for choice in choices], where)
        else:
            for source, target in part.steps:
                if not 0 <= source < target < levels:
                    raise InputError(f"{where} has a step from level {source} to {target}; there are {levels} levels")
            _check_choices(part.steps.values(), where)


def _check_choices(choices: Iterable[Choice], where: str) -> None:
    for loss, ms, label in choices:
        if not (math.isfinite(loss) and math.isfinite(ms) and loss >= 0 and ms >= 0):
            raise InputError(f"{where}, {label}: loss {loss} and {ms} ms must be finite and not negative")


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """The choices for which no other loses as little and takes as little time; in their order."""
    least, kept = math.inf, []
    for number in sorted(range(len(choices)), key=lambda i: (choices[i].ms, choices[i].loss, i)):
        if choices[number].loss < least:
            least = choices[number].loss
            kept.append(number)
    return [choices[number] for number in sorted(kept)]


def most_loss(block: Block) -> float:
    """The most that a path through the block can lose."""
    total = 0.0
    for part in block:
        if isinstance(part, Either):
            total += max((most_loss(branch) for branch in part.branches), default=0.0)
        elif isinstance(part, Stay):
            total += max((choice.loss for choices in part.choices for choice in choices), default=0.0)
        else:
            total += max((choice.loss for choice in part.steps.values()), default=0.0)
    return total


def roundings(block: Block, kind: type[Stay] | type[Move]) -> int:
    """How many times of this kind a path through the block rounds, at most."""
    total = 0
    for part in block:
        if isinstance(part, Either):
            total += max((roundings(branch, kind) for branch in part.branches), default=0)
        else:
            total += isinstance(part, kind)
    return total


def kept_choices(block: Block) -> list[Choice] | None:
    """The choices that keep everything: the first ones, on the most tokens. None where there are none."""
    kept: list[Choice] = []
    for part in block:
        if isinstance(part, Stay) and part.choices[0]:
            kept.append(part.choices[0][0])
        elif isinstance(part, Either) and part.branches and (inner := kept_choices(part.branches[0])) is not None:
            kept.extend(inner)
        elif not isinstance(part, Move):
            return None
    return kept
