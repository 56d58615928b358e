"""What this machine's processor can do, by the standard library alone."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
         "asimd", "asimddp", "asimdhp", "sve", "bf16", "i8mm")  # fmt: skip
BF16_UNITS = {"amx_bf16", "avx512_bf16"}  # of x86 processors
CPUINFO = Path("/proc/cpuinfo")


def instruction_sets() -> list[str]:
    """Those of note for matrix products; empty where the system does not list them."""
    try:
        lines = CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return sorted(set(FLAGS) & set(value.split()))
    return []


def favours_openvino() -> bool:
    """Whether this machine ``suits_openvino``."""
    return suits_openvino(instruction_sets(), find_spec("openvino") is not None)


def suits_openvino(flags: Collection[str], installed: bool) -> bool:
    """Whether OpenVINO is installed and has units for bf16, which makes it the quickest runtime in floats."""
    return installed and bool(BF16_UNITS & set(flags))
