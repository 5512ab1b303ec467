"""The host's view of all ducks: asks with deadlines out, one sum in duck order back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from duck import wire
from duck.errors import DuckLost, WireError
from duck.placement import Plan
from duck.transports.base import ASK_ROW_S, ASK_S, Ask, Transport


class FlockAsk:
    """An ask on its way; `sum` waits for it."""

    def __init__(self, ask: Ask, flock: Flock) -> None:
        self._ask, self._flock = ask, flock
        # (queue, compute) of each duck, known after `sum`
        self.ducks_us: tuple[tuple[int, int], ...] = ()

    async def sum(self) -> np.ndarray:
        """(T, hidden) float32: the partial sums added in duck order, whatever order they came in.

        Raises:
            DuckLost, TransportClosed: there is no sum.
            WireError: it is not finite.
        """
        ask = self._ask
        try:
            rows = await ask
        except DuckLost as lost:
            raise await self._flock.explained(lost) from None
        except BaseException:
            ask.cancel()  # frees the rows when it was us who stopped waiting
            raise
        try:
            partials = rows.partials(ask.count)
            total: np.ndarray = np.array(wire.to_float32(partials[0]))
            with np.errstate(over="ignore", invalid="ignore"):  # we look at the sum below
                for partial in partials[1:]:
                    total += wire.to_float32(partial)
            self.ducks_us = tuple(rows.stamps(duck) for duck in range(len(partials)))
            if not np.isfinite(total).all():
                finite = [np.isfinite(wire.to_float32(partial)).all() for partial in partials]
                bad = [str(duck) for duck, good in enumerate(finite) if not good]
                raise WireError(
                    f"the answers at layer {ask.layer} do not add up to numbers: "
                    + (f"not finite from duck {', '.join(bad)}" if bad else "the sum overflows")
                )
        finally:
            ask.release()
        return total

    @property
    def seconds(self) -> float:
        """From sending to the last answer."""
        return self._ask.waited_ms / 1e3


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
        return FlockAsk(ask, self)

    async def close(self) -> None:
        await self._transport.close()
