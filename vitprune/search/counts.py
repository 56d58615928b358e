"""A plan without indices: how much stays of each block. What the solver, the latency table and the losses speak of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..errors import InputError


@dataclass(frozen=True)
class Counts:
    """How much stays of each block; tuples of one entry per block.

    Attributes:
        heads: kept attention heads; 0: the attention half is removed.
        mlp: kept MLP hidden units; 0: the MLP half is removed.
        patches: patch tokens that leave the block, never rising; 0, in the last block only: it is computed for the
            prefix tokens alone.
        qk, v: kept dims of each head's queries and keys, and of its values, 0 where there are no heads; both None where
            all heads keep all dims.
    """

    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    patches: tuple[int, ...]
    qk: tuple[int, ...] | None = None
    v: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_dims()
        if not len(self.heads) == len(self.mlp) == len(self.patches) > 0:
            lengths = f"{len(self.heads)} heads, {len(self.mlp)} mlp, {len(self.patches)} patches"
            raise InputError(f"counts need one entry per block of each kind, got {lengths}")
        if min(self.heads) < 0 or min(self.mlp) < 0 or min(self.patches[:-1], default=1) < 1 or self.patches[-1] < 0:
            raise InputError(f"counts keep at least 0 heads, 0 units and 1 patch token in each block, got {self}")
        for block, (before, after) in enumerate(zip(self.patches, self.patches[1:], strict=False), start=1):
            if after > before:
                raise InputError(f"block {block} of the counts leaves {after} patch tokens of {before}")

    def _check_dims(self) -> None:
        if self.qk is None and self.v is None:
            return
        for dims in (self.qk, self.v):
            if dims is None or len(dims) != len(self.heads):
                raise InputError(f"counts need dims of queries and keys, and of values, for every block, got {self}")
            for block, (heads, kept) in enumerate(zip(self.heads, dims, strict=True)):
                if kept < 0 or bool(heads) != bool(kept):
                    raise InputError(f"block {block} of the counts keeps {kept} dims of each of {heads} heads")

    def dims(self, block: int) -> tuple[int, int] | None:
        """Kept dims of a block's queries and keys, and of its values; None where it has all, or no heads."""
        if self.qk is None or self.v is None or not self.heads[block]:
            return None
        return self.qk[block], self.v[block]

    @classmethod
    def dense(cls, heads: Sequence[int], mlp: Sequence[int], patches: int) -> Counts:
        """The counts that keep everything of blocks with ``heads[l]`` heads and ``mlp[l]`` units."""
        return cls(tuple(heads), tuple(mlp), (patches,) * len(heads))

    def patches_out(self, patches: int) -> list[int | None]:
        """Patch tokens to leave in each block, None where all of them stay; ``patches`` enter the first block."""
        entering = (patches, *self.patches[:-1])
        return [None if out == n else out for n, out in zip(entering, self.patches, strict=True)]

    def to_dict(self) -> dict[str, list[int]]:
        """Plain lists, for JSON; dims are absent where all of them stay."""
        return {name: list(values) for name, values in vars(self).items() if values is not None}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Counts:
        """The counts that ``to_dict`` wrote.

        Raises:
            InputError: a key is missing, or holds something other than a list of whole numbers.
        """
        try:
            given = {name: plain[name] for name in ("heads", "mlp", "patches")}
            given |= {name: plain[name] for name in ("qk", "v") if name in plain}
            if any(type(number) is not int for values in given.values() for number in values):
                raise InputError(f"counts are whole numbers, got {dict(plain)}")
            return cls(**{name: tuple(values) for name, values in given.items()})
        except (KeyError, TypeError) as error:
            raise InputError(f"these are not counts: {type(error).__name__} {error}") from error


@dataclass(frozen=True)
class Sizes:
    """The sizes that a search may choose from, the same for every block; those that a block exceeds are left out.

    Attributes:
        heads, mlp: units to keep; 0 removes the half. Keeping all is always a choice.
        patches: patch tokens to leave; empty where tokens are not reduced; 0: the last block is computed for the prefix
            tokens alone, which only a model that reads no others behind it can be.
        qk, v: dims of each head's queries and keys, and of its values, to keep; empty where all of them stay.
    """

    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    patches: tuple[int, ...] = ()
    qk: tuple[int, ...] = ()
    v: tuple[int, ...] = ()

    def below(self, kind: Literal["attn", "mlp", "qk", "v"], units: int) -> list[int]:
        """The sizes other than all of it of what has ``units`` units, descending."""
        wanted = self.heads if kind == "attn" else getattr(self, kind)
        return sorted({count for count in wanted if 0 <= count < units}, reverse=True)


class TokenMethod(NamedTuple):
    """What the search must know of a token method; see ``vitprune.tokens.base.Reducer`` for the meanings.

    Attributes:
        fewest: (patches, prefix) -> the fewest patch tokens that one application can leave.
        reaches: (patches, fewer, prefix) -> whether one application can leave so many.
        judged_as: name of the method whose losses are taken for this one's: its own, or its stand-in's.
        watches: it must have seen the attention of a block before, and cannot act in the first.
    """

    name: str
    where: Literal["before", "after", "q_rows"]
    proportional: bool
    needs_class_token: bool
    fewest: Callable[[int, int], int]
    reaches: Callable[[int, int, int], bool]
    judged_as: str
    grid: bool = False
    watches: bool = False

    @classmethod
    def of(cls, name: str, reducer: Any, trained: bool = False) -> TokenMethod:
        """The facts that the reducer class ``reducer`` of the file ``name`` declares.

        ``trained``: its weights are there, and it needs no stand-in.
        """
        return cls(
            name,
            reducer.where,
            reducer.proportional,
            reducer.needs_class_token,
            reducer.fewest,
            reducer.reaches,
            name if trained else reducer.stand_in or name,
            reducer.grid,
            reducer.watches,
        )
