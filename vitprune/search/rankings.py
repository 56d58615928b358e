"""The rankings of all halves of a model: from how much stays of each to which units stay, and their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..criteria.base import DimRanking, LayerView, Ranking
from ..criteria.obs import made_up
from ..errors import DamagedFile, InputError
from ..plan import BlockPlan, Dims, Plan
from ..statistics import Half
from ..surgery import rows_of

Dim = Literal["qk", "v"]
INDEX = "rankings.json"
HALVES: tuple[Half, Half] = ("attn", "mlp")
DIMS: tuple[Dim, Dim] = ("qk", "v")


@dataclass(frozen=True)
class Rankings:
    """The ranking of each half that a model has, by block and half; and of the dims of heads, where some may go."""

    halves: Mapping[tuple[int, Half], Ranking]
    dims: Mapping[tuple[int, Dim], DimRanking] = field(default_factory=dict)

    def plan(
        self,
        model_sha256: str,
        kept_heads: Sequence[int],
        kept_mlp: Sequence[int],
        patches_out: Sequence[int | None],
        *,
        patches: int,
        reducer: str | None = None,
        kept_qk: Sequence[int] | None = None,
        kept_v: Sequence[int] | None = None,
    ) -> Plan:
        """The plan that keeps the best ``kept_heads[l]`` heads and ``kept_mlp[l]`` units of block l.

        Args:
            model_sha256: fingerprint of the model that was ranked.
            patches_out: patch tokens that leave each block; None: as many as entered.
            patches: patch tokens of an image.
            reducer: the token method, where a block reduces tokens.
            kept_qk, kept_v: by block, dims of each head's queries and keys, and of its values; None or 0: all.
        """
        blocks = []
        for block, (count, mlp, out) in enumerate(zip(kept_heads, kept_mlp, patches_out, strict=True)):
            heads = self.kept(block, "attn", count)
            qk, v = (None if of is None else of[block] for of in (kept_qk, kept_v))
            dims = self.kept_dims(block, "qk", heads, qk), self.kept_dims(block, "v", heads, v)
            blocks.append(BlockPlan(heads, self.kept(block, "mlp", mlp), out, *dims))
        return Plan(model_sha256, patches, reducer, tuple(blocks))

    def kept(self, block: int, half: Half, count: int) -> tuple[int, ...]:
        """The ``count`` units of a half that stay, ascending."""
        if (block, half) in self.halves:
            return self.halves[block, half].kept(count)
        if count:
            raise InputError(f"block {block} has no {half} of which {count} units could be kept")
        return ()

    def kept_dims(self, block: int, kind: Dim, heads: Sequence[int], count: int | None) -> Dims | None:
        """The ``count`` dims of each of ``heads`` that stay; None where all of them do.

        Raises:
            InputError: the dims were not ranked, and fewer than all are asked for.
        """
        ranking = self.dims.get((block, kind))
        if not count or not heads:
            return None
        if ranking is None:
            raise InputError(f"the {kind} dims of block {block} were not ranked, and {count} of them are to be kept")
        return None if count == ranking.order.shape[1] else tuple(ranking.kept(head, count) for head in heads)

    def weights(
        self,
        kept_heads: Sequence[int],
        kept_mlp: Sequence[int],
        kept_qk: Sequence[int] | None = None,
        kept_v: Sequence[int] | None = None,
    ) -> dict[tuple[int, str], Tensor]:
        """Compensated weights for ``surgery.prune``, of what loses a part of its units. Arguments as of ``plan``.

        Raises:
            InputError: a half was not ranked with compensated weights for the count that is asked for.
        """
        found: dict[tuple[int, str], Tensor | None] = {}
        for block, (heads, units) in enumerate(zip(kept_heads, kept_mlp, strict=True)):
            qk, v = (None if of is None else of[block] for of in (kept_qk, kept_v))
            found[block, "attn"] = self._attention_weight(block, heads, v)
            found[block, "mlp"] = self.weight(block, "mlp", units)
            found[block, "qk"] = self._factors(block, heads, qk)
        return {key: weight for key, weight in found.items() if weight is not None}

    def _attention_weight(self, block: int, count: int, v: int | None) -> Tensor | None:
        """Compensated weight of ``proj`` for ``count`` heads with ``v`` dims of their values; None: all."""
        heads = self.kept(block, "attn", count)
        dims = self.kept_dims(block, "v", heads, v)
        if dims is None:
            return self.weight(block, "attn", count)
        ranking = self.dims[block, "v"]
        return None if ranking.layer is None else made_up(ranking.layer(), rows_of(heads, dims, ranking.order.shape[1]))

    def _factors(self, block: int, count: int, qk: int | None) -> Tensor | None:
        """Factors [heads, dims] of the queries of ``count`` heads with ``qk`` dims; None: they are as they were."""
        heads = self.kept(block, "attn", count)
        if self.kept_dims(block, "qk", heads, qk) is None or qk is None:
            return None
        factors = self.dims[block, "qk"].factors
        if factors and qk not in factors:
            there = ", ".join(map(str, sorted(factors)))
            raise InputError(f"block {block} has factors of queries for {there} dims, not for {qk}")
        return factors[qk][list(heads)] if factors else None

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
            keys, dims = ([_key(name) for name in names] for names in (index["halves"], index.get("dims", [])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFile(f"{store / INDEX} is not an index of rankings: {error}; measure them again") from error
        return cls(
            {key: load_ranking(_file(store, *key)) for key in keys},  # type: ignore[misc]
            {key: load_dim_ranking(_file(store, *key)) for key in dims},  # type: ignore[misc]
        )


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
    tensors |= {f"kept_{count}": weight for count, weight in ranking.weights.items()}
    _write(path, tensors)
    return Ranking(ranking.order, ranking.error, StoredWeights(path, sorted(ranking.weights)))


def save_dim_ranking(store: Path, block: int, kind: Dim, ranking: DimRanking) -> DimRanking:
    """``ranking`` as it is read back from the folder ``store``, so that its matrices take no memory."""
    tensors = {"order": ranking.order, "error": ranking.error}
    tensors |= {f"kept_{count}": factors for count, factors in ranking.factors.items()}
    if ranking.layer is not None:
        layer = ranking.layer()
        assert layer.moments is not None  # from which removed columns are made up for
        tensors |= {"weight": layer.weight, "moments": layer.moments}
    path = _file(store, block, kind)
    _write(path, tensors)
    return load_dim_ranking(path)


def load_dim_ranking(path: Path) -> DimRanking:
    """The ranking that ``save_dim_ranking`` wrote."""
    order, error = _read(path, ["order", "error"])
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    counts = sorted(int(name.removeprefix("kept_")) for name in names if name.startswith("kept_"))
    layer = partial(_read_layer, path) if "moments" in names else None
    return DimRanking(order, error, StoredWeights(path, counts), layer)


def _read_layer(path: Path) -> LayerView:
    weight, moments = _read(path, ["weight", "moments"])
    return LayerView(weight, 1, (), moments)


def save_index(store: Path, rankings: Rankings) -> None:
    """Note in the folder which halves there are: written last, so that an interrupted folder does not load."""
    half_written = store / f"{INDEX}.part"
    index = {"halves": [f"{block}.{half}" for block, half in sorted(rankings.halves)]}
    if rankings.dims:
        index["dims"] = [f"{block}.{kind}" for block, kind in sorted(rankings.dims)]
    half_written.write_text(json.dumps(index), encoding="utf-8")
    half_written.replace(store / INDEX)


def load_ranking(path: Path) -> Ranking:
    """The ranking that ``save_ranking`` wrote."""
    order, error = _read(path, ["order", "error"])
    with safe_open(path, "pt") as file:
        counts = sorted(int(name.removeprefix("kept_")) for name in file.keys() if name.startswith("kept_"))  # noqa: SIM118
    return Ranking(order, error, StoredWeights(path, counts))


def _key(name: str) -> tuple[int, str]:
    """Block and kind of a ranking, by its name in the index."""
    block, _, kind = name.partition(".")
    return int(block), kind


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, half_written)
    half_written.replace(path)


def _file(store: Path, block: int, half: str) -> Path:
    return store / f"{block:02d}.{half}.safetensors"


def _read(path: Path, names: list[str]) -> list[Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return [torch.as_tensor(file.get_tensor(name)) for name in names]
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path} is not a ranking: {error}; measure the losses again") from error
