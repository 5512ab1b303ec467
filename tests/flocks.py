"""Small fake ducks behind real transports, for tests of the transports' contract and of failures.

A fake duck's partial sums are easy to know: x * (number + 1) + layer. It can be told to hold the
asks of a layer until it is let go, so that a test decides what happens in what order; nothing here
sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import structlog

from duck import wire
from duck.config import Network
from duck.errors import DuckLost
from duck.kernels import library
from duck.keys import ClusterKey
from duck.placement import Plan, equal_slices
from duck.transports import receive
from duck.transports.base import Ask, Transport
from duck.transports.control import FlockTransport, Plane
from duck.transports.faulty import Faults, FaultyPlane, FaultyUdpSocket, disturb, spoil_datagram
from duck.transports.listen import ListeningDuck
from duck.transports.loopback import LoopbackTransport
from duck.transports.multicast import MulticastPlane, MulticastTransport
from duck.transports.planes import duck_planes
from duck.transports.shm import ShmPlane, ShmTransport
from duck.transports.tcp import TcpPlane, TcpTransport
from duck.transports.tls import Credentials, Role

WAIT_S = 60.0  # what a test waits for comes soon, however busy the machine is, or never
KEY = ClusterKey(bytes(range(32)))


def plan_for(
    ducks: int,
    *,
    hidden: int = 8,
    max_rows: int = 16,
    ask_dtype: str = "float32",
    answer_dtype: str = "float32",
    model: str = "fake",
) -> Plan:
    """A plan for fake ducks: ten layers of four experts, two for each row."""
    shape = wire.Shape(hidden, 2, ask_dtype, answer_dtype, max_rows)
    return Plan(model, tuple(range(10)), 4, ducks * 64, equal_slices(ducks * 64, ducks), shape)


def info_logger() -> Any:
    """A logger that tells more than tests usually hear."""
    wrapper = structlog.make_filtering_bound_logger(logging.INFO)
    return structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=wrapper)


class FakeDuck:
    """A `Handler`; `begun` gets the layer of every ask it begins."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.begun: asyncio.Queue[int] = asyncio.Queue()
        self.attached: list[tuple[Plan, int]] = []
        self.partial: Callable[[int, np.ndarray], np.ndarray] = self._partial
        self.die: Callable[[], object] | None = None  # as if its process was killed, if it can
        self._loop = asyncio.get_running_loop()
        self._held: dict[int, threading.Event] = {}

    def _partial(self, layer: int, x: np.ndarray) -> np.ndarray:
        return x * np.float32(self.number + 1) + np.float32(layer)

    def hold(self, layer: int) -> None:
        """Asks for this layer wait in the duck's worker until `let_go`."""
        self._held[layer] = threading.Event()

    def let_go(self, layer: int | None = None) -> None:
        """End the wait of one layer, or of all."""
        for held, event in self._held.items():
            if layer is None or held == layer:
                event.set()

    async def attach(
        self, plan: Plan, duck: int, progress: Callable[[int, int], None]
    ) -> Mapping[str, Any]:
        warm = bool(self.attached)
        self.attached.append((plan, duck))
        return {"warm": warm, "resident_bytes": 0}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        with contextlib.suppress(RuntimeError):  # the test is over
            self._loop.call_soon_threadsafe(self.begun.put_nowait, layer)
        if layer in self._held:
            self._held[layer].wait(WAIT_S)
        return self.partial(layer, x)


@contextlib.asynccontextmanager
async def loopback(ducks: Sequence[FakeDuck], plan: Plan) -> AsyncIterator[Transport]:
    """Ducks inside the transport itself."""
    transport = LoopbackTransport(ducks)
    try:
        await transport.start(plan)
        yield transport
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def listening(
    handler: Any, listen: str = "127.0.0.1:0", key: ClusterKey | None = None
) -> AsyncIterator[tuple[str, ListeningDuck]]:
    """A duck's end in this process, with the address it listens on."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    credentials = Credentials(key, Role.DUCK) if key else None
    end = ListeningDuck(listen, ready.set_result, duck_planes(), credentials)
    serving = asyncio.create_task(end.serve(handler))
    if isinstance(handler, FakeDuck):
        handler.die = serving.cancel
    try:
        await asyncio.wait([ready, serving], timeout=WAIT_S, return_when="FIRST_COMPLETED")
        if serving.done():
            await serving
        yield ready.result(), end
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@contextlib.asynccontextmanager
async def _behind_ports(
    make: Callable[..., FlockTransport],
    ducks: Sequence[FakeDuck],
    plan: Plan,
    key: ClusterKey | None = None,
) -> AsyncIterator[Transport]:
    """Ducks behind ports of this machine."""
    async with contextlib.AsyncExitStack() as stack:
        ends = [await stack.enter_async_context(listening(duck, key=key)) for duck in ducks]
        credentials = Credentials(key, Role.HOST) if key else None
        transport = make([address for address, _ in ends], credentials=credentials)
        stack.push_async_callback(transport.close)
        await transport.start(plan)
        yield transport


class _Faulty(FlockTransport):
    """Over a plane that delays, reorders and repeats, which nobody may notice."""

    plane_class: type[Plane]

    def __init__(self, addresses: Sequence[str], **more: Any) -> None:
        plane = FaultyPlane(self.plane_class(), asks=_harmless(1), answers=_harmless(2))
        super().__init__(addresses, plane, **more)


def _harmless(seed: int) -> Faults[Any]:
    return Faults(seed, duplicate=0.0 if seed == 1 else 0.2, reorder=0.2, delay_s=0.002)


class FaultyTcp(_Faulty):
    plane_class = TcpPlane


class FaultyShm(_Faulty):
    plane_class = ShmPlane


@contextlib.asynccontextmanager
async def faulty_loopback(ducks: Sequence[FakeDuck], plan: Plan) -> AsyncIterator[Transport]:
    """Ducks inside the transport, their answers noted late, twice and in another order."""
    transport = LoopbackTransport(ducks)
    end: Callable[[], None] | None = None
    try:
        await transport.start(plan)
        end = disturb(transport.asks, _harmless(3))
        yield transport
    finally:
        if end:
            end()
        await transport.close()


class Multicast(MulticastTransport):
    """On the loopback interface with the packets of an Ethernet, so that messages are cut."""

    def __init__(self, addresses: Sequence[str], **more: Any) -> None:
        super().__init__(addresses, plane=MulticastPlane(Network(mtu=1500)), **more)


class FaultyMulticast(MulticastTransport):
    """Over a network that loses, doubles, overtakes, delays and damages datagrams."""

    def __init__(self, addresses: Sequence[str], **more: Any) -> None:
        make_socket = partial(FaultyUdpSocket, out=_bad_network(4), back=_bad_network(5))
        plane = MulticastPlane(Network(mtu=1500), make_socket)
        super().__init__(addresses, plane=plane, **more)


def _bad_network(seed: int) -> Faults[Any]:
    return Faults(
        seed, drop=0.05, duplicate=0.05, reorder=0.2, delay_s=0.001, corrupt=0.01,
        spoil=spoil_datagram,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _in_a_thread(
    make: Callable[..., FlockTransport],
    ducks: Sequence[FakeDuck],
    plan: Plan,
    key: ClusterKey | None = None,
) -> AsyncIterator[Transport]:
    """As `_behind_ports`, with answers received as those of many ducks are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receive, "THREAD_FROM", 1)
        async with _behind_ports(make, ducks, plan, key) as transport:
            yield transport


# Every transport that keeps the contract; each is tested by the same suite.
MAKERS = {
    "loopback": loopback,
    "loopback, faulty": faulty_loopback,
    "shm": partial(_behind_ports, ShmTransport),
    "shm with a key": partial(_behind_ports, ShmTransport, key=KEY),
    "shm, faulty": partial(_behind_ports, FaultyShm),
    "tcp": partial(_behind_ports, TcpTransport),
    "tcp with a key": partial(_behind_ports, TcpTransport, key=KEY),
    "tcp in a thread": partial(_in_a_thread, TcpTransport),
    "tcp with a key in a thread": partial(_in_a_thread, TcpTransport, key=KEY),
    "tcp, faulty": partial(_behind_ports, FaultyTcp),
    "multicast": partial(_behind_ports, Multicast),
    "multicast with a key": partial(_behind_ports, Multicast, key=KEY),
    "multicast in a thread": partial(_in_a_thread, Multicast),
    "multicast with a key in a thread": partial(_in_a_thread, Multicast, key=KEY),
    "multicast, faulty": partial(_behind_ports, FaultyMulticast),
    "multicast with a key, faulty": partial(_behind_ports, FaultyMulticast, key=KEY),
}


@dataclass
class FakeFlock:
    """A started transport with its fake ducks."""

    transport: Transport
    ducks: list[FakeDuck]
    plan: Plan
    rng: np.random.Generator

    def inputs(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random x in the wire dtype, ids, weights."""
        shape = self.plan.shape
        x = self.rng.standard_normal((rows, shape.hidden), np.float32)
        ids = self.rng.integers(0, self.plan.experts, (rows, shape.top_k), np.int32)
        weights = self.rng.random((rows, shape.top_k), np.float32)
        return wire.to_wire(x, shape.ask_dtype), ids, weights

    async def ask(self, layer: int, rows: int = 1) -> tuple[Ask, np.ndarray]:
        """Acquire and ask; the ask, and the partial sums it must give: (ducks, rows, hidden)."""
        x, ids, weights = self.inputs(rows)
        landing = await self.transport.acquire(rows)
        deadline = asyncio.get_running_loop().time() + WAIT_S
        ask = self.transport.ask(layer, x, ids, weights, landing, deadline=deadline)
        values = wire.to_float32(x)
        answers = [duck.partial(layer, values) for duck in self.ducks]
        return ask, wire.to_wire(np.stack(answers), self.plan.shape.answer_dtype)

    @property
    def free(self) -> float:
        """Row sets that are free."""
        return self.transport.stats()["rows_free"]

    async def again(self, layer: int, rows: int = 1) -> tuple[Ask, np.ndarray]:
        """The same once a lost duck is back."""
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(DuckLost):
                    return await self.ask(layer, rows)
                await asyncio.sleep(0.001)

    async def begun(self, layer: int) -> None:
        """Wait until every duck has begun an ask for this layer."""
        for duck in self.ducks:
            async with asyncio.timeout(WAIT_S):
                while await duck.begun.get() != layer:
                    pass


@contextlib.asynccontextmanager
async def fake_flock(kind: str, ducks: int = 3, **plan: Any) -> AsyncIterator[FakeFlock]:
    """A flock of fake ducks behind one kind of transport."""
    library.native()  # with it answers are received natively, where there are sockets
    handlers = [FakeDuck(number) for number in range(ducks)]
    agreed = plan_for(ducks, **plan)
    try:
        async with MAKERS[kind](handlers, agreed) as transport:
            yield FakeFlock(transport, handlers, agreed, np.random.default_rng(0))
    finally:
        for handler in handlers:
            handler.let_go()
