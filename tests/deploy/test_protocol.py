from __future__ import annotations

import math
import os
import threading
import time

import numpy as np
import pytest

from vitprune_deploy.latency.gate import RunQueue
from vitprune_deploy.latency.machine import Machine
from vitprune_deploy.latency.protocol import MIN_ROUNDS, measure, percentiles
from vitprune_deploy.latency.visits import Subject, quickest


class Bench:
    """A machine of the tests' own: time passes only when a subject runs or somebody sleeps."""

    def __init__(self, speed=lambda now_s: 1.0, noise=0.0, seed=0):
        self.now_s, self.waited, self.speed, self.noise = 0.0, 0.0, speed, noise
        self.rng = np.random.default_rng(seed)
        self.visited: list[str] = []
        self.others = 0
        self.machine = Machine(lambda threads: self.waited, lambda: self.now_s, self.sleep, lambda: 1 + self.others)

    def sleep(self, seconds):
        self.now_s += seconds

    def subject(self, name, base_ms, stall=lambda: (0.0, 0.0)):
        """Takes ``base_ms`` times the machine's speed and noise; ``stall`` gives extra ms and the wait that shows."""

        def run():
            extra_ms, seen_ms = stall()
            took_ms = base_ms * self.speed(self.now_s) * (1 + self.noise * self.rng.standard_normal()) + extra_ms
            self.now_s += took_ms / 1000
            self.waited += seen_ms
            self.visited.append(name)
            return took_ms

        return Subject(name, run)


def test_a_drift_of_the_whole_machine_by_30_percent_cancels_out():
    bench = Bench(speed=lambda s: 1 + 0.3 * math.sin(2 * math.pi * s / 3), noise=0.005)
    reference, subjects = bench.subject("ref", 5.0), [bench.subject("a", 20.0), bench.subject("b", 2.0)]
    a, b = measure(subjects, reference, relative_half_width=0.001, machine=bench.machine)  # all 25 rounds: two periods
    # over a visit of 0.1 s the drift bends by up to 0.4%, and the noise of 25 medians leaves 0.2%
    assert a.value_ms / a.reference_ms == pytest.approx(4.0, rel=0.01)
    assert b.value_ms / b.reference_ms == pytest.approx(0.4, rel=0.01)
    assert a.reference_drift > 0.3
    assert np.ptp(a.samples_ms) < 0.1 * a.value_ms


def test_visits_while_the_machine_was_slow_do_not_count_once_it_is_itself_again():
    bench = Bench(speed=lambda s: 2.0 if s < 1.5 else 1.0)
    rng = np.random.default_rng(0)
    # what shares the silicon slows this model less than the reference
    spared = bench.subject("spared", 10.0, stall=lambda: (-6.0 if bench.now_s < 1.5 else 0.0, 0.0))
    noisy = bench.subject("noisy", 10.0, stall=lambda: (float(rng.uniform(0, 2)), 0.0))
    found, _ = measure([spared, noisy], bench.subject("ref", 5.0), machine=bench.machine)
    assert (found.value_ms, found.reference_ms) == pytest.approx((10.0, 5.0), rel=0.01)
    assert MIN_ROUNDS <= found.rounds < 25
    assert not found.unstable
    assert found.reference_drift > 0.9


@pytest.mark.parametrize(("slow_s", "p50_ms", "reference_ms"), [(3.0, 10.0, 5.0), (9.5, 14.0, 10.0)])
def test_percentiles_come_of_the_pace_that_the_machine_has_for_a_quarter_of_the_time(slow_s, p50_ms, reference_ms):
    bench = Bench(speed=lambda s: 2.0 if s < slow_s else 1.0)
    spared = bench.subject("spared", 10.0, stall=lambda: (-6.0 if bench.now_s < slow_s else 0.0, 0.0))
    (found,) = percentiles([[spared]], bench.subject("ref", 5.0), max_seconds=10.0, machine=bench.machine)
    assert found.percentiles[50].value_ms == pytest.approx(p50_ms, rel=0.01)
    assert found.raw_ms[50] == pytest.approx(p50_ms, rel=0.01)
    assert found.reference_ms == pytest.approx(reference_ms, rel=0.01)
    assert found.samples == len(found.runs_ms) < 1000


def test_a_machine_that_stays_slow_is_measured_as_it_is():
    bench = Bench(speed=lambda s: 2.0)
    (found,) = measure([bench.subject("a", 10.0)], bench.subject("ref", 5.0), machine=bench.machine)
    assert (found.value_ms, found.rounds, found.unstable) == (pytest.approx(20.0), MIN_ROUNDS, False)


def test_what_the_reference_cannot_see_stays_in_the_figure():
    bench = Bench()
    (a,) = measure([bench.subject("a", 10.0)], bench.subject("ref", 5.0), machine=bench.machine)
    assert (a.value_ms, a.raw_ms, a.reference_ms) == pytest.approx((10.0, 10.0, 5.0), rel=1e-9)
    assert a.low_ms == a.high_ms == pytest.approx(10.0, rel=1e-9)
    assert (a.rounds, a.gated, a.reference_drift) == (MIN_ROUNDS, True, pytest.approx(0, abs=1e-9))


def test_a_stall_is_rejected_when_the_scheduler_saw_it():
    bench = Bench()
    turns = iter(range(10**6))
    stalled = bench.subject("a", 10.0, stall=lambda: (30.0, 30.0) if next(turns) % 3 == 0 else (0.0, 0.0))
    (a,) = measure([stalled], bench.subject("ref", 5.0), machine=bench.machine)
    assert a.rejected > 0
    assert a.gated
    assert a.value_ms == a.high_ms == pytest.approx(10.0, rel=1e-9)


def test_a_slow_sample_that_nobody_caused_is_kept():
    bench = Bench()
    turns = iter(range(10**6))
    slow = bench.subject("a", 10.0, stall=lambda: (30.0, 0.0) if next(turns) % 3 == 0 else (0.0, 0.0))
    (a,) = measure([slow], bench.subject("ref", 5.0), machine=bench.machine)
    assert a.rejected == 0
    assert max(a.samples_ms) >= 10.0


def test_two_copies_of_one_model_are_equal_within_their_intervals():
    bench = Bench(noise=0.03, seed=3)
    subjects = [bench.subject("a", 10.0), bench.subject("a again", 10.0)]
    a, b = measure(subjects, bench.subject("ref", 5.0), machine=bench.machine, relative_half_width=0.02)
    assert a.low_ms < 10.0 < a.high_ms
    assert b.low_ms < 10.0 < b.high_ms
    assert a.low_ms < b.high_ms
    assert b.low_ms < a.high_ms


def test_an_interval_too_wide_for_a_decision_is_unstable():
    bench = Bench(noise=0.1, seed=1)
    (a,) = measure([bench.subject("a", 10.0)], bench.subject("ref", 5.0), max_rounds=6, machine=bench.machine)
    assert a.rounds == 6
    assert a.half_width > 0.02
    assert a.unstable


def test_a_quiet_subject_leaves_early_and_a_noisy_one_stays_for_more_rounds():
    bench = Bench(noise=0.0)
    rng = np.random.default_rng(0)
    noisy = bench.subject("noisy", 10.0, stall=lambda: (float(rng.uniform(0, 2)), 0.0))
    quiet, other = measure([bench.subject("quiet", 10.0), noisy], bench.subject("ref", 5.0), machine=bench.machine)
    assert quiet.rounds == MIN_ROUNDS
    assert other.rounds > MIN_ROUNDS


def test_every_round_visits_all_subjects_in_an_order_that_the_seed_draws():
    def order(seed):
        bench = Bench()
        subjects = [bench.subject(name, 60.0) for name in "abcdefgh"]
        measure(subjects, bench.subject("ref", 60.0), seed=seed, machine=bench.machine)
        visits = [n for i, n in enumerate(bench.visited) if n != "ref" and bench.visited[i - 1] != n]
        return [visits[i : i + 8] for i in range(0, len(visits), 8)]

    first = order(seed=1)
    assert all(sorted(visits) == list("abcdefgh") for visits in first)
    assert first[0] != first[1]
    assert order(seed=1) == first
    assert order(seed=2) != first


def test_short_pieces_are_run_several_times_a_visit_and_long_ones_few():
    bench = Bench()
    measure(
        [bench.subject("short", 0.1), bench.subject("long", 80.0)], bench.subject("ref", 5.0), machine=bench.machine
    )
    assert bench.visited.count("short") > MIN_ROUNDS * 3 * 20  # samples of 2 ms
    assert bench.visited.count("long") == 2 + MIN_ROUNDS * 2  # first use, then two samples and no warm-up


def test_a_time_budget_takes_the_same_rounds_from_every_subject():
    bench = Bench(noise=0.1)
    subjects = [bench.subject(str(i), 100.0) for i in range(5)]
    found = measure(subjects, bench.subject("ref", 5.0), max_seconds=4.0, machine=bench.machine)
    assert len({m.rounds for m in found}) == 1
    assert 1 <= found[0].rounds < MIN_ROUNDS
    assert all(m.unstable for m in found)
    assert bench.now_s <= 4.0


def test_a_busy_machine_is_waited_for_and_then_measured_without_the_gate():
    bench = Bench(noise=0.01)
    bench.others = 4
    always = lambda: (1.0, 5.0)  # noqa: E731
    subject, reference = bench.subject("a", 10.0, always), bench.subject("ref", 5.0, always)
    start = bench.now_s
    (a,) = measure([subject], reference, machine=bench.machine)
    assert not a.gated
    assert a.rounds >= MIN_ROUNDS
    assert bench.now_s - start > 20.0  # the stated wait


def test_without_the_gate_the_interval_is_half_as_wide_again():
    def half_width(gated):
        bench = Bench(noise=0.05, seed=5)
        if not gated:
            bench.machine.waited_ms = None
        (a,) = measure([bench.subject("a", 10.0)], bench.subject("ref", 5.0), max_rounds=9, machine=bench.machine)
        assert a.gated is gated
        return a.half_width

    assert half_width(False) == pytest.approx(1.5 * half_width(True), rel=1e-9)


def test_time_that_runs_out_before_any_sample_passed_still_gives_a_figure():
    bench = Bench()
    bench.others = 4
    always = lambda: (1.0, 5.0)  # noqa: E731
    subject, reference = bench.subject("a", 10.0, always), bench.subject("ref", 5.0, always)
    (a,) = measure([subject], reference, max_seconds=0.2, machine=bench.machine)
    assert a.value_ms == pytest.approx(11.0, rel=1e-9)
    assert a.unstable
    assert not a.gated


def test_progress_tells_every_visit_and_never_more_than_was_expected():
    bench, told = Bench(), []
    subjects = [bench.subject("a", 10.0), bench.subject("b", 20.0)]
    measure(subjects, bench.subject("ref", 5.0), progress=lambda *p: told.append(p), machine=bench.machine)
    assert [done for done, _, _ in told] == list(range(1, 2 * MIN_ROUNDS + 1))
    assert all(done <= total and name in "ab" for done, total, name in told)


def test_percentiles_of_a_known_distribution_are_found_with_enough_samples():
    bench = Bench()
    rng = np.random.default_rng(0)
    spread = bench.subject("a", 10.0, stall=lambda: (float(rng.uniform(0, 10)), 0.0))
    (a,) = percentiles([[spread]], bench.subject("ref", 5.0), runs=2000, machine=bench.machine)
    assert a.samples == 2000
    # uniform on 10..20 ms: the standard error of a percentile of 2,000 samples is at most 0.11 ms
    assert a.percentiles[50].value_ms == pytest.approx(15.0, abs=0.45)
    assert a.percentiles[90].value_ms == pytest.approx(19.0, abs=0.3)
    assert a.percentiles[99].value_ms == pytest.approx(19.9, abs=0.1)
    assert a.percentiles[90].low_ms < 19.0 < a.percentiles[90].high_ms
    assert a.raw_ms[50] == pytest.approx(a.percentiles[50].value_ms, rel=1e-9)
    assert not a.percentiles[99].unstable


def test_a_percentile_without_enough_samples_beyond_it_is_not_reported():
    bench = Bench(noise=0.01)
    few = {"runs": 100, "machine": bench.machine}
    a, b = percentiles([[bench.subject("a", 10.0)], [bench.subject("b", 20.0)]], bench.subject("ref", 5.0), **few)
    assert set(a.percentiles) == set(b.raw_ms) == {50, 90}


def test_sessions_of_a_subject_take_turns():
    bench = Bench()
    slow, fast = bench.subject("a", 11.0), bench.subject("a", 9.0)
    (a,) = percentiles([[slow, fast]], bench.subject("ref", 5.0), runs=200, machine=bench.machine)
    assert sorted(set(np.round(a.runs_ms, 6))) == [9.0, 11.0]
    assert np.mean(a.runs_ms) == pytest.approx(10.0)


def test_the_final_check_stops_at_its_time():
    bench = Bench(noise=0.01)
    (a,) = percentiles([[bench.subject("a", 10.0)]], bench.subject("ref", 5.0), max_seconds=2.0, machine=bench.machine)
    assert 100 < a.samples < 1000
    assert 99 not in a.percentiles


@pytest.mark.skipif(not RunQueue.available(), reason="this system does not count run-queue waits")
def test_the_real_gate_sees_that_two_threads_shared_one_processor():
    waited, allowed = RunQueue(), os.sched_getaffinity(0)
    stop, ids = threading.Event(), []

    def spin():
        ids.append(threading.get_native_id())
        while not stop.is_set():
            sum(range(1000))

    os.sched_setaffinity(0, {min(allowed)})
    thread = threading.Thread(target=spin)
    try:
        thread.start()
        while not ids:
            time.sleep(0.001)
        before, end = waited(ids), time.perf_counter() + 0.3
        while time.perf_counter() < end:
            np.ones((200, 200)) @ np.ones((200, 200))  # releases the interpreter's lock, so both threads want to run
        after = waited(ids)
    finally:
        stop.set()
        thread.join()
        os.sched_setaffinity(0, allowed)
    assert after - before > 20.0  # of 300 ms: each had to wait for the other
    assert waited([]) < after  # a thread that has ended is no longer counted
    waited.close()


def test_the_quickest_model_is_the_reference_and_first_runs_do_not_count():
    def subject(name: str, *runs_ms: float) -> Subject:
        found = iter(runs_ms)
        return Subject(name, lambda: next(found))

    models = [subject("dense", 40.0, 20.0), subject("pruned", 90.0, 9.0), subject("other", 5.0, 11.0)]
    assert quickest(models).name == "pruned"
