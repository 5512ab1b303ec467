"""Where attention, norms, routing and the head are computed: one worker thread, off the event loop.

The event loop stays free to hear the ducks. The worker runs one piece of work at a time: attention
that unlocks an ask before a shared expert, and that before lm_head, but nothing waits for ever.
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
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from duck.errors import ConfigError, DuckError

Result = TypeVar("Result")
_Loop = asyncio.AbstractEventLoop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A piece of work of these stages stands in the queue as if it had come so many pieces later:
# nothing urgent waits for it. In pieces, not in time: the same order on a fast device and on a
# slow one, and nothing waits for ever.
OVERTAKEN = {"shared": 4, "feed": 4, "guess": 8, "head": 8}

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


class Device:
    """A torch device and dtype, and the thread that computes on it.

    Args:
        device: auto, cpu or cuda.
        dtype: auto (float32 on the CPU, bfloat16 on CUDA), float32 or bfloat16.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """

    def __init__(self, device: str, dtype: str) -> None:
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
        # (turn, number, call, future, loop); the lowest turn goes first, and numbers differ.
        # Pushing and popping are each one step of the interpreter: the two threads need no lock.
        self._queue: list[tuple[int, int, Callable[[], Any], asyncio.Future[Any], _Loop]] = []
        self._wishes: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each in the queue
        self._number = itertools.count()
        self._closed = False
        self._worker = threading.Thread(target=self._run, name="device", daemon=True)
        self._worker.start()

    async def run(self, stage: Stage, work: Callable[[], Result]) -> Ran[Result]:
        """Compute `work()` on the worker under inference mode; who goes first: see OVERTAKEN.

        Cancelling stops the wait, and the work unless it has begun; then its result is dropped.
        """
        if self._closed:
            raise DuckError("the engine is closed: its `async with` block has ended")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ran[Result]] = loop.create_future()
        number = next(self._number)
        turn = number + OVERTAKEN.get(stage.name, 0)
        heapq.heappush(self._queue, (turn, number, work, future, loop))
        self._wishes.put(None)
        return await future

    def free_bytes(self) -> int | None:
        """What a GPU has free; None of a CPU, whose memory `duck.memory` knows."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.name == "cuda" else None

    def close(self) -> None:
        """End the worker after what it computes now, and forget the rest."""
        self._closed = True
        self._wishes.put(None)
        self._worker.join()
        for _, _, _, future, _ in self._queue:
            future.cancel()
        self._queue.clear()

    def _run(self) -> None:
        while True:
            self._wishes.get()
            if self._closed:
                return
            _, _, call, future, loop = heapq.heappop(self._queue)
            if not future.cancelled():
                self._compute(call, future, loop)
            del call, future  # and with them what they hold, however long the next takes to come

    def _compute(self, call: Callable[[], Any], future: asyncio.Future[Any], loop: _Loop) -> None:
        begun = time.perf_counter()
        error: BaseException | None = None
        result = None
        try:
            with torch.inference_mode():
                result = call()
        except BaseException as raised:  # the top of a thread: whoever waits must hear of it
            error = raised
        ran = Ran(result, begun, time.perf_counter())
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
