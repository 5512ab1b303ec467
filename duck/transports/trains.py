"""Messages as trains of datagrams: taken apart, laid into place, made; for both ends of multicast.

Everything that is done for every datagram that comes is here, and none of it is a loop over the
datagrams of a message: the headers of a train are compared at once, and its payloads copied at
once.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from duck import wire
from duck.errors import WireError
from duck.reliable import Cut, Run
from duck.seal import Opener, Sealer
from duck.transports.datagrams import buffer_bytes
from duck.transports.sealed import open_message, sealed_message

# What every Ethernet carries, and what is left of it in any tunnel (IPv6 demands as much).
ETHERNET_MTU, TUNNEL_MTU = 1500, 1280


def ipv4(address: Sequence[Any] | None) -> str | None:
    """The IPv4 address of a connection's end; None if it has none."""
    if not address:
        return None
    try:
        found = ipaddress.ip_address(address[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped else None
    return str(found)


def message_room(message_bytes: int) -> int:
    """What a message takes in a receive buffer, as small or as large datagrams."""
    cuts = [Cut.for_mtu(ETHERNET_MTU), Cut.for_mtu(1 << 16)]
    return max(buffer_bytes(c.fragments(message_bytes), c.datagram_bytes) for c in cuts)


# In a message's train each header is the one before it with the next fragment and offset.
_WORDS, _U4 = wire.HEADER_BYTES // 4, np.dtype("<u4")


@functools.lru_cache(maxsize=16)
def _steps(payload_bytes: int) -> np.ndarray:
    """What every header of a train has more than the first, as 32-bit words."""
    numbers = np.arange(65, dtype=np.uint32)
    steps = np.zeros((65, _WORDS), np.uint32)
    steps[:, 4] = numbers  # fragment: the lower half of the word, and it never overflows
    steps[:, 6] = numbers * payload_bytes
    return steps


def runs(train: memoryview, size: int) -> Iterator[tuple[Run, memoryview]]:
    """Datagrams that came as one train, by messages: the fragments, and their datagrams.

    train: each datagram is `size` bytes long but the last.

    Raises:
        WireError: from the first one on that is no header of ours, the rest is dropped.
    """
    while train:
        head = wire.unpack_header(train[:size])
        fragments = 1
        if head.fragments > 1 and len(train) >= size + wire.HEADER_BYTES and not size % 4:
            most = 1 + (len(train) - wire.HEADER_BYTES) // size
            most = min(most, head.fragments - head.fragment, 65)
            words = np.ndarray((most, _WORDS), _U4, train, 0, (size, 4))
            want = words[0] + _steps(size - wire.HEADER_BYTES)[:most]
            # Mostly all are alike, and comparing bytes is the fastest way to see it.
            if words.tobytes() == want.tobytes():
                fragments = most
            else:
                fragments = int((words == want).all(axis=1).argmin())
        data, train = train[: fragments * size], train[fragments * size :]
        yield Run(head, fragments, len(data) - fragments * wire.HEADER_BYTES), data


def lay(data: memoryview, size: int, place: memoryview, run: Run) -> None:
    """Copy a run's payloads to where they belong in their message, which has room for them."""
    head, at, full = wire.HEADER_BYTES, run.header.offset, run.fragments - 1
    payload = size - head
    if full:
        rows = np.ndarray((full, payload), np.uint8, data, head, (size, 1))
        np.ndarray((full, payload), np.uint8, place, at)[...] = rows
        at += full * payload
    place[at : at + run.size - full * payload] = data[full * size + head :]


def parts(train: bytes, size: int, fragments: int) -> Iterator[memoryview]:
    """The datagrams of a message whose bits are set, neighbours together."""
    view = memoryview(train)
    start = 0
    while fragments:
        gap = (fragments & -fragments).bit_length() - 1
        fragments >>= gap
        count = (~fragments & fragments + 1).bit_length() - 1
        fragments >>= count
        start += gap
        yield view[start * size : (start + count) * size]
        start += count


def sealed(
    sealer: Sealer | None,
    kind: wire.Kind,
    session: int,
    ticket: int,
    layer: int,
    body: bytes,
) -> bytes:
    """A message as it travels: sealed if there is a key.

    Raises:
        TransportError: its ticket was sealed before.
    """
    if sealer is None:
        return body
    return sealed_message(sealer, kind, session, ticket, layer, body)


def verified(
    opener: Opener | None,
    header: wire.Header,
    message: memoryview,
    out: memoryview,
    checksum: wire.Checksum,
) -> bool:
    """Whether a message is the one that was sent; if it was sealed, its body is in `out` then."""
    if opener is None:
        return wire.check_message(header, message, checksum)
    try:
        open_message(opener, header, message, out)
    except WireError:
        return False
    return True


def note(
    sealer: Sealer | None,
    kind: wire.Kind,
    session: int,
    ticket: int,
    layer: int,
    source: int,
    payload: bytes,
) -> bytes:
    """A message in a single datagram; its checksum is CRC-32 on every machine."""
    message = sealed(sealer, kind, session, ticket, layer, payload)
    return wire.pack_header(kind, session, ticket, layer, source, payload=message) + message


def note_payload(header: wire.Header, data: memoryview, opener: Opener | None) -> bytes:
    """What a message in a single datagram holds.

    Raises:
        WireError: it is more than one, failed its checksum, or is not authentic.
    """
    payload = bytes(data[wire.HEADER_BYTES :])
    if header.fragments != 1 or header.message_bytes != len(payload) or header.offset:
        raise WireError(f"{header.kind.name} in {header.fragments} fragments")
    if not wire.check_crc(data[: wire.HEADER_BYTES], payload):
        raise WireError(f"{header.kind.name} failed its checksum")
    if opener is None:
        return payload
    out = bytearray(len(payload))
    return bytes(out[: open_message(opener, header, payload, out)])
