"""What a machine's own tools and counters say of its clocks, power and heat, as they say it; ``state`` reads it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..latency.fingerprint import machine_state

SYS = Path("/sys")
FREQUENCIES = {"cur": "scaling_cur_freq", "min": "scaling_min_freq", "limit": "scaling_max_freq",
               "governor": "scaling_governor"}  # fmt: skip
DEVICE_FREQUENCIES = {"cur": "cur_freq", "min": "min_freq", "max": "max_freq", "governor": "governor"}
CARD = ("clocks.gr", "clocks.max.gr", "utilization.gpu", "clocks.mem", "clocks.max.mem", "temperature.gpu",
        "power.draw", "power.limit")  # fmt: skip
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # a driver knows one of them
LONGEST_S = 5.0  # that a tool may take


def raw_state() -> dict[str, Any]:
    """All that there is to know, under the names that ``state`` lists; what a machine has not is left out."""
    zones, cpus = (
        sorted((SYS / "class/thermal").glob("thermal_zone*")),
        sorted(SYS.glob("devices/system/cpu/cpu[0-9]*")),
    )
    found = {
        **machine_state(),
        "nvpmodel": _said("nvpmodel", "-q"),
        "jetson_clocks": _said("jetson_clocks", "--show"),
        "tegrastats": _first_line("tegrastats", "--interval", "100"),
        "nvidia_smi": _card(),
        "thermal": {_text(zone / "type"): _number(zone / "temp") for zone in zones},
        "trips": {_text(zone / "type"): _trips(zone) for zone in zones},
        "cooling": _cooling(),
        "cpufreq": {cpu.name: _numbers(cpu / "cpufreq", FREQUENCIES) for cpu in cpus},
        "devfreq": {one.name: _numbers(one, DEVICE_FREQUENCIES) for one in sorted(SYS.glob("class/devfreq/*"))},
        "throttles": {cpu.name: _throttles(cpu) for cpu in cpus},
        "over_current": {
            file.name[: -len("_event_cnt")]: _number(file) for file in SYS.glob("class/hwmon/hwmon*/oc*_event_cnt")
        },
    }
    plain = {name: _without_nothing(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value not in (None, "", {}, [])}


def _without_nothing(value: Any) -> Any:
    """A mapping without what is not known."""
    if not isinstance(value, dict):
        return value
    return {name: one for name, one in value.items() if one not in (None, "", {}, [])}


def _said(tool: str, *arguments: str) -> str | None:
    """What a tool prints, errors included; None where there is no such tool."""
    command = shutil.which(tool)
    if command is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S
        )
        return done.stdout.strip()
    return None


def _first_line(tool: str, *arguments: str) -> str | None:
    """The first line of a tool that prints until it is stopped."""
    command = shutil.which(tool)
    if command is None:
        return None
    with subprocess.Popen([command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as one:
        line = one.stdout.readline() if one.stdout else ""
        one.kill()
    return line.strip()


def _card() -> dict[str, str]:
    """What nvidia-smi says of the first graphics card."""
    values = _cells(",".join(CARD))
    found = dict(zip(CARD, values)) if len(values) == len(CARD) else {}
    for name in REASONS if found else ():
        (reasons,) = _cells(name) or [""]
        if reasons.startswith("0x"):
            return {**found, name: reasons}
    return found


def _cells(query: str) -> list[str]:
    said = _said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits") or ""
    return [cell.strip() for cell in said.splitlines()[0].split(",")] if said else []


def _cooling() -> dict[str, list[int]]:
    """State and highest state of each kind of cooling device; of several of a kind, the one that is at work most."""
    found: dict[str, list[int]] = {}
    for one in sorted((SYS / "class/thermal").glob("cooling_device*")):
        now, most = _number(one / "cur_state"), _number(one / "max_state")
        if now is not None and most is not None:
            kind = _text(one / "type")
            found[kind] = max(found.get(kind, [now, most]), [now, most])
    return found


def _trips(zone: Path) -> list[list[Any]]:
    """Millidegrees and kind of the trip points of a zone."""
    kinds = sorted(zone.glob("trip_point_*_type"))
    found = [[_number(kind.with_name(kind.name.replace("_type", "_temp"))), _text(kind)] for kind in kinds]
    return [trip for trip in found if trip[0] is not None]


def _throttles(cpu: Path) -> dict[str, Any]:
    folder = cpu / "thermal_throttle"
    return _without_nothing({kind: _number(folder / f"{kind}_throttle_count") for kind in ("core", "package")})


def _numbers(folder: Path, files: dict[str, str]) -> dict[str, Any]:
    """What stands in ``files``, as numbers where it is some."""
    found = {name: _text(folder / file) for name, file in files.items()}
    return {name: int(text) if text.isdigit() else text for name, text in found.items() if text}


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    """The file's text; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
