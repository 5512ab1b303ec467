"""Answers received natively: whatever comes, in whatever pieces, only right ones are told as good,
and nothing is written but to the places of fragments that were missing."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck import wire
from duck.kernels import library
from duck.reliable import Cut
from duck.transports import receive
from duck.transports.link import data_frames
from duck.transports.receive import Event, Receiver

SESSION, DUCKS, LAYER, ROOM = 7, 3, 2, 512
GUARD = 0xEE


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    library.native()
    if not receive.is_available():
        pytest.skip("no epoll here")


class Places:
    """Where the answers to one ask go: a place for each duck, with room for a header before it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.stride = nbytes, 64 + ROOM
        self.memory = np.full(DUCKS * self.stride, GUARD, np.uint8)
        self.address = self.memory.ctypes.data + 32

    def body(self, duck: int) -> bytes:
        start = duck * self.stride + 32
        return self.memory[start : start + self.nbytes].tobytes()

    def untouched(self, duck: int, head: int) -> bool:
        """Whether nothing was written outside of a duck's place and the header before it."""
        row = self.memory[duck * self.stride : (duck + 1) * self.stride]
        before, behind = row[: 32 - head], row[32 + self.nbytes :]
        return bool((before == GUARD).all() and (behind == GUARD).all())


def expect(receiver: Receiver, ticket: int, nbytes: int, fragments: int = 1) -> Places:
    places = Places(nbytes)
    ask: Any = SimpleNamespace(ticket=ticket, layer=LAYER)
    assert receiver.open(ask, nbytes, fragments, places.address, places.stride)
    return places


def patient(receiver: Receiver) -> list[Event]:
    """Events once the thread has told of some; they come at a round's end or after a pause."""
    assert select.select([receiver.descriptor], [], [], 30)[0]
    return list(receiver.collect().events)


def answer(ticket: int, duck: int, nbytes: int) -> bytes:
    """The right body of this answer."""
    return np.random.default_rng([ticket, duck]).bytes(nbytes)


def frame(ticket: int, duck: int, body: bytes, session: int = SESSION) -> bytes:
    frames = data_frames(
        wire.Kind.ANSWER, session, ticket, LAYER, duck, body, checksum=library.crc32c
    )
    return b"".join(frames)


# --- connections


@dataclass
class Wires:
    """Connected sockets: what is written to `theirs` comes out of `ours`."""

    ours: list[socket.socket]
    theirs: list[socket.socket]

    @classmethod
    def of(cls, receiver: Receiver) -> Wires:
        pairs = [socket.socketpair() for _ in range(DUCKS)]
        for duck, (ours, _) in enumerate(pairs):
            receiver.add_connection(duck, ours.fileno())
        return cls([pair[0] for pair in pairs], [pair[1] for pair in pairs])

    def close(self) -> None:
        for end in (*self.ours, *self.theirs):
            end.close()


PIECES = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def pieces(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    turn = 0
    while data:
        size = sizes[turn % len(sizes)]
        yield data[:size]
        data, turn = data[size:], turn + 1


@given(st.lists(st.integers(1, ROOM), min_size=1, max_size=4), PIECES)
def test_answers_in_the_order_of_the_asks(sizes: list[int], cuts: list[int]) -> None:
    """However the streams are cut, each answer lands in its place."""
    receiver = Receiver(SESSION, DUCKS)
    wires = Wires.of(receiver)
    try:
        places = {ticket: expect(receiver, ticket, size) for ticket, size in enumerate(sizes, 1)}
        good: list[Event] = []
        for duck, end in enumerate(wires.theirs):
            stream = b"".join(frame(t, duck, answer(t, duck, p.nbytes)) for t, p in places.items())
            for piece in pieces(stream, cuts):
                end.sendall(piece)
                while True:
                    calls = receiver.calls(duck)
                    good += receiver.collect().events
                    if receiver.calls(duck) == calls:
                        break
        assert {event[:3] for event in good} == {
            (ticket, duck, library.MESSAGE_GOOD) for ticket in places for duck in range(DUCKS)
        }
        assert len(good) == len(places) * DUCKS
        for ticket, place in places.items():
            for duck in range(DUCKS):
                assert place.body(duck) == answer(ticket, duck, place.nbytes)
                assert place.untouched(duck, 32)
    finally:
        wires.close()
        receiver.close()


@given(st.binary(min_size=1, max_size=600), PIECES, st.booleans(), st.integers(0))
def test_any_bytes_on_a_connection(data: bytes, cuts: list[int], almost: bool, flip: int) -> None:
    """What is no answer is left to others, with every byte of it; a changed one is never good."""
    receiver = Receiver(SESSION, DUCKS)
    wires = Wires.of(receiver)
    try:
        places = expect(receiver, 9, 100)
        if almost:  # the right frame, but for a bit
            changed = bytearray(frame(9, 1, answer(9, 1, 100)))
            at = flip % (len(changed) * 8)
            changed[at // 8] ^= 1 << at % 8
            data = bytes(changed)
        got, apart = b"", False
        for piece in pieces(data, cuts):
            wires.theirs[1].sendall(piece)
            for _ in range(len(piece) // 132 + 2):
                if apart:
                    with contextlib.suppress(BlockingIOError):
                        got += wires.ours[1].recv(1000, socket.MSG_DONTWAIT)
                for _, duck, what, *_ in receiver.collect().events:
                    assert duck == 1
                    if what in (library.MESSAGE_OTHER, library.EVENT_READABLE):
                        got += receiver.begun(1)
                        apart = True
                    else:
                        assert almost
                        assert what == library.MESSAGE_BAD
                        assert at // 8 >= 28  # the header is compared
                        return
        assert data.startswith(got)
        # What has not been handed on is the beginning of what may still become the answer.
        assert len(data) - len(got) < 132
        assert all(places.untouched(duck, 32) for duck in range(DUCKS))
        assert all(places.body(duck) == bytes([GUARD]) * 100 for duck in (0, 2))
    finally:
        wires.close()
        receiver.close()


def test_an_ask_that_ended_in_the_middle_of_an_answer() -> None:
    receiver = Receiver(SESSION, DUCKS)
    wires = Wires.of(receiver)
    try:
        first = expect(receiver, 1, 100)
        second = expect(receiver, 2, 50)
        whole = frame(1, 0, answer(1, 0, 100))
        wires.theirs[0].sendall(whole[:90])
        assert not list(receiver.collect().events)
        assert receiver.forget(1) == [0]
        assert receiver.forget(1) == []
        assert receiver.begun(0) == whole[:90]
        before = first.memory.copy()
        wires.theirs[0].sendall(whole[90:] + frame(2, 0, answer(2, 0, 50)))
        assert not list(receiver.collect().events)
        assert wires.ours[0].recv(42) == whole[90:]
        receiver.resume(0)
        assert [event[:5] for event in receiver.collect().events] == [
            (2, 0, library.MESSAGE_GOOD, 0, 1)
        ]
        assert (first.memory == before).all()
        assert second.body(0) == answer(2, 0, 50)
    finally:
        wires.close()
        receiver.close()


def test_a_connection_that_ends() -> None:
    receiver = Receiver(SESSION, DUCKS)
    wires = Wires.of(receiver)
    try:
        places = expect(receiver, 1, 100)
        wires.theirs[2].close()
        assert [event[1:4] for event in receiver.collect().events] == [(2, library.EVENT_ENDED, 0)]
        assert not list(receiver.collect().events)
        assert places.untouched(2, 0)
    finally:
        wires.close()
        receiver.close()


# --- datagrams


class Pond:
    """A host's socket and one for each duck, on this machine."""

    def __init__(self, payload: int) -> None:
        self.cut = Cut(payload)
        self.receiver = Receiver(SESSION, DUCKS, payload_bytes=payload)
        self.host, *self.ducks = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(DUCKS + 1))
        for end in (self.host, *self.ducks):
            end.bind(("127.0.0.1", 0))
        self.host.setblocking(False)
        for duck, end in enumerate(self.ducks):
            self.receiver.add_sender(duck, end.getsockname())
        self.receiver.add_socket(self.host.fileno())

    def send(self, duck: int, datagram: bytes) -> None:
        self.ducks[duck].sendto(datagram, self.host.getsockname())

    def receive(self) -> tuple[list[Event], list[bytes]]:
        found = self.receiver.collect()
        events = list(found.events)
        return events, [bytes(train) for train, _, _ in found.trains]

    def datagrams(self, ticket: int, duck: int, body: bytes) -> list[bytes]:
        train = wire.datagrams(
            wire.Kind.ANSWER, SESSION, ticket, LAYER, duck, body, self.cut.payload_bytes,
            library.crc32c,
        )  # fmt: skip
        size = self.cut.datagram_bytes
        return [train[start : start + size] for start in range(0, len(train), size)]

    def close(self) -> None:
        self.receiver.close()
        for end in (self.host, *self.ducks):
            end.close()


@given(st.integers(1, ROOM), st.randoms(use_true_random=False), st.integers(0, 5))
def test_datagrams_in_any_order(nbytes: int, random: Any, copies: int) -> None:
    """Each fragment is taken once, and told of when it comes again."""
    pond = Pond(48)
    try:
        places = expect(pond.receiver, 5, nbytes, pond.cut.fragments(nbytes))
        sent = [
            (duck, datagram)
            for duck in range(DUCKS)
            for datagram in pond.datagrams(5, duck, answer(5, duck, nbytes))
        ]
        again = random.choices(sent, k=copies)
        sent += again
        random.shuffle(sent)
        events: list[Event] = []
        left: list[bytes] = []
        for at in range(0, len(sent), 7):
            for duck, datagram in sent[at : at + 7]:
                pond.send(duck, datagram)
            more = pond.receive()
            events += more[0]
            left += more[1]
        assert not left
        doubled = [event for event in events if event[2] == library.EVENT_DOUBLED]
        assert sum(event[4].bit_count() for event in doubled) == len(again)
        for duck in range(DUCKS):
            own = [event for event in events if event[1] == duck and event not in doubled]
            assert [what for _, _, what, *_ in own[:-1]] == [library.MESSAGE_NONE] * (len(own) - 1)
            assert own[-1][2] == library.MESSAGE_GOOD
            assert sum(event[4] for event in own) == (1 << pond.cut.fragments(nbytes)) - 1
            assert places.body(duck) == answer(5, duck, nbytes)
            assert places.untouched(duck, 0)
    finally:
        pond.close()


@given(st.binary(max_size=200), st.integers(0), st.sampled_from(["any", "bit", "sender", "tail"]))
def test_any_datagrams(data: bytes, number: int, way: str) -> None:
    """What differs from the answer that is wanted in any bit of its headers is not taken."""
    pond = Pond(48)
    try:
        places = expect(pond.receiver, 5, 100, 3)
        right = pond.datagrams(5, 1, answer(5, 1, 100))[number % 3]
        sender, taken = 1, False
        if way == "bit":
            changed = bytearray(right)
            at = number // 3 % (len(changed) * 8)
            changed[at // 8] ^= 1 << at % 8
            # A changed checksum or payload is found when all fragments are there.
            data, taken = bytes(changed), at // 8 >= 28
        elif way == "sender":
            data, sender = right, number % 2 * 2
        elif way == "tail":
            data = right[: number % len(right)] if number % 2 else right + b"x"
        pond.send(sender, data)
        events, left = pond.receive()
        if taken:
            assert [what for _, _, what, *_ in events] == [library.MESSAGE_NONE]
            assert not left
        else:
            assert not events
            assert left == ([data] if data else [])
            assert all(places.body(duck) == bytes([GUARD]) * 100 for duck in range(DUCKS))
        assert all(places.untouched(duck, 0) for duck in range(DUCKS))
    finally:
        pond.close()


@given(st.integers(0))
def test_a_changed_answer_is_bad_and_may_come_again(flip: int) -> None:
    pond = Pond(48)
    try:
        places = expect(pond.receiver, 5, 100, 3)
        right = pond.datagrams(5, 1, answer(5, 1, 100))
        changed = bytearray(right[1])
        at = flip % (48 * 8)
        changed[32 + at // 8] ^= 1 << at % 8
        for datagram in (right[0], bytes(changed), right[2]):
            pond.send(1, datagram)
        events, left = pond.receive()
        assert [what for _, _, what, *_ in events][-1] == library.MESSAGE_BAD
        assert not left
        pond.receiver.again(5, 1)
        for datagram in right:
            pond.send(1, datagram)
        events, _ = pond.receive()
        assert [what for _, _, what, *_ in events][-1] == library.MESSAGE_GOOD
        assert places.body(1) == answer(5, 1, 100)
    finally:
        pond.close()


def test_the_buffer_may_be_too_small_for_all_that_came() -> None:
    """More datagrams than one call takes: the rest comes with the next."""
    pond = Pond(48)
    try:
        places = expect(pond.receiver, 5, 100, 3)
        pond.host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        for number in range(300):
            pond.send(0, number.to_bytes(2, "little") * 20)
        left = [train for _ in range(4) for train in pond.receive()[1]]
        assert left == [number.to_bytes(2, "little") * 20 for number in range(300)]
        assert all(places.untouched(duck, 0) for duck in range(DUCKS))
    finally:
        pond.close()


# --- the thread


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30), st.integers(1, 400))
def test_a_thread_receives_as_well(losses: list[tuple[int, int]], nbytes: int) -> None:
    """It tells of a round when that is complete, and of holes; whatever is lost comes again."""
    cut = Cut(112)
    fragments = cut.fragments(nbytes)
    receiver = Receiver(SESSION, DUCKS, payload_bytes=112, threaded=True)
    pond = Pond(112)
    pond.receiver.close()
    pond.receiver = receiver
    for duck, end in enumerate(pond.ducks):
        receiver.add_sender(duck, end.getsockname())
    receiver.add_socket(pond.host.fileno())
    try:
        places = expect(receiver, 5, nbytes, fragments)
        sent = {duck: pond.datagrams(5, duck, answer(5, duck, nbytes)) for duck in range(DUCKS)}
        lost = {(duck, number) for duck, number in losses if number < fragments}
        for duck, datagrams in sent.items():
            for number, datagram in enumerate(datagrams):
                if (duck, number) not in lost:
                    pond.send(duck, datagram)
        missing = dict.fromkeys(range(DUCKS), (1 << fragments) - 1)
        good: set[int] = set()
        while any(missing.values()):
            if sum(map(int.bit_count, missing.values())) == len(lost):
                for duck, number in lost:  # as after a NACK
                    pond.send(duck, sent[duck][number])
                lost.clear()
            for ticket, duck, what, _, bits, _ in patient(receiver):
                assert ticket == 5
                assert missing[duck] & bits == bits
                missing[duck] &= ~bits
                assert (what == library.MESSAGE_GOOD) == (not missing[duck])
                if what == library.MESSAGE_GOOD:
                    good.add(duck)
        assert good == set(range(DUCKS))
        assert all(places.body(duck) == answer(5, duck, nbytes) for duck in range(DUCKS))
        assert all(places.untouched(duck, 0) for duck in range(DUCKS))
    finally:
        pond.close()


@contextlib.contextmanager
def flooded(datagrams: list[bytes]) -> Iterator[Receiver]:
    """A thread whose socket has these, which nobody wants."""
    receiver = Receiver(SESSION, DUCKS, payload_bytes=48, threaded=True)
    host, other = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
    try:
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        host.bind(("127.0.0.1", 0))
        for datagram in datagrams:
            other.sendto(datagram, host.getsockname())
        receiver.add_socket(host.fileno())
        yield receiver
    finally:
        receiver.close()
        host.close()
        other.close()


def test_a_thread_that_is_full_waits_for_room() -> None:
    """What comes then is there when it was emptied."""
    sent = [number.to_bytes(2, "little") * 20 for number in range(400)]
    with flooded(sent) as receiver:
        left: list[bytes] = []
        while len(left) < len(sent):
            assert select.select([receiver.descriptor], [], [], 30)[0]
            left += [bytes(train) for train, _, _ in receiver.collect().trains]
        assert left == sent


def test_a_full_thread_ends_at_once() -> None:
    with flooded([b"x" * 40] * 600) as receiver:
        assert select.select([receiver.descriptor], [], [], 30)[0]
        receiver.close()


def test_a_part_that_was_handed_over_is_told_no_more() -> None:
    """The thread found that it is no answer to the first ask; then that ask ended."""
    receiver = Receiver(SESSION, DUCKS, threaded=True)
    wires = Wires.of(receiver)
    try:
        places = [expect(receiver, 1, 100), expect(receiver, 2, 50)]
        part = frame(2, 0, answer(2, 0, 50))[:60]
        wires.theirs[0].sendall(part)
        assert select.select([receiver.descriptor], [], [], 30)[0]
        assert receiver.forget(1) == [0]
        assert receiver.begun(0) == part
        assert not list(receiver.collect().events)
        assert places[1].body(0) == bytes([GUARD]) * 50
    finally:
        wires.close()
        receiver.close()


def test_a_round_that_ends_by_the_long_way_is_told() -> None:
    """Though the next one has begun."""
    receiver = Receiver(SESSION, DUCKS, threaded=True)
    wires = Wires.of(receiver)
    try:
        places = [expect(receiver, 1, 100), expect(receiver, 2, 50)]
        for duck in (0, 1):
            wires.theirs[duck].sendall(frame(1, duck, answer(1, duck, 100)))
        while not (receiver.calls(0) and receiver.calls(1)):
            os.sched_yield()
        assert receiver.wants(1, 2)
        receiver.came(1, 2)
        assert [receiver.wants(1, duck) for duck in range(DUCKS)] == [False] * 3
        assert receiver.wants(2, 0)
        assert receiver.wants(3, 0)  # of an ask that is not here
        wires.theirs[2].sendall(frame(2, 2, answer(2, 2, 50))[:40])
        good = {event[:3] for event in patient(receiver)}
        assert good == {(1, duck, library.MESSAGE_GOOD) for duck in (0, 1)}
        assert places[0].body(1) == answer(1, 1, 100)
        receiver.again(1, 0)
        assert receiver.wants(1, 0)
    finally:
        wires.close()
        receiver.close()
