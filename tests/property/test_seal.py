"""Sealed messages: what was sealed comes out, once, for whom it was meant; nothing else does."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck import seal, wire
from duck.errors import TransportError, WireError
from duck.keys import ClusterKey
from duck.seal import Channel, Opener, Sealer, SessionKeys, Window, overhead
from duck.wire import Kind

CLUSTER = ClusterKey(bytes(range(32)))
HOST_NONCE, DUCK_NONCE, ASK_SECRET = b"h" * 16, b"d" * 16, b"a" * 32
KEYS = SessionKeys(CLUSTER, HOST_NONCE, ASK_SECRET)
CHANNEL = KEYS.to_host("tcp", 3, DUCK_NONCE)


def head_of(
    kind: Kind, nbytes: int, *, ticket: int = 7, fragment: int = 0, fragments: int = 1, **more: int
) -> bytes:
    """The header of a message with a body of so many bytes."""
    fields = {"session": 9, "layer": 4, "source": 3, **more}
    return wire.pack_header(
        kind, ticket=ticket, fragment=fragment, fragments=fragments,
        message_bytes=nbytes + overhead(kind), payload=b"", **fields,
    )  # fmt: skip


def opened(opener: Opener, head: bytes, sealed: bytes | bytearray) -> bytes:
    out = bytearray(len(sealed))
    return bytes(out[: opener.open_into(head, sealed, out)])


# --- what is sealed comes out


@given(st.sampled_from(Kind), st.binary(max_size=300), st.integers(0, 0xFFFFFFFF))
def test_what_was_sealed_comes_out(kind: Kind, body: bytes, ticket: int) -> None:
    head = head_of(kind, len(body), ticket=ticket)
    sealed = Sealer(CHANNEL).seal(head, body)
    assert len(sealed) == len(body) + overhead(kind)
    assert opened(Opener(CHANNEL), head, sealed) == body
    if len(body) > 8:
        assert body not in sealed


def test_into_the_middle_of_other_memory() -> None:
    """Nothing but the place it was given is written."""
    body = bytes(range(100))
    head = head_of(Kind.ANSWER, len(body))
    memory = bytearray(b"\xee" * 300)
    size = Sealer(CHANNEL).seal_into(head, body, memoryview(memory)[50:166])
    assert size == 116
    assert memory[:50] + memory[166:] == b"\xee" * 184
    row = bytearray(b"\xdd" * 200)
    assert Opener(CHANNEL).open_into(head, memoryview(memory)[50:166], memoryview(row)[20:]) == 100
    assert row == b"\xdd" * 20 + body + b"\xdd" * 80


def test_the_checksum_of_the_header_may_be_another() -> None:
    """Whoever cuts a message into datagrams gives each its own; it is not part of the seal."""
    head = head_of(Kind.ANSWER, 5)
    sealed = Sealer(CHANNEL).seal(head, b"hello")
    assert opened(Opener(CHANNEL), head[:28] + b"\xff" * 4, sealed) == b"hello"


# --- nothing else does


def test_one_flipped_bit_anywhere_is_noticed() -> None:
    for kind in Kind:
        head = head_of(kind, 20)
        sealed = Sealer(CHANNEL).seal(head, bytes(20))
        for at in range(28):
            if at == 3:
                continue  # the kind: another kind has another key, see below
            for bit in range(8):
                wrong = bytearray(head)
                wrong[at] ^= 1 << bit
                with pytest.raises(WireError, match="not authentic"):
                    opened(Opener(CHANNEL), bytes(wrong), sealed)
        for at, bit in itertools.product(range(len(sealed)), range(8)):
            wrong = bytearray(sealed)
            wrong[at] ^= 1 << bit
            with pytest.raises(WireError, match="not authentic"):
                opened(Opener(CHANNEL), head, wrong)


@pytest.mark.parametrize("kind", Kind)
def test_cut_off_or_longer(kind: Kind) -> None:
    head = head_of(kind, 40)
    sealed = Sealer(CHANNEL).seal(head, bytes(40))
    for size in range(len(sealed)):
        with pytest.raises(WireError):
            opened(Opener(CHANNEL), head, sealed[:size])
    with pytest.raises(WireError):
        opened(Opener(CHANNEL), head, sealed + b"\0")


@given(st.sampled_from(Kind), st.binary(max_size=100))
def test_any_bytes_are_refused(kind: Kind, data: bytes) -> None:
    opener = Opener(CHANNEL)
    with pytest.raises(WireError):
        opened(opener, head_of(kind, 40), data)
    # And they do not shut out what is real.
    head = head_of(kind, 4)
    assert opened(opener, head, Sealer(CHANNEL).seal(head, b"real")) == b"real"


def channels() -> dict[str, Channel]:
    """One of each thing that must have keys of its own."""
    other_key = SessionKeys(ClusterKey(bytes(range(1, 33))), HOST_NONCE, ASK_SECRET)
    other_host = SessionKeys(CLUSTER, b"H" * 16, ASK_SECRET)
    other_secret = SessionKeys(CLUSTER, HOST_NONCE, b"A" * 32)
    return {
        "to all": KEYS.to_all("tcp"),
        "to duck 3": KEYS.to_duck("tcp", 3, DUCK_NONCE),
        "to duck 4": KEYS.to_duck("tcp", 4, DUCK_NONCE),
        "from duck 3": KEYS.to_host("tcp", 3, DUCK_NONCE),
        "from duck 4": KEYS.to_host("tcp", 4, DUCK_NONCE),
        "another duck nonce": KEYS.to_host("tcp", 3, b"D" * 16),
        "another host nonce": other_host.to_host("tcp", 3, DUCK_NONCE),
        "another host nonce, to all": other_host.to_all("tcp"),
        "another secret, to all": other_secret.to_all("tcp"),
        "another plane": KEYS.to_host("multicast", 3, DUCK_NONCE),
        "another plane, to all": KEYS.to_all("multicast"),
        "another cluster": other_key.to_host("tcp", 3, DUCK_NONCE),
        "another cluster, to all": other_key.to_all("tcp"),
    }


def test_all_channels_and_kinds_have_keys_of_their_own() -> None:
    keys = {channel.key(kind) for channel in channels().values() for kind in Kind}
    assert len(keys) == len(channels()) * len(Kind)
    assert CLUSTER.derive("data tcp 3>host ANSWER") not in keys  # nor without the nonces


@pytest.mark.parametrize("name", channels())
def test_what_is_meant_for_another_channel(name: str) -> None:
    """Among them: what a host said, thrown back at it; one duck's answer under another's name."""
    head = head_of(Kind.ANSWER, 5)
    for other, channel in channels().items():
        sealed = Sealer(channels()[name]).seal(head, b"hello")
        if other == name:
            assert opened(Opener(channel), head, sealed) == b"hello"
        else:
            with pytest.raises(WireError, match="not authentic"):
                opened(Opener(channel), head, sealed)


def test_one_kind_passed_off_as_another() -> None:
    for kind, other in itertools.permutations(Kind, 2):
        head = head_of(kind, 20)
        sealed = Sealer(CHANNEL).seal(head, bytes(20))
        wrong = bytearray(head)
        wrong[3] = other
        with pytest.raises(WireError, match="not authentic"):
            opened(Opener(CHANNEL), bytes(wrong), sealed)


@pytest.mark.parametrize("size", [0, 15, 17, 64])
def test_secrets_of_another_length(size: int) -> None:
    for make in (
        lambda: SessionKeys(CLUSTER, bytes(size), ASK_SECRET),
        lambda: SessionKeys(CLUSTER, HOST_NONCE, bytes(size)),
        lambda: KEYS.to_duck("tcp", 0, bytes(size)),
        lambda: KEYS.to_host("tcp", 0, bytes(size)),
    ):
        with pytest.raises(WireError, match=f"of {size} bytes, want"):
            make()


def test_keys_show_nowhere() -> None:
    for text in (repr(KEYS), repr(CHANNEL), str(CHANNEL)):
        assert "h" * 16 not in text
        assert "a" * 16 not in text
        assert CHANNEL.key(Kind.ASK).hex() not in text
        assert repr(HOST_NONCE)[1:] not in text


# --- once


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.ANSWER])
def test_what_comes_again_is_refused(kind: Kind) -> None:
    sealer, opener = Sealer(CHANNEL), Opener(CHANNEL)
    frames = []
    for ticket in range(5):
        head = head_of(kind, 3, ticket=ticket)
        frames.append((head, sealer.seal(head, b"abc")))
    for head, sealed in reversed(frames):  # they may overtake each other
        assert opened(opener, head, sealed) == b"abc"
    for head, sealed in frames:
        with pytest.raises(WireError, match="came before"):
            opened(opener, head, sealed)


@pytest.mark.parametrize("kind", [Kind.ASK, Kind.ANSWER])
def test_a_ticket_is_never_sealed_twice(kind: Kind) -> None:
    """Two texts under one nonce would give the key away."""
    sealer = Sealer(CHANNEL)
    for ticket in (1, 2, 3, 9, 5, 4):
        sealer.seal(head_of(kind, 1, ticket=ticket), b"x")
    for ticket in (1, 5, 9):
        with pytest.raises(TransportError, match=f"ticket {ticket} was used before"):
            sealer.seal(head_of(kind, 1, ticket=ticket), b"y")
    sealer.seal(head_of(kind, 1, ticket=6), b"x")


def test_tickets_that_are_all_used_end_the_session() -> None:
    sealer = Sealer(CHANNEL)
    for ticket in (0xFFFFFFFE, 0xFFFFFFFF):
        sealer.seal(head_of(Kind.ASK, 1, ticket=ticket), b"x")
    with pytest.raises(TransportError, match="ticket 1 was used before in this session"):
        sealer.seal(head_of(Kind.ASK, 1, ticket=1), b"x")


def test_fragments_of_a_message_are_sealed_one_after_the_other() -> None:
    sealer, opener = Sealer(CHANNEL), Opener(CHANNEL)
    heads = [head_of(Kind.ASK, 1, fragment=n, fragments=3) for n in range(3)]
    sealed = [sealer.seal(head, b"%d" % n) for n, head in enumerate(heads)]
    pairs = zip(heads, sealed, strict=True)
    assert [opened(opener, head, data) for head, data in pairs] == [b"0", b"1", b"2"]
    with pytest.raises(WireError, match="not authentic"):  # nor in each other's place
        opened(opener, heads[1], sealed[2])
    for head in heads[2:], heads[1:], heads:
        with pytest.raises(TransportError, match="was used before"):
            sealer.seal(head[0], b"x")


def test_a_forged_number_does_not_shut_out_the_real_ones() -> None:
    sealer, opener = Sealer(CHANNEL), Opener(CHANNEL)
    head = head_of(Kind.CANCEL, 0)
    real = sealer.seal(head, b"")
    forged = b"\xff" * 8 + real[8:]
    with pytest.raises(WireError, match="not authentic"):
        opened(opener, head, forged)
    assert opened(opener, head, real) == b""


@given(st.lists(st.integers(0, 3 * Window.SIZE), max_size=200))
def test_a_window_is_a_set_with_a_horizon(numbers: list[int]) -> None:
    window, seen = Window(), set[int]()
    for number in numbers:
        behind = max(seen, default=-1) - number
        assert window.seen(number) == (number in seen or behind >= Window.SIZE)
        if not window.seen(number):
            window.note(number)
            seen.add(number)
            assert window.seen(number)


def test_a_window_takes_any_number_at_no_cost() -> None:
    window = Window()
    for number in (0, 1 << 63, (1 << 64) - 1):
        window.note(number)
        assert window.seen(number)
    assert window._bits.bit_length() <= Window.SIZE
    assert window.seen(0)


def test_overheads_are_what_sealing_adds() -> None:
    assert {kind.name: seal.overhead(kind) for kind in Kind} == {
        kind.name: 16 if kind in (Kind.ASK, Kind.ANSWER) else 24 for kind in Kind
    }
