"""The device's worker: who goes first, what cancelling does, and that errors reach who waits."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from duck.device import OVERTAKEN, SWITCH_S, Device, Later, Stage, now, switching_fast
from duck.errors import ConfigError, DuckError


@pytest.fixture
async def device() -> AsyncIterator[Device]:
    device = Device("cpu", "auto")
    yield device
    device.close()


class Held:
    """Keeps the worker busy until it is let go."""

    def __init__(self, device: Device) -> None:
        self._go = threading.Event()
        begun = threading.Event()

        def wait() -> Later[None]:
            begun.set()
            return now(self._go.wait(20))

        self.task = asyncio.create_task(device.run(Stage("attend", 1), wait))
        self._begun = begun

    async def begun(self) -> None:
        await asyncio.to_thread(self._begun.wait, 20)

    def let_go(self) -> None:
        self._go.set()


async def order(device: Device, names: list[str]) -> list[str]:
    """In what order work is done that was asked for while the worker was busy."""
    held, done = Held(device), []
    await held.begun()
    tasks = []
    for number, name in enumerate(names):
        note = f"{name} {number}"
        tasks.append(
            asyncio.create_task(
                device.run(Stage(name, 1), lambda note=note: now(done.append(note)))
            )
        )
    await asyncio.sleep(0)  # now all are in the queue
    held.let_go()
    await asyncio.gather(held.task, *tasks)
    return done


async def test_what_unlocks_an_ask_goes_first(device: Device) -> None:
    names = ["head", "shared", "attend", "attend", "dense"]
    want = ["attend 2", "attend 3", "dense 4", "shared 1", "head 0"]
    assert await order(device, names) == want


async def test_one_kind_keeps_its_order(device: Device) -> None:
    names = ["shared"] * 5
    assert await order(device, names) == [f"shared {number}" for number in range(5)]


async def test_nothing_waits_for_ever(device: Device) -> None:
    """It goes before whatever came so many pieces of work later."""
    for name, many in OVERTAKEN.items():
        names = [name, *["attend"] * (2 * many)]
        assert (await order(device, names)).index(f"{name} 0") == many - 1


async def test_results_and_times(device: Device) -> None:
    ran = await device.run(Stage("attend", 1), lambda: now(torch.ones(2).sum()))
    assert ran.result == 2
    assert ran.result.is_inference()
    assert ran.begun <= ran.ended
    assert ran.late > 0


async def test_errors_reach_who_waits(device: Device) -> None:
    def fail() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        await device.run(Stage("attend", 1), fail)
    assert (await device.run(Stage("attend", 1), lambda: now(5))).result == 5


async def test_cancelled_before_it_began_it_never_does(device: Device) -> None:
    held, done = Held(device), []
    await held.begun()
    task = asyncio.create_task(device.run(Stage("attend", 1), lambda: now(done.append(1))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.let_go()
    await held.task
    await device.run(Stage("head", 1), lambda: now(None))
    assert done == []


async def test_cancelled_while_it_runs_its_result_is_dropped(device: Device) -> None:
    held = Held(device)
    await held.begun()
    held.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held.task
    held.let_go()
    assert (await device.run(Stage("attend", 1), lambda: now(7))).result == 7


async def test_closed() -> None:
    device = Device("cpu", "bfloat16")
    assert (device.dtype, device.name) == (torch.bfloat16, "cpu")
    held = Held(device)
    await held.begun()
    waiting = asyncio.create_task(device.run(Stage("attend", 1), lambda: now(1)))
    await asyncio.sleep(0)
    held.let_go()
    device.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(DuckError, match="the engine is closed"):
        await device.run(Stage("attend", 1), lambda: now(1))


def test_threads_take_turns_quickly_only_while_an_engine_is_open() -> None:
    before = sys.getswitchinterval()
    with switching_fast():
        assert sys.getswitchinterval() == pytest.approx(min(before, SWITCH_S))
    assert sys.getswitchinterval() == before
