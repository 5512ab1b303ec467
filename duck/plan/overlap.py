"""`duck bench pipeline`: how close the real pipeline comes to what its schedules promise.

The pipeline, flock, row sets and event loop are the real ones; the device and the ducks take given
times (`duck.emulate`). What is left between a measured step and the simulated one is ours: the
loop, the queues, the wake-ups.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from duck.device import switching_fast
from duck.emulate import EmulatedDevice, EmulatedModel, EmulatedTransport, plan_of
from duck.errors import DuckError
from duck.flock import Flock
from duck.meter import Meter
from duck.pipeline import Pipeline
from duck.plan.closed import ORIGINAL, TUNED, Times, bound
from duck.plan.simulate import simulate
from duck.recording import recording_of
from duck.sampling import Sampling
from duck.summary import summarize
from duck.trace import Trace

TIMES = {"tuned": TUNED, "original": ORIGINAL}
LOOP_STEPS = 8  # of each session, in which the event loop's work is timed
SESSIONS = {"serial": 1, "batch": 1, "wave": 1, "pingpong": 2}


@dataclass(frozen=True)
class Row:
    """One schedule. Times in milliseconds, divided by the scale; a step is one of every session."""

    schedule: str
    sessions: int
    step_ms: float  # median
    simulated_ms: float
    bound_ms: float  # what no order of the same work can beat
    ratio: float  # measured by simulated
    tok_s: float
    device: float  # share of the time
    ducks: float
    idle_of_busiest: float
    overlap_efficiency: float
    loop_us: float  # the event loop's processor time for an ask and its answers
    late_ms: float  # how late the loop heard of the device: 99 of 100 times less; not scaled


def bench_pipeline(
    times: Times,
    *,
    schedules: Sequence[str] = tuple(SESSIONS),
    ducks: int = 32,
    steps: int = 4,
    scale: float = 30.0,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Run every schedule with drafts.

    Args:
        times: of the device, the ducks and the wire.
        schedules: of serial, batch, wave and pingpong, the last one with two sessions.
        ducks: how many answer.
        steps: of each session that are timed, after one that is not.
        scale: how much longer everything takes: timers and threads are late by fixed amounts.
        folder: where to write the traces, one a schedule.
        note: called with what is about to be measured.

    Raises:
        DuckError: two schedules settled other tokens.
    """
    rows, tokens = [], {}
    for schedule in schedules:
        simulated = simulate(times, schedule, sessions=SESSIONS[schedule], steps=steps + 1)
        note(f"{schedule}: about {simulated.step_ms * scale * (steps + 1) / 1e3:.0f} s")
        run = _Run(times, schedule, ducks, steps, scale)
        run.run()
        tokens[schedule] = run.tokens
        if folder is not None:
            run.trace.write(folder / f"{schedule}.json.gz")
        # The loop's own work is timed without pauses: after each one it would be slow with cold
        # caches, which no duck and no device waits for.
        busy = _Run(times, schedule, ducks, LOOP_STEPS, 0.0)
        with _one_processor():
            busy.run()
        rows.append(run.row(simulated.step_ms, busy.loop_us))
    if len(set(map(tuple, tokens.values()))) > 1:
        raise DuckError(f"schedules settled other tokens: {tokens}")
    return rows


@contextlib.contextmanager
def _one_processor() -> Iterator[None]:
    """Keep this process's new threads on one processor, where a system can.

    On several, threads that wake each other without a pause cost up to twice as much, since their
    memory travels with them: a price of this benchmark, whose device and ducks do nothing.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class _Run:
    """One schedule, run once."""

    def __init__(self, times: Times, schedule: str, ducks: int, steps: int, scale: float) -> None:
        self._times, self._schedule, self._steps, self._scale = times, schedule, steps, scale
        self._plan = plan_of(times, ducks)
        self._sessions = SESSIONS[schedule]
        self.trace = Trace(tuple(f"duck {number}" for number in range(ducks)))
        self.trace.about(model="emulated", scale=scale)
        self.tokens: list[int] = []
        self._loop_s = self._late_s = 0.0

    def run(self) -> None:
        """Make the steps, on an event loop as the command line has it."""
        factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        with contextlib.suppress(ImportError):
            import uvloop

            factory = uvloop.new_event_loop
        with switching_fast(), asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self._go())

    @property
    def loop_us(self) -> float:
        """The event loop's processor time for an ask, with all that belongs to it."""
        return self._loop_s / max(1, len(self.trace.asks())) * 1e6

    async def _go(self) -> None:
        device = EmulatedDevice(self._times, self._scale)
        flock = Flock(EmulatedTransport(self._times, self._scale), self._plan)
        try:
            await flock.start()
            model = EmulatedModel(self._times)
            pipeline = Pipeline(
                model, device, flock,
                schedule=self._schedule, draft="mtp", early="off", trace=self.trace,
            )  # fmt: skip
            begun = time.thread_time()
            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(self._answer(pipeline, model)) for _ in range(self._sessions)
                ]
            self._loop_s = time.thread_time() - begun
            self._late_s = pipeline.stages.late_p99_s()
            self.tokens = answers[0].result()
        finally:
            await flock.close()
            device.close()

    async def _answer(self, pipeline: Pipeline, model: EmulatedModel) -> list[int]:
        """Decode so many steps, whatever they settle; the tokens settled by then by all schedules.

        A step settles one token or two.
        """
        meter, tokens = Meter(), []
        most = 2 * (self._steps + 1) + 2
        decode = pipeline.decode(model.session(), Sampling(), most, meter)
        async with aclosing(decode):
            async for settled in decode:
                tokens.append(settled.token)
                if meter.steps > self._steps:
                    break
        return tokens[: self._steps + 1]

    def row(self, simulated_ms: float, loop_us: float) -> Row:
        ends = sorted(span.end for span in self.trace.spans() if span.name == "step")
        # From an end to the next but so many of all sessions': one step of each lies between.
        spans = [after - end for end, after in zip(ends, ends[self._sessions :], strict=False)]
        step_ms = statistics.median(spans) * 1e3 / self._scale
        figures = summarize(recording_of(self.trace))
        busy = {stage.name: stage.share for stage in figures.stages}
        together = self._schedule != "wave"
        return Row(
            schedule=self._schedule,
            sessions=self._sessions,
            step_ms=step_ms,
            simulated_ms=simulated_ms,
            bound_ms=self._sessions * bound(self._times, rows=2, together=together),
            ratio=step_ms / simulated_ms,
            tok_s=self._sessions * self._times.tokens(draft=True) / step_ms * 1e3,
            device=busy["device"],
            ducks=busy["ducks"],
            idle_of_busiest=figures.idle_of_busiest,
            overlap_efficiency=figures.overlap_efficiency,
            loop_us=loop_us,
            late_ms=self._late_s * 1e3,
        )


def tables(rows: Sequence[Row]) -> list[Table]:
    """The rows for people."""
    steps = _table(
        "step ms", "simulated", "ratio", "bound", "tok/s", "device", "ducks", "idle", "overlap"
    )
    loop = _table("loop us an ask", "late ms")
    for row in rows:
        who = row.schedule + (f" of {row.sessions}" if row.sessions > 1 else "")
        steps.add_row(
            who, f"{row.step_ms:.1f}", f"{row.simulated_ms:.1f}", f"{row.ratio:.3f}",
            f"{row.bound_ms:.1f}", f"{row.tok_s:.1f}", f"{row.device:.0%}", f"{row.ducks:.0%}",
            f"{row.idle_of_busiest:.0%}", f"{row.overlap_efficiency:.0%}",
        )  # fmt: skip
        loop.add_row(who, f"{row.loop_us:.0f}", f"{row.late_ms:.2f}")
    return [steps, loop]


def _table(*names: str) -> Table:
    shown = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    shown.add_column("schedule", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown
