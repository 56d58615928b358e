"""Builds for a board behind a real sshd, which is this machine: its figures are those of a build here."""

from __future__ import annotations

import json
import sys
import threading

import numpy as np
import pytest
from sshd import logged_in_from, serving

from vitprune_deploy.artifact import verify
from vitprune_deploy.build import fleet
from vitprune_deploy.build.side_by_side import boards_of
from vitprune_deploy.cli import main
from vitprune_deploy.console import Console
from vitprune_deploy.profile import load_fleet
from vitprune_deploy.remote import board, registry
from vitprune_deploy.runtime import load

pytestmark = pytest.mark.e2e
PARTS = ("prune.tokens={method: evit, levels: 3}", "prune.heads.enabled=false", "prune.mlp.multiple=96")
FEW = tuple(f"--set={one}" for one in (*PARTS, "measure.max_seconds=6"))  # parts, for the test's own time


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """This machine by the name 'here', with a folder of the test's own."""
    login = logged_in_from(server, tmp_path, monkeypatch)
    registry.add(registry.Device("here", login.host, sys.executable, str(tmp_path / "board")))
    board.board.cache_clear()
    yield login
    board.board("here").close()
    board.board.cache_clear()


def built(profile, out, *more):
    arguments = [part for one in more for part in ("--set", one)]
    assert main(["build", str(profile), "--out", str(out), "--quiet", *FEW, *arguments]) in (0, 1)
    return json.loads((out / "manifest.json").read_text())


def test_a_build_on_a_board_is_the_build_here_given_the_same_table(profile_path, tmp_path, here, capsys):
    assert main(["measure", str(profile_path), "--out", str(tmp_path / "first"), "--host", "here", "--json", *FEW]) == 0
    (tmp_path / "table.json").write_text(capsys.readouterr().out)
    fixed = [f"measure.table={tmp_path / 'table.json'}", "search.landings=0"]
    there = built(profile_path, tmp_path / "there", *fixed, "device.host=here")
    local = built(profile_path, tmp_path / "local", *fixed)
    for name in ("plan.yaml", "model.safetensors", "latency_table.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert there["pruned"]["top1"] == local["pruned"]["top1"]
    assert there["device"] == local["device"]
    assert there["pruned"]["memory_mb"] > 0
    assert {check["name"] for check in there["consistency"]["checks"]} == {
        check["name"] for check in local["consistency"]["checks"]
    }
    verify(tmp_path / "there")
    with load(tmp_path / "there") as model, load(tmp_path / "local") as other:
        pixels = np.full((2, 32, 32, 3), 90, np.uint8)
        np.testing.assert_allclose(model.predict(pixels).logits, other.predict(pixels).logits, atol=1e-5)
    assert main(["validate", str(tmp_path / "there"), "--quiet"]) in (0, 1)


def test_a_build_goes_on_over_connections_that_are_cut(profile_path, tmp_path, here, monkeypatch):
    monkeypatch.setattr(board, "AGAIN_S", (0.2, 0.5, 1.0, 2.0))
    stop, rng, cuts = threading.Event(), np.random.default_rng(0), []

    def cut():
        while not stop.wait(rng.uniform(5.0, 10.0)):
            here.kill_connections()
            cuts.append(1)

    threading.Thread(target=cut, daemon=True).start()
    try:
        found = built(profile_path, tmp_path / "out", "device.host=here", "recover.enabled=false")
    finally:
        stop.set()
    assert cuts
    assert found["pruned"]["latency_ms"]["samples"] >= 40
    verify(tmp_path / "out")


def test_several_boards_are_measured_side_by_side_and_checked_in_one_go(profile_path, tmp_path, server, here, capsys):
    for name in ("second", "third"):  # the third is no board: its Python is not there
        python = sys.executable if name == "second" else "/nowhere/python3"
        registry.add(registry.Device(name, here.host, python, str(tmp_path / name)))
    listed = {"a": {"host": "here"}, "b": {"host": "second"}, "c": {"host": "third"}, "d": {"host": "second"}}
    profile_path.write_text(f"{profile_path.read_text()}devices: {json.dumps(listed)}\n")
    overrides = [one.removeprefix("--set=") for one in FEW]
    profiles = load_fleet(profile_path, overrides, files_exist=True)
    boards = boards_of(profiles)
    assert list(boards) == ["a", "b", "c"]
    fleet._measure_boards(profiles, tmp_path / "out", Console())
    said = capsys.readouterr().err
    measured = [name for name in boards if list((tmp_path / "out" / name / ".work").glob("measure-*/stage.json"))]
    assert measured == ["a", "b"]
    assert "device a: [4/4] measure" in said
    assert "device b: [4/4] measure" in said

    assert main(["check", str(profile_path), "--json", *FEW]) == 3
    found = json.loads(capsys.readouterr().out)["devices"]
    assert {name: bool(one["problems"]) for name, one in found.items()} == {
        "a": False,
        "b": False,
        "c": True,
        "d": False,
    }


def test_what_stands_in_the_way_on_the_board_is_found_before_work_begins(profile_path, tmp_path, here, capsys):
    assert main(["check", str(profile_path), "--host", "here", "--json"]) == 0
    capsys.readouterr()
    registry.add(registry.Device("here", here.host, "/nowhere/python3", str(tmp_path / "board")))
    board.board.cache_clear()
    assert main(["check", str(profile_path), "--host", "here", "--json"]) == 3
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "python3" in problem
    assert main(["check", str(profile_path), "--host", "ssh://nobody@127.0.0.1:1", "--json"]) == 3
