"""What is under a connection: the login, the processes that were started through it, and whether it is still there."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from typing import TYPE_CHECKING, NamedTuple

from vitprune.errors import MissingError

from .host import Host

if TYPE_CHECKING:
    import asyncssh

GRACE_S = 1.0  # a board that goes down ends its processes first, and the connection a moment later
CLOSE_S = 5.0
START_S = 30.0
MARK = "vitprune-process:"


class Lost(MissingError):
    """The connection ended in the middle of something: it was cut, or the board went down or says nothing more."""

    def __init__(self, host: Host) -> None:
        super().__init__(f"the connection to {host} was lost; once it is back, run the same command again: it goes on")


class Completed(NamedTuple):
    """What a command has written, and its exit code, or minus the number of the signal that ended it."""

    stdout: str
    stderr: str
    code: int


class Link:
    """A login, and the event that it has ended."""

    def __init__(self, host: Host, ssh: asyncssh.SSHClientConnection, ended: asyncio.Event) -> None:
        self.host, self.ssh = host, ssh
        self.running: set[Process] = set()
        self._ended = ended

    async def is_lost(self, grace_s: float = 0.0) -> bool:
        """Whether the connection has ended, or does so within ``grace_s``."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ended.wait(), grace_s)
        return self._ended.is_set()

    async def went_down(self, code: int | None) -> bool:
        """Whether a process ended with ``code`` because the connection or the board did."""
        by_signal = code is None or code < 0 or code >= 128
        return await self.is_lost(GRACE_S if by_signal else 0.0)

    async def process(self, command: str) -> Process:
        """``command``, begun. Raises as ``Connection.start`` does."""
        import asyncssh

        # sh, since nobody knows the user's shell; it tells its number once that shell has greeted
        line = f"exec sh -c {shlex.quote(f'echo {MARK}$$; {command}')}"
        try:
            ssh = await self.ssh.create_process(line, encoding="utf-8", errors="replace", request_pty=False)
            said = ""
            while found := await asyncio.wait_for(ssh.stdout.readline(), START_S):
                if mark := re.search(rf"{MARK}(\d+)\n", found):
                    return Process(self, ssh, int(mark[1]))
                said = found.strip() or said
            raise OSError(said or "it ends at once")
        except (asyncssh.Error, OSError, asyncio.TimeoutError) as error:
            if await self.is_lost(GRACE_S):
                raise Lost(self.host) from error
            why = str(error)[:200] or f"nothing happens for {START_S:g} s"
            raise MissingError(f"{self.host} runs no commands for this user ({why}); give it a shell there") from error

    async def run(self, command: str, stdin: str | None, timeout_s: float) -> Completed:
        """``command``, ended. Raises as ``Connection.run`` does."""
        process = await self.process(command)
        try:
            with contextlib.suppress(OSError):  # a command that reads nothing may have ended already
                process.ssh.stdin.write(stdin or "")
                process.ssh.stdin.write_eof()
            stdout, stderr = await asyncio.wait_for(process.ssh.communicate(), timeout_s)
        except asyncio.TimeoutError:
            raise MissingError(
                f"`{_short(command)}` took longer than {timeout_s:g} s on {self.host}, and was stopped"
            ) from None
        finally:
            await process.stop()
        code = process.ssh.returncode
        if await self.went_down(code) or code is None:
            raise Lost(self.host)
        return Completed(stdout, stderr, code)

    async def close(self) -> None:
        """End the login, and with it what was started through it."""
        if not await self.is_lost():
            await asyncio.gather(*(process.stop() for process in self.running))
        self.ssh.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.ssh.wait_closed(), CLOSE_S)
        self.ssh.abort()


class Process:
    """A command on a board, with what it starts a process group; ``number`` is that of the group."""

    def __init__(self, link: Link, ssh: asyncssh.SSHClientProcess[str], number: int) -> None:
        self.ssh = ssh
        self._link, self._number = link, number
        link.running.add(self)

    async def stop(self) -> None:
        """End it, unless it has ended; and its channel in any case."""
        import asyncssh

        if self.ssh.returncode is None:
            # by a command, since sshd takes no signals where root has logged in
            kill = self._link.ssh.run(f"kill -s KILL -- -{self._number}")
            with contextlib.suppress(asyncssh.Error, OSError, asyncio.TimeoutError):
                await asyncio.wait_for(kill, CLOSE_S)
        self.ssh.close()
        self._link.running.discard(self)


def _short(command: str) -> str:
    return command if len(command) <= 60 else f"{command[:59]}…"
