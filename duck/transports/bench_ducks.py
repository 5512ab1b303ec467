"""The ducks of `duck bench transport`: processes that hold nothing and answer at once.

`python -m duck.transports.bench_ducks '{"count": 8, ...}'` forks so many of them, each with its
addresses on a line of stdout: where it is a duck, where it is one with a key, and where it is the
yardstick's, which answers in the same way to whoever sends it an ask's frame. They end with stdin.

They answer natively. Those with a key seal the answers to a session's first asks in advance, since
their content is known: sealing would take them several times as long as all the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from duck import log, wire
from duck.errors import DuckError, WireError
from duck.kernels import library
from duck.keys import ClusterKey
from duck.placement import Plan
from duck.reliable import DuckHalf, Run
from duck.transports.base import Loading
from duck.transports.datagrams import Address
from duck.transports.link import Link
from duck.transports.listen import DuckPlane, HostSession, ListeningDuck
from duck.transports.multicast import MulticastDuckPlane, MulticastFeed, Where
from duck.transports.shm import Memory, ShmDuckPlane, ShmFeed
from duck.transports.tcp import TcpDuckPlane, TcpFeed
from duck.transports.tls import Credentials, Role
from duck.transports.trains import sealed

STAMPS = wire.pack_stamps(0.0, 0.0)
DTYPE = "bfloat16"
HIDDEN = 7168  # DeepSeek-V3
LAYERS = 4
MOST_ROWS = 1024
SEALED_TICKETS = 512
"""Asks of a session that its ducks can answer when there is a key."""
SHAPE = struct.Struct("<III")  # what the yardstick is told first: hidden, top_k, max_rows
# duck_echo, duck_echo_slot, duck_train, duck_echo_answered and duck_echo_came of duck.h
_ECHO, _SLOT = struct.Struct("<QQQIIIIIIH6x"), struct.Struct("<QQQQIII4x")
_TRAIN, _ANSWERED, _CAME = (
    struct.Struct("<IIIII"),
    struct.Struct("<IIH14x"),
    struct.Struct("<II40x"),
)
_MOST_TRAINS, _MOST_ANSWERED, _MOST_BYTES = 64, 2, 1 << 18


def layer_of(ticket: int) -> int:
    """Which layer every ask of the bench is for."""
    return (ticket - 1) % LAYERS


class _Nothing:
    """A `Handler` that is never asked to compute."""

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        return {"warm": True}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        raise AssertionError("the echo answers")


class _Answered(NamedTuple):
    """An ask that was answered natively."""

    ticket: int
    message_bytes: int
    layer: int


class _Echo:
    """Answers asks of a shape: however many rows, with the beginning of the same message."""

    def __init__(self, shape: wire.Shape, session: int = 0, duck: int = 0) -> None:
        self._shape = shape
        message = largest_message(shape.hidden)
        self._message = message[: wire.STAMP_BYTES + shape.answer_bytes(shape.max_rows)]
        sums = message[wire.STAMP_BYTES :].view(wire.wire_array(DTYPE))
        self._rows = sums.reshape(-1, shape.hidden)
        self._over = np.zeros(1, np.uint32)
        most = shape.ask_bytes(shape.max_rows)
        self._most = most + wire.HEADER_BYTES * (2 + most // wire.FRAME_LIMIT)
        self._sealed = bytearray()  # messages one after the other
        self._facts = shape.ask_bytes(1), shape.answer_bytes(1), session, duck
        self._pack()
        self._answered = bytearray(_ANSWERED.size * _MOST_ANSWERED)
        self._came, self._known = bytearray(_CAME.size), 0

    def _pack(self) -> None:
        sealed = library.address_of(self._sealed) or 0
        self._each = len(self._sealed) // SEALED_TICKETS
        self._it = bytearray(
            _ECHO.pack(
                self._message.ctypes.data, self._over.ctypes.data, sealed, self._each,
                SEALED_TICKETS, len(self._message), *self._facts,
            )
        )  # fmt: skip
        self._address = library.address_of(self._it)

    def seal(self, seal: Callable[[int, int, bytes], bytes]) -> None:
        """Seal the answers to the session's first asks, which are all as long as they may be.

        In a thread: with many ducks it takes seconds, in which their hosts want to hear of them.
        seal: of a ticket, a layer and the body.
        """
        body, made = self._message.tobytes(), bytearray()
        for ticket in range(1, SEALED_TICKETS + 1):
            made += seal(ticket, layer_of(ticket), body)
        self._sealed = made
        self._pack()

    def message(self, ask: _Answered) -> bytes:
        """What an ask is answered with."""
        if self._sealed:
            begin = (ask.ticket - 1) * self._each
            return bytes(self._sealed[begin : begin + self._each])
        return STAMPS + self.sums(ask.message_bytes).tobytes()

    def sums(self, message_bytes: int) -> np.ndarray:
        """For an ask of so many bytes, in the wire dtype."""
        return self._rows[: self._shape.rows_of_ask(message_bytes)]

    # In threads; they return when the other end has gone, or soon after `end`.

    def memory(
        self, memory: Memory, duck: int, edges: int, others: Sequence[int], host: int
    ) -> None:
        layout = memory.layout
        slots = bytearray().join(
            _SLOT.pack(
                *(memory.address + place for place in (slot.ticket, slot.count, slot.ask)),
                memory.address + slot.answers + duck * slot.stride, slot.ask_bytes, slot.swift, 0,
            )
            for slot in layout.slots
        )  # fmt: skip
        library.native().duck_echo_memory(
            self._address, library.address_of(slots), len(layout.slots), layout.ducks, edges,
            others[0] if others else -1, host,
        )  # fmt: skip

    def stream(self, link: socket.socket) -> None:
        link.setblocking(True)
        with link:
            library.native().duck_echo_stream(self._address, link.fileno(), self._most)

    def datagrams(
        self, asks: socket.socket, own: socket.socket, host: Address, payload_bytes: int
    ) -> Iterator[list[tuple[bytes, int, Address]]]:
        """Gives the trains that are left: datagrams, the size of all but the last, the sender."""
        where = int.from_bytes(socket.inet_aton(host[0]), "big")
        room, trains = bytearray(_MOST_BYTES), bytearray(_TRAIN.size * _MOST_TRAINS)
        places = [
            library.address_of(memory) for memory in (room, trains, self._answered, self._came)
        ]
        while not self._over[0]:
            library.native().duck_echo_datagrams(
                self._address, asks.fileno(), own.fileno(), where, host[1], payload_bytes,
                *places,
            )  # fmt: skip
            count, _ = _CAME.unpack(self._came)
            yield [
                (bytes(room[at : at + nbytes]), size, (_dotted(address), port))
                for at, nbytes, size, address, port in islice(_TRAIN.iter_unpack(trains), count)
            ]

    def answered(self) -> list[_Answered]:
        """The last asks that `datagrams` has answered since this was called."""
        _, count = _CAME.unpack(self._came)
        fresh = range(max(self._known, count - _MOST_ANSWERED), count)
        self._known = count
        return [
            _Answered._make(
                _ANSWERED.unpack_from(self._answered, number % _MOST_ANSWERED * _ANSWERED.size)
            )
            for number in fresh
        ]

    def end(self) -> None:
        self._over[0] = 1


def _dotted(address: int) -> str:
    return socket.inet_ntoa(address.to_bytes(4, "big"))


@cache
def largest_message(hidden: int) -> np.ndarray:
    """Stamps and `MOST_ROWS` rows as they travel.

    Whoever forks ducks calls it before: so many would take seconds to make it, each for itself.
    """
    values = np.random.default_rng(0).standard_normal((MOST_ROWS, hidden), np.float32)
    return np.frombuffer(STAMPS + wire.to_wire(values, DTYPE).tobytes(), np.uint8)


def _ask(session: HostSession, echo: _Echo) -> None:
    """Have the asks of a session that come the usual way answered without the worker's thread."""

    def answer(ticket: int, layer: int, message: memoryview) -> None:
        session.feed.answer(ticket, layer, echo.sums(len(message)), STAMPS)

    session.ask = answer  # type: ignore[method-assign]


def _in_thread(target: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


class _EchoShm(ShmDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> ShmFeed:
        return _EchoShmFeed(session)


class _EchoShmFeed(ShmFeed):
    """Waits for asks in a thread that does nothing else."""

    def __init__(self, session: HostSession) -> None:
        super().__init__(session)
        self._echo = _Echo(session.plan.shape, session.id, session.duck)

    def _wait_for_asks(self, edges: select.epoll) -> None:
        # Of its own, for it looks at them a little longer than they are ours.
        descriptors = [os.dup(found) for found in (edges.fileno(), self._answers, *self._others)]
        _in_thread(self._serve, self._memory, descriptors)

    def _serve(self, memory: Memory, descriptors: Sequence[int]) -> None:
        edges, answers, *others = descriptors
        self._echo.memory(memory, self._session.duck, edges, others, answers)
        for descriptor in descriptors:
            os.close(descriptor)

    def close(self) -> None:
        self._echo.end()
        super().close()


class _EchoTcp(TcpDuckPlane):
    """Serves data connections in threads, as the yardstick does."""

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        super().greet(link, message)
        feed = self._feeds[message["token"]]
        if not feed._sealer and feed.checksum is not library.crc32c:
            raise WireError("the bench's ducks know CRC-32C only: the host must have it loaded")
        session = feed._session
        link.transport.pause_reading()
        own = socket.socket(fileno=os.dup(link.transport.get_extra_info("socket").fileno()))
        echo = _Echo(session.plan.shape, session.id, session.duck)
        _in_thread(self._serve, feed, echo, own)

    def _serve(self, feed: TcpFeed, echo: _Echo, link: socket.socket) -> None:
        if feed._sealer:
            echo.seal(partial(self._seal, feed))
        echo.stream(link)

    @staticmethod
    def _seal(feed: TcpFeed, ticket: int, layer: int, body: bytes) -> bytes:
        (frame,) = feed._frames(wire.Kind.ANSWER, ticket, layer, body)
        return bytes(frame[wire.HEADER_BYTES :])


class _EchoMulticast(MulticastDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> MulticastFeed:
        return _EchoMulticastFeed(session, self._tcp.open(session, offer), Where.of(session, offer))


class _EchoMulticastFeed(MulticastFeed):
    """Answers asks in a thread; all else, losses too, goes the usual way."""

    _serving = False

    def __init__(self, session: HostSession, tcp: TcpFeed, where: Where) -> None:
        super().__init__(session, tcp, where)
        self._echo = _Echo(session.plan.shape, session.id, session.duck)
        self._kept = self._made = _Kept(self._train)
        _ask(session, self._echo)

    def _ping(self, head: wire.Header, payload: bytes) -> None:
        super()._ping(head, payload)
        if self._half and not self._serving:
            self._serving = True
            own, asks = self._sockets
            for each in self._sockets:
                each.deafen()
            _in_thread(self._serve, own.socket.dup(), asks.socket.dup())

    def _seal(self, ticket: int, layer: int, body: bytes) -> bytes:
        session = self._session
        return sealed(self._sealer, wire.Kind.ANSWER, session.id, ticket, layer, body)

    def answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        if self._sealer and not isinstance(answer, DuckError):  # it has been sealed already
            ask = _Answered(ticket, self._session.plan.shape.ask_bytes(len(answer)), layer)
            train, _ = self._train(ask)
            self._loop.call_soon(self._answered, ticket, layer, train, len(self._echo.message(ask)))
            return
        super().answer(ticket, layer, answer, stamps)

    def _serve(self, own: socket.socket, asks: socket.socket) -> None:
        host, size = self._where.host, self._cut.payload_bytes
        if self._sealer:
            self._echo.seal(self._seal)
        with own, asks, contextlib.suppress(RuntimeError):  # the loop has ended
            for trains in self._echo.datagrams(asks, own, host, size):
                self._loop.call_soon_threadsafe(self._left, trains)

    def _left(self, trains: Sequence[tuple[bytes, int, Address]]) -> None:
        """What came and was not answered."""
        if not self._sockets or self._half is None:
            return
        now = time.perf_counter()
        for train, size, sender in trains:
            if sender == self._where.host:
                with contextlib.suppress(WireError):
                    self._received(memoryview(train), size, now)
        for layer, send in self._half.settle(now):
            self._do(layer, send)

    def _received(self, train: memoryview, size: int, now: float) -> None:
        if self._half:
            for ask in self._echo.answered():
                self._note_answer(self._half, ask, now)
        super()._received(train, size, now)

    def _note_answer(self, half: DuckHalf, ask: _Answered, now: float) -> None:
        """As if it had been answered here: then what is lost of it is sent again."""
        fragments = self._cut.fragments(ask.message_bytes)
        head = wire.Header(
            wire.Kind.ASK, self._session.id, ask.ticket, ask.layer, wire.HOST, 0, fragments,
            ask.message_bytes, 0, 0,
        )  # fmt: skip
        if half.ask(Run(head, fragments, ask.message_bytes), now) is None:
            return
        half.take(ask.ticket)
        half.took(head)
        self._made.asks[ask.ticket] = ask
        for gone in half.answered(ask.ticket, len(self._echo.message(ask))):
            self._kept.pop(gone, None)

    def _train(self, ask: _Answered) -> tuple[bytes, int]:
        """The answer's datagrams, as `_kept` has them."""
        train = wire.datagrams(
            wire.Kind.ANSWER, self._session.id, ask.ticket, ask.layer, self._session.duck,
            self._echo.message(ask), self._cut.payload_bytes, self.checksum,
        )  # fmt: skip
        return train, ask.layer

    def close(self) -> None:
        self._echo.end()
        super().close()


class _Kept(dict[int, tuple[bytes, int]]):
    """Answers that were sent; those that were made natively are made again when they are needed."""

    def __init__(self, make: Callable[[_Answered], tuple[bytes, int]]) -> None:
        self.asks: dict[int, _Answered] = {}
        self._make = make

    def __missing__(self, ticket: int) -> tuple[bytes, int]:
        kept = self[ticket] = self._make(self.asks[ticket])
        return kept

    def pop(self, ticket: int, *default: Any) -> Any:
        self.asks.pop(ticket, None)
        return super().pop(ticket, *default)


def _planes() -> list[DuckPlane]:
    tcp = _EchoTcp()
    return [tcp, _EchoShm(), _EchoMulticast(tcp)]


def _yardstick(listener: socket.socket) -> None:
    """Serve one connection after another, just as the duck's own."""
    while True:
        link, _ = listener.accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        words = link.recv(SHAPE.size, socket.MSG_WAITALL)
        if len(words) == SHAPE.size:
            hidden, top_k, max_rows = SHAPE.unpack(words)
            _Echo(wire.Shape(hidden, top_k, DTYPE, DTYPE, max_rows)).stream(link)


def _be_a_duck(number: int, key: ClusterKey) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    _in_thread(_yardstick, listener)

    async def serve() -> None:
        # Readable when the host is gone: then there is nothing left to do properly.
        asyncio.get_running_loop().add_reader(0, os._exit, 0)
        told: asyncio.Queue[str] = asyncio.Queue()
        serving, addresses = [], []
        for credentials in (None, Credentials(key, Role.DUCK)):
            end = ListeningDuck("127.0.0.1:0", told.put_nowait, _planes(), credentials)
            serving.append(asyncio.create_task(end.serve(_Nothing())))
            addresses.append(await told.get())
        yardstick = f"127.0.0.1:{listener.getsockname()[1]}"
        line = json.dumps({"duck": number, "addresses": [*addresses, yardstick]})
        os.write(1, f"{line}\n".encode())  # in one piece: the others write there too
        await asyncio.wait(serving)

    with contextlib.suppress(BrokenPipeError):  # the host is gone before it had our address
        try:
            import uvloop
        except ImportError:
            asyncio.run(serve())
        else:
            uvloop.run(serve())


def main() -> None:
    """Fork the ducks and wait for them."""
    told = json.loads(sys.argv[1])
    log.configure("error")  # not to stdout, where addresses go
    library.native()  # once, and not in each of them
    largest_message(HIDDEN)
    if hasattr(os, "sched_setscheduler"):
        # A host that is measured at real-time priority must not make its ducks so: while they end,
        # they may wait for each other in the kernel, each keeping the other from running.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if told["processors"]:
        os.sched_setaffinity(0, told["processors"])
    children = []
    for number in range(told["count"]):
        child = os.fork()
        if not child:
            _be_a_duck(number, ClusterKey(bytes.fromhex(told["key"])))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
