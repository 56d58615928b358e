"""The numbers in what a runner collects from /sys and from nvidia-smi; what is none is left out.

Clocks are dicts with the fields of ``state.Clock``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

GPU = re.compile(r"gpu|g[a-z]\d+b$")  # 17000000.gpu, 17000000.ga10b, gpu-gpc-0
VIDEO = "nvd"  # Thor's gpu-nvd-0 clocks the video engines
# nvidia-smi's reasons for a lower clock, and their bits in clocks_event_reasons.active
REASONS = {
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
}
FAMILIES = ("clocks_event_reasons", "clocks_throttle_reasons")  # the older drivers' name comes last
HELD = {"Active": True, "Not Active": False}


def text(raw: Mapping[str, Any], key: str) -> str:
    """The text of that name; empty where there is none."""
    return raw[key] if isinstance(raw.get(key), str) else ""


def mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping of that name; empty where there is none."""
    return raw[key] if isinstance(raw.get(key), Mapping) else {}


def number(value: Any) -> float | None:
    """A number, or the one that a text such as '2470 MHz' begins with."""
    found = re.match(r"\s*(-?\d+(?:\.\d+)?)", value) if isinstance(value, str) else None
    if found:
        return float(found[1])
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def numbers(values: Mapping[str, Any], unit: float = 1.0) -> dict[str, float]:
    """Those that are numbers, divided by ``unit``."""
    return {name: found / unit for name, value in values.items() if (found := number(value)) is not None}


def counts(values: Mapping[str, Any]) -> dict[str, int]:
    """Those that are numbers, as whole ones."""
    return {name: int(value) for name, value in numbers(values).items()}


def core_clocks(cpufreq: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The clock of each core; /sys counts kHz."""
    found = {}
    for name in cpufreq:
        facts = mapping(cpufreq, name)
        parts = {"mhz": facts.get("cur"), "least_mhz": facts.get("min"), "most_mhz": facts.get("limit")}
        found[name] = numbers(parts, unit=1e3) | _governor(facts)
    return found


def gpu_clock(devfreq: Mapping[str, Any]) -> dict[str, Any]:
    """The clock of the first device that looks like a GPU; /sys counts Hz here."""
    for name in devfreq:
        if GPU.search(name) and VIDEO not in name:
            facts = mapping(devfreq, name)
            parts = {"mhz": facts.get("cur"), "least_mhz": facts.get("min"), "most_mhz": facts.get("max")}
            return numbers(parts, unit=1e6) | _governor(facts)
    return {}


def card_clocks(card: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The clocks of a graphics card and of its memory; the driver names no least."""
    gpu = {"mhz": "clocks.gr", "most_mhz": "clocks.max.gr", "load_percent": "utilization.gpu"}
    memory = {"mhz": "clocks.mem", "most_mhz": "clocks.max.mem"}
    first, second = (numbers({part: card.get(name) for part, name in names.items()}) for names in (gpu, memory))
    return first, second


def card_reasons(card: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Reasons for a lower clock that hold; None where the driver does not tell."""
    told: list[tuple[str, bool]] = []
    for family in FAMILIES:
        bits = _bits(card.get(f"{family}.active"))
        told += [(name, bool(bits & bit)) for name, bit in REASONS.items() if bits is not None]
        one_by_one = [(name, HELD.get(str(card.get(f"{family}.{name}")))) for name in REASONS]
        told += [(name, held) for name, held in one_by_one if held is not None]
    return tuple(dict.fromkeys(name for name, held in told if held)) if told else None


def card_reasons_us(card: Mapping[str, Any]) -> dict[str, int]:
    """Microseconds that each reason has held in all; newer drivers count them."""
    return counts({name: card.get(f"clocks_event_reasons_counters.{name}") for name in REASONS})


def passive_celsius(trips: Mapping[str, Any]) -> dict[str, float]:
    """The highest passive trip point of each zone; x86 says -274 or 0 degrees where it is not set."""
    found = {}
    for zone, points in trips.items():
        pairs = [one for one in _sequence(points) if len(_sequence(one)) == 2]
        most = max((number(milli) or 0.0 for milli, kind in pairs if kind == "passive"), default=0.0)
        if most > 0:
            found[zone] = most / 1000
    return found


def cooling_states(devices: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """State and highest state of each cooling device."""
    found = {}
    for name, states in devices.items():
        pair = [number(one) for one in _sequence(states)]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            found[name] = (int(pair[0]), int(pair[1]))
    return found


def throttle_counts(cpus: Mapping[str, Any]) -> dict[str, int]:
    """Counts by processor and kind, as in cpu0/package."""
    return {f"{cpu}/{kind}": count for cpu in cpus for kind, count in counts(mapping(cpus, cpu)).items()}


def pressure_percent(value: Any) -> float | None:
    """Share of the last ten seconds in which something waited for a processor."""
    found = re.search(r"some avg10=(\S+)", value) if isinstance(value, str) else None
    return number(found[1] if found else value)


def _sequence(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, (list, tuple)) else ()


def _governor(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"governor": facts["governor"]} if isinstance(facts.get("governor"), str) else {}


def _bits(value: Any) -> int | None:
    """Of a text such as '0x0000000000000004'."""
    try:
        return int(str(value), 16)
    except ValueError:
        return None
