"""A process on a board that answers each line with a line."""

from __future__ import annotations

import asyncio
import contextlib

from vitprune.errors import MissingError

from ._link import CLOSE_S, GRACE_S, Link, Lost, Process
from ._loop import wait_for
from .runner import LET_GO

SAID_LINES = 20


class Talk:
    """A talk with a process, made in the loop's thread by ``Connection.start``.

    Attributes:
        said: the last lines of its stderr.
    """

    def __init__(self, link: Link, process: Process) -> None:
        self.said: tuple[str, ...] = ()
        self._link, self._process = link, process
        self._listening = asyncio.ensure_future(self._listen())

    def ask(self, line: str, timeout_s: float | None) -> str:
        """The line that the process answers to ``line``, both without their end.

        Args:
            timeout_s: None waits for as long as there is a connection.

        Raises:
            Lost: the connection ended before the answer was there.
            MissingError: the process ended instead, or took longer than ``timeout_s`` and was stopped.
        """
        return wait_for(self._ask(line, timeout_s))

    def close(self) -> None:
        """End the process's input, and the process too if it does not end by itself within CLOSE_S."""
        wait_for(self._close())

    async def _ask(self, line: str, timeout_s: float | None) -> str:
        try:
            return await asyncio.wait_for(self._answer(line), timeout_s)
        except asyncio.TimeoutError:
            await self._process.stop()
            raise MissingError(
                f"no answer from {self._link.host} within {timeout_s:g} s; the process there was stopped, since a late "
                "answer would be taken for one to the next question"
            ) from None

    async def _answer(self, line: str) -> str:
        import asyncssh

        answer = ""
        with contextlib.suppress(asyncssh.Error, OSError):
            self._process.ssh.stdin.write(f"{line}\n")
            while not answer.endswith("\n"):
                part = await self._process.ssh.stdout.readline()
                if not part:
                    break
                answer += part  # a line that is longer than asyncssh's window comes in parts
        if not answer.endswith("\n"):
            raise await self._no_answer()
        return answer[:-1]

    async def _no_answer(self) -> MissingError:
        """Why the process says nothing more."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.ssh.wait_closed(), GRACE_S)
        await asyncio.wait({self._listening}, timeout=GRACE_S)
        code = self._process.ssh.returncode
        await self._process.stop()
        if code == LET_GO or await self._link.went_down(code):
            return Lost(self._link.host)
        how = "closed its output" if code is None else f"ended with code {code}"
        last = f": {self.said[-1]}" if self.said else ""
        return MissingError(f"the process on {self._link.host} {how} in place of an answer{last}")

    async def _listen(self) -> None:
        import asyncssh

        with contextlib.suppress(asyncssh.Error, OSError):
            async for line in self._process.ssh.stderr:
                if line.strip():  # at the end asyncssh gives an empty one more
                    self.said = (*self.said, line.rstrip())[-SAID_LINES:]

    async def _close(self) -> None:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            self._process.ssh.stdin.write_eof()
            await asyncio.wait_for(self._process.ssh.wait_closed(), CLOSE_S)
        await self._process.stop()
