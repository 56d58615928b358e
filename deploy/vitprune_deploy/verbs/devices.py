"""Boards that are reached over ssh: add, list, remove and check them."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vitprune.errors import InputError, MissingError

from ..remote import known_hosts, registry
from ..remote.connection import Connection, UnknownHostKey
from ..remote.host import Host, parse_host
from ..remote.known_hosts import HostKey
from ..remote.registry import Device
from ..remote.trtexec_board import TrtexecBoard
from .answer import Answer, table

OLDEST_PYTHON = (3, 8)
COMMAND_S = 30.0
PROBE_S = 120.0  # it imports the runtimes, perhaps from a cold and slow disk
# For any Python at all: what an old one lacks is not touched. Its argument is the folder for our files.
PROBE = """
import json, os, sys
found = {"python_version": "%d.%d.%d" % sys.version_info[:3], "executable": sys.executable}
if sys.version_info >= (3, 8):
    import shutil
    found["packages"] = {}
    for name in ("numpy", "onnxruntime", "tensorrt"):
        try:
            found["packages"][name] = {"version": __import__(name).__version__, "why": ""}
        except ModuleNotFoundError as error:
            found["packages"][name] = {"version": None, "why": "" if error.name == name else str(error)}
        except Exception as error:
            found["packages"][name] = {"version": None, "why": str(error)}
    found["folder"] = os.path.join(os.path.expanduser("~"), sys.argv[1])
    there = found["folder"]
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    found["disk_free_mb"] = shutil.disk_usage(there).free // 10**6
print(json.dumps(found))
"""


def add(name: str, address: str, *, python: str, folder: str, runner: str, fingerprint: str | None) -> Answer:
    """The board, kept under ``name`` once its host key is vouched for, the login works and its runner would run.

    Raises:
        InputError: name, address or fingerprint is wrong, or nobody vouches for the host's key.
        MissingError: the board cannot be reached or logged in to, or has no such Python.
        ImportError: asyncssh is not installed.
    """
    device = Device(name, parse_host(address), python, folder, runner)
    registry.check(device)
    with _login(device.host, fingerprint) as connection:
        key = connection.fingerprint
        if fingerprint is not None:  # a key that was known already has not been compared yet
            _compare(device.host, key, fingerprint)
        if python.startswith("~/"):  # it is quoted later, and no shell expands that
            device = device._replace(python=f"{connection.home()}{python[1:]}")
        by_trtexec = runner == "trtexec"
        version = _trtexec_version(device) if by_trtexec else _python_version(connection, device)
    registry.add(device)
    data = {**_plain(device), f"{runner}_version": version, "fingerprint": key}
    rows = [
        ["device", name],
        ["address", str(device.host)],
        ["host key", key],
        ["trtexec", f"of TensorRT {version}"] if by_trtexec else ["Python", f"{version}  {device.python}"],
    ]
    return Answer(table(rows), data)


def devices() -> Answer:
    """All boards by name."""
    found = registry.list()
    if not found:
        return Answer("no devices yet; add one with `vitprune-deploy devices add NAME ssh://user@board`", [])
    rows = [[one.name, one.host, one.python if one.runner == "python" else one.runner, one.folder] for one in found]
    return Answer(table(rows, head=["device", "address", "runner", "folder"]), [_plain(device) for device in found])


def remove(name: str) -> Answer:
    """What was known of the board ``name``, which is forgotten with its host key, unless another name needs that."""
    device = registry.remove(name)
    if all(other.host != device.host for other in registry.list()):
        known_hosts.forget(device.host)
    return Answer(f"{name} is removed; files that were sent to {device.host} are still there", _plain(device))


def check(name: str) -> Answer:
    """What the board ``name``, or at that address, has; code 3 if it could not measure.

    Raises:
        InputError: it is not known.
        MissingError: it cannot be reached or logged in to, or has no Python.
        ImportError: asyncssh is not installed.
    """
    device = registry.lookup(name)
    import_module("asyncssh")  # which is no part of the time that the connection takes
    if device.runner == "trtexec":
        version = _trtexec_version(device)
        return Answer(f"{device.host}: trtexec of TensorRT {version}", {**_plain(device), "trtexec_version": version})
    started_s = time.perf_counter()
    with Connection.open(device.host) as connection:
        connect_ms = (time.perf_counter() - started_s) * 1e3
        found = _probe(connection, device)
    problems = _problems(device, found)
    data = {**_plain(device), "connect_ms": round(connect_ms, 1), **found, "problems": problems}
    return Answer(_text(device, data), data, 3 if problems else 0)


def _login(host: Host, fingerprint: str | None) -> Connection:
    """A login on ``host``; a key of it that is not known yet is accepted if it is the one that is meant."""
    if fingerprint is not None and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}=?", fingerprint):
        raise InputError(f"--fingerprint must be SHA256: and 43 characters, as `ssh-keygen -l` shows it: {fingerprint}")
    try:
        return Connection.open(host)
    except UnknownHostKey as unknown:
        if fingerprint is None:
            _confirm(host, unknown.key)
        else:
            _compare(host, unknown.key.fingerprint, fingerprint)
        known_hosts.accept(host, unknown.key)
    return Connection.open(host)


def _confirm(host: Host, key: HostKey) -> None:
    """Has whoever sits here vouch for the key that ``host`` has shown."""
    shown = f"{host} shows the host key {key.fingerprint}; `ssh-keygen -lf {key.place}` there tells that of the board"
    if not sys.stdin.isatty():
        raise InputError(f"{shown}. If they are the same, run this again with --fingerprint {key.fingerprint}")
    sys.stderr.write(f"{shown}.\nAre they the same? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(f"the host key of {host} was not accepted, so the device was not added")


def _compare(host: Host, shown: str, wanted: str) -> None:
    if shown != wanted.rstrip("="):
        raise InputError(
            f"{host} shows the host key {shown}, not {wanted}: the fingerprint is that of another key, or this is "
            "another machine"
        )


def _trtexec_version(device: Device) -> str:
    """That of the board's TensorRT. Raises MissingError: it has no trtexec that runs, or an old one."""
    with contextlib.closing(TrtexecBoard(device)) as board:
        return str(board.version(["tensorrt"]))


def _python_version(connection: Connection, device: Device) -> str:
    """That of the board's Python, which is new enough for the runner."""
    done = connection.run(f"{shlex.quote(device.python)} --version", timeout_s=COMMAND_S)
    found = re.search(r"Python (\d+)\.(\d+)\S*", done.stdout + done.stderr)
    if done.code or found is None:
        raise _no_python(device, done.stderr)
    version = found[0].removeprefix("Python ")
    if (int(found[1]), int(found[2])) < OLDEST_PYTHON:
        raise MissingError(_too_old(device, version))
    return version


def _probe(connection: Connection, device: Device) -> dict[str, Any]:
    """What PROBE found out there."""
    command = shlex.join([device.python, "-c", PROBE, device.folder])
    done = connection.run(command, timeout_s=PROBE_S)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # a library may have printed before
    except (ValueError, IndexError):
        raise _no_python(device, done.stderr) from None
    return found


def _no_python(device: Device, said: str) -> MissingError:
    last = "".join(said.strip().splitlines()[-1:]) or "it says nothing"
    return MissingError(
        f"{device.python} does not run on {device.host} ({last}); install Python 3.8 or newer there, or name it with "
        "`vitprune-deploy devices add NAME ADDRESS --python PATH`"
    )


def _too_old(device: Device, version: str) -> str:
    return (
        f"{device.python} on {device.host} is Python {version}, and 3.8 or newer is needed; name a newer one with "
        "`vitprune-deploy devices add NAME ADDRESS --python PATH`"
    )


def _problems(device: Device, found: Mapping[str, Any]) -> list[str]:
    """A sentence for each thing that is missing there, and what to do."""
    if "packages" not in found:
        return [_too_old(device, found["python_version"])]
    packages = found["packages"]
    problems = [f"{name} cannot be imported on {device.host}: {p['why']}" for name, p in packages.items() if p["why"]]
    lacking = [] if packages["numpy"]["version"] else ["numpy"]
    if not packages["onnxruntime"]["version"] and not packages["tensorrt"]["version"]:
        lacking.append("onnxruntime")
    if lacking:
        what = {"numpy": "no numpy", "onnxruntime": "neither onnxruntime nor tensorrt"}
        problems.append(
            f"there is {' and '.join(what[name] for name in lacking)} for {device.python} on {device.host}; run "
            f"`{device.python} -m pip install {' '.join(lacking)}` there"
        )
    return problems


def _text(device: Device, data: Mapping[str, Any]) -> str:
    packages = [[name, one["version"] or "-"] for name, one in data.get("packages", {}).items()]
    disk = [["disk", f"{data['disk_free_mb']} MB free for {data['folder']}"]] if "disk_free_mb" in data else []
    rows = [
        ["address", str(device.host)],
        ["connected in", f"{data['connect_ms']:.0f} ms"],
        ["Python", f"{data['python_version']}  {data['executable']}"],
        *packages,
        *disk,
    ]
    return "\n".join([table(rows), *(["", *(f"- {line}" for line in data["problems"])] if data["problems"] else [])])


def _plain(device: Device) -> dict[str, Any]:
    return {**device._asdict(), "host": str(device.host)}
