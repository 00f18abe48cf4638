"""Collects items that arrive within milliseconds into batches, and answers each batch in one thread."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional


logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many items wait as may wait."""


class WaitedTooLongError(Exception):
    """An item has waited longer than the timeout."""


@dataclass(eq=False)
class _Waiting:
    """
    One item.

    Args:
        key: items with the same key may share a batch.
        weight: its bytes in memory.
        arrived: the time, in seconds.
        answer: gets the result or the error.
    """

    key: Hashable
    item: Any
    weight: int
    arrived: float
    answer: "asyncio.Future[Any]"


class Batcher:
    """
    A bounded queue in front of a function that answers a batch at a time.

    A batch is answered as soon as it is full, or its oldest item has waited for `max_wait` seconds. While one is
    answered, the next one fills. If a batch raises an error, each of its items is answered alone, so that the error
    reaches only those that cause it. It may be entered again after it was left, also in another loop.

    Args:
        run: a key and its items -> one result per item; runs in a thread of its own.
        max_items: the most items of a batch.
        max_wait: seconds.
        max_waiting: the most items that wait.
        timeout: the most seconds that an item waits.
        max_weight: the most bytes of a batch, unless one item has more.
        max_waiting_weight: the most bytes of all items that wait.
        observe: called with the number of items and the seconds of each batch.
        prepare: called once in the thread, before the first batch.

    Example:

    ```python
    >>> batcher = Batcher(lambda key, items: [item * 2 for item in items])

    >>> async def double(items):
    ...     async with batcher:
    ...         return await batcher.submit("numbers", items)

    >>> asyncio.run(double([1, 2, 3]))
    [2, 4, 6]
    ```
    """

    def __init__(
        self,
        run: Callable[[Any, list[Any]], Sequence[Any]],
        max_items: int = 32,
        max_wait: float = 0.003,
        max_waiting: int = 512,
        timeout: float = 30.0,
        max_weight: float = float("inf"),
        max_waiting_weight: float = float("inf"),
        observe: Callable[[int, float], None] = lambda items, seconds: None,
        prepare: Callable[[], Any] = lambda: None,
    ) -> None:
        self.run, self.observe, self.prepare = run, observe, prepare
        self.max_items, self.max_wait, self.timeout = max_items, max_wait, timeout
        self.max_waiting, self.max_weight, self.max_waiting_weight = max_waiting, max_weight, max_waiting_weight
        self._waiting: deque[_Waiting] = deque()
        self._weight = 0
        self._work: Optional[asyncio.Task[None]] = None
        self._arrival: Optional[asyncio.Event] = None  # belongs to a running loop
        self._is_closing = False

    @property
    def num_waiting(self) -> int:
        """The items that wait."""
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether no item may wait any more."""
        return len(self._waiting) >= self.max_waiting or self._weight >= self.max_waiting_weight

    @property
    def is_running(self) -> bool:
        """Whether items are answered."""
        return self._work is not None and not self._work.done()

    async def __aenter__(self) -> "Batcher":
        self._is_closing, self._arrival = False, asyncio.Event()
        self._work = asyncio.create_task(self._answer_batches(self._arrival))
        return self

    async def __aexit__(self, *error: Any) -> None:
        """Answers what waits, and stops."""
        self._is_closing = True
        if self._arrival is not None and self._work is not None:
            self._arrival.set()
            await asyncio.wait([self._work])  # its error, if it had one, is logged

    async def submit(self, key: Hashable, items: Sequence[Any], weights: Optional[Sequence[int]] = None) -> list[Any]:
        """
        The results of items, in their order. If this is cancelled, items that still wait are never answered.

        Args:
            key: only items with the same key share a batch.
            weights: bytes of each item.

        Raises:
            QueueFullError: if not all of them may wait.
            WaitedTooLongError: if one has waited longer than the timeout.
            RuntimeError: if nobody answers.
            Exception: the error of `run` for the first item that has one.
        """
        sizes = list(weights) if weights is not None else [0] * len(items)
        too_many = len(self._waiting) + len(items) > self.max_waiting
        # Without others in the queue, a request that is too heavy for it must not be refused forever.
        too_heavy = self._weight > 0 and self._weight + sum(sizes) > self.max_waiting_weight
        if self._arrival is None:
            raise RuntimeError("Nobody answers the queue: use `async with`, or run the lifespan of the application.")
        if self._is_closing or too_many or too_heavy:
            raise QueueFullError
        if not self.is_running:
            raise RuntimeError("The thread of the model has ended; start the server again.")
        loop, now = asyncio.get_running_loop(), time.monotonic()
        new = [_Waiting(key, item, size, now, loop.create_future()) for item, size in zip(items, sizes, strict=True)]
        self._waiting.extend(new)
        self._weight += sum(sizes)
        self._arrival.set()
        try:
            if len(new) == 1:
                return [await new[0].answer]
            results = await asyncio.gather(*(one.answer for one in new), return_exceptions=True)
        finally:
            for one in new:
                one.answer.cancel()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return list(results)

    async def _answer_batches(self, arrival: asyncio.Event) -> None:
        thread = ThreadPoolExecutor(1, "model", self.prepare)
        try:
            while self._waiting or not self._is_closing:
                if not self._waiting:
                    arrival.clear()
                    await arrival.wait()
                    continue
                await self._wait_for_more(arrival)
                if batch := self._next_batch():
                    await self._answer(batch, thread)
        except Exception as error:
            logger.exception("No further rows are answered.")
            _fail(self._waiting, error)
            self._waiting.clear()
            self._weight = 0
        finally:
            thread.shutdown()

    async def _answer(self, batch: list[_Waiting], thread: ThreadPoolExecutor) -> None:
        begun = time.monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                thread, self._results, batch[0].key, [one.item for one in batch]
            )
            for one, result in zip(batch, results, strict=True):
                if isinstance(result, BaseException):
                    _fail([one], result)
                elif not one.answer.done():
                    one.answer.set_result(result)
            self.observe(len(batch), time.monotonic() - begun)
        except Exception as error:
            _fail(batch, error)
            if isinstance(error, BrokenExecutor):  # the thread could not be prepared, and there is no other
                raise
            logger.exception("A batch of %d rows failed.", len(batch))

    async def _wait_for_more(self, arrival: asyncio.Event) -> None:
        is_over = False

        def end() -> None:
            nonlocal is_over
            is_over = True
            arrival.set()

        left = self._waiting[0].arrived + self.max_wait - time.monotonic()
        if left <= 0:
            return
        timer = asyncio.get_running_loop().call_later(left, end)  # `wait_for` would make a task for each arrival
        while len(self._waiting) < self.max_items and not self._is_closing and not is_over:
            arrival.clear()
            await arrival.wait()
        timer.cancel()

    def _next_batch(self) -> list[_Waiting]:
        """The oldest item, and as many others with its key as fit, taken out of the queue."""
        oldest = time.monotonic() - self.timeout
        batch: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        weight = 0
        for one in self._waiting:
            if one.answer.done():
                self._weight -= one.weight
            elif one.arrived < oldest:
                self._weight -= one.weight
                one.answer.set_exception(WaitedTooLongError())
            elif len(batch) < self.max_items and (
                not batch or (one.key == batch[0].key and weight + one.weight <= self.max_weight)
            ):
                batch.append(one)
                weight += one.weight
            else:
                rest.append(one)
        self._waiting = rest
        self._weight -= weight
        return batch

    def _results(self, key: Hashable, items: list[Any]) -> list[Any]:
        """In the thread: a result or an error for each item."""
        end = time.monotonic() + self.timeout
        try:
            return self._checked(key, items)
        except Exception as error:
            if len(items) == 1:
                return [error]
        return [self._result(key, item, end) for item in items]

    def _result(self, key: Hashable, item: Any, end: float) -> Any:
        """The result or the error of one item of a batch that failed."""
        if time.monotonic() > end:
            return WaitedTooLongError()
        try:
            return self._checked(key, [item])[0]
        except Exception as error:
            return error

    def _checked(self, key: Hashable, items: list[Any]) -> list[Any]:
        results = list(self.run(key, items))
        if len(results) != len(items):
            raise RuntimeError(f"{len(items)} rows got {len(results)} answers.")
        return results


def _fail(items: Iterable[_Waiting], error: BaseException) -> None:
    for one in items:
        if not one.answer.done():
            one.answer.set_exception(error)
