"""The charts of the page, each with the table of its numbers and the circumstances that they hold for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from vitprune.errors import InputError
from vitprune.search.latency import Key, LatencyTable, Pieces

from .charts import Axis, Pair, Plot, bars, staircase
from .facts import Facts, ModelFacts
from .words import ms

MOST_POINTS = 240  # of a line
MOST_ROWS = 24  # of the table behind a chart
LOSS = "loss by the search (nats per image)"


class Chart(NamedTuple):
    """Drawings, what they show, and the table behind them."""

    svgs: tuple[str, ...]
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def latency(facts: Facts) -> Chart | None:
    """How single runs of both engines are spread, against the budget; None where nothing was measured."""
    models = {name: one for name, one in (("dense", facts.dense), ("pruned", facts.pruned)) if one.latency}
    if not models:
        return None
    spans = {name: _percentiles(one.latency) for name, one in models.items()}
    shown = [value for rows in spans.values() for row in rows for value in row[1:]]
    for one in models.values():  # the slowest runs would press all others to the edge
        shown += np.percentile(one.runs_ms, [0, 99.5]).tolist() if one.runs_ms else []
    axis = Axis.around("milliseconds for one batch", [*shown, facts.limits.latency_ms])
    plot = Plot("Latency of single runs", axis, Axis("percent of runs", 0, 100))
    for name, one in models.items():
        steps = [pair for pair in staircase(one.runs_ms) if pair[0] <= axis.high] if one.runs_ms else []
        dots = [(value, float(number)) for number, value, _, _ in spans[name]]
        if len(steps or dots) > 1:
            plot.line(steps or dots, name if steps else f"{name} sketch", step=bool(steps))
        plot.whiskers([((low, float(n)), (high, float(n))) for n, _, low, high in spans[name]], name)
        tips = [f"{name} p{n}: {ms(value)} ({ms(low)} to {ms(high)})" for n, value, low, high in spans[name]]
        plot.dots(dots, name, f"{name} (p{', p'.join(str(row[0]) for row in spans[name])})", tips=tips)
    plot.rule(
        facts.limits.latency_ms, "budget", f"budget for p{facts.limits.percentile}: {ms(facts.limits.latency_ms)}"
    )
    rows = tuple(
        (
            name,
            f"p{n}",
            ms(value),
            f"{ms(low)} to {ms(high)}",
            ms(models[name].latency.get("raw_ms", {}).get(f"p{n}")),
        )
        for name in models
        for n, value, low, high in spans[name]
    )
    note = " ".join(_runs(name, one) for name, one in models.items())
    head = ("engine", "percentile", "latency", "95% interval", "as the clock gave it")
    return Chart((plot.svg(),), note, head, rows)


def frontier(facts: Facts) -> Chart | None:
    """What every budget would have cost, with what was chosen and what was measured."""
    search = facts.search or {}
    measured, chosen = list(search.get("measured", ())), search.get("chosen")
    if not facts.frontier and not measured:
        return None
    points = sorted((point.predicted_ms, point.loss) for point in facts.frontier)
    budget_ms = search.get("budget_ms", facts.limits.latency_ms)
    ends = [end for row in measured for end in (row["low_ms"], row["high_ms"])]
    x = Axis.around("median milliseconds for one batch", [*(p[0] for p in points), *ends, budget_ms])
    y = Axis.around(LOSS, [*(p[1] for p in points), *(row["loss"] for row in measured)], zero=True)
    plot = Plot("Frontier: latency against loss", x, y)
    if points:
        plot.line(_thinned(points, MOST_POINTS), "frontier", "best plans, predicted")
    plot.rule(budget_ms, "budget", f"budget {ms(budget_ms)}")
    _measurements(plot, facts, measured)
    if chosen:
        tip = f"chosen: measured {ms(chosen['measured_ms'])}, predicted {ms(chosen['predicted_ms'])}"
        plot.dots([(chosen["measured_ms"], chosen["loss"])], "chosen", "chosen, measured", tips=[tip])
    table = [("frontier", ms(predicted), "", f"{loss:.4g}") for predicted, loss in _thinned(points, MOST_ROWS)]
    table += [(_which(facts, r), ms(r["predicted_ms"]), _span(r), f"{r['loss']:.4g}") for r in measured]
    if chosen:
        table += [("chosen", ms(chosen["predicted_ms"]), _span(chosen), f"{chosen['loss']:.4g}")]
    note = f"{len(points)} plans on the frontier; {len(measured)} measurements of whole models, with 95% intervals."
    head = ("plan", "predicted", "measured (95% interval)", "loss in nats per image")
    return Chart((plot.svg(),), note, head, tuple(table))


def _measurements(plot: Plot, facts: Facts, measured: Sequence[Mapping[str, Any]]) -> None:
    """Adds what was measured on the way to the budget, the dense model in its own colour."""
    for kind in ("measured", "dense"):
        rows = [row for row in measured if (kind == "dense") == _is_dense(facts, row)]
        if rows:
            plot.whiskers([((r["low_ms"], r["loss"]), (r["high_ms"], r["loss"])) for r in rows], kind)
            tips = [f"{_which(facts, r)}: {ms(r['measured_ms'])}, predicted {ms(r['predicted_ms'])}" for r in rows]
            plot.dots([(row["measured_ms"], row["loss"]) for row in rows], kind, kind, tips=tips)


def _is_dense(facts: Facts, row: Mapping[str, Any]) -> bool:
    counts = facts.dense.counts
    return counts is not None and row.get("counts") == counts.to_dict()


def _which(facts: Facts, row: Mapping[str, Any]) -> str:
    return f"{'dense' if _is_dense(facts, row) else 'measured'}, round {row['round']}"


def blocks(facts: Facts) -> Chart | None:
    """Tokens, heads and MLP units that each block keeps."""
    dense, pruned = facts.dense.counts, facts.pruned.counts
    if dense is None or pruned is None:
        return None
    kinds = (("Patch tokens that leave each block", "tokens", "patches"), ("Attention heads", "heads", "heads"),
             ("MLP hidden units", "units", "mlp"))  # fmt: skip
    pairs = {unit: (getattr(dense, name), getattr(pruned, name)) for _, unit, name in kinds}
    drawn = tuple(bars(title, unit, *pairs[unit]) for title, unit, _ in kinds)
    dims = [pruned.dims(block) for block in range(len(dense.heads))]
    rows = tuple(
        (
            str(block),
            *(f"{kept[block]:,} of {had[block]:,}" for had, kept in pairs.values()),
            *((_of_each_head(some),) if any(dims) else ()),
        )
        for block, some in enumerate(dims)
    )
    note = f"Tokens are reduced by {facts.token_method}." if facts.token_method else "No token method reduces tokens."
    if pruned.patches[-1] == 0:
        note += " The last block is computed for the class token alone, from all patches that enter it."
    gone = [f"{sum(not n for n in kept)} {what}" for what, kept in (("attention", pruned.heads), ("MLP", pruned.mlp))
            if not all(kept)]  # fmt: skip
    if gone:
        note += f" Halves of blocks that are removed altogether: {' and '.join(gone)}."
    head = ("block", "patch tokens", "heads", "MLP units", *(("dims of each head",) if any(dims) else ()))
    return Chart(drawn, note, head, rows)


def _of_each_head(dims: tuple[int, int] | None) -> str:
    return f"{dims[0]} of queries and keys, {dims[1]} of values" if dims else "-"


def wholes(facts: Facts) -> Chart | None:
    """Whole models: what the table says of them against what was measured."""
    if not facts.wholes:
        return None
    held, fitted = ([w for w in facts.wholes if w.fitted is flag] for flag in (False, True))
    plot = _against("Whole models: prediction against measurement", [
        value for w in facts.wholes for value in (w.predicted_ms, w.low_ms, w.high_ms)])  # fmt: skip
    for kind, label, group in (("fitted", "fitted on", fitted), ("measured", "not fitted on", held)):
        if group:
            pairs = [(w.predicted_ms, w.measured_ms) for w in group]
            plot.whiskers([((w.predicted_ms, w.low_ms), (w.predicted_ms, w.high_ms)) for w in group], kind)
            plot.dots(pairs, kind, label, tips=[f"predicted {ms(p)}, measured {ms(m)}" for p, m in pairs])
    notes = [_errors(f"{len(group)} whole models {label}", [(w.predicted_ms, w.measured_ms) for w in group])
             for label, group in (("that the correction was fitted on", fitted), ("that it was not fitted on", held))
             if group]  # fmt: skip
    rows = tuple(
        (ms(w.predicted_ms), f"{ms(w.measured_ms)} ({ms(w.low_ms)} to {ms(w.high_ms)})",
         f"{100 * (w.predicted_ms / w.measured_ms - 1):+.1f}%", "yes" if w.fitted else "no")
        for w in _thinned(facts.wholes, MOST_ROWS)
    )  # fmt: skip
    return Chart((plot.svg(),), " ".join(notes), ("predicted", "measured (95% interval)", "error", "fitted on"), rows)


def pieces(facts: Facts) -> Chart | None:
    """Halves of blocks: each measured entry of the table against what the form fitted on the others says of it."""
    if facts.table is None:
        return None
    table = facts.table
    note = f"{_coverage('attention', table.attn.values())}, {_coverage('MLP', table.mlp.values())}."
    groups = {"attention": _left_out(table, "attn"), "MLP": _left_out(table, "mlp")}
    everything = [pair for group in groups.values() for pair in group.values()]
    if not everything:
        return Chart((), f"{note} Too few were measured to leave one out and predict it.", (), ())
    plot = _against(
        "Halves of blocks: prediction against measurement", [value for pair in everything for value in pair]
    )
    for kind, (label, group) in zip(("attention", "mlp"), groups.items(), strict=True):
        tips = [f"{label}, {n} tokens, width {w}: predicted {ms(p)}, measured {ms(m)}"
                for (n, w), (p, m) in group.items()]  # fmt: skip
        plot.dots(list(group.values()), kind, label if group else "", tips=tips)
    note += " " + _errors("Each measured entry, predicted from the others", everything)
    rows = [(label, str(n), str(width), ms(p), ms(m), f"{100 * (p / m - 1):+.1f}%")
            for label, group in groups.items() for (n, width), (p, m) in group.items()]  # fmt: skip
    head = ("half", "patch tokens", "heads or units", "predicted", "measured", "error")
    return Chart((plot.svg(),), note, head, tuple(_thinned(rows, 2 * MOST_ROWS)))


def losses(facts: Facts) -> Chart | None:
    """Plans that the search evaluated: the sum of their single losses against the true one."""
    tried: list[Pair] = [(one[0], one[1]) for one in (facts.search or {}).get("evaluations", ())]
    if not tried:
        return None
    x = Axis.around("sum of single losses (nats per image)", [one[0] for one in tried])
    plot = Plot(
        "Sum of single losses against true loss",
        x,
        Axis.around("true loss (nats per image)", [one[1] for one in tried]),
    )
    plot.dots(
        tried, "measured", "plans evaluated", tips=[f"sum {s:.4g}, true {t:.4g} nats per image" for s, t in tried]
    )
    rank = (facts.search or {}).get("rank_correlation")
    note = f"{len(tried)} whole plans evaluated, the unrefined one first ({tried[0][1]:.4g} nats per image); " \
           f"the least true loss is {min(t for _, t in tried):.4g}. "  # fmt: skip
    note += "Too few for a rank correlation." if rank is None else f"Spearman's rank correlation {rank:.2f}."
    rows = tuple((f"{s:.4g}", f"{t:.4g}") for s, t in _thinned(tried, MOST_ROWS))
    return Chart((plot.svg(),), note, ("sum of single losses (nats)", "true loss (nats)"), rows)


def _left_out(table: LatencyTable, half: str) -> dict[Key, Pair]:
    """(predicted, measured) of each measured entry of a half, by the form fitted on all others of it."""
    entries: Mapping[Key, Any] = getattr(table, half)
    measured = {key: entry.ms for key, entry in entries.items() if entry.measured}
    attn, mlp, head = ({key: entry.ms for key, entry in one.items()} for one in (table.attn, table.mlp, table.head))
    given = Pieces(attn, mlp, table.stem_ms, head, {}, {})  # type: ignore[arg-type]  # head goes by tokens alone
    found = {}
    for key, took in measured.items():
        others = {other: value for other, value in measured.items() if other != key}
        try:
            rest = replace(given, attn=others) if half == "attn" else replace(given, mlp=others)
            filled = LatencyTable.fill(table.circumstances, table.levels, rest)
        except InputError:  # too few are left to fit the form
            return {}
        found[key] = (getattr(filled, half)[key].ms, took)
    return found


def _against(title: str, values: Sequence[float]) -> Plot:
    """A plane on which measured is up and predicted is right, with the line on which they agree."""
    across = Axis.around("predicted (ms)", values)
    plot = Plot(title, across, replace(across, label="measured (ms)"))
    plot.line([(across.low, across.low), (across.high, across.high)], "equal", "predicted = measured")
    return plot


def _percentiles(found: Mapping[str, Any]) -> list[tuple[int, float, float, float]]:
    """(number, value, low, high) of what ``latency_dict`` holds, ascending."""
    numbers = sorted(int(name[1:]) for name in found.get("intervals_ms", {}))
    return [(number, found[f"p{number}"], *found["intervals_ms"][f"p{number}"]) for number in numbers]


def _runs(name: str, one: ModelFacts) -> str:
    found = one.latency
    text = f"{name.capitalize()}: {found['samples']:,} runs counted"
    if "rejected" in found:
        text += f", {found['rejected']:,} rejected because another process ran"
    if not found.get("gated", True):
        text += ", in the end counted regardless of other processes, with wider intervals"
    return text + "."


def _coverage(name: str, entries: Iterable[Any]) -> str:
    flags = [entry.measured for entry in entries]
    return f"{sum(flags)} of {len(flags)} {name} entries measured, the rest filled in by the fitted form"


def _errors(what: str, pairs: Sequence[Pair]) -> str:
    off = [abs(100 * (predicted / measured - 1)) for predicted, measured in pairs if measured > 0]
    if not off:
        return f"{what}: no error to state."
    return f"{what}: mean error {np.mean(off):.1f}%, largest {max(off):.1f}%."


def _thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` of ``rows``, evenly, the ends among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
    return [rows[place] for place in places]


def _span(row: Mapping[str, Any]) -> str:
    return f"{ms(row['measured_ms'])} ({ms(row['low_ms'])} to {ms(row['high_ms'])})"
