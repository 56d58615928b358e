"""What stays of a model, block by block: the outcome of a search, and all that surgery needs besides the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class BlockPlan:
    """What stays of one block.

    Attributes:
        heads: indices of the kept attention heads in the original block, ascending; empty removes the attention.
        mlp: indices of the kept MLP hidden units in the original block, ascending; empty removes the MLP.
        patches: patch tokens that leave the block, at the plan's ``patches``; None leaves their number as it is; 0, in
            the last block only: it is computed for the prefix tokens alone, since nothing reads another.
        weights: the pattern of zeros in the weights of a layer, by its name in the block: (('mlp.fc1', '2:4'), ...).
    """

    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    patches: int | None = None
    weights: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("heads", "mlp"):
            indices = getattr(self, name)
            if list(indices) != sorted(set(indices)) or any(i < 0 for i in indices):
                raise InputError(f"a plan's {name} must be ascending indices without repeats, got {indices}")
        if self.patches is not None and self.patches < 0:
            raise InputError(f"a plan cannot keep {self.patches} patch tokens")
        if self.patches and not self.heads:
            raise InputError("a block without attention cannot reduce tokens; a plan asks for both")


@dataclass(frozen=True)
class Plan:
    """What stays of one model. Loads only onto the model that it was made for.

    Attributes:
        model_sha256: ``vitprune.model.fingerprint`` of the model that it prunes.
        patches: patch tokens of an image at the budget's image size; token counts at another size scale from it.
        reducer: name of the token method (a file in ``vitprune/tokens``); None where no block reduces tokens.
        blocks: one entry per block of the model.
    """

    model_sha256: str
    patches: int
    reducer: str | None
    blocks: tuple[BlockPlan, ...]

    def __post_init__(self) -> None:
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
        blocks = []
        for number, (first, second) in enumerate(zip(self.blocks, later.blocks, strict=True)):
            for name in ("heads", "mlp"):
                kept, asked = getattr(first, name), getattr(second, name)
                if asked and asked[-1] >= len(kept):
                    raise InputError(f"block {number}: the later plan keeps {name} {asked[-1]} of {len(kept)} left")
            counts = [p for p in (first.patches, second.patches) if p is not None]
            blocks.append(
                BlockPlan(
                    heads=tuple(first.heads[i] for i in second.heads),
                    mlp=tuple(first.mlp[i] for i in second.mlp),
                    patches=min(counts) if counts and (second.heads or min(counts) == 0) else None,
                    weights=tuple(
                        (layer, pattern)
                        for layer, pattern in (dict(first.weights) | dict(second.weights)).items()
                        if (second.heads if layer.startswith("attn.") else second.mlp)
                    ),
                )
            )
        return Plan(self.model_sha256, self.patches, self.reducer or later.reducer, tuple(blocks))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for YAML or JSON."""
        plain = asdict(self)
        plain["blocks"] = [
            {"heads": list(b.heads), "mlp": list(b.mlp)}
            | ({} if b.patches is None else {"patches": b.patches})
            | ({"weights": dict(b.weights)} if b.weights else {})
            for b in self.blocks
        ]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote.

        Raises:
            InputError: a key is missing or has another type.
        """
        try:
            blocks = tuple(
                BlockPlan(
                    tuple(b["heads"]), tuple(b["mlp"]), b.get("patches"), tuple(dict(b.get("weights", {})).items())
                )
                for b in plain["blocks"]
            )
            return cls(str(plain["model_sha256"]), int(plain["patches"]), plain["reducer"], blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is not a plan: {type(error).__name__} {error}") from error
