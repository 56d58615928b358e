"""What stays of a model, block by block: the outcome of a search, and all that surgery needs besides the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .errors import InputError

Dims = tuple[tuple[int, ...], ...]  # by head, indices of some of its dims


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block.

    Attributes:
        heads: indices of the kept attention heads in the original block, ascending; empty removes the attention.
        mlp: indices of the kept MLP hidden units in the original block, ascending; empty removes the MLP.
        patches: patch tokens that leave the block, at the plan's ``patches``; None leaves their number as it is; 0, in
            the last block only: it is computed for the prefix tokens alone, since nothing reads another.
        qk, v: for each of ``heads``, in their order, the indices of the kept dims of its queries and keys, and of its
            values, in the original head, ascending, equally many in every head; None keeps all.
        weights: the pattern of zeros in the weights of a layer, by its name in the block: (('mlp.fc1', '2:4'), ...).
    """

    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    patches: int | None = None
    qk: Dims | None = None
    v: Dims | None = None
    weights: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("heads", "mlp"):
            _check_indices(name, getattr(self, name))
        for name in ("qk", "v"):
            self._check_dims(name, getattr(self, name))
        if self.patches is not None and self.patches < 0:
            raise InputError(f"a plan cannot keep {self.patches} patch tokens")
        if self.patches and not self.heads:
            raise InputError("a block without attention cannot reduce tokens; a plan asks for both")

    def _check_dims(self, name: str, dims: Dims | None) -> None:
        if dims is None:
            return
        if not dims or len(dims) != len(self.heads):
            raise InputError(
                f"a plan's {name} must name dims for each of {len(self.heads)} kept heads, got {len(dims)}"
            )
        for kept in dims:
            _check_indices(name, kept)
        if len({len(kept) for kept in dims}) > 1 or not dims[0]:
            counts = [len(kept) for kept in dims]
            raise InputError(f"a plan keeps equally many {name} dims, and at least one, in every head, got {counts}")

    def then(self, later: BlockPlan, number: int) -> BlockPlan:
        """This block ``number``, followed by what ``later`` keeps of it. Raises as ``Plan.then``."""
        for name in ("heads", "mlp"):
            _check_left(f"block {number}: the later plan keeps {name}", getattr(later, name), len(getattr(self, name)))
        counts = [p for p in (self.patches, later.patches) if p is not None]
        return BlockPlan(
            heads=tuple(self.heads[i] for i in later.heads),
            mlp=tuple(self.mlp[i] for i in later.mlp),
            patches=min(counts) if counts and (later.heads or min(counts) == 0) else None,
            qk=self._dims_then("qk", later, number),
            v=self._dims_then("v", later, number),
            weights=self._patterns_then(later),
        )

    def _dims_then(self, name: str, later: BlockPlan, number: int) -> Dims | None:
        """Dims of the original heads that are left when ``later`` has picked from those of the heads left here."""
        first: Dims | None = getattr(self, name)
        second: Dims | None = getattr(later, name)
        if first is None or not later.heads:
            return second
        if second is None:
            return tuple(first[i] for i in later.heads)
        for dims in second:
            _check_left(f"block {number}: the later plan keeps {name} dims up to", dims, len(first[0]))
        return tuple(tuple(first[i][d] for d in dims) for i, dims in zip(later.heads, second, strict=True))

    def _patterns_then(self, later: BlockPlan) -> tuple[tuple[str, str], ...]:
        """Patterns of the layers that ``later`` leaves, its own in place of those here."""
        return tuple(
            (layer, pattern)
            for layer, pattern in (dict(self.weights) | dict(later.weights)).items()
            if (later.heads if layer.startswith("attn.") else later.mlp)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; keys that keep all are left out."""
        plain: dict[str, Any] = {"heads": list(self.heads), "mlp": list(self.mlp)}
        if self.patches is not None:
            plain["patches"] = self.patches
        rows = {name: dims for name, dims in (("qk", self.qk), ("v", self.v)) if dims is not None}
        plain |= {name: [list(kept) for kept in dims] for name, dims in rows.items()}
        return plain | ({"weights": dict(self.weights)} if self.weights else {})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BlockPlan:
        """The block that ``to_dict`` wrote."""
        dims = {name: tuple(map(tuple, plain[name])) for name in ("qk", "v") if plain.get(name) is not None}
        weights = tuple(dict(plain.get("weights", {})).items())
        return cls(tuple(plain["heads"]), tuple(plain["mlp"]), plain.get("patches"), **dims, weights=weights)


@dataclass(frozen=True)
class Plan:
    """What stays of one model. Loads only onto the model that it was made for.

    Attributes:
        model_sha256: ``vitprune.model.fingerprint`` of the model that it prunes.
        patches: patch tokens of an image at the budget's image size; token counts at another size scale from it.
        reducer: name of the token method (a file in ``vitprune/tokens``); None where no block reduces tokens.
        blocks: one entry per block of the model.
        embed: kept channels of the residual stream, ascending; None keeps all. Lossy beyond what the channels carried:
            every norm then sees other statistics, so no mask on the whole model computes the same.
    """

    model_sha256: str
    patches: int
    reducer: str | None
    blocks: tuple[BlockPlan, ...]
    embed: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.embed is not None:
            _check_indices("embed", self.embed)
            if not self.embed:
                raise InputError("a plan must keep at least one channel of the residual stream")
        left = self.patches
        for number, block in enumerate(self.blocks):
            if block.patches == 0 and number + 1 < len(self.blocks):
                raise InputError(f"block {number} of the plan keeps no patch token, which only the last one may")
            if block.patches:
                if self.reducer is None:
                    raise InputError(f"block {number} of the plan reduces tokens, but the plan names no token method")
                if block.patches > left:
                    raise InputError(f"block {number} of the plan keeps {block.patches} of {left} patch tokens")
                left = block.patches

    @classmethod
    def dense(cls, model_sha256: str, patches: int, heads: list[int], mlp: list[int]) -> Plan:
        """The plan that keeps everything of blocks with ``heads[l]`` heads and ``mlp[l]`` hidden units."""
        blocks = (BlockPlan(tuple(range(h)), tuple(range(m))) for h, m in zip(heads, mlp, strict=True))
        return cls(model_sha256, patches, None, tuple(blocks))

    def with_zeros(self, pattern: str, layers: Callable[[str], bool]) -> Plan:
        """This plan, with ``pattern`` in the weights of those of its layers that ``layers`` says yes to.

        ``layers`` is told their names in the model, as 'blocks.3.mlp.fc1'; layers that the plan removes have none.
        """
        halves = {"heads": ("attn.qkv", "attn.proj"), "mlp": ("mlp.fc1", "mlp.fc2")}
        blocks = []
        for number, block in enumerate(self.blocks):
            there = (name for half, names in halves.items() if getattr(block, half) for name in names)
            chosen = [(name, pattern) for name in there if layers(f"blocks.{number}.{name}")]
            blocks.append(replace(block, weights=tuple(chosen)))
        return replace(self, blocks=tuple(blocks))

    def patterns(self) -> dict[str, str]:
        """The pattern of zeros of each layer that has one, by the layer's name in the model."""
        return {f"blocks.{n}.{name}": pattern for n, b in enumerate(self.blocks) for name, pattern in b.weights}

    def patches_after(self) -> list[int]:
        """Patch tokens that leave each block."""
        counts, left = [], self.patches
        for block in self.blocks:
            left = left if block.patches is None else block.patches
            counts.append(left)
        return counts

    def then(self, later: Plan) -> Plan:
        """This plan followed by ``later``, a plan of the model that this one leaves, as one plan of the original.

        Raises:
            InputError: the plans do not fit: other depth, other token method, or more than this one left.
        """
        if len(later.blocks) != len(self.blocks):
            raise InputError(f"a plan of {len(later.blocks)} blocks cannot follow one of {len(self.blocks)}")
        if self.reducer and later.reducer and self.reducer != later.reducer:
            raise InputError(f"a plan with {later.reducer} cannot follow one with {self.reducer}")
        pairs = zip(self.blocks, later.blocks, strict=True)
        blocks = tuple(first.then(second, number) for number, (first, second) in enumerate(pairs))
        embed = self.embed if later.embed is None else later.embed
        if self.embed is not None and later.embed is not None:
            _check_left("the later plan keeps channel", later.embed, len(self.embed))
            embed = tuple(self.embed[i] for i in later.embed)
        return Plan(self.model_sha256, self.patches, self.reducer or later.reducer, blocks, embed)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for YAML or JSON."""
        plain: dict[str, Any] = {"model_sha256": self.model_sha256, "patches": self.patches, "reducer": self.reducer}
        plain["blocks"] = [block.to_dict() for block in self.blocks]
        return plain if self.embed is None else plain | {"embed": list(self.embed)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote.

        Raises:
            InputError: a key is missing or has another type.
        """
        try:
            blocks = tuple(map(BlockPlan.from_dict, plain["blocks"]))
            embed = None if plain.get("embed") is None else tuple(plain["embed"])
            return cls(str(plain["model_sha256"]), int(plain["patches"]), plain["reducer"], blocks, embed)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is not a plan: {type(error).__name__} {error}") from error


def _check_indices(name: str, indices: tuple[int, ...]) -> None:
    if any(type(i) is not int or i < 0 for i in indices) or list(indices) != sorted(set(indices)):
        raise InputError(f"a plan's {name} must be ascending whole numbers without repeats, got {indices}")


def _check_left(what: str, asked: tuple[int, ...], left: int) -> None:
    if asked and asked[-1] >= left:
        raise InputError(f"{what} {asked[-1]} of {left} left")
