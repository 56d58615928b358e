"""Turns ``Facts`` into one HTML file that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..validate.consistency import check_row
from ..validate.fusion import fusion_rows
from . import figures
from .facts import Facts, ModelFacts
from .words import UNKNOWN, count, digits, fallen, megabytes, ms, percent, plain

STATUS = {"built": "built, not run here", "run": "built, run and measured here"}
WORDS = {"pass": "Pass", "fail": "Fail", "unstable": "Unstable"}


def render(facts: Facts) -> str:
    """The page. Whatever text the facts hold is escaped.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; it comes with the extra ``prune``.
    """
    page = templates()
    filters: dict[str, Any] = {
        "fallen": fallen, "percent": percent, "plain": plain, "worst_row": worst_row, "engine_row": engine_row,
        "check_row": check_row,
    }  # fmt: skip
    page.filters.update(filters)
    charts = {
        name: getattr(figures, name)(facts) for name in ("latency", "frontier", "blocks", "wholes", "pieces", "losses")
    }
    return page.get_template("page.html.j2").render(
        facts=facts, word=WORDS[facts.verdict.verdict], charts=charts, rows=comparison(facts), asked=asked(facts),
        accuracy=facts.accuracy or {}, search=facts.search or {}, fusion=fusion_rows(facts.fusion),
    ) + "\n"  # fmt: skip


def templates() -> Any:
    """The pages' templates; whatever text goes into them is escaped. Raises as ``render``."""
    import jinja2

    loader = jinja2.PackageLoader("vitprune_deploy", "report")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def asked(facts: Facts) -> list[str]:
    """What the profile asks for, a phrase each."""
    limits = facts.limits
    budget = f"p{limits.percentile} at most {ms(limits.latency_ms)}"
    found = [f"{budget} ({facts.asked})" if facts.asked else budget]
    if limits.max_drop is not None:
        found.append(f"top-1 at most {limits.max_drop:g} points below the dense model in fp32")
    if limits.min_top1 is not None:
        found.append(f"top-1 at least {limits.min_top1:g}%")
    if limits.min_agreement is not None:
        found.append(f"agreement with the dense model at least {limits.min_agreement:g}%")
    if limits.memory_mb is not None:
        found.append(f"memory at most {limits.memory_mb:g} MB")
    return found


def comparison(facts: Facts) -> list[tuple[str, str, str, str]]:
    """Rows of (figure, dense, pruned, change) for the table under the verdict."""
    dense, pruned, accuracy = facts.dense, facts.pruned, facts.accuracy or {}
    rows = [_times("Parameters", dense.params, pruned.params, count),
            _times("MACs for one image", dense.macs, pruned.macs, count)]  # fmt: skip
    paired = accuracy.get("paired")
    change = f"{fallen(paired['drop'])} points ({fallen(paired['high'])} to {fallen(paired['low'])})" if paired else ""
    rows.append(("Top-1 (95% interval)", _share(accuracy.get("dense")), _share(accuracy.get("pruned")), change))
    rows.append(("Names the class that the dense engine names", "", _share(accuracy.get("agreement")), ""))
    for number in sorted({50, 90, 99, facts.limits.percentile}):
        rows.append(_latency(number, dense, pruned))
    rows.append(_times("Predicted median latency", dense.predicted_ms, pruned.predicted_ms, ms))
    rows.append(_times("Model file", dense.size_bytes, pruned.size_bytes, megabytes))
    rows.append(
        _times("Memory that loading and running adds", dense.memory_mb, pruned.memory_mb, lambda v: f"{v:.0f} MB")
    )
    return [row for row in rows if {row[1], row[2]} - {"", UNKNOWN}]


def worst_row(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A class that loses, for the table of them."""
    change = f"{found['pruned'] - found['dense']:+.2f} points"
    return (found["name"], f"{found['images']:,}", percent(found["dense"]), percent(found["pruned"]), change)


def engine_row(found: Mapping[str, Any]) -> tuple[str, ...]:
    """An engine, with its status in plain words."""
    name = " ".join(str(found[key]) for key in ("model", "file") if found.get(key)) or "pruned model"
    status = STATUS.get(found["status"], found["status"])
    return (name, found["runtime"], found["precision"], f"{status}; {found['note']}" if found.get("note") else status)


def _times(name: str, dense: float | None, pruned: float | None, show: Any) -> tuple[str, str, str, str]:
    """A row whose change is how many times less the pruned model takes."""
    change = f"{dense / pruned:.2f} times less" if dense and pruned and dense > 1.005 * pruned else ""
    return (name, UNKNOWN if dense is None else show(dense), UNKNOWN if pruned is None else show(pruned), change)


def _latency(number: int, dense: ModelFacts, pruned: ModelFacts) -> tuple[str, str, str, str]:
    name = f"Latency p{number} of single runs (95% interval)"
    values = [_percentile(one.latency, number) for one in (dense, pruned)]
    texts = [UNKNOWN if one is None else f"{ms(one[0])} ({digits(one[1])} to {digits(one[2])})" for one in values]
    first, second = values
    change = f"{first[0] / second[0]:.2f} times faster" if first and second else ""
    return (name, texts[0], texts[1], change)


def _percentile(latency: Mapping[str, Any], number: int) -> tuple[float, float, float] | None:
    """Value and interval; None where too few runs are behind the percentile."""
    ends = latency.get("intervals_ms", {}).get(f"p{number}")
    return None if ends is None else (latency[f"p{number}"], *ends)


def _share(found: Mapping[str, Any] | None) -> str:
    if not found:
        return UNKNOWN
    return f"{found['percent']:.2f}% ({found['low']:.2f} to {found['high']:.2f})"
