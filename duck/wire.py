"""Bytes and their meaning: the 32-byte data header, ask and answer bodies, control messages.

Nothing here touches a socket, a clock or asyncio. Every decoder takes any bytes and returns a value
or raises `WireError`; no size found in a message is trusted before it is checked against the plan.

Data plane, little-endian, one header before every frame:

    offset  0  u16 magic 0x4B44      8  u32 ticket          16  u16 fragment index
            2  u8  version          12  u16 layer           18  u16 fragments in the message
            3  u8  kind             14  u16 source duck     20  u32 message bytes
            4  u32 session              (0xFFFF: the host)  24  u32 offset of this payload
                                                            28  u32 checksum of header[0:28]
                                                                and payload
    ask     ids i32 [T, K] | weights f32 [T, K] | x [T, H] in the wire dtype
    answer  queue_us u32 | compute_us u32 | 8 bytes zero | partial sums [T, H] in the answer dtype
    nack    which fragments of the answer are missing: a bitmap, bit 0 of byte 0 is fragment 0
    rnack   the same of the ask; all zero: it is whole and waits; empty: nothing is known of it
    ping    u16 which duck it is for (0xFFFF: all) | u16 payload bytes of all datagrams from now on
            (0: it is a trial) | zeros up to the size that is tried; its ticket counts the pings
    pong    the ping's own bytes and ticket

In datagrams every fragment of an ask or answer but the last is of one size, and all carry the
checksum of the whole message (with fragment and offset 0): it is checked once, where the message
lies.

Control plane: u32 length + one msgpack map with a "t" (its kind), at most 1 MiB.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np

from duck.errors import WireError

MAGIC = 0x4B44
VERSION = 1
HOST = 0xFFFF
HEADER = struct.Struct("<HBBIIHHHHIII")
HEADER_BYTES = HEADER.size
STAMPS = struct.Struct("<II8x")
STAMP_BYTES = STAMPS.size
CONTROL_LIMIT = 1 << 20
# A frame of a long answer carries at most this much, so that one check covers a bounded stretch.
FRAME_LIMIT = 1 << 20
# No plan may make an ask or an answer larger: one is 7 MB for 256 rows of 7,168 float32.
MESSAGE_LIMIT = 1 << 26

WIRE_BYTES = {"float32": 4, "bfloat16": 2}


# What covers a frame's header and payload: of bytes, after those that gave the second argument.
# Datagrams and sealed frames use zlib's CRC-32; tcp's ends agree on one.
Checksum = Callable[[bytes | bytearray | memoryview, int], int]


class Kind(enum.IntEnum):
    """What a data frame is."""

    ASK = 1
    ANSWER = 2
    NACK = 3
    RNACK = 4
    CANCEL = 5
    PING = 6
    PONG = 7
    ERROR = 8


_KINDS = {int(kind): kind for kind in Kind}  # every frame asks, and calling an enum takes its time


class Header(NamedTuple):
    """The fixed header of a data frame; sizes and offsets in bytes."""

    kind: Kind
    session: int
    ticket: int
    layer: int
    source: int
    fragment: int
    fragments: int
    message_bytes: int
    offset: int
    crc: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What the plan fixes about every ask and answer; sizes follow from it and the row count."""

    hidden: int
    top_k: int
    ask_dtype: str
    answer_dtype: str
    max_rows: int

    def ask_bytes(self, rows: int) -> int:
        """Bytes of an ask of `rows` rows, without its header."""
        return rows * (self.top_k * 8 + self.hidden * WIRE_BYTES[self.ask_dtype])

    def answer_bytes(self, rows: int) -> int:
        """Bytes of one duck's partial sums for `rows` rows, without header and stamps."""
        return rows * self.hidden * WIRE_BYTES[self.answer_dtype]

    def rows_of_ask(self, message_bytes: int) -> int:
        """How many rows an ask of this size holds.

        Raises:
            WireError: no whole number of rows, or more than the plan allows.
        """
        rows, rest = divmod(message_bytes, self.ask_bytes(1))
        if rest or not 1 <= rows <= self.max_rows:
            raise WireError(
                f"ask of {message_bytes} bytes: want 1..{self.max_rows} rows of {self.ask_bytes(1)}"
            )
        return rows


def pack_header(
    kind: Kind,
    session: int,
    ticket: int,
    layer: int,
    source: int,
    *,
    payload: bytes | bytearray | memoryview,
    more: bytes | memoryview = b"",
    fragment: int = 0,
    fragments: int = 1,
    message_bytes: int | None = None,
    offset: int = 0,
    checksum: Checksum = zlib.crc32,
) -> bytes:
    """The header for a payload in one or two pieces; one whole message unless told otherwise."""
    if message_bytes is None:
        message_bytes = len(payload) + len(more)
    head = HEADER.pack(
        MAGIC, VERSION, kind, session, ticket, layer, source, fragment, fragments,
        message_bytes, offset, 0,
    )  # fmt: skip
    crc = checksum(payload, checksum(head[:28], 0))
    if more:
        crc = checksum(more, crc)
    return head[:28] + crc.to_bytes(4, "little")


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """Read a header; only its own form is checked, not whether the plan allows it.

    Raises:
        WireError: too short, another protocol or version, an unknown kind, impossible fragments.
    """
    if len(data) < HEADER_BYTES:
        raise WireError(f"header of {len(data)} bytes, want {HEADER_BYTES}")
    (
        magic,
        version,
        kind,
        session,
        ticket,
        layer,
        source,
        fragment,
        fragments,
        total,
        offset,
        crc,
    ) = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"magic {magic:#06x}, want {MAGIC:#06x}: the peer does not speak duck")
    if version != VERSION:
        raise WireError(f"data frames of version {version}, want {VERSION}")
    known = _KINDS.get(kind)
    if known is None:
        raise WireError(f"unknown frame kind {kind}")
    if not fragment < fragments or offset > total:
        raise WireError(f"fragment {fragment} of {fragments} at {offset} of {total} bytes")
    return Header(known, session, ticket, layer, source, fragment, fragments, total, offset, crc)


def check_crc(
    header: bytes | bytearray | memoryview,
    payload: bytes | bytearray | memoryview,
    checksum: Checksum = zlib.crc32,
) -> bool:
    """Whether a received frame is the one that was sent."""
    want = int.from_bytes(header[28:32], "little")
    return checksum(payload, checksum(header[:28], 0)) == want


class AskBody(NamedTuple):
    """Views into a received ask."""

    ids: np.ndarray  # (rows, top_k) int32
    weights: np.ndarray  # (rows, top_k) float32
    x: np.ndarray  # (rows, hidden) float32, or uint16 holding bfloat16


def pack_stamps(queue_s: float, compute_s: float) -> bytes:
    """The stamps before an answer: how long its ask waited, and how long it took to compute."""
    queue_us, compute_us = (max(0, min(int(s * 1e6), 0xFFFFFFFF)) for s in (queue_s, compute_s))
    return STAMPS.pack(queue_us, compute_us)


def wire_array(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds a wire dtype: bfloat16 travels as its 16 bits."""
    return np.dtype("<f4" if dtype == "float32" else "<u2")


def unpack_ask(payload: bytes | bytearray | memoryview, shape: Shape) -> AskBody:
    """Views of a whole ask's body.

    Raises:
        WireError: a size that is no whole number of rows.
    """
    rows = shape.rows_of_ask(len(payload))
    choices = rows * shape.top_k
    ids = np.frombuffer(payload, "<i4", choices).reshape(rows, shape.top_k)
    weights = np.frombuffer(payload, "<f4", choices, choices * 4).reshape(rows, shape.top_k)
    x = np.frombuffer(payload, wire_array(shape.ask_dtype), rows * shape.hidden, choices * 8)
    return AskBody(ids, weights, x.reshape(rows, shape.hidden))


_IDS, _WEIGHTS = np.dtype("<i4"), np.dtype("<f4")


def pack_ask(ids: np.ndarray, weights: np.ndarray, x: np.ndarray) -> bytes:
    """The body of an ask; arrays as in `AskBody`."""
    whole = np.ascontiguousarray
    return b"".join((whole(ids, _IDS).data, whole(weights, _WEIGHTS).data, whole(x).data))


def answer_frames(message_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut an answer message into frames: (fragment, fragments, offset, bytes)."""
    fragments = max(1, -(-message_bytes // FRAME_LIMIT))
    for index in range(fragments):
        start = index * FRAME_LIMIT
        yield index, fragments, start, min(FRAME_LIMIT, message_bytes - start)


# --- datagrams


_FRAGMENT = struct.Struct("<H")
_OFFSET = struct.Struct("<I")
_PING = struct.Struct("<HH")
PING_BYTES = _PING.size


def datagrams(
    kind: Kind,
    session: int,
    ticket: int,
    layer: int,
    source: int,
    message: bytes | bytearray | memoryview,
    payload_bytes: int,
    checksum: Checksum = zlib.crc32,
) -> bytes:
    """A message as one train of datagrams, each `HEADER_BYTES + payload_bytes` long but the last.

    message: not empty.
    """
    view = memoryview(message)
    fragments = -(-len(view) // payload_bytes)
    head = bytearray(
        pack_header(
            kind,
            session,
            ticket,
            layer,
            source,
            payload=message,
            fragments=fragments,
            checksum=checksum,
        )
    )
    parts: list[bytes | memoryview] = [bytes(head), view[:payload_bytes]]
    for fragment in range(1, fragments):
        offset = fragment * payload_bytes
        _FRAGMENT.pack_into(head, 16, fragment)
        _OFFSET.pack_into(head, 24, offset)
        parts += (bytes(head), view[offset : offset + payload_bytes])
    return b"".join(parts)


def check_message(
    header: Header, message: bytes | memoryview, checksum: Checksum = zlib.crc32
) -> bool:
    """Whether a message put together from datagrams is the one that was sent.

    header: of any of its fragments.
    """
    whole = pack_header(
        header.kind, header.session, header.ticket, header.layer, header.source,
        payload=message, fragments=header.fragments, checksum=checksum,
    )  # fmt: skip
    return int.from_bytes(whole[28:], "little") == header.crc


def pack_missing(missing: int, fragments: int) -> bytes:
    """The body of a NACK or RNACK: bit n of `missing` is fragment n of so many."""
    return missing.to_bytes(-(-fragments // 8), "little")


def unpack_missing(payload: bytes | memoryview, fragments: int) -> int:
    """Which fragments a NACK or RNACK is about, as bits.

    Raises:
        WireError: a bitmap for another number of fragments.
    """
    missing = int.from_bytes(payload, "little")
    if len(payload) != -(-fragments // 8) or missing >> fragments:
        raise WireError(f"a bitmap of {len(payload)} bytes for a message of {fragments} fragments")
    return missing


def pack_ping(duck: int, use: int, size: int) -> bytes:
    """The body of a PING.

    duck: which one it is for, `HOST`: all. use: payload bytes of datagrams from now on, or 0.
    size: of the body, at least `PING_BYTES`.
    """
    return _PING.pack(duck, use).ljust(size, b"\0")


def unpack_ping(payload: bytes | memoryview) -> tuple[int, int]:
    """Which duck a PING is for, and the payload bytes of datagrams from now on.

    Raises:
        WireError: it does not say.
    """
    if len(payload) < PING_BYTES:
        raise WireError(f"PING of {len(payload)} bytes, want {PING_BYTES} or more")
    duck, use = _PING.unpack_from(payload)
    return duck, use


# --- bfloat16 <-> float32 on plain numpy


def to_float32(x: np.ndarray) -> np.ndarray:
    """float32 values of a wire array (uint16 holds bfloat16)."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def to_wire(x: np.ndarray, dtype: str) -> np.ndarray:
    """A float32 array in the wire dtype, rounded to nearest even; NaN stays NaN."""
    if dtype == "float32":
        return np.ascontiguousarray(x, np.float32)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's mantissa into infinity: keep its sign, set a quiet bit.
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


# --- control plane

# How a TLS connection begins: a record of a handshake (or an alert), of version 3.x. No control
# message does: it would be one of 66 KB or more, and a greeting is far shorter.
_TLS_RECORDS = (22, 21)
TELLING_BYTES = 3


def looks_like_tls(data: bytes | bytearray | memoryview) -> bool:
    """Whether a connection that begins so (`TELLING_BYTES` or more) speaks TLS."""
    return data[0] in _TLS_RECORDS and data[1] == 3 and 1 <= data[2] <= 4


# How a control message begins: its length, then a map of msgpack.
OPENING_BYTES = 5


def looks_like_control(data: bytes | bytearray | memoryview) -> bool:
    """Whether a connection that begins so (`OPENING_BYTES` or more) carries our messages."""
    size, kind = int.from_bytes(data[:4], "little"), data[4]
    return size <= CONTROL_LIMIT and (0x80 <= kind <= 0x8F or kind in (0xDE, 0xDF))


def encode_control(message: Mapping[str, Any]) -> bytes:
    """One control message, framed."""
    body: bytes = msgpack.packb(dict(message), use_bin_type=True)
    if len(body) > CONTROL_LIMIT:
        raise WireError(f"control message of {len(body)} bytes, at most {CONTROL_LIMIT}")
    return len(body).to_bytes(4, "little") + body


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise WireError(f"control message with msgpack extension {code}")


class Foreign(WireError):
    """A peer's first bytes are nothing of ours: it speaks another protocol.

    Args:
        began: those bytes, for people, on one line.
        why: what is wrong with them; without it, that they are of another protocol.
    """

    def __init__(self, began: str, why: str = "") -> None:
        super().__init__(why or f"another protocol, which begins {began}")
        self.began = began


ECHO = "what it was sent"  # what some servers begin with


def shown(data: bytes | bytearray) -> str:
    """How a stranger begins: its words in quotes, or some bytes in hex."""
    words = first_words(data)
    return repr(words) if words else f"bytes {bytes(data[:8]).hex(' ')}"


def first_words(data: bytes | bytearray) -> str:
    """The first line of what is text from its first byte on, as no control message is; else "".

    data: `TELLING_BYTES` or more: a control message's length has bytes that are none of a text.
    """
    line = bytes(data[:60]).splitlines()[0] if data else b""
    text = line.decode("ascii", "ignore")
    is_text = len(text) == len(line) >= TELLING_BYTES and text.isprintable()
    return text if is_text else ""


class ControlDecoder:
    """Control messages out of a byte stream, however it is cut; none longer than `limit` bytes."""

    def __init__(self, limit: int = CONTROL_LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self.begun = False  # a message has come

    @property
    def pending(self) -> int:
        """Bytes received that are not yet a whole message."""
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[dict[str, Any]]:
        """Add bytes and take out the messages they complete.

        What follows good messages is looked at when they have been dealt with: it may not be
        control any more.

        Raises:
            WireError: a message too large, not msgpack, or not a map with a text "t".
            Foreign: nor is it anything else of ours.
        """
        self._buffer += data
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "little")
            if size > self.limit:
                if messages:
                    break
                why = f"control message of {size} bytes, at most {self.limit}"
                if self.begun:
                    raise WireError(why)
                text = first_words(self._buffer)
                raise Foreign(shown(self._buffer), "" if text else why)
            if len(self._buffer) < 4 + size:
                break
            whole = bytes(self._buffer[: 4 + size])
            del self._buffer[: 4 + size]
            try:
                messages.append(_decode_control(whole[4:]))
            except WireError as error:
                if self.begun:
                    raise
                raise Foreign(shown(whole), str(error)) from None
            self.begun = True
        return messages


def _decode_control(body: bytes) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(
            body, raw=False, strict_map_key=True, ext_hook=_refuse_extension, timestamp=0
        )
    except WireError:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        more = f": {error}" if str(error) else ""
        raise WireError(f"control message that is no msgpack{more}") from None
    if not isinstance(message, dict) or not isinstance(message.get("t"), str):
        raise WireError('control message without a kind "t"')
    return message


def plain(text: str, limit: int = 1000) -> str:
    """A peer's text as one line that does nothing to a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:limit])


def field(message: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """A field of a control message, of the type it must have.

    Raises:
        WireError: absent or of another type.
    """
    value = message.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    # bool is an int in Python; a peer that sends one where a number belongs is wrong.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        what = str(message.get("t", "plan"))[:40]
        raise WireError(f"{what}: field {name!r} is {type(value).__name__}")
    return value
