"""What a verb gives back, and tables that read well without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The result of a verb.

    Attributes:
        text: for a person.
        data: the same for a program, as plain data without NaN or infinity.
        code: exit code of the command: 0 or 1, or that of an error which is part of the answer.
    """

    text: str
    data: Any
    code: int = 0


def table(rows: Sequence[Sequence[object]], *, head: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """``rows`` in columns two spaces apart; the columns in ``right`` end flush."""
    cells = [[str(cell) for cell in row] for row in ([head] if head else []) + list(rows)]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def milliseconds(value: float | None) -> str:
    """A latency in four digits; '-' where it is not known."""
    return "-" if value is None else f"{value:.4g}"
