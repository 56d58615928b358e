"""Whose host keys are trusted: those in the user's ``~/.ssh/known_hosts``, and those that ``devices add`` accepted.

The latter are in a file of ours, in the same form; the address that was given stands at the end of each line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitprune.errors import InputError

from ..cache import config_dir
from ..files import write_atomic
from .host import Host

if TYPE_CHECKING:
    import asyncssh

SSH_PORT = 22


class HostKey(NamedTuple):
    """The key that a host has shown.

    Attributes:
        label: as a file of known hosts names the host: ``board``, or ``[board]:2222``.
        public: kind and key, as such a file holds them.
        fingerprint: as ``ssh-keygen -l`` shows it: ``SHA256:`` and 43 characters.
    """

    label: str
    public: str
    fingerprint: str

    @classmethod
    def shown(cls, name: str, port: int, key: asyncssh.SSHKey) -> HostKey:
        """The ``key`` of the host that ssh, after its settings, calls ``name``."""
        kind, public = key.export_public_key("openssh").decode().split()[:2]
        label = name if port == SSH_PORT else f"[{name}]:{port}"
        return cls(label, f"{kind} {public}", key.get_fingerprint("sha256"))

    @property
    def place(self) -> str:
        """Where OpenSSH keeps it on the host."""
        kind = next((kind for kind in ("ed25519", "ecdsa", "rsa") if kind in self.public.partition(" ")[0]), "*")
        return f"/etc/ssh/ssh_host_{kind}_key.pub"


class KnownHosts:
    """Both files, as they are now.

    Attributes:
        trusted: of both.

    Raises:
        InputError: one has a line that is none of such a file.
    """

    def __init__(self) -> None:
        import asyncssh

        texts = {path: _read(path) for path in (Path.home() / ".ssh" / "known_hosts", _own())}
        self._files = {path: _parsed(path, text) for path, text in texts.items()}
        self.trusted = asyncssh.import_known_hosts("\n".join(texts.values()))

    def holder(self, label: str) -> Path | None:
        """The file that has a key of the host ``label``, or of the authority that vouches for it."""
        for path, hosts in self._files.items():
            keys, authorities, revoked = hosts.match(label, "", None)[:3]
            if keys or authorities or revoked:
                return path
        return None


def accept(host: Host, key: HostKey) -> None:
    """Trust ``key`` from now on. Raises as ``write_atomic`` does."""
    _write([*_read(_own()).splitlines(), f"{key.label} {key.public} {host}"])


def forget(host: Host) -> None:
    """Trust no key any more that was accepted for ``host``. Raises as ``write_atomic`` does."""
    _write([line for line in _read(_own()).splitlines() if line.split()[-1:] != [str(host)]])


def _write(lines: list[str]) -> None:
    write_atomic(_own(), "".join(f"{line}\n" for line in lines))


def _own() -> Path:
    return config_dir() / "known_hosts"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); host keys are checked against it") from error


def _parsed(path: Path, text: str) -> asyncssh.SSHKnownHosts:
    import asyncssh

    try:
        return asyncssh.import_known_hosts(text)
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct or remove that line") from error
