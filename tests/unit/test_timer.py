"""The timer that keeps to fractions of a millisecond: fires once, at the last time it was told."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from duck.transports import timer
from duck.transports.timer import Timer
from tests.flocks import WAIT_S


@pytest.fixture(params=["asyncio", "uvloop", "without timerfd"])
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Coroutine[Any, Any, None]], None]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else None
    if request.param == "without timerfd":
        monkeypatch.setattr(timer.sys, "platform", "another")

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario)

    return run


def test_it_fires_once_and_not_before_its_time(run: Any) -> None:
    async def scenario() -> None:
        fired: asyncio.Queue[float] = asyncio.Queue()
        own = Timer(lambda: fired.put_nowait(time.perf_counter()))
        begun = time.perf_counter()
        own.start(10.0)
        own.start(0.003)
        assert await asyncio.wait_for(fired.get(), WAIT_S) - begun >= 0.003
        own.start(-1.0)
        await asyncio.wait_for(fired.get(), WAIT_S)
        assert fired.empty()
        own.close()

    run(scenario())


def test_a_later_time_replaces_an_earlier_one(run: Any) -> None:
    async def scenario() -> None:
        order: asyncio.Queue[str] = asyncio.Queue()
        own, other = (Timer(lambda n=name: order.put_nowait(n)) for name in ("own", "other"))
        own.start(0.001)
        own.start(0.02)
        other.start(0.005)
        assert [await asyncio.wait_for(order.get(), WAIT_S) for _ in range(2)] == ["other", "own"]
        own.close()
        other.close()

    run(scenario())


def _timers() -> int:
    """How many of the system's timers this process has open."""
    if sys.platform != "linux":
        return 0
    gc.collect()  # what other tests left may not go in between
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += "timerfd" in os.readlink(f"/proc/self/fd/{name}")
    return count


def test_closed_it_never_fires(run: Any) -> None:
    async def scenario() -> None:
        before = _timers()
        fired: list[int] = []
        own, other = Timer(lambda: fired.append(1)), Timer(lambda: passed.set())
        passed = asyncio.Event()
        own.start(0.001)
        own.close()
        own.close()
        other.start(0.005)
        await asyncio.wait_for(passed.wait(), WAIT_S)
        other.close()
        assert not fired
        assert _timers() == before

    run(scenario())
