"""What a person sees while a build runs: a live bar on a terminal, plain lines otherwise; all of it on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("vitprune_deploy")


class Console:
    """Shows stages and their progress.

    Args:
        quiet: show nothing; the log file is written all the same.
    """

    PLAIN_EVERY_S = 15.0  # without a terminal, a line of progress at most this often

    def __init__(self, quiet: bool = False) -> None:
        self._rich = RichConsole(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._last_line_s = "", 0.0

    @contextmanager
    def stage(self, name: str, number: int, total: int) -> Iterator[None]:
        """Names the stage that runs inside, and says how long it took."""
        self._stage = f"[{number}/{total}] {name}"
        log.info("%s: begins", name)
        started_s = time.monotonic()
        self._last_line_s = started_s
        with self._live():
            yield
        seconds = time.monotonic() - started_s
        log.info("%s: done in %.1f s", name, seconds)
        self.say(f"{self._stage}: {seconds:.1f} s")

    def progress(self, done: float, total: float, what: str) -> None:
        """``done`` of ``total`` of the current stage's work is finished; ``what`` is at hand now."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self._stage}: {what}")
        elif time.monotonic() - self._last_line_s >= self.PLAIN_EVERY_S:
            self._last_line_s = time.monotonic()
            self.say(f"{self._stage}: {what}, {100 * done / max(total, 1):.0f}%")

    def say(self, text: str) -> None:
        """A line for the person, above the bar if there is one."""
        self._rich.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _live(self) -> Iterator[None]:
        if not self._rich.is_terminal or self._rich.quiet:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._rich, transient=True) as self._bar:
            self._task = self._bar.add_task(self._stage, total=None)
            try:
                yield
            finally:
                self._bar = self._task = None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging calls it so)
        """Nothing: on a full disk the build ends with a sentence of its own, not with a traceback for each line."""


def to_file(path: str) -> logging.Handler:
    """A handler that appends every message of ours to ``path``, with the time."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("vitprune_deploy").addHandler(handler)
    logging.getLogger("vitprune_deploy").setLevel(logging.INFO)
    return handler


def data(text: str) -> None:
    """What a program reads goes to stdout, and nothing else does."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
