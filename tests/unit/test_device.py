"""The device's worker: who goes first, what cancelling does, and that errors reach who waits."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from duck.device import AHEAD, OVERTAKEN, SWITCH_S, Device, Later, Stage, now, switching_fast
from duck.errors import ConfigError, DuckError
from tests.flocks import WAIT_S


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
            return now(self._go.wait(WAIT_S))

        self.task = asyncio.create_task(device.run(Stage("attend", 1), wait))
        self._begun = begun

    async def begun(self) -> None:
        await asyncio.to_thread(self._begun.wait, WAIT_S)

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
    closing = asyncio.create_task(asyncio.to_thread(device.close))
    while not device._closed:  # noqa: ASYNC110 (before, the worker would go on to what waits)
        await asyncio.sleep(0)
    held.let_go()
    await closing
    with pytest.raises(DuckError, match="the engine is closed"):
        await waiting
    with pytest.raises(DuckError, match="the engine is closed"):
        await device.run(Stage("attend", 1), lambda: now(1))


def test_threads_take_turns_quickly_only_while_an_engine_is_open() -> None:
    before = sys.getswitchinterval()
    with switching_fast():
        assert sys.getswitchinterval() == pytest.approx(min(before, SWITCH_S))
    assert sys.getswitchinterval() == before


class Gpu:
    """What is launched on it is done when it is told so, in the order it was launched."""

    def __init__(self) -> None:
        self.marks: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        self.error: Exception | None = None

    def mark(self) -> Callable[[], None]:
        event = threading.Event()
        self.marks.put(event)

        def reached() -> None:
            assert event.wait(WAIT_S)
            if self.error is not None:
                raise self.error

        return reached

    async def launched(self) -> threading.Event:
        """Wait for the next piece of work to be launched."""
        return await asyncio.to_thread(self.marks.get, timeout=WAIT_S)


@pytest.fixture
async def gpu() -> AsyncIterator[Gpu]:
    return Gpu()


async def test_launched_is_not_done(gpu: Gpu) -> None:
    device, done = Device("cpu", "auto", gpu.mark), []
    both = [
        asyncio.create_task(
            device.run(Stage("attend", 1), lambda n=n: Later(lambda: done.append(n)))
        )
        for n in range(2)
    ]
    first, second = await gpu.launched(), await gpu.launched()  # one runs, the other follows it
    assert done == []
    first.set()
    one = await both[0]
    assert done == [0]
    second.set()
    two = await both[1]
    assert done == [0, 1]
    assert one.begun <= one.ended <= two.begun <= two.ended  # though it was launched earlier
    device.close()


async def test_no_further_ahead_than_can_be_overtaken(gpu: Gpu) -> None:
    device, begun = Device("cpu", "auto", gpu.mark), []
    names = ["attend", "attend", "head", "attend"]
    tasks = [
        asyncio.create_task(
            device.run(Stage(name, 1), lambda n=n, name=name: now(begun.append((name, n))))
        )
        for n, name in enumerate(names)
    ]
    running, following = await gpu.launched(), await gpu.launched()
    assert AHEAD == 2
    assert gpu.marks.empty()
    running.set()
    await tasks[0]
    third = await gpu.launched()  # what was urgent by then
    assert begun == [("attend", 0), ("attend", 1), ("attend", 3)]
    following.set()
    third.set()
    (await gpu.launched()).set()
    await asyncio.gather(*tasks)
    assert begun[-1] == ("head", 2)
    device.close()


async def test_what_fails_while_it_runs_reaches_who_waits(gpu: Gpu) -> None:
    device = Device("cpu", "auto", gpu.mark)
    gpu.error = RuntimeError("an illegal address")
    task = asyncio.create_task(device.run(Stage("attend", 1), lambda: now(1)))
    (await gpu.launched()).set()
    with pytest.raises(RuntimeError, match="an illegal address"):
        await task
    gpu.error = None

    def fail() -> Later[None]:
        raise ConfigError("no")

    for _ in range(2 * AHEAD):  # it gives its place back
        with pytest.raises(ConfigError, match="no"):
            await device.run(Stage("attend", 1), fail)
        task = asyncio.create_task(device.run(Stage("attend", 1), lambda: now(7)))
        (await gpu.launched()).set()
        assert (await task).result == 7
    device.close()


async def test_closing_waits_for_what_is_launched(gpu: Gpu) -> None:
    """Its memory goes next."""
    device = Device("cpu", "auto", gpu.mark)
    tasks = [
        asyncio.create_task(device.run(Stage("attend", 1), lambda: now(None))) for _ in range(3)
    ]
    events = [await gpu.launched(), await gpu.launched()]
    closing = asyncio.create_task(asyncio.to_thread(device.close))
    await asyncio.sleep(0)
    assert not closing.done()
    for event in events:
        event.set()
    while not closing.done():
        await asyncio.sleep(0)
        while not gpu.marks.empty():
            gpu.marks.get().set()
    await asyncio.gather(*tasks, return_exceptions=True)
