"""What tells one device from another, so that a latency measured on one is not taken for that of another.

``compare`` sorts the differences between two fingerprints:

refuse: processor model, architecture, cores that may be used, instruction sets that matrix products use, names and
    compute capabilities of the GPUs, a Jetson's power mode, runtime, execution provider, threads. Each of these changes
    the figures.
warn: version of the runtime or of the GPU driver, operating system, memory (by more than a tenth). These may change
    them; a cache of our own measures again for a new version of the runtime (``identity``).

Load, clock frequency and governor are the state of a machine at a moment (``machine_state``): reported, never compared.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..processor import instruction_sets

REFUSED = ("cpu", "architecture", "cores", "flags", "gpus", "power_mode", "runtime", "provider", "threads")
GPU_FIELDS = {
    "name": "name",
    "compute_capability": "compute_cap",
    "memory_mb": "memory.total",
    "driver": "driver_version",
}
GPU_STATE = {"graphics_mhz": "clocks.gr", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu",
             "watts": "power.draw", "power_limit_watts": "power.limit"}  # fmt: skip

# 'NV Power Mode: MODE_15W_DESKTOP', and its number on the next line; lines about fans and errors may stand around them
POWER_MODE = re.compile(r"NV Power Mode:[ \t]*(?P<name>\S.*?)[ \t]*(?:\n[ \t]*(?P<number>\d+)[ \t]*)?(?:\n|$)")


def device_fingerprint(runtime: str, provider: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """This device, as plain data.

    Args:
        runtime: name and version, as ``Backend.runtime`` says it: ``onnxruntime 1.31.1``.
        provider: what runs the graph inside the runtime.
        threads: of the processor; None: the runtime decides.
    """
    name, _, version = runtime.partition(" ")
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": _cores(),
        "flags": instruction_sets(),
        "memory_mb": _memory_mb(),
        "os": f"{platform.system()} {platform.release()}",
        "gpus": _nvidia_smi(GPU_FIELDS),
        "power_mode": read_power_mode(_said("nvpmodel", "-q"))[0],
        "runtime": name,
        "runtime_version": version,
        "provider": provider,
        "threads": threads,
    }


def identity(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a fingerprint that a cache of measurements goes by."""
    return {**_refusing(fingerprint), "runtime_version": fingerprint.get("runtime_version")}


def compare(measured: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Differences that make figures of ``measured`` useless ``here``, and those that only may; a sentence each."""
    refusals = _differences(_refusing(measured), _refusing(here), REFUSED)
    warnings = _differences(measured, here, ("runtime_version", "os"))
    before, now = measured.get("memory_mb") or 0, here.get("memory_mb") or 0
    if abs(before - now) > 0.1 * max(before, now):
        warnings += _differences(measured, here, ("memory_mb",))
    return refusals, warnings + _differences(_drivers(measured), _drivers(here), ("GPU drivers",))


def machine_state() -> dict[str, Any]:
    """What the machine is doing now; what cannot be known is left out."""
    state: dict[str, Any] = {}
    load = Path("/proc/loadavg")
    if load.is_file():
        fields = load.read_text().split()
        state.update(load_1min=float(fields[0]), running=int(fields[3].split("/")[0]))
    for name, file in (("governor", "scaling_governor"), ("frequency_khz", "scaling_cur_freq")):
        found = _text(Path("/sys/devices/system/cpu/cpu0/cpufreq") / file)
        if found:
            state[name] = found
    pressure = _text(Path("/proc/pressure/cpu"))
    if pressure.startswith("some avg10="):
        state["cpu_pressure_percent"] = float(pressure.split()[1].partition("=")[2])
    gpus = _nvidia_smi(GPU_STATE)
    return {**state, **({"gpus": gpus} if gpus else {})}


def read_power_mode(text: str) -> tuple[str | None, int | None]:
    """Name and number of the power mode in the answer of a Jetson's ``nvpmodel -q``."""
    found = POWER_MODE.search(text)
    if found is None:
        return None, None
    number = found["number"]
    return found["name"], None if number is None else int(number)


def _refusing(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that two devices must share; of a GPU, what its driver does not decide."""
    kept = {key: fingerprint.get(key) for key in REFUSED}
    kept["gpus"] = [{k: gpu.get(k) for k in ("name", "compute_capability")} for gpu in fingerprint.get("gpus", [])]
    return kept


def _drivers(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {"GPU drivers": [gpu.get("driver") for gpu in fingerprint.get("gpus", [])]}


def _differences(measured: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """A sentence for each of ``keys`` that differs."""
    return [
        f"the device's {key} was {measured.get(key)} where this was measured, and is {here.get(key)} here"
        for key in keys
        if measured.get(key) != here.get(key)
    ]


def _cpu_model() -> str:
    """The processor as the system calls it."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Hardware", "Model"):
            return value.strip()
    board = _text(Path("/proc/device-tree/model")).strip("\0")  # a Jetson has its name here
    return board or platform.processor() or platform.machine()


def _cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_mb() -> int | None:
    """Memory of the machine in 10^6 bytes, or None."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 10**6
    except (ValueError, OSError, AttributeError):
        return None


def _nvidia_smi(fields: Mapping[str, str]) -> list[dict[str, str]]:
    """The ``fields`` of each NVIDIA GPU; empty where there is none, or no nvidia-smi."""
    answer = _said("nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    rows = [[value.strip() for value in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]


def _said(tool: str, *arguments: str) -> str:
    """What a tool prints; nothing where it is not there or fails."""
    command = shutil.which(tool)
    if command is None:
        return ""
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(path: Path) -> str:
    """The file's text; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
