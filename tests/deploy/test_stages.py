"""Stages that run once: what makes one run again, and what a kill, a full disk or a second build do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitprune.errors import InputError, MissingError
from vitprune_deploy.console import to_file
from vitprune_deploy.stages import Stages

KEY = {"seed": 1, "levels": [1.0, 0.5]}


@pytest.fixture
def stages(tmp_path):
    with Stages(tmp_path / "work") as opened:
        yield opened


def write(text: str):
    """A stage's work: one file of ``text``, and a count of how often it was done."""

    def work(folder: Path) -> None:
        work.runs += 1
        (folder / "deep").mkdir()
        (folder / "deep" / "table.json").write_text(text)

    work.runs = 0
    return work


OUTPUTS = ["deep/table.json"]


def test_a_stage_runs_once_and_its_outputs_stay(stages):
    work = write("1")
    first = stages.run("measure", KEY, OUTPUTS, work)
    second = stages.run("measure", dict(reversed(KEY.items())), OUTPUTS, work)
    assert (first.ran, second.ran, work.runs) == (True, False, 1)
    assert (first.folder, first.sha256) == (second.folder, second.sha256)
    assert (second.folder / "deep" / "table.json").read_text() == "1"


def test_another_key_runs_the_stage_and_forgets_what_it_left_before(stages):
    stages.run("measure-more", KEY, OUTPUTS, write("other stage"))
    first = stages.run("measure", KEY, OUTPUTS, write("1"))
    second = stages.run("measure", KEY | {"seed": 2}, OUTPUTS, write("2"))
    assert second.ran
    assert first.sha256 != second.sha256
    assert stages.find("measure", KEY) is None
    assert stages.find("measure-more", KEY) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "deep" / "table.json").write_text("2"),
        lambda folder: (folder / "deep" / "table.json").write_text(""),
        lambda folder: (folder / "deep" / "table.json").unlink(),
        lambda folder: (folder / "stage.json").unlink(),
        lambda folder: (folder / "stage.json").write_text('{"key": {"seed"'),
        lambda folder: (folder / "stage.json").write_text("[]"),
        lambda folder: (folder / "stage.json").write_text('{"key": 1, "files": {}}'),
    ],
    ids=range(7),
)
def test_damaged_outputs_are_built_again(stages, damage):
    done = stages.run("measure", KEY, OUTPUTS, write("1"))
    damage(done.folder)
    again = stages.run("measure", KEY, OUTPUTS, write("1"))
    assert again.ran
    assert again.sha256 == done.sha256


def test_a_stage_that_fails_leaves_what_there_was(stages):
    stages.run("measure", KEY, OUTPUTS, write("1"))

    def fail(folder: Path) -> None:
        (folder / "table.json").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("measure", {"seed": 3}, ["table.json"], fail)
    assert stages.find("measure", KEY) is not None
    assert not list(stages.folder.glob(".tmp-*"))


def test_a_stage_that_lacks_an_output_is_not_finished(stages):
    with pytest.raises(RuntimeError, match=r"stage measure did not write model\.onnx"):
        stages.run("measure", KEY, ["model.onnx"], lambda folder: None)
    assert stages.find("measure", KEY) is None


def test_a_disk_without_room_ends_the_stage_with_one_sentence(stages):
    def fill(folder: Path) -> None:
        (folder / "a").write_text("x")
        Path("/dev/full").write_text("x")  # the kernel's own disk without room

    with pytest.raises(MissingError, match=r"no room left on the disk of .*work; free some and run the same command"):
        stages.run("measure", KEY, ["a"], fill)
    assert [p.name for p in stages.folder.iterdir()] == [".lock"]


def test_a_folder_is_taken_even_where_there_is_no_room_for_the_name_of_the_owner(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with Stages(tmp_path) as stages, pytest.raises(InputError, match="another build is at work here"):
        Stages(stages.folder).__enter__()


def test_a_log_on_a_full_disk_prints_no_tracebacks(capsys):
    handler = to_file("/dev/full")
    logging.getLogger("vitprune_deploy").info("a line")
    logging.getLogger("vitprune_deploy").removeHandler(handler)
    with contextlib.suppress(OSError):
        handler.close()
    assert capsys.readouterr() == ("", "")


def test_forgetting_makes_every_stage_run_again(stages):
    stages.run("a", KEY, OUTPUTS, write("1"))
    stages.run("b", KEY, OUTPUTS, write("1"))
    stages.forget()
    assert (stages.find("a", KEY), stages.find("b", KEY)) == (None, None)


def test_a_second_build_in_the_same_folder_is_refused_and_told_of_the_first(stages):
    with pytest.raises(InputError, match=f"another build is at work here .process {os.getpid()}.; wait for it"):
        Stages(stages.folder).__enter__()


def test_the_folder_is_free_again_when_a_build_ends(tmp_path):
    for _ in range(2):
        with Stages(tmp_path):
            (tmp_path / ".tmp-left-by-a-kill").mkdir()
    with Stages(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


CHILD = """
import sys
from pathlib import Path
from vitprune_deploy.stages import Stages

def work(folder):
    for name in "abc":
        (folder / name).write_text("x" * 200_000)

with Stages(Path(sys.argv[1])) as stages:
    while True:
        for seed in "01":
            stages.run("s", {"seed": seed}, ["a", "b", "c"], work)
            print("done once", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_stage_or_none(tmp_path):
    dice = random.Random(0)
    path = os.pathsep.join(["deploy", "."])
    for _ in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": path},
        )
        child.stdout.readline()
        time.sleep(dice.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        with Stages(tmp_path) as stages:
            whole = [done for seed in "01" if (done := stages.find("s", {"seed": seed}))]
        assert whole
        assert sorted(tmp_path.glob("s-*")) == sorted(done.folder for done in whole)
        assert not list(tmp_path.glob(".tmp-*"))
