"""Where attention, norms, routing and the head are computed: one worker thread, off the event loop.

The event loop stays free to hear the ducks. The worker runs one piece of work at a time: attention
that unlocks an ask before a shared expert, and that before lm_head, but nothing waits for ever.

On a GPU the worker launches, and a second thread waits for what was launched, piece by piece. One
piece is launched while another one runs, so that the GPU never waits for the host; and no more than
that, since what has been launched can be overtaken by nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from duck.errors import ConfigError, DuckError

Result = TypeVar("Result")
_Loop = asyncio.AbstractEventLoop

CLOSED = "the engine is closed: its `async with` block has ended"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A piece of work of these stages stands in the queue as if it had come so many pieces later:
# nothing urgent waits for it. In pieces, not in time: the same order on a fast device and on a
# slow one, and nothing waits for ever.
OVERTAKEN = {"shared": 4, "feed": 4, "guess": 8, "head": 8}

# Pieces of work that may be launched and not done yet: one that runs, one that follows it at once.
AHEAD = 2

# The interpreter lets a thread run on for 5 ms when another wants to; the event loop would hear
# the ducks that much later whenever the worker is between two kernels.
SWITCH_S = 100e-6


class Stage(NamedTuple):
    """What a piece of work is, for its turn, for times and for traces.

    name: attend, dense (attention and MLP of a layer without experts), shared, final, combine, feed
    (pairs to the MTP layer), guess, head. layer: -1 if of none. lane: 1 of guesses that trail the
    sure rows, else 0. session: its number.
    """

    name: str
    rows: int
    layer: int = -1
    lane: int = 0
    session: int = 0


class Ran(NamedTuple, Generic[Result]):
    """What a piece of work gave, and when it ran, on the clock of whoever ran it.

    late: seconds until the event loop heard that it had ended.
    """

    result: Result
    begun: float
    ended: float
    late: float = 0.0


@dataclass(frozen=True)
class Later(Generic[Result]):
    """What a piece of work gives: how its result is made, once the device has come so far.

    finish: makes it; quick, since others' results wait for it.
    """

    finish: Callable[[], Result]


def now(result: Result) -> Later[Result]:
    """A result that needs nothing more."""
    return Later(lambda: result)


# Marks where a device is with what was launched: calling the result waits until it has come there.
Mark = Callable[[], Callable[[], None]]


class _Launched(NamedTuple):
    """A piece of work that the device has still to compute, or to come to the end of."""

    reached: Callable[[], None]
    later: Later[Any]
    begun: float
    future: asyncio.Future[Any]
    loop: _Loop


class Device:
    """A torch device and dtype, and the thread that computes on it.

    Args:
        device: auto, cpu or cuda.
        dtype: auto (float32 on the CPU, bfloat16 on CUDA), float32 or bfloat16.
        mark: None on a CPU, where work is done when its call returns; CUDA's own on CUDA.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """

    def __init__(self, device: str, dtype: str, mark: Mark | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        self.torch = torch.device(device)
        self.name = device
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        # (turn, number, stage, call, future, loop); the lowest turn goes first, and numbers differ.
        # Pushing and popping are each one step of the interpreter: the two threads need no lock.
        self._queue: list[
            tuple[int, int, Stage, Callable[[], Later[Any]], asyncio.Future[Any], _Loop]
        ] = []
        self._wishes: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each in the queue
        self._number = itertools.count()
        self._closed = False
        if device == "cuda":
            from duck import cuda

            mark = cuda.mark
        self._mark = mark
        self._launched: queue.SimpleQueue[_Launched | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(AHEAD)  # for pieces that are launched and not yet done
        self._ended = 0.0  # when the last piece was
        self.explain: Callable[[Stage, BaseException], BaseException] = lambda _stage, error: error
        self._threads = [threading.Thread(target=self._run, name="device", daemon=True)]
        if mark is not None:
            self._threads.append(
                threading.Thread(target=self._await_launched, name="device done", daemon=True)
            )
        for thread in self._threads:
            thread.start()

    async def run(self, stage: Stage, work: Callable[[], Later[Result]]) -> Ran[Result]:
        """Compute `work()` on the worker under inference mode; who goes first: see OVERTAKEN.

        Cancelling stops the wait, and the work unless it has begun; then its result is dropped.
        """
        if self._closed:
            raise DuckError(CLOSED)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ran[Result]] = loop.create_future()
        number = next(self._number)
        turn = number + OVERTAKEN.get(stage.name, 0)
        heapq.heappush(self._queue, (turn, number, stage, work, future, loop))
        self._wishes.put(None)
        return await future

    def free_bytes(self) -> int | None:
        """What a GPU has free; None of a CPU, whose memory `duck.memory` knows."""
        if self.name != "cuda":
            return None
        from duck import cuda

        return cuda.memory()[2]

    def close(self) -> None:
        """End the worker after what it computes now; who waits for the rest is told."""
        self._closed = True
        self._wishes.put(None)
        for thread in self._threads:
            thread.join()
        # Not cancelled: who waits would take it for its own task's end, and end without a word.
        for *_, future, loop in self._queue:
            self._tell(future, loop, Ran(None, 0.0, 0.0), DuckError(CLOSED))
        self._queue.clear()

    def _run(self) -> None:
        while True:
            self._wishes.get()
            # Only now choose what is most urgent: it cannot be overtaken once it is launched.
            self._room.acquire()
            if self._closed:
                self._launched.put(None)
                return
            _, _, stage, call, future, loop = heapq.heappop(self._queue)
            if future.cancelled() or not self._compute(stage, call, future, loop):
                self._room.release()
            del call, future  # and with them what they hold, however long the next takes to come

    def _compute(
        self, stage: Stage, call: Callable[[], Later[Any]], future: asyncio.Future[Any], loop: _Loop
    ) -> bool:
        """Compute a piece of work; or launch it, and return True."""
        begun = time.perf_counter()
        try:
            with torch.inference_mode():
                later = call()
                if self._mark is not None:
                    self._launched.put(_Launched(self._mark(), later, begun, future, loop))
                    return True
                result = later.finish()
        except BaseException as raised:  # the top of a thread: whoever waits must hear of it
            self._tell(future, loop, Ran(None, begun, begun), self.explain(stage, raised))
        else:
            self._tell(future, loop, Ran(result, begun, time.perf_counter()), None)
        return False

    def _await_launched(self) -> None:
        while (launched := self._launched.get()) is not None:
            reached, later, begun, future, loop = launched
            result, error = None, None
            try:
                try:
                    reached()
                finally:
                    self._room.release()
                # It could not begin before the one before it had ended.
                begun, self._ended = max(begun, self._ended), time.perf_counter()
                if not future.cancelled():
                    result = later.finish()
            except BaseException as raised:  # as in _compute
                error = raised
            self._tell(future, loop, Ran(result, begun, self._ended), error)
            del launched, reached, later, result, future

    def _tell(
        self,
        future: asyncio.Future[Any],
        loop: _Loop,
        ran: Ran[Any],
        error: BaseException | None,
    ) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._done, future, ran, error)

    @staticmethod
    def _done(future: asyncio.Future[Any], ran: Ran[Any], error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            late = time.perf_counter() - ran.ended
            future.set_result(Ran(ran.result, ran.begun, ran.ended, late))
        else:
            future.set_exception(error)
            # Who waits may be cancelled before it looks: then nobody needs to hear of it.
            future.exception()


def limit_threads() -> None:
    """Bound torch's own threads.

    One row at a time is memory-bound: beyond a few cores more threads add nothing, and their
    spinning takes cores from ducks on the same machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(8, (os.cpu_count() or 1) // 2)))


@contextlib.contextmanager
def switching_fast() -> Iterator[None]:
    """Let threads take turns every SWITCH_S, as long as this is held."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
