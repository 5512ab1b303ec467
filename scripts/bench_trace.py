"""What recording a trace costs a step: `scripts/bench_trace.py [--steps N] [--json]`.

Steps with and without recording alternate within one run, in pairs, the first of a pair in turn the
traced and the untraced one, so that a machine whose speed drifts treats both alike; a figure is the
median over the pairs of traced by untraced. The emulated pipeline has 32 ducks, 58 layers with
routed experts and the times of a well-tuned GPU, unscaled; the shipped model has two real ducks on
this machine and no drafts, so that each token is a step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import duck
from duck.device import switching_fast
from duck.emulate import EmulatedDevice, EmulatedModel, EmulatedTransport, plan_of
from duck.flock import Flock
from duck.meter import Meter
from duck.pipeline import Pipeline
from duck.plan.closed import TUNED
from duck.sampling import Sampling
from duck.trace import Trace

WARM = 4  # steps, while caches and threads warm up


async def emulated(schedule: str, steps: int) -> list[float]:
    """Traced by untraced, of each pair of the emulated pipeline's steps."""
    trace = Trace([f"duck {number}" for number in range(32)])

    async def ends() -> AsyncGenerator[None, None]:
        flock = Flock(EmulatedTransport(TUNED, 1.0), plan_of(TUNED, 32))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(flock.close)
            device = EmulatedDevice(TUNED, 1.0)
            stack.callback(device.close)
            await flock.start()
            model, meter = EmulatedModel(TUNED), Meter()
            pipeline = Pipeline(
                model, device, flock, schedule=schedule, draft="mtp", early="off", trace=trace
            )
            decode = pipeline.decode(model.session(), Sampling(), 1 << 30, meter)
            done = 0
            async with aclosing(decode):
                async for _ in decode:
                    if meter.steps > done:
                        done = meter.steps
                        yield

    return await pairs(ends(), trace, steps)


async def demo(steps: int) -> list[float]:
    """The same of the shipped model's steps, with two ducks in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace.json")
        async with duck.Engine.open("demo", schedule="batch", draft="off", trace=path) as engine:

            async def ends() -> AsyncGenerator[None, None]:
                sampling = duck.Sampling(max_tokens=steps + WARM + 1, ignore_eos=True)
                async with aclosing(engine.stream("Is 391 prime?", sampling)) as pieces:
                    async for _ in pieces:
                        yield

            return await pairs(ends(), engine.trace, steps)


async def pairs(ends: AsyncGenerator[None, None], trace: Trace, steps: int) -> list[float]:
    """Traced by untraced; ends: a moment after each step, until which nothing else happens."""
    seconds: list[float] = []
    last = time.perf_counter()
    async with aclosing(ends):
        async for _ in ends:
            seconds.append(time.perf_counter() - last)
            if len(seconds) == steps + WARM:
                break
            trace.on = traced(len(seconds))
            last = time.perf_counter()
    found = []
    for first in range(WARM, len(seconds) - 1, 2):
        on, off = seconds[first : first + 2][:: 1 if traced(first) else -1]
        found.append(on / off)
    return found


def traced(step: int) -> bool:
    """Whether a step is recorded: on off, off on, on off, ..."""
    return step % 4 in (0, 3)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--json", action="store_true")
arguments = parser.parse_args()

ratios: dict[str, list[float]] = {}
with switching_fast():
    for schedule in ("batch", "wave"):
        name = f"emulated, {schedule}"
        ratios[name] = asyncio.run(emulated(schedule, arguments.steps))
ratios["the shipped model"] = asyncio.run(demo(arguments.steps))

if arguments.json:
    print(json.dumps(ratios))
else:
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:20} traced by untraced {middle:.3f} ({low:.3f} to {high:.3f})")
