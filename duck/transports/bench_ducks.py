"""The ducks of `duck bench transport`: processes that hold nothing and answer at once.

`python -m duck.transports.bench_ducks '{"count": 8, ...}'` forks so many of them, each with its two
addresses on a line of stdout: where it is a duck, and where it is the yardstick's, which answers in
the same way to whoever sends it an ask's frame. They end with stdin.
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
from collections.abc import Mapping
from typing import Any

import numpy as np

from duck import wire
from duck.errors import WireError
from duck.kernels import library
from duck.placement import Plan
from duck.reliable import Cut
from duck.transports.base import Loading
from duck.transports.datagrams import Address, UdpSocket, train_size
from duck.transports.link import Link, data_frames
from duck.transports.listen import DuckPlane, HostSession, ListeningDuck
from duck.transports.multicast import MulticastDuckPlane, MulticastFeed, Where
from duck.transports.shm import ShmDuckPlane, ShmFeed
from duck.transports.tcp import TcpDuckPlane, TcpFeed

STAMPS = wire.pack_stamps(0.0, 0.0)
DTYPE = "bfloat16"
_TICKET, _CRC = struct.Struct("<IH"), struct.Struct("<I")
SHAPE = struct.Struct("<III")  # what the yardstick is told first: hidden, top_k, max_rows


class _Nothing:
    """A `Handler` that is never asked to compute."""

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        return {"warm": True}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        raise AssertionError("the echo answers")


class _Sums:
    """What answers asks of a shape: the same sums each time."""

    def __init__(self, shape: wire.Shape) -> None:
        self._shape = shape
        self._known: dict[int, tuple[np.ndarray, bytes]] = {}

    def array(self, message_bytes: int) -> np.ndarray:
        """For an ask of so many bytes, in the wire dtype."""
        return self._of(message_bytes)[0]

    def message(self, message_bytes: int) -> bytes:
        """The same as it travels, with stamps before it."""
        return self._of(message_bytes)[1]

    def _of(self, message_bytes: int) -> tuple[np.ndarray, bytes]:
        if message_bytes not in self._known:
            rows = self._shape.rows_of_ask(message_bytes)
            values = np.random.default_rng(0).standard_normal((rows, self._shape.hidden))
            array = wire.to_wire(values, self._shape.answer_dtype)
            self._known[message_bytes] = array, STAMPS + array.tobytes()
        return self._known[message_bytes]


class _Echo:
    """Answers the asks of a session as they come, without the worker's thread.

    Header, checksum and all that a host looks at are made anew for each.
    """

    def __init__(self, session: HostSession) -> None:
        self._session, self._sums = session, _Sums(session.plan.shape)

    def __call__(self, ticket: int, layer: int, message: memoryview) -> None:
        """Instead of `HostSession.ask`."""
        self._session.feed.answer(ticket, layer, self._sums.array(len(message)), STAMPS)


class _EchoShm(ShmDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> ShmFeed:
        session.ask = _Echo(session)  # type: ignore[method-assign]
        return _EchoShmFeed(session)


class _EchoShmFeed(ShmFeed):
    """Waits for asks in a thread that does nothing else."""

    def _wait_for_asks(self, edges: select.epoll) -> None:
        threading.Thread(target=self._serve, args=(edges,), daemon=True).start()

    def _serve(self, edges: select.epoll) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed: the session has ended
            while self._memory:
                if edges.poll(0.2):
                    self._wake_others()
                    self._look()


class _EchoTcp(TcpDuckPlane):
    """Serves data connections in threads, as the yardstick does."""

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        super().greet(link, message)
        feed = self._feeds[message["token"]]
        link.transport.pause_reading()
        own = socket.socket(fileno=os.dup(link.transport.get_extra_info("socket").fileno()))
        threading.Thread(target=self._serve, args=(own, feed), daemon=True).start()

    @staticmethod
    def _serve(link: socket.socket, feed: TcpFeed) -> None:
        session = feed._session
        _serve(link, session.plan.shape, session.id, session.duck, feed.checksum)


class _EchoMulticast(MulticastDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> MulticastFeed:
        session.ask = _Echo(session)  # type: ignore[method-assign]
        return _EchoMulticastFeed(session, self._tcp.open(session, offer), Where.of(session, offer))


class _EchoMulticastFeed(MulticastFeed):
    """Answers asks that come in one piece in a thread; all else goes the usual way."""

    _echo: threading.Thread | None = None

    def _ping(self, head: wire.Header, payload: bytes) -> None:
        super()._ping(head, payload)
        if self._half and not self._echo:
            self._echo = threading.Thread(target=self._serve, args=self._sockets, daemon=True)
            self._loop.remove_reader(self._sockets[1].socket)
            self._echo.start()

    def _serve(self, answers: UdpSocket, asks: UdpSocket) -> None:
        sums, cut, session = _Sums(self._session.plan.shape), self._cut, self._session
        own = asks.socket.dup()
        own.setblocking(True)
        buffer = memoryview(bytearray(1 << 16))
        trains: dict[int, _Train] = {}
        with own, contextlib.suppress(OSError, RuntimeError):  # the session has ended
            while True:
                count, control, _, sender = own.recvmsg_into([buffer], 64)
                header = wire.unpack_header(buffer)
                nbytes = header.message_bytes
                whole = nbytes + cut.fragments(nbytes) * wire.HEADER_BYTES
                if header.kind != wire.Kind.ASK or header.session != session.id or count != whole:
                    came, size = bytearray(buffer[:count]), train_size(control, count)
                    self._loop.call_soon_threadsafe(self._otherwise, came, size, sender)
                    continue
                train = trains.get(nbytes)
                if train is None:
                    message = sums.message(nbytes)
                    train = trains[nbytes] = _Train(session, message, cut, self.checksum)
                answers.send(
                    memoryview(train.of(header.ticket, header.layer)),
                    cut.datagram_bytes,
                    self._where.host,
                )

    def _otherwise(self, train: bytearray, size: int, sender: Address) -> None:
        if self._sockets and sender == self._where.host:
            with contextlib.suppress(WireError):
                self._received(memoryview(train), size, time.perf_counter())


class _Train:
    """An answer's datagrams, for one ask after another."""

    def __init__(
        self, session: HostSession, message: bytes, cut: Cut, checksum: wire.Checksum
    ) -> None:
        kind, size = wire.Kind.ANSWER, cut.payload_bytes
        self._train = bytearray(
            wire.datagrams(kind, session.id, 0, 0, session.duck, message, size, checksum)
        )
        self._message, self._size, self._checksum = message, cut.datagram_bytes, checksum

    def of(self, ticket: int, layer: int) -> bytearray:
        train = self._train
        _TICKET.pack_into(train, 8, ticket, layer)
        crc = self._checksum(self._message, self._checksum(bytes(train[:28]), 0))
        for start in range(0, len(train), self._size):
            _TICKET.pack_into(train, start + 8, ticket, layer)
            _CRC.pack_into(train, start + 28, crc)
        return train


def _planes() -> list[DuckPlane]:
    tcp = _EchoTcp()
    return [tcp, _EchoShm(), _EchoMulticast(tcp)]


def _yardstick(listener: socket.socket) -> None:
    """Serve one connection after another, in a thread, just as the duck's own."""
    while True:
        link, _ = listener.accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        words = memoryview(bytearray(SHAPE.size))
        with contextlib.suppress(ConnectionError, EOFError):
            _receive(link, words, 0, SHAPE.size)
            hidden, top_k, max_rows = SHAPE.unpack(words)
            shape = wire.Shape(hidden, top_k, DTYPE, DTYPE, max_rows)
            _serve(link, shape, 0, 0, library.crc32c)


def _serve(
    link: socket.socket, shape: wire.Shape, session: int, duck: int, checksum: wire.Checksum
) -> None:
    """Take asks and send answers until the other end goes."""
    link.setblocking(True)
    echo = _Sums(shape)
    most = shape.ask_bytes(shape.max_rows)
    room = memoryview(bytearray(most + wire.HEADER_BYTES * (2 + most // wire.FRAME_LIMIT)))
    with link, contextlib.suppress(ConnectionError, EOFError):
        while True:
            have = _receive(link, room, 0, wire.HEADER_BYTES)
            header = wire.unpack_header(room)
            if header.kind == wire.Kind.ASK:
                whole = header.message_bytes + header.fragments * wire.HEADER_BYTES
                _receive(link, room[:whole], have, whole)
                frames = data_frames(
                    wire.Kind.ANSWER, session, header.ticket, header.layer, duck,
                    echo.message(header.message_bytes), checksum,
                )  # fmt: skip
                link.sendall(b"".join(frames))


def _receive(link: socket.socket, into: memoryview, have: int, need: int) -> int:
    """Receive until so many bytes are there, and perhaps more; how many."""
    while have < need:
        count = link.recv_into(into[have:])
        if not count:
            raise EOFError
        have += count
    return have


def _be_a_duck(number: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_yardstick, args=(listener,), daemon=True).start()

    def ready(address: str) -> None:
        yardstick = f"127.0.0.1:{listener.getsockname()[1]}"
        line = json.dumps({"duck": number, "address": address, "yardstick": yardstick})
        os.write(1, f"{line}\n".encode())  # in one piece: the others write there too

    async def serve() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, ended.set)  # readable when the host is gone
        end = ListeningDuck("127.0.0.1:0", ready, _planes())
        serving = asyncio.create_task(end.serve(_Nothing()))
        await ended.wait()
        serving.cancel()
        await asyncio.wait([serving])

    with contextlib.suppress(ImportError):
        import uvloop

        uvloop.run(serve())
        return
    asyncio.run(serve())


def main() -> None:
    """Fork the ducks and wait for them."""
    told = json.loads(sys.argv[1])
    library.native()  # once, and not in each of them
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
            _be_a_duck(number)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
