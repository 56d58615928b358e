"""Every command and every program of the examples' page is run, in the order in which a reader meets them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from outputs import CLASSES, written
from PIL import Image
from serving import ROOT, environment, serving

README = (ROOT / "deploy" / "examples" / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SERVE = "python deploy/examples/service out/quickstart --port 8000"
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "tritonclient")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The reader's folder: the project, a build of it, and a photo."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "deploy").symlink_to(ROOT / "deploy")
    (folder / "out" / "quickstart").mkdir(parents=True)
    written(folder / "out" / "quickstart", max_batch=8)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="the service or its client is not installed"
)
def test_the_readers_program_talks_to_the_readers_service(desk):
    assert SERVE in COMMANDS
    (program,) = PROGRAMS
    with serving(desk / "out" / "quickstart") as server:  # port 8000 may be taken here
        code = program.replace(":8000", f":{server.port}")
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, cwd=desk, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert len(re.findall("|".join(CLASSES), done.stdout)) == 3


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("pip install ", "python "))])
def test_the_readers_commands_do_what_they_say(desk, command):
    program, *arguments = shlex.split(command)
    assert program == "vitprune-deploy", f"no test runs {command!r}"
    start = [sys.executable, "-c", "from vitprune_deploy.cli import main; raise SystemExit(main())"]
    done = subprocess.run(start + arguments, cwd=desk, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert (desk / "models" / "quickstart" / "1" / "model.onnx").is_file()


def test_the_page_names_every_file_and_the_limits_as_they_are(monkeypatch):
    folder = ROOT / "deploy" / "examples" / "service"
    assert set(re.findall(r"^\| `(\w+\.py)`", README, re.MULTILINE)) == {path.name for path in folder.glob("*.py")}
    monkeypatch.syspath_prepend(str(folder))
    limits = importlib.import_module("inputs").Limits()
    said = f"may have {limits.images} images and {limits.body_bytes >> 20} MB; {limits.places} requests may be"
    assert said in " ".join(README.split())
