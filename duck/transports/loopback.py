"""All ducks inside this process: the reference that every other transport is compared with.

The same rounding to the wire dtype, the same worker-thread arithmetic, no bytes on any wire.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from duck import wire
from duck.errors import DuckError, DuckLost
from duck.placement import Plan
from duck.transports.base import Ask, AskTable, Handler, Rows, check_ids, compute_answer


class _Round:
    """The answers of one ask on their way from the worker threads: the last one wakes the loop."""

    def __init__(self, ask: Ask, ducks: int) -> None:
        self.ask = ask
        self.answers: list[tuple[np.ndarray, int, int] | None] = [None] * ducks
        self.error: tuple[int, BaseException] | None = None
        self._left = ducks
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Note one finished duck; True for the last."""
        with self._lock:
            self._left -= 1
            return not self._left


class LoopbackTransport:
    """N ducks as worker threads; `handlers[duck]` is what a node process would run."""

    def __init__(self, handlers: Sequence[Handler]) -> None:
        self._handlers = tuple(handlers)
        self._workers: list[ThreadPoolExecutor] = []
        self._table: AskTable | None = None

    async def start(self, plan: Plan) -> None:
        """Attach every duck to its slice."""
        assert plan.ducks == len(self._handlers)
        self._loop = asyncio.get_running_loop()
        self._plan = plan
        for duck, handler in enumerate(self._handlers):
            await handler.attach(plan, duck, lambda _done, _total: None)
        # One worker a duck: its asks are answered in order, as on a duck of its own.
        self._workers = [
            ThreadPoolExecutor(1, thread_name_prefix=f"duck-{duck}") for duck in range(plan.ducks)
        ]
        self._table = AskTable(plan, tuple(f"duck {d} (in process)" for d in range(plan.ducks)))
        self._watch = self._loop.create_task(self._expire(), name="loopback-deadlines")

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self._asks.expire(self._loop.time())

    @property
    def _asks(self) -> AskTable:
        assert self._table is not None, "start() comes first"
        return self._table

    async def acquire(self, rows: int = 1) -> Rows:
        return await self._asks.ring.acquire(rows)

    def ask(
        self,
        layer: int,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        rows: Rows,
        *,
        deadline: float,
    ) -> Ask:
        """Hand the rows to every worker; see the contract in `base`."""
        ask = self._asks.open(layer, len(x), rows, deadline)
        check_ids(ids, self._plan.experts)
        # The caller may reuse its arrays as soon as we return, as with bytes handed to a socket.
        body = wire.AskBody(ids.copy(), weights.copy(), x.copy())
        round_ = _Round(ask, self._plan.ducks)
        asked = time.perf_counter()
        for duck, worker in enumerate(self._workers):
            worker.submit(self._answer, round_, duck, layer, body, asked)
        return ask

    def _answer(
        self, round_: _Round, duck: int, layer: int, body: wire.AskBody, asked: float
    ) -> None:
        begun = time.perf_counter()
        try:
            if round_.ask.ticket in self._asks.open_asks:  # else cancelled: not worth computing
                answer = compute_answer(self._handlers[duck], layer, body, self._plan.shape)
                queue_us = int((begun - asked) * 1e6)
                compute_us = int((time.perf_counter() - begun) * 1e6)
                round_.answers[duck] = (answer, queue_us, compute_us)
        except BaseException as error:  # a worker thread's top: the loop decides what it means
            round_.error = (duck, error)
        if round_.done():
            try:
                self._loop.call_soon_threadsafe(self._deliver, round_)
            except RuntimeError:
                return  # the loop was closed without close(): nobody is left to tell

    def _deliver(self, round_: _Round) -> None:
        ask = round_.ask
        if ask.ticket not in self._asks.open_asks:
            self._asks.late_answers += self._plan.ducks
            return
        if round_.error:
            duck, error = round_.error
            if not isinstance(error, DuckError):
                raise error
            label = self._asks.labels[duck]
            self._asks.fail(ask, DuckLost(label, ask.layer, ask.waited_ms, str(error), index=duck))
            return
        partials = ask.rows.partials(ask.count)
        for duck, answer in enumerate(round_.answers):
            assert answer is not None
            partials[duck] = answer[0]
            wire.STAMPS.pack_into(ask.rows.landing[duck], 0, answer[1], answer[2])
            for fragment in range(ask.fragments):
                self._asks.arrived(ask, duck, fragment, ask.fragments)

    def stats(self) -> Mapping[str, float]:
        return {"late_answers": self._asks.late_answers, "rows_free": self._asks.ring.free}

    async def close(self) -> None:
        """End the workers; safe to call twice and with asks in flight."""
        if self._table is None or self._table.closed:
            return
        self._table.close()
        self._watch.cancel()
        for worker in self._workers:
            worker.shutdown(wait=False, cancel_futures=True)
