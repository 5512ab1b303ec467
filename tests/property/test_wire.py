"""Any bytes, cut anywhere: a decoder gives values or raises WireError, and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import msgpack
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duck import wire
from duck.errors import WireError
from duck.placement import Plan, equal_slices

DTYPES = st.sampled_from(["float32", "bfloat16"])
SHAPES = st.builds(
    wire.Shape, st.integers(1, 40), st.integers(1, 8), DTYPES, DTYPES, st.integers(1, 6)
)
KEYS = st.text(max_size=5)
# What msgpack can carry under our rules: text keys, no extensions.
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats()
    | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
PLAN = Plan(
    "digest",
    (1, 2, 5),
    16,
    192,
    equal_slices(192, 3),
    wire.Shape(160, 4, "float32", "bfloat16", 256),
)


@given(st.binary(max_size=80))
def test_header_of_any_bytes(data: bytes) -> None:
    try:
        header = wire.unpack_header(data)
    except WireError:
        return
    assert header.fragment < header.fragments
    assert header.offset <= header.message_bytes


@given(st.binary(min_size=28, max_size=28))
def test_header_that_starts_like_ours(rest: bytes) -> None:
    """Random bytes rarely pass the magic; these do."""
    try:
        header = wire.unpack_header(b"\x44\x4b\x01\x01" + rest)
    except WireError:
        return
    assert wire.Kind(header.kind) is wire.Kind.ASK


@given(
    st.sampled_from(list(wire.Kind)), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.binary(max_size=100), st.integers(0),
)  # fmt: skip
def test_no_flipped_bit_goes_unnoticed(
    kind: wire.Kind, session: int, ticket: int, layer: int, source: int, payload: bytes, flip: int
) -> None:
    head = wire.pack_header(kind, session, ticket, layer, source, payload=payload)
    frame = bytearray(head + payload)
    header = wire.unpack_header(head)
    assert header[:5] == (kind, session, ticket, layer, source)
    assert wire.check_crc(frame[:32], frame[32:])
    flip %= len(frame) * 8
    frame[flip // 8] ^= 1 << flip % 8
    assert not wire.check_crc(frame[:32], frame[32:])


@given(st.binary(max_size=600), SHAPES)
def test_ask_of_any_bytes(data: bytes, shape: wire.Shape) -> None:
    try:
        body = wire.unpack_ask(data, shape)
    except WireError:
        return
    assert wire.pack_ask(*body) == data
    assert 1 <= len(body.x) <= shape.max_rows


@given(st.integers(1, 6), SHAPES, st.randoms(use_true_random=False))
def test_ask_roundtrip(rows: int, shape: wire.Shape, random: Any) -> None:
    rng = np.random.default_rng(random.randrange(2**32))
    ids = rng.integers(0, 99, (rows, shape.top_k), np.int32)
    weights = rng.standard_normal((rows, shape.top_k), np.float32)
    x = wire.to_wire(rng.standard_normal((rows, shape.hidden), np.float32), shape.ask_dtype)
    data = wire.pack_ask(ids, weights, x)
    assert len(data) == shape.ask_bytes(rows)
    if rows > shape.max_rows:
        return
    body = wire.unpack_ask(bytearray(data), shape)
    for got, want in zip(body, (ids, weights, x), strict=True):
        np.testing.assert_array_equal(got, want)


@given(st.integers(0, 1 << 33))
def test_frames_cover_a_message_once(size: int) -> None:
    size %= 40 * wire.FRAME_LIMIT
    at = 0
    frames = list(wire.answer_frames(size))
    for index, (fragment, fragments, offset, length) in enumerate(frames):
        assert (fragment, fragments, offset) == (index, len(frames), at)
        assert 0 <= length <= wire.FRAME_LIMIT
        at += length
    assert at == size


def _cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=5),
    st.lists(st.integers(0, 10**6), max_size=10),
)
def test_control_messages_however_they_are_cut(
    messages: list[dict[str, Any]], places: list[int]
) -> None:
    sent = [{**message, "t": "A"} for message in messages]
    decoder = wire.ControlDecoder()
    got: list[dict[str, Any]] = []
    for part in _cut(b"".join(map(wire.encode_control, sent)), places):
        got += decoder.feed(part)
    assert repr(got) == repr(sent)  # repr: NaN equals NaN
    assert not decoder.pending


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_control_stream_of_any_bytes(data: bytes, places: list[int], framed: bool) -> None:
    if framed:
        data = len(data).to_bytes(4, "little") + data
    decoder = wire.ControlDecoder()
    try:
        for part in _cut(data, places):
            for message in decoder.feed(part):
                assert isinstance(message["t"], str)
    except WireError:
        return
    assert decoder.pending <= len(data)


@given(st.dictionaries(KEYS, VALUES, max_size=3) | VALUES)
def test_control_message_of_any_value(value: Any) -> None:
    body = msgpack.packb(value)
    try:
        (message,) = wire.ControlDecoder().feed(len(body).to_bytes(4, "little") + body)
    except WireError:
        return
    assert repr(message) == repr(value)


@given(st.dictionaries(st.sampled_from(sorted(PLAN.to_wire())), VALUES, max_size=4))
def test_plan_with_any_field_replaced(changes: dict[str, Any]) -> None:
    _plan_or_wire_error({**PLAN.to_wire(), **changes})


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_plan_of_any_map(value: dict[str, Any]) -> None:
    _plan_or_wire_error(value)


NEAR = st.sampled_from([-1, 0, 1, 2, 63, 64, 65, 191, 192, 193, 1 << 14, 1 << 15, 1 << 20, 1 << 32])


@given(
    st.dictionaries(st.sampled_from(["experts", "columns", "hidden", "top_k", "max_rows"]), NEAR),
    st.lists(st.tuples(NEAR, NEAR).map(list), max_size=4),
    st.lists(NEAR, max_size=4),
)
def test_plan_with_numbers_near_the_limits(
    numbers: dict[str, int], slices: list[list[int]], layers: list[int]
) -> None:
    _plan_or_wire_error({**PLAN.to_wire(), **numbers})
    _plan_or_wire_error({**PLAN.to_wire(), **numbers, "slices": slices})
    _plan_or_wire_error({**PLAN.to_wire(), "layers": layers})


def _plan_or_wire_error(value: Any) -> None:
    try:
        plan = Plan.from_wire(value)
    except WireError:
        return
    assert Plan.from_wire(plan.to_wire()) == plan
    covered = [column for columns in plan.slices for column in (columns.start, columns.stop)]
    assert covered[0] == 0
    assert covered[-1] == plan.columns
    # No field makes a duck reserve more than this for one message.
    assert plan.shape.ask_bytes(plan.shape.max_rows) <= wire.MESSAGE_LIMIT
    assert plan.shape.answer_bytes(plan.shape.max_rows) <= wire.MESSAGE_LIMIT
