"""What measuring does on the machine that is measured: one visit at a time, behind the scheduler's gate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .fingerprint import device_fingerprint
from .gate import RunQueue, running

GATE = 0.005  # share of a sample that our threads may have waited for a processor
REFERENCES = 2  # runs of the reference: they close one visit and open the next
POLL_S = 0.2


class Asked(NamedTuple):
    """What one visit is to do.

    Attributes:
        samples: accepted samples wanted of the subject; 0: only the reference runs.
        repeats: runs in each sample, whose mean it is.
        warm, warm_reference: a run that is not timed goes before, which brings the weights back into the cache.
        gated: samples during which our threads waited for a processor are rejected.
    """

    samples: int
    repeats: int
    warm: bool
    warm_reference: bool
    gated: bool


class Taken(NamedTuple):
    """Accepted samples of a visit in milliseconds, and how many were rejected; of the subject, then the reference."""

    samples_ms: list[float]
    rejected: int
    references_ms: list[float]
    references_rejected: int


@dataclass
class Machine:
    """The machine that this process runs on; tests bring their own.

    Attributes:
        waited_ms: total wait of the caller and of the threads given, in milliseconds; None: not known on this system.
        clock: seconds since some moment.
        sleep: let so many seconds pass.
        running: processes that run or want to, on the whole machine, this one included.
    """

    waited_ms: Callable[[Sequence[int]], float] | None = field(
        default_factory=lambda: RunQueue() if RunQueue.available() else None
    )
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    running: Callable[[], int] = running

    @property
    def gates(self) -> bool:
        """Whether it can tell a sample during which another process ran."""
        return self.waited_ms is not None

    def take(self, subject: Any, reference: Any, asked: Asked) -> Taken:
        """One visit to ``subject``, and the runs of ``reference`` behind it; both are a ``visits.Subject``."""
        samples_ms: list[float] = []
        rejected = 0
        if asked.samples:
            if asked.warm:
                subject.run()
            samples_ms, rejected = self._samples(subject, asked.samples, asked.repeats, asked.gated)
        if asked.warm_reference:
            reference.run()
        return Taken(samples_ms, rejected, *self._samples(reference, REFERENCES, 1, asked.gated))

    def fingerprint(self, runtime: str, provider: str, threads: int | None) -> dict[str, Any]:
        """As ``device_fingerprint``."""
        return device_fingerprint(runtime, provider, threads)

    def wait_for_quiet(self, limit_s: float) -> float:
        """Seconds waited until nothing else ran, or until ``limit_s`` were over."""
        start = self.clock()
        while self.clock() - start < limit_s and self.running() > 1:
            self.sleep(POLL_S)
        return self.clock() - start

    def _samples(self, subject: Any, wanted: int, repeats: int, gated: bool) -> tuple[list[float], int]:
        """Up to ``wanted`` accepted samples, from at most twice as many, and how many were rejected."""
        taken: list[float] = []
        rejected = 0
        for _ in range(2 * wanted if gated else wanted):
            sample_ms, quiet = self._sample(subject, repeats, gated)
            if quiet:
                taken.append(sample_ms)
            rejected += not quiet
            if len(taken) == wanted:
                break
        return taken, rejected

    def _sample(self, subject: Any, repeats: int, gated: bool) -> tuple[float, bool]:
        """Mean milliseconds of ``repeats`` runs, and whether nobody else ran meanwhile (taken as so without a gate)."""
        waited = self.waited_ms if gated else None
        before = waited(subject.threads) if waited else 0.0
        total_ms = sum(subject.run() for _ in range(repeats))
        after = waited(subject.threads) if waited else 0.0
        return total_ms / repeats, after - before <= GATE * total_ms
