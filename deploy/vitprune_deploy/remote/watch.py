"""What a device was doing before and after a measurement, and whether it was slowed down meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .device import Device
from .state import changed, read_state, summary, throttled


@contextlib.contextmanager
def watched(device: Device, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A dict that holds, once the block is left: ``before``, ``after``, ``slowed``, ``changed`` and a ``summary``.

    A person is told what slowed the device down, and which settings changed.
    """
    before = read_state(device.state())
    found: dict[str, Any] = {"before": before.to_dict()}
    yield found
    after = read_state(device.state())
    found.update(
        after=after.to_dict(),
        slowed=list(throttled(before, after)),
        changed=list(changed(before, after)),
        summary=summary(before, after),
    )
    for sentence in (*found["slowed"], *found["changed"]):
        say(f"warning: while it was measured, {sentence}")
