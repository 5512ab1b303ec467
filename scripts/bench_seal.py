"""What the cluster key costs the host: `python scripts/bench_seal.py [--transport multicast]`.

First the arithmetic alone, for one answer of one duck at DeepSeek-V3's width (7,168 bfloat16):
checking the checksum of a plain one, sealing and opening one. Then whole rounds on this machine,
plain and sealed in turn, with ducks that answer at once: the host's CPU time a round without the
sum, the median over rounds, and of the paired ratios of the two ways.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import uvloop

from duck import log, seal, wire
from duck.kernels import library
from duck.keys import ClusterKey
from duck.placement import Plan, equal_slices
from duck.seal import Opener, Sealer, SessionKeys
from duck.transports.base import Loading
from duck.transports.control import FlockTransport
from duck.transports.listen import DuckPlane, ListeningDuck
from duck.transports.multicast import MulticastDuckPlane, MulticastTransport
from duck.transports.tcp import TcpDuckPlane, TcpTransport
from duck.transports.tls import Credentials, Role

HIDDEN, TOP_K = 7168, 8
KEY = ClusterKey(os.urandom(32))
WAYS = ("plain", "sealed")


class AtOnce:
    """A duck that computes nothing."""

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        return {"warm": True, "resident_bytes": 0, "read_bytes": 0, "received_bytes": 0}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return x


def serve(count: int, told: Connection) -> None:
    """One process with several ducks, each plain and with a key; tells their addresses."""

    async def run() -> None:
        addresses: asyncio.Queue[str] = asyncio.Queue()
        credentials = Credentials(KEY, Role.DUCK)
        tasks, found = [], []
        for way in WAYS:
            for _ in range(count):
                own = credentials if way == "sealed" else None
                tcp = TcpDuckPlane()
                planes: list[DuckPlane] = [tcp, MulticastDuckPlane(tcp)]
                end = ListeningDuck("127.0.0.1:0", addresses.put_nowait, planes, own)
                tasks.append(asyncio.create_task(end.serve(AtOnce())))
                found.append(await addresses.get())
        told.send({"plain": found[:count], "sealed": found[count:]})
        await asyncio.to_thread(told.recv)  # until the bench ends
        for task in tasks:
            task.cancel()

    uvloop.run(run())


async def rounds(transport: FlockTransport, count: int, rows: int) -> list[float]:
    """Host CPU of so many rounds, in microseconds each."""
    x = np.ones((rows, HIDDEN), np.uint16)
    ids = np.tile(np.arange(TOP_K, dtype=np.int32), (rows, 1))
    weights = np.ones((rows, TOP_K), np.float32)
    deadline = asyncio.get_running_loop().time() + 600
    costs = []
    for _ in range(count):
        begun = time.process_time_ns()
        landing = await transport.acquire(rows)
        ask = transport.ask(3, x, ids, weights, landing, deadline=deadline)
        await ask
        costs.append((time.process_time_ns() - begun) / 1e3)
        ask.release()
    return costs


async def whole_rounds(addresses: dict[str, list[str]], arguments: Any) -> dict[str, list[float]]:
    """Medians of host CPU a round, one for each repeat, of both ways."""
    ducks = len(addresses["plain"])
    shape = wire.Shape(HIDDEN, TOP_K, "bfloat16", "bfloat16", max(4, arguments.rows))
    plan = Plan("bench", (3,), 256, 64 * ducks, equal_slices(64 * ducks, ducks), shape)
    make = {"tcp": TcpTransport, "multicast": MulticastTransport}[arguments.transport]
    transports: dict[str, FlockTransport] = {
        "plain": make(addresses["plain"]),
        "sealed": make(addresses["sealed"], credentials=Credentials(KEY, Role.HOST)),
    }
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for transport in transports.values():
        await transport.start(plan)
        await rounds(transport, 20, arguments.rows)
    for _ in range(arguments.repeats):
        for way, transport in transports.items():
            costs = await rounds(transport, arguments.rounds, arguments.rows)
            found[way].append(statistics.median(costs))
    for transport in transports.values():
        await transport.close()
    return found


def microseconds(work: Callable[[int], object], count: int = 2000) -> float:
    """CPU time of one call, the best of five series."""
    best = float("inf")
    for series in range(5):
        begun = time.thread_time_ns()
        for number in range(count):
            work(series * count + number)
        best = min(best, (time.thread_time_ns() - begun) / count / 1e3)
    return best


def arithmetic(rows: int) -> dict[str, float]:
    """Microseconds for one answer."""
    body = os.urandom(wire.STAMP_BYTES + rows * HIDDEN * 2)
    keys = SessionKeys(KEY, bytes(seal.NONCE_BYTES), bytes(seal.ASK_SECRET_BYTES))
    channel = keys.to_host("tcp", 0, bytes(seal.NONCE_BYTES))
    sealer, opener = Sealer(channel), Opener(channel)
    out, row = bytearray(len(body) + seal.TAG_BYTES), bytearray(len(body))

    def head_of(ticket: int, payload: bytes) -> bytes:
        return wire.pack_header(
            wire.Kind.ANSWER, 1, ticket, 3, 0, payload=payload, message_bytes=len(body)
        )

    plain_head, head = head_of(0, body), head_of(0, b"")
    heads = [head_of(ticket, b"") for ticket in range(20_000)]
    sealed = Sealer(channel).seal(head, body)
    return {
        "checksum_us": microseconds(lambda _: wire.check_crc(plain_head, body)),
        "seal_us": microseconds(lambda number: sealer.seal_into(heads[number], body, out)),
        "open_us": microseconds(lambda _: opener.open_into(head, sealed, row)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", choices=("tcp", "multicast"), default="tcp")
    parser.add_argument("--ducks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--rounds", type=int, default=16, help="of one way before the other has its turn"
    )
    parser.add_argument("--repeats", type=int, default=80)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    log.configure("error", json=False)
    library.native()  # compiled now if need be

    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    sizes = [arguments.ducks // 2, arguments.ducks - arguments.ducks // 2]
    for size in filter(None, sizes):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(size, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    told = [pipe.recv() for pipe in pipes]
    addresses = {way: [address for part in told for address in part[way]] for way in WAYS}

    result: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("transport", "ducks", "rows")
    }
    result["one_answer"] = arithmetic(arguments.rows)
    found = uvloop.run(whole_rounds(addresses, arguments))
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join()
    result["host_cpu_us"] = {way: statistics.median(costs) for way, costs in found.items()}
    ratios = [sealed / plain for plain, sealed in zip(*found.values(), strict=True)]
    result["sealed_to_plain"] = statistics.median(ratios)
    quarters = statistics.quantiles(ratios, n=4)
    result["sealed_to_plain_quartiles"] = [quarters[0], quarters[2]]
    result["load_average"] = os.getloadavg()[0]
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{arguments.transport}, {arguments.ducks} ducks, {arguments.rows} rows; "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    for name, value in result["one_answer"].items():
        print(f"  one answer, {name.removesuffix('_us'):9} {value:8.2f} us")
    for way, value in result["host_cpu_us"].items():
        print(f"  a round, {way:11}    {value:8.1f} us of host CPU")
    low, high = result["sealed_to_plain_quartiles"]
    ratio = f"{result['sealed_to_plain']:.3f}, half of the turns {low:.3f}..{high:.3f}"
    print(f"  sealed / plain              {ratio}")


if __name__ == "__main__":
    main()
