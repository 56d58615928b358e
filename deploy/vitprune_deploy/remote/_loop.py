"""The event loop of asyncssh, in a thread of its own: everybody else may go without ``async``."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_starting = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, or raises, once the loop's thread has done it; not to be called in that thread."""
    future = asyncio.run_coroutine_threadsafe(work, _loop())
    try:
        return future.result()
    except BaseException:  # Ctrl-C reaches this thread, the work is in the other
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    with _starting:
        process = os.getpid()  # a forked child inherits the loop, and not its thread
        if process not in _loops:
            _loops[process] = asyncio.new_event_loop()
            threading.Thread(target=_loops[process].run_forever, name="vitprune-ssh", daemon=True).start()
        return _loops[process]
