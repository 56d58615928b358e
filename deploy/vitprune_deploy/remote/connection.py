"""A connection to a board, without ``async``: commands, talks with a process there, and files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from ._files import Files, Progress
from ._link import Completed, Link, Lost
from ._login import UnknownHostKey, login
from ._loop import wait_for
from ._talk import Talk
from .host import Host

__all__ = ["Completed", "Connection", "Lost", "Talk", "UnknownHostKey"]


class Connection:
    """A login on a board; a context manager that ends it.

    Every method raises Lost once the connection is gone, and a board that says nothing for a minute is gone.
    """

    def __init__(self, link: Link) -> None:
        self.host = link.host
        self._link, self._files = link, Files(link)

    @classmethod
    def open(cls, host: Host, *, timeout_s: float = 15.0) -> Connection:
        """A login on ``host`` with the settings in ``~/.ssh``, and with keys or the agent alone.

        Raises:
            UnknownHostKey: nobody has vouched for the host's key, so nothing was sent to it.
            MissingError: the host cannot be reached or logged in to, or its key has changed.
            InputError: the settings, keys or known hosts in ``~/.ssh`` cannot be used.
            ImportError: asyncssh is not installed.
        """
        return cls(wait_for(login(host, timeout_s)))

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the login, and with it what was started through it."""
        wait_for(self._link.close())

    @property
    def fingerprint(self) -> str:
        """That of the host's key: ``SHA256:`` and 43 characters."""
        key = self._link.ssh.get_server_host_key()
        return key.get_fingerprint("sha256") if key is not None else ""

    def run(self, command: str, *, stdin: str | None = None, timeout_s: float) -> Completed:
        """What ``command`` says: a line for the shell there.

        Raises:
            MissingError: it took longer than ``timeout_s`` and was stopped, or no command can be run there.
        """
        return wait_for(self._link.run(command, stdin, timeout_s))

    def start(self, command: str) -> Talk:
        """A talk with a process that runs until it is closed. Raises MissingError: no command can be run there."""

        async def begin() -> Talk:
            return Talk(self._link, await self._link.process(command))

        return wait_for(begin())

    def send(self, local: Path, remote: str, progress: Progress | None = None) -> None:
        """Copy a file to the board, whole or not at all.

        Args:
            remote: its path there; one that is not absolute begins at the home.
            progress: is told bytes done and bytes in all, in another thread, where the connection cannot be used.

        Raises:
            InputError: there is no such folder, or it is closed to the user.
            MissingError: the disk there is full, or the board has no SFTP.
            OSError: ``local`` cannot be read.
        """
        wait_for(self._files.send(local, remote, progress))

    def fetch(self, remote: str, local: Path) -> None:
        """Copy a file from the board, whole or not at all.

        Raises:
            InputError: there is no such file, it is closed to the user, or ``local`` cannot be written.
            MissingError: the disk here is full, or the board has no SFTP.
        """
        wait_for(self._files.fetch(remote, local))

    def home(self) -> str:
        """The user's home there, where commands and relative paths begin. Raises MissingError: there is no SFTP."""
        return wait_for(self._files.home())
