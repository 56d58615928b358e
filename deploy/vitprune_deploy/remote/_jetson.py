"""What Jetson's own tools print, as plain numbers: jetson_clocks and tegrastats of JetPack 3 to 7.

The forms differ by board and release, and none of the tools has a form for machines. Recorded outputs of all that are
told apart here are in ``tests/remote/recorded``. Clocks are dicts with the fields of ``state.Clock``, those that a text
tells; what cannot be read is left out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

# 'Gonvernor' is how JetPack 3 spells it; JetPack 7 leaves out Online; Thor's GPU is gpu-gpc-0
CLOCK_LINE = re.compile(
    r"^\s*(?P<name>cpu\d+|GPU|gpu-gpc-\d+|EMC)\b:?\s+(?P<rest>.*?)MinFreq=(?P<least>\d+) MaxFreq=(?P<most>\d+) "
    r"CurrentFreq=(?P<now>\d+)(?P<after>.*)$",
    re.MULTILINE,
)
GOVERNOR = re.compile(r"Gon?vernor=(\S+)")
# 'CPU [5%@1510,off]'; on older boards and on Thor at rest one clock for all: 'cpu [17%,13%]@408'
CORES = re.compile(r"\bCPU \[(?P<cores>[^\]]*)\](?:@(?P<mhz>\d+))?", re.IGNORECASE)
CORE = re.compile(r"(?P<load>\d+)%(?:@(?P<mhz>\d+))?")
# 'GR3D_FREQ 99%', '0%@76', '0%@[1300,1300]' with a clock for each cluster, '@[314,314,314]'
GPU = re.compile(r"\bGR3D(?:_FREQ)? (?:(?P<load>\d+)%)?(?:@\[?(?P<mhz>[\d,]+))?")
MEMORY = re.compile(r"\bEMC(?:_FREQ)? (?:(?P<load>\d+)%)?(?:@(?P<mhz>\d+))?")
ZONE = re.compile(r"\b(?P<zone>[A-Za-z]\w*)@(?P<celsius>-?\d+(?:\.\d+)?)C(?![\w.])")
# 'VDD_IN 4863mW/4750mW' is now and the mean, JetPack 7 adds the most, JetPack 4 leaves out the unit
RAIL = re.compile(r"\b(?P<rail>[A-Z][A-Z0-9_]*) (?P<now>\d+)(?:mW(?:/\d+mW)*|/\d+)(?=\s|$)")
NOT_CONNECTED = "NC"
ABSENT_CELSIUS = -200.0  # a sensor whose part has no power says -256


class Tegrastats(NamedTuple):
    """One line of tegrastats."""

    cpus: dict[str, dict[str, Any]]  # by name, as in cpu0
    gpu: dict[str, Any]
    memory: dict[str, Any]
    celsius: dict[str, float]  # by sensor
    watts: dict[str, float]  # by rail


def read_jetson_clocks(text: str) -> tuple[dict[str, dict[str, Any]], bool | None]:
    """The clocks in the answer of ``jetson_clocks --show``, by cpu0, gpu and emc, and whether it holds them fixed.

    None of it where the answer is that only root may ask.
    """
    found: dict[str, dict[str, Any]] = {}
    fixed: dict[str, bool] = {}
    for line in CLOCK_LINE.finditer(text):
        name = "gpu" if line["name"].lower().startswith("gpu") else line["name"].lower()
        if name in found or "Online=0" in line["rest"]:
            continue
        hertz = 1000 if name.startswith("cpu") else 1
        least, most, now = (int(line[part]) * hertz / 1e6 for part in ("least", "most", "now"))
        found[name] = {"mhz": now, "least_mhz": least, "most_mhz": most}
        # until JetPack 6 it leaves the memory's limits alone and overrides its clock
        fixed[name] = least == most or (name == "emc" and "FreqOverride=1" in line["after"])
        if governor := GOVERNOR.search(line["rest"]):
            found[name]["governor"] = governor[1]
    return found, all(fixed.values()) if "gpu" in fixed and "cpu0" in fixed else None


def read_tegrastats(line: str) -> Tegrastats:
    """One line of ``tegrastats``."""
    cores = CORES.search(line)
    cpus: dict[str, dict[str, Any]] = {}
    for number, core in enumerate(cores["cores"].split(",") if cores else ()):
        if found := CORE.fullmatch(core.strip()):  # 'off' is no load
            cpus[f"cpu{number}"] = _clock(found["load"], found["mhz"] or (cores["mhz"] if cores else None))
    gpu, memory = GPU.search(line), MEMORY.search(line)
    celsius = {zone["zone"]: float(zone["celsius"]) for zone in ZONE.finditer(line)}
    rails = {rail["rail"]: int(rail["now"]) / 1000 for rail in RAIL.finditer(line)}
    return Tegrastats(
        cpus,
        _clock(gpu["load"], gpu["mhz"]) if gpu else {},
        _clock(memory["load"], memory["mhz"]) if memory else {},
        {zone: degrees for zone, degrees in celsius.items() if degrees > ABSENT_CELSIUS},
        {rail: watts for rail, watts in rails.items() if rail != NOT_CONNECTED},
    )


def _clock(load: str | None, mhz: str | None) -> dict[str, Any]:
    """Load and clock, where they are told; of several clocks the highest, and none of a part without power."""
    fastest = max((int(one) for one in (mhz or "").split(",") if one), default=0)
    return ({} if load is None else {"load_percent": float(load)}) | ({"mhz": float(fastest)} if fastest else {})
