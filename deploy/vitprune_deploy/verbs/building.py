"""The verbs that run the pipeline, to its end or to one of its stages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.errors import BudgetUnreachable, InputError

from ..console import Console
from ..profile import Profile, load_fleet, load_profile
from .answer import Answer, milliseconds, table
from .figures import account, block_rows, percent

if TYPE_CHECKING:
    from vitprune.search.frontier import Point
    from vitprune.search.latency import Entry, LatencyTable

OUT = Path("out")  # each profile's folder lies in it
MOST_ROWS = 24  # of a frontier, for a person; a program gets all of them


def open_profile(name: str, overrides: Sequence[str], out: Path | None) -> tuple[Profile, Path]:
    """The profile, with all its files there, and its output folder.

    Raises:
        InputError: as ``load_profile``.
    """
    profile = load_profile(name, overrides, files_exist=True)
    return profile, out or OUT / profile.name


def build(
    console: Console,
    name: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    fresh: bool,
    budget: str | None,
    recover: bool,
) -> Answer:
    """From the profile to a validated engine and its report; code 1 unless the verdict is 'pass'."""
    from .. import build as pipeline

    overrides = [*overrides, *(budget_overrides(budget) if budget else [])]
    overrides += [] if recover else ["recover.enabled=false"]
    profiles = load_fleet(name, overrides, files_exist=True)
    profile = next(iter(profiles.values()))
    out = out or OUT / profile.name
    if list(profiles) != [profile.name]:
        return _build_fleet(console, profiles, out, fresh)
    manifest = pipeline.build(profile, out, console, fresh=fresh)
    data = {"folder": str(out), **manifest.model_dump(mode="json", by_alias=True)}
    return Answer(account(manifest, out), data, 0 if manifest.verdict == "pass" else 1)


def _build_fleet(console: Console, profiles: Mapping[str, Profile], out: Path, fresh: bool) -> Answer:
    """A build for each device; code 1 unless all verdicts are 'pass', and 3 where one could not be built."""
    from ..build.fleet import build_fleet
    from ..report.fleet import HEAD, fleet_dict, fleet_row

    boards = build_fleet(profiles, out, console, fresh=fresh)
    rows = [[board.name, *fleet_row(board)] for board in boards]
    reasons = [f"{board.name}: {board.why}" for board in boards if board.why]
    text = "\n".join([table(rows, head=HEAD[:-1]), *reasons, f"{out / 'report.html'} is about all of them"])
    verdicts = {board.manifest.verdict if board.manifest else "none" for board in boards}
    code = 3 if "none" in verdicts else int(verdicts != {"pass"})
    return Answer(text, {"folder": str(out), "devices": fleet_dict(boards)}, code)


def measure(console: Console, name: str, overrides: Sequence[str], out: Path | None, *, fresh: bool) -> Answer:
    """The latency table of the model on this device."""
    from vitprune.search.latency import LatencyTable

    from ..build import pipeline

    profile, out = open_profile(name, overrides, out)
    bench = pipeline.run(profile, out, console, until="measure", fresh=fresh)
    plain = bench.json("measure", "latency_table.json")
    return Answer(_table_text(LatencyTable.from_dict(plain)), plain)


def search(
    console: Console, name: str, overrides: Sequence[str], out: Path | None, *, fresh: bool, budgets: Sequence[str]
) -> Answer:
    """The best plan for each budget by measured parts, none exported; the whole frontier without ``budgets``."""
    from vitprune.search.frontier import from_rows

    from ..build import pipeline

    asked = [(text, *parse_budget(text)) for text in budgets]
    profile, out = open_profile(name, overrides, out)
    bench = pipeline.run(profile, out, console, until="search", fresh=fresh)
    points, found = from_rows(bench.json("search", "frontier.json")), bench.json("search", "search.json")
    dense_ms = found["dense_predicted_ms"]
    wanted = [(text, value if kind == "latency_ms" else dense_ms / value) for text, kind, value in asked]
    rows = _picked(points, wanted) if wanted else [_row(None, point) for point in points]
    data = {"dense_ms": dense_ms, "points": rows, "status": found["status"], "reason": found["reason"]}
    return Answer(_frontier_text(rows, dense_ms), data, int(any(row["counts"] is None for row in rows)))


def export(console: Console, name: str, overrides: Sequence[str], out: Path | None, *, fresh: bool) -> Answer:
    """The pruned model as ONNX, compared with torch; no engine is built or validated."""
    from ..build import pipeline
    from ..files import copy_atomic

    profile, out = open_profile(name, overrides, out)
    bench = pipeline.run(profile, out, console, until="export", fresh=fresh)
    found, folder = bench.json("export", "export.json"), bench.folders["export"]
    files = []
    for file in sorted(folder.glob("model*.onnx*")):
        copy_atomic(file, out / file.name)
        files.append(str(out / file.name))
    rows = [
        [precision, f"{parity['max_abs']:.2g}", percent(parity["top1_agreement"])]
        for precision, parity in found["parity"].items()
    ]
    text = table(rows, head=["precision", "largest difference from torch", "same class (%)"], right=[1, 2])
    return Answer("\n".join([*files, "", text]), {"files": files, **found})


def parse_budget(text: str) -> tuple[str, float]:
    """The key of the profile's section budget, and its value: '5' and '5ms' are latency_ms, '2x' is speedup.

    Raises:
        InputError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(ms|x)?", text.strip())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"--budget must be milliseconds such as 5 or 5ms, or a speed-up such as 2x, got {text!r}")
    return ("speedup" if match[2] == "x" else "latency_ms"), float(match[1])


def budget_overrides(text: str) -> list[str]:
    """``--set`` texts that put the budget ``text`` in place of the profile's. Raises as ``parse_budget``."""
    key, value = parse_budget(text)
    other = {"speedup": "latency_ms", "latency_ms": "speedup"}[key]
    return [f"budget.{key}={value}", f"budget.{other}=null"]


def _picked(points: Sequence[Point], wanted: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """A row for each budget; one that no plan reaches has no counts, and the fastest plan's time."""
    from vitprune.search.frontier import pick

    rows = []
    for text, budget_ms in wanted:
        try:
            rows.append(_row(text, pick(points, budget_ms)) | {"budget_ms": budget_ms})
        except BudgetUnreachable as error:
            nothing = {"predicted_ms": None, "loss": None, "token_method": None, "counts": None}
            rows.append({"asked": text, "budget_ms": budget_ms, **nothing, "fastest_ms": error.fastest_ms})
    return rows


def _row(asked: str | None, point: Point) -> dict[str, Any]:
    return {
        "asked": asked,
        "budget_ms": point.budget_ms,
        "predicted_ms": point.predicted_ms,
        "loss": point.loss,
        "token_method": point.token_method,
        "counts": point.counts.to_dict(),
    }


def _frontier_text(rows: Sequence[dict[str, Any]], dense_ms: float) -> str:
    """A line for each plan; of a long frontier, some spread evenly over it."""
    step = max(1, -(-len(rows) // MOST_ROWS))
    shown = [*rows[:-1:step], rows[-1]]
    head = ["asked", "budget (ms)", "predicted (ms)", "speed-up", "loss (nats)", "keeps"]
    text = table([_cells(row, dense_ms) for row in shown], head=head, right=[1, 2, 3, 4])
    details = [block_rows(row["counts"], row["asked"]) for row in shown if row["counts"] and row["asked"]]
    return "\n\n".join([f"the dense model takes {milliseconds(dense_ms)} ms", text, *details])


def _cells(row: Mapping[str, Any], dense_ms: float) -> list[str]:
    asked, budget, counts = row["asked"] or "", milliseconds(row["budget_ms"]), row["counts"]
    if counts is None:
        return [asked, budget, "none", "", "", f"the fastest plan takes {milliseconds(row['fastest_ms'])} ms"]
    speed, loss = f"{dense_ms / row['predicted_ms']:.2f}x", f"{row['loss']:.4f}"
    left = min(n for n in counts["patches"] if n)
    kept = f"{sum(counts['heads'])} heads, {sum(counts['mlp'])} units, {left} patches at the end"
    return [asked, budget, milliseconds(row["predicted_ms"]), speed, loss, kept]


def _table_text(found: LatencyTable) -> str:
    """The table's circumstances, and milliseconds by patch tokens and width."""
    where, levels = found.circumstances, found.levels
    device = where.device.get("cpu", "this device")
    threads = "all threads" if where.threads is None else f"{where.threads} threads"
    title = f"{device}: {where.runtime} {where.precision}, batch {where.batch}, {threads}, {_pixels(where.image_size)}"
    parts = [title, "milliseconds; ~ marks what was fitted, not measured"]
    kinds: list[tuple[str, Mapping[Any, Entry], Mapping[str, tuple[int, ...]]]] = [
        ("heads", found.attn, {str(n): (n,) for n in levels.heads}),
        ("MLP units", found.mlp, {str(n): (n,) for n in levels.mlp}),
    ]
    if found.attn_dims:
        whole = {f"{qk}/{v}": (levels.heads[0], qk, v) for *_, qk, v in levels.dim_keys()}
        kinds.insert(1, (f"q/k and v dims of {levels.heads[0]} heads", found.attn_dims, whole))
    for name, entries, columns in kinds:
        rows = []
        for patches in levels.tokens:
            cells = [entries[key] for key in ((patches, *sizes) for sizes in columns.values())]
            rows.append([patches, *(f"{'' if cell.measured else '~'}{cell.ms:.3g}" for cell in cells)])
        head = [f"patches \\ {name}", *columns]
        parts.append(table(rows, head=head, right=range(len(head))))
    return "\n\n".join(parts)


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
