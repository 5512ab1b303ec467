"""All ducks inside this process: the reference that every other transport is compared with.

The same rounding to the wire dtype, the same worker-thread arithmetic, no bytes on any wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from duck import wire
from duck.errors import DuckError, TransportClosed, TransportError
from duck.placement import Plan
from duck.transports.base import Ask, AskTable, Handler, Pin, Rows
from duck.transports.worker import Waiting, Worker


class LoopbackTransport:
    """N ducks as worker threads; `handlers[duck]` is what a node process would run."""

    def __init__(self, handlers: Sequence[Handler], pin: Pin | None = None) -> None:
        self._handlers, self._pin = tuple(handlers), pin
        self._workers: list[Worker] = []
        self._table: AskTable | None = None
        self.attached: list[Mapping[str, Any]] = []

    async def start(self, plan: Plan) -> None:
        """Attach every duck to its slice."""
        assert plan.ducks == len(self._handlers)
        self._loop = asyncio.get_running_loop()
        self._plan = plan
        labels = tuple(f"duck {number} (in process)" for number in range(plan.ducks))
        self._table = AskTable(plan, labels, self._pin)
        for duck, handler in enumerate(self._handlers):
            self.attached.append(await handler.attach(plan, duck, _Quiet()))
        if self.asks.closed:
            raise TransportClosed("closed while it started")
        # One worker a duck: its asks are answered in order, as on a duck of its own.
        self._workers = [Worker(handler) for handler in self._handlers]
        self._table.on_cancel = self._drop

    @property
    def asks(self) -> AskTable:
        """The asks in flight."""
        assert self._table is not None, "start() comes first"
        return self._table

    async def acquire(self, rows: int = 1) -> Rows:
        return await self.asks.ring.acquire(rows)

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
        ask = self.asks.open(layer, len(x), ids, rows, deadline)
        # The caller may reuse its arrays as soon as we return, as with bytes handed to a socket.
        body = wire.AskBody(ids.copy(), weights.copy(), x.copy())
        patience_s = deadline - self._loop.time()
        for duck, worker in enumerate(self._workers):
            reply = partial(self._answer, ask, duck)
            waiting = Waiting(layer, body, self._plan.shape, reply, patience_s=patience_s)
            worker.put(0, ask.ticket, waiting)
        return ask

    def _drop(self, ask: Ask) -> None:
        for worker in self._workers:
            worker.drop(0, ask.ticket)

    def _answer(self, ask: Ask, duck: int, answer: np.ndarray | DuckError, stamps: bytes) -> None:
        """In a duck's worker thread: hand its answer to the loop."""
        # The loop is closed when nobody called close(): then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, ask, duck, answer, stamps)

    def _deliver(self, ask: Ask, duck: int, answer: np.ndarray | DuckError, stamps: bytes) -> None:
        asks = self.asks
        if isinstance(answer, DuckError):
            asks.lose(duck, f"the duck could not answer: {answer}")
        elif ask.ticket not in asks.open_asks:
            asks.late_answers += 1
        else:
            ask.rows.landing[duck][: wire.STAMP_BYTES] = stamps
            ask.rows.partials(ask.count)[duck] = answer
            asks.arrived_whole(ask, (duck,))

    def stats(self) -> Mapping[str, float]:
        return {"late_answers": self.asks.late_answers, "rows_free": self.asks.ring.free}

    async def close(self) -> None:
        """End the workers; safe to call twice and with asks in flight."""
        if self._table is None:
            return
        self._table.close()
        for worker in self._workers:
            worker.end()


class _Quiet:
    """A `base.Loading` for ducks that read what they need themselves."""

    def __call__(self, done: int, total: int) -> None:
        pass

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        raise TransportError(f"a duck inside the host lacks layer {layer}")
