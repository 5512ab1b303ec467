"""The wire format byte by byte: header layout, bodies, bfloat16 rounding, control messages."""

from __future__ import annotations

import tracemalloc
import zlib

import msgpack
import numpy as np
import pytest

from duck import wire
from duck.errors import WireError
from duck.wire import Kind, Shape

SHAPE = Shape(hidden=6, top_k=2, ask_dtype="bfloat16", answer_dtype="float32", max_rows=5)


# --- header


def test_header_layout_is_what_the_module_says() -> None:
    """Spelled out by hand: two builds must agree on every byte."""
    head = wire.pack_header(
        Kind.ANSWER, 0x11223344, 0x55667788, 0x0A0B, 0x0C0D, payload=b"xyz", more=b"!",
        fragment=1, fragments=3, message_bytes=0x01020304, offset=0x00203040,
    )  # fmt: skip
    want = bytes.fromhex("444b 01 02 44332211 88776655 0b0a 0d0c 0100 0300 04030201 40302000")
    assert head[:28] == want
    assert head[28:] == zlib.crc32(want + b"xyz!").to_bytes(4, "little")
    assert len(head) == wire.HEADER_BYTES == 32


def test_header_roundtrip() -> None:
    head = wire.pack_header(Kind.ASK, 7, 8, 9, wire.HOST, payload=b"abc")
    assert wire.unpack_header(head) == (
        Kind.ASK,
        7,
        8,
        9,
        wire.HOST,
        0,
        1,
        3,
        0,
        wire.unpack_header(head).crc,
    )
    assert wire.check_crc(head, b"abc")
    assert not wire.check_crc(head, b"abd")


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (0, b"\0\0", "magic"),
        (2, b"\2", "version 2"),
        (3, b"\0", "kind 0"),
        (3, b"\xff", "kind 255"),
        (16, b"\1\0\1\0", "fragment 1 of 1"),
        (16, b"\0\0\0\0", "fragment 0 of 0"),
        (24, b"\4\0\0\0", "at 4 of 3"),
    ],
)  # fmt: skip
def test_header_that_cannot_be(at: int, value: bytes, told: str) -> None:
    head = bytearray(wire.pack_header(Kind.ASK, 1, 1, 1, 0, payload=b"abc"))
    head[at : at + len(value)] = value
    with pytest.raises(WireError, match=told):
        wire.unpack_header(head)


def test_short_header() -> None:
    with pytest.raises(WireError, match="31 bytes"):
        wire.unpack_header(bytes(31))


# --- bodies


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ask_roundtrip(dtype: str) -> None:
    shape = Shape(6, 2, dtype, "float32", 5)
    ids = np.array([[3, 1], [0, 2], [5, 4]], np.int32)
    weights = np.array([[0.5, 0.25], [1, 0], [-1, 2]], np.float32)
    x = wire.to_wire(np.arange(18, dtype=np.float32).reshape(3, 6), dtype)
    packed = wire.pack_ask(ids, weights, x)
    assert len(packed) == shape.ask_bytes(3)
    body = wire.unpack_ask(packed, shape)
    np.testing.assert_array_equal(body.ids, ids)
    np.testing.assert_array_equal(body.weights, weights)
    np.testing.assert_array_equal(body.x, x)


def test_ask_packs_whatever_layout_the_arrays_have() -> None:
    ids = np.array([[3, 1], [0, 2]], np.int64)
    x = np.arange(24, dtype=np.float32).reshape(2, 12)[:, ::2]
    shape = Shape(6, 2, "float32", "float32", 5)
    body = wire.unpack_ask(wire.pack_ask(ids.T.copy().T, np.ones((2, 2)), x), shape)
    np.testing.assert_array_equal(body.ids, ids)
    np.testing.assert_array_equal(body.x, x)


@pytest.mark.parametrize("size", [0, 1, 27, 29, 28 * 6, 1 << 40])
def test_ask_of_no_whole_number_of_rows(size: int) -> None:
    assert SHAPE.ask_bytes(1) == 28
    with pytest.raises(WireError, match=r"want 1\.\.5 rows of 28"):
        SHAPE.rows_of_ask(size)


def test_sizes() -> None:
    assert SHAPE.ask_bytes(3) == 3 * (2 * 4 + 2 * 4 + 6 * 2)
    assert SHAPE.answer_bytes(3) == 3 * 6 * 4
    assert [SHAPE.rows_of_ask(SHAPE.ask_bytes(n)) for n in range(1, 6)] == [1, 2, 3, 4, 5]


def test_frames_of_a_long_message() -> None:
    limit = wire.FRAME_LIMIT
    assert list(wire.answer_frames(limit)) == [(0, 1, 0, limit)]
    assert list(wire.answer_frames(2 * limit + 5)) == [
        (0, 3, 0, limit), (1, 3, limit, limit), (2, 3, 2 * limit, 5),
    ]  # fmt: skip


def test_stamps_never_overflow() -> None:
    """A duck that took hours says "as long as fits", not an exception in its worker."""
    assert wire.STAMPS.unpack(wire.pack_stamps(0.5, 1e9)) == (500_000, 0xFFFFFFFF)
    assert wire.STAMPS.unpack(wire.pack_stamps(-1e-9, 0.0)) == (0, 0)


# --- bfloat16


def _nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """The definition, in float64, where both neighbours and the distances are exact.

    Beyond the largest finite bfloat16 the upper neighbour counts as 2**128, as in IEEE 754.
    """
    below = (x.view(np.uint32) >> 16).astype(np.uint32)
    above = below + 1
    exact = x.astype(np.float64)
    low = (below << 16).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # above NaNs lie more NaNs; the caller looks at numbers
        high = (above << 16).view(np.float32).astype(np.float64)
    high = np.where(np.isinf(high), np.copysign(2.0**128, exact), high)
    to_low, to_high = np.abs(exact - low), np.abs(high - exact)
    up = (to_high < to_low) | ((to_high == to_low) & (below % 2 == 1))
    return np.where(up, above, below).astype(np.uint16)


def _every_upper_half() -> np.ndarray:
    """All 65,536 upper halves, each with the lower halves where rounding changes its mind."""
    lower = np.array([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (
        ((np.arange(1 << 16, dtype=np.uint32)[:, None] << 16) | lower).reshape(-1).view(np.float32)
    )


def test_bfloat16_rounds_to_nearest_even() -> None:
    x = _every_upper_half()
    x = x[np.isfinite(x)]  # zeros, denormals, the largest numbers, both signs
    np.testing.assert_array_equal(wire.to_wire(x, "bfloat16"), _nearest_bfloat16(x))


def test_bfloat16_keeps_infinity_and_nan() -> None:
    x = _every_upper_half()
    x = x[~np.isfinite(x)]
    bits = wire.to_wire(x, "bfloat16")
    with np.errstate(invalid="ignore"):
        back = wire.to_float32(bits)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    np.testing.assert_array_equal(np.signbit(back), np.signbit(x))
    np.testing.assert_array_equal(back[np.isinf(x)], x[np.isinf(x)])


def test_bfloat16_comes_back_exactly() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = wire.to_float32(bits)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(wire.to_wire(values, "bfloat16")[numbers], bits[numbers])


def test_float32_travels_unchanged() -> None:
    x = np.array([[1, -0.0, np.inf, 1e-45]], np.float32)
    assert wire.to_wire(x, "float32").tobytes() == x.tobytes()
    assert wire.to_float32(wire.to_wire(x, "float32")).tobytes() == x.tobytes()


# --- control


def test_control_roundtrip() -> None:
    message = {"t": "HELLO", "v": [1, 1], "token": b"\0\1", "text": "é", "n": -5, "none": None}
    decoder = wire.ControlDecoder()
    assert decoder.feed(wire.encode_control(message) * 2 + b"\1") == [message, message]
    assert decoder.pending == 1


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({}),
        msgpack.packb({"t": 5}),
        msgpack.packb({"t": "A"}) + b"\0",  # something after the map
        b"\x82\xa1t\xa1A\x01\x02",  # a key that is no text
        b"\x81\xa1t\xa1\xff",  # not UTF-8
        msgpack.packb({"t": "A", "x": msgpack.ExtType(5, b"evil")}),
        b"\x91" * 5000 + b"\xc0",  # deep
        b"\xdd\xff\xff\xff\xff",  # an array that says it has 4 billion elements
        b"\xc6\xff\xff\xff\xff",  # bytes that say they are 4 GB
    ],
)
def test_control_that_is_no_message(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            wire.ControlDecoder().feed(_framed(body))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_control_of_a_megabyte_is_the_most() -> None:
    with pytest.raises(WireError, match="at most 1048576"):
        wire.ControlDecoder().feed((wire.CONTROL_LIMIT + 1).to_bytes(4, "little"))
    with pytest.raises(WireError, match="at most 1048576"):
        wire.encode_control({"t": "A", "x": bytes(wire.CONTROL_LIMIT)})


def test_control_field() -> None:
    message = {"t": "A", "n": 1, "yes": True, "long": "x" * 100_000}
    assert wire.field(message, "n", int) == 1
    assert wire.field(message, "yes", bool) is True
    for name, kind in (("yes", int), ("n", str), ("absent", int)):
        with pytest.raises(WireError, match=name):
            wire.field(message, name, kind)


def test_errors_do_not_repeat_long_texts() -> None:
    """Else a refusal of a long message could be too long to be sent."""
    with pytest.raises(WireError) as caught:
        wire.field({"t": "x" * 100_000}, "n", int)
    assert len(str(caught.value)) < 200


def test_text_of_a_peer_is_one_plain_line() -> None:
    assert wire.plain("a\x1b[2J\nb\u202e" + "é" * 1000, 8) == "a [2J b "
