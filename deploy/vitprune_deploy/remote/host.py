"""Where a board is: ``ssh://user@board:2222``."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from vitprune.errors import InputError

_FORM = "a board's address is ssh://user@board or ssh://user@board:2222"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # none that a program would take for an option
_USER = re.compile(r"[A-Za-z0-9_][^\s/]*")


class Host(NamedTuple):
    """A board as ssh knows it; without user or port it is as the user's ssh settings have it.

    Attributes:
        name: a host name, an address, or an alias of ``~/.ssh/config``; IPv6 without its brackets.
    """

    user: str | None
    name: str
    port: int | None

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"ssh://{user}{name}" + (f":{self.port}" if self.port else "")


def parse_host(address: str) -> Host:
    """The host that ``address`` names.

    Raises:
        InputError: it is not of that form, or holds a password; what might be one is not repeated.
    """
    scheme, found, rest = address.partition("://")
    if not found:
        raise InputError(f"{_FORM}; this one does not begin with ssh://")
    if scheme != "ssh":
        raise InputError(f"{_FORM}, and begins with ssh, not {scheme!r}" if scheme.isalnum() else _FORM)
    user, at, place = rest.rpartition("@")
    if ":" in user:
        raise InputError(f"{_FORM}, without a password: put your key on the board with `ssh-copy-id` and remove it")
    if at and not _USER.fullmatch(user):
        raise InputError(f"{_FORM}; the user before the @ is missing, or no name of one")
    if any(mark in place for mark in "/?#"):
        raise InputError(f"{_FORM}, with nothing behind the host")
    name, port = _split(place)
    return Host(user or None, name, port)


def _split(place: str) -> tuple[str, int | None]:
    """Name and port of ``board``, ``board:2222`` or ``[fe80::1]:2222``."""
    if place.startswith("["):
        name, closed, rest = place[1:].partition("]")
        separator, port = rest[:1], rest[1:]
        if not closed or not _is_ipv6(name):
            raise InputError(f"{_FORM}; only an IPv6 address stands in brackets")
    else:
        name, separator, port = place.partition(":")
        if not _NAME.fullmatch(name):
            raise InputError(f"{_FORM}; the host's name is missing, or holds more than letters, digits, '.', '-', '_'")
    if not separator:
        return name, None
    if separator != ":" or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise InputError(f"{_FORM}; a port is a number from 1 to 65535, and an IPv6 address stands in brackets")
    return name, int(port)


def _is_ipv6(name: str) -> bool:
    try:
        ipaddress.IPv6Address(name)
    except ValueError:
        return False
    return True
