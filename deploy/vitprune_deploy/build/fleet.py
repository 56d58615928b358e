"""A build for each of several devices: a folder each, and one page about all. What no device decides is done once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from vitprune.errors import VitpruneError

from ..artifact import Manifest
from ..console import Console
from ..files import atomic_folder, write_atomic
from ..profile import Profile
from ..report.fleet import Board, fleet_dict, fleet_page
from ..stages import Stages
from . import build
from .bench import write_json
from .pipeline import WORK, run
from .side_by_side import boards_of, measure_side_by_side


def build_fleet(profiles: Mapping[str, Profile], out: Path, console: Console, *, fresh: bool = False) -> list[Board]:
    """What came of each device's build, in ``out/NAME``; one that fails does not keep the others from theirs.

    With ``search.one_plan`` all get the plan that the slowest of them, against its own budget, decides.

    Raises:
        VitpruneError: with one plan: one of the devices cannot be measured, or the plan is not found. Else: what all
            devices share is wrong.
    """
    if fresh:
        _forget(profiles, out)
    _measure_boards(profiles, out, console)
    if next(iter(profiles.values())).search.one_plan:
        builds = _with_one_plan(profiles, out, console)
    else:
        builds = {name: partial(build, one, out / name, console) for name, one in profiles.items()}
    found = []
    for name, profile in profiles.items():
        console.say(f"device {name}")
        _adopt(out, name, profiles)
        manifest, why = None, ""
        try:
            manifest = builds[name]()
        except VitpruneError as error:
            why = str(error)
            console.say(f"device {name}: {why}")
        found.append(Board(name, profile.device.host, manifest, why))
    write_json(out / "fleet.json", fleet_dict(found))
    write_atomic(out / "report.html", fleet_page(found))
    return found


def _forget(profiles: Mapping[str, Profile], out: Path) -> None:
    for name in profiles:
        with Stages(out / name / WORK) as stages:
            stages.forget()


def _measure_boards(profiles: Mapping[str, Profile], out: Path, console: Console) -> None:
    """Measure the boards side by side, where there are several."""
    boards = boards_of(profiles)
    if len(boards) < 2:
        return
    first = next(iter(boards))
    run(profiles[first], out / first, console, until="methods")
    for name in boards:
        _adopt(out, name, profiles)
    console.say(f"devices {', '.join(boards)}: latency tables, side by side")
    measure_side_by_side(boards, out, console)


def _with_one_plan(
    profiles: Mapping[str, Profile], out: Path, console: Console
) -> Mapping[str, Callable[[], Manifest]]:
    """Measure all devices, search with the first, and say how each is built from there."""
    measured = {}
    for name, profile in profiles.items():
        console.say(f"device {name}: latency table")
        _adopt(out, name, profiles)
        measured[name] = run(profile, out / name, console, until="losses")
    first, *rest = profiles
    others = [measured[name] for name in rest]
    console.say(f"device {first}: the plan for all")
    lead = run(profiles[first], out / first, console, until="recover", others=others)
    builds = {first: partial(build, profiles[first], out / first, console, others=others)}
    return builds | {name: partial(build, profiles[name], out / name, console, lead=lead) for name in rest}


def _adopt(out: Path, name: str, profiles: Mapping[str, Profile]) -> None:
    """Give a device the finished stages of the others, of which it uses what depends on no device."""
    for other in profiles:
        for stage in sorted((out / other / WORK).glob("*/stage.json")) if other != name else ():
            mine = out / name / WORK / stage.parent.name
            if not mine.exists():
                with atomic_folder(mine) as temporary:
                    shutil.copytree(stage.parent, temporary, copy_function=os.link, dirs_exist_ok=True)
