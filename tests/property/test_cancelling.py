"""Sessions that are broken off at any moment leave nothing behind and change nothing for others.

The moment is a turn of the event loop, so every place where a session can wait is among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from duck.plan.closed import TUNED
from tests.virtual import Emulation, VirtualLoop, run, stage_seconds

TIMES = replace(TUNED, moe_layers=2, dense_layers=1)
# The longest runs take about as many turns of the loop.
TURNS = 900


def emulation(schedule: str, draft: str, early: str, seed: int) -> Emulation:
    rng = random.Random(seed)
    return Emulation(
        TIMES,
        schedule=schedule,
        draft=draft,
        early=early,
        seconds=lambda stage: stage_seconds(TIMES)(stage) * rng.uniform(0.2, 2),
        late=lambda: rng.choice((0, 0, 1e-3)),
    )


async def broken_off(
    turns: list[int], schedule: str, draft: str, early: str, prompt: int, seed: int
) -> None:
    """Sessions answer side by side; the first ones are cancelled at these turns of the loop."""
    world = emulation(schedule, draft, early, seed)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    sessions = [world.session() for _ in range(len(turns) + 2)]

    async def answer(number: int) -> None:
        session = sessions[number]
        with contextlib.suppress(asyncio.CancelledError):
            await world.answer(session, 5 + number, prompt, 9)
        # Whether it was broken off or not, it goes on at once with another conversation.
        await world.answer(session, 50 - number, prompt + 9, 5)

    tasks = [asyncio.create_task(answer(number)) for number in range(len(sessions))]
    now = loop.turns
    for number, turn in enumerate(turns):
        while now + turn in loop.at_turn:
            turn += 1
        loop.at_turn[now + turn] = tasks[number].cancel
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        # The second conversation of a session may have been broken off as well.
        assert result is None or isinstance(result, asyncio.CancelledError), result
    assert not any(task.cancelled() for task in tasks[len(turns) :])
    loop.at_turn.clear()
    await asyncio.gather(*(answer(number) for number in range(len(sessions))))
    assert not world.flock.open  # no row set
    # What had begun on the device when its session left is the last thing that knew of its KV.
    assert world.device.idle
    caches = [weakref.ref(session.cache) for session in sessions]
    del tasks
    sessions.clear()
    await asyncio.sleep(0)
    gc.collect()
    assert not [cache for cache in caches if cache() is not None]


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """All that was imported is left out of them: they look only at what a run made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@settings(max_examples=100, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    turns=st.lists(st.integers(1, TURNS), min_size=1, max_size=2),
    schedule=st.sampled_from(["serial", "batch", "wave", "pingpong", "auto"]),
    draft=st.sampled_from(["mtp", "off"]),
    early=st.sampled_from(["on", "off"]),
    prompt=st.sampled_from([1, 3, 300]),
    seed=st.integers(0, 5),
)
# A session that leaves between the forming of its step and the first turn of whoever leads it.
@example(turns=[359, 271], schedule="batch", draft="mtp", early="off", prompt=1, seed=0)
def test_broken_off_at_any_turn(
    turns: list[int], schedule: str, draft: str, early: str, prompt: int, seed: int
) -> None:
    run(broken_off(turns, schedule, draft, early, prompt, seed))
