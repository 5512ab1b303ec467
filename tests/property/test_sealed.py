"""Sealed frames in a stream: however it is cut, what was said comes out whole and in order; when
any byte of it is another, nothing that was not said does.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck import wire
from duck.errors import WireError
from duck.keys import ClusterKey
from duck.seal import Channel, Opener, Sealer, SessionKeys, overhead
from duck.transports.control import PROTOCOL
from duck.transports.sealed import SealedFrames, open_message, sealed_frames, sealed_message
from duck.wire import Kind

LIMIT = 3 * wire.FRAME_LIMIT
CHANNEL: Channel = SessionKeys(ClusterKey(bytes(range(32))), bytes(16), bytes(32)).to_all("tcp")


class Recorder:
    """Frames of any kind that fit; `said` has (kind, ticket, body) of every whole message."""

    def __init__(self) -> None:
        self.said: list[tuple[Kind, int, bytes]] = []
        self._memory = memoryview(bytearray(LIMIT))

    def check(self, header: wire.Header) -> int:
        if header.message_bytes > LIMIT:
            raise WireError("too long")
        return min(wire.FRAME_LIMIT, header.message_bytes - header.offset)

    def place(self, header: wire.Header) -> memoryview | None:
        return self._memory[header.offset :]

    def arrived(self, header: wire.Header) -> None:
        if header.fragment + 1 == header.fragments:
            body = bytes(self._memory[: header.message_bytes])
            self.said.append((header.kind, header.ticket, body))


def feed(frames: SealedFrames, data: bytes, steps: list[int]) -> None:
    """Give it the bytes in pieces of these sizes, again and again; never more than it has room."""
    view = memoryview(data)
    for step in itertools.cycle(steps):
        if not view:
            return
        room = frames.room()
        assert len(room)
        count = min(step, len(room), len(view))
        room[:count] = view[:count]
        view = view[count:]
        frames.received(count)


def stream_of(messages: list[tuple[Kind, bytes]]) -> bytes:
    sealer = Sealer(CHANNEL)
    return b"".join(
        sealed_frames(sealer, kind, 1, ticket, 2, 3, body)
        for ticket, (kind, body) in enumerate(messages, 1)
    )


MESSAGES = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=200)), max_size=8)
STEPS = st.lists(st.integers(1, 400), min_size=1, max_size=5)


@given(MESSAGES, STEPS)
def test_what_was_said_comes_out_however_it_is_cut(
    messages: list[tuple[Kind, bytes]], steps: list[int]
) -> None:
    recorder = Recorder()
    feed(SealedFrames(recorder, Opener(CHANNEL)), stream_of(messages), steps)
    assert recorder.said == [
        (kind, ticket, body) for ticket, (kind, body) in enumerate(messages, 1)
    ]


@pytest.mark.parametrize("step", [1 << 20, 70_001])
@pytest.mark.parametrize("size", [1 << 16, wire.FRAME_LIMIT, LIMIT - 5])
def test_long_messages_and_short_ones_between(size: int, step: int) -> None:
    messages = [
        (Kind.CANCEL, b""), (Kind.ASK, bytes(range(256)) * (size // 256)), (Kind.CANCEL, b"x"),
        (Kind.ASK, b"y" * size), (Kind.ANSWER, b"z"),
    ]  # fmt: skip
    recorder = Recorder()
    frames = SealedFrames(recorder, Opener(CHANNEL))
    feed(frames, stream_of(messages), [step])
    assert [(kind, body) for kind, _, body in recorder.said] == messages
    # One frame at a time, whatever was announced.
    assert len(frames._buffer) <= wire.FRAME_LIMIT + 100


@given(MESSAGES.filter(bool), STEPS, st.data())
def test_one_wrong_bit_is_noticed_before_anything_false_is_said(
    messages: list[tuple[Kind, bytes]], steps: list[int], data: st.DataObject
) -> None:
    stream = bytearray(stream_of(messages))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= 1 << data.draw(st.integers(0, 7))
    recorder = Recorder()
    whole = [(kind, ticket, body) for ticket, (kind, body) in enumerate(messages, 1)]
    try:
        feed(SealedFrames(recorder, Opener(CHANNEL)), bytes(stream), steps)
    except WireError:
        pass
    else:
        assert len(recorder.said) < len(whole)  # it waits for more than will come
    assert recorder.said == whole[: len(recorder.said)]
    assert len(recorder.said) < len(whole)


@given(st.binary(max_size=500), STEPS)
def test_any_bytes_are_refused_or_waited_for(stream: bytes, steps: list[int]) -> None:
    recorder = Recorder()
    frames = SealedFrames(recorder, Opener(CHANNEL))
    refused = False
    try:
        feed(frames, stream, steps)
    except WireError:
        refused = True
    assert refused or len(stream) < wire.HEADER_BYTES
    assert not recorder.said


@given(st.sampled_from(Kind), st.binary(max_size=300), st.integers(1, 60), st.integers(0, 59))
def test_a_whole_message_under_whichever_of_its_datagrams(
    kind: Kind, body: bytes, fragments: int, fragment: int
) -> None:
    sealed = sealed_message(Sealer(CHANNEL), kind, 1, 2, 3, body)
    assert len(sealed) == len(body) + overhead(kind)
    header = wire.Header(
        kind, 1, 2, 3, 4, min(fragment, fragments - 1), fragments, len(sealed), 0, 77
    )
    out = bytearray(len(sealed))
    assert open_message(Opener(CHANNEL), header, sealed, out) == len(body)
    assert out[: len(body)] == body
    # Whose it is the key says, and nothing else.
    assert open_message(Opener(CHANNEL), header._replace(source=9), sealed, out) == len(body)
    for change in ({"session": 9}, {"ticket": 9}, {"layer": 9}):
        with pytest.raises(WireError, match="not authentic"):
            open_message(Opener(CHANNEL), header._replace(**change), sealed, out)


def test_what_is_sealed_and_how_belongs_to_the_protocols_version() -> None:
    """Whoever changes one of these bytes raises the version: else old ends only see forgeries."""
    assert PROTOCOL == (3, 3)
    assert sealed_frames(Sealer(CHANNEL), Kind.ASK, 1, 2, 3, 4, b"quack").hex() == (
        "444b0101010000000200000003000400000001000500000000000000"  # the header
        "000000008016c74f664d1d6564460a1012d552a1257f419e60"
    )
    answer = sealed_message(Sealer(CHANNEL), Kind.ANSWER, 1, 2, 3, b"quack")
    assert answer.hex() == "6fbc2116cdcd11606fb7b61dea3de49a2f9884efbd"
    note = sealed_message(Sealer(CHANNEL), Kind.PING, 1, 2, 3, b"quack")
    assert note.hex() == "01000000000000002294b6087207b0ed80f29e4895d6ab17b9f4b49ac8"
