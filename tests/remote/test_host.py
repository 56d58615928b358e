"""Addresses of boards, and what is said about wrong ones; a password is never repeated."""

from __future__ import annotations

import pytest

from vitprune.errors import InputError
from vitprune_deploy.remote.host import Host, parse_host


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("ssh://user@board:2222", Host("user", "board", 2222)),
        ("ssh://board", Host(None, "board", None)),
        ("ssh://board:22", Host(None, "board", 22)),
        ("ssh://me@192.168.1.20", Host("me", "192.168.1.20", None)),
        ("ssh://me@example.org@jetson_1.local", Host("me@example.org", "jetson_1.local", None)),
        ("ssh://root@[fe80::1%eth0]:65535", Host("root", "fe80::1%eth0", 65535)),
        ("ssh://[::1]", Host(None, "::1", None)),
    ],
)
def test_an_address_is_read_and_given_back(address, host):
    assert parse_host(address) == host
    assert str(host) == address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("board", "does not begin with ssh://"),
        ("user@board:22", "does not begin with ssh://"),
        ("http://board", "begins with ssh, not 'http'"),
        ("ssh://", "the host's name is missing"),
        ("ssh://user@", "the host's name is missing"),
        ("ssh://@board", "the user before the @ is missing"),
        ("ssh://-oProxyCommand=x@board", "the user before the @ is missing"),
        ("ssh://-board", "the host's name is missing"),
        ("ssh://two words", "the host's name is missing, or holds more than letters"),
        ("ssh://board:", "a port is a number from 1 to 65535"),
        ("ssh://board:0", "a port is a number from 1 to 65535"),
        ("ssh://board:65536", "a port is a number from 1 to 65535"),
        ("ssh://board:٢٢", "a port is a number from 1 to 65535"),
        ("ssh://fe80::1", "an IPv6 address stands in brackets"),
        ("ssh://[board]", "only an IPv6 address stands in brackets"),
        ("ssh://[::1", "only an IPv6 address"),
        ("ssh://[::1]2222", "a port is a number"),
        ("ssh://board/data", "with nothing behind the host"),
        ("ssh://board?x", "with nothing behind the host"),
    ],
)
def test_what_is_no_address_is_told_in_a_sentence_that_shows_the_form(address, said):
    with pytest.raises(InputError) as caught:
        parse_host(address)
    assert str(caught.value).startswith("a board's address is ssh://user@board or ssh://user@board:2222")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "ssh://user:hunter2@board",
        "ssh://:hunter2@board",
        "ssh://user:hunter2/x@board",
        "ssh://user:hunter2@word@board",
        "ssh://user:hunter2",  # the host was forgotten
        "user:hunter2@board",
        "user:hunter2@board://",
        "ftp://user:hunter2@board",
    ],
)
def test_a_password_is_refused_and_not_repeated(address):
    with pytest.raises(InputError) as caught:
        parse_host(address)
    error: BaseException | None = caught.value
    while error is not None:  # the traceback that -v shows has the causes too
        assert "hunter2" not in str(error)
        error = error.__cause__ or error.__context__


def test_a_password_is_told_apart_from_other_faults():
    with pytest.raises(InputError, match="without a password: put your key on the board with `ssh-copy-id`"):
        parse_host("ssh://user:hunter2@board")
