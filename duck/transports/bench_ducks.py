"""The ducks of `duck bench transport`: processes that hold nothing and answer at once.

`python -m duck.transports.bench_ducks '{"count": 8, ...}'` forks so many of them, each with its two
addresses on a line of stdout: where it is a duck, and where it is the yardstick, a plain socket
that takes as many bytes as an ask has and sends back as many as an answer. They end with stdin.
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
from collections.abc import Mapping
from typing import Any

import numpy as np

from duck import wire
from duck.kernels import library
from duck.placement import Plan
from duck.transports.base import Loading
from duck.transports.link import Link, data_frames
from duck.transports.listen import DuckPlane, HostSession, ListeningDuck
from duck.transports.multicast import MulticastDuckPlane, MulticastFeed
from duck.transports.shm import ShmDuckPlane, ShmFeed
from duck.transports.tcp import TcpDuckPlane, TcpFeed

STAMPS = wire.pack_stamps(0.0, 0.0)
SIZES = struct.Struct("<II")  # what the yardstick is told first: bytes of an ask, of an answer


class _Nothing:
    """A `Handler` that is never asked to compute."""

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        return {"warm": True}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        raise AssertionError("the echo answers")


class _Echo:
    """Answers the asks of a session as they come, without the worker's thread.

    The sums are the same each time; header, checksum and all that a host looks at are made anew.
    """

    def __init__(self, session: HostSession) -> None:
        self._session = session
        self._answers: dict[int, np.ndarray] = {}

    def sums(self, message_bytes: int) -> np.ndarray:
        """What answers an ask of so many bytes, in the wire dtype."""
        shape = self._session.plan.shape
        rows = shape.rows_of_ask(message_bytes)
        if rows not in self._answers:
            sums = np.random.default_rng(0).standard_normal((rows, shape.hidden))
            self._answers[rows] = wire.to_wire(sums, shape.answer_dtype)
        return self._answers[rows]

    def __call__(self, ticket: int, layer: int, message: memoryview) -> None:
        """Instead of `HostSession.ask`."""
        self._session.feed.answer(ticket, layer, self.sums(len(message)), STAMPS)


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
                edges.poll(0.2)
                self._look()


class _EchoTcp(TcpDuckPlane):
    """Serves data connections in threads, as the yardstick does."""

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        super().greet(link, message)
        feed = self._feeds[message["token"]]
        link.transport.pause_reading()
        connection = link.transport.get_extra_info("socket")
        own = socket.socket(fileno=os.dup(connection.fileno()))
        threading.Thread(target=self._serve, args=(own, feed), daemon=True).start()

    @staticmethod
    def _serve(link: socket.socket, feed: TcpFeed) -> None:
        """Take asks and send answers, with frames and checksums."""
        session, echo = feed._session, _Echo(feed._session)
        head = memoryview(bytearray(wire.HEADER_BYTES))
        ask = memoryview(bytearray(session.plan.shape.ask_bytes(session.plan.shape.max_rows)))
        with link, contextlib.suppress(ConnectionError, EOFError):
            while True:
                header = wire.unpack_header(_exactly(link, head))
                size = min(wire.FRAME_LIMIT, header.message_bytes - header.offset)
                _exactly(link, ask[header.offset : header.offset + size])
                if header.kind != wire.Kind.ASK or header.fragment + 1 < header.fragments:
                    continue
                body = STAMPS + echo.sums(header.message_bytes).tobytes()
                frames = data_frames(
                    wire.Kind.ANSWER, session.id, header.ticket, header.layer, session.duck, body,
                    feed._checksum,
                )  # fmt: skip
                _send(link, b"".join(frames))


class _EchoMulticast(MulticastDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> MulticastFeed:
        session.ask = _Echo(session)  # type: ignore[method-assign]
        return super().open(session, offer)


def _planes() -> list[DuckPlane]:
    tcp = _EchoTcp()
    return [tcp, _EchoShm(), _EchoMulticast(tcp)]


def _yardstick(listener: socket.socket) -> None:
    """Serve one connection after another, in a thread."""
    while True:
        link, _ = listener.accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with link, contextlib.suppress(ConnectionError, EOFError):
            asked, answered = SIZES.unpack(_exactly(link, memoryview(bytearray(SIZES.size))))
            ask, answer = memoryview(bytearray(asked)), bytes(answered)
            while True:
                _exactly(link, ask)
                link.sendall(answer)


def _exactly(link: socket.socket, into: memoryview) -> memoryview:
    """Receive until it is full, also where the system does not wait by itself."""
    have = 0
    while have < len(into):
        try:
            count = link.recv_into(into[have:])
        except BlockingIOError:
            select.select([link], [], [])
            continue
        if not count:
            raise EOFError
        have += count
    return into


def _send(link: socket.socket, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[link.send(rest) :]
        except BlockingIOError:
            select.select([], [link], [])


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
