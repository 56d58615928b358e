"""The example's dynamic batching on its own: order, sizes, failures and places."""

from __future__ import annotations

import asyncio
import importlib
import threading

import numpy as np
import pytest
from serving import SERVICE


@pytest.fixture
def batching(monkeypatch):
    monkeypatch.syspath_prepend(str(SERVICE))
    return importlib.import_module("batcher")


def answers(batching, run, requests, **options):
    """What each of ``requests``, all made at once, gets from ``run``; an exception where it raised one."""

    async def all_of_them():
        batcher = batching.Batcher(run, **{"most": 4, "places": 100} | options)
        work = asyncio.create_task(batcher.work())
        found = await asyncio.gather(*(batcher.outputs(inputs) for inputs in requests), return_exceptions=True)
        work.cancel()
        return found

    return asyncio.run(all_of_them())


def numbers(*counts):
    """For each count so many rows, every row of all another number."""
    ends = np.cumsum(counts)
    return [np.arange(end - count, end, dtype=np.float32)[:, None] for end, count in zip(ends, counts, strict=True)]


def test_each_caller_gets_its_own_part_in_batches_that_are_not_too_large(batching):
    seen = []

    def double(inputs):
        seen.append(len(inputs))
        return 2 * inputs

    requests = numbers(1, 2, 1, 3, 2, 1, 4, 1)
    for given, got in zip(requests, answers(batching, double, requests), strict=True):
        np.testing.assert_array_equal(got, 2 * given)
    assert seen == [4, 3, 3, 4, 1]


def test_more_than_a_batch_goes_on_its_own(batching):
    seen = []
    answers(batching, lambda inputs: seen.append(len(inputs)) or inputs, numbers(1, 9, 1))
    assert seen == [1, 9, 1]


def test_requests_that_come_while_the_engine_is_busy_share_the_next_batch(batching):
    seen, busy, go_on = [], threading.Event(), threading.Event()

    def run(inputs):
        seen.append(len(inputs))
        busy.set()
        go_on.wait(10)
        return inputs

    async def one_then_three():
        batcher = batching.Batcher(run, most=4, places=9)
        work = asyncio.create_task(batcher.work())
        first = asyncio.create_task(batcher.outputs(np.zeros((1, 1))))
        await asyncio.to_thread(busy.wait, 10)
        others = [asyncio.create_task(batcher.outputs(np.ones((1, 1)))) for _ in range(3)]
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, *others)
        work.cancel()

    asyncio.run(one_then_three())
    assert seen == [1, 3]


def test_a_batch_that_fails_is_told_to_its_callers_and_the_next_one_runs(batching):
    def run(inputs):
        if 0 in inputs:
            raise ValueError("zero")
        return inputs

    first, second, third = answers(batching, run, numbers(2, 2, 3))
    assert [str(error) for error in (first, second)] == ["zero", "zero"]
    assert third.ravel().tolist() == [4, 5, 6]


def test_a_caller_that_gave_up_does_no_harm(batching):
    async def impatient():
        batcher = batching.Batcher(lambda inputs: inputs, most=4, places=9)
        work = asyncio.create_task(batcher.work())
        gone = asyncio.create_task(batcher.outputs(np.zeros((1, 1))))
        stays = asyncio.create_task(batcher.outputs(np.ones((1, 1))))
        await asyncio.sleep(0)
        gone.cancel()
        found = await asyncio.wait_for(stays, 10)
        work.cancel()
        return found

    assert asyncio.run(impatient()).tolist() == [[1.0]]


def test_there_are_so_many_places_and_each_is_free_again_afterwards(batching):
    batcher = batching.Batcher(lambda inputs: inputs, most=4, places=2)
    with batcher.place(), batcher.place():
        assert batcher.taken == 2
        with pytest.raises(batching.Busy), batcher.place():
            pass
    with pytest.raises(KeyError), batcher.place():
        raise KeyError
    assert batcher.taken == 0
