"""The host's view of all ducks: asks with deadlines out, one sum in duck order back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from duck import wire
from duck.errors import DuckLost, TransportClosed, WeightsError, WireError
from duck.placement import Plan
from duck.transports.base import ASK_ROW_S, ASK_S, Ask, Rows, Transport


class FlockAsk:
    """An ask on its way. Whoever holds it closes it, whatever became of it.

    Its answers may be read in any thread, also while it is closed: closing waits for the reader,
    because from then on the row set serves other asks.
    """

    def __init__(self, ask: Ask, flock: Flock, x: np.ndarray) -> None:
        self._ask, self._flock = ask, flock
        self._x = x  # for who is to blame; the caller's, who may have made other use of it since
        self._rows: Rows | None = None
        self._closed = False
        self._reading = threading.Lock()  # between `close` and whoever reads
        # (queue, compute) of each duck, known once it has arrived
        self.ducks_us: tuple[tuple[int, int], ...] = ()

    async def arrived(self) -> None:
        """Wait until every duck's partial sums are here.

        Raises:
            DuckLost, TransportClosed: they will not come.
        """
        try:
            self._rows = await self._ask
        except DuckLost as lost:
            raise await self._flock.explained(lost) from None
        self.ducks_us = self._rows.stamps()

    def total(self) -> np.ndarray:
        """(T, hidden) float32: the partial sums added in duck order, whatever order they came in.

        Once they have arrived; in any thread, since with many ducks it takes a while.

        Raises:
            WireError: it is not finite.
            WeightsError: nor were the rows that the ducks got.
            DuckLost: an answer is damaged.
            TransportClosed: it is closed.
        """
        with self._reading:
            rows = self._landed()
            total, finite = rows.total(self._ask.count)
            if not finite:
                raise self._no_numbers(rows)
        return total

    def _no_numbers(self, rows: Rows) -> WeightsError | WireError:
        """Who is to blame for it."""
        if not np.isfinite(wire.to_float32(self._x)).all():
            return WeightsError(
                f"the rows at layer {self._ask.layer} were no numbers before any duck had "
                "them: the weights overflow on the host; --dtype float32 holds the most"
            )
        partials = rows.partials(self._ask.count)
        numbers = [np.isfinite(wire.to_float32(partial)).all() for partial in partials]
        bad = [str(duck) for duck, good in enumerate(numbers) if not good]
        return WireError(
            f"the answers at layer {self._ask.layer} do not add up to numbers: "
            + (f"not finite from duck {', '.join(bad)}" if bad else "the sum overflows")
        )

    def pinned(self) -> np.ndarray | None:
        """The partial sums (ducks, T, hidden), if they lie where a GPU reads them by itself.

        Whoever adds them there calls `total` if the sum is not finite.

        Raises:
            DuckLost, TransportClosed: as `total`.
        """
        with self._reading:
            rows = self._landed()
            return rows.partials(self._ask.count) if rows.pinned else None

    def _landed(self) -> Rows:
        if self._closed:
            raise TransportClosed("its answers are given back")
        assert self._rows is not None
        return self._rows

    async def sum(self) -> np.ndarray:
        """Wait, add and close."""
        try:
            await self.arrived()
            return self.total()
        finally:
            self.close()

    def close(self) -> None:
        """Stop waiting if it still flies, and give its rows back; the second time nothing."""
        with self._reading:
            self._closed = True
            self._ask.cancel()

    @property
    def sent_at(self) -> float:
        """When it was sent, in perf_counter's seconds."""
        return self._ask.sent_at

    @property
    def arrived_at(self) -> Sequence[float]:
        """When each duck's answer was whole."""
        return self._ask.arrived_at

    @property
    def done_at(self) -> float:
        """When the last answer was whole."""
        return self._ask.done_at


class Flock:
    """All ducks behind one transport, agreed on one plan.

    Args:
        transport: not started.
        plan: who holds what.
        obituary: tells how a duck's process ended, "" if it did not; for ducks that we started.
    """

    def __init__(
        self,
        transport: Transport,
        plan: Plan,
        obituary: Callable[[int], Awaitable[str]] | None = None,
    ) -> None:
        self._transport, self._obituary = transport, obituary
        self.plan = plan

    async def start(self) -> None:
        """Gather the ducks: each holds its slice when this returns.

        Raises:
            DuckLost, TransportError, WireError: one cannot be reached, is lost or refuses.
        """
        try:
            await self._transport.start(self.plan)
        except DuckLost as lost:
            raise await self.explained(lost) from None

    async def explained(self, lost: DuckLost) -> DuckLost:
        """The same loss, with how the duck's process ended if we know."""
        told = await self._obituary(lost.index) if self._obituary else ""
        if not told:
            return lost
        reason = f"{lost.reason}; {told}"
        return DuckLost(lost.duck, lost.layer, lost.waited_ms, reason, index=lost.index)

    async def ask(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> FlockAsk:
        """Send one layer's rows to every duck; waits only while all row sets are in use.

        x: (T, hidden), float32 or uint16 bfloat16 as the plan says; ids, weights: (T, top_k).
        """
        rows = await self._transport.acquire(len(x))
        deadline = asyncio.get_running_loop().time() + ASK_S + ASK_ROW_S * len(x)
        try:
            ask = self._transport.ask(layer, x, ids, weights, rows, deadline=deadline)
        except DuckLost as lost:
            raise await self.explained(lost) from None
        return FlockAsk(ask, self, x)

    async def close(self) -> None:
        await self._transport.close()
