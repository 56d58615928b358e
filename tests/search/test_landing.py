from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import dense, fine_problem, problem

from vitprune.errors import InputError
from vitprune.search.counts import Counts, Sizes
from vitprune.search.landing import Approach, Measured, Target, land
from vitprune.search.latency import Timed


class Device:
    """What the loop finds out by measuring: 6% more than the sum, cold weights, 2% that is the model's own, noise."""

    def __init__(self, made, seed, noise=0.01, drift=0.0):
        self.made, self.noise, self.drift = made, noise, drift
        self.rng, self.seed, self.calls = np.random.default_rng(seed), seed, []

    def truth(self, counts):
        table = self.made.table
        # no None may be hashed: its hash is another one in each process
        own = 0.02 * math.sin(hash(((counts.heads, counts.mlp, counts.patches), self.seed)) % 10007)
        return (0.2 + 1.06 * table.sum_ms(counts, self.made.method) + 0.0375 * table.megabytes(counts)) * (1 + own)

    def __call__(self, plans):
        self.calls.append(plans)
        pace = 1 + self.drift * self.rng.standard_normal()
        times = [self.truth(c) * pace * (1 + self.noise * self.rng.standard_normal()) for c in plans]
        return [Measured(ms, ms * (1 - 2 * self.noise), ms * (1 + 2 * self.noise)) for ms in times]

    def anchors(self):
        narrow = Counts((2,) * 12, (384,) * 12, (196,) * 12)
        early = Counts((6,) * 12, (1536,) * 12, (196,) + (self.made.levels[-2],) * 11)
        return [Timed(counts, self([counts])[0].ms, self.made.method) for counts in (dense(), narrow, early)]


@pytest.mark.parametrize("speedup", [1.25, 1.5, 2, 3])
def test_it_lands_just_under_the_budget_on_a_device_that_the_table_misjudges(speedup):
    for seed in range(3):
        made = fine_problem(seed)
        device = Device(made, seed, drift=0.05)
        found = land(made, Target(speedup=speedup), device, anchors=device.anchors())
        assert found.status == "landed", found.reason
        assert 0.97 * found.budget_ms <= found.chosen.measured.ms <= found.budget_ms
        true_share = device.truth(found.chosen.point.counts) / (device.truth(dense()) / speedup)
        # two interleaved measurements of 1% noise each, of the plan and of the dense model: 1% of each other, 3 sigma
        assert 0.94 < true_share < 1.03
        assert all(plans[0] == dense() for plans in device.calls[3:])
        predicted = [row.point.predicted_ms / row.measured.ms - 1 for row in found.rows[-2:]]
        assert np.abs(predicted).max() < 0.08


def test_an_absolute_budget_is_judged_in_plain_milliseconds():
    made = fine_problem(1)
    device = Device(made, 1, noise=0.003)
    found = land(made, Target(latency_ms=30.0), device, anchors=device.anchors())
    assert found.status == "landed"
    assert found.budget_ms == 30.0
    assert 0.96 * 30 < device.truth(found.chosen.point.counts) < 1.01 * 30
    assert found.table.predict_ms(dense(), made.method) == pytest.approx(device.truth(dense()), rel=0.03)


def test_without_anchors_it_takes_more_rounds_but_lands():
    made = fine_problem(2)
    found = land(made, Target(speedup=2), Device(made, 2, noise=0.003), Approach(rounds=8))
    assert found.status == "landed"


def test_the_dense_model_is_the_answer_where_it_is_fast_enough():
    made = fine_problem(0)
    for target in (Target(latency_ms=1000.0), Target(speedup=1.0)):
        device = Device(made, 0)
        found = land(made, target, device)
        assert found.status == "dense"
        assert found.chosen.point.counts == dense()
        assert device.calls == [[dense()]]  # nothing else was built


def test_a_budget_out_of_reach_gives_the_fastest_plan_as_measured():
    made = replace(fine_problem(0), sizes=Sizes((4,), (1024,), ()))
    device = Device(made, 0, noise=0.0)
    found = land(made, Target(speedup=4), device)
    assert found.status == "unreachable"
    assert found.chosen.point.counts == Counts((4,) * 12, (1024,) * 12, (196,) * 12)
    assert found.chosen.measured.ms == pytest.approx(device.truth(found.chosen.point.counts))
    assert "no faster one is allowed" in found.reason


def test_a_wrong_prediction_does_not_make_a_reachable_budget_unreachable():
    made = replace(fine_problem(0), sizes=Sizes((4,), (1024,), ()))
    fastest = Counts((4,) * 12, (1024,) * 12, (196,) * 12)
    halved = Device(made, 0, noise=0.0)
    halved.truth = lambda counts: made.predict_ms(counts) * (0.5 if counts == fastest else 1.0)
    budget = 0.51 * made.predict_ms(fastest)
    found = land(made, Target(latency_ms=budget), halved)
    assert found.status == "landed"
    assert found.chosen.point.counts == fastest


def test_a_coarse_frontier_ends_under_the_budget_and_says_so():
    made = replace(problem(0), sizes=Sizes((), (), (67,)))
    found = land(made, Target(speedup=1.01), Device(made, 0, noise=0.0))
    assert found.status == "under"
    assert found.chosen.measured.ms <= found.budget_ms
    assert "no plan landed in the window" in found.reason


def test_where_nothing_landed_a_time_too_noisy_to_trust_is_left_for_a_safe_one():
    made = fine_problem(3)
    plans = made.solve([0.4 * made.predict_ms(dense()), made.predict_ms(dense())])
    close, safe = (plans.best(share * made.predict_ms(dense())) for share in (0.5, 0.45))
    shares = {dense(): (1.0, 0.0), close.counts: (0.499, 0.03), safe.counts: (0.45, 0.03)}  # of the dense time

    def device(counts):
        return [Measured(100 * ms, 100 * (ms - half), 100 * (ms + half)) for ms, half in map(shares.get, counts)]

    found = land(made, Target(speedup=2), device, Approach(candidates=2, rounds=1), first=[close, safe])
    assert found.status == "under"
    assert found.chosen.point.counts == safe.counts


def test_nothing_to_prune_is_unreachable_with_the_dense_model_as_the_fastest():
    made = replace(fine_problem(0), sizes=Sizes((), (), ()))
    found = land(made, Target(speedup=2), Device(made, 0, noise=0.0))
    assert found.status == "unreachable"
    assert found.chosen.point.counts == dense()


def test_plans_given_first_are_measured_first_and_the_true_loss_decides():
    made = fine_problem(3)
    device = Device(made, 3, noise=0.0)
    aim = device.truth(dense()) / 2
    plans = made.on(made.table.fit_correction(device.anchors())).solve([0.9 * aim, aim])
    first = [plans.best(0.985 * aim), plans.best(0.98 * aim)]
    asked = []

    def true_loss(counts):
        asked.append(counts)
        return [float(-number) for number in range(len(counts))]  # the last of them is the best

    found = land(made, Target(speedup=2), device, first=first, anchors=device.anchors(), true_loss=true_loss)
    measured = [row.point.counts for row in found.rows if row.round == 1]
    assert measured[1:3] == [point.counts for point in first]
    assert found.chosen.point.counts == asked[-1][-1]


def test_what_is_measured_while_the_machine_is_slow_is_measured_again():
    made = fine_problem(1)
    device, slow_calls = Device(made, 1, noise=0.003), (4, 6)

    def slow_at_times(plans):
        times = device(plans)
        if len(device.calls) not in slow_calls:
            return times
        paces = [1.45, *[1.8] * (len(plans) - 1)]  # the dense model's ratio to the others is not the usual one then
        return [Measured(*(pace * ms for ms in time)) for pace, time in zip(paces, times, strict=True)]

    found = land(made, Target(speedup=2), slow_at_times, anchors=device.anchors())
    assert found.status == "landed"
    assert device.calls[3] == device.calls[4]
    assert all(row.measured.ms < 1.1 * found.dense_ms for row in found.rows)
    assert 0.96 < device.truth(found.chosen.point.counts) / (device.truth(dense()) / 2) < 1.01


def test_rows_tell_prediction_from_measurement():
    made = fine_problem(0)
    found = land(made, Target(speedup=1.5), Device(made, 0))
    plain = found.rows[1].to_dict()
    assert plain["low_ms"] < plain["measured_ms"] < plain["high_ms"]
    assert plain["predicted_ms"] != plain["measured_ms"]
    assert Counts.from_dict(plain["counts"]) == found.rows[1].point.counts


def test_the_same_measurements_give_the_same_outcome():
    made = fine_problem(4)
    assert land(made, Target(speedup=2), Device(made, 4)) == land(made, Target(speedup=2), Device(made, 4))


def test_bad_targets_limits_and_measurements_are_refused():
    for bad in ({}, {"latency_ms": 1.0, "speedup": 2.0}, {"speedup": 0.0}, {"latency_ms": float("inf")}):
        with pytest.raises(InputError, match="a target is either"):
            Target(**bad)
    with pytest.raises(InputError, match="landing needs"):
        Approach(window=0.0)
    with pytest.raises(InputError, match="as many positive times"):
        land(fine_problem(0), Target(speedup=2), lambda plans: [])
    with pytest.raises(InputError, match="as many positive times"):
        land(fine_problem(0), Target(speedup=2), lambda plans: [Measured(0.0, 0.0, 0.0)] * len(plans))


def test_later_rounds_measure_what_another_refinement_finds_on_the_corrected_table():
    made, asked = fine_problem(2), []
    device = Device(made, 2, noise=0.0)

    def refine(corrected, budget_ms):
        asked.append((corrected.predict_ms(dense()), budget_ms))
        return [corrected.solve([budget_ms]).best(budget_ms)]

    found = land(made, Target(speedup=2), device, refine=refine)  # without anchors the first round misses
    assert found.status == "landed"
    assert asked[-1][0] == pytest.approx(device.truth(dense()), rel=0.03)  # the table as measuring corrected it
    assert asked[-1][1] == pytest.approx(0.985 * found.budget_ms, rel=0.05)
