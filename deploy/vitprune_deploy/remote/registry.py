"""Boards by name: what ``vitprune-deploy devices`` keeps in ``devices.yaml``, in the folder of the user's settings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vitprune.errors import InputError

from ..cache import config_dir
from ..files import write_atomic
from .host import Host, parse_host

PYTHON = "python3"
FOLDER = ".cache/vitprune/board"
RUNNERS = ("python", "trtexec")
DEFAULTS = {"python": PYTHON, "folder": FOLDER, "runner": RUNNERS[0]}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Device(NamedTuple):
    """A board.

    Attributes:
        name: its name here, or its address where it has none.
        python: the command that starts Python there, without arguments.
        folder: where files are put there; below the user's home unless it is absolute.
        runner: what works there: our own in Python, or TensorRT's trtexec where there is nothing in Python.
    """

    name: str
    host: Host
    python: str = PYTHON
    folder: str = FOLDER
    runner: str = RUNNERS[0]


def lookup(name_or_address: str) -> Device:
    """The board of that name, or at that address.

    Raises:
        InputError: there is none of that name, it is no address of a board, or as ``list``.
    """
    if _NAME.fullmatch(name_or_address):
        return _named(name_or_address)
    host = parse_host(name_or_address)
    return Device(str(host), host)


def check(device: Device) -> None:
    """Whether ``add`` takes ``device``.

    Raises:
        InputError: its name cannot be one, or is that of another board; or as ``list``.
    """
    _check_name(device.name)
    for other in list():
        if other.name == device.name and other.host != device.host:
            raise InputError(
                f"{device.name} is {other.host} already; choose another name, or run "
                f"`vitprune-deploy devices remove {device.name}` first"
            )


def add(device: Device) -> None:
    """Keep ``device``, in place of what was known of the same board. Raises as ``check`` and ``write_atomic`` do."""
    check(device)
    _write([*(other for other in list() if other.name != device.name), device])


def remove(name: str) -> Device:
    """Forget the board of that name; what was known of it.

    Raises:
        InputError: there is none, or as ``list`` and ``write_atomic``.
    """
    _check_name(name)
    device = _named(name)
    _write(other for other in list() if other.name != name)
    return device


def list() -> tuple[Device, ...]:
    """All boards, by name.

    Raises:
        InputError: the file is damaged, or cannot be read.
    """
    path = _path()
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
        raise InputError(
            f"{path}:{line}: that is no YAML; correct it, or remove the file and add its devices"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text; remove it and add its devices again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    plain = {} if plain is None else plain
    if not isinstance(plain, dict):
        raise InputError(f"{path} must hold a mapping of names to devices, got a {type(plain).__name__}")
    return tuple(_device(path, str(name), plain[name]) for name in sorted(plain, key=str))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):  # it may be an address with a password, so it is not repeated
        raise InputError("a device's name begins with a letter or digit, and has letters, digits, '.', '-' and '_'")


def _named(name: str) -> Device:
    found = {device.name: device for device in list()}
    if name not in found:
        known = f"known are {', '.join(found)}" if found else "none is known"
        raise InputError(
            f"there is no device {name}, {known}; add it with `vitprune-deploy devices add {name} ssh://user@board`"
        )
    return found[name]


def _device(path: Path, name: str, plain: Any) -> Device:
    """The device ``name`` as the file at ``path`` has it."""
    if not isinstance(plain, dict) or not {"host"} <= plain.keys() <= {"host", *DEFAULTS}:
        raise InputError(
            f"{path}: {name} must hold host: ssh://user@board, perhaps {', '.join(DEFAULTS)}, and only these"
        )
    if not all(isinstance(value, str) and value for value in plain.values()):
        raise InputError(f"{path}: host, {', '.join(DEFAULTS)} of {name} must be texts")
    facts = {**DEFAULTS, **plain}
    if facts["runner"] not in RUNNERS:
        raise InputError(f"{path}: runner of {name} must be {' or '.join(RUNNERS)}, got {facts['runner']!r}")
    try:
        return Device(name, parse_host(facts.pop("host")), **facts)
    except InputError as error:
        raise InputError(f"{path}: {name}: {error}") from error


def _write(devices: Iterable[Device]) -> None:
    plain = {device.name: {**device._asdict(), "host": str(device.host)} for device in devices}
    for facts in plain.values():
        del facts["name"]
    write_atomic(_path(), yaml.safe_dump(plain, allow_unicode=True))


def _path() -> Path:
    return config_dir() / "devices.yaml"
