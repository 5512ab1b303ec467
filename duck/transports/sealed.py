"""Messages with a seal: as frames in a stream, and whole for whoever cuts them himself.

A sealed frame is its header (whose checksum is 0: the seal covers the rest of it), then the sealed
payload, `seal.overhead` longer than the header's sizes say: those are of the message as it was
said. What is received lies in a buffer of the connection until it is whole and authentic; only then
is it opened into the place that it belongs to.

A whole message is sealed under a header of its own, which never travels: whichever datagram of it
is asked, `sealed_message` and `open_message` make the same one. Its size is the sealed message's,
and its source always 0: a key has one sender, so the answers of a round have one header.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from duck import wire
from duck.errors import WireError
from duck.seal import Opener, Sealer, overhead

if TYPE_CHECKING:
    from duck.transports.link import Frames

_FIRST_BYTES = 1 << 16


def sealed_frames(
    sealer: Sealer,
    kind: wire.Kind,
    session: int,
    ticket: int,
    layer: int,
    source: int,
    body: bytes | memoryview,
) -> bytearray:
    """A message as sealed frames, one after the other.

    Raises:
        TransportError: its ticket was used before.
    """
    view = memoryview(body)
    more = wire.HEADER_BYTES + overhead(kind)
    cuts = tuple(wire.answer_frames(len(view)))
    out = bytearray(len(view) + more * len(cuts))
    into = memoryview(out)
    for fragment, fragments, offset, size in cuts:
        head = wire.HEADER.pack(
            wire.MAGIC, wire.VERSION, kind, session, ticket, layer, source, fragment, fragments,
            len(view), offset, 0,
        )  # fmt: skip
        into[: wire.HEADER_BYTES] = head
        stop = size + more
        sealer.seal_into(head, view[offset : offset + size], into[wire.HEADER_BYTES : stop])
        into = into[stop:]
    return out


def answer_heads(front: bytes, ducks: Iterable[int]) -> Iterator[bytes]:
    """The first 28 bytes of the headers of these ducks' answers, of those of duck 0's."""
    before, behind = front[:14], front[16:]
    return (before + duck.to_bytes(2, "little") + behind for duck in ducks)


def sealed_message(
    sealer: Sealer,
    kind: wire.Kind,
    session: int,
    ticket: int,
    layer: int,
    body: bytes | memoryview,
) -> bytes:
    """A message sealed as one, without a header.

    Raises:
        TransportError: its ticket was used before.
    """
    size = len(body) + overhead(kind)
    return sealer.seal(message_head(kind, session, ticket, layer, size), body)


def open_message(
    opener: Opener, header: wire.Header, sealed: bytes | memoryview, out: bytearray | memoryview
) -> int:
    """Open what `sealed_message` made into `out`, which is long enough; the body's length.

    header: of any datagram of it.

    Raises:
        WireError: it is not authentic, or came before; what is in `out` must not be used.
    """
    head = message_head(header.kind, header.session, header.ticket, header.layer, len(sealed))
    return opener.open_into(head, sealed, out)


def message_head(kind: wire.Kind, session: int, ticket: int, layer: int, size: int) -> bytes:
    """The first 28 bytes of the header that a whole message of this size is sealed under."""
    return wire.HEADER.pack(
        wire.MAGIC, wire.VERSION, kind, session, ticket, layer, 0, 0, 1, size, 0, 0
    )[:28]


class SealedFrames:
    """The frames in a stream of received bytes; the buffer they are received into is its own."""

    def __init__(self, frames: Frames, opener: Opener) -> None:
        self.dropped = 0  # whole messages that had no place any more
        self._frames, self._opener = frames, opener
        self._buffer = memoryview(bytearray(_FIRST_BYTES))
        self._begin = self._end = 0  # what has been received and not used
        self._header: wire.Header | None = None
        self._size = 0  # of the payload, once it is opened
        self._need = wire.HEADER_BYTES  # bytes of which the next step is made

    @property
    def is_empty(self) -> bool:
        """Nothing has been received that is not dealt with."""
        return self._begin == self._end and self._header is None

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin + self._need > len(self._buffer):
            self._move_to_front()
        if self._need > len(self._buffer):
            # Sizes are checked against the plan, and one frame has at most 1 MiB.
            larger = memoryview(bytearray(self._need))
            larger[: self._end] = self._buffer[: self._end]
            self._buffer = larger
        return self._buffer[self._end :]

    def _move_to_front(self) -> None:
        kept = self._end - self._begin
        self._buffer[:kept] = bytes(self._buffer[self._begin : self._end])
        self._begin, self._end = 0, kept

    def received(self, count: int) -> None:
        """So many bytes lie in `room`.

        Raises:
            WireError: they make no sense, or are not authentic.
        """
        self._end += count
        while self._end - self._begin >= self._need:
            if self._header is None:
                self._take_header()
            else:
                self._take_payload(self._header)

    def _take_header(self) -> None:
        head = self._buffer[self._begin : self._begin + wire.HEADER_BYTES]
        header = wire.unpack_header(head)
        if header.crc:
            raise WireError("a data frame has no seal")
        self._size = self._frames.check(header)
        self._header = header
        self._need = wire.HEADER_BYTES + self._size + overhead(header.kind)

    def _take_payload(self, header: wire.Header) -> None:
        place = self._frames.place(header)
        if place is None:
            self.dropped += header.fragment + 1 == header.fragments
        else:
            payload = self._begin + wire.HEADER_BYTES
            head = self._buffer[self._begin : payload]
            sealed = self._buffer[payload : self._begin + self._need]
            self._opener.open_into(head, sealed, place)
            self._frames.arrived(header)
        self._begin += self._need
        self._header, self._need = None, wire.HEADER_BYTES
