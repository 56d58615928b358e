"""The rankings of all halves of a model: from how much stays of each to which units stay, and their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..criteria.base import Ranking
from ..errors import DamagedFile, InputError
from ..plan import BlockPlan, Plan
from ..statistics import Half

INDEX = "rankings.json"
HALVES: tuple[Half, Half] = ("attn", "mlp")


@dataclass(frozen=True)
class Rankings:
    """The ranking of each half that a model has, by block and half.

    Attributes:
        cross_terms: what the criterion says of how kinds of units go together; see ``Criterion.cross_terms``.
    """

    halves: Mapping[tuple[int, Half], Ranking]
    cross_terms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def plan(
        self,
        model_sha256: str,
        kept_heads: Sequence[int],
        kept_mlp: Sequence[int],
        patches_out: Sequence[int | None],
        *,
        patches: int,
        reducer: str | None = None,
    ) -> Plan:
        """The plan that keeps the best ``kept_heads[l]`` heads and ``kept_mlp[l]`` units of block l.

        Args:
            model_sha256: fingerprint of the model that was ranked.
            patches_out: patch tokens that leave each block; None: as many as entered.
            patches: patch tokens of an image.
            reducer: the token method, where a block reduces tokens.
        """
        blocks = [
            BlockPlan(self.kept(block, "attn", heads), self.kept(block, "mlp", mlp), out)
            for block, (heads, mlp, out) in enumerate(zip(kept_heads, kept_mlp, patches_out, strict=True))
        ]
        return Plan(model_sha256, patches, reducer, tuple(blocks))

    def kept(self, block: int, half: Half, count: int) -> tuple[int, ...]:
        """The ``count`` units of a half that stay, ascending."""
        if (block, half) in self.halves:
            return self.halves[block, half].kept(count)
        if count:
            raise InputError(f"block {block} has no {half} of which {count} units could be kept")
        return ()

    def weights(self, kept_heads: Sequence[int], kept_mlp: Sequence[int]) -> dict[tuple[int, str], Tensor]:
        """Compensated weights for ``surgery.prune``, of the halves that lose a part of their units.

        Raises:
            InputError: a half was not ranked with compensated weights for the count that is asked for.
        """
        found: dict[tuple[int, str], Tensor] = {}
        for block, counts in enumerate(zip(kept_heads, kept_mlp, strict=True)):
            for half, count in zip(HALVES, counts, strict=True):
                weight = self.weight(block, half, count)
                if weight is not None:
                    found[block, half] = weight
        return found

    def weight(self, block: int, half: Half, count: int) -> Tensor | None:
        """Compensated weight of one half; None where the dense model's own columns stay as they are."""
        ranking = self.halves.get((block, half))
        if ranking is None or not ranking.weights or count in (0, len(ranking.order)):
            return None
        if count not in ranking.weights:
            there = ", ".join(map(str, sorted(ranking.weights)))
            raise InputError(f"block {block} {half} has compensated weights for {there} units, not for {count}")
        return ranking.weights[count]

    @classmethod
    def load(cls, store: Path) -> Rankings:
        """The rankings that ``measure_losses`` left in the folder ``store``; weights are read when asked for.

        Raises:
            DamagedFile: a file is missing or cut off.
        """
        try:
            index = json.loads((store / INDEX).read_text(encoding="utf-8"))
            names, cross_terms = index["halves"], index.get("cross_terms", {})
            keys = [(int(name.partition(".")[0]), name.partition(".")[2]) for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{store / INDEX} is not an index of rankings: {error}; measure them again") from error
        return cls({key: load_ranking(_file(store, *key)) for key in keys}, cross_terms)


class StoredWeights(Mapping[int, Tensor]):
    """Compensated weights in a safetensors file, by kept count; each is read when it is asked for."""

    def __init__(self, path: Path, counts: Sequence[int]) -> None:
        self.path, self.counts = path, tuple(counts)

    def __getitem__(self, count: int) -> Tensor:
        if count not in self.counts:
            raise KeyError(count)
        return _read(self.path, [f"kept_{count}"])[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def save_ranking(store: Path, block: int, half: Half, ranking: Ranking) -> Ranking:
    """``ranking`` as it is read back from the folder ``store``, so that its weights take no memory."""
    path = _file(store, block, half)
    tensors = {"order": ranking.order, "error": ranking.error}
    if ranking.scores is not None:
        tensors["scores"] = ranking.scores
    tensors |= {f"kept_{count}": weight for count, weight in ranking.weights.items()}
    store.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, half_written)
    half_written.replace(path)
    return replace(ranking, weights=StoredWeights(path, sorted(ranking.weights)))


def save_index(store: Path, rankings: Rankings) -> None:
    """Note in the folder which halves there are: written last, so that an interrupted folder does not load."""
    half_written = store / f"{INDEX}.part"
    names = [f"{block}.{half}" for block, half in sorted(rankings.halves)]
    index = {"halves": names, "cross_terms": rankings.cross_terms}
    half_written.write_text(json.dumps(index), encoding="utf-8")
    half_written.replace(store / INDEX)


def load_ranking(path: Path) -> Ranking:
    """The ranking that ``save_ranking`` wrote."""
    order, error = _read(path, ["order", "error"])
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    counts = sorted(int(name.removeprefix("kept_")) for name in names if name.startswith("kept_"))
    scores = _read(path, ["scores"])[0] if "scores" in names else None
    return Ranking(order, error, StoredWeights(path, counts), scores)


def _file(store: Path, block: int, half: str) -> Path:
    return store / f"{block:02d}.{half}.safetensors"


def _read(path: Path, names: list[str]) -> list[Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return [torch.as_tensor(file.get_tensor(name)) for name in names]
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path} is not a ranking: {error}; measure the losses again") from error
