"""Rows in slots: the same tokens from buffers that stay, and no buffer that serves two lanes.

On a CPU a segment is called anew over its buffers, with what was known when it was made: a position
that was not read from its buffer, or rows that were overwritten before they were used, give other
tokens here as a replayed graph would on a GPU.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import duck.device
import duck.engine
import duck.walk
from duck.engine import Engine
from duck.errors import WireError
from duck.flock import FlockAsk
from duck.sampling import Sampling
from duck.walk import Walk, Walks
from tests.checkpoints import make_checkpoint

SCHEDULES = ("serial", "batch", "wave", "pingpong", "auto")
PROMPTS = ([2, 3, 0, 2], [3, 3, 2], [0, 2, 2, 2, 3, 0])
ANSWERS = [Sampling(max_tokens=18 + 7 * n, ignore_eos=True) for n in range(3)]
SPARSE: dict[str, Any] = {
    "model_type": "deepseek_v32", "index_topk": 12, "index_n_heads": 4, "index_head_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "sparse"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drafts are often right, and answers grow past index_topk."""
    more = SPARSE if request.param == "sparse" else {}
    into = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(into, seed=5, vocab_size=4, bos_token_id=0, eos_token_id=1, **more)


async def answers(folder: Path, **options: str) -> tuple[list[list[int]], int]:
    """Of three sessions at once; and how many segments there were."""
    async with Engine.open(folder, transport="loopback", **options) as engine:
        pairs = zip(PROMPTS, ANSWERS, strict=True)
        done = await asyncio.gather(*(engine.generate(p, s) for p, s in pairs))
        return [one.token_ids for one in done], engine._pipeline._walks.segments


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[int]]:
    return asyncio.run(answers(folder, schedule="serial", draft="off", graphs="off"))[0]


@pytest.mark.parametrize("draft", ["mtp", "off"])
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_the_same_tokens(
    folder: Path, plain: list[list[int]], schedule: str, draft: str
) -> None:
    found, _ = await answers(folder, schedule=schedule, draft=draft, graphs="on")
    assert found == plain


async def test_segments_are_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    replayed: list[tuple[str, int]] = []
    run = duck.walk.Slot._run

    def noting(slot: duck.walk.Slot, name: tuple[str, int], work: Callable[[], object]) -> None:
        (replayed if name in slot._segments else made).append(name)
        run(slot, name, work)

    monkeypatch.setattr(duck.walk.Slot, "_run", noting)
    await answers(folder, schedule="wave", draft="mtp", graphs="on")
    kinds = {"dense", "shared"} | ({"sparse"} if folder.name.startswith("sparse") else set())
    assert {kind for kind, _ in made} == kinds
    assert len(replayed) > 4 * len(made)
    made.clear()
    await answers(folder, schedule="wave", draft="mtp", graphs="off")
    assert not made


@pytest.mark.parametrize("fault", ["position", "one slot for two lanes"])
async def test_the_comparison_sees_mistakes(
    folder: Path, plain: list[list[int]], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "position":
        attend = duck.walk.Slot._attend

        def stuck(slot: duck.walk.Slot, layer: Any, cache: Any, position: int) -> None:
            slot.position.fill_(position)  # of when the segment was made
            attend(slot, layer, cache, position)

        monkeypatch.setattr(duck.walk.Slot, "_attend", stuck)
    else:
        never = property(lambda _: False, lambda *_: None)
        monkeypatch.setattr(duck.walk.Slot, "taken", never, raising=False)
    found, _ = await answers(folder, schedule="wave", draft="mtp", graphs="on")
    assert found != plain


async def test_device_sums_are_the_hosts(
    folder: Path, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With row sets as a GPU reads them, and results made by the thread that waits for one.

    Nothing is added up on the host.
    """
    given: list[int] = []

    def pin(nbytes: int) -> np.ndarray:
        given.append(nbytes)
        return np.zeros(nbytes, np.uint8)

    marks: list[int] = []

    def mark() -> Callable[[], None]:
        marks.append(threading.get_ident())
        return lambda: marks.append(-threading.get_ident())

    monkeypatch.setattr(duck.engine, "Device", partial(duck.device.Device, mark=mark))
    totals: list[int] = []
    total = FlockAsk.total

    def noting(ask: FlockAsk) -> np.ndarray:
        totals.append(ask._ask.count)
        return total(ask)

    monkeypatch.setattr(FlockAsk, "total", noting)
    monkeypatch.setattr(duck.engine, "_rows_on", lambda *_: (Walks(slots=True, watched=True), pin))
    found, _ = await answers(folder, schedule="wave", draft="mtp")
    assert found == plain
    assert len({abs(thread) for thread in marks}) == 2  # one launches, the other waits
    assert len(marks) > 500
    assert len(given) == 8  # the small sets
    assert all(rows > 4 for rows in totals)  # of prompts, whose sets are not pinned


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("schedule", ["serial", "wave"])
async def test_who_answers_no_numbers_is_named(
    folder: Path, schedule: str, slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although only the device adds up."""
    walks = Walks(slots=slots, watched=True)

    def pin(nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    monkeypatch.setattr(duck.engine, "_rows_on", lambda *_: (walks, pin))
    async with Engine.open(
        folder, transport="loopback", ducks="local:3", schedule=schedule
    ) as engine:
        arrived = FlockAsk.arrived

        async def spoilt(ask: FlockAsk) -> None:
            await arrived(ask)
            if ask._ask.layer == layer:
                assert ask._rows is not None
                ask._rows.partials(ask._ask.count)[1, 0, 5] = np.nan

        monkeypatch.setattr(FlockAsk, "arrived", spoilt)
        for layer in (1, 2):  # the last one goes to the norm
            with pytest.raises(WireError, match=f"at layer {layer} .*not finite from duck 1"):
                await engine.generate(PROMPTS[0], ANSWERS[0])
        layer = -1
        good = await engine.generate(PROMPTS[0], ANSWERS[0])
        assert len(good.token_ids) == 18


class Session:
    """What walks need of one."""

    def __init__(self, capacity: int) -> None:
        self.cache: Any = type("Cache", (), {"capacity": capacity})()
        self.slots: duck.walk.Slots | None = None


def test_who_gets_a_slot() -> None:
    walks, session = Walks(slots=True), Session(100)

    def begin(rows: int, last: int | None = None, *, decode: bool = True) -> Walk:
        return walks.begin(session, rows, 0, last, decode=decode)

    first, second = begin(1), begin(1)
    assert session.slots is not None
    assert len(session.slots.slots) == 2
    first.close()
    begin(1)
    assert len(session.slots.slots) == 2  # the first one's
    begin(2)
    begin(2, 1)
    assert len(session.slots.slots) == 4
    plain = [
        begin(3),
        begin(1, 0),
        begin(2, decode=False),
        Walks().begin(session, 1, 0, None, decode=True),
    ]
    assert {type(walk) for walk in plain} == {Walk}
    assert len(session.slots.slots) == 4
    session.cache.capacity = 150  # it grew, and moved
    before = session.slots
    begin(1)
    assert session.slots is not before
    second.close()
    assert session.slots.slots[0].taken


def test_there_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duck.walk, "MOST_SEGMENTS", 2)
    monkeypatch.setattr(duck.walk, "IDLE_TAKES", 3)
    walks = Walks(slots=True)
    sessions = [Session(10) for _ in range(3)]

    def step(session: Session) -> bool:
        walk = walks.begin(session, 1, 0, None, decode=True)
        if session.slots is not None and session.slots.slots:
            session.slots.slots[0]._segments[("dense", 0)] = lambda: None
        walk.close()
        return type(walk) is not Walk

    assert [step(session) for session in sessions] == [True, True, False]
    assert walks.segments == 2
    assert step(sessions[1])
    assert step(sessions[2])  # the first one was idle for so long
    assert sessions[0].slots is not None
    assert len(sessions[0].slots) == 0
    assert not step(sessions[0])
    assert walks.segments == 2
    sessions.pop()
    gc.collect()
    assert walks.segments == 1  # a session takes its own with it
    assert step(sessions[0])


async def test_the_event_loop_computes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor makes tensors: on a GPU it would call CUDA."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    async with Engine.open(
        folder, transport="loopback", schedule="wave", draft="mtp", graphs="on"
    ) as engine:
        with torch.inference_mode(), Noting():  # of this thread alone
            session = engine.session()
            made, _ = seen.copy(), seen.clear()
            await engine.generate(PROMPTS[0] * 80, ANSWERS[0], session=session)
            await engine.score(PROMPTS[0], mtp=True)
    assert made <= {"zeros", "new_zeros"}  # of no positions
    assert seen <= {"slice", "zeros", "detach", "alias"}
