"""Files over SFTP, whole or not at all: they are written under a temporary name beside their own."""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import re
import secrets
import shlex
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vitprune.errors import InputError, MissingError, VitpruneError

from ..files import TEMPORARY, atomic_path
from ._link import GRACE_S, Link, Lost

if TYPE_CHECKING:
    import asyncssh

CHUNK_BYTES = 4 << 20  # asyncssh asks for the parts of a chunk side by side
SFTP_S = 30.0  # where a shell greets before SFTP does, asyncssh waits for ever

Progress = Callable[[int, int], None]


class Files:
    """The files of a board, through one SFTP session that is kept."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._kept: asyncssh.SFTPClient | None = None

    async def send(self, local: Path, remote: str, progress: Progress | None) -> None:
        """Copy ``local`` to the board. Raises as ``Connection.send`` does."""
        import asyncssh

        try:
            await _upload(await self._session(), local, remote, progress)
        except asyncssh.Error as error:
            raise await self._unwritten(error, remote, local.stat().st_size) from error
        except OSError as error:
            if await self._link.is_lost():
                raise Lost(self._link.host) from error
            raise

    async def fetch(self, remote: str, local: Path) -> None:
        """Copy ``remote`` to this machine. Raises as ``Connection.fetch`` does."""
        import asyncssh

        with atomic_path(local) as temporary:
            try:
                await _download(await self._session(), remote, temporary)
            except asyncssh.SFTPNoSuchFile as error:
                raise InputError(f"there is no file {remote} on {self._link.host}") from error
            except asyncssh.SFTPPermissionDenied as error:
                raise InputError(f"{remote} on {self._link.host} cannot be read (permission denied)") from error
            except asyncssh.Error as error:
                raise await self._broken_off(error, remote) from error
            except OSError as error:
                if await self._link.is_lost():
                    raise Lost(self._link.host) from error
                raise

    async def home(self) -> str:
        """Where relative paths begin. Raises as ``Connection.home`` does."""
        import asyncssh

        try:
            return str(await (await self._session()).realpath("."))
        except (asyncssh.Error, OSError) as error:
            raise await self._broken_off(error, "the home") from error

    async def _session(self) -> asyncssh.SFTPClient:
        import asyncssh

        if self._kept is None:
            try:
                self._kept = await asyncio.wait_for(self._link.ssh.start_sftp_client(), SFTP_S)
            except (asyncssh.Error, OSError, EOFError, asyncio.TimeoutError) as error:
                if await self._link.is_lost(GRACE_S):
                    raise Lost(self._link.host) from error
                raise MissingError(
                    f"{self._link.host} has no SFTP; install openssh-sftp-server there, or write `Subsystem sftp "
                    "internal-sftp` into its sshd_config, and have the user's shell print nothing as it starts"
                ) from error
        return self._kept

    async def _unwritten(self, error: asyncssh.Error, remote: str, needed_bytes: int) -> VitpruneError:
        """Why a file of ``needed_bytes`` could not be written to ``remote``."""
        import asyncssh

        folder, host = posixpath.dirname(remote) or ".", self._link.host
        if isinstance(error, asyncssh.SFTPPermissionDenied):
            return InputError(f"{folder} on {host} cannot be written to (permission denied); choose another folder")
        if isinstance(error, asyncssh.SFTPNoSuchFile):
            return InputError(f"there is no folder {folder} on {host}")
        if isinstance(error, asyncssh.SFTPFailure):  # which is all that its protocol has for a full disk
            free_bytes = await self._free_bytes(folder)
            if free_bytes is not None and free_bytes < needed_bytes + CHUNK_BYTES:
                return MissingError(
                    f"no room left on the disk of {folder} on {host}: {needed_bytes / 1e6:.1f} MB are to be written, "
                    f"{free_bytes / 1e6:.1f} MB are free; free some and run the same command again"
                )
        return await self._broken_off(error, remote)

    async def _free_bytes(self, folder: str) -> int | None:
        """What the user may still write to the disk of ``folder``; None where ``df`` does not tell."""
        try:
            said = (await self._link.run(f"df -Pk {shlex.quote(folder)}", None, SFTP_S)).stdout
        except Lost:
            raise
        except MissingError:  # a user may copy files and run nothing
            return None
        sizes = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%\s", said)
        return int(sizes[1]) * 1024 if sizes else None

    async def _broken_off(self, error: Exception, what: str) -> VitpruneError:
        """Why SFTP failed, where the file is not to blame; the next one gets a session of its own."""
        self._kept = None
        if await self._link.is_lost(GRACE_S):
            return Lost(self._link.host)
        return MissingError(f"{what} on {self._link.host} cannot be transferred by SFTP ({error})")


async def _upload(sftp: asyncssh.SFTPClient, local: Path, remote: str, progress: Progress | None) -> None:
    import asyncssh

    folder, name = posixpath.split(remote)
    temporary = posixpath.join(folder, f"{TEMPORARY}{secrets.token_hex(4)}-{name}")
    total_bytes, done_bytes = local.stat().st_size, 0
    async with _removed_on_failure(sftp, temporary):
        async with sftp.open(temporary, "wb") as target:
            with local.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    await target.write(chunk)
                    done_bytes += len(chunk)
                    if progress is not None:
                        progress(done_bytes, total_bytes)
            with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                await target.fsync()
        await sftp.posix_rename(temporary, remote)


async def _download(sftp: asyncssh.SFTPClient, remote: str, local: Path) -> None:
    async with sftp.open(remote, "rb") as source:
        with local.open("wb") as target:
            chunk: bytes = await source.read(CHUNK_BYTES)
            while chunk:
                target.write(chunk)
                chunk = await source.read(CHUNK_BYTES)


@contextlib.asynccontextmanager
async def _removed_on_failure(sftp: asyncssh.SFTPClient, path: str) -> AsyncIterator[None]:
    import asyncssh

    try:
        yield
    except BaseException:
        with contextlib.suppress(asyncssh.Error, OSError):  # the connection may be what failed
            await sftp.remove(path)
        raise
