"""What the scheduler knows about a sample: whether our threads waited for a processor while it was taken.

``/proc/<pid>/task/<tid>/schedstat`` (Linux) counts, in its second field, the nanoseconds for which a thread was ready
to run and another one had the processor. With as many threads as processors, no such wait means that nobody else ran.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

TASKS = Path("/proc/self/task")
LOAD = Path("/proc/loadavg")


class RunQueue:
    """Counts how long the calling thread and others of this process have waited for a processor."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}

    @staticmethod
    def available() -> bool:
        """Whether this system counts run-queue waits."""
        return (TASKS / str(threading.get_native_id()) / "schedstat").is_file()

    def __call__(self, threads: Sequence[int]) -> float:
        """Milliseconds for which the caller and ``threads`` have waited since they were started; only rises."""
        return sum(self._waited_ns(thread) for thread in (threading.get_native_id(), *threads)) / 1e6

    def close(self) -> None:
        """Close the files that it reads."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _waited_ns(self, thread: int) -> int:
        """The count of one thread; 0 once it has ended."""
        try:
            if thread not in self._files:  # kept open: opening costs more than reading
                self._files[thread] = os.open(TASKS / str(thread) / "schedstat", os.O_RDONLY)
            return int(os.pread(self._files[thread], 64, 0).split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return 0


def running() -> int:
    """Processes that run or want to, ours included: the fourth field of /proc/loadavg; 1 where there is none."""
    return int(LOAD.read_text().split()[3].split("/")[0]) if LOAD.is_file() else 1
