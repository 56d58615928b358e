"""A real sshd on the loopback address, and a home and settings for whoever logs in to it; fixtures are in remote/."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vitprune_deploy.remote.host import Host, parse_host

CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
{more}
"""
SFTP = "Subsystem sftp internal-sftp"


@dataclass
class Server:
    """An sshd. ``folder`` holds its host key, its settings, and the one user key that it accepts."""

    folder: Path
    port: int
    process: subprocess.Popen

    @property
    def address(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def host(self) -> Host:
        return parse_host(self.address)

    @property
    def known_host(self) -> str:
        """The line of a file of known hosts."""
        kind, key = (self.folder / "host_key.pub").read_text().split()[:2]
        return f"[127.0.0.1]:{self.port} {kind} {key}\n"

    @property
    def fingerprint(self) -> str:
        said = subprocess.run(
            ["ssh-keygen", "-lf", self.folder / "host_key.pub"], capture_output=True, text=True, check=True
        )
        return said.stdout.split()[1]

    def settings(self, folder: Path) -> dict[str, str]:
        """Environment of a user who has the key and knows the host; what it names is made in ``folder``."""
        home, config = folder / "home", folder / "config"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "config").write_text(f"Host *\n    IdentityFile {self.folder}/user_key\n")
        config.mkdir()
        (config / "known_hosts").write_text(self.known_host)
        return {"HOME": str(home), "VITPRUNE_CONFIG_DIR": str(config)}

    def restart(self, down_s: float) -> None:
        """Be gone with all connections for a while, as a board that is rebooted."""
        self.stop()
        time.sleep(down_s)
        self.process = started(self.folder)
        wait_for_port(self)

    def stop(self) -> None:
        self.kill_connections()
        self.process.terminate()
        self.process.wait(10)

    def kill_connections(self, number: int = signal.SIGKILL) -> None:
        """Kill the processes that serve connections, as a cut does; what was started through them lives on."""
        served = children_of(self.process.pid)
        served |= {one for parent in served for one in children_of(parent) if is_sshd(one)}
        for one in served:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)


@dataclass(frozen=True)
class Board:
    """The server, as a user sees it who has the key and knows the host."""

    server: Server
    home: Path
    config_dir: Path

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def host(self) -> Host:
        return self.server.host

    def kill_connections(self) -> None:
        self.server.kill_connections()

    def forget_host(self) -> None:
        (self.config_dir / "known_hosts").unlink()


def children_of(parent: int) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.add(int(path.parent.name))
    return found


def is_sshd(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/comm").read_text().startswith("sshd")
    return False


def is_running(command: str) -> bool:
    """Whether a process runs that was started as ``command``, alone or in a shell."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command in path.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                return True
    return False


def make_key(path: Path, *, passphrase: str = "") -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "", "-f", path], check=True)


def started(folder: Path) -> subprocess.Popen:
    with (folder / "log").open("a") as log:
        return subprocess.Popen([sshd_program(), "-D", "-e", "-f", folder / "sshd_config"], stderr=log)


def sshd_program() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextlib.contextmanager
def serving(folder: Path, more: str = SFTP) -> Iterator[Server]:
    """An sshd whose files are in ``folder``, an empty one, with the lines ``more`` in its settings."""
    sshd = sshd_program()
    if sshd is None or shutil.which("ssh-keygen") is None:
        pytest.skip("there is no sshd; apt-get install openssh-server")
    pytest.importorskip("asyncssh")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in; its package leaves that to systemd
    make_key(folder / "host_key")
    make_key(folder / "user_key")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = CONFIG.format(folder=folder, port=port, more=more)
    (folder / "sshd_config").write_text(f"PerSourcePenalties no\n{settings}")  # tests fail to log in, and often
    if subprocess.run([sshd, "-t", "-f", folder / "sshd_config"], capture_output=True).returncode:
        (folder / "sshd_config").write_text(settings)  # an sshd before 9.8, which has no penalties
    server = Server(folder, port, started(folder))
    try:
        wait_for_port(server)
        yield server
    finally:
        server.stop()


def wait_for_port(server: Server) -> None:
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s and server.process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
            return
        time.sleep(0.05)
    pytest.fail(f"sshd does not start: {(server.folder / 'log').read_text()}")


def logged_in_from(server: Server, folder: Path, monkeypatch) -> Board:
    for name, value in server.settings(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return Board(server, folder / "home", folder / "config")
