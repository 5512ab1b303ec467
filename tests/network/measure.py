"""What a lost packet costs: rounds over namespaces, multicast beside tcp, as a Markdown table.

`sudo python -m tests.network.measure [--ducks 8] [--mtu 1500] [--rounds 2000]`. Every packet of an
Ethernet is one here, and each is lost by itself; all machines share the processors of this one, so
the times at no loss are this machine's, and only the difference is the network's. The host has the
first processor for itself; the ducks, which answer at once without computing, share the others.
"of 200": the median of the p99 of every 200 rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

import numpy as np
import uvloop

from duck.config import Network
from duck.kernels import library
from duck.placement import Plan
from duck.transports.control import FlockTransport
from duck.transports.planes import host_plane
from tests.flocks import plan_for
from tests.network.pond import Pond, why_not

LOSSES = "0,0.1,1,5"
WARM_ROUNDS = 200
# A machine that stands still now and then spoils the p99 of all rounds, not that of most blocks.
BLOCK = 200


async def rounds(transport: FlockTransport, plan: Plan, count: int) -> list[float]:
    """Milliseconds of each round of one row."""
    x = np.full((1, plan.shape.hidden), 0x3F80, np.uint16)
    ids, weights = np.zeros((1, plan.shape.top_k), np.int32), np.ones((1, plan.shape.top_k))
    took = []
    for _ in range(count):
        rows = await transport.acquire(1)
        begun = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + 60
        ask = transport.ask(1, x, ids, weights.astype(np.float32), rows, deadline=deadline)
        await ask
        took.append((time.perf_counter() - begun) * 1e3)
        ask.release()
    return took


async def measure(name: str, pond: Pond, losses: list[float], count: int, longest_s: float) -> None:
    """One transport at all losses; a loss ends early when it takes too long."""
    plan = plan_for(
        pond.ducks, hidden=7168, max_rows=64, ask_dtype="bfloat16", answer_dtype="bfloat16"
    )
    transport = FlockTransport(pond.addresses(), host_plane(name, Network()))
    await transport.start(plan)
    await rounds(transport, plan, WARM_ROUNDS)
    for percent in losses:
        pond.lose(percent)
        before, cpu = dict(transport.stats()), time.process_time()
        took: list[float] = []
        end = time.monotonic() + longest_s
        while len(took) < count and time.monotonic() < end:
            took += await rounds(transport, plan, 10)
        cpu_us = (time.process_time() - cpu) / len(took) * 1e6
        after = transport.stats()
        again = [
            f"{(after[key] - before[key]) / len(took):.3f}" if key in after else "-"
            for key in ("nacks", "rnacks", "probes", "resent")
        ]
        p50, p99 = np.percentile(took, [50, 99])
        blocks = [took[at : at + BLOCK] for at in range(0, len(took), BLOCK)]
        p99s = [np.percentile(block, 99) for block in blocks if len(block) == BLOCK]
        calm = f"{np.median(p99s):.2f}" if p99s else "-"
        cells = [
            name, f"{percent:g} %", str(len(took)), f"{p50:.2f}", f"{p99:.2f}", calm,
            f"{max(took):.2f}",
            f"{cpu_us:.0f}", *again,
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
    pond.lose(0)
    await transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ducks", type=int, default=8)
    parser.add_argument("--mtu", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--losses", default=LOSSES, help="percent")
    parser.add_argument("--seconds", type=float, default=20.0, help="longest for one line")
    parser.add_argument("--transports", default="multicast,tcp")
    arguments = parser.parse_args()
    library.native()  # as every command loads it: both ends agree on its checksum
    if told := why_not():
        parser.error(told)
    print(f"{arguments.ducks} ducks, MTU {arguments.mtu}, {os.cpu_count()} processors,")
    print(f"load {os.getloadavg()[0]:.1f} before; milliseconds; messages and fragments a round\n")
    print(
        f"| transport | loss | rounds | p50 | p99 | of {BLOCK} | max | host CPU us | NACK | RNACK "
        "| probe | resent |"
    )
    print("|" + "---|" * 12)
    losses = [float(percent) for percent in arguments.losses.split(",")]
    pond = Pond(arguments.ducks, mtu=arguments.mtu)
    processors = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, processors[1:] or processors)  # what is started has these
        pond.start_fake_ducks("--echo")
        os.sched_setaffinity(0, processors[:1])
        with pond.on_host(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for name in arguments.transports.split(","):
                runner.run(measure(name, pond, losses, arguments.rounds, arguments.seconds))
    finally:
        pond.close()


if __name__ == "__main__":
    main()
