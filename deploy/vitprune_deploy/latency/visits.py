"""Visits: a few samples of a subject between runs of a fixed reference, behind the scheduler's gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..backends.base import Backend
from .machine import Asked, Machine

SAMPLE_MS = 2.0  # shorter runs are timed several at a time: calling and reading the counter take microseconds
WARM_BELOW_MS = 50.0  # longer runs stream more weights than a cache holds, and need no warm-up run


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        name: how reports call it.
        run: runs it once and returns the milliseconds that this took.
        threads: kernel ids of the threads that work for it besides the caller, for the gate.
        machine: the machine that it runs on.
    """

    name: str
    run: Callable[[], float]
    threads: tuple[int, ...] = ()
    machine: Machine = field(default_factory=Machine)

    @classmethod
    def of(cls, name: str, model: Backend, feed: Mapping[str, np.ndarray]) -> Subject:
        """A loaded model that runs on ``feed`` again and again."""
        return cls(name, model.bind(feed), tuple(model.thread_ids()), model.machine or Machine())


def quickest(subjects: Sequence[Subject]) -> Subject:
    """The one that takes least time: the best reference among whole models.

    A short run feels most when the machine's pace changes. Seen on a virtual machine whose two processors lay apart for
    seconds to minutes: what one thread hands to the other cost a small ViT 1.4 times its time, a large one 1.05 times.
    """

    def second_run_ms(one: Subject) -> float:
        one.run()  # settles what the runtime puts off
        return one.run()

    return min(subjects, key=second_run_ms)


class Visit(NamedTuple):
    """Accepted samples over the mean of the reference runs around them, and this mean in milliseconds."""

    ratios: list[float]
    reference_ms: float


@dataclass
class Track:
    """What is known of one subject so far.

    Attributes:
        sessions: the subject, once for each time that it was loaded; visits take turns.
        visits: those of which the gate let samples pass.
        accepted, rejected: samples that the gate let pass, and that it did not.
        visit_s: seconds that the last visit took, with the reference.
    """

    sessions: Sequence[Subject]
    visits: list[Visit] = field(default_factory=list)
    accepted: int = 0
    rejected: int = 0
    visit_s: float = 0.0
    expected_ms: float = 0.0  # 0: it has never run

    @property
    def subject(self) -> Subject:
        """Whose turn it is."""
        return self.sessions[len(self.visits) % len(self.sessions)]


class Session:
    """All visits of one measurement: they share a reference, and a gate that may have to be given up."""

    def __init__(self, reference: Subject, machine: Machine) -> None:
        self.machine, self.gated = machine, machine.gates
        self.references_ms: list[float] = []
        self._reference = Track([reference])
        self._waited_for_quiet = False
        self._round = [0, 0]  # samples accepted and rejected in this round
        _settle(self._reference)
        _, self._before = self._take(self._reference, 0, 1)

    def visit(self, track: Track, samples: int | None = None) -> None:
        """Time ``track`` once more.

        Args:
            track: whose turn it is.
            samples: single runs wanted; None: two or three samples, each long enough to be timed well.
        """
        start = self.machine.clock()
        _settle(track)
        repeats = 1
        if samples is None:
            samples = 2 if track.expected_ms > WARM_BELOW_MS else 3
            repeats = min(64, math.ceil(SAMPLE_MS / track.expected_ms))
        taken, after = self._take(track, samples, repeats)
        around, self._before = self._before + after, after
        track.visit_s = self.machine.clock() - start
        if taken and around:  # otherwise the gate let nothing pass, and a later round brings another visit
            scale = float(np.mean(around))
            track.visits.append(Visit([sample / scale for sample in taken], scale))

    def judge_gate(self, patience_s: float) -> None:
        """After a round: where most samples were rejected, wait for quiet once, and then go on without the gate."""
        accepted, rejected = self._round
        self._round = [0, 0]
        if not self.gated or rejected <= accepted:
            return
        if self._waited_for_quiet:
            self.gated = False
        else:
            self._waited_for_quiet = True
            self.machine.wait_for_quiet(patience_s)

    def _take(self, track: Track, samples: int, repeats: int) -> tuple[list[float], list[float]]:
        """Accepted samples of ``track`` and of the reference behind them, in milliseconds; all are counted."""
        warm, warm_reference = (one.expected_ms < WARM_BELOW_MS for one in (track, self._reference))
        asked = Asked(samples, repeats, warm, warm_reference, self.gated)
        found = self.machine.take(track.subject, self._reference.subject, asked)
        self._count(track, len(found.samples_ms), found.rejected)
        self._count(self._reference, len(found.references_ms), found.references_rejected)
        self.references_ms.extend(found.references_ms)
        return found.samples_ms, found.references_ms

    def _count(self, track: Track, accepted: int, rejected: int) -> None:
        track.accepted += accepted
        track.rejected += rejected
        self._round[0] += accepted
        self._round[1] += rejected


def _settle(track: Track) -> None:
    """Have the very first run over, which settles what the runtime puts off, and know how long the next ones take."""
    if not track.expected_ms:
        track.subject.run()
        track.expected_ms = max(track.subject.run(), 1e-6)
