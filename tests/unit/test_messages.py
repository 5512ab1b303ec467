"""Messages in shared memory as the native library puts and gets them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from duck import wire
from duck.kernels import library

GOOD, BAD, OTHER = library.MESSAGE_GOOD, library.MESSAGE_BAD, library.MESSAGE_OTHER
ROOM = 1024


def header(source: int = 0, ticket: int = 7, nbytes: int = 100, layer: int = 3) -> bytes:
    return wire.HEADER.pack(
        wire.MAGIC, wire.VERSION, wire.Kind.ANSWER, 5, ticket, layer, source, 0, 1, nbytes, 0, 0
    )


class Places:
    """Memory for some messages, and rows to copy their bodies into."""

    def __init__(self, count: int, nbytes: int) -> None:
        self.count, self.nbytes = count, nbytes
        self.room = max(ROOM, -(-(nbytes + 32) // 64) * 64)
        self.memory = np.zeros((count, self.room), np.uint8)
        self.rows = np.zeros((count, self.room), np.uint8)
        self.states = np.zeros(count, np.uint8)
        rng = np.random.default_rng(nbytes)
        self.bodies = rng.integers(0, 256, (count, nbytes), np.uint8)

    def put(self, index: int, *, cut: int = 0, **changes: int) -> None:
        body = self.bodies[index]
        head = header(**{"source": index, "nbytes": self.nbytes, **changes})
        first, second = body[:cut].tobytes(), body[cut:]
        library.native().duck_message_put(
            self.memory[index].ctypes.data, head, first, len(first), second.ctypes.data, len(second)
        )

    def get(self, **changes: int) -> int:
        head = header(**{"nbytes": self.nbytes, **changes})
        known: int = library.native().duck_messages_get(
            self.memory.ctypes.data, self.room, self.count, head, self.nbytes,
            self.rows.ctypes.data, self.room, self.states.ctypes.data,
        )  # fmt: skip
        return known


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("nbytes", [1, 7, 8, 16, 101, 992])
def test_what_is_put_is_got(count: int, nbytes: int) -> None:
    places = Places(count, nbytes)
    assert places.get() == 0
    for index in range(count):
        places.put(index, cut=min(nbytes, index * 5))
    assert places.get() == count
    assert places.states.tolist() == [GOOD] * count
    np.testing.assert_array_equal(places.rows[:, :nbytes], places.bodies)
    assert not places.rows[:, nbytes:].any()


def test_the_checksum_is_of_header_and_body() -> None:
    places = Places(1, 100)
    places.put(0, cut=16)
    raw = places.memory[0].tobytes()
    assert int.from_bytes(raw[28:32], "little") == library.crc32c(raw[:28] + raw[32:132])


@pytest.mark.parametrize("byte", [*range(32, 132), *range(28, 32)])
def test_a_changed_byte_is_noticed(byte: int) -> None:
    places = Places(3, 100)
    for index in range(3):
        places.put(index)
    places.memory[1, byte] ^= 0x10
    assert places.get() == 3
    assert places.states.tolist() == [GOOD, BAD, GOOD]


def test_each_is_taken_once_and_only_when_it_is_there() -> None:
    places = Places(6, 64)
    for index in (4, 1):
        places.put(index)
    places.put(2, ticket=6)  # of an earlier ask
    assert places.get() == 2
    assert places.states.tolist() == [0, GOOD, 0, 0, GOOD, 0]
    places.memory[4] = 0xFF  # what happens to it now is nobody's business
    places.bodies[1] = 9
    places.put(1)
    for index in (0, 2, 3, 5):
        places.put(index)
    assert places.get() == 6
    want = places.bodies.copy()
    want[1] = places.rows[1, :64]
    assert (want[1] != 9).any()
    np.testing.assert_array_equal(places.rows[:, :64], want)


@pytest.mark.parametrize("change", [{"layer": 4}, {"nbytes": 99}, {"source": 2}])
def test_another_header_under_the_right_ticket(change: dict[str, int]) -> None:
    places = Places(2, 100)
    places.put(0)
    places.put(1, **change)
    assert places.get() == 2
    assert places.states.tolist() == [GOOD, OTHER]
    assert not places.rows[1].any()


def test_sources_count_on_from_the_wanted_one() -> None:
    places = Places(3, 40)
    for index in range(3):
        places.put(index, source=0xFFFF if index == 0 else index - 1)
    assert places.get(source=0xFFFF) == 3
    assert places.states.tolist() == [GOOD] * 3


# a host's slot

SLOT = struct.Struct("<8QIi28sI")


class HostSlot:
    """A `duck_slot` of so many ducks, with everything it points to."""

    def __init__(self, ducks: int, nbytes: int = 100) -> None:
        if not hasattr(os, "eventfd"):
            pytest.skip("this system has no eventfds, and no shared memory of our kind")
        self.places = Places(ducks, nbytes)
        self.words = np.full(2, 99, np.uint32)  # ticket and count
        self.ask = np.zeros(ROOM, np.uint8)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        places = self.places
        self.slot = bytearray(
            SLOT.pack(
                self.words.ctypes.data, self.words.ctypes.data + 4, self.ask.ctypes.data,
                places.memory.ctypes.data, places.room, places.rows.ctypes.data, places.room,
                places.states.ctypes.data, ducks, self.wake,
                header(ticket=0, nbytes=0, layer=0)[:28], 0,
            )
        )  # fmt: skip
        self.address = library.address_of(self.slot)

    def put(self, body: bytes, ticket: int = 7, layer: int = 3) -> None:
        nbytes = self.places.nbytes
        library.native().duck_slot_ask(self.address, ticket, layer, nbytes, body, len(body))

    def take(self) -> int:
        taken: int = library.native().duck_slot_take(self.address)
        return taken

    def look(self) -> int:
        seen: int = library.native().duck_slot_look(self.address)
        return seen

    def sum(self, dtype: str) -> tuple[np.ndarray, bool, int]:
        """The sum, with eight numbers of room behind it that are 99; is it finite; who is bad."""
        count = (self.places.nbytes - 16) // (2 if dtype == "bfloat16" else 4)
        total, bad = np.full(count + 8, 99, np.float32), ctypes.c_int(99)
        finite = library.native().duck_slot_sum(
            self.address, dtype == "bfloat16", total.ctypes.data, ctypes.byref(bad)
        )
        return total, bool(finite), bad.value


@pytest.fixture
def slot() -> Iterator[HostSlot]:
    slot = HostSlot(3)
    yield slot
    os.close(slot.wake)


@pytest.mark.parametrize("body", [b"", b"x", bytes(range(200))])
def test_a_host_asks(slot: HostSlot, body: bytes) -> None:
    slot.put(body, ticket=0xFFFFFFFE, layer=60000)
    raw = slot.ask.tobytes()
    head = wire.unpack_header(raw)
    assert head[:9] == (
        wire.Kind.ASK, 5, 0xFFFFFFFE, 60000, wire.HOST, 0, 1, len(body), 0,
    )  # fmt: skip
    assert raw[32 : 32 + len(body)] == body
    assert head.crc == library.crc32c(raw[:28] + body)
    assert not any(raw[32 + len(body) :])
    assert slot.words.tolist() == [0xFFFFFFFE, 0]
    assert os.eventfd_read(slot.wake) == 1


def test_a_host_takes_what_answers_its_ask(slot: HostSlot) -> None:
    places = slot.places
    for ticket in (7, 8):
        slot.put(b"ask", ticket=ticket)
        assert slot.take() == 0  # what answered the ask before counts no more
        places.put(1, ticket=ticket)
        assert slot.take() == slot.take() == 1
        places.put(0, ticket=ticket)
        places.put(2, ticket=ticket)
        assert slot.take() == 3
        np.testing.assert_array_equal(places.rows[:, :100], places.bodies)
        places.rows[:] = 0


@pytest.mark.parametrize(("change", "state"), [({"layer": 4}, OTHER), ({}, BAD)])
def test_a_host_is_told_of_what_is_no_answer(
    slot: HostSlot, change: dict[str, int], state: int
) -> None:
    slot.put(b"ask")
    slot.places.put(0)
    slot.places.put(2, **change)
    slot.places.memory[2, 50] ^= 1
    assert slot.take() == slot.take() == -1
    assert slot.places.states.tolist() == [GOOD, 0, state]


@pytest.mark.parametrize("read", [HostSlot.take, HostSlot.look])
@pytest.mark.parametrize("change", [{"layer": 4}, {"nbytes": 99}, {"source": 2}])
def test_a_header_that_nobody_wants(
    slot: HostSlot, change: dict[str, int], read: Callable[[HostSlot], int]
) -> None:
    slot.put(b"ask")
    slot.places.put(1, **change)
    assert read(slot) == read(slot) == -1
    assert slot.places.states.tolist() == [0, OTHER, 0]
    assert not slot.places.rows.any()


def test_a_host_looks_at_headers_and_stamps(slot: HostSlot) -> None:
    places = slot.places
    for ticket in (7, 8):
        slot.put(b"ask", ticket=ticket)
        assert slot.look() == 0
        places.put(1, ticket=ticket)
        places.memory[1, 60] ^= 1  # which it does not notice
        assert slot.look() == slot.look() == 1
        places.put(0, ticket=ticket)
        places.put(2, ticket=ticket)
        assert slot.look() == 3
        np.testing.assert_array_equal(places.rows[:, :16], places.bodies[:, :16])
        assert not places.rows[:, 16:].any()
        places.states[:] = 0
        assert slot.take() == -1
        assert places.states.tolist() == [GOOD, BAD, GOOD]
        places.rows[:] = 0


@contextlib.contextmanager
def answered(rows: np.ndarray) -> Iterator[HostSlot]:
    """A slot with these rows as its ducks' answers: (ducks, numbers) in a wire dtype."""
    slot = HostSlot(len(rows), 16 + rows[0].nbytes)
    slot.put(b"ask")
    slot.places.bodies[:, 16:] = rows.view(np.uint8)
    for duck in range(len(rows)):
        slot.places.put(duck)
    yield slot
    os.close(slot.wake)


# A block of messages.cpp holds 3840 floats, or 7680 of two bytes.
@pytest.mark.parametrize("count", [1, 5, 3839, 3840, 3841, 7680, 7681, 28672])
@pytest.mark.parametrize("ducks", [1, 2, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sum_of_answers_where_they_lie(dtype: str, ducks: int, count: int) -> None:
    """The same bits as of answers that were copied before."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal((ducks, count)) * 10.0 ** rng.integers(-6, 6, (ducks, count))
    values[:, -1] = -0.0
    rows = wire.to_wire(values.astype(np.float32), dtype)
    want, _ = library.sum_rows(rows[:, None])
    assert np.signbit(want[0, -1])
    with answered(rows) as slot:
        total, finite, bad = slot.sum(dtype)
    assert (finite, bad) == (True, -1)
    np.testing.assert_array_equal(total[:count].view(np.uint32), want[0].view(np.uint32))
    assert (total[count:] == 99).all()


@pytest.mark.parametrize("at", [0, 3839, 3840, 7999])
@pytest.mark.parametrize("endless", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_that_add_up_to_no_numbers(dtype: str, endless: float, at: int) -> None:
    values = np.zeros((3, 8000), np.float32)
    values[1, at] = endless
    with answered(wire.to_wire(values, dtype)) as slot:
        total, finite, bad = slot.sum(dtype)
    assert (finite, bad) == (False, -1)
    assert np.flatnonzero(~np.isfinite(total)).tolist() == [at]


# The checksum, the stamps, the first and last row and the block's border.
@pytest.mark.parametrize("byte", [28, 31, 32, 47, 48, 48 + 15359, 48 + 15360, 48 + 31999])
@pytest.mark.parametrize("damaged", [[0], [1], [2], [2, 1]])
def test_who_is_damaged_where_it_lies(damaged: list[int], byte: int) -> None:
    with answered(np.ones((3, 8000), np.float32)) as slot:
        for duck in damaged:
            slot.places.memory[duck, byte] ^= 0x40
        assert slot.sum("float32")[1:] == (False, min(damaged))


def test_nobody_has_looked_for_ages(slot: HostSlot) -> None:
    os.eventfd_write(slot.wake, (1 << 64) - 2)  # one more would not fit
    slot.put(b"ask")
    assert slot.words[0] == 7
