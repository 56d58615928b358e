"""The latency table of a model on this device: parts measured on a coarse grid, the rest filled in, then corrected."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitprune.errors import InputError
from vitprune.model.config import VitConfig
from vitprune.model.vit import Vit
from vitprune.search.counts import Counts, TokenMethod
from vitprune.search.dims import FITTED
from vitprune.search.latency import Circumstances, LatencyTable, Levels, Timed
from vitprune.search.latency import Pieces as Times

from ..export.precision import DTYPES, opset_for
from ..files import canonical_sha256
from .fingerprint import compare, identity
from .pieces import TOKENS, PieceFiles, only_block, spread
from .protocol import Measurement, Progress
from .timing import time_both, time_call, without_call
from .visits import Subject
from .wholes import Loader, export_whole, random_counts, reachable, slim, subject

MEASURED = {"tokens": 5, "heads": 4, "mlp": 4}  # levels of each that are measured, spread over all
MEASURED_DIMS = {"tokens": 2, "heads": 2}  # those at which heads with fewer dims are
LONG_MS = 10.0  # a reference longer than this runs on one image
STEPS_FITTED = 4  # measured reductions that the fitted form needs
FORMAT = 3  # raised when tables measured before must not be used any more


@dataclass(frozen=True)
class Request:
    """What a table is to cover, and what it is measured with.

    Attributes:
        batch: images of one call.
        threads: of the runtime; None: it decides.
        tokens: levels of patch tokens; all patches are one in any case; 0: a last block that leaves the prefix alone.
        heads, mlp: levels of a block's heads and MLP units; all of them are one in any case, 0 costs nothing.
        methods: token methods whose reductions are measured; whole models use the first.
        qk, v: levels of the dims of a head's queries and keys, and of its values, as those of ``heads``; both empty
            where all of them stay.
        runtime, precision: as a profile names them.
        told: the runtime is told the precision beside graphs in fp32.
        seconds: time to finish in, exporting included; with less, figures get wider intervals.
        seed: draws random plans and the order of visits.
    """

    batch: int
    threads: int | None
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    methods: tuple[TokenMethod, ...] = ()
    runtime: str = "onnxruntime"
    precision: str = "fp32"
    told: bool = False
    seconds: float = 240.0
    seed: int = 0
    qk: tuple[int, ...] = ()
    v: tuple[int, ...] = ()

    @property
    def method(self) -> TokenMethod | None:
        """The token method of whole models."""
        return self.methods[0] if self.methods else None

    @property
    def graph_precision(self) -> str:
        """The number format of the parts' weights."""
        return "fp32" if self.told else self.precision

    @property
    def prefix_only(self) -> bool:
        """Whether the last block may be computed for the prefix tokens alone."""
        return 0 in self.tokens


class Whole(NamedTuple):
    """A measured whole model."""

    counts: Counts
    measurement: Measurement


class Result(NamedTuple):
    """What measuring a model on a device gives.

    Attributes:
        table: with its correction fitted.
        wholes: whole models with the request's first token method; the dense one first.
        pieces: every part that was measured, at the same speed of the machine.
    """

    table: LatencyTable
    wholes: tuple[Whole, ...]
    pieces: tuple[Measurement, ...]


class _Part(NamedTuple):
    """One part at one size: 'stem', 'head', 'attention' (perhaps with a reduction behind it), 'last' or 'mlp'."""

    kind: str
    patches: int
    width: int = 0  # heads or units
    sized: bool = False  # attention with the bias of token sizes
    method: str | None = None
    keep: int = 0  # patches that the method leaves
    dims: tuple[int, int] | None = None  # of a head's queries and keys, and of its values; None: all


def measure_table(
    model: Vit, request: Request, load: Loader, work: Path, *, progress: Progress | None = None
) -> Result:
    """The table of ``model`` on this device.

    Args:
        model: the dense model, at the image size of the budget.
        request: what to cover.
        load: brings an exported file into the runtime.
        work: folder for exported files; those that are there already are used again.
        progress: told of each export and each visit.

    Raises:
        NotSupported: the blocks of the model are not alike, or a part cannot be exported.
        InputError: the levels asked for are not the model's, or too few.
    """
    end = time.monotonic() + request.seconds
    levels = make_levels(model.config, request)
    work = work / f"{shape_key(model.config)[:12]}-{request.precision}-batch{request.batch}"
    files = PieceFiles(model, work, request.batch, request.graph_precision, request.runtime)
    parts = _parts(levels, request)
    paths = _export_parts(files, parts, _phase(progress, 0, 300))
    plans = _anchors(levels, len(model.config.blocks), request)
    wholes = _export_wholes(model, plans, request, work, _phase(progress, 300, 600))
    reference, device = _reference(model, load, levels, request, work)
    pieces, found = time_both(
        [_subject(part, path, load, levels) for part, path in zip(parts, paths, strict=True)],
        [subject(name, path, load, {}) for name, path in wholes.items()],
        reference,
        end=end,
        seed=request.seed,
        progress=_phase(progress, 600, 1000),
    )
    call_ms = time_call(load(files.nothing(), {TOKENS.name: 1}))
    times = {part: without_call(piece.value_ms, call_ms) for part, piece in zip(parts, pieces, strict=True)}
    table = LatencyTable.fill(_circumstances(model.config, request, device), levels, _times(times, request))
    measured = tuple(Whole(plan, one) for plan, one in zip(plans.values(), found, strict=True))
    table = table.fit_correction([Timed(plan, one.value_ms, request.method) for plan, one in measured])
    return Result(table, measured, tuple(pieces))


def make_levels(config: VitConfig, request: Request) -> Levels:
    """The grid of the table that ``request`` asks for.

    Raises:
        NotSupported: the blocks of the model are not alike.
        InputError: a level is not within the model.
    """
    block = only_block(config)
    full = {"tokens": config.patches, "heads": block.heads, "mlp": block.mlp}
    grid = {name: _descending(name, most, getattr(request, name)) for name, most in full.items()}
    if request.qk or request.v:
        most = {"qk": block.qk_dim, "v": block.v_dim}
        grid |= {name: _descending(name, size, getattr(request, name)) for name, size in most.items()}
    width = DTYPES[request.graph_precision].itemsize
    return Levels(
        prefix=config.prefix,
        head_bytes=width * config.dim * 2 * (block.qk_dim + block.v_dim),
        unit_bytes=width * config.dim * (3 if config.gated else 2),
        **grid,
    )


def _descending(name: str, most: int, asked: Sequence[int]) -> tuple[int, ...]:
    """``most`` and the levels ``asked`` for below it."""
    levels = {most, *asked} - {0}
    if min(levels) < 1 or max(levels) > most:
        raise InputError(f"levels of {name} must lie in 0 to {most}, got {sorted(levels)}")
    return tuple(sorted(levels, reverse=True))


def shape_key(config: VitConfig) -> str:
    """Names a model's shapes, whatever its weights and classes are called: sha256 of its configuration."""
    return canonical_sha256(config.to_dict())


def table_key(config: VitConfig, request: Request, device: Mapping[str, Any]) -> dict[str, Any]:
    """All that a table depends on, as plain data: the key of a cache of tables."""
    asked = {k: v for k, v in vars(request).items() if k not in ("methods", "seconds")}
    asked = {k: v for k, v in asked.items() if v or k not in ("qk", "v")}
    return {
        "format": FORMAT,
        "shape": shape_key(config),
        "device": identity(device),
        "methods": [method.name for method in request.methods],
        **{name: list(value) if isinstance(value, tuple) else value for name, value in asked.items()},
    }


def read_table(path: Path) -> LatencyTable:
    """The table in the file ``path``.

    Raises:
        InputError: it is cut off, or no latency table.
    """
    try:
        return LatencyTable.from_dict(json.loads(path.read_bytes()))
    except InputError as error:
        raise InputError(f"measure.table: {path}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"measure.table: {path} is cut off or no JSON ({error})") from error


def accept(table: LatencyTable, config: VitConfig, request: Request, device: Mapping[str, Any]) -> list[str]:
    """Warnings about a table that was measured earlier or elsewhere; empty where nothing speaks against it.

    Raises:
        InputError: it belongs to another device, model, runtime, precision, batch or image size, or lacks levels.
    """
    wanted = _circumstances(config, request, device)
    for name in ("runtime", "precision", "batch", "threads", "image_size", "shape"):
        theirs, ours = getattr(table.circumstances, name), getattr(wanted, name)
        if theirs != ours:
            what = "model" if name == "shape" else f"{name.replace('_', ' ')} {theirs}"
            now = "this one" if name == "shape" else f"{ours}"
            raise InputError(f"the latency table is for another {what}, not for {now}; measure one for it")
    refusals, warnings = compare(table.circumstances.device, device)
    if refusals:
        raise InputError(f"the latency table belongs to another device: {refusals[0]}; measure one on this device")
    levels = make_levels(config, request)
    for name in ("tokens", "heads", "mlp"):
        lacking = sorted(set(getattr(levels, name)) - set(getattr(table.levels, name)))
        if lacking:
            raise InputError(f"the latency table has no {name} level {lacking[0]}; measure it again")
    for method in request.methods:
        if method.name not in table.reduce:
            raise InputError(f"the latency table has no times of {method.name}; measure it again")
    if request.prefix_only and not table.attn_prefix:
        raise InputError("the latency table has no times of a last block for prefix tokens alone; measure it again")
    if any(set(getattr(levels, name)) - set(getattr(table.levels, name)) for name in ("qk", "v")):
        warnings.append(
            "the latency table lacks times of some dims of heads, and those are no choice; measure it again"
        )
    return warnings


def _circumstances(config: VitConfig, request: Request, device: Mapping[str, Any]) -> Circumstances:
    return Circumstances(
        device=dict(device),
        runtime=request.runtime,
        precision=request.precision,
        batch=request.batch,
        threads=request.threads,
        image_size=config.image_size,
        shape=shape_key(config),
    )


def _parts(levels: Levels, request: Request) -> list[_Part]:
    """What to measure: each kind on a coarse grid of its own, and every level of tokens and widths once at least."""
    tokens, heads, units = (spread(getattr(levels, name), count) for name, count in MEASURED.items())
    found = [_Part("stem", tokens[0]), *(_Part("head", n) for n in spread(tokens, 2))]
    found += [_Part("attention", n, h) for n, h in _grid(levels.tokens, tokens, levels.heads, heads)]
    found += [_Part("mlp", n, m) for n, m in _grid(levels.tokens, tokens, levels.mlp, units)]
    if request.prefix_only:
        found += [_Part("last", n, h) for n in tokens for h in heads]
        found += [_Part("head", 0), *(_Part("mlp", 0, m) for m in units)]
    found += _dim_parts(levels)
    if any(method.proportional for method in request.methods):
        found += [_Part("attention", n, heads[0], sized=True) for n in tokens]  # what sizes add grows as n^2 h
    for method in request.methods:
        for n, k in _steps(method, levels, tokens):
            part = _Part("attention", n, heads[0], method.proportional, method.name, k)
            found += [part, _without(part, method)]
    return list(dict.fromkeys(found))


def _dim_parts(levels: Levels) -> list[_Part]:
    """Heads that lack dims, to measure: the fewest of either kind, of both, and half of both, on a few sizes each."""
    keys = levels.dim_keys()
    if not keys:
        return []
    tokens, heads = (spread(getattr(levels, name), count) for name, count in MEASURED_DIMS.items())
    most, fewest, half = (
        (levels.qk[i], levels.v[j]) for i, j in ((0, 0), (-1, -1), (len(levels.qk) // 2, len(levels.v) // 2))
    )
    dims = [fewest, half, (fewest[0], most[1]), (most[0], fewest[1])]
    wanted = {(n, h, *pair) for n in tokens for h in heads for pair in dims}
    some = [key for key in keys if key in wanted]
    return [_Part("attention", n, h, dims=(qk, v)) for n, h, qk, v in (some if len(some) >= FITTED else keys)]


def _without(part: _Part, method: TokenMethod) -> _Part:
    """The attention half beside which a reduction is counted: on the tokens that it is charged for in a search."""
    seen = part.patches if method.where == "after" else part.keep
    return part._replace(patches=seen, method=None, keep=0)


def _grid(
    tokens: Sequence[int], some_tokens: Sequence[int], widths: Sequence[int], some_widths: Sequence[int]
) -> list[tuple[int, int]]:
    """All pairs of some token counts and some widths; every other one of either with the second of the other kind."""
    token, width = (some[min(1, len(some) - 1)] for some in (some_tokens, some_widths))
    pairs = [(n, w) for n in some_tokens for w in some_widths]
    return [*pairs, *((n, width) for n in tokens if n not in some_tokens),
            *((token, w) for w in widths if w not in some_widths)]  # fmt: skip


def _steps(method: TokenMethod, levels: Levels, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Reductions to measure: from each of ``tokens`` the smallest and the largest that one application can do.

    Where these are too few to fit a form, all that there are.

    Raises:
        InputError: the levels are too far apart for the method.
    """
    lower = {n: reachable(method, n, levels) for n in levels.tokens}
    found = [(n, k) for n in tokens if lower[n] for k in spread(lower[n], 2)]
    if len(found) < STEPS_FITTED:
        found = [(n, k) for n in levels.tokens for k in lower[n]]
    if not found:
        raise InputError(
            f"{method.name} cannot go from any of the token levels {list(levels.tokens)} to a lower one; give more "
            "levels, closer to each other"
        )
    return found


def _export_parts(files: PieceFiles, parts: Sequence[_Part], progress: Progress | None) -> list[Path]:
    """The file of each part; parts that differ in token counts alone share one."""
    paths = []
    for number, part in enumerate(parts):
        if part.kind == "attention":
            step = (part.patches, part.keep)
            paths.append(files.attention(part.width, sized=part.sized, method=part.method, step=step, dims=part.dims))
        elif part.kind == "last":
            paths.append(files.attention(part.width, prefix_only=True))
        elif part.kind == "mlp":
            paths.append(files.mlp(part.width))
        else:
            paths.append(files.stem() if part.kind == "stem" else files.head())
        if progress:
            progress(number + 1, len(parts), f"export {paths[-1].stem}")
    return paths


def _subject(part: _Part, path: Path, load: Loader, levels: Levels) -> Subject:
    """The loaded part at its sizes."""
    name = f"{path.stem} {part.patches}{f' to {part.keep}' if part.keep else ''}"
    return subject(name, path, load, {"tokens": levels.prefix + part.patches, "keep": part.keep})


def _anchors(levels: Levels, depth: int, request: Request) -> dict[str, Counts]:
    """Whole models that tell a, b and kappa apart: many or few weights, much or little work on them."""
    patches, heads, units = levels.tokens[0], levels.heads[0], levels.mlp[0]
    third = [min(found, key=lambda level: abs(level - found[0] / 3)) for found in (levels.heads, levels.mlp)]
    rng = np.random.default_rng(request.seed)
    half = depth - depth // 2
    anchors = {
        "dense": Counts.dense([heads] * depth, [units] * depth, patches),
        "narrow": Counts.dense([third[0]] * depth, [third[1]] * depth, patches),
    }
    low = min(reachable(request.method, patches, levels), default=patches)
    if low < patches:
        first = patches if request.method and request.method.watches and depth > 1 else low
        anchors["early"] = Counts((heads,) * depth, (units,) * depth, (first, *(low,) * (depth - 1)))
    else:
        anchors["shallow"] = Counts.dense(
            [heads] * half + [0] * (depth - half), [units] * half + [0] * (depth - half), patches
        )
    anchors["random"] = random_counts(levels, depth, request.method, rng)
    if request.prefix_only:
        anchors |= {name: replace(c, patches=(*c.patches[:-1], 0)) for name, c in anchors.items() if name != "dense"}
    different = {counts: name for name, counts in reversed(anchors.items())}
    return {name: counts for counts, name in reversed(different.items())}


def _export_wholes(
    model: Vit, plans: Mapping[str, Counts], request: Request, work: Path, progress: Progress | None
) -> dict[str, Path]:
    paths = {}
    for number, (name, counts) in enumerate(plans.items()):
        paths[name] = export_whole(
            slim(model, counts, request.method),
            work / f"{name}-{canonical_sha256(counts.to_dict())[:12]}.onnx",
            batch=request.batch,
            precision=request.graph_precision,
            opset=opset_for(request.graph_precision, request.runtime),
        )
        if progress:
            progress(number + 1, len(plans), f"export {name}")
    return paths


def _reference(
    model: Vit, load: Loader, levels: Levels, request: Request, work: Path
) -> tuple[Subject, dict[str, Any]]:
    """A whole block as the reference of all, on one image where a batch takes long; and what runs it where."""
    sizes = {"tokens": levels.prefix + levels.tokens[0]}
    for batch in dict.fromkeys([request.batch, 1]):
        files = PieceFiles(model, work / f"reference{batch}", batch, request.graph_precision, request.runtime)
        path = files.whole_block()
        reference = subject("reference", path, load, sizes)
        if min(reference.run() for _ in range(3)) <= LONG_MS:
            break
    with load(path, sizes) as loaded:
        return reference, reference.machine.fingerprint(loaded.runtime, loaded.provider, request.threads)


def _times(times: Mapping[_Part, float], request: Request) -> Times:
    """The measured parts as the table's type takes them; reductions as differences."""
    methods = {method.name: method for method in request.methods}
    attention = {part: ms for part, ms in times.items() if part.kind == "attention" and part.method is None}
    plain = {part: ms for part, ms in attention.items() if part.dims is None}
    reduce: dict[str, dict[tuple[int, int], float]] = {}
    for part, ms in times.items():
        if part.method is not None:
            without = plain[_without(part, methods[part.method])]
            reduce.setdefault(part.method, {})[part.patches, part.keep] = ms - without
    return Times(
        attn={(part.patches, part.width): ms for part, ms in plain.items() if not part.sized},
        mlp={(part.patches, part.width): ms for part, ms in times.items() if part.kind == "mlp"},
        stem_ms=next(ms for part, ms in times.items() if part.kind == "stem"),
        head={part.patches: ms for part, ms in times.items() if part.kind == "head"},
        attn_sized={(part.patches, part.width): ms for part, ms in plain.items() if part.sized},
        reduce=reduce,
        attn_prefix={(part.patches, part.width): ms for part, ms in times.items() if part.kind == "last"},
        attn_dims={(part.patches, part.width, *part.dims): ms for part, ms in attention.items() if part.dims},
    )


def _phase(progress: Progress | None, start: int, end: int) -> Progress | None:
    """Progress of one phase as a part of the whole, which is 1000 steps long."""
    if progress is None:
        return None
    return lambda done, total, what: progress(start + (end - start) * done // max(1, total), 1000, what)
