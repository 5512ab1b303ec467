"""A connection's bytes, cut anywhere: frames land where they belong, or the connection ends."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from duck import wire
from duck.errors import TransportError, WireError
from duck.transports.link import Link, data_frames, frame_bytes


class FakeTransport:
    """What a Link does to its connection."""

    def __init__(self) -> None:
        self.written = b""
        self.ended = ""

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.ended = "abort"

    def close(self) -> None:
        self.ended = self.ended or "close"

    def is_closing(self) -> bool:
        return bool(self.ended)


class Landing:
    """Frames of session 1, each landing in a fresh place; tickets in `unwanted` have none."""

    def __init__(self) -> None:
        self.got: list[tuple[wire.Header, bytes]] = []
        self.unwanted: set[int] = set()
        self.places: dict[int, bytearray] = {}

    def check(self, header: wire.Header) -> int:
        if header.session != 1:
            raise WireError("another session")
        known = self.places.get(header.ticket)
        if known is not None and len(known) != header.message_bytes:
            raise WireError("another message under this ticket")
        return frame_bytes(header, 4 << 20)

    def place(self, header: wire.Header) -> memoryview | None:
        if header.ticket in self.unwanted:
            return None
        place = self.places.setdefault(header.ticket, bytearray(header.message_bytes))
        return memoryview(place)[header.offset :]

    def arrived(self, header: wire.Header) -> None:
        stop = header.offset + wire.FRAME_LIMIT
        payload = bytes(self.places[header.ticket][header.offset : stop])
        self.got.append((header, payload))


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def connected(
    frames: Landing | None = None, checksum: wire.Checksum = zlib.crc32
) -> tuple[Link, FakeTransport]:
    link, transport = Link(), FakeTransport()
    link.connection_made(transport)  # type: ignore[arg-type]
    if frames:
        link.carry_data(frames, checksum=checksum)
    return link, transport


def receive(link: Link, data: bytes, sizes: list[int]) -> None:
    """As an event loop does: at most what the link's buffer takes, cut after `sizes`, repeated."""
    turn = at = 0
    while at < len(data) and not link.transport.is_closing():
        buffer = link.get_buffer(-1)
        count = min(len(buffer), len(data) - at, sizes[turn % len(sizes)])
        assert count > 0
        buffer[:count] = data[at : at + count]
        link.buffer_updated(count)
        turn, at = turn + 1, at + count


SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=6)
MESSAGES = st.lists(st.binary(min_size=1, max_size=300), max_size=5)


def _stream(messages: list[bytes], session: int = 1, checksum: wire.Checksum = zlib.crc32) -> bytes:
    frames = [
        data_frames(wire.Kind.ASK, session, ticket, ticket, 5, message, checksum)
        for ticket, message in enumerate(messages)
    ]
    return b"".join(b"".join(parts) for parts in frames)


@given(MESSAGES, SIZES)
def test_frames_land_however_they_are_cut(messages: list[bytes], sizes: list[int]) -> None:
    async def scenario() -> None:
        frames = Landing()
        link, transport = connected(frames)
        receive(link, _stream(messages), sizes)
        assert [payload for _, payload in frames.got] == messages
        assert [header.ticket for header, _ in frames.got] == list(range(len(messages)))
        assert not transport.ended

    run(scenario)


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (3 << 20) - 7])
def test_long_messages(size: int) -> None:
    async def scenario() -> None:
        frames = Landing()
        link, _ = connected(frames)
        message = bytes(range(256)) * (size // 256 + 1)
        receive(link, _stream([message[:size], b"next"]), [65536, 1, 100_000])
        assert frames.places == {0: bytearray(message[:size]), 1: bytearray(b"next")}

    run(scenario)


@given(MESSAGES.filter(len), SIZES, st.integers(0))
def test_a_damaged_frame_never_arrives(messages: list[bytes], sizes: list[int], flip: int) -> None:
    async def scenario() -> None:
        frames = Landing()
        link, transport = connected(frames)
        whole = _stream(messages)
        damaged = bytearray(whole)
        at = flip % (len(damaged) * 8)
        damaged[at // 8] ^= 1 << at % 8
        receive(link, bytes(damaged), sizes)
        arrived = [payload for _, payload in frames.got]
        assert arrived == messages[: len(arrived)]
        good = sum(len(message) + 32 for message in messages[: len(arrived)])
        assert good <= at // 8  # nothing from the damage on
        # Either it was noticed, or the frame pretends to be longer than what came.
        assert transport.ended or link._header is not None

    run(scenario)


@given(st.binary(min_size=1, max_size=300), SIZES, st.booleans())
def test_any_bytes_as_frames(data: bytes, sizes: list[int], ours: bool) -> None:
    async def scenario() -> None:
        frames = Landing()
        link, _ = connected(frames)
        receive(link, (b"\x44\x4b\x01\x01\x01\0\0\0" if ours else b"") + data, sizes)
        assert not frames.got

    run(scenario)


@given(st.binary(min_size=1, max_size=300), SIZES)
@example(b"    ", [1])
def test_any_bytes_as_control(data: bytes, sizes: list[int]) -> None:
    async def scenario() -> None:
        link, transport = connected()
        receive(link, data, sizes)
        if not transport.ended:
            return
        # It is told why, and whoever listens hears it too.
        (answer,) = wire.ControlDecoder().feed(transport.written)
        assert answer["t"] == "ERR"
        link.connection_lost(None)
        with pytest.raises(WireError, match=r"control message|another protocol"):
            await _receive_all(link)

    run(scenario)


async def _receive_all(link: Link) -> None:
    while True:
        await link.receive()


async def test_memory_given_up_in_the_middle_of_a_frame_is_not_written_again() -> None:
    frames = Landing()
    link, _ = connected(frames)
    data = _stream([b"a" * 100, b"b" * 100])
    receive(link, data[: 32 + 60], [1000])  # the first frame, cut in its payload
    frames.unwanted.add(0)
    receive(link, data[32 + 60 :], [17])
    assert frames.places[0] == b"a" * 60 + bytes(40)
    assert [payload for _, payload in frames.got] == [b"b" * 100]
    assert link.dropped == 1


async def test_bytes_ahead_of_the_switch() -> None:
    for ahead in (b"\1", wire.encode_control({"t": "EXTRA"})):
        link, _ = connected()
        receive(link, ahead, [1000])
        with pytest.raises(WireError, match="ahead of the switch"):
            link.carry_data(Landing())


async def test_a_peer_that_sends_more_than_anyone_reads() -> None:
    link, transport = connected()
    receive(link, wire.encode_control({"t": "PING"}) * 65, [4000])
    assert transport.ended
    assert link.error is not None
    assert "64 unread" in str(link.error)


async def test_forgetting_messages_keeps_the_end() -> None:
    link, _ = connected()
    receive(link, wire.encode_control({"t": "PONG"}) * 3, [1000])
    link.forget_messages()
    assert link.messages.empty()
    link.connection_lost(OSError("reset"))
    link.forget_messages()
    with pytest.raises(TransportError, match=r"connection lost \(reset\)"):
        await link.receive()
    with pytest.raises(TransportError):  # and again, for whoever else waits
        await link.receive()


async def test_silence() -> None:
    link, _ = connected()
    with pytest.raises(TimeoutError):
        await link.receive(0)
