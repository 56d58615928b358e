"""The latency tables of several boards, measured side by side: it is the boards that are timed, so none waits.

Each gets a process of its own here, since torch exports one model at a time in a process. What these leave in the work
folders of the devices, the builds find there as done.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vitprune.errors import VitpruneError

from ..console import Console
from ..profile import Profile, load_profile
from .pipeline import run


def boards_of(profiles: Mapping[str, Profile]) -> dict[str, Profile]:
    """The devices that are boards, one for each address: a board measures for one at a time."""
    hosts = {profile.device.host: name for name, profile in reversed(list(profiles.items())) if profile.device.host}
    return {name: profile for name, profile in profiles.items() if name in hosts.values()}


def measure_side_by_side(boards: Mapping[str, Profile], out: Path, console: Console) -> None:
    """Have the stage ``measure`` of each board done in ``out/NAME``; what goes wrong is for its build to say."""
    processes: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory(prefix="vitprune-") as folder, ThreadPoolExecutor(len(boards)) as pool:
        try:
            for name, profile in boards.items():
                path = Path(folder) / f"{name}.yaml"
                path.write_text(profile.to_yaml(), encoding="utf-8")
                processes[name] = _started(path, out / name)
            for name, process in processes.items():
                pool.submit(_pass_on, name, process, console)
            for process in processes.values():
                process.wait()
        finally:
            for process in processes.values():
                process.terminate()


def _started(profile: Path, out: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "vitprune_deploy.build.side_by_side", str(profile), str(out)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _pass_on(name: str, process: subprocess.Popen[str], console: Console) -> None:
    """What a process says, under the device's name."""
    assert process.stderr is not None
    for line in process.stderr:
        console.say(f"device {name}: {line.rstrip()}")


def main(profile: Path, out: Path) -> int:
    """Measure one board; 1 if it cannot be measured."""
    try:
        run(load_profile(profile), out, Console(), until="measure")
    except VitpruneError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
