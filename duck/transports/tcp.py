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
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from duck import wire
from duck.errors import DuckError, TransportError, WireError
from duck.kernels import library
from duck.seal import Opener, Sealer
from duck.transports.base import Ask, AskTable
from duck.transports.control import FlockTransport, Welcome
from duck.transports.link import Ahead, Link, data_frames, frame_bytes
from duck.transports.listen import HostSession
from duck.transports.sealed import sealed_frames

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

_TEXT_BYTES = 4096  # of a duck's words on why it cannot answer
_TOKEN_BYTES = 16
_MANY_ASKS = 64
# What covers a frame; the host chooses. CRC-32C is the processor's own, and three times as fast.
CHECKSUMS: dict[str, wire.Checksum] = {"crc32": zlib.crc32, "crc32c": library.crc32c}
_NOTHING = memoryview(bytearray())  # where a message without a body goes


# --- the host's end


class TcpPlane:
    """A `control.Plane`: the host's end of all data connections."""

    name = "tcp"

    def start(self, flock: FlockTransport) -> None:
        self._flock = flock
        self._links: dict[int, Link] = {}
        self._sends = 0
        # The host has the native library when it can compile it; a duck always has.
        self._checksum = "crc32c" if library.is_loaded() else "crc32"
        self._sealer = Sealer(flock.keys.to_all(self.name)) if flock.keys else None

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
        checksum = CHECKSUMS[self._checksum]
        link.carry_data(_Answers(flock.asks, duck, flock.session), opener, checksum)
        self._links[duck] = link
        flock.watch(link, duck)

    def send(self, ask: Ask, body: bytes) -> None:
        if self._checksum == "crc32c" or self._sealer:
            size = wire.STAMP_BYTES + self._flock.plan.shape.answer_bytes(ask.count)
            ask.front = wire.HEADER.pack(
                wire.MAGIC, wire.VERSION, wire.Kind.ANSWER, self._flock.session, ask.ticket,
                ask.layer, 0, 0, 1, size, 0, 0,
            )[:28]  # fmt: skip
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
        checksum = CHECKSUMS[self._checksum]
        return b"".join(data_frames(kind, session, ticket, layer, wire.HOST, body, checksum))

    def _write(self, data: bytes | bytearray, links: Iterable[Link]) -> None:
        for link in links:
            link.write(data)
            self._sends += 1

    def tick(self) -> None:
        """Nothing is due: TCP sends again by itself."""

    def heard(self, duck: int) -> int:
        return self._links[duck].heard

    def stats(self) -> Mapping[str, float]:
        links = self._links.values()
        return {
            "late_answers": sum(link.dropped for link in links),
            "calls": self._sends + sum(link.heard for link in links),  # that sent or received
            "refused": sum(link.error is not None for link in links),  # ducks, for what they sent
        }

    def close(self) -> None:
        """Nothing to give back: the flock drops its connections itself."""


class _Answers:
    """What one duck may send on its data connection, and where it lands."""

    def __init__(self, asks: AskTable, duck: int, session: int) -> None:
        self._asks, self._duck, self._session = asks, duck, session
        self._source = duck.to_bytes(2, "little")
        self._whole: set[int] = set()  # tickets of open asks, and of some older ones, that landed
        self._limit = wire.STAMP_BYTES + asks.plan.shape.answer_bytes(asks.plan.shape.max_rows)
        self._text = memoryview(bytearray(_TEXT_BYTES))

    def ahead(self) -> Ahead | None:
        """The answer to the oldest ask that this duck owes, when it is one frame."""
        for ask in self._asks.open_asks.values():
            # Not by what is noted: that may be later, and what has landed must not be written to.
            if ask.ticket not in self._whole and not ask.gather.has(self._duck):
                if not ask.front or ask.fragments > 1:
                    return None
                front = ask.front[:14] + self._source + ask.front[16:]
                size = wire.HEADER_BYTES + int.from_bytes(front[20:24], "little")
                rows, duck = ask.rows, self._duck
                address = rows.address - wire.HEADER_BYTES + duck * rows.stride
                return Ahead(ask.ticket, rows.framed[duck][:size], address, front)
        return None

    def wants(self, ticket: int) -> bool:
        return ticket in self._asks.open_asks

    def landed(self, ticket: int) -> None:
        self._note(self._asks.open_asks[ticket], 0, 1)

    def _note(self, ask: Ask, fragment: int, fragments: int) -> None:
        if fragments == 1:
            if len(self._whole) > _MANY_ASKS:
                self._whole &= self._asks.open_asks.keys()
            self._whole.add(ask.ticket)
        self._asks.arrived(ask, self._duck, fragment, fragments)

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
            expected = wire.STAMP_BYTES + self._asks.plan.shape.answer_bytes(ask.count)
            if header.layer != ask.layer or header.message_bytes != expected:
                raise WireError(
                    f"an answer of {header.message_bytes} bytes for layer {header.layer}, "
                    f"want {expected} for layer {ask.layer}"
                )
            if ask.gather.seen(self._duck, header.fragment):
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
        self._note(self._asks.open_asks[header.ticket], header.fragment, header.fragments)


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
        self._checksum = checksum
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
        link.carry_data(self, self._opener, self._checksum)
        self.link = link
        link.on_close = self._closed
        link.send({"t": "OK"})

    def _closed(self, reason: str) -> None:
        """Without its data connection a session computes no more."""
        self._session.drop_asks()
        if self.link and self.link.error:
            self._session.refuse(reason)

    def close(self) -> None:
        del self._feeds[self.token]
        if self.link:
            self.link.abort("the session ended")

    # the frames of the data connection

    def ahead(self) -> Ahead | None:
        """Asks are of any size, and go into memory of their own."""
        return None

    def wants(self, ticket: int) -> bool:
        return False

    def landed(self, ticket: int) -> None:
        raise AssertionError("nothing was looked ahead to")

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
        return data_frames(kind, session.id, ticket, layer, session.duck, message, self._checksum)

    def _send(self, frames: Sequence[bytes | bytearray | memoryview]) -> None:
        if self.link and not self.link.transport.is_closing():
            self.link.transport.writelines(frames)
