"""Faults that must be loud: each ends in a DuckLost that says what was seen, and never in a sum."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from duck.errors import DuckLost
from duck.transports.control import FlockTransport, Plane
from duck.transports.faulty import Faults, FaultyPlane
from duck.transports.shm import ShmPlane
from duck.transports.tcp import TcpPlane
from tests.flocks import WAIT_S, FakeDuck, listening, plan_for

DUCKS = 3
PLANES = pytest.mark.parametrize("plane", [TcpPlane, ShmPlane])


@contextlib.asynccontextmanager
async def flock(plane: type[Plane], **faults: Any) -> AsyncIterator[FlockTransport]:
    async with contextlib.AsyncExitStack() as stack:
        ducks = [FakeDuck(number) for number in range(DUCKS)]
        ends = [await stack.enter_async_context(listening(duck)) for duck in ducks]
        wrapped = FaultyPlane(plane(), **faults)
        transport = FlockTransport([address for address, _ in ends], wrapped)
        stack.push_async_callback(transport.close)
        await transport.start(plan_for(DUCKS))
        yield transport


async def rounds(transport: FlockTransport, count: int, seconds: float = WAIT_S) -> int:
    """Ask again and again, and look at every answer; how many rounds went well."""
    loop, rng = asyncio.get_running_loop(), np.random.default_rng(1)
    ids = np.zeros((2, 2), np.int32)
    for done in range(count):
        x = rng.standard_normal((2, 8), np.float32)
        rows = await transport.acquire(2)
        try:
            ask = transport.ask(
                4, x, ids, ids.astype(np.float32), rows, deadline=loop.time() + seconds
            )
        except DuckLost:
            return done
        want = np.stack([x * (duck + 1) + 4 for duck in range(DUCKS)])
        try:
            np.testing.assert_array_equal((await ask).partials(2), want)
        except DuckLost:
            return done
        finally:
            ask.cancel()
    return count


@PLANES
async def test_no_fault(plane: type[Plane]) -> None:
    async with flock(plane) as transport:
        assert await rounds(transport, 50) == 50


@PLANES
async def test_changed_bits_never_reach_a_sum(plane: type[Plane]) -> None:
    async with flock(plane, corrupt=0.02, seed=3) as transport:
        free = transport.stats()["rows_free"]
        # `rounds` compares every answer it gets: the changed one must not be among them.
        assert 0 < await rounds(transport, 1000) < 1000
        (reason,) = transport.asks.lost.values()
        assert reason.endswith("failed its checksum")
        assert transport.stats()["rows_free"] == free


@PLANES
async def test_a_killed_duck(plane: type[Plane]) -> None:
    async with flock(plane, kill=0.1, seed=5) as transport:
        assert 0 < await rounds(transport, 200) < 200
        assert "killed by a fault" in transport.asks.lost.values()


@PLANES
@pytest.mark.parametrize("lost", ["asks", "answers"])
async def test_what_is_lost_is_missed_at_the_deadline(plane: type[Plane], lost: str) -> None:
    """Nothing sends again here; what comes of it is one clear loss, not a wait without end."""
    async with flock(plane, **{lost: Faults[Any](2, drop=0.2)}) as transport:
        assert await rounds(transport, 200, seconds=0.3) < 200
        assert "no answer before the deadline" in transport.asks.lost.values()


def test_planes_whose_bits_cannot_be_changed() -> None:
    class Other(TcpPlane):
        name = "other"

    with pytest.raises(ValueError, match="under the other plane"):
        FaultyPlane(Other(), corrupt=0.5)
