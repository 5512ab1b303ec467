"""`duck bench transport`: what a round of asks and answers costs the host, beside plain sockets.

Ducks are processes that answer at once (bench_ducks.py). The yardstick is the least that Python can
do with the same bytes and the same ducks: a loop over epoll that sends an ask's frame to every duck
and receives the answers into their rows with recv_into; it checks nothing and awaits nothing. Both
are measured in turns of a few rounds within the same run, because the speed of a shared machine
drifts.

With `keyed`, a round whose frames are sealed has the same round without a key as one more
yardstick.

With `losses`, datagrams are dropped at the host's sockets, each for itself in both directions; an
ask that is dropped there is lost to all ducks. Only multicast has datagrams of ours to drop: under
tcp the system sends again, and shm has nothing to lose. `faults` are those of faulty.py: datagrams
of multicast meet all of them, verified answers of the others those that must not be noticed.

The host's processor time is that of its process: of the event loop's thread and of the one that may
receive; adding up the answers is timed for itself, and so is, of shm's short ones, checking them:
they are copied and checked as they are added. With 32 ducks on a few processors the latency is
not that of 32 machines: the host's time is the figure to look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import platform
import secrets
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from duck import wire
from duck.config import Network
from duck.errors import TransportError
from duck.kernels import library
from duck.keys import KEY_BYTES, ClusterKey
from duck.placement import Plan, equal_slices
from duck.transports.base import SMALL_ROWS, Rows
from duck.transports.bench_ducks import DTYPE, HIDDEN, LAYERS, SEALED_TICKETS, SHAPE
from duck.transports.control import FlockTransport, Plane
from duck.transports.faulty import Faults, FaultyPlane, FaultyUdpSocket, spoil_datagram
from duck.transports.link import data_frames
from duck.transports.multicast import MulticastPlane
from duck.transports.planes import host_plane
from duck.transports.tls import Credentials, Role

TOP_K = 8  # DeepSeek-V3
LOSSY = ("multicast",)  # transports whose datagrams can be dropped here
SEALED = ("tcp", "multicast")  # which a key changes
HARMFUL = ("drop", "corrupt")  # faults that end a flock under the others
TURN = 16  # rounds of one side before the other has its turn
WARM_ROUNDS = 20
_START_S = 60.0
_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Row:
    """One line of the report; times in microseconds, a round is one ask to all ducks."""

    transport: str
    ducks: int
    rows: int
    loss: float  # share of the datagrams that were dropped
    faulty: bool  # whether `faults` were at work
    keyed: bool
    rounds: int
    p50_us: float
    p99_us: float
    host_cpu_us: float  # of the host's process, without the sum
    sum_us: float  # its time for adding up the answers
    rounds_s: float
    calls: float | None  # system calls that send and receive, a round
    packets: float | None  # that the loopback interface carried, a round
    raw_p50_us: float
    raw_cpu_us: float
    ratio: float  # median over the turns: host_cpu_us / raw_cpu_us
    to_plain: float | None  # with a key, the same: host_cpu_us / that without a key


def bench_transport(
    *,
    transports: Sequence[str] = ("shm", "tcp"),
    ducks: Sequence[int] = (1, 2, 8, 32),
    rows: Sequence[int] = (1, 2, 328),
    losses: Sequence[float] = (),
    faults: Mapping[str, float] | None = None,
    keyed: bool = False,
    seconds: float = 2.0,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every combination for so many seconds; blocking, on an event loop of its own.

    faults: arguments of `faulty.Faults`; every combination is measured with them as well.
    keyed: measure asks of `SMALL_ROWS` at most with a cluster key too, where it changes anything.

    Raises:
        TransportError: the ducks did not start.
    """
    tries = (None, faults) if faults else (None,)
    secret = secrets.token_bytes(KEY_BYTES)
    key = ClusterKey(secret)
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    host, others = (usable[:1], usable[1:]) if len(usable) > 1 else ([], [])
    if host:
        os.sched_setaffinity(0, host)
    if not library.is_loaded():
        note("loading the native library")
        library.native()  # which may have to be compiled
    measured: list[Row] = []
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            for count in ducks:
                with _ducks(count, others, secret) as addresses:
                    for transport in transports:
                        cells = [(0.0, bad, False) for bad in tries] + [
                            (loss, None, False) for loss in losses if transport in LOSSY
                        ]
                        if keyed and transport in SEALED:
                            cells.insert(1, (0.0, None, True))
                        for size, (loss, bad, sealed) in itertools.product(rows, cells):
                            if (sealed or loss) and size > SMALL_ROWS:
                                continue  # multicast sends them by tcp; sealed they are too many
                            cell = _Cell(transport, count, size, loss, bad is not None, sealed)
                            note(str(cell))
                            row = _measure(cell, addresses, seconds, bad or {"drop": loss}, key)
                            measured.append(runner.run(row))
    finally:
        if host:
            os.sched_setaffinity(0, usable)
    return {
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "load": list(os.getloadavg()),
        "hidden": HIDDEN,
        "top_k": TOP_K,
        "dtype": DTYPE,
        "rows": [asdict(row) for row in measured],
    }


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


class _Addresses(NamedTuple):
    """Where a process is to be had as what."""

    duck: str
    keyed: str
    yardstick: str


@contextlib.contextmanager
def _ducks(count: int, processors: Sequence[int], key: bytes) -> Iterator[list[_Addresses]]:
    """Start ducks."""
    told = json.dumps({"count": count, "processors": list(processors), "key": key.hex()})
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "duck.transports.bench_ducks", told],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        found: dict[int, _Addresses] = {}
        begun = time.monotonic()
        while len(found) < count:
            line = process.stdout.readline()
            if not line or time.monotonic() - begun > _START_S:
                raise TransportError("the bench's ducks did not start")
            duck = json.loads(line)
            found[duck["duck"]] = _Addresses(*duck["addresses"])
        yield [found[number] for number in range(count)]
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class _Cell:
    """What is measured."""

    transport: str
    ducks: int
    rows: int
    loss: float
    faulty: bool
    keyed: bool

    def __str__(self) -> str:
        how = f", {self.loss:.2%} lost" if self.loss else ", with faults" if self.faulty else ""
        how = ", with a key" if self.keyed else how
        return f"{self.transport}, {self.ducks} ducks, {self.rows} rows{how}"


@dataclass
class _Side:
    """What one side of the comparison took, turn by turn."""

    latencies: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds a round
    sums: list[float] = field(default_factory=list)


async def _measure(
    cell: _Cell,
    addresses: Sequence[_Addresses],
    seconds: float,
    faults: Mapping[str, float],
    key: ClusterKey,
) -> Row:
    ducks, size = cell.ducks, cell.rows
    shape = wire.Shape(HIDDEN, TOP_K, DTYPE, DTYPE, max(size, 1))
    plan = Plan(
        "bench", tuple(range(LAYERS)), 256, ducks * 64, equal_slices(ducks * 64, ducks), shape
    )
    rng = np.random.default_rng(1)
    x = wire.to_wire(rng.standard_normal((size, HIDDEN), np.float32), DTYPE)
    ids = np.argsort(rng.random((size, 256)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = rng.random((size, TOP_K), np.float32)
    async with contextlib.AsyncExitStack() as opened:
        rounds_of = partial(_Rounds, x=x, ids=ids, weights=weights)
        flock = await opened.enter_async_context(_flock(cell, addresses, plan, faults, key))
        us, plain = rounds_of(flock), None
        if cell.keyed:
            bare = _flock(replace(cell, keyed=False), addresses, plan, faults, key)
            plain = rounds_of(await opened.enter_async_context(bare))
        yardstick = _Yardstick([each.yardstick for each in addresses], plan, size)
        opened.callback(yardstick.close)
        # Few of long ones: while the yardstick has its turn, nobody hears our ducks.
        turn, lead, warm = (TURN, LAYERS, WARM_ROUNDS) if size * ducks < 64 else (2, 1, LAYERS)
        ours, unkeyed, theirs = _Side(), _Side(), _Side()
        for each in filter(None, (us, plain)):
            await each.turn(_Side(), warm)
        yardstick.turn(_Side(), warm)
        begun = time.perf_counter()
        most = (SEALED_TICKETS - warm) // (lead + turn) if cell.keyed else math.inf
        calls = packets = 0
        while (turns := len(ours.cpu)) < most and (
            time.perf_counter() - begun < seconds or turns < 3
        ):
            # The others had their turns, and emptied the caches.
            await us.turn(_Side(), lead)
            before = _calls(flock), _packets()
            await us.turn(ours, turn)
            calls += _calls(flock) - before[0]
            packets += _packets() - before[1]
            if plain:
                await plain.turn(_Side(), lead)
                await plain.turn(unkeyed, turn)
            yardstick.turn(_Side(), lead)
            yardstick.turn(theirs, turn)
    rounds = len(ours.latencies)
    latencies = np.array(ours.latencies) * 1e6
    return Row(
        **asdict(cell), rounds=rounds,
        p50_us=float(np.percentile(latencies, 50)),
        p99_us=float(np.percentile(latencies, 99)),
        host_cpu_us=statistics.median(ours.cpu) * 1e6,
        sum_us=statistics.median(ours.sums) * 1e6,
        rounds_s=rounds / sum(ours.latencies),
        calls=calls / rounds,
        packets=packets / rounds if sys.platform == "linux" else None,
        raw_p50_us=float(np.percentile(np.array(theirs.latencies) * 1e6, 50)),
        raw_cpu_us=statistics.median(theirs.cpu) * 1e6,
        ratio=_ratio(ours, theirs),
        to_plain=_ratio(ours, unkeyed) if cell.keyed else None,
    )  # fmt: skip


def _ratio(one: _Side, other: _Side) -> float:
    """Of their processor time, the median over the turns."""
    return statistics.median(a / b for a, b in zip(one.cpu, other.cpu, strict=True))


@contextlib.asynccontextmanager
async def _flock(
    cell: _Cell,
    addresses: Sequence[_Addresses],
    plan: Plan,
    faults: Mapping[str, float],
    key: ClusterKey,
) -> AsyncIterator[FlockTransport]:
    plane: Plane = host_plane(cell.transport, Network())
    network: list[Faults[Any]] = []
    if cell.loss or cell.faulty:
        settings: dict[str, Any] = {"seed": 1, **faults}
        seed = int(settings.pop("seed"))
        if cell.transport in LOSSY:
            network = [Faults(seed + n, **settings, spoil=spoil_datagram) for n in (0, 1)]
            out, back = network
            plane = MulticastPlane(make_socket=partial(FaultyUdpSocket, out=out, back=back))
        else:
            harmless = {name: n for name, n in settings.items() if name not in HARMFUL}
            plane = FaultyPlane(plane, answers=Faults(seed, **harmless))
    flock = FlockTransport(
        [each.keyed if cell.keyed else each.duck for each in addresses], plane,
        credentials=Credentials(key, Role.HOST) if cell.keyed else None,
    )  # fmt: skip
    for faults_of_way in network:
        faults_of_way.at_work = False  # nothing could be agreed on at the worst of them
    try:
        await flock.start(plan)
        for faults_of_way in network:
            faults_of_way.at_work = True
        yield flock
    finally:
        await flock.close()


class _Rounds:
    """Ours, asked about one layer after the other: what the ducks sealed goes by it."""

    def __init__(
        self, flock: FlockTransport, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> None:
        self._flock, self._input = flock, (x, ids, weights)
        self._layers = itertools.cycle(range(LAYERS))

    async def turn(self, side: _Side, rounds: int) -> None:
        flock, size, sums = self._flock, len(self._input[0]), 0.0
        loop = asyncio.get_running_loop()
        cpu = time.process_time()
        for layer in itertools.islice(self._layers, rounds):
            begun = time.perf_counter()
            rows = await flock.acquire(size)
            ask = flock.ask(layer, *self._input, rows, deadline=loop.time() + _DEADLINE_S)
            await ask
            landed = time.perf_counter()
            side.latencies.append(landed - begun)
            sum_begun = time.thread_time()
            rows.total(size)
            sums += time.thread_time() - sum_begun
            ask.release()
        side.cpu.append((time.process_time() - cpu - sums) / rounds)
        side.sums.append(sums / rounds)


class _Yardstick:
    """Plain sockets and epoll."""

    def __init__(self, addresses: Sequence[str], plan: Plan, size: int) -> None:
        shape = plan.shape
        frames = data_frames(wire.Kind.ASK, 0, 1, 0, wire.HOST, bytes(shape.ask_bytes(size)))
        self._ask = b"".join(frames)
        body = wire.STAMP_BYTES + shape.answer_bytes(size)
        self._answer = body + wire.HEADER_BYTES * -(-body // wire.FRAME_LIMIT)
        rows = Rows(plan.ducks, plan.shape, size)
        self._epoll = select.epoll()
        self._links: list[socket.socket] = []
        self._places: dict[int, tuple[socket.socket, memoryview]] = {}
        for duck, address in enumerate(addresses):
            host, port = address.rsplit(":", 1)
            link = socket.create_connection((host, int(port)))
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sendall(SHAPE.pack(shape.hidden, shape.top_k, size))
            self._links.append(link)
            self._epoll.register(link.fileno(), select.EPOLLIN)
            self._places[link.fileno()] = (link, rows.landing[duck])

    def turn(self, side: _Side, rounds: int) -> None:
        cpu = time.process_time()
        for _ in range(rounds):
            begun = time.perf_counter()
            self._round()
            side.latencies.append(time.perf_counter() - begun)
        side.cpu.append((time.process_time() - cpu) / rounds)

    def _round(self) -> None:
        for link in self._links:
            link.sendall(self._ask)
        want = self._answer
        have = dict.fromkeys(self._places, 0)
        left = len(have)
        poll, places = self._epoll.poll, self._places
        while left:
            for descriptor, _ in poll():
                link, place = places[descriptor]
                # Headers have no place in the row; one stretch of the answer's size is as good.
                got = have[descriptor]
                room = min(want - got, len(place))
                got += link.recv_into(place, room)
                have[descriptor] = got
                if got == want:
                    left -= 1

    def close(self) -> None:
        for link in self._links:
            link.close()
        self._epoll.close()


def _calls(flock: FlockTransport) -> int:
    return int(flock.stats().get("calls", 0))


def _packets() -> int:
    """Packets that the loopback interface has carried."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[1])
    return 0


def _way(row: Mapping[str, Any]) -> str:
    return "faults" if row["faulty"] else "keyed" if row["keyed"] else ""


def tables(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"hidden {report['hidden']}, top {report['top_k']}, {report['dtype']}; "
        f"{report['processors']} processors, load {report['load'][0]:.1f}",
        "",
        f"{'':11}{'ducks':>5}{'rows':>5}{'lost':>7}{'p50 us':>10}{'p99 us':>10}"
        f"{'host us':>9}{'sum us':>8}"
        f"{'rounds/s':>10}{'calls':>7}{'packets':>9}{'raw p50':>10}{'raw us':>9}{'ratio':>7}"
        f"{'to plain':>10}",
    ]
    lines += [
        f"{row['transport']:11}{row['ducks']:5}{row['rows']:5}"
        + (f"{row['loss']:7.2%}" if row["loss"] else f"{_way(row):>7}")
        + f"{row['p50_us']:10.0f}{row['p99_us']:10.0f}{row['host_cpu_us']:9.0f}{row['sum_us']:8.0f}"
        f"{row['rounds_s']:10.0f}{row['calls']:7.1f}"
        + ("" if row["packets"] is None else f"{row['packets']:9.1f}")
        + f"{row['raw_p50_us']:10.0f}{row['raw_cpu_us']:9.0f}{row['ratio']:7.2f}"
        + (f"{row['to_plain']:10.2f}" if row["keyed"] else "")
        for row in report["rows"]
    ]
    return "\n".join(lines)
