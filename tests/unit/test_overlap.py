"""Who works while whom, on a virtual clock: the real pipeline with device and ducks emulated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from duck.plan.closed import ORIGINAL, TUNED, Times
from duck.plan.simulate import simulate
from duck.trace import Trace
from tests.virtual import Did, Emulation, run

SMALL = replace(TUNED, moe_layers=5, dense_layers=2)


@dataclass
class Record:
    """What happened in a run."""

    did: list[Did]
    asks: list[Did]
    steps: list[tuple[int, float, float]]  # session, start, end
    ducks: list[tuple[float, float]]  # when they were busy
    layers: int

    def find(self, name: str, session: int, lane: int, layer: int = -1) -> list[Did]:
        """Of every step, in order; name "attend" also finds dense layers."""
        names = {"attend": ("attend", "dense")}.get(name, (name,))
        return [
            did
            for did in (*self.did, *self.asks)
            if did.name in names and (did.session, did.lane, did.layer) == (session, lane, layer)
        ]


async def record(
    times: Times, *, sessions: int = 1, tokens: int = 12, prompt: int = 4, **options: Any
) -> Record:
    import asyncio

    trace = Trace(["duck"] * 32)
    emulation = Emulation(times, trace=trace, **options)
    async with asyncio.TaskGroup() as group:
        for number in range(sessions):
            session = emulation.session()
            group.create_task(emulation.answer(session, 3 + 5 * number, prompt, tokens))
    assert not emulation.flock.open
    assert emulation.device.idle
    asks = [
        Did("ask", a.layer, a.args["lane"], a.args["session"], a.rows, a.sent, a.done)
        for a in trace.asks()
    ]
    steps = [(s.args["session"], s.start, s.end) for s in trace.spans() if s.name == "step"]
    layers = len(emulation.model.layers)
    return Record(emulation.device.did, asks, steps, emulation.flock.busy, layers)


def step_ms(found: Record) -> float:
    """Of the first session that made one: the mean distance of its steps' ends, in the middle."""
    session = found.steps[0][0]
    ends = [end for who, _, end in found.steps if who == session][2:-3]
    return (ends[-1] - ends[0]) / (len(ends) - 1) * 1e3


@pytest.mark.parametrize(
    ("schedule", "sessions", "tuned", "original"),
    [
        ("serial", 1, 95.0, 125.2),
        ("batch", 1, 92.9, 122.3),
        ("wave", 1, 74.0, 91.8),
        ("pingpong", 2, 129.6, 133.9),
    ],
)
def test_the_pipeline_takes_as_long_as_its_simulation(
    schedule: str, sessions: int, tuned: float, original: float
) -> None:
    for times, told in ((TUNED, tuned), (ORIGINAL, original)):
        took = step_ms(
            run(record(times, schedule=schedule, sessions=sessions, tokens=30, early="off"))
        )
        assert took == pytest.approx(told, rel=0.01)
        simulated = simulate(times, schedule, sessions=sessions, steps=12).step_ms
        assert took == pytest.approx(simulated, rel=0.01)
