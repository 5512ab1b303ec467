"""Who works while whom, on a virtual clock: the real pipeline with device and ducks emulated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest

from duck.errors import DuckLost
from duck.pipeline import Lane
from duck.plan.closed import ORIGINAL, TUNED, Times
from duck.plan.simulate import simulate
from duck.trace import Trace
from tests.virtual import Did, Emulation, VirtualAsk, run, stage_seconds

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
        """Of every step of a session, in order; name "attend" also finds dense layers."""
        names = {"attend": ("attend", "dense")}.get(name, (name,))
        first = min(start for who, start, _ in self.steps if who == session)
        return [
            did
            for did in (*self.did, *self.asks)
            if did.name in names
            and did.start >= first
            and (did.session, did.lane, did.layer) == (session, lane, layer)
        ]


async def record(
    times: Times, *, sessions: int = 1, tokens: int = 12, prompt: int = 4, **options: Any
) -> Record:
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


# what depends on what


def edges(found: Record, session: int, step: int) -> Iterator[tuple[str, float, float]]:
    """(name, end of what must come first, start of what must come after) in one step of a wave.

    A is the sure row's lane, B the guess's; everything that a step's rows may depend on, and all
    of what they must.
    """
    last = found.layers - 1

    def one(name: str, lane: int, layer: int = -1) -> Did:
        return found.find(name, session, lane, layer)[step]

    for layer in range(found.layers):
        attend = {lane: one("attend", lane, layer) for lane in (0, 1)}
        yield f"KV_A -> attn_B, layer {layer}", attend[0].end, attend[1].start
        for lane, letter in enumerate("AB"):
            if layer > 0:
                before = one("attend", lane, layer - 1)
                yield f"layer {layer - 1} -> attn_{letter}", before.end, attend[lane].start
            if attend[lane].name == "dense":
                continue
            ask, shared = one("ask", lane, layer), one("shared", lane, layer)
            yield f"attn_{letter} -> ask, layer {layer}", attend[lane].end, ask.start
            yield f"attn_{letter} -> shared, layer {layer}", attend[lane].end, shared.start
            if layer < last:
                after = one("attend", lane, layer + 1).start
                yield f"routed_{letter} -> layer {layer + 1}", ask.end, after
                yield f"shared_{letter} -> layer {layer + 1}", shared.end, after
            else:
                final = one("final", lane)
                yield f"routed_{letter} -> norm", ask.end, final.start
                yield f"shared_{letter} -> norm", shared.end, final.start
    # The first head is the prompt's; the step's own comes after it.
    heads = [did for did in found.did if (did.name, did.session) == ("head", session)]
    chosen, head = heads[step : step + 2]
    combine = found.find("combine", session, 0, found.layers)[step]
    attend, ask, shared = (one(name, 0, found.layers) for name in ("attend", "ask", "shared"))
    guess = found.find("guess", session, 0, found.layers)[step]
    yield "token -> draft", chosen.end, combine.start
    yield "combine -> MTP attention", combine.end, attend.start
    yield "MTP attention -> MTP ask", attend.end, ask.start
    yield "MTP routed -> guess", ask.end, guess.start
    yield "MTP shared -> guess", shared.end, guess.start
    yield "token -> A", chosen.end, one("attend", 0, 0).start
    yield "guess -> B", guess.end, one("attend", 1, 0).start
    yield "norm_A -> head", one("final", 0).end, head.start
    yield "norm_B -> head", one("final", 1).end, head.start


def check(found: Record) -> None:
    """Nothing began before what it depends on had ended; all steps but the last, which is short."""
    for session in {who for who, _, _ in found.steps}:
        for step in range(sum(who == session for who, _, _ in found.steps) - 1):
            for name, first, then in edges(found, session, step):
                assert first <= then, f"step {step} of session {session}: {name} not kept"


def jitter(seed: int) -> Any:
    """Stages and ducks that take from a tenth to three times their time, answers that are late."""
    rng = random.Random(seed)
    return {
        "seconds": lambda stage: stage_seconds(SMALL)(stage) * rng.uniform(0.1, 3),
        "experts": lambda _layer, rows: SMALL.expert_rows(rows) * rng.uniform(0.1, 3),
        "late": lambda: rng.choice((0, 0, 0, 3e-3)),  # a lost packet: the next one overtakes it
    }


@pytest.mark.parametrize("early", ["off", "on"])
@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_every_dependency_holds(early: str, sessions: int, seed: int) -> None:
    options = {"schedule": "wave", "early": early, "sessions": sessions}
    check(run(record(SMALL, tokens=9, **options, **jitter(seed))))


def test_the_check_sees_every_dependency() -> None:
    """What starts just before the end of what it depends on is found, whichever it is."""
    found = run(record(SMALL, tokens=9, schedule="wave", early="off"))
    [session] = {who for who, _, _ in found.steps}
    kinds = list(edges(found, session, 2))
    assert len(kinds) == len({name for name, _, _ in kinds}) > 60
    for name, first, then in kinds:
        moved = [
            replace(did, start=first - 1e-6) if did.start == then else did
            for did in (*found.did, *found.asks)
        ]
        asks = [did for did in moved if did.name == "ask"]
        with pytest.raises(AssertionError, match="not kept"):
            check(replace(found, did=[d for d in moved if d.name != "ask"], asks=asks))
        assert moved != [*found.did, *found.asks], name


@pytest.mark.parametrize("seed", range(3))
def test_a_lane_that_does_not_wait_for_the_kv_is_found(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    async def at_once(self: Lane, layer: int) -> None:
        del self, layer

    monkeypatch.setattr(Lane, "kv", at_once)
    with pytest.raises(BaseExceptionGroup) as caught:
        run(record(SMALL, tokens=40, schedule="wave", early="off", **jitter(seed)))
    assert caught.group_contains(AssertionError, match="attended to")


# who works while whom


def common_s(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    """How long both are busy. Each: (start, end) in order, side by side."""
    return sum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start))
        for a_start, a_end in first
        for b_start, b_end in second
    )


def test_in_a_wave_the_device_works_on_one_lane_while_the_ducks_work_on_the_other() -> None:
    times = replace(TUNED, moe_layers=20, dense_layers=0)
    found = run(record(times, tokens=20, schedule="wave", early="off"))
    _, start, end = found.steps[3]
    ducks = {
        lane: [
            (ask.end - (times.back(1) + times.expert) / 1e3, ask.end - times.back(1) / 1e3)
            for ask in found.asks
            if ask.lane == lane and ask.layer < found.layers and start < ask.start < end
        ]
        for lane in (0, 1)
    }
    for lane in (0, 1):
        attends = [
            (did.start, did.end)
            for did in found.did
            if did.name == "attend" and did.lane == lane and did.layer < found.layers
            and start < did.start < end
        ]  # fmt: skip
        assert len(attends) == times.moe_layers
        spent = sum(b - a for a, b in attends)
        # Its own experts cannot be computed meanwhile, and the other lane's nearly always are.
        assert common_s(attends, ducks[lane]) == pytest.approx(0, abs=1e-9)
        assert common_s(attends, ducks[1 - lane]) > 0.9 * spent
    busy = [span for spans in ducks.values() for span in spans]
    middle = (start + 0.15 * (end - start), start + 0.85 * (end - start))
    assert common_s(busy, [middle]) > 0.99 * (middle[1] - middle[0])


def test_in_the_plain_loop_nothing_overlaps() -> None:
    found = run(record(SMALL, tokens=20, schedule="serial", sessions=2))
    steps = sorted((start, end) for _, start, end in found.steps)
    for (_, end), (start, _) in pairwise(steps):
        assert end <= start
    begun = steps[2][0]  # both prompts are done
    device = [(did.start, did.end) for did in found.did if did.start >= begun]
    assert common_s(device, [busy for busy in found.ducks if busy[0] >= begun]) == 0


def test_the_shared_expert_is_computed_while_the_ask_flies() -> None:
    for schedule in ("batch", "wave", "pingpong"):
        found = run(record(SMALL, tokens=8, schedule=schedule))
        asks = {(a.lane, a.layer, a.start): a for a in found.asks}
        shared = [did for did in found.did if did.name == "shared"]
        assert len(shared) == len(asks)
        for did in shared:
            flying = [a for a in found.asks if (a.lane, a.layer) == (did.lane, did.layer)]
            assert any(a.start <= did.start and did.end <= a.end for a in flying)


def test_started_early_the_sure_lane_runs_beside_its_draft() -> None:
    for early, want in (("on", True), ("off", False)):
        found = run(record(SMALL, tokens=20, schedule="wave", early=early))
        session = found.steps[0][0]
        sure = found.find("attend", session, 0, 0)[3]
        guess = found.find("guess", session, 0, found.layers)[3]
        assert (sure.end < guess.start) is want


def test_pingpong_alternates() -> None:
    """While the ducks work for one session, the device does for the other, most of the time."""
    found = run(record(TUNED, tokens=12, schedule="pingpong", sessions=2))
    starts = [(end + start) / 2 for _, start, end in found.steps]
    window = (starts[4], starts[8])
    device = [(d.start, d.end) for d in found.did if window[0] < d.start and d.end < window[1]]
    spent = sum(end - start for start, end in device)
    assert common_s(device, found.ducks) > 0.8 * spent


def test_groups_of_sessions_share_asks() -> None:
    found = run(record(SMALL, tokens=12, schedule="pingpong", sessions=4))
    rows = [ask.rows for ask in found.asks if ask.layer == 3 and ask.start > found.steps[3][1]]
    assert max(rows) == 4  # two sessions with their guesses


@pytest.mark.parametrize("policy", ["serial", "wave"])
def test_a_prompts_chunks_are_a_wave(policy: str) -> None:
    """Chunk c attends while the experts of chunk c - 1 are computed; in the plain loop it waits."""
    found = run(record(SMALL, tokens=1, prompt=700, schedule=policy))
    chunks = [
        [did for did in found.did if did.layer == layer and did.name in ("attend", "dense")]
        for layer in range(found.layers)
    ]
    assert [len(chunk) for chunk in chunks] == [3] * found.layers
    for layer in range(found.layers):
        for before, behind in pairwise(chunks[layer]):
            assert before.end <= behind.start  # its KV of the same layer
    first_out = next(ask.end for ask in found.asks if ask.layer == found.layers - 1)
    assert (chunks[0][1].start < first_out) is (policy == "wave")
    # Two at once: a third would hold a third row set.
    assert chunks[0][2].start >= first_out


def test_auto_measures_what_is_there_and_takes_the_wave() -> None:
    async def main() -> Any:
        emulation = Emulation(TUNED, schedule="auto", draft="auto", early="auto")
        meter = await emulation.answer(emulation.session(), 3, 4, 60)
        return meter, emulation.pipeline

    meter, pipeline = run(main())
    assert set(meter.schedules) == {"wave", "batch", "serial"}
    assert meter.schedules["wave"] > 2 * meter.schedules["batch"]
    times = pipeline.stages.times(TUNED.moe_layers, TUNED.dense_layers)
    for name in ("attend", "second_row", "shared", "expert", "common", "dense", "combine"):
        assert getattr(times, name) == pytest.approx(getattr(TUNED, name), rel=0.01, abs=2e-3)
    assert times.out(2) + times.back(2) == pytest.approx(TUNED.out(2) + TUNED.back(2), rel=0.05)
    assert times.head == pytest.approx(TUNED.head + TUNED.host, rel=0.01)


@pytest.mark.parametrize("sessions", [2, 3, 5])
def test_auto_with_several_sessions_from_the_start(sessions: int) -> None:
    """Then one row alone may never be seen; answers are checked by the emulation."""
    found = run(record(SMALL, schedule="auto", draft="auto", sessions=sessions, tokens=60))
    assert len({who for who, _, _ in found.steps}) == sessions


@pytest.mark.parametrize("schedule", ["serial", "batch", "wave"])
def test_live_figures_are_the_simulations(schedule: str) -> None:
    """Also in the midst of a step, with the shares of a step; a pause counts for nothing."""

    async def main() -> None:
        emulation = Emulation(TUNED, schedule=schedule, draft="mtp", early="off")
        pipeline = emulation.pipeline
        assert pipeline.stats()["device_busy"] == 0
        session = emulation.session()
        await emulation.answer(session, 3, 4, 60)
        await asyncio.sleep(1000)
        found = simulate(TUNED, schedule, steps=32)
        want = {"device_busy": found.device, "ducks_busy": found.ducks, "sessions": 0}
        stats = pipeline.stats()
        assert {name: stats[name] for name in want} == pytest.approx(want, abs=0.05)
        assert stats["schedule"] == schedule
        assert (stats["overlap_efficiency"] > 0.8) is (schedule == "wave")
        assert stats["expert_overlap"] == 1  # all rows ask for the same
        async with asyncio.TaskGroup() as group:
            group.create_task(emulation.answer(emulation.session(), 5, 4, 40))
            await asyncio.sleep(0.5)
            stats = pipeline.stats()
            want["sessions"] = 1
            assert {name: stats[name] for name in want} == pytest.approx(want, abs=0.05)

    run(main())


@pytest.mark.parametrize("schedule", ["serial", "wave"])
def test_asks_that_come_to_nothing_are_in_the_trace(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = 2 if schedule == "wave" else 1
    asks = run(record(SMALL, schedule=schedule, draft="mtp", early="off", prompt=1)).asks
    moment = next(
        at
        for at in ((ask.start + ask.end) / 2 for ask in asks)
        if sum(ask.start < at < ask.end for ask in asks) == lanes
    )

    async def cancelled(trace: Trace) -> None:
        emulation = Emulation(SMALL, schedule=schedule, draft="mtp", early="off", trace=trace)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(moment):
                await emulation.answer(emulation.session(), 3, 1, 12)

    trace = Trace(["duck"] * 32)
    run(cancelled(trace))
    spans = [span for span in trace.spans() if span.track == "net"]
    assert [(span.name, span.args["why"]) for span in spans] == [("ask cancelled", "")] * lanes
    assert all(0 <= span.start < span.end for span in spans)

    async def lost(ask: VirtualAsk) -> None:
        await asyncio.sleep(1e-4)
        raise DuckLost("duck 3", 4, 0.1, "gone")

    async def failed(trace: Trace) -> None:
        emulation = Emulation(SMALL, schedule=schedule, draft="mtp", early="off", trace=trace)
        with pytest.raises(DuckLost):
            await emulation.answer(emulation.session(), 3, 4, 12)

    monkeypatch.setattr(VirtualAsk, "arrived", lost)
    trace = Trace(["duck"] * 32)
    run(failed(trace))
    [span] = [span for span in trace.spans() if span.name == "ask failed"]
    assert (span.track, span.layer) == ("net", 2)
    assert "lost duck 3" in span.args["why"]
    assert not trace.asks()


def test_auto_where_nothing_takes_time() -> None:
    free = replace(SMALL, attend=0.0, shared=0.0, expert=0.0, dense=0.0, head=0.0, combine=0.0)
    nothing = replace(free, host=0.0, out_fixed=0.0, out_row=0.0, back_fixed=0.0, back_row=0.0)
    assert run(record(nothing, schedule="auto", draft="auto", tokens=60)).steps
