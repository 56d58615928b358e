"""Every command of the README is run, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from sshd import Server, serving

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line[2:] for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.startswith("$ ")]  # fmt: skip  # noqa: E501

# Run by other means: the tests' own environment is what these two make, and the quickstart has a test of its own.
ELSEWHERE = ("make ", "pip install ")

# The reader's model and images stand for any; here they are small, so that the commands end within a minute.
SMALL = [
    "model.pretrained=false",
    "model.args={img_size: 32, patch_size: 4, embed_dim: 48, depth: 3, num_heads: 4, num_classes: 3}",
    "input.image_size=32", "data.calibration.images=48", "accuracy={min_agreement: 2}",
    "prune.tokens={method: [evit, tome], levels: 5}", "prune.heads.multiple=2", "prune.mlp.multiple=96",
    "search={probe_images: 16, holdout_images: 16, evaluations: 8, landings: 1}",
    "measure={max_seconds: 12, relative_half_width: 0.1}", "recover={max_steps: 4, batch: 8}",
    "validation={runs: 40, max_seconds: 10, parity_images: 8}",
]  # fmt: skip


FEW_PARTS = ["prune.tokens={method: evit, levels: 3}", "prune.heads.enabled=false", "prune.mlp.multiple=96"]
# The reader's board, which is this machine here: behind an sshd, with the tests' Python.
BOARD = "ssh://me@192.168.1.20"
OF_THE_BOARD = ("devices", "--host", "board.yaml")


class Desk(NamedTuple):
    """A folder with images in it, as the reader has one, and a board."""

    folder: Path
    board: Server
    settings: dict[str, str]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(images, folder / "images")
    with serving(tmp_path_factory.mktemp("sshd")) as server:
        yield Desk(folder, server, server.settings(tmp_path_factory.mktemp("settings")))


def run(command: str, desk: Desk) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.replace(BOARD, desk.board.address).split()
    assert program == "vitprune-deploy", f"no test runs {command!r}"
    if arguments[:2] == ["devices", "add"]:
        arguments += ["--python", sys.executable, "--folder", str(desk.folder / "board")]
    if arguments[0] in ("check", "build", "search"):
        less = FEW_PARTS if "board.yaml" in arguments else []
        arguments += [word for value in [*SMALL, *less] for word in ("--set", value)]
    start = [sys.executable, "-c", "from vitprune_deploy.cli import main; raise SystemExit(main())"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "deploy")])}
    environment |= desk.settings if any(word in arguments for word in OF_THE_BOARD) else {}
    folder = desk.folder
    return subprocess.run(start + arguments, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ELSEWHERE)])
def test_the_readers_commands_do_what_they_say(command, desk):
    done = run(command, desk)
    missed = done.returncode == 1 and "build" in command  # a busy machine may miss a latency, and says so
    assert done.returncode == 0 or missed, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_the_readme_is_short_and_its_two_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    made = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert made == ["quickstart", "test"]
    assert set(made) <= set(targets)
    assert len(README.splitlines()) <= 200


def test_the_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
