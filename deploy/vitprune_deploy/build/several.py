"""What the search of one plan for several devices works on: their tables and times, on the scale of the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .bench import Bench
from .sizes import dense_counts

if TYPE_CHECKING:
    from vitprune.search.counts import Counts
    from vitprune.search.landing import Measured
    from vitprune.search.latency import LatencyTable, Timed


def budget_ms(bench: Bench, dense_ms: float) -> float:
    """The budget of one device, where its dense model takes ``dense_ms``."""
    from .contest import target

    return float(target(bench).budget_ms(dense_ms))


def searched_table(bench: Bench) -> LatencyTable:
    """The device's latency table; of several devices, what ``slowest`` makes of them."""
    from vitprune.search.latency import LatencyTable
    from vitprune.search.several import slowest

    tables = [LatencyTable.from_dict(one.json("measure", "latency_table.json")) for one in bench.devices]
    return slowest(tables, _scales(bench, [dense_ms(one) for one in bench.devices])) if bench.others else tables[0]


def dense_ms(bench: Bench) -> float:
    """The dense model's time as it was measured with the table; as the table predicts it, where it was recorded."""
    from vitprune.search.latency import LatencyTable

    wholes = bench.json("measure", "wholes.json")
    if wholes:
        return float(wholes[0][1]["value_ms"])
    return LatencyTable.from_dict(bench.json("measure", "latency_table.json")).predict_ms(dense_counts(bench))


def anchors(bench: Bench) -> list[Timed]:
    """Whole models that were measured with the table; of several devices, each with its worst time."""
    from vitprune.search.counts import Counts
    from vitprune.search.landing import Measured
    from vitprune.search.latency import Timed
    from vitprune.search.several import worst_of

    from .choose import table_request

    rows = [one.json("measure", "wholes.json") for one in bench.devices]
    if not all(len(many) == len(rows[0]) for many in rows):
        return []
    times = [[Measured(found["value_ms"], found["low_ms"], found["high_ms"]) for _, found in many] for many in rows]
    worst = worst_of(times, _scales(bench, [many[0].ms for many in times])) if rows[0] else []
    method = table_request(bench).method
    return [Timed(Counts.from_dict(row), one.ms, method) for (row, _), one in zip(rows[0], worst, strict=True)]


def measured_on_all(
    bench: Bench, plans: list[Counts], measure: Callable[[Bench, list[Counts]], list[Measured]]
) -> list[Measured]:
    """The time of each plan, the dense one first, on the device that is furthest from its budget with it."""
    from vitprune.search.several import worst_of

    found = [measure(one, plans) for one in bench.devices]
    return worst_of(found, _scales(bench, [times[0].ms for times in found]))


def _scales(bench: Bench, dense: Sequence[float]) -> list[float]:
    """The first device's budget over each one's, given the times of their dense models."""
    budgets = [budget_ms(one, ms) for one, ms in zip(bench.devices, dense, strict=True)]
    return [budgets[0] / budget for budget in budgets]
