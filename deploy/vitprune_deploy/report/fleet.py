"""One page about the same model on several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..artifact import Manifest
from .page import templates
from .words import UNKNOWN, ms, percent

HEAD = ("device", "verdict", "dense", "pruned", "budget", "times as fast", "top-1", "report")


class Board(NamedTuple):
    """A device, and what came of its build.

    Attributes:
        name: as the profile calls it.
        host: where it is; None: the machine that built.
        manifest: of its folder; None: there is none.
        why: what went wrong then.
    """

    name: str
    host: str | None
    manifest: Manifest | None
    why: str


def fleet_dict(boards: Sequence[Board]) -> dict[str, Any]:
    """What programs read: by device, its manifest without the list of files, or what went wrong."""
    return {
        board.name: {"host": board.host, "error": board.why}
        if board.manifest is None
        else {"host": board.host, **board.manifest.model_dump(mode="json", by_alias=True, exclude={"files"})}
        for board in boards
    }


def fleet_page(boards: Sequence[Board]) -> str:
    """An HTML page that needs nothing else; each device's own report is linked.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; it comes with the extra ``prune``.
    """
    reasons = {board.name: _reasons(board) for board in boards if _reasons(board)}
    rows = [(board.name, fleet_row(board)) for board in boards]
    return str(templates().get_template("fleet.html.j2").render(head=HEAD, rows=rows, reasons=reasons)) + "\n"


def fleet_row(board: Board) -> list[str]:
    """The cells behind a device's name, the last one left out."""
    found = board.manifest
    if found is None:
        return ["not built", *[UNKNOWN] * 5]
    percentile = f"p{found.budget.percentile}"
    dense, pruned = (getattr(one.latency_ms, percentile, None) for one in (found.dense, found.pruned))
    faster = UNKNOWN if not (dense and pruned) else f"{dense / pruned:.2f}"
    top1 = f"{percent(found.dense.top1)} to {percent(found.pruned.top1)}"
    return [found.verdict, ms(dense), ms(pruned), f"{percentile} {ms(found.budget.latency_ms)}", faster, top1]


def _reasons(board: Board) -> tuple[str, ...]:
    return (board.why,) if board.manifest is None else board.manifest.reasons
