"""Boards by name: what is kept, and what is said about a damaged file."""

from __future__ import annotations

import pytest
import yaml

from vitprune.errors import InputError
from vitprune_deploy.remote import registry
from vitprune_deploy.remote.host import parse_host
from vitprune_deploy.remote.registry import Device

ORIN = Device("orin", parse_host("ssh://me@192.168.1.20:2222"), "/opt/venv/bin/python")
NANO = Device("4090", parse_host("ssh://nano.local"))  # a name that YAML alone would take for a number


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPRUNE_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path / "config"


def test_what_was_added_is_found_by_name_until_it_is_removed(folder):
    assert registry.list() == ()
    registry.add(ORIN)
    registry.add(NANO)
    assert registry.list() == (NANO, ORIN)
    assert registry.lookup("orin") == ORIN
    assert registry.lookup("4090") == NANO
    assert yaml.safe_load((folder / "devices.yaml").read_text())["orin"] == {
        "host": "ssh://me@192.168.1.20:2222",
        "python": "/opt/venv/bin/python",
        "folder": registry.FOLDER,
        "runner": "python",
    }
    assert registry.remove("4090") == NANO
    assert registry.list() == (ORIN,)
    assert [path.name for path in folder.iterdir()] == ["devices.yaml"]


def test_an_address_needs_no_name():
    host = parse_host("ssh://me@board:2222")
    assert registry.lookup("ssh://me@board:2222") == Device("ssh://me@board:2222", host, "python3")


def test_the_same_board_may_be_added_again_and_another_of_that_name_may_not():
    registry.add(ORIN)
    registry.add(ORIN._replace(python="python3.12"))
    assert registry.lookup("orin").python == "python3.12"
    other = ORIN._replace(host=parse_host("ssh://elsewhere"))
    with pytest.raises(InputError, match=r"orin is ssh://me@192.168.1.20:2222 already; choose another name, or run"):
        registry.add(other)
    assert registry.lookup("orin").python == "python3.12"


def test_an_unknown_name_is_told_with_those_that_are_known():
    with pytest.raises(
        InputError, match="there is no device thor, none is known; add it with `vitprune-deploy devices"
    ):
        registry.lookup("thor")
    registry.add(ORIN)
    registry.add(NANO)
    for ask in (registry.lookup, registry.remove):
        with pytest.raises(InputError, match="there is no device thor, known are 4090, orin; add it with"):
            ask("thor")


@pytest.mark.parametrize("name", ["", "two words", "-x", "ssh://board", "../etc", "me:hunter2@board"])
def test_a_name_is_a_plain_one_and_a_wrong_one_is_not_repeated(name):
    for refuse in (lambda: registry.add(ORIN._replace(name=name)), lambda: registry.remove(name)):
        with pytest.raises(InputError, match="a device's name begins with a letter or digit") as caught:
            refuse()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"orin: {host: ssh://board\nnano", r"devices.yaml:\d: that is no YAML; correct it, or remove the file"),
        (b"\xff\xfe", "devices.yaml is no text; remove it"),
        (b"- orin", "devices.yaml must hold a mapping of names to devices, got a list"),
        (b"orin: ssh://board", "devices.yaml: orin must hold host: ssh://user@board, perhaps python, folder, runner"),
        (b"orin: {python: python3}", "devices.yaml: orin must hold host"),
        (b"orin: {host: 'ssh://board', pasword: x}", "devices.yaml: orin must hold host"),
        (b"orin: {host: 'ssh://board', runner: make}", "runner of orin must be python or trtexec, got 'make'"),
        (b"orin: {host: 3}", "devices.yaml: host, python, folder, runner of orin must be texts"),
        (
            b"orin: {host: 'ssh://board', python: ''}",
            "devices.yaml: host, python, folder, runner of orin must be texts",
        ),
        (b"orin: {host: board}", "devices.yaml: orin: a board's address is ssh://user@board"),
    ],
)
def test_a_damaged_file_is_told_in_a_sentence(folder, content, said):
    folder.mkdir()
    (folder / "devices.yaml").write_bytes(content)
    for ask in (registry.list, lambda: registry.lookup("orin"), lambda: registry.add(ORIN)):
        with pytest.raises(InputError, match=said):
            ask()
    assert (folder / "devices.yaml").read_bytes() == content


def test_an_empty_file_holds_no_devices(folder):
    folder.mkdir()
    (folder / "devices.yaml").write_text("# none yet\n")
    assert registry.list() == ()
