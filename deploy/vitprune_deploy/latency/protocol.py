"""How latency is measured so that the figure repeats on a machine that others use too.

Every subject is visited once a round, in an order drawn anew each round; a fixed reference is timed between visits, and
what counts of a visit is its ratio to the reference runs before and after it, which takes out drift. A sample during
which our threads waited for a processor is rejected (``gate.py``); none is rejected for being slow itself, but a visit
does not count while the reference is. Rounds go on until the 95% bootstrap interval of the median ratio is narrow
enough, or rounds or time run out. Where the gate rejects most samples of a round, ``PATIENCE_S`` are given to the
machine to fall quiet, once; then it goes on without the gate, intervals are widened, and the result says so.

No priority, clock or other setting of the machine is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .machine import Machine
from .visits import Session, Subject, Track, Visit

ANCHOR_HALF_WIDTH = 0.01  # whole models: anchors and candidates
TABLE_HALF_WIDTH = 0.02  # pieces of a table
PERCENTILE_HALF_WIDTH = 0.05  # of a percentile of single runs, beyond which it decides nothing
MIN_ROUNDS = 5  # below this a bootstrap interval of a median means nothing
MAX_ROUNDS = 25
TOO_WIDE = 2.0  # an interval wider than this many times what was asked for makes a figure unstable
UNGATED_WIDENING = 1.5  # neighbours err to the slow side only, which a bootstrap does not see
PATIENCE_S = 20.0
SLOW_VISIT = 1.2  # the reference around a visit takes so many times what it takes in its faster half
RESAMPLES = 400
TAIL = 10  # samples that must lie beyond a percentile for it to be reported
RUNS_PER_VISIT = 10  # of the final check

Progress = Callable[[int, int, str], None]  # visits done, visits expected at most, who was visited


@dataclass(frozen=True)
class Measurement:
    """A latency and its circumstances.

    Attributes:
        value_ms: median ratio to the reference, times ``reference_ms``.
        low_ms, high_ms: the 95% interval of ``value_ms``.
        raw_ms: median of the accepted samples as the clock gave them.
        rounds: visits that counted.
        accepted, rejected: samples that the gate let pass, and that it did not.
        gated: samples were rejected when another process ran; False: not possible here, or given up as too many were.
        reference_ms: median of the reference in this session.
        reference_drift: spread of the reference (90th minus 10th percentile) as a share of ``reference_ms``.
        unstable: the interval is too wide, or rests on too few visits, for the figure to decide anything.
        samples_ms: one normalised figure for each visit.
    """

    name: str
    value_ms: float
    low_ms: float
    high_ms: float
    raw_ms: float
    rounds: int
    accepted: int
    rejected: int
    gated: bool
    reference_ms: float
    reference_drift: float
    unstable: bool
    samples_ms: tuple[float, ...]

    @property
    def half_width(self) -> float:
        """Half the interval as a share of the value."""
        return (self.high_ms - self.low_ms) / 2 / self.value_ms

    def at(self, reference_ms: float) -> Measurement:
        """The same at another speed of the machine: one at which the reference takes ``reference_ms``."""
        factor = reference_ms / self.reference_ms
        return replace(
            self,
            value_ms=self.value_ms * factor,
            low_ms=self.low_ms * factor,
            high_ms=self.high_ms * factor,
            reference_ms=reference_ms,
            samples_ms=tuple(sample * factor for sample in self.samples_ms),
        )


@dataclass(frozen=True)
class Percentile:
    """One percentile of single runs, normalised by the reference, with its 95% interval."""

    value_ms: float
    low_ms: float
    high_ms: float

    @property
    def unstable(self) -> bool:
        """The interval is too wide for the figure to decide anything."""
        return self.high_ms - self.low_ms > 2 * PERCENTILE_HALF_WIDTH * self.value_ms


@dataclass(frozen=True)
class Distribution:
    """How the single runs of one subject are spread.

    Attributes:
        percentiles: by number; one with fewer than ``TAIL`` samples beyond it is left out.
        raw_ms: the same percentiles as the clock gave them.
        samples: accepted runs behind the figures.
        runs_ms: each of them, normalised as the percentiles are.
        rejected, gated, reference_ms, reference_drift: as in ``Measurement``.
    """

    name: str
    percentiles: dict[int, Percentile]
    raw_ms: dict[int, float]
    samples: int
    runs_ms: tuple[float, ...]
    rejected: int
    gated: bool
    reference_ms: float
    reference_drift: float


def measure(
    subjects: Sequence[Subject],
    reference: Subject,
    *,
    relative_half_width: float = ANCHOR_HALF_WIDTH,
    max_rounds: int = MAX_ROUNDS,
    max_seconds: float = math.inf,
    seed: int = 0,
    progress: Progress | None = None,
    machine: Machine | None = None,
) -> list[Measurement]:
    """One measurement for each subject, in their order.

    Args:
        subjects: what to measure, all interleaved.
        reference: a fixed model that is timed around every visit; about 5 ms long, or the quickest model.
        relative_half_width: a subject whose interval is this narrow (share of its value) is visited no more.
        max_rounds: rounds at most.
        max_seconds: a round is begun only if it will end by then, so that all subjects lose rounds alike.
        seed: draws the order of visits and the bootstrap.
        progress: told of every visit.
        machine: clock and gate; None: those of the machine that the reference runs on.
    """
    rng = np.random.default_rng(seed)
    session = Session(reference, machine or reference.machine)
    tracks = [Track([subject]) for subject in subjects]
    end = session.machine.clock() + max_seconds
    done = number = 0
    while True:
        due = [track for track in tracks if not _narrow(track, session, relative_half_width, seed)]
        late = number >= max_rounds or session.machine.clock() + sum(track.visit_s for track in due) > end
        if not due or (late and number and all(track.visits for track in due)):
            break
        if late and number:
            session.gated = False  # a figure that is wide is more use than none
        for place in rng.permutation(len(due)):
            session.visit(due[place])
            done += 1
            if progress:
                progress(done, done + max(0, max_rounds - number) * len(due), due[place].subject.name)
        number += 1
        session.judge_gate(min(PATIENCE_S, 0.1 * max_seconds))
    return [_measurement(track, session, relative_half_width, seed) for track in tracks]


def percentiles(
    subjects: Sequence[Sequence[Subject]],
    reference: Subject,
    *,
    runs: int = 1000,
    max_seconds: float = math.inf,
    which: Sequence[int] = (50, 90, 99),
    seed: int = 0,
    progress: Progress | None = None,
    machine: Machine | None = None,
) -> list[Distribution]:
    """The final check: how single runs are spread, one distribution for each subject, in their order.

    Args:
        subjects: what to compare, interleaved in visits of ``RUNS_PER_VISIT`` runs; each as often as it was loaded,
            since sessions of one model differ by up to 1% for as long as they live (where their memory lies).
        reference: as in ``measure``.
        runs: accepted runs wanted of each subject.
        max_seconds: no round is begun after this; fewer runs leave the far percentiles out.
        which: percentiles wanted.
        seed: draws the order of visits and the bootstrap.
        progress: told of every visit.
        machine: clock and gate; None: those of the machine that the reference runs on.
    """
    rng = np.random.default_rng(seed)
    session = Session(reference, machine or reference.machine)
    tracks = [Track(sessions) for sessions in subjects]
    end = session.machine.clock() + max_seconds
    done = 0
    while due := [track for track in tracks if _runs(track, session) < runs]:
        late = session.machine.clock() > end
        if late and all(track.visits for track in tracks):
            break
        session.gated = session.gated and not late
        for place in rng.permutation(len(due)):
            session.visit(due[place], RUNS_PER_VISIT)
            done += 1
            if progress:
                left = sum(runs - _runs(track, session) for track in due)
                progress(done, done + max(0, math.ceil(left / RUNS_PER_VISIT)), due[place].subject.name)
        session.judge_gate(min(PATIENCE_S, 0.1 * max_seconds))
    return [_distribution(track, session, which, seed) for track in tracks]


def _narrow(track: Track, session: Session, relative_half_width: float, seed: int) -> bool:
    """Whether the subject's interval is as narrow as was asked for."""
    visits = _at_pace(track, session)
    if len(visits) < MIN_ROUNDS:
        return False
    low, value, high = _interval(_ratios(visits), session.gated, seed)
    return high - low <= 2 * relative_half_width * value


def _at_pace(track: Track, session: Session) -> list[Visit]:
    """The visits at the pace that the machine has when it is itself.

    A neighbour on the same silicon slows some kernels more than others, which ratios do not take out (seen: a block of
    a ViT takes 1.8 times as long, the whole ViT 1.2 times). A quarter of the reference's runs must have been faster.
    """
    slow_ms = _slow_ms(session)
    return [visit for visit in track.visits if visit.reference_ms <= slow_ms]


def _runs(track: Track, session: Session) -> int:
    """Single runs at the machine's pace."""
    return sum(len(visit.ratios) for visit in _at_pace(track, session))


def _raw_ms(visits: Sequence[Visit]) -> np.ndarray:
    """Every sample as the clock gave it."""
    return np.concatenate([visit.reference_ms * np.array(visit.ratios) for visit in visits])


def _slow_ms(session: Session) -> float:
    """A reference that takes longer says that the machine is slow for a while."""
    if not session.references_ms:  # the gate let none pass yet
        return math.inf
    return SLOW_VISIT * float(np.percentile(session.references_ms, 25))


def _ratios(visits: Sequence[Visit]) -> np.ndarray:
    """One ratio to the reference for each visit."""
    return np.array([np.median(visit.ratios) for visit in visits])


def _interval(ratios: np.ndarray, gated: bool, seed: int) -> tuple[float, float, float]:
    """The median of ``ratios`` between the ends of its 95% bootstrap interval."""
    rng = np.random.default_rng([seed, len(ratios)])
    draws = ratios[rng.integers(0, len(ratios), (RESAMPLES, len(ratios)))]
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return _widened(float(low), float(np.median(ratios)), float(high), gated)


def _widened(low: float, value: float, high: float, gated: bool) -> tuple[float, float, float]:
    """The interval, wider where samples were not gated."""
    widen = 1.0 if gated else UNGATED_WIDENING
    return max(0.0, value - widen * (value - low)), value, value + widen * (high - value)


def _reference(session: Session) -> tuple[float, float]:
    """Median of the reference in milliseconds, at the machine's pace, and the spread of all its runs as a share."""
    references_ms = np.array(session.references_ms)
    low, high = np.percentile(references_ms, [10, 90])
    middle = np.median(references_ms[references_ms <= _slow_ms(session)])
    return float(middle), float((high - low) / middle)


def _measurement(track: Track, session: Session, relative_half_width: float, seed: int) -> Measurement:
    """What was found of one subject, in milliseconds of the session's median reference."""
    at_pace = _at_pace(track, session)
    visits = at_pace or track.visits
    ratios = _ratios(visits)
    low, value, high = _interval(ratios, session.gated, seed)
    reference_ms, drift = _reference(session)
    return Measurement(
        name=track.subject.name,
        value_ms=value * reference_ms,
        low_ms=low * reference_ms,
        high_ms=high * reference_ms,
        raw_ms=float(np.median(_raw_ms(visits))),
        rounds=len(ratios),
        accepted=track.accepted,
        rejected=track.rejected,
        gated=session.gated,
        reference_ms=reference_ms,
        reference_drift=drift,
        unstable=len(at_pace) < MIN_ROUNDS or high - low > 2 * TOO_WIDE * relative_half_width * value,
        samples_ms=tuple(float(ratio) * reference_ms for ratio in ratios),
    )


def _distribution(track: Track, session: Session, which: Sequence[int], seed: int) -> Distribution:
    """The percentiles of one subject's runs that enough of them lie beyond."""
    visits = _at_pace(track, session) or track.visits
    ratios, raw_ms = np.concatenate([visit.ratios for visit in visits]), _raw_ms(visits)
    samples = len(ratios)
    backed = [number for number in which if samples * (100 - number) >= 100 * TAIL]
    reference_ms, drift = _reference(session)
    values = np.percentile(ratios, backed)
    # whole visits are drawn, since the runs of one visit share what the machine did then
    rng = np.random.default_rng([seed, samples])
    draws = rng.integers(0, len(visits), (RESAMPLES, len(visits)))
    spread = np.array([np.percentile(np.concatenate([visits[i].ratios for i in draw]), backed) for draw in draws])
    lows, highs = np.percentile(spread, [2.5, 97.5], axis=0)
    found = {}
    for number, ends in zip(backed, zip(lows, values, highs, strict=True), strict=True):
        low, value, high = _widened(float(ends[0]), float(ends[1]), float(ends[2]), session.gated)
        found[number] = Percentile(value * reference_ms, low * reference_ms, high * reference_ms)
    raw = {number: float(np.percentile(raw_ms, number)) for number in backed}
    return Distribution(
        name=track.subject.name,
        percentiles=found,
        raw_ms=raw,
        samples=samples,
        runs_ms=tuple(float(ratio) * reference_ms for ratio in ratios),
        rejected=track.rejected,
        gated=session.gated,
        reference_ms=reference_ms,
        reference_drift=drift,
    )
