"""Trains of datagrams taken apart and laid into place, whatever they hold."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck import wire
from duck.errors import WireError
from duck.reliable import Cut

if sys.platform != "linux":
    pytest.skip("Linux sockets", allow_module_level=True)

from duck.transports.trains import lay, parts, runs

PAYLOADS = st.integers(1, 6).map(lambda n: 16 * n)


@given(st.binary(min_size=1, max_size=900), PAYLOADS, st.data())
def test_any_cut_of_a_train_lays_the_message(
    message: bytes, payload: int, data: st.DataObject
) -> None:
    """Fragments come in any order, in trains with holes and repetitions."""
    cut = Cut(payload)
    train = wire.datagrams(wire.Kind.ANSWER, 1, 2, 3, 4, message, payload)
    count = cut.fragments(len(message))
    pieces = [train[n * cut.datagram_bytes :][: cut.datagram_bytes] for n in range(count)]
    more = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    order = data.draw(st.permutations([*more, *range(count)]))
    place = memoryview(bytearray(len(message) + 5))
    came = 0
    while order:
        size = data.draw(st.integers(1, len(order)))
        numbers, order = order[:size], order[size:]
        # Only the last datagram of a train is shorter than the others.
        while count - 1 in numbers[:-1]:
            at = numbers.index(count - 1)
            numbers, order = numbers[: at + 1], numbers[at + 1 :] + order
        came += len(numbers)
        joined = memoryview(bytearray(b"".join(pieces[n] for n in numbers)))
        found: list[int] = []
        for run, part in runs(joined, cut.datagram_bytes):
            cut.check(run)
            first = run.header.fragment
            found += range(first, first + run.fragments)
            assert run.bits == sum(1 << n for n in range(first, first + run.fragments))
            lay(part, cut.datagram_bytes, place, run)
        assert found == numbers
    assert came == len(more) + count
    assert place == message + bytes(5)


@given(st.binary(max_size=400), st.integers(1, 90))
def test_trains_of_any_bytes(data: bytes, size: int) -> None:
    _take_apart(data, size)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 99)), max_size=6),
    st.integers(32, 70), st.binary(max_size=30),
)  # fmt: skip
def test_trains_of_headers_that_lie(
    heads: list[tuple[int, int, int]], size: int, rest: bytes
) -> None:
    data = b"".join(
        wire.HEADER.pack(wire.MAGIC, 1, 2, 1, 1, 1, 0, fragment, fragments, 300, offset, 7)
        .ljust(size, b"x")
        for fragment, fragments, offset in heads
    )  # fmt: skip
    _take_apart(data + rest, size)


def _take_apart(data: bytes, size: int) -> None:
    """Whatever is accepted lies inside its message; anything else is a WireError."""
    cut = Cut(max(16, (size - 32) // 16 * 16))
    try:
        for run, part in runs(memoryview(bytearray(data)), size):
            cut.check(run)
            place = memoryview(bytearray(run.header.message_bytes))
            lay(part, size, place, run)
    except WireError:
        pass


@given(st.integers(1, 60), st.data())
def test_parts_of_a_train(count: int, data: st.DataObject) -> None:
    train = bytes(range(count))
    bits = data.draw(st.integers(0, (1 << count) - 1))
    found = list(parts(train, 1, bits))
    assert b"".join(found) == bytes(n for n in range(count) if bits >> n & 1)
    # Neighbours go out together.
    assert len(found) == bin(bits & ~(bits << 1)).count("1")
