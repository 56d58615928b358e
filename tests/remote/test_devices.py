"""`vitprune-deploy devices`: what each verb asks, keeps and prints, on a real sshd."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys

import numpy as np
import onnxruntime
import pytest

from vitprune_deploy import cli
from vitprune_deploy.remote import registry
from vitprune_deploy.remote.connection import Connection, UnknownHostKey


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def new(sshd):
    """A board whose host key is not known yet."""
    sshd.forget_host()
    return sshd


def devices(capsys, *arguments):
    """Code, output and messages of the verb."""
    code = cli.main(["devices", *arguments])
    return code, *capsys.readouterr()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_person_accepts_the_key_that_is_shown_and_is_not_asked_again(new, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    code, out, err = devices(capsys, "add", "orin", new.address, "--python", sys.executable)
    assert code == 0
    assert err == (
        f"{new.address} shows the host key {new.server.fingerprint}; `ssh-keygen -lf "
        "/etc/ssh/ssh_host_ed25519_key.pub` there tells that of the board.\nAre they the same? [y/N] "
    )
    version = ".".join(map(str, sys.version_info[:3]))
    assert [line.split()[0] for line in out.splitlines()] == ["device", "address", "host", "Python"]
    assert f"{version}  {sys.executable}" in out
    assert (new.config_dir / "known_hosts").read_text() == f"{new.server.known_host.strip()} {new.address}\n"
    assert registry.lookup("orin") == registry.Device("orin", new.host, sys.executable)
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert devices(capsys, "add", "again", new.address)[0] == 0
    assert [device.name for device in registry.list()] == ["again", "orin"]


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_a_key_that_a_person_does_not_accept_is_not_kept(new, monkeypatch, capsys, answer):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    code, out, err = devices(capsys, "add", "orin", new.address)
    assert (code, out) == (2, "")
    assert err.endswith(f"error: the host key of {new.address} was not accepted, so the device was not added\n")
    assert registry.list() == ()
    with pytest.raises(UnknownHostKey):
        Connection.open(new.host)


def test_without_a_terminal_the_fingerprint_is_given_beforehand(new, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    code, _, err = devices(capsys, "add", "orin", new.address)
    assert code == 2
    assert err.rstrip().endswith(f"run this again with --fingerprint {new.server.fingerprint}")
    code, _, err = devices(capsys, "add", "orin", new.address, "--fingerprint", new.server.fingerprint)
    assert (code, err) == (0, "")
    assert registry.lookup("orin").host == new.host


@pytest.mark.parametrize("known", [True, False])
def test_another_fingerprint_is_refused_even_if_the_key_is_known(sshd, capsys, known):
    if not known:
        sshd.forget_host()
    code, _, err = devices(capsys, "add", "orin", sshd.address, "--fingerprint", f"SHA256:{'x' * 43}")
    assert code == 2
    assert f"shows the host key {sshd.server.fingerprint}, not SHA256:xxx" in err
    assert registry.list() == ()
    assert (sshd.config_dir / "known_hosts").exists() == known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "orin", "board"], "a board's address is ssh://user@board"),
        (["add", "two words", "ssh://board"], "a device's name begins with a letter or digit"),
        (["add", "orin", "ssh://me:hunter2@board"], "without a password"),
        (["add", "orin", "ssh://board", "--fingerprint", "MD5:1"], "--fingerprint must be SHA256: and 43 characters"),
        (["remove", "orin"], "there is no device orin, none is known"),
        (["check", "orin"], "there is no device orin, none is known"),
        (["check", "ssh://me:hunter2@board"], "without a password"),
        ([], "Missing command. See 'vitprune-deploy devices --help'."),
    ],
)
def test_wrong_input_is_told_with_code_2(sshd, capsys, arguments, said):
    code, out, err = devices(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "hunter2" not in err


def test_another_board_of_the_same_name_is_refused_before_anything_is_asked(new, capsys):
    registry.add(registry.Device("orin", new.host._replace(port=1)))
    code, _, err = devices(capsys, "add", "orin", new.address)
    assert code == 2
    assert "orin is ssh://" in err
    assert "fingerprint" not in err


def test_a_board_that_is_not_reached_is_code_3(sshd, capsys):
    registry.add(registry.Device("off", sshd.host._replace(port=1)))
    code, _, err = devices(capsys, "check", "off")
    assert code == 3
    assert "refuses connections on port 1" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo Python 3.6.9", r"is Python 3.6.9, and 3.8 or newer is needed; name a newer one with"),
        ("echo cannot open shared object >&2; exit 127", "does not run on ssh://"),
        (None, "not found); install Python 3.8 or newer there, or name it with"),
    ],
)
def test_a_board_without_a_python_that_is_new_enough_is_not_added(sshd, tmp_path, capsys, text, said):
    python = script(tmp_path / "python", text) if text else str(tmp_path / "none")
    code, _, err = devices(capsys, "add", "orin", sshd.address, "--python", python)
    assert code == 3
    assert said in err
    assert registry.list() == ()


def test_a_python_below_the_home_is_kept_with_its_whole_path(sshd, tmp_path, capsys):
    with Connection.open(sshd.host) as board:
        home = board.home()
    below = os.path.relpath(script(tmp_path / "python", "echo Python 3.9.1"), home)
    code, out, _ = devices(capsys, "add", "orin", sshd.address, "--python", f"~/{below}")
    assert code == 0
    assert registry.lookup("orin").python == f"{home}/{below}"
    assert f"3.9.1  {home}/{below}" in out


def test_list_shows_names_and_addresses(sshd, capsys):
    code, out, _ = devices(capsys, "list")
    assert code == 0
    assert out.startswith("no devices yet; add one with `vitprune-deploy devices add NAME ssh://user@board`")
    registry.add(registry.Device("orin", sshd.host))
    code, out, _ = devices(capsys, "list")
    assert [line.split() for line in out.splitlines()] == [
        ["device", "address", "runner", "folder"],
        ["orin", sshd.address, "python3", registry.FOLDER],
    ]
    assert devices(capsys, "list", "--json")[1] == json.dumps(
        [{"name": "orin", "host": sshd.address, **registry.DEFAULTS}], indent=1
    ) + "\n"  # fmt: skip


def test_a_removed_board_takes_its_host_key_along_once_no_other_name_has_it(new, capsys):
    for name in ("orin", "twin"):
        assert devices(capsys, "add", name, new.address, "--fingerprint", new.server.fingerprint)[0] == 0
    with (new.config_dir / "known_hosts").open("a") as file:
        file.write("other ssh-ed25519 AAAA ssh://other\n")
    assert devices(capsys, "remove", "orin")[0] == 0
    Connection.open(new.host).close()
    assert devices(capsys, "remove", "twin")[0] == 0
    with pytest.raises(UnknownHostKey):
        Connection.open(new.host)
    assert (new.config_dir / "known_hosts").read_text() == "other ssh-ed25519 AAAA ssh://other\n"


def test_check_tells_what_the_board_has(sshd, capsys):
    registry.add(registry.Device("here", sshd.host, sys.executable))
    code, out, err = devices(capsys, "check", "here", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert data["executable"] == sys.executable
    assert data["packages"]["numpy"] == {"version": np.__version__, "why": ""}
    assert data["packages"]["onnxruntime"] == {"version": onnxruntime.__version__, "why": ""}
    assert data["folder"].endswith("/.cache/vitprune/board")
    assert data["disk_free_mb"] > 0
    assert 0 < data["connect_ms"] < 15000
    assert data["problems"] == []
    code, out, _ = devices(capsys, "check", "here")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "address", "connected", "Python", "numpy", "onnxruntime", "tensorrt", "disk",
    ]  # fmt: skip


def test_check_names_the_command_that_brings_what_is_missing(sshd, tmp_path, capsys):
    bare = script(tmp_path / "python3", f'exec {shlex.quote(sys.executable)} -S "$@"')  # without installed packages
    registry.add(registry.Device("bare", sshd.host, bare))
    code, out, err = devices(capsys, "check", "bare")
    assert (code, err) == (3, "")
    assert out.splitlines()[-1] == (
        f"- there is no numpy and neither onnxruntime nor tensorrt for {bare} on {sshd.address}; run "
        f"`{bare} -m pip install numpy onnxruntime` there"
    )
    data = json.loads(devices(capsys, "check", "bare", "--json")[1])
    assert data["packages"]["numpy"] == {"version": None, "why": ""}


def test_check_tells_a_package_that_is_there_but_broken(sshd, tmp_path, capsys):
    (tmp_path / "onnxruntime.py").write_text("print('a greeting')\nraise OSError('libgomp.so.1 is missing')\n")
    broken = script(tmp_path / "python3", f'PYTHONPATH={tmp_path} exec {shlex.quote(sys.executable)} "$@"')
    registry.add(registry.Device("broken", sshd.host, broken))
    code, out, _ = devices(capsys, "check", "broken")
    assert code == 3
    assert f"- onnxruntime cannot be imported on {sshd.address}: libgomp.so.1 is missing" in out


def test_check_tells_an_old_python_by_its_answer(sshd, tmp_path, capsys):
    old = script(tmp_path / "python3", """echo '{"python_version": "3.6.9", "executable": "/usr/bin/python3"}'""")
    registry.add(registry.Device("old", sshd.host, old))
    code, out, _ = devices(capsys, "check", "old")
    assert code == 3
    assert "is Python 3.6.9, and 3.8 or newer is needed" in out


def test_check_takes_an_address_too(sshd, capsys):
    code, out, _ = devices(capsys, "check", sshd.address, "--json")
    assert code in (0, 3)  # whatever the system's own Python has
    assert json.loads(out)["name"] == sshd.address
