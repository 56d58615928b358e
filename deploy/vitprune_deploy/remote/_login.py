"""Logging in: as ``ssh`` does it, but with keys alone, and never to a host whose key nobody has vouched for."""

from __future__ import annotations

import asyncio
import errno
import re
import shlex
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitprune.errors import InputError, MissingError, VitpruneError

from ._link import Link
from .host import Host
from .known_hosts import SSH_PORT, HostKey, KnownHosts

if TYPE_CHECKING:
    import asyncssh

KEEPALIVE_S = 15.0  # a board is asked for a sign of life as often as this; after KEEPALIVES + 1 of these it is lost
KEEPALIVES = 3


class UnknownHostKey(MissingError):
    """The host has shown a key that nobody has vouched for.

    Attributes:
        key: what it has shown.
    """

    def __init__(self, host: Host, key: HostKey) -> None:
        super().__init__(
            f"the host key of {host} is not known here; run `vitprune-deploy devices add NAME {host}`, which shows its "
            "fingerprint"
        )
        self.key = key


async def login(host: Host, timeout_s: float) -> Link:
    """A login on ``host``. Raises as ``Connection.open`` does."""
    import asyncssh

    known, ended, shown = KnownHosts(), asyncio.Event(), list[HostKey]()

    class Client(asyncssh.SSHClient):
        def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
            shown.append(HostKey.shown(host, port, key))  # asked only about keys that are not trusted
            return False

        def connection_lost(self, exc: Exception | None) -> None:
            ended.set()

    try:
        ssh = await asyncio.wait_for(asyncssh.connect(host.name, **_options(host, known, Client)), timeout_s)
    except asyncssh.HostKeyNotVerifiable as error:
        raise _distrusted(host, known, shown, error) from error
    except asyncssh.Error as error:
        raise _refused(host, error) from error
    except (TimeoutError, asyncio.TimeoutError) as error:  # the same only from Python 3.11 on
        raise MissingError(
            f"{host} did not answer within {timeout_s:g} s; is it on, and is this its address?"
        ) from error
    except OSError as error:
        raise _unreachable(host, error) from error
    except ValueError as error:
        raise InputError(f"{host}: the settings or keys in ~/.ssh cannot be used ({_line(error)})") from error
    return Link(host, ssh, ended)


def _options(host: Host, known: KnownHosts, client: type) -> dict[str, Any]:
    given = {"username": host.user, "port": host.port}
    return {name: value for name, value in given.items() if value is not None} | {
        "known_hosts": known.trusted,
        "client_factory": client,
        "preferred_auth": ("publickey",),
        "gss_host": None,  # Kerberos would vouch for a host in place of its key
        "connect_timeout": None,
        "keepalive_interval": KEEPALIVE_S,
        "keepalive_count_max": KEEPALIVES,
    }


def _distrusted(host: Host, known: KnownHosts, shown: list[HostKey], error: asyncssh.Error) -> MissingError:
    """Why the key of ``host`` is not taken: it is unknown, not the known one, or revoked."""
    if not shown:
        return MissingError(f"the host key of {host} is not trusted ({_line(error)})")
    holder = known.holder(shown[-1].label)
    if holder is None:
        return UnknownHostKey(host, shown[-1])
    remove = f"ssh-keygen -R {shlex.quote(shown[-1].label)} -f {shlex.quote(str(holder))}"
    return MissingError(
        f"the host key of {host} has changed: it is not the one in {holder}. Another machine may answer in its place; "
        f"if the board was set up anew, run `{remove}` and then `vitprune-deploy devices add NAME {host}`"
    )


def _refused(host: Host, error: Exception) -> MissingError:
    """What a server means that ends the connection before the login is done."""
    import asyncssh

    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in str(error):
        port = f"-p {host.port} " if host.port else ""
        user = f"{host.user}@" if host.user else ""
        return MissingError(
            f"{host} accepts none of your keys; put one there with `ssh-copy-id {port}{user}{host.name}`, and load one "
            "that has a passphrase with `ssh-add`"
        )
    return MissingError(f"{host} ended the connection before the login ({_line(error)}); is that an ssh server?")


def _unreachable(host: Host, error: OSError) -> VitpruneError:
    """What the system says about the way to ``host``."""
    port = host.port or SSH_PORT
    if isinstance(error, socket.gaierror):
        return MissingError(f"{host}: the name {host.name} cannot be resolved; correct it, or give an IP address")
    if error.filename is not None:
        path = Path(str(error.filename))
        return InputError(f"{host}: {path} cannot be read ({error.strerror}), and the settings in ~/.ssh name it")
    numbers = {error.errno} - {None} or {int(found) for found in re.findall(r"\[Errno (\d+)\]", str(error))}
    if numbers == {errno.ECONNREFUSED}:  # asyncio puts those of several addresses into one text
        return MissingError(f"{host} refuses connections on port {port}; does sshd run there, and on that port?")
    if isinstance(error, ConnectionError):
        return _refused(host, error)
    return MissingError(f"{host} cannot be reached ({_line(error)}); is it on, and in the same network?")


def _line(error: Exception) -> str:
    """The error's text in one line, and not a long one: a part of it may come from the other side."""
    text = " ".join((error.strerror if isinstance(error, OSError) and error.strerror else str(error)).split())
    return (text or type(error).__name__)[:200]
