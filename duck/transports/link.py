"""One TCP connection: control messages until `carry_data`, from then on data frames.

Frames are received straight into the place that their header asks for, or, when they are sealed, by
way of sealed.py. Both ends of the tcp transport use it; what a header may ask for is theirs to say.
With a key, control messages travel inside TLS (tls.py), which a link puts between itself and them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from duck import wire
from duck.errors import TransportError, WireError
from duck.seal import Opener
from duck.transports.sealed import SealedFrames

if TYPE_CHECKING:  # certificates are slow to import, and only needed with a key
    from duck.transports.tls import Tls

_CONTROL_BUFFER = 1 << 16
SPOILED = "a data frame failed its checksum"
_MAX_UNREAD = 64  # control messages a peer may send ahead of us
# A peer whose machine is gone says nothing, not even goodbye: the system asks after this many
# seconds, again and again, and then ends the connection. A stopped process still counts as alive.
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class Frames(Protocol):
    """What one end does with the data frames it receives."""

    def check(self, header: wire.Header) -> int:
        """Called once for every header: the bytes of its payload.

        Raises:
            WireError: the plan does not allow this frame here and now; the connection ends.
        """
        ...

    def place(self, header: wire.Header) -> memoryview | None:
        """Where the payload of a checked header belongs, or None to drop it.

        At least as long as the payload. Asked for every stretch received, so that memory that is
        given up in between is never written again.
        """
        ...

    def arrived(self, header: wire.Header) -> None:
        """A whole frame lies in its place and passed its checksum.

        Raises:
            WireError: it makes no sense; the connection ends.
        """
        ...


class Link(asyncio.BufferedProtocol):
    """One end of a connection.

    Args:
        opened: called once it is connected.
        tls: what goes between control messages and the wire.
        judge: looks at a connection's first bytes and says what does, if anything; may limit how
            long a message is (`limit`), or raise WireError.
    """

    def __init__(
        self,
        opened: Callable[[Link], None] | None = None,
        tls: Tls | None = None,
        judge: Callable[[Link, bytes], Tls | None] | None = None,
    ) -> None:
        self.transport: asyncio.Transport
        self.heard = 0  # receptions: any change is a sign of life
        self.dropped = 0  # whole messages that had no place any more
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_close: Callable[[str], None] | None = None
        self._opened = opened
        self._tls, self._judge = tls, judge
        self._first = b""  # what came before the judge had enough to judge by
        self._decoder = wire.ControlDecoder()
        self._buffer = memoryview(bytearray(_CONTROL_BUFFER))
        self._frames: Frames | None = None
        self._checksum: wire.Checksum = zlib.crc32
        self._sealed: SealedFrames | None = None
        self.error: WireError | None = None  # what the peer did wrong
        self._last_words = ""  # of a peer that refused us
        self._head = bytearray(wire.HEADER_BYTES)
        self._header: wire.Header | None = None
        self._have = 0
        self._size = 0
        self._dropping = False

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        connection = transport.get_extra_info("socket")
        self.descriptor = connection.fileno() if connection is not None else -1
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._send_tls()
        if self._opened:
            self._opened(self)

    def get_buffer(self, _sizehint: int) -> memoryview:
        if self._sealed:
            return self._sealed.room()
        frames = self._frames
        if frames is None:
            return self._buffer
        return self._room(frames)

    def _room(self, frames: Frames) -> memoryview:
        """Where the next bytes of a frame go."""
        if self._header is None:
            return memoryview(self._head)[self._have :]
        place = None if self._dropping else frames.place(self._header)
        if place is None:
            self._dropping = True
            return self._buffer[: self._size - self._have]
        return place[self._have : self._size]

    def buffer_updated(self, count: int) -> None:
        self.heard += 1
        try:
            if self._sealed:
                self._sealed.received(count)
                self.dropped = self._sealed.dropped
            elif self._frames:
                self._received(count, self._frames)
            else:
                self._control(count)
        except WireError as error:
            self.error = error
            if self._frames:
                self.abort(str(error))
            else:
                self.refuse(str(error))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = "connection closed" if exc is None else f"connection lost ({exc})"
        if self._last_words:
            reason = f"{reason} after the words: {self._last_words}"
        if not self.closed.done():
            self.closed.set_result(reason)
        self.messages.put_nowait(None)
        if self.on_close:
            self.on_close(self.closed.result())

    # control

    @property
    def peer(self) -> str:
        """The other end's address, as the system has it."""
        name = self.transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) and len(name) > 1 else ""

    @property
    def has_spoken(self) -> bool:
        """A control message has come."""
        return self._decoder.begun

    def limit(self, nbytes: int) -> None:
        """From now on refuse control messages that are longer."""
        self._decoder.limit = nbytes

    @property
    def secure(self) -> bool:
        """Control messages travel inside TLS, and the peer has shown that it has our key."""
        return self._tls is not None and self._tls.ready

    def _control(self, count: int) -> None:
        data: bytes | memoryview = self._buffer[:count]
        if self._judge:
            data = self._first = self._first + data
            if len(data) < wire.TELLING_BYTES:
                return
            self._tls, self._judge = self._judge(self, data), None
        if self._tls:
            try:
                data = self._tls.feed(data)
            finally:  # also the alert that says why not
                self._send_tls()
        for message in self._decoder.feed(data):
            if self.messages.qsize() >= _MAX_UNREAD:
                raise WireError(f"more than {_MAX_UNREAD} unread control messages")
            if message["t"] == "ERR" and isinstance(text := message.get("text"), str):
                self._last_words = wire.plain(text)
            self.messages.put_nowait(message)

    def send(self, message: Mapping[str, Any]) -> None:
        if self.transport.is_closing():
            return
        data = wire.encode_control(message)
        if self._tls:
            self._tls.write(data)
            self._send_tls()
        else:
            self.transport.write(data)

    def _send_tls(self) -> None:
        if self._tls and (data := self._tls.to_send()) and not self.transport.is_closing():
            self.transport.write(data)

    async def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next control message.

        Raises:
            WireError: the peer sent something else.
            TransportError: the connection ended.
            TimeoutError: nothing came in time.
        """
        async with asyncio.timeout(timeout_s):
            message = await self.messages.get()
        if message is None:
            self.messages.put_nowait(None)
            raise self.error or TransportError(self.closed.result())
        return message

    def forget_messages(self) -> None:
        """Drop the control messages received so far: they were only signs of life."""
        with contextlib.suppress(asyncio.QueueEmpty):
            while self.messages.get_nowait() is not None:
                pass
            self.messages.put_nowait(None)  # the end of the connection stays

    # data

    @property
    def is_clear(self) -> bool:
        """It is open, and nothing waits to be sent."""
        transport = self.transport
        return not transport.is_closing() and not transport.get_write_buffer_size()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes, in this very call if the system takes them."""
        transport = self.transport
        if transport.is_closing():
            return
        rest: bytes | bytearray | memoryview = data
        if not transport.get_write_buffer_size():
            try:
                sent = os.write(self.descriptor, data)
            except OSError:  # the transport meets it too, and knows what to do
                sent = 0
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]
        transport.write(rest)

    def carry_data(
        self,
        frames: Frames,
        opener: Opener | None = None,
        checksum: wire.Checksum = zlib.crc32,
    ) -> None:
        """Switch to data frames, sealed ones if there is an opener for them.

        checksum: of frames that are not sealed.
        """
        if self._decoder.pending or not self.messages.empty():
            raise WireError("bytes ahead of the switch to data frames")
        if self._tls:
            raise WireError("data frames have their own seal: no TLS on their connection")
        self._frames, self._checksum = frames, checksum
        if opener:
            self._sealed = SealedFrames(frames, opener)

    @property
    def between_frames(self) -> bool:
        """Nothing of a data frame has come that is not dealt with."""
        if self._sealed:
            return self._sealed.is_empty
        return self._header is None and not self._have

    def hand_over(self) -> int:
        """The descriptor, for whoever receives from now on; `feed` and `read` take the rest."""
        self.transport.pause_reading()
        return self.descriptor

    def feed(self, data: bytes) -> None:
        """Take bytes that somebody else has received."""
        rest = memoryview(data)
        while rest and not self.transport.is_closing():
            room = self.get_buffer(-1)
            step = min(len(room), len(rest))
            room[:step] = rest[:step]
            self.buffer_updated(step)
            rest = rest[step:]

    def read(self) -> None:
        """Receive once, as the event loop would."""
        if self.transport.is_closing():
            return
        try:
            count = os.readv(self.descriptor, [self.get_buffer(-1)])
        except BlockingIOError:
            return
        except OSError as error:
            self.abort(f"connection lost ({error.strerror})")
            return
        if count:
            self.buffer_updated(count)
        else:
            self.abort("connection closed")

    def _received(self, count: int, frames: Frames) -> None:
        self._have += count
        if self._header is None:
            if self._have < wire.HEADER_BYTES:
                return
            header = wire.unpack_header(self._head)
            self._size = frames.check(header)
            self._header, self._have = header, 0
            self._dropping = False
        if self._have < self._size:
            return
        header = self._header
        place = None if self._dropping else frames.place(header)
        if place is None:
            self.dropped += header.fragment + 1 == header.fragments
        elif wire.check_crc(self._head, place[: self._size], self._checksum):
            frames.arrived(header)
        else:
            raise WireError(SPOILED)
        self._header, self._have = None, 0

    def blame(self, error: WireError) -> None:
        """End the connection for a frame that somebody else has received."""
        self.error = error
        self.abort(str(error))

    def abort(self, reason: str) -> None:
        """Close at once, for this reason."""
        if not self.closed.done():
            self.closed.set_result(reason)
        self.transport.abort()

    def refuse(self, reason: str) -> None:
        """Tell the peer why, and close once that is sent."""
        if not self.closed.done():
            self.closed.set_result(reason)
        self.send({"t": "ERR", "text": reason[:1000]})
        self.transport.close()


def frame_bytes(header: wire.Header, limit: int) -> int:
    """The payload size of a frame of a message that is cut as `wire.answer_frames` does.

    Raises:
        WireError: a message larger than `limit`, or cut in another way.
    """
    if not 0 < header.message_bytes <= limit:
        raise WireError(f"message of {header.message_bytes} bytes, at most {limit}")
    fragments = -(-header.message_bytes // wire.FRAME_LIMIT)
    if header.fragments != fragments or header.offset != header.fragment * wire.FRAME_LIMIT:
        raise WireError(f"fragment {header.fragment} of {header.fragments} at {header.offset}")
    return min(wire.FRAME_LIMIT, header.message_bytes - header.offset)


def data_frames(
    kind: wire.Kind,
    session: int,
    ticket: int,
    layer: int,
    source: int,
    body: bytes | memoryview,
    checksum: wire.Checksum = zlib.crc32,
) -> list[bytes | memoryview]:
    """A message as frames, ready for `writelines`."""
    view = memoryview(body)
    out: list[bytes | memoryview] = []
    for fragment, fragments, offset, size in wire.answer_frames(len(view)):
        payload = view[offset : offset + size]
        out.append(
            wire.pack_header(
                kind, session, ticket, layer, source, payload=payload, fragment=fragment,
                fragments=fragments, message_bytes=len(view), offset=offset, checksum=checksum,
            )
        )  # fmt: skip
        out.append(payload)
    return out
