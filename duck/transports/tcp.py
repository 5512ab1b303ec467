"""TCP as a data plane: one more connection a duck, to the duck's one port, for asks and answers.

It says DATA with the token from WELCOME, gets OK, and from then on carries only data frames;
answers are received straight into the row set of their ask. Shaking hands and noticing the frozen
is the control plane's work. With a cluster key every frame is sealed (sealed.py); the greeting is
not: whoever overhears the token can only be in time to end the session by it, as anybody can who
sits on the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from duck import wire
from duck.errors import DuckError, TransportError, WireError
from duck.kernels import library
from duck.seal import FORGED_ANSWER, TAG_BYTES, Opener, Sealer, open_answers
from duck.transports import receive
from duck.transports.base import SMALL_ROWS, Ask, AskTable
from duck.transports.control import FlockTransport, Welcome
from duck.transports.link import SPOILED, Link, data_frames, frame_bytes
from duck.transports.listen import HostSession
from duck.transports.receive import Arriving, Receiver
from duck.transports.sealed import answer_heads, sealed_frames

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

_TEXT_BYTES = 4096  # of a duck's words on why it cannot answer
_TOKEN_BYTES = 16
# What covers a frame; the host chooses. CRC-32C is the processor's own, and three times as fast.
CHECKSUMS: dict[str, wire.Checksum] = {"crc32": zlib.crc32, "crc32c": library.crc32c}
_NOTHING = memoryview(bytearray())  # where a message without a body goes


# --- the host's end


class TcpPlane:
    """A `control.Plane`: the host's end of all data connections.

    Args:
        small: asks of so few rows have no business here.
    """

    name = "tcp"
    is_private = True

    def __init__(self, small: int = 0) -> None:
        self._small = small

    def start(self, flock: FlockTransport) -> None:
        self._flock = flock
        self._links: dict[int, Link] = {}
        self._sends = 0
        self._collector: Collector | None = None
        # The host has the native library when it can compile it; a duck always has.
        self._checksum = "crc32c" if library.is_loaded() else "crc32"
        self._sealer = Sealer(flock.keys.to_all(self.name)) if flock.keys else None
        if self._collects():
            self._collector = Collector(flock, self._links)

    def _collects(self) -> bool:
        """Whether answers are received natively; else each connection does it by itself."""
        return receive.is_available()

    @property
    def checksum(self) -> wire.Checksum:
        """What covers messages that are not sealed."""
        return CHECKSUMS[self._checksum]

    def offer(self, duck: int, link: Link) -> Mapping[str, Any]:
        return {"checksum": self._checksum}

    async def connect(self, duck: int, welcome: Welcome) -> None:
        """Open the duck's data connection."""
        flock = self._flock
        token = wire.field(welcome.plane, "token", bytes)
        if len(token) > 64:
            raise WireError(f"{flock.labels[duck]} answered with an impossible token")
        link = await flock.connect(duck)
        link.send({"t": "DATA", "token": token})
        await flock.expect(link, duck, "OK")
        opener = None
        if flock.keys:
            opener = Opener(flock.keys.to_host(self.name, duck, welcome.nonce))
        answers = _Answers(flock.asks, duck, flock.session, self._collector, self._small)
        link.carry_data(answers, opener, self.checksum)
        self._links[duck] = link
        flock.watch(link, duck)
        if self._collector:
            self._collector.add(duck, link, opener)

    def send(self, ask: Ask, body: bytes) -> None:
        if self._collector:
            self._collector.expect(ask)
        # Headers, checksums and seals are the same for all ducks: made once, written N times.
        self._write(self._frames(wire.Kind.ASK, ask, body), self._links.values())

    def cancel(self, ask: Ask) -> None:
        owing = [link for duck, link in self._links.items() if not ask.gather.has(duck)]
        if owing:
            self._write(self._frames(wire.Kind.CANCEL, ask, b""), owing)

    def _frames(self, kind: wire.Kind, ask: Ask, body: bytes) -> bytes | bytearray:
        session, ticket, layer = self._flock.session, ask.ticket, ask.layer
        if self._sealer:
            return sealed_frames(self._sealer, kind, session, ticket, layer, wire.HOST, body)
        return b"".join(data_frames(kind, session, ticket, layer, wire.HOST, body, self.checksum))

    def _write(self, data: bytes | bytearray, links: Collection[Link]) -> None:
        self._sends += len(links)
        if self._collector and len(links) == len(self._links) == self._flock.plan.ducks:
            self._collector.send(data)
            return
        for link in links:
            link.write(data)

    def forget(self, ask: Ask) -> None:
        if self._collector:
            self._collector.forget(ask)

    def tick(self) -> None:
        """Nothing is due: TCP sends again by itself."""

    def heard(self, duck: int) -> int:
        collected = self._collector.heard(duck) if self._collector else 0
        return self._links[duck].heard + collected

    def stats(self) -> Mapping[str, float]:
        links = self._links.values()
        return {
            "late_answers": sum(link.dropped for link in links),
            "calls": self._sends + sum(map(self.heard, self._links)),  # that sent or received
            "refused": sum(link.error is not None for link in links),  # ducks, for what they sent
        }

    def close(self) -> None:
        """Listen no more; the flock drops its connections itself."""
        if self._collector:
            self._collector.close()


class Collector:
    """Receives the answers of all connections at once, and leaves to each what is none.

    Sealed answers are put together in memory of their own, and opened into their rows. Those of
    long asks go the long way then, as do all that come in several frames.
    """

    def __init__(self, flock: FlockTransport, links: Mapping[int, Link]) -> None:
        self._flock, self._links, self._asks = flock, links, flock.asks
        self._loop = asyncio.get_running_loop()
        ducks, shape = flock.plan.ducks, flock.plan.shape
        seal = TAG_BYTES if flock.keys else 0
        # Connections that are in the middle of something else, and read by themselves.
        self._apart = select.epoll()
        self._receiver = Receiver(flock.session, ducks, seal=seal, check=not flock.keys)
        self._openers: dict[int, Opener] = {}
        small = wire.STAMP_BYTES + shape.answer_bytes(min(SMALL_ROWS, shape.max_rows))
        self._arriving = Arriving(self._openers, ducks, wire.HEADER_BYTES + small + seal)
        self._parted: set[int] = set()  # whose they are
        self._ducks: dict[int, int] = {}  # descriptor -> duck
        self._loop.add_reader(self._receiver.descriptor, self._readable)
        self._loop.add_reader(self._apart.fileno(), self._apart_readable)

    def add(self, duck: int, link: Link, opener: Opener | None) -> None:
        """From now on, receive from this connection."""
        if opener:
            self._openers[duck] = opener
        descriptor = link.hand_over()
        self._ducks[descriptor] = duck
        self._receiver.add_connection(duck, descriptor)
        link.closed.add_done_callback(lambda _: self._receiver.drop(duck))

    def expect(self, ask: Ask) -> None:
        """An ask is about to be sent."""
        if ask.fragments > 1:
            return
        place, stride = ask.rows.address, ask.rows.stride
        if self._flock.keys:
            if ask.count > SMALL_ROWS:
                return
            place = self._arriving.take(ask.ticket) + wire.HEADER_BYTES
            stride = self._arriving.stride
        waiting = self._receiver.open(ask, ask.answer_bytes, 1, place, stride)
        if waiting and self._openers:
            nbytes = ask.answer_bytes + TAG_BYTES
            waiting.landings = self._arriving.landings(ask, wire.HEADER_BYTES, nbytes)

    def forget(self, ask: Ask) -> None:
        """An ask is over; its rows must not be written to."""
        for duck in self._receiver.forget(ask.ticket):
            self._leave(duck, self._links[duck])
        self._arriving.give_back(ask.ticket)

    def send(self, data: bytes | bytearray) -> None:
        """Send the same to all ducks."""
        for link in self._links.values():
            if not link.is_clear:
                break
        else:
            sent = self._receiver.send(data)
            if sent is not None:
                for duck, link in self._links.items():
                    if sent[duck] < len(data):
                        link.write(memoryview(data)[sent[duck] :])
            return
        for link in self._links.values():
            link.write(data)

    def _readable(self) -> None:
        good: dict[int, dict[int, float]] = {}
        besides: list[tuple[int, int, int]] = []
        for ticket, duck, what, error, _, at in self._receiver.collect().events:
            if what != library.MESSAGE_GOOD:
                besides.append((duck, what, error))
            elif ticket in good:
                good[ticket][duck] = at
            else:
                good[ticket] = {duck: at}
        for ticket, came in good.items():
            if waiting := self._receiver.get(ticket):
                if self._openers:
                    heads = answer_heads(waiting.front, came)
                    for duck in open_answers(heads, waiting.landings, came):
                        del came[duck]
                        self._links[duck].blame(WireError(FORGED_ANSWER))
                self._asks.arrived_whole(waiting.ask, came, came.values())
        # What a connection brings after an answer must meet that as one that has come.
        for duck, what, error in besides:
            self._besides(duck, what, error)

    def _besides(self, duck: int, what: int, error: int) -> None:
        """What came was no answer that is wanted."""
        link = self._links[duck]
        if what == library.MESSAGE_BAD:
            link.blame(WireError(SPOILED))
        elif what == library.MESSAGE_OTHER:
            self._leave(duck, link)
        elif what == library.EVENT_READABLE:
            link.feed(self._receiver.begun(duck))  # if it was resumed since
            link.read()
            self._part_or_resume(duck, link)
        elif error:
            link.abort(f"connection lost ({os.strerror(error)})")
        else:
            link.abort("connection closed")

    def _leave(self, duck: int, link: Link) -> None:
        """What has begun to come is the connection's own business."""
        link.feed(self._receiver.begun(duck))
        self._part_or_resume(duck, link)

    def _part_or_resume(self, duck: int, link: Link) -> None:
        """The connection reads by itself until it is between two frames."""
        if link.transport.is_closing() or duck in self._parted:
            return
        try:
            if link.between_frames:
                self._receiver.resume(duck)
            else:
                self._apart.register(link.descriptor, select.EPOLLIN)
                self._parted.add(duck)
        except (OSError, TransportError) as error:
            link.abort(f"cannot be received from: {error}")

    def _apart_readable(self) -> None:
        for descriptor, _ in self._apart.poll(0):
            duck = self._ducks[descriptor]
            link = self._links[duck]
            link.read()
            if link.transport.is_closing():
                self._receiver.drop(duck)  # the last that keeps the connection in `_apart`
            elif link.between_frames:
                self._apart.unregister(descriptor)
                self._parted.remove(duck)
                self._part_or_resume(duck, link)

    def wants(self, duck: int, ask: Ask) -> bool:
        """Whether an answer may be written to its row: it may lie there, and not be told yet."""
        return self._receiver.wants(ask.ticket, duck)

    def has_come(self, duck: int, ask: Ask) -> None:
        """An answer went the long way: its row must not be written to any more."""
        self._receiver.came(ask.ticket, duck)

    def heard(self, duck: int) -> int:
        """Receptions: any change is a sign of life."""
        return self._receiver.calls(duck)

    def close(self) -> None:
        """The second time nothing."""
        if self._apart.closed:
            return
        self._loop.remove_reader(self._receiver.descriptor)
        self._loop.remove_reader(self._apart.fileno())
        self._receiver.close()
        self._apart.close()


class _Answers:
    """What one duck may send on its data connection, and where it lands."""

    def __init__(
        self, asks: AskTable, duck: int, session: int, collector: Collector | None, small: int
    ) -> None:
        self._asks, self._duck, self._session = asks, duck, session
        self._collector, self._small = collector, small
        self._limit = wire.STAMP_BYTES + asks.plan.shape.answer_bytes(asks.plan.shape.max_rows)
        self._text = memoryview(bytearray(_TEXT_BYTES))

    def check(self, header: wire.Header) -> int:
        if header.session != self._session or header.source != self._duck:
            raise WireError(f"a frame of session {header.session:#x}, duck {header.source}")
        if header.kind == wire.Kind.ERROR:
            return frame_bytes(header, _TEXT_BYTES)
        if header.kind != wire.Kind.ANSWER:
            raise WireError(f"a duck sent {header.kind.name}")
        size = frame_bytes(header, self._limit)
        ask = self._asks.open_asks.get(header.ticket)
        if ask is not None:
            if header.layer != ask.layer or header.message_bytes != ask.answer_bytes:
                raise WireError(
                    f"an answer of {header.message_bytes} bytes for layer {header.layer}, "
                    f"want {ask.answer_bytes} for layer {ask.layer}"
                )
            if ask.count <= self._small:
                raise WireError(f"an answer by TCP to ask {header.ticket}, which went by UDP")
            wanted = not self._collector or self._collector.wants(self._duck, ask)
            if not wanted or ask.gather.seen(self._duck, header.fragment):
                raise WireError(f"fragment {header.fragment} of an answer came twice")
        return size

    def place(self, header: wire.Header) -> memoryview | None:
        if header.kind == wire.Kind.ERROR:
            return self._text
        ask = self._asks.open_asks.get(header.ticket)
        return None if ask is None else ask.rows.landing[self._duck][header.offset :]

    def arrived(self, header: wire.Header) -> None:
        if header.kind == wire.Kind.ERROR:
            text = bytes(self._text[: header.message_bytes]).decode("utf-8", "replace")
            raise WireError(f"the duck could not answer: {wire.plain(text)}")
        ask = self._asks.open_asks[header.ticket]
        if self._collector:
            self._collector.has_come(self._duck, ask)
        self._asks.arrived(ask, self._duck, header.fragment, header.fragments)


class TcpTransport(FlockTransport):
    """The host's end for ducks at known addresses, all over TCP."""

    def __init__(
        self,
        addresses: Sequence[str],
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        supply: Callable[[int, int], Iterator[memoryview]] | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(addresses, TcpPlane(), labels, progress, supply, credentials)


# --- the duck's end


class TcpDuckPlane:
    """A `listen.DuckPlane`: data connections find their session by its token."""

    name = "tcp"
    greeting = "DATA"

    def __init__(self) -> None:
        self._feeds: dict[bytes, TcpFeed] = {}

    def open(self, session: HostSession, offer: Mapping[str, Any]) -> TcpFeed:
        name = wire.field(offer, "checksum", str) if "checksum" in offer else "crc32"
        if name not in CHECKSUMS:
            raise WireError(f"HELLO: checksum {name[:20]!r}, this duck has {', '.join(CHECKSUMS)}")
        feed = TcpFeed(session, self._feeds, CHECKSUMS[name])
        self._feeds[feed.token] = feed
        return feed

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        feed = self._feeds.get(wire.field(message, "token", bytes))
        if feed is None or feed.link is not None:
            raise WireError(
                "DATA: a data greeting with an unknown word, or one that was used before"
            )
        feed.carry(link)


class TcpFeed:
    """A `listen.Feed`: one host's data connection, and the ask that is arriving on it."""

    def __init__(
        self,
        session: HostSession,
        feeds: dict[bytes, TcpFeed],
        checksum: wire.Checksum = zlib.crc32,
    ) -> None:
        self.checksum = checksum
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.link: Link | None = None
        self._session, self._feeds = session, feeds
        self._loop = asyncio.get_running_loop()
        self._limit = session.plan.shape.ask_bytes(session.plan.shape.max_rows)
        self._message = memoryview(b"")
        self._due: tuple[int, int, int, int] | None = None  # of a message that is not whole yet
        self._sealer: Sealer | None = None  # used by the worker's thread alone
        self._opener: Opener | None = None
        if session.keys:
            own = session.keys.to_host(TcpDuckPlane.name, session.duck, session.nonce)
            self._sealer = Sealer(own)
            self._opener = Opener(session.keys.to_all(TcpDuckPlane.name))

    def welcome(self) -> Mapping[str, Any]:
        return {"token": self.token}

    def carry(self, link: Link) -> None:
        """This is the data connection."""
        link.carry_data(self, self._opener, self.checksum)
        self.link = link
        link.on_close = self._closed
        link.send({"t": "OK"})

    def _closed(self, reason: str) -> None:
        """Without its data connection a session computes no more."""
        self._session.drop_asks()
        if self.link and self.link.error:
            self._session.refuse(reason)

    def stats(self) -> Mapping[str, float]:
        return {}  # the system sends again by itself, and what is wrong ends the session

    def close(self) -> None:
        del self._feeds[self.token]
        if self.link:
            self.link.abort("the session ended")

    # the frames of the data connection

    def check(self, header: wire.Header) -> int:
        if header.session != self._session.id or header.source != wire.HOST:
            raise WireError(f"a frame of session {header.session:#x}")
        if header.kind == wire.Kind.CANCEL:
            if header.message_bytes or header.fragments != 1:
                raise WireError("CANCEL with a body")
            return 0
        if header.kind != wire.Kind.ASK:
            raise WireError(f"a host sent {header.kind.name}")
        size = frame_bytes(header, self._limit)
        frame = (header.ticket, header.layer, header.message_bytes, header.fragment)
        if self._due is None and header.fragment == 0:
            self._session.check(header.layer, header.message_bytes)
            self._message = np.empty(header.message_bytes, np.uint8).data
        elif frame != self._due:
            raise WireError("frames of several asks are mixed")  # TCP keeps their order
        return size

    def place(self, header: wire.Header) -> memoryview | None:
        return self._message[header.offset :] if header.kind == wire.Kind.ASK else _NOTHING

    def arrived(self, header: wire.Header) -> None:
        if header.kind == wire.Kind.CANCEL:
            self._session.cancel(header.ticket)
            return
        if header.fragment + 1 < header.fragments:
            self._due = (
                header.ticket, header.layer, header.message_bytes, header.fragment + 1
            )  # fmt: skip
            return
        message, self._due, self._message = self._message, None, memoryview(b"")
        self._session.ask(header.ticket, header.layer, message)

    # answers

    def answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        """In the worker's thread: hand an answer's frames to the loop."""
        if isinstance(answer, DuckError):
            kind, message = wire.Kind.ERROR, str(answer).encode()[:_TEXT_BYTES] or b"no reason"
        else:
            kind, message = wire.Kind.ANSWER, stamps + answer.tobytes()
        try:
            frames = self._frames(kind, ticket, layer, message)
        except TransportError as error:  # answered twice: no bug may end the thread, or be sealed
            self._loop.call_soon_threadsafe(self._session.refuse, str(error))
            return
        with contextlib.suppress(RuntimeError):  # the loop ended while we computed
            self._loop.call_soon_threadsafe(self._send, frames)

    def _frames(
        self, kind: wire.Kind, ticket: int, layer: int, message: bytes
    ) -> Sequence[bytes | bytearray | memoryview]:
        session = self._session
        if self._sealer:
            sealed = sealed_frames(
                self._sealer, kind, session.id, ticket, layer, session.duck, message
            )
            return [sealed]
        return data_frames(kind, session.id, ticket, layer, session.duck, message, self.checksum)

    def _send(self, frames: Sequence[bytes | bytearray | memoryview]) -> None:
        if self.link and not self.link.transport.is_closing():
            self.link.transport.writelines(frames)
