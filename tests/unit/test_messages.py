"""Messages in shared memory as the native library puts and gets them."""

from __future__ import annotations

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
        self.memory = np.zeros((count, ROOM), np.uint8)
        self.rows = np.zeros((count, ROOM), np.uint8)
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
            self.memory.ctypes.data, ROOM, self.count, head, self.nbytes, self.rows.ctypes.data,
            ROOM, self.states.ctypes.data,
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
