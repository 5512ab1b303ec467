"""The host's view of all ducks: asks with deadlines out, one sum in duck order back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from duck import wire
from duck.errors import DuckLost, WeightsError, WireError
from duck.placement import Plan
from duck.transports.base import ASK_ROW_S, ASK_S, Ask, Rows, Transport


class FlockAsk:
    """An ask on its way. Whoever holds it closes it, whatever became of it."""

    def __init__(self, ask: Ask, flock: Flock, x: np.ndarray) -> None:
        self._ask, self._flock = ask, flock
        self._x = x  # for who is to blame; the caller's, who may have made other use of it since
        self._rows: Rows | None = None
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
        """
        assert self._rows is not None
        total, finite = self._rows.total(self._ask.count)
        if not finite:
            if not np.isfinite(wire.to_float32(self._x)).all():
                raise WeightsError(
                    f"the rows at layer {self._ask.layer} were no numbers before any duck had "
                    "them: the weights overflow on the host; --dtype float32 holds the most"
                )
            partials = self._rows.partials(self._ask.count)
            numbers = [np.isfinite(wire.to_float32(partial)).all() for partial in partials]
            bad = [str(duck) for duck, good in enumerate(numbers) if not good]
            raise WireError(
                f"the answers at layer {self._ask.layer} do not add up to numbers: "
                + (f"not finite from duck {', '.join(bad)}" if bad else "the sum overflows")
            )
        return total

    def pinned(self) -> np.ndarray | None:
        """The partial sums (ducks, T, hidden), if they lie where a GPU reads them by itself.

        Whoever adds them there calls `total` if the sum is not finite.

        Raises:
            DuckLost: an answer is damaged.
        """
        assert self._rows is not None
        return self._rows.partials(self._ask.count) if self._rows.pinned else None

    async def sum(self) -> np.ndarray:
        """Wait, add and close."""
        try:
            await self.arrived()
            return self.total()
        finally:
            self.close()

    def close(self) -> None:
        """Stop waiting if it still flies, and give its rows back; the second time nothing."""
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
