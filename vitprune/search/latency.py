"""What the parts of a model cost on one device: measured entries, the rest filled in, and whole models predicted.

A model's time is ``a + b * (stem + head + sum of half blocks and reductions) + kappa * megabytes of weights``: a piece
that is timed in a loop finds its weights in the cache, and inside a model they come cold. Given the tokens, heads and
MLP width are separable, so the table has ``tokens * (heads + mlp)`` entries; where heads may lose dims, attention has
one for each number of heads and dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .counts import Counts, TokenMethod
from .dims import DimKey, dim_keys, fill_dims
from .fit import fit_nonnegative, fit_whole, level_factors

Key = tuple[int, int]


class Entry(NamedTuple):
    """One time of the table. ``measured`` is False where the fitted form predicts it."""

    ms: float
    measured: bool


class Timed(NamedTuple):
    """A whole model that was measured, with the token method that reduces its tokens."""

    counts: Counts
    ms: float
    method: TokenMethod | None = None


@dataclass(frozen=True)
class Circumstances:
    """What a table holds for, and for nothing else.

    Attributes:
        device: the fingerprint of the device.
        runtime, precision: as the profile names them.
        batch: images of one call.
        threads: of the runtime; None: it decides.
        image_size: height and width in pixels.
        shape: names the model's shapes (width, patch size, head size, ...) whatever its weights are.
    """

    device: dict[str, Any]
    runtime: str
    precision: str
    batch: int
    threads: int | None
    image_size: tuple[int, int]
    shape: str


@dataclass(frozen=True)
class Levels:
    """The grid of a table: all descending, the first the whole of it, no 0 (what is removed costs nothing).

    Attributes:
        prefix: tokens in front of the patches, which attention sees as well.
        tokens: numbers of patch tokens.
        heads, mlp: attention heads and MLP hidden units of a block.
        head_bytes, unit_bytes: weights of one head with all its dims and of one MLP unit, biases left out.
        qk, v: dims of a head's queries and keys, and of its values; both empty where all of them stay.
    """

    prefix: int
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    head_bytes: float
    unit_bytes: float
    qk: tuple[int, ...] = ()
    v: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "mlp", *(("qk", "v") if self.qk or self.v else ())):
            levels = getattr(self, name)
            if not levels or list(levels) != sorted(set(levels), reverse=True) or levels[-1] < 1:
                raise InputError(f"a latency table's {name} must be descending numbers from 1 on, got {levels}")
        if self.prefix < 0 or self.head_bytes < 0 or self.unit_bytes < 0:
            raise InputError(f"a latency table's prefix and weight bytes must not be negative, got {self}")

    def steps(self) -> list[Key]:
        """All (patches, fewer patches) of the grid."""
        return list(combinations(self.tokens, 2))

    def dim_keys(self) -> list[DimKey]:
        """All (patches, heads, dims of queries and keys, dims of values) of the grid that lack some dims."""
        return dim_keys(self.tokens, self.heads, self.qk, self.v) if self.qk else []


@dataclass(frozen=True)
class Pieces:
    """Times in milliseconds of the parts that were measured, in place of the whole grid.

    Attributes:
        attn: (patches, heads) -> the attention half with its norm and residual.
        mlp: (patches, units) -> the MLP half.
        stem_ms: everything in front of the first block.
        head: patches -> everything after the last block.
        attn_sized: as ``attn``, with the bias of token sizes; empty where no proportional method is in question.
        reduce: token method -> (patches, fewer patches) -> time of attention with the reduction minus attention alone.
        attn_prefix: as ``attn``, of a last block that is computed for the prefix tokens alone, as its MLP and the head
            then are: (0, units) in ``mlp``, 0 in ``head``; empty where the model reads patches behind it.
        attn_dims: (patches, heads, dims of queries and keys, dims of values) -> the attention half, of heads that lack
            some of their dims; empty where none may go.
    """

    attn: Mapping[Key, float]
    mlp: Mapping[Key, float]
    stem_ms: float
    head: Mapping[int, float]
    attn_sized: Mapping[Key, float]
    reduce: Mapping[str, Mapping[Key, float]]
    attn_prefix: Mapping[Key, float] = field(default_factory=dict)
    attn_dims: Mapping[DimKey, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a model's parts on one device. Token counts between its levels are refused, not interpolated.

    Attributes:
        attn, mlp, attn_sized, head, reduce, attn_prefix, attn_dims: as in ``Pieces``, for the whole grid;
            ``attn_sized``, ``attn_prefix`` and ``attn_dims`` may be empty.
        correction: (a in ms, b, kappa in ms per megabyte), see above; (0, 1, 0) before whole models were measured.
    """

    circumstances: Circumstances
    levels: Levels
    attn: Mapping[Key, Entry]
    mlp: Mapping[Key, Entry]
    stem_ms: float
    head: Mapping[int, Entry]
    attn_sized: Mapping[Key, Entry]
    reduce: Mapping[str, Mapping[Key, Entry]]
    attn_prefix: Mapping[Key, Entry] = field(default_factory=dict)
    correction: tuple[float, float, float] = (0.0, 1.0, 0.0)
    attn_dims: Mapping[DimKey, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = self.levels
        left = (*grid.tokens, 0) if self.attn_prefix else grid.tokens
        _check("attention", self.attn, [(n, h) for n in grid.tokens for h in grid.heads])
        _check("MLP", self.mlp, [(n, m) for n in left for m in grid.mlp])
        _check("head", self.head, list(left))
        if self.attn_prefix:
            _check("last attention", self.attn_prefix, list(self.attn))
        if self.attn_sized:
            _check("sized attention", self.attn_sized, list(self.attn))
        for method, entries in self.reduce.items():
            _check(method, entries, grid.steps())
        _check("head dims", self.attn_dims, grid.dim_keys())
        if not np.isfinite([self.stem_ms, *self.correction]).all() or self.stem_ms < 0 or self.correction[1] <= 0:
            raise InputError(f"latency table: stem_ms {self.stem_ms} or correction {self.correction} is no time")

    @classmethod
    def fill(cls, circumstances: Circumstances, levels: Levels, pieces: Pieces) -> LatencyTable:
        """The table whose entries are the measured ones where there are some, and fitted forms elsewhere.

        With n = prefix + patches: attention c0 + c1 n h + c2 n^2 h + c3 n, without c2 where the prefix tokens alone
        ask; token sizes add c0 + c1 n + c2 n^2 h; MLP c0 + c1 n m + c3 n; a step from n to k tokens c0 + c1 n + c2 n k
        + c3 n^2; the head c0 + c1 n. All c >= 0. Attention and MLP times a factor for each level, see
        ``level_factors``; fewer dims of heads as ``fill_dims`` says.
        Times of reductions are differences, and one that noise made negative counts as 0.

        Raises:
            InputError: an entry lies outside the grid, is no time, or there are too few to fit a form.
        """
        at = levels.prefix
        left = (*levels.tokens, 0) if pieces.attn_prefix else levels.tokens
        attn_keys = [(n, h) for n in levels.tokens for h in levels.heads]
        mlp_keys = [(n, m) for n in left for m in levels.mlp]
        work = [_attention(at + n, h) for n, h in attn_keys]
        attn = _fill("attention", attn_keys, pieces.attn, work, by_level=True)
        work = [(1, (at + n) * m, at + n) for n, m in mlp_keys]
        mlp = _fill("MLP", mlp_keys, pieces.mlp, work, by_level=True)
        head = _fill("head", list(left), pieces.head, [(1, at + n) for n in left])
        asked = [(1, (at + n) * h, at + n) for n, h in attn_keys]
        prefix = _fill("last attention", attn_keys, pieces.attn_prefix, asked) if pieces.attn_prefix else {}
        steps = levels.steps()
        moved = [(1, at + n, (at + n) * (at + k), (at + n) ** 2) for n, k in steps]
        reduce = {
            # of a few levels, a few steps: as many terms of the form as there are
            name: _fill(
                name,
                steps,
                {k: max(0.0, ms) for k, ms in measured.items()},
                [row[: max(1, len(measured))] for row in moved],
            )
            for name, measured in pieces.reduce.items()
        }
        sized = _fill_sized(attn, pieces.attn_sized, at) if pieces.attn_sized else {}
        found = cls(circumstances, replace(levels, qk=(), v=()), attn, mlp, pieces.stem_ms, head, sized, reduce, prefix)
        return found._with_dims(levels, pieces.attn_dims)

    def _with_dims(self, levels: Levels, measured: Mapping[DimKey, float]) -> LatencyTable:
        """The table over ``levels``, with entries of heads that lack dims."""
        keys = levels.dim_keys()
        if not keys and not measured:
            return self
        whole_ms = {key: entry.ms for key, entry in self.attn.items()}
        filled = fill_dims(keys, (levels.qk[0], levels.v[0]), levels.prefix, whole_ms, measured)
        return replace(self, levels=levels, attn_dims={key: Entry(ms, key in measured) for key, ms in filled.items()})

    @property
    def tokens(self) -> tuple[int, ...]:
        """Levels of patch tokens, descending."""
        return self.levels.tokens

    def attn_ms(self, patches: int, heads: int, sized: bool = False, dims: tuple[int, int] | None = None) -> float:
        """The attention half on ``prefix + patches`` tokens; 0 for 0 heads.

        Args:
            sized: with the bias of token sizes, which takes as long whatever dims there are.
            dims: of a head's queries and keys, and of its values; None: all.

        Raises:
            InputError: the table has no such entry.
        """
        if heads == 0:
            return 0.0
        name, entries = ("sized attention", self.attn_sized) if sized else ("attention", self.attn)
        return self._entry(name, entries, (patches, heads)) - self._saved_ms(patches, heads, dims)

    def attn_prefix_ms(self, patches: int, heads: int, dims: tuple[int, int] | None = None) -> float:
        """The attention half of a last block computed for the prefix tokens alone. Arguments as of ``attn_ms``.

        Dims are taken to save the same share as where all tokens ask.
        """
        if heads == 0:
            return 0.0
        share = self._saved_ms(patches, heads, dims) / max(self.attn_ms(patches, heads), 1e-300)
        return self._entry("last attention", self.attn_prefix, (patches, heads)) * (1 - share)

    def _saved_ms(self, patches: int, heads: int, dims: tuple[int, int] | None) -> float:
        """What attention takes less when heads lack dims."""
        if dims is None or dims == (*self.levels.qk[:1], *self.levels.v[:1]):
            return 0.0
        return self.attn[patches, heads].ms - self._entry("head dims", self.attn_dims, (patches, heads, *dims))

    def mlp_ms(self, patches: int, units: int) -> float:
        """The MLP half; 0 for 0 units. Raises as ``attn_ms``."""
        return 0.0 if units == 0 else self._entry("MLP", self.mlp, (patches, units))

    def reduce_ms(self, method: str, patches: int, fewer: int) -> float:
        """Turning ``patches`` into ``fewer``; 0 where none leave. Raises as ``attn_ms``."""
        if patches == fewer:
            return 0.0
        return self._entry(f"{method} reduction", self.reduce.get(method, {}), (patches, fewer))

    def head_ms(self, patches: int) -> float:
        """Everything after the last block. Raises as ``attn_ms``."""
        return self._entry("head", self.head, patches)

    def _entry(self, name: str, entries: Mapping[Any, Entry], key: Any) -> float:
        if key not in entries:
            known = f"tokens {self.levels.tokens}, heads {self.levels.heads}, mlp {self.levels.mlp}"
            known += f", dims {self.levels.qk} and {self.levels.v}" if self.levels.qk else ""
            raise InputError(f"the latency table has no {name} entry for {key}; it covers {known}; measure it again")
        return entries[key].ms

    def megabytes(self, counts: Counts) -> float:
        """Weights of the kept heads and units, in 10^6 bytes."""
        heads: float = sum(counts.heads)
        if counts.qk is not None:
            heads = sum(n * self.share_of_head(counts.dims(block)) for block, n in enumerate(counts.heads))
        return (self.levels.head_bytes * heads + self.levels.unit_bytes * sum(counts.mlp)) / 1e6

    def share_of_head(self, dims: tuple[int, int] | None) -> float:
        """The share of a head's weights that ``dims`` of its queries and keys, and of its values, make up."""
        if dims is None or not self.levels.qk:
            return 1.0
        return sum(dims) / (self.levels.qk[0] + self.levels.v[0])

    def sum_ms(self, counts: Counts, method: TokenMethod | None = None) -> float:
        """The sum of the parts, uncorrected. ``method`` reduces the tokens; None where none leaves.

        Raises:
            InputError: the table lacks an entry, or tokens leave without a method or in a block without attention.
        """
        total, patches = self.stem_ms, self.levels.tokens[0]
        for block, (heads, units, left) in enumerate(zip(counts.heads, counts.mlp, counts.patches, strict=True)):
            dims = counts.dims(block)
            if left == 0:
                return total + self.attn_prefix_ms(patches, heads, dims) + self.mlp_ms(0, units) + self.head_ms(0)
            if left != patches and (method is None or heads == 0):
                why = "without a token method" if method is None else "without attention"
                raise InputError(f"block {block} turns {patches} patch tokens into {left} {why}")
            if left != patches and method is not None:
                total += self.reduce_ms(method.name, patches, left)
            seen = left if method is not None and method.where != "after" else patches
            sized = method is not None and method.proportional and seen < self.levels.tokens[0]
            total += self.attn_ms(seen, heads, sized, dims) + self.mlp_ms(left, units)
            patches = left
        return total + self.head_ms(patches)

    def predict_ms(self, counts: Counts, method: TokenMethod | None = None) -> float:
        """Milliseconds of the whole model under ``counts``: the corrected sum of its parts. Raises as ``sum_ms``."""
        a, b, kappa = self.correction
        return a + b * self.sum_ms(counts, method) + kappa * self.megabytes(counts)

    def fit_correction(self, wholes: Sequence[Timed]) -> LatencyTable:
        """The table with a, b and kappa fitted on measured whole models.

        Raises:
            InputError: there are none, or one's time is not positive.
        """
        whole_ms = np.array([whole.ms for whole in wholes], dtype=float)
        if not len(wholes) or not np.isfinite(whole_ms).all() or whole_ms.min() <= 0:
            raise InputError(f"the correction needs times of whole models, got {whole_ms.tolist()}")
        sums = np.array([self.sum_ms(whole.counts, whole.method) for whole in wholes])
        megabytes = np.array([self.megabytes(whole.counts) for whole in wholes])
        return replace(self, correction=fit_whole(sums, megabytes, whole_ms))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON; entries as [key, key, ms, measured]."""
        return {
            "circumstances": asdict(self.circumstances) | {"image_size": list(self.circumstances.image_size)},
            "levels": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.levels).items() if v != ()},
            "attn": _plain(self.attn),
            "mlp": _plain(self.mlp),
            "stem_ms": self.stem_ms,
            "head": [[n, *entry] for n, entry in self.head.items()],
            "attn_sized": _plain(self.attn_sized),
            "reduce": {name: _plain(entries) for name, entries in self.reduce.items()},
            "attn_prefix": _plain(self.attn_prefix),
            "correction": list(self.correction),
            **({"attn_dims": [[*key, *entry] for key, entry in self.attn_dims.items()]} if self.attn_dims else {}),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LatencyTable:
        """The table that ``to_dict`` wrote.

        Raises:
            InputError: a key is missing or unknown, or a value is of another kind.
        """
        try:
            levels: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain["levels"].items()}
            return cls(
                circumstances=Circumstances(
                    **{**plain["circumstances"], "image_size": tuple(plain["circumstances"]["image_size"])}
                ),
                levels=Levels(**levels),
                attn=_entries(plain["attn"]),
                mlp=_entries(plain["mlp"]),
                stem_ms=float(plain["stem_ms"]),
                head={int(n): Entry(float(ms), bool(measured)) for n, ms, measured in plain["head"]},
                attn_sized=_entries(plain["attn_sized"]),
                reduce={name: _entries(rows) for name, rows in plain["reduce"].items()},
                attn_prefix=_entries(plain["attn_prefix"]),
                correction=_three(plain["correction"]),
                attn_dims={
                    (int(n), int(h), int(qk), int(v)): Entry(float(ms), bool(measured))
                    for n, h, qk, v, ms, measured in plain.get("attn_dims", ())
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is not a latency table: {type(error).__name__} {error}") from error


def _attention(n: int, heads: int) -> tuple[float, ...]:
    return (1, n * heads, n * n * heads, n)


def _fill(
    name: str,
    keys: Sequence[Any],
    measured: Mapping[Any, float],
    work: Sequence[Sequence[float]],
    *,
    by_level: bool = False,
) -> dict[Any, Entry]:
    """Entries for all ``keys``; ``work`` [keys, F] are the features of the fitted form.

    ``by_level``: what the form misses is ascribed to the two levels of an entry; see ``level_factors``.
    """
    for key, ms in measured.items():
        if key not in keys:
            raise InputError(f"latency table: {name} entry {key} lies outside the grid {keys[0]} .. {keys[-1]}")
        if not np.isfinite(ms) or ms < 0:
            raise InputError(f"latency table: {name} entry {key} must be a time in milliseconds, got {ms}")
    if len(measured) < min(len(keys), len(work[0]) if work else 0):
        raise InputError(
            f"latency table: {len(measured)} measured {name} entries are too few, {len(work[0])} are needed"
        )
    if len(measured) == len(keys):
        return {key: Entry(float(measured[key]), True) for key in keys}
    features = np.array(work, dtype=float)
    rows = [keys.index(key) for key in measured]
    predicted = features @ fit_nonnegative(features[rows], np.array(list(measured.values()), dtype=float))
    if by_level and min(measured.values()) > 0 and predicted[rows].min() > 0:
        ratios = {key: ms / predicted[row] for row, (key, ms) in zip(rows, measured.items(), strict=True)}
        predicted = predicted * level_factors(keys, ratios)
    return {
        key: Entry(float(measured[key]), True) if key in measured else Entry(float(ms), False)
        for key, ms in zip(keys, predicted, strict=True)
    }


def _fill_sized(attn: Mapping[Key, Entry], measured: Mapping[Key, float], prefix: int) -> dict[Key, Entry]:
    """Attention with token sizes: what they add to ``attn`` is fitted, since few of its entries need be measured."""
    for key in measured:
        if key not in attn:
            raise InputError(f"latency table: sized attention entry {key} lies outside the grid")
    extra = {key: max(0.0, ms - attn[key].ms) for key, ms in measured.items()}
    work = [(1, prefix + n, (prefix + n) ** 2 * h) for n, h in attn]
    filled = _fill("sized attention", list(attn), extra, work)
    return {
        key: Entry(float(measured[key]), True) if key in measured else Entry(attn[key].ms + more.ms, False)
        for key, more in filled.items()
    }


def _check(name: str, entries: Mapping[Any, Entry], keys: Sequence[Any]) -> None:
    lacking = [key for key in keys if key not in entries]
    if lacking or len(entries) != len(keys):
        what = f"lacks {lacking[0]}" if lacking else "has entries outside its levels"
        raise InputError(f"latency table: the {name} entries {'' if entries else '(none) '}{what}")
    for key, entry in entries.items():
        if not np.isfinite(entry.ms) or entry.ms < 0:
            raise InputError(f"latency table: {name} entry {key} must be a time in milliseconds, got {entry.ms}")


def _plain(entries: Mapping[Key, Entry]) -> list[list[Any]]:
    return [[*key, *entry] for key, entry in entries.items()]


def _entries(rows: Sequence[Sequence[Any]]) -> dict[Key, Entry]:
    return {(int(n), int(size)): Entry(float(ms), bool(measured)) for n, size, ms, measured in rows}


def _three(values: Sequence[Any]) -> tuple[float, float, float]:
    a, b, kappa = (float(value) for value in values)
    return a, b, kappa
