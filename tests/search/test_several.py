"""One plan for several devices: the device that a plan is slowest on, against its own budget, decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic import EVIT, dense, ending_early, levels, pieces, problem, random_counts, table

from vitprune.errors import InputError
from vitprune.search.landing import Measured, Target, land
from vitprune.search.latency import LatencyTable
from vitprune.search.several import slowest, worst_of


def device(attention=1.0, mlp=1.0, correction=(0.0, 1.0, 0.0)) -> LatencyTable:
    """The synthetic device with quicker or slower halves."""
    plain = pieces()
    changed = {
        "attn": {key: attention * ms for key, ms in plain.attn.items()},
        "attn_sized": {key: attention * ms for key, ms in plain.attn_sized.items()},
        "mlp": {key: mlp * ms for key, ms in plain.mlp.items()},
    }
    found = LatencyTable.fill(table().circumstances, levels(), pieces(**changed))
    return replace(found, correction=correction)


def test_one_device_is_what_it_is():
    one = device(correction=(0.3, 1.1, 0.01))
    alone, counts = slowest([one], [1.0]), random_counts(np.random.default_rng(0))
    assert alone.predict_ms(counts, EVIT) == pytest.approx(one.predict_ms(counts, EVIT))


def test_a_plan_takes_no_less_than_on_the_device_that_is_furthest_from_its_budget():
    devices = [device(), device(attention=3.0, correction=(0.2, 1.2, 0.0)), device(mlp=2.0, correction=(0, 0.5, 0.02))]
    times = [one.predict_ms(dense()) for one in devices]
    scales = [times[0] / ms for ms in times]
    together = slowest(devices, scales)
    rng = np.random.default_rng(1)
    for counts in [dense(), *(random_counts(rng) for _ in range(20))]:
        worst = max(scale * one.predict_ms(counts, EVIT) for one, scale in zip(devices, scales, strict=True))
        assert worst <= together.predict_ms(counts, EVIT) * (1 + 1e-9) < 2.5 * worst


def test_entries_are_the_larger_ones_by_hand():
    together = slowest([device(), device(attention=3.0, mlp=1.0)], [1.0, 0.5])
    assert together.attn_ms(196, 6) == pytest.approx(1.5 * 1.885)
    assert together.mlp_ms(196, 1536) == pytest.approx(2.712)
    assert together.stem_ms == pytest.approx(0.753)
    assert together.reduce_ms("evit", 196, 137) == pytest.approx(0.21)


def test_tables_of_other_levels_are_refused():
    fewer = LatencyTable.fill(
        table().circumstances, levels(), replace(pieces(), reduce={"evit": pieces().reduce["evit"]})
    )
    with pytest.raises(InputError, match="over the same levels and methods"):
        slowest([table(), fewer], [1.0, 1.0])
    assert slowest([ending_early()] * 2, [1.0, 2.0]).attn_prefix_ms(196, 6) == pytest.approx(2 * 1.885 / 4)


def test_the_slowest_of_measured_times_keeps_its_interval():
    quick, slow = [Measured(10, 9, 11), Measured(5, 4, 6)], [Measured(40, 38, 42), Measured(24, 22, 25)]
    assert worst_of([quick, slow], [1.0, 0.25]) == [Measured(10, 9, 11), Measured(6, 5.5, 6.25)]


def test_a_plan_lands_under_the_budget_of_every_device():
    devices = [device(), device(attention=2.5)]
    dense_ms = [one.predict_ms(dense()) for one in devices]
    scales = [dense_ms[0] / ms for ms in dense_ms]

    def measure(plans):
        times = [[Measured(*[one.predict_ms(counts, EVIT)] * 3) for counts in plans] for one in devices]
        return worst_of(times, scales)

    shared = problem(0, latency=slowest(devices, scales))
    landed = land(shared, Target(speedup=2.0), measure)
    counts = landed.chosen.point.counts
    assert landed.status in ("landed", "under")  # the table of the worst says too much before it is corrected
    for one, whole_ms in zip(devices, dense_ms, strict=True):
        assert one.predict_ms(counts, EVIT) <= whole_ms / 2 * (1 + 1e-9)
