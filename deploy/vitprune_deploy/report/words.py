"""Numbers as the page writes them, with their units."""

from __future__ import annotations

import json
import math
from typing import Any

UNKNOWN = "–"


def ms(value: float | None) -> str:
    """Milliseconds, to three digits."""
    return UNKNOWN if value is None else f"{digits(value)} ms"


def digits(value: float) -> str:
    """A number to three digits, trailing zeros kept; all digits in front of the point where there are more."""
    size = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - size)}f}"


def percent(value: float | None) -> str:
    """Percent, to two decimals."""
    return UNKNOWN if value is None else f"{value:.2f}%"


def fallen(drop: float) -> str:
    """A drop as the change that it is, signed, to two decimals."""
    return f"{round(-drop, 2) + 0.0:+.2f}"  # + 0.0, or nothing would be -0.00


def count(number: float) -> str:
    """A large number in millions or billions."""
    return f"{digits(number / 1e9)} billion" if number >= 1e9 else f"{digits(number / 1e6)} million"


def megabytes(size_bytes: float) -> str:
    """A size in MB of 10^6 bytes."""
    return f"{digits(size_bytes / 1e6)} MB"


def plain(value: Any) -> str:
    """An entry of a fingerprint as a reader wants it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value) or "none"
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
