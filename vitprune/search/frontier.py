"""Plans along a frontier as plain rows: written to ``frontier.json``, and picked from without measuring again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetUnreachable, InputError
from .counts import Counts


@dataclass(frozen=True)
class Point:
    """The best plan found for a budget.

    Attributes:
        budget_ms: the budget it was found for; on a whole frontier, the smallest one that it is the answer to.
        predicted_ms: what the latency table says of it, never above the budget.
        loss: sum of the measured losses of its single changes, in nats per image, re-weighted where the search did.
        counts: what stays of each block.
        token_method: what reduces its tokens; None where the search had no token method.
    """

    budget_ms: float
    predicted_ms: float
    loss: float
    counts: Counts
    token_method: str | None

    def __post_init__(self) -> None:
        if not (self.budget_ms > 0 and self.predicted_ms > 0 and math.isfinite(self.loss)):
            figures = f"budget_ms {self.budget_ms}, predicted_ms {self.predicted_ms}, loss {self.loss}"
            raise InputError(f"a point of a frontier needs positive times and a finite loss, got {figures}")


def to_rows(points: Iterable[Point]) -> list[dict[str, Any]]:
    """Plain dicts, lists, numbers and strings, for JSON."""
    return [vars(point) | {"counts": point.counts.to_dict()} for point in points]


def from_rows(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The points that ``to_rows`` wrote.

    Raises:
        InputError: a key is missing or unknown, or a value is of another kind.
    """
    found = []
    for number, row in enumerate(rows):
        try:
            figures = {name: float(row[name]) for name in ("budget_ms", "predicted_ms", "loss")}
            method = row["token_method"]
            if len(row) != 5 or not (method is None or isinstance(method, str)):
                raise InputError(f"row {number} of the frontier has the keys {sorted(row)} and token method {method!r}")
            found.append(Point(**figures, counts=Counts.from_dict(row["counts"]), token_method=method))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"row {number} is no point of a frontier: {type(error).__name__} {error}") from error
    return found


def pick(points: Sequence[Point], budget_ms: float) -> Point:
    """The point of least loss that is predicted to be within ``budget_ms``; of equals, the faster one.

    Raises:
        InputError: there are no points.
        BudgetUnreachable: none is that fast.
    """
    if not points:
        raise InputError("this frontier has no points; search again")
    within = [point for point in points if point.predicted_ms <= budget_ms]
    if not within:
        fastest_ms = min(point.predicted_ms for point in points)
        raise BudgetUnreachable(
            f"no point of this frontier is within {budget_ms:.4g} ms, the fastest takes {fastest_ms:.4g} ms", fastest_ms
        )
    return min(within, key=lambda point: (point.loss, point.predicted_ms))
