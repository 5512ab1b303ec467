"""Data frames that nobody without the key can read, forge, change or play again: AES-128-GCM.

One tag a message. The header (its first 28 bytes, without the checksum) is associated data, so a
frame cannot be moved to another ask, layer, duck or session. A key belongs to one sender, one
audience, one data plane and one kind of frame in one session; under it no nonce is used twice:

    asks, answers   nonce = header[8:20], the ticket to the fragments   header | ciphertext | tag
    all others      nonce = a counter, which travels with them          header | counter | ... | tag

What is sealed is a message, or over TCP a frame of at most 1 MiB of one, so that no more than that
waits to be checked; whoever cuts it smaller (multicast) puts it together before it is opened.

`Sealer` refuses to seal a ticket twice, whoever asks for it: what is lost is sent again as the same
bytes, never sealed again (an answer that is computed twice has other stamps, and two texts under
one nonce give GCM's authentication key away). `Opener` refuses what it has opened before.

Pure: no socket, no clock. Buffers are the caller's; nothing is copied on the way.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from duck.errors import TransportError, WireError
from duck.keys import ClusterKey
from duck.wire import Kind

NONCE_BYTES = 16  # of a handshake: the host's in HELLO, a duck's in WELCOME
ASK_SECRET_BYTES = 32
KEY_BYTES = 16  # of AES-128: as strong as the X25519 and Ed25519 of the control plane's TLS
TAG_BYTES = 16
_COUNTER = struct.Struct("<Q")
_HEAD_BYTES = 28  # of the header: all but its checksum
# Ticket, layer, source, fragment, fragments: 12 bytes as they lie there. Ticket and fragment make
# them new; the others are along for the ride.
_NONCE = slice(8, 20)
_PLACE = struct.Struct("<I4xH")  # ticket and fragment
_BY_TICKET = frozenset({Kind.ASK, Kind.ANSWER})
_ANSWER = int(Kind.ANSWER)  # every one of a round is compared with it

_FORGED = "a sealed {} is not authentic: forged, damaged, or another key"
FORGED_ANSWER = _FORGED.format("ANSWER")

Bytes = bytes | bytearray | memoryview


def overhead(kind: Kind) -> int:
    """How much longer a sealed message of this kind is than its body."""
    if kind is Kind.ANSWER or kind is Kind.ASK:
        return TAG_BYTES
    return _COUNTER.size + TAG_BYTES


# --- keys


@dataclass(frozen=True)
class Channel:
    """One sender and its audience on one data plane: a key for every kind of frame."""

    cluster: ClusterKey
    salt: bytes
    label: str

    def key(self, kind: Kind) -> bytes:
        return self.cluster.derive(f"data {self.label} {kind.name}", self.salt, KEY_BYTES)

    def __repr__(self) -> str:
        return f"Channel({self.label})"


@dataclass(frozen=True, repr=False)
class SessionKeys:
    """The channels of one session; its secrets travel inside TLS only.

    So frames that somebody keeps stay closed to them even when the cluster key is stolen later.

    Asks are written (or multicast) once for all ducks, so all ducks of the session must share their
    key: it hangs on `ask_secret`, which the host draws anew for every session and puts into every
    HELLO. Answers, and what the host says to one duck alone, hang on that duck's own nonce.

    A plane is named by its own name ("tcp", "multicast"): a session may use two, and a ticket on
    each.

    Args:
        cluster: the key both ends have.
        host_nonce, ask_secret: of HELLO.
    """

    cluster: ClusterKey
    host_nonce: bytes
    ask_secret: bytes

    def __post_init__(self) -> None:
        _check("host nonce", self.host_nonce, NONCE_BYTES)
        _check("ask secret", self.ask_secret, ASK_SECRET_BYTES)

    def to_all(self, plane: str) -> Channel:
        """From the host to all ducks of this session."""
        return Channel(self.cluster, self.host_nonce + self.ask_secret, f"{plane} host>all")

    def to_duck(self, plane: str, duck: int, duck_nonce: bytes) -> Channel:
        """From the host to one duck."""
        return self._pair(f"{plane} host>{duck}", duck_nonce)

    def to_host(self, plane: str, duck: int, duck_nonce: bytes) -> Channel:
        """From one duck to the host."""
        return self._pair(f"{plane} {duck}>host", duck_nonce)

    def _pair(self, label: str, duck_nonce: bytes) -> Channel:
        _check("duck nonce", duck_nonce, NONCE_BYTES)
        return Channel(self.cluster, self.host_nonce + duck_nonce, label)


def _check(what: str, value: bytes, nbytes: int) -> None:
    if len(value) != nbytes:
        raise WireError(f"{what} of {len(value)} bytes, want {nbytes}")


# --- numbers that are used once


class Window:
    """Which numbers have been seen, in a window below the highest; older ones count as seen."""

    SIZE = 1024
    _MASK = (1 << SIZE) - 1

    def __init__(self) -> None:
        self._top = -1
        self._bits = 0  # bit i: top - i has been seen

    def seen(self, number: int) -> bool:
        behind = self._top - number
        return behind >= 0 and (behind >= self.SIZE or bool(self._bits >> behind & 1))

    def note(self, number: int) -> None:
        ahead = number - self._top
        if ahead <= 0:
            self._bits |= 1 << -ahead
        elif ahead >= self.SIZE:
            self._top, self._bits = number, 1
        else:
            self._top, self._bits = number, (self._bits << ahead | 1) & self._MASK


# --- messages


class _Ciphers(dict[int, AESGCM]):
    """Of a channel, by kind of frame; made when they are first needed."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def __missing__(self, kind: int) -> AESGCM:
        cipher = self[kind] = AESGCM(self._channel.key(Kind(kind)))
        return cipher


class Sealer:
    """Seals what one sender says on one channel; there must be one for it in the whole session."""

    def __init__(self, channel: Channel) -> None:
        self._ciphers = _Ciphers(channel)
        self._used = defaultdict[int, Window](Window)
        self._due: dict[int, tuple[int, int]] = {}  # kind -> ticket and fragment that may follow
        self._count = 0

    def seal(self, head: Bytes, body: Bytes) -> bytes:
        """A sealed message.

        head: the header as it will be sent.

        Raises:
            TransportError: this ticket was sealed before (all were used, or an ask was answered
                twice).
        """
        cipher, nonce, counter = self._begin(head)
        return counter + cipher.encrypt(nonce, body, head[:_HEAD_BYTES])

    def seal_into(self, head: Bytes, body: Bytes, out: memoryview) -> int:
        """As `seal`, into `out`; its length.

        out: `len(body) + overhead(kind)` bytes, no part of `body`; when this raises, as it was.
        """
        cipher, nonce, counter = self._begin(head)
        out[: len(counter)] = counter
        sealed = out[len(counter) :]
        return len(counter) + cipher.encrypt_into(nonce, body, head[:_HEAD_BYTES], sealed)

    def _begin(self, head: Bytes) -> tuple[AESGCM, Bytes, bytes]:
        """The cipher, a nonce that is used up by this, and the counter that travels."""
        kind = head[3]
        cipher = self._ciphers[kind]
        if kind in _BY_TICKET:
            self._claim(kind, head)
            return cipher, head[_NONCE], b""
        self._count += 1  # 64 bits: never all used
        counter = _COUNTER.pack(self._count)
        return cipher, counter + bytes(4), counter

    def _claim(self, kind: int, head: Bytes) -> None:
        """Make sure that this nonce is new: a ticket from its first fragment on, one by one."""
        ticket, fragment = _PLACE.unpack_from(head, 8)
        if fragment:
            fresh = self._due.get(kind) == (ticket, fragment)
        else:
            used = self._used[kind]
            if fresh := not used.seen(ticket):
                used.note(ticket)
        if not fresh:
            raise TransportError(
                f"ticket {ticket} was used before in this session; start a new one"
            )
        self._due[kind] = (ticket, fragment + 1)


# What opens one duck's answer, where that lies, and where it goes; `Opener.landing` makes it.
Landing = tuple[Callable[[Bytes, Bytes, Bytes, Bytes], int], memoryview, memoryview]


def open_answers(
    heads: Iterable[bytes], landings: Sequence[Landing], ducks: Iterable[int]
) -> list[int]:
    """Open the answers of these ducks to one ask; whose are forged or damaged.

    On the way of every answer, so it is one loop over what was made ready before.

    heads: of the ducks' answers in turn, the first 28 bytes. landings: of every duck.
    """
    bad = []
    for duck, head in zip(ducks, heads, strict=False):
        open_into, sealed, out = landings[duck]
        try:
            open_into(head[_NONCE], sealed, head, out)
        except InvalidTag:
            bad.append(duck)
    return bad


class Opener:
    """Opens what comes on one channel.

    Asks and counted frames are opened once each. Answers are not remembered here: their receiver
    knows which it waits for, and a ticket never comes back in a session.
    """

    def __init__(self, channel: Channel) -> None:
        self._ciphers = _Ciphers(channel)
        self._seen = defaultdict[int, Window](Window)

    def open_into(self, head: Bytes, sealed: Bytes, out: Bytes) -> int:
        """Write a message's body into `out`; its length.

        head: the header as it came; sealed: all the payload; out: at least the body's length, no
        part of `sealed`. When this raises, `out` may hold anything, and none of it may be used.

        Raises:
            WireError: forged, damaged, sealed for somebody else, cut off, or opened before.
        """
        kind = head[3]
        cipher = self._ciphers[kind]
        if kind == _ANSWER:
            return self._decrypt(cipher, head[_NONCE], head, sealed, out)
        fragment = 0
        if kind == Kind.ASK:
            number = int.from_bytes(head[8:12], "little")
            fragment = int.from_bytes(head[16:18], "little")
            nonce: Bytes = head[_NONCE]
        else:
            if len(sealed) < _COUNTER.size:
                raise WireError(f"a sealed {Kind(kind).name} of {len(sealed)} bytes")
            (number,) = _COUNTER.unpack_from(sealed)
            nonce = bytes(sealed[: _COUNTER.size]) + bytes(4)
            sealed = memoryview(sealed)[_COUNTER.size :]
        seen = self._seen[kind]
        # Later fragments of an ask follow their first one, which only comes once.
        if not fragment and seen.seen(number):
            raise WireError(f"{Kind(kind).name} {number} came before: replayed, or very late")
        size = self._decrypt(cipher, nonce, head, sealed, out)
        if not fragment:
            seen.note(number)  # only now: a forged number must not shut out the real one
        return size

    def landing(self, sealed: memoryview, out: memoryview) -> Landing:
        """For `open_answers`: a sealed answer opens into `out`, as long as the body."""
        return self._ciphers[_ANSWER].decrypt_into, sealed, out

    @staticmethod
    def _decrypt(cipher: AESGCM, nonce: Bytes, head: Bytes, sealed: Bytes, out: Bytes) -> int:
        size = len(sealed) - TAG_BYTES
        if size < 0:
            raise WireError(f"a sealed {Kind(head[3]).name} of {len(sealed)} bytes")
        try:
            return cipher.decrypt_into(nonce, sealed, head[:_HEAD_BYTES], memoryview(out)[:size])
        except InvalidTag:
            raise WireError(_FORGED.format(Kind(head[3]).name)) from None
