"""Asks into sockets and answers out of them into rows, by one native call an ask and a wake-up.

The rounds of a step are so short, and the ducks so many, that Python must not touch every packet:
`OpenAsks` says what the answers to the asks in flight look like and where they go, and `Inlets` (of
connections) and `Drain` (of datagram sockets) receive what fits straight into its place and check
its checksum. Whatever does not fit in any bit goes the long way, byte by byte in Python, which is
also what serves where the native library cannot be had.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from duck import wire
from duck.kernels import library
from duck.transports.base import Ask

# duck_waiting, duck_event, duck_inlet, duck_train and duck_drained of duck.h
_WAITING = struct.Struct("<28sHHQQQ")
_EVENT = struct.Struct("<IHBBQ")
_INLET = struct.Struct("<iIQIIII")
_OFF, _OFF_AT = struct.Struct("<I"), 4
_TRAIN = struct.Struct("<IIIII")
_DRAINED = struct.Struct("<5i")
_MOST_ASKS = 32
_MOST_INLETS, _MOST_EVENTS, _MOST_TRAINS = 64, 256, 256
_BUFFER_BYTES = 1 << 19
MOST_FRAGMENTS = 64
"""Answers in more pieces go the long way."""


def is_available() -> bool:
    """Whether the native library is there and can do this."""
    return library.is_loaded() and hasattr(select, "epoll")


# What came of a duck's answer: (ticket, duck, what, error, bits). what: `library.MESSAGE_*` or
# `library.EVENT_*`; error: of the system, when the connection ended; bits: the fragments that came.
Event = tuple[int, int, int, int, int]


class _Missing:
    """For every duck the fragments that have not come, as bits; native code writes it too."""

    def __init__(self, ducks: int) -> None:
        self._memory = bytearray(8 * ducks)
        self.of = memoryview(self._memory).cast("Q")
        self.address = library.address_of(self._memory)

    def fill(self, fragments: int) -> None:
        full = (1 << fragments) - 1
        self._memory[:] = full.to_bytes(8, "little") * len(self.of)


class Waiting:
    """An open ask: its answers' headers and places, and what of them has not come."""

    def __init__(self, ask: Ask, front: bytes, missing: _Missing, packed: bytes) -> None:
        self.ask, self.packed, self.kept = ask, packed, missing
        self._front = front
        # With a key: of every duck, where its sealed answer arrives and where it is opened to.
        self.sealed: list[tuple[memoryview, memoryview]] = []

    @property
    def missing(self) -> memoryview:
        """Of every duck, the fragments that have not come, as bits; to be kept right by whoever
        takes some by the long way.
        """
        return self.kept.of

    def front_of(self, duck: int) -> bytes:
        """The header of this duck's answer, up to the checksum."""
        return self._front[:14] + duck.to_bytes(2, "little") + self._front[16:]


class OpenAsks:
    """The asks whose answers come through the sockets of one plane, in the order of sending.

    Args:
        session, ducks: of the flock.
        seal: bytes that follow a body in a stream.
        check: messages have a CRC-32C, which is to be looked at.
    """

    def __init__(self, session: int, ducks: int, seal: int, check: bool) -> None:
        self._session, self._ducks = session, ducks
        self._seal, self._check = seal, check
        self._waiting: dict[int, Waiting] = {}
        self._spare: list[_Missing] = []
        self._table = bytearray(_WAITING.size * _MOST_ASKS)
        self.address = library.address_of(self._table)

    def add(
        self, ask: Ask, message_bytes: int, fragments: int, place: int, stride: int
    ) -> Waiting | None:
        """An ask is sent; None when there are too many: its answers go the long way.

        message_bytes: of each answer, as its header says. place: the address of duck 0's, the
        others' are a stride apart.
        """
        full = len(self._waiting) >= _MOST_ASKS
        if full or fragments > MOST_FRAGMENTS or ask.ticket in self._waiting:
            return None
        front = wire.HEADER.pack(
            wire.MAGIC, wire.VERSION, wire.Kind.ANSWER, self._session, ask.ticket, ask.layer, 0,
            0, fragments, message_bytes, 0, 0,
        )[:28]  # fmt: skip
        missing = self._spare.pop() if self._spare else _Missing(self._ducks)
        missing.fill(fragments)
        packed = _WAITING.pack(front, self._check, self._seal, place, stride, missing.address)
        at = len(self._waiting) * _WAITING.size
        self._table[at : at + _WAITING.size] = packed
        waiting = self._waiting[ask.ticket] = Waiting(ask, front, missing, packed)
        return waiting

    def remove(self, ticket: int) -> None:
        """Nothing when it is not there."""
        waiting = self._waiting.pop(ticket, None)
        if waiting:
            self._spare.append(waiting.kept)
            packed = b"".join(other.packed for other in self._waiting.values())
            self._table[: len(packed)] = packed

    def get(self, ticket: int) -> Waiting | None:
        return self._waiting.get(ticket)

    def ended(self, still_open: Mapping[int, Ask]) -> list[int]:
        """Those that are not open any more: their rows may serve others by now."""
        if self._waiting.keys() <= still_open.keys():
            return []
        return [ticket for ticket in self._waiting if ticket not in still_open]

    def __len__(self) -> int:
        return len(self._waiting)


class Arriving:
    """Memory in which the sealed answers of open asks are put together, one place a duck."""

    def __init__(self, ducks: int, nbytes: int) -> None:
        self._ducks = ducks
        self.stride = -(-nbytes // 64) * 64
        self._taken: dict[int, memoryview] = {}
        self._spare: list[memoryview] = []

    def take(self, ticket: int) -> int:
        """Memory for an ask; the address of duck 0's place, the others' are a stride apart."""
        memory = self._taken.get(ticket)
        if memory is None:
            size = self._ducks * self.stride
            memory = self._spare.pop() if self._spare else memoryview(bytearray(size))
            self._taken[ticket] = memory
        address: int = library.address_of(memory)
        return address

    def of(self, ticket: int, duck: int) -> memoryview:
        """A duck's place."""
        return self._taken[ticket][duck * self.stride : (duck + 1) * self.stride]

    def pairs(self, ask: Ask, start: int, nbytes: int) -> list[tuple[memoryview, memoryview]]:
        """Of every duck: so many bytes of its place from `start` on, and where they open to."""
        memory, stride = self._taken[ask.ticket], self.stride
        return [
            (memory[at : at + nbytes], row[: ask.answer_bytes])
            for at, row in zip(range(start, len(memory), stride), ask.rows.landing, strict=False)
        ]

    def give_back(self, ticket: int) -> None:
        """Nothing when it has none."""
        memory = self._taken.pop(ticket, None)
        if memory is not None:
            self._spare.append(memory)


class Inlets:
    """Connections that bring the answers of open asks, one for each duck."""

    def __init__(self, ducks: int, asks: OpenAsks) -> None:
        self._ducks, self._asks = ducks, asks
        self._epoll = select.epoll()
        self.descriptor = self._epoll.fileno()  # readable when one of them is
        self._table = bytearray(_INLET.size * ducks)
        for duck in range(ducks):
            _INLET.pack_into(self._table, duck * _INLET.size, -1, 1, 0, 0, 0, 0, 0)
        self._address = library.address_of(self._table)
        self._events = memoryview(bytearray(_EVENT.size * _MOST_INLETS))
        self._events_address = library.address_of(self._events)
        self._receive = library.swift().duck_inlets_receive
        self._sent = memoryview(bytearray(8 * ducks)).cast("q")
        self._sent_address = library.address_of(self._sent)

    def add(self, duck: int, descriptor: int) -> None:
        """This connection is the duck's, and between two frames."""
        _INLET.pack_into(self._table, duck * _INLET.size, descriptor, 0, 0, 0, 0, 0, 0)
        self._epoll.register(descriptor, select.EPOLLIN)

    def receive(self) -> Iterator[Event]:
        """Receive what is there of the answers that are wanted; one event a connection at most.

        On the way of every answer, so events are made of nothing but tuples.
        """
        asks = self._asks
        count = self._receive(
            self.descriptor, self._address, self._ducks, asks.address, len(asks),
            self._events_address, _MOST_INLETS,
        )  # fmt: skip
        return _EVENT.iter_unpack(self._events[: count * _EVENT.size])

    def send(self, data: bytes | bytearray) -> memoryview | None:
        """Send the same by all connections; how much the system took of each, None: all of all.

        All of them are open, and nothing waits to be sent by them.
        """
        size = len(data)
        native = library.swift() if size <= library.SWIFT_BYTES else library.native()
        whole = native.duck_inlets_send(
            self._address, self._ducks, library.address_of(data), size, self._sent_address
        )
        return None if whole == self._ducks else self._sent

    def begun(self, duck: int) -> bytes:
        """Give up a frame that is being received: what has come of it.

        The connection is off from now on, as after MESSAGE_OTHER.
        """
        descriptor, _, place, _, have, _, calls = self._of(duck)
        data = ctypes.string_at(place, have) if have else b""
        _INLET.pack_into(self._table, duck * _INLET.size, descriptor, 1, 0, 0, 0, 0, calls)
        return data

    def receiving(self, ticket: int) -> list[int]:
        """The ducks whose answers to this ask have come in part."""
        parts = [(duck, self._of(duck)) for duck in range(self._ducks)]
        return [duck for duck, inlet in parts if inlet[3] == ticket and inlet[4]]

    def turn(self, duck: int, on: bool) -> None:
        """Receive from this connection, or leave that to others."""
        _OFF.pack_into(self._table, duck * _INLET.size + _OFF_AT, not on)

    def calls(self, duck: int) -> int:
        """Receptions so far, modulo 2^32."""
        return self._of(duck)[6]

    def _of(self, duck: int) -> tuple[int, ...]:
        return _INLET.unpack_from(self._table, duck * _INLET.size)

    def close(self) -> None:
        self._epoll.close()


class Drained(NamedTuple):
    """What a datagram socket brought.

    trains: (datagrams one behind the other, the size of each but the last, the sender), of what
    was not taken; good until the next time.
    """

    events: Iterator[Event]
    trains: Iterator[tuple[memoryview, int, tuple[str, int]]]
    calls: int
    datagrams: int


class Drain:
    """A datagram socket that brings the answers of open asks.

    Args:
        ducks: how many.
        payload_bytes: of every fragment but an answer's last.
    """

    def __init__(self, ducks: int, asks: OpenAsks, payload_bytes: int) -> None:
        self._ducks, self._asks, self._payload_bytes = ducks, asks, payload_bytes
        self._senders = memoryview(bytearray(8 * ducks)).cast("Q")
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._events = memoryview(bytearray(_EVENT.size * _MOST_EVENTS))
        self._trains = memoryview(bytearray(_TRAIN.size * _MOST_TRAINS))
        self._drained = memoryview(bytearray(_DRAINED.size))
        self._places = [
            library.address_of(memory)
            for memory in (self._buffer, self._senders, self._events, self._trains, self._drained)
        ]
        self._receive = library.swift().duck_datagrams_receive

    def add(self, duck: int, address: tuple[str, int]) -> None:
        """Where a duck's datagrams come from."""
        host = int.from_bytes(socket.inet_aton(address[0]), "big")
        self._senders[duck] = host << 16 | address[1]

    def receive(self, descriptor: int) -> Drained:
        """Receive what is there, or as much as one wake-up may take."""
        buffer, senders, events, trains, drained = self._places
        asks = self._asks
        self._receive(
            descriptor, buffer, _BUFFER_BYTES, self._payload_bytes, asks.address, len(asks),
            senders, self._ducks, events, _MOST_EVENTS, trains, _MOST_TRAINS, drained,
        )  # fmt: skip
        made, left, calls, datagrams, _ = _DRAINED.unpack(self._drained)
        return Drained(
            _EVENT.iter_unpack(self._events[: made * _EVENT.size]),
            map(self._train, _TRAIN.iter_unpack(self._trains[: left * _TRAIN.size])),
            calls,
            datagrams,
        )

    def _train(self, train: tuple[int, ...]) -> tuple[memoryview, int, tuple[str, int]]:
        offset, nbytes, size, host, port = train
        sender = socket.inet_ntoa(host.to_bytes(4, "big")), port
        return self._buffer[offset : offset + nbytes], size, sender
