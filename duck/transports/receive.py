"""Asks into sockets and answers out of them into rows, natively.

The rounds of a step are so short, and the ducks so many, that Python must not touch every packet:
a `Receiver` is told what the answers to the asks in flight look like and where they go; what fits
is received straight into its place, its checksum checked, and Python is woken when a round is
complete or something needs a decision. Whatever does not fit in any bit goes the long way, byte by
byte in Python, which is also what serves where the native library cannot be had.

With several ducks a native thread receives, so that the event loop is woken once a round instead of
once an answer; with few it costs less to receive in the event loop's own wake-ups.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from duck import files, wire
from duck.errors import TransportError
from duck.kernels import library
from duck.seal import Landing, Opener
from duck.transports.base import Ask

# duck_event, duck_train and duck_collected of duck.h
_EVENT = struct.Struct("<IHBBQd")
_TRAIN = struct.Struct("<IIIII")
_COLLECTED = struct.Struct("<iiQQ")
_MOST_EVENTS, _MOST_TRAINS, _MOST_BYTES = 512, 256, 1 << 19
MOST_FRAGMENTS = 64
"""Answers in more pieces go the long way."""
THREAD_FROM = 5
"""From so many ducks on, a thread receives."""


def is_available() -> bool:
    """Whether the native library is there and can do this."""
    return library.is_loaded() and hasattr(select, "epoll")


# What came of a duck's answer: (ticket, duck, what, error, bits, at). what: `library.MESSAGE_*` or
# `library.EVENT_*`; error: of the system, when the connection ended; bits: the fragments that came;
# at: when, in perf_counter's seconds.
Event = tuple[int, int, int, int, int, float]


class Waiting:
    """An open ask: its answers' headers and places."""

    def __init__(self, ask: Ask, front: bytes) -> None:
        self.ask = ask
        self.front = front  # the header of duck 0's answer, up to the checksum
        self.landings: Sequence[Landing] = ()  # of every duck, if there is a key


class Arriving:
    """Memory in which the sealed answers of open asks are put together, one place a duck.

    Args:
        openers: of every duck, once the first ask is open.
        nbytes: of a place.
    """

    def __init__(self, openers: Mapping[int, Opener], ducks: int, nbytes: int) -> None:
        self._openers, self._ducks = openers, ducks
        self.stride = -(-nbytes // 64) * 64
        self._taken: dict[int, _Memory] = {}
        self._spare: list[_Memory] = []

    def take(self, ticket: int) -> int:
        """Memory for an ask; the address of duck 0's place, the others' are a stride apart."""
        memory = self._taken.get(ticket)
        if memory is None:
            memory = self._spare.pop() if self._spare else _Memory(self._ducks * self.stride)
            self._taken[ticket] = memory
        return memory.address

    def of(self, ticket: int, duck: int) -> memoryview:
        """A duck's place."""
        return self._taken[ticket].view[duck * self.stride : (duck + 1) * self.stride]

    def landings(self, ask: Ask, start: int, nbytes: int) -> Sequence[Landing]:
        """Of every duck: so many bytes of its place from `start` on open into its row."""
        memory = self._taken[ask.ticket]
        key = ask.rows.number, nbytes
        made = memory.landings.get(key)
        if made is None:
            made = memory.landings[key] = [
                self._openers[duck].landing(
                    self.of(ask.ticket, duck)[start : start + nbytes],
                    row[: ask.answer_bytes],
                )
                for duck, row in enumerate(ask.rows.landing)
            ]
        return made

    def give_back(self, ticket: int) -> None:
        """Nothing when it has none."""
        memory = self._taken.pop(ticket, None)
        if memory is not None:
            self._spare.append(memory)


class _Memory:
    """Places for the answers to one ask.

    landings: by row set and size: made once for each.
    """

    def __init__(self, nbytes: int) -> None:
        self.view = memoryview(bytearray(nbytes))
        self.address: int = library.address_of(self.view)
        self.landings: dict[tuple[int, int], list[Landing]] = {}


class Collected(NamedTuple):
    """What has come since the last time.

    trains: (datagrams one behind the other, the size of each but the last, the sender), of what
    was not taken; good until the next time.
    """

    events: Iterator[Event]
    trains: Iterator[tuple[memoryview, int, tuple[str, int]]]


class Receiver:
    """Receives the answers of the asks in flight from the sockets of one plane.

    Args:
        session, ducks: of the flock.
        seal: bytes that follow a body in a stream.
        check: messages have a CRC-32C, which is to be looked at.
        payload_bytes: of every fragment of a datagram but an answer's last.
        threaded: whether a thread receives; None: where it gains.

    Raises:
        TransportError: the system has no more descriptors or threads.
    """

    def __init__(
        self, session: int, ducks: int, *, seal: int = 0, check: bool = True,
        payload_bytes: int = 0, threaded: bool | None = None,
    ) -> None:  # fmt: skip
        self._session, self._ducks = session, ducks
        self._waiting: dict[int, Waiting] = {}
        self._calls = memoryview(bytearray(4 * ducks)).cast("I")
        self._sent = memoryview(bytearray(8 * ducks)).cast("q")
        self._in_part = memoryview(bytearray(2 * ducks)).cast("H")
        self._events = memoryview(bytearray(_EVENT.size * _MOST_EVENTS))
        self._trains = memoryview(bytearray(_TRAIN.size * _MOST_TRAINS))
        self._buffer = memoryview(bytearray(_MOST_BYTES))
        self._collected = memoryview(bytearray(_COLLECTED.size))
        self.receptions = self.datagrams = 0  # of datagram sockets, so far
        self._native = library.swift()
        made = ctypes.c_void_p()
        threaded = ducks >= THREAD_FROM if threaded is None else threaded
        _check(
            self._native.duck_receiver_create(
                ducks, payload_bytes, seal, check, threaded, library.address_of(self._calls),
                ctypes.byref(made),
            )
        )  # fmt: skip
        self._it: ctypes.c_void_p | None = made
        self.descriptor: int = self._native.duck_receiver_descriptor(made)  # readable: `collect`
        self._collect = self._native.duck_receiver_collect
        self._places = [
            made,
            *map(library.address_of, (self._events, self._trains, self._buffer, self._collected)),
        ]

    # asks

    def open(
        self, ask: Ask, message_bytes: int, fragments: int, place: int, stride: int
    ) -> Waiting | None:
        """An ask is about to be sent; None when its answers go the long way.

        message_bytes: of each answer, as its header says. place: the address of duck 0's, the
        others' are a stride apart. Until it is complete or `forget` is called, they are written to.
        """
        if fragments > MOST_FRAGMENTS or ask.ticket in self._waiting:
            return None
        front = wire.HEADER.pack(
            wire.MAGIC, wire.VERSION, wire.Kind.ANSWER, self._session, ask.ticket, ask.layer, 0,
            0, fragments, message_bytes, 0, 0,
        )[:28]  # fmt: skip
        self._native.duck_receiver_open(self._it, front, place, stride)
        waiting = self._waiting[ask.ticket] = Waiting(ask, front)
        return waiting

    def get(self, ticket: int) -> Waiting | None:
        return self._waiting.get(ticket)

    def forget(self, ticket: int) -> list[int]:
        """An ask is over: nothing more is written for it. Nothing when it is not there.

        Returns the ducks whose answers have come in part, by a connection: `begun` is due, before
        the memory serves anybody else.
        """
        if self._waiting.pop(ticket, None) is None:
            return []
        count = self._native.duck_receiver_forget(
            self._it, ticket, library.address_of(self._in_part)
        )
        return self._in_part[:count].tolist() if count else []

    def came(self, ticket: int, duck: int) -> None:
        """An answer went the long way: its place must not be written to any more."""
        if ticket in self._waiting:
            self._native.duck_receiver_came(self._it, ticket, duck)

    def wants(self, ticket: int, duck: int) -> bool:
        """Whether an answer may still be written; True for asks that are not open here."""
        if ticket not in self._waiting:
            return True
        return bool(self._native.duck_receiver_wants(self._it, ticket, duck))

    def again(self, ticket: int, duck: int) -> None:
        """An answer was no good: all of it is wanted once more."""
        if ticket in self._waiting:
            self._native.duck_receiver_again(self._it, ticket, duck)

    # connections

    def add_connection(self, duck: int, descriptor: int) -> None:
        """This connection is the duck's, and between two frames; a duplicate is made of it.

        Raises:
            TransportError: there are no more descriptors.
        """
        _check(self._native.duck_receiver_connection(self._it, duck, descriptor))

    def begun(self, duck: int) -> bytes:
        """Give up a frame that is being received: what has come of it.

        Nothing is received from the connection from now on, until `resume`.
        """
        room = bytearray(1 << 12)
        while True:
            address = library.address_of(room)
            size = self._native.duck_receiver_begun(self._it, duck, address, len(room))
            if size <= len(room):
                return bytes(room[:size])
            room = bytearray(size)

    def resume(self, duck: int) -> None:
        """Receive from this connection again: it is between two frames."""
        if self._it:
            _check(self._native.duck_receiver_resume(self._it, duck))

    def drop(self, duck: int) -> None:
        """The connection is over."""
        if self._it:
            self._native.duck_receiver_drop(self._it, duck)

    def calls(self, duck: int) -> int:
        """Receptions from this connection so far, modulo 2^32."""
        return self._calls[duck]

    def send(self, data: bytes | bytearray) -> memoryview | None:
        """Send the same by all connections; how much the system took of each, None: all of all.

        All of them are open, and nothing waits to be sent by them.
        """
        size = len(data)
        native = library.swift() if size <= library.SWIFT_BYTES else library.native()
        whole = native.duck_receiver_send(
            self._it, library.address_of(data), size, library.address_of(self._sent)
        )
        return None if whole == self._ducks else self._sent

    # datagrams

    def add_socket(self, descriptor: int) -> None:
        """Receive from a datagram socket, which stays open until `close`.

        Raises:
            TransportError: the system refuses.
        """
        _check(self._native.duck_receiver_datagrams(self._it, descriptor))

    def add_sender(self, duck: int, address: tuple[str, int]) -> None:
        """Where a duck's datagrams come from."""
        host = int.from_bytes(socket.inet_aton(address[0]), "big")
        self._native.duck_receiver_sender(self._it, duck, host << 16 | address[1])

    # what came

    def collect(self) -> Collected:
        """Receive what is there, and tell all that has come since the last time."""
        self._collect(*self._places)
        events, trains, self.receptions, self.datagrams = _COLLECTED.unpack(self._collected)
        return Collected(
            _EVENT.iter_unpack(self._events[: events * _EVENT.size]),
            map(self._train, _TRAIN.iter_unpack(self._trains[: trains * _TRAIN.size])),
        )

    def _train(self, train: tuple[int, ...]) -> tuple[memoryview, int, tuple[str, int]]:
        offset, nbytes, size, host, port = train
        sender = socket.inet_ntoa(host.to_bytes(4, "big")), port
        return self._buffer[offset : offset + nbytes], size, sender

    def close(self) -> None:
        """End the thread; the second time nothing."""
        it, self._it = self._it, None
        self._waiting.clear()
        if it:
            self._native.duck_receiver_destroy(it)


def _check(error: int) -> None:
    if error:
        why = files.too_many_open() if error == errno.EMFILE else os.strerror(error)
        raise TransportError(f"the system refuses to receive: {why}")
