"""One plan for several devices: of each part the time on the device that it is slowest on, against its budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from .landing import Measured
from .latency import Entry, LatencyTable


def slowest(tables: Sequence[LatencyTable], scales: Sequence[float]) -> LatencyTable:
    """A table by which a plan takes no less than on any device: the largest of each part's scaled times.

    It may say more than the slowest device takes, since parts need not all be slowest on the same one; what is measured
    of whole plans corrects that.

    Args:
        tables: of one model, over the same levels; circumstances are those of the first.
        scales: what the times of each are multiplied with; as a rule the first one's budget over its own.

    Raises:
        InputError: the tables cover different things.
    """
    first = tables[0]
    for other in tables[1:]:
        if other.levels != first.levels or other.reduce.keys() != first.reduce.keys():
            raise InputError("one plan for several devices needs latency tables over the same levels and methods")
    factors = [scale * table.correction[1] for table, scale in zip(tables, scales, strict=True)]
    ends = [[scale * table.correction[i] for table, scale in zip(tables, scales, strict=True)] for i in (0, 2)]

    def worst(of: Callable[[LatencyTable], Mapping[Any, Entry]]) -> dict[Any, Entry]:
        return {key: _worst([of(table)[key] for table in tables], factors) for key in of(first)}

    return replace(
        first,
        attn=worst(lambda table: table.attn),
        mlp=worst(lambda table: table.mlp),
        stem_ms=max(factor * table.stem_ms for table, factor in zip(tables, factors, strict=True)),
        head=worst(lambda table: table.head),
        attn_sized=worst(lambda table: table.attn_sized),
        reduce={name: worst(lambda table, name=name: table.reduce[name]) for name in first.reduce},  # type: ignore[misc]
        attn_prefix=worst(lambda table: table.attn_prefix),
        attn_dims=worst(lambda table: table.attn_dims),
        correction=(max(ends[0]), 1.0, max(ends[1])),
    )


def worst_of(found: Sequence[Sequence[Measured]], scales: Sequence[float]) -> list[Measured]:
    """For each plan, of its times on all devices, scaled as in ``slowest``, the largest."""
    scaled = [
        [Measured(*(scale * ms for ms in one)) for one in many] for many, scale in zip(found, scales, strict=True)
    ]
    return [max(times, key=lambda one: one.ms) for times in zip(*scaled, strict=True)]


def _worst(entries: Sequence[Entry], factors: Sequence[float]) -> Entry:
    scaled = [Entry(factor * entry.ms, entry.measured) for entry, factor in zip(entries, factors, strict=True)]
    return max(scaled, key=lambda entry: entry.ms)
