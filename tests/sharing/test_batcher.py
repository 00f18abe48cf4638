"""The queue in front of the model: which items share a batch, who gets which result, and what is refused."""

import asyncio
import threading
import time

import pytest
from served import until

from mm_transformers.sharing.serving.batcher import Batcher, QueueFullError, WaitedTooLongError


class Recorder:
    """Answers numbers with their squares, and remembers the batches. It waits at `gate` until that is set."""

    def __init__(self, is_open: bool = True):
        self.batches: list[tuple] = []
        self.gate = threading.Event()
        if is_open:
            self.gate.set()

    def __call__(self, key, items):
        self.batches.append((key, list(items)))
        assert self.gate.wait(10)
        if any(item < 0 for item in items):
            raise ValueError(f"negative: {min(items)}")
        return [item * item for item in items]


def run(coroutine):
    return asyncio.run(coroutine)


def test_items_that_arrive_together_share_a_batch_and_get_their_own_results():
    recorder = Recorder()

    async def clients():
        async with Batcher(recorder, max_items=64, max_wait=0.2) as batcher:
            return await asyncio.gather(*(batcher.submit("a", [i, i + 100]) for i in range(20)))

    assert run(clients()) == [[i * i, (i + 100) ** 2] for i in range(20)]
    assert len(recorder.batches) == 1


def test_a_full_batch_does_not_wait():
    recorder = Recorder()

    async def clients():
        async with Batcher(recorder, max_items=4, max_wait=3600) as batcher:
            return await asyncio.wait_for(batcher.submit("a", range(8)), 10)

    assert run(clients()) == [i * i for i in range(8)]
    assert [len(items) for _, items in recorder.batches] == [4, 4]


def test_items_with_different_keys_are_not_mixed():
    recorder = Recorder()

    async def clients():
        async with Batcher(recorder, max_wait=0.1) as batcher:
            return await asyncio.gather(*(batcher.submit(i % 2, [i]) for i in range(10)))

    assert run(clients()) == [[i * i] for i in range(10)]
    assert sorted(recorder.batches) == [(0, [0, 2, 4, 6, 8]), (1, [1, 3, 5, 7, 9])]


def test_an_error_reaches_only_the_item_that_causes_it():
    async def clients():
        async with Batcher(Recorder(), max_wait=0.1) as batcher:
            asked = (batcher.submit("a", [i]) for i in (1, -5, 3))
            return await asyncio.gather(*asked, return_exceptions=True)

    first, wrong, last = run(clients())
    assert (first, last) == ([1], [9])
    assert str(wrong) == "negative: -5"


def test_beyond_the_limit_items_are_refused_until_there_is_room():
    recorder = Recorder(is_open=False)

    async def clients():
        async with Batcher(recorder, max_items=1, max_wait=0, max_waiting=2) as batcher:
            running = asyncio.create_task(batcher.submit("a", [1]))
            await until(lambda: recorder.batches)
            waiting = asyncio.create_task(batcher.submit("a", [2, 3]))
            await until(lambda: batcher.num_waiting == 2)
            assert batcher.is_full
            with pytest.raises(QueueFullError):
                await batcher.submit("a", [4])
            recorder.gate.set()
            assert await running + await waiting == [1, 4, 9]
            assert await batcher.submit("a", [4]) == [16]

    run(clients())


def test_the_bytes_that_wait_and_those_of_a_batch_are_bounded():
    recorder = Recorder(is_open=False)

    async def clients():
        async with Batcher(recorder, max_wait=0, max_weight=10, max_waiting_weight=30) as batcher:
            running = asyncio.create_task(batcher.submit("a", [0], [1]))
            await until(lambda: recorder.batches)
            waiting = asyncio.create_task(batcher.submit("a", [1, 2, 3, 4], [6, 4, 6, 9]))
            await until(lambda: batcher.num_waiting == 4)
            with pytest.raises(QueueFullError):
                await batcher.submit("a", [5], [6])
            recorder.gate.set()
            await asyncio.gather(running, waiting)
            # Alone, one that is heavier than all limits is answered.
            assert await batcher.submit("a", [6], [99]) == [36]

    run(clients())
    assert [items for _, items in recorder.batches] == [[0], [1, 2], [3], [4], [6]]


def test_what_waits_too_long_is_told_so_and_not_answered():
    recorder = Recorder(is_open=False)

    async def clients():
        async with Batcher(recorder, max_items=1, max_wait=0, timeout=0.05) as batcher:
            running = asyncio.create_task(batcher.submit("a", [1]))
            await until(lambda: recorder.batches)
            late = asyncio.create_task(batcher.submit("a", [2]))
            await asyncio.sleep(0.1)
            recorder.gate.set()
            assert await running == [1]
            with pytest.raises(WaitedTooLongError):
                await late

    run(clients())
    assert recorder.batches == [("a", [1])]


def test_rows_of_a_client_that_left_are_not_answered():
    recorder = Recorder(is_open=False)

    async def clients():
        async with Batcher(recorder, max_items=1, max_wait=0) as batcher:
            running = asyncio.create_task(batcher.submit("a", [1]))
            await until(lambda: recorder.batches)
            left = asyncio.create_task(batcher.submit("a", [2, 3]))
            await until(lambda: batcher.num_waiting == 2)
            left.cancel()
            stays = asyncio.create_task(batcher.submit("a", [4]))
            await asyncio.sleep(0)
            recorder.gate.set()
            assert await running + await stays == [1, 16]

    run(clients())
    assert [items for _, items in recorder.batches] == [[1], [4]]


def test_a_stop_answers_what_waits():
    recorder = Recorder(is_open=False)

    async def clients():
        async with Batcher(recorder, max_items=1, max_wait=0) as batcher:
            asked = [asyncio.create_task(batcher.submit("a", [i])) for i in range(3)]
            await until(lambda: recorder.batches)
            recorder.gate.set()
        with pytest.raises(QueueFullError):
            await batcher.submit("a", [1])
        return await asyncio.gather(*asked)

    assert run(clients()) == [[0], [1], [4]]


def test_an_observer_that_fails_ends_nothing(caplog):
    def observe(items, seconds):
        raise OSError("the disk is full")

    async def clients():
        async with Batcher(Recorder(), observe=observe) as batcher:
            for number in (2, 3):
                assert await asyncio.wait_for(batcher.submit("a", [number]), 10) == [number * number]
            assert batcher.is_running

    run(clients())
    assert "the disk is full" in caplog.text


def test_without_its_thread_it_says_so_at_once():
    def prepare():
        raise OSError("no such device")

    async def clients():
        async with Batcher(Recorder(), max_items=1, prepare=prepare) as batcher:
            asked = (batcher.submit("a", [number]) for number in (1, 2))
            for failed in await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10):
                assert isinstance(failed, RuntimeError)
            assert not batcher.is_running
            with pytest.raises(RuntimeError, match="The thread of the model has ended"):
                await asyncio.wait_for(batcher.submit("a", [3]), 10)

    run(clients())


def test_it_can_be_entered_again_in_another_loop():
    batcher = Batcher(Recorder())

    async def client():
        async with batcher:
            return await batcher.submit("a", [2])

    assert [run(client()) for _ in range(2)] == [[4], [4]]


def test_the_items_of_a_failed_batch_share_the_timeout():
    def slow(key, items):
        time.sleep(0.3)
        if len(items) > 1:
            raise ValueError("too many")
        return items

    async def clients():
        async with Batcher(slow, max_items=4, timeout=0.5) as batcher:
            asked = (batcher.submit("a", [number]) for number in range(4))
            return await asyncio.gather(*asked, return_exceptions=True)

    first, *others = run(clients())
    assert first == [0]
    assert [type(other) for other in others] == [WaitedTooLongError] * 3
