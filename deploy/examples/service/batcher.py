"""Dynamic batching: requests that arrive while the engine is busy go through it together.

Nobody waits for others while the engine is idle: on two x86 cores, waiting a millisecond doubled the latency of a lone
client and brought eight or sixty-four of them no more throughput.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np


class Busy(Exception):
    """All places are taken."""


class _Waiting(NamedTuple):
    inputs: np.ndarray  # [B, ...]
    outputs: asyncio.Future[np.ndarray]


class Batcher:
    """Puts inputs of several callers together; all of its methods belong to one event loop.

    Args:
        run: from inputs [B, ...] to outputs [B, ...]; called in one thread, one call at a time.
        most: images in a batch; inputs of more than that go on their own.
        places: callers that may be here at once.
    """

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], *, most: int, places: int) -> None:
        self._run, self._most, self._places = run, most, places
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "engine")  # of its own: it never waits for images to be decoded
        self.taken = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place for the caller, who needs one before it takes up memory. Raises Busy if all are taken."""
        if self.taken >= self._places:
            raise Busy
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """Outputs [B, ...] for ``inputs`` [B, ...]; raises what ``run`` raised for its batch."""
        waiting = _Waiting(inputs, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.outputs

    async def work(self) -> None:
        """Serve for ever; a task that whoever made the batcher starts and cancels."""
        while True:
            await self._arrived.wait()
            await self._answer(self._next())
            if not self._queue:
                self._arrived.clear()

    def _next(self) -> list[_Waiting]:
        """The longest waiting, as many as fit into a batch."""
        batch = [self._queue.popleft()]
        images = len(batch[0].inputs)
        while self._queue and images + len(self._queue[0].inputs) <= self._most:
            batch.append(self._queue.popleft())
            images += len(batch[-1].inputs)
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Run ``batch``, and give each its part."""
        try:
            inputs = np.concatenate([waiting.inputs for waiting in batch])
            outputs = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, inputs)
        except Exception as error:  # a service goes on; whoever waits for this batch is told
            for waiting in batch:
                if not waiting.outputs.done():
                    waiting.outputs.set_exception(error)
            return
        start = 0
        for waiting in batch:
            end = start + len(waiting.inputs)
            if not waiting.outputs.done():  # whoever waited may be gone
                waiting.outputs.set_result(outputs[start:end])
            start = end
