"""Multicast with a key, and somebody who can put any datagram into any socket under any sender's
name: sums stay right, nothing is computed twice, and what is forged or played again is counted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from structlog.testing import capture_logs

from duck import wire
from duck.config import Network
from duck.errors import DuckLost, TransportError
from duck.kernels import library
from duck.transports import receive
from duck.transports.base import Ask
from duck.transports.datagrams import Address, UdpSocket
from duck.transports.link import data_frames
from duck.transports.listen import ListeningDuck
from duck.transports.multicast import MulticastPlane, MulticastTransport
from duck.transports.tls import Credentials, Role
from duck.wire import Kind
from tests.flocks import KEY, WAIT_S, FakeDuck, info_logger, listening, plan_for

# Asks and answers of three datagrams and more.
HIDDEN = 1024
PLAN = plan_for(1, hidden=HIDDEN)
HOST = Credentials(KEY, Role.HOST)


class Ether:
    """Between a socket and who reads it: sees every datagram, and says which are read instead.

    change: gets a datagram and returns those to be read in its place. extra: what is read besides,
    under the name of who was heard last.
    """

    def __init__(self, sock: UdpSocket) -> None:
        self.seen: list[bytes] = []
        self.change: Callable[[bytes], list[bytes]] = lambda datagram: [datagram]
        self.extra: list[bytes] = []
        self.sender: Address = ("", 0)
        self._drain = sock.drain
        sock.drain = self._changed  # type: ignore[method-assign]

    def _changed(self) -> Iterator[tuple[memoryview, int, Address]]:
        extra, self.extra = self.extra, []
        for datagram in extra:
            yield memoryview(datagram), len(datagram), self.sender
        for train, size, sender in self._drain():
            self.sender = sender
            for start in range(0, len(train), size):
                datagram = bytes(train[start : start + size])
                self.seen.append(datagram)
                for each in self.change(datagram):
                    yield memoryview(each), len(each), sender

    def of(self, kind: Kind) -> list[bytes]:
        return [data for data in self.seen if wire.unpack_header(data).kind == kind]


class Outgoing(Ether):
    """The same between a socket and the wire: what is put there instead really travels."""

    def __init__(self, sock: UdpSocket, to: Address) -> None:
        self.seen = []
        self.change = lambda datagram: [datagram]
        self._to, self._send = to, sock.send
        sock.send = self._put  # type: ignore[method-assign]

    def _put(self, train: bytes | memoryview, size: int, to: Address) -> None:
        for start in range(0, len(train), size):
            datagram = bytes(train[start : start + size])
            self.seen.append(datagram)
            for each in self.change(datagram):
                self._send(each, len(each), to)

    def put(self, datagrams: list[bytes]) -> None:
        """Send these to the host, under the duck's name."""
        for datagram in datagrams:
            self._send(datagram, len(datagram), self._to)


@pytest.fixture(autouse=True, params=["in Python", "natively", "in a thread"])
def _receiving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the host receives its datagrams."""
    library.native()
    monkeypatch.setattr(library, "is_loaded", lambda: request.param != "in Python")
    if request.param == "in a thread":
        monkeypatch.setattr(receive, "THREAD_FROM", 1)


class Pond:
    """A host and a duck by multicast, and the ether at both ends."""

    def __init__(
        self, transport: MulticastTransport, end: ListeningDuck, handler: FakeDuck
    ) -> None:
        self.transport, self.end, self.handler = transport, end, handler
        self.plane: Any = transport.plane
        (session,) = end._sessions.values()
        self.feed: Any = session.feed
        unicast, group = self.feed._sockets
        self.at_host = Outgoing(unicast, self.feed._where.host)
        self.at_duck, self.at_group = Ether(unicast), Ether(group)

    @property
    def corrupt(self) -> int:
        """Messages that failed their check, at either end."""
        return int(self.plane._half.counts.corrupt + self.feed._half.counts.corrupt)

    async def ask(self, layer: int) -> Ask:
        rows = await self.transport.acquire(1)
        x, ids = np.ones((1, HIDDEN), np.float32), np.zeros((1, 2), np.int32)
        deadline = asyncio.get_running_loop().time() + WAIT_S
        return self.transport.ask(layer, x, ids, ids.astype(np.float32), rows, deadline=deadline)

    async def right(self, layer: int) -> None:
        """An ask is answered, with what that layer's answer is."""
        ask = await self.ask(layer)
        async with asyncio.timeout(WAIT_S):
            rows = await ask
        np.testing.assert_array_equal(rows.partials(1)[0], np.ones((1, HIDDEN)) + layer)
        ask.release()


@pytest.fixture
async def pond() -> AsyncIterator[Pond]:
    handler = FakeDuck(0)
    async with listening(handler, key=KEY) as (address, end):
        transport = MulticastTransport(
            [address], credentials=HOST, plane=MulticastPlane(Network(mtu=1500))
        )
        try:
            await transport.start(PLAN)
            pond = Pond(transport, end, handler)
            await pond.right(1)
            yield pond
            for ether in (pond.at_host, pond.at_duck, pond.at_group):
                ether.change = lambda datagram: [datagram]
            await pond.right(7)  # whatever a test did
            assert not transport.asks.lost
        finally:
            handler.let_go()
            await transport.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (it is not ours to make an event of)
            await asyncio.sleep(0.001)


def _forged(datagram: bytes, at: int = -1) -> bytes:
    """Another payload under a header whose checksum says so, as who has no key can make it."""
    payload = bytearray(datagram[wire.HEADER_BYTES :])
    payload[at] ^= 1
    head = wire.unpack_header(datagram)
    whole = wire.pack_header(
        head.kind, head.session, head.ticket, head.layer, head.source, payload=payload,
        fragment=head.fragment, fragments=head.fragments, message_bytes=head.message_bytes,
        offset=head.offset,
    )  # fmt: skip
    return whole + payload


def _once(
    kind: Kind, layer: int, change: Callable[[bytes], list[bytes]]
) -> Callable[[bytes], list[bytes]]:
    """Changes the first datagram of a kind and layer; earlier ones may still be sent again."""
    done = False

    def changed(datagram: bytes) -> list[bytes]:
        nonlocal done
        head = wire.unpack_header(datagram)
        if done or (head.kind, head.layer) != (kind, layer):
            return [datagram]
        done = True
        return change(datagram)

    return changed


async def test_nothing_said_can_be_read(pond: Pond) -> None:
    for layer in range(5):
        await pond.right(layer)
    heard = b"".join(pond.at_host.seen + pond.at_duck.seen + pond.at_group.seen)
    assert len(heard) > 5 * 2 * HIDDEN * 4
    for value in range(1, 7):
        assert np.full(8, value, np.float32).tobytes() not in heard


@pytest.mark.parametrize("where", ["answer", "ask"])
@pytest.mark.parametrize("what", ["changed", "forged before the real one", "forged after it"])
async def test_a_forged_datagram_only_costs_time(pond: Pond, where: str, what: str) -> None:
    ether, kind = (pond.at_host, Kind.ANSWER) if where == "answer" else (pond.at_group, Kind.ASK)
    changes: dict[str, Callable[[bytes], list[bytes]]] = {
        "changed": lambda datagram: [_forged(datagram)],
        "forged before the real one": lambda datagram: [_forged(datagram), datagram],
        "forged after it": lambda datagram: [datagram, _forged(datagram)],
    }
    ether.change = _once(kind, 3, changes[what])
    await pond.right(3)
    # Of two that differ one is taken, and which is no matter.
    assert pond.corrupt == 1 if what == "changed" else pond.corrupt <= 1


async def test_a_whole_answer_under_another_ticket(pond: Pond) -> None:
    """An old answer's bytes with new headers, ahead of the real ones."""
    await pond.right(2)
    old = pond.at_host.of(Kind.ANSWER)

    def posing(datagram: bytes) -> list[bytes]:
        head = wire.unpack_header(datagram)
        moved = []
        for data in old:
            was = wire.unpack_header(data)
            payload = data[wire.HEADER_BYTES :]
            moved.append(
                wire.pack_header(
                    head.kind, head.session, head.ticket, head.layer, head.source, payload=payload,
                    fragment=was.fragment, fragments=was.fragments, offset=was.offset,
                    message_bytes=was.message_bytes,
                ) + payload
            )  # fmt: skip
        return [*moved, datagram]

    pond.at_host.change = _once(Kind.ANSWER, 3, posing)
    await pond.right(3)
    assert pond.corrupt >= 1


async def test_old_answers_again(pond: Pond) -> None:
    await pond.right(2)
    old = pond.at_host.of(Kind.ANSWER)
    pond.at_host.change = _once(Kind.ANSWER, 3, lambda datagram: [*old, datagram, *old])
    await pond.right(3)
    assert pond.corrupt == 0


async def test_old_asks_again_are_not_computed(pond: Pond) -> None:
    """Not even when the duck has forgotten that it answered them."""
    await pond.right(2)
    old = pond.at_group.of(Kind.ASK)
    half = pond.feed._half
    half._answers.clear()
    half._working.clear()
    while not pond.handler.begun.empty():
        pond.handler.begun.get_nowait()
    pond.at_group.change = _once(Kind.ASK, 3, lambda datagram: [*old, datagram])
    await pond.right(3)
    await _until(lambda: pond.corrupt == 2)  # the ones for layers 1 and 2
    assert [pond.handler.begun.get_nowait()] == [3]
    assert pond.handler.begun.empty()


async def _working(pond: Pond) -> Ask:
    """An ask that the duck has begun and not answered."""
    pond.handler.hold(3)
    ask = await pond.ask(3)
    async with asyncio.timeout(WAIT_S):
        while await pond.handler.begun.get() != 3:
            pass
    return ask


async def _answered(pond: Pond, ask: Ask) -> None:
    pond.handler.let_go()
    async with asyncio.timeout(WAIT_S):
        rows = await ask
    np.testing.assert_array_equal(rows.partials(1)[0], np.ones((1, HIDDEN)) + 3)
    ask.release()


@pytest.mark.parametrize("kind", [Kind.CANCEL, Kind.NACK, Kind.PING, Kind.ANSWER])
@pytest.mark.parametrize("seal", ["none", "of zeros"])
async def test_notes_that_no_host_sent(pond: Pond, kind: Kind, seal: str) -> None:
    ask = await _working(pond)
    (session,) = pond.end._sessions
    bodies = {Kind.CANCEL: b"", Kind.NACK: b"\xff", Kind.PING: wire.pack_ping(wire.HOST, 512, 4)}
    body = bodies.get(kind, b"?") + bytes(24 if seal == "of zeros" else 0)
    note = wire.pack_header(kind, session, ask.ticket, 3, wire.HOST, payload=body) + body
    nacks = pond.feed._half.counts.nacks  # of the host itself, if an answer came in pieces
    for ether, sock in zip((pond.at_duck, pond.at_group), pond.feed._sockets, strict=True):
        ether.sender = pond.feed._where.host
        ether.extra = [note]
        before = pond.feed.malformed
        pond.feed._readable(sock)
        assert pond.feed.malformed == before + 1
    assert pond.feed._half.counts.nacks == nacks
    assert ask.ticket not in pond.feed._half._cancelled
    await _answered(pond, ask)


async def test_notes_of_the_host_again(pond: Pond) -> None:
    """Each is heard once."""

    def lossy(datagram: bytes) -> list[bytes]:
        """An answer's beginning is lost, however often it is sent, until the host sends a NACK."""
        head = wire.unpack_header(datagram)
        begins = (head.kind, head.fragment) == (Kind.ANSWER, 0)
        return [] if begins and not pond.at_duck.of(Kind.NACK) else [datagram]

    pond.at_host.change = lossy
    await pond.right(4)
    assert pond.at_duck.of(Kind.NACK)
    gone = await _working(pond)
    gone.cancel()
    await _until(lambda: bool(pond.at_group.of(Kind.CANCEL)))
    pond.handler.let_go()
    notes = pond.at_group.of(Kind.CANCEL) + pond.at_duck.of(Kind.NACK)
    before, nacks = pond.feed.malformed, pond.feed._half.counts.nacks
    pond.at_group.extra = notes
    pond.feed._readable(pond.feed._sockets[1])
    assert pond.feed.malformed == before + len(notes)
    assert pond.feed._half.counts.nacks == nacks


@pytest.mark.parametrize("kind", [Kind.RNACK, Kind.PONG, Kind.CANCEL])
async def test_notes_that_no_duck_sent(pond: Pond, kind: Kind) -> None:
    """Nor are they a sign of life of a duck that is frozen."""
    # Whatever the duck itself sends from now on, as it does when the host grows impatient, would
    # be a true sign of life.
    pond.at_host.change = lambda _: []
    ask = await _working(pond)
    body = bytes(24)
    heard, malformed = pond.plane._heard[0], pond.plane.malformed
    head = wire.pack_header(kind, pond.transport.session, ask.ticket, 3, 0, payload=body)
    pond.at_host.put([head + body])
    await _until(lambda: pond.plane.malformed == malformed + 1)
    assert pond.plane._heard[0] == heard
    pond.at_host.change = lambda datagram: [datagram]
    await _answered(pond, ask)


async def test_what_was_no_hosts_is_logged_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duck.transports.listen._log", info_logger())
    handler = FakeDuck(0)
    with capture_logs() as logs:
        async with listening(handler, key=KEY) as (address, end):
            transport = MulticastTransport([address], credentials=HOST)
            try:
                await transport.start(PLAN)
                pond = Pond(transport, end, handler)
                await pond.right(1)
                pond.at_group.sender = ("127.0.0.9", 9)
                pond.at_group.extra = [b"quack"] * 3
                pond.feed._readable(pond.feed._sockets[1])
                assert pond.feed.strangers == 3
            finally:
                handler.let_go()
                await transport.close()
            await _until(lambda: not end._sessions)
    (event,) = [log for log in logs if log["event"] == "session_ended"]
    assert (event["strangers"], event["log_level"]) == (3, "info")
    assert event["reason"] == "the host said goodbye"
    assert "malformed" not in event


async def test_a_library_that_is_loaded_while_ducks_shake_hands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What receives natively knows one checksum, and this session has the other."""
    loaded = False
    monkeypatch.setattr(library, "is_loaded", lambda: loaded)

    class Loading(FakeDuck):
        async def attach(self, *arguments: Any) -> Any:
            nonlocal loaded
            loaded = True
            return await super().attach(*arguments)

    async with listening(Loading(0)) as (address, _):
        plane = MulticastPlane(Network(mtu=1500))
        transport = MulticastTransport([address], plane=plane)
        try:
            await transport.start(PLAN)
            assert loaded
            assert plane._receiver is None
        finally:
            await transport.close()


async def test_a_host_that_has_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: Any, **_more: Any) -> Any:
        raise TransportError("the system refuses to receive: Too many open files")

    monkeypatch.setattr(library, "is_loaded", lambda: True)
    monkeypatch.setattr("duck.transports.tcp.Receiver", refused)
    transport = MulticastTransport(["127.0.0.1:1"])
    with pytest.raises(TransportError, match="Too many open files"):
        await transport.start(PLAN)


async def test_a_small_answer_by_tcp() -> None:
    """It went by UDP, and UDP alone writes to its row."""
    handler = FakeDuck(0)
    handler.hold(3)
    async with listening(handler) as (address, _):
        plane: Any = MulticastPlane(Network(mtu=1500))
        transport = MulticastTransport([address], plane=plane)
        try:
            await transport.start(PLAN)
            rows = await transport.acquire(1)
            x, ids = np.ones((1, HIDDEN), np.float32), np.zeros((1, 2), np.int32)
            deadline = asyncio.get_running_loop().time() + WAIT_S
            ask = transport.ask(3, x, ids, ids.astype(np.float32), rows, deadline=deadline)
            frames = data_frames(
                Kind.ANSWER, transport.session, ask.ticket, 3, 0, bytes(ask.answer_bytes),
                plane._tcp.checksum,
            )  # fmt: skip
            plane._tcp._links[0].feed(b"".join(frames))
            with pytest.raises(DuckLost, match=f"an answer by TCP to ask {ask.ticket}"):
                await ask
        finally:
            handler.let_go()
            await transport.close()


# --- two ducks: a message's source is not sealed with it, only who has the key tells whose it is


def _renamed(datagram: bytes, source: int) -> bytes:
    """The same with another source, and a checksum that says so."""
    head, payload = wire.unpack_header(datagram), datagram[wire.HEADER_BYTES :]
    return (
        wire.pack_header(
            head.kind, head.session, head.ticket, head.layer, source, payload=payload,
            fragment=head.fragment, fragments=head.fragments, message_bytes=head.message_bytes,
            offset=head.offset,
        ) + payload
    )  # fmt: skip


class Two(NamedTuple):
    """A host and two ducks; with the feed of each, and the ether between it and the host."""

    transport: MulticastTransport
    feeds: list[Any]
    sent: list[Outgoing]
    come: list[tuple[Ether, Ether]]  # by name, by the group

    @property
    def plane(self) -> Any:
        return self.transport.plane

    async def right(self, layer: int) -> None:
        rows = await self.transport.acquire(1)
        x, ids = np.ones((1, HIDDEN), np.float32), np.zeros((1, 2), np.int32)
        deadline = asyncio.get_running_loop().time() + WAIT_S
        ask = self.transport.ask(layer, x, ids, ids.astype(np.float32), rows, deadline=deadline)
        async with asyncio.timeout(WAIT_S):
            rows = await ask
        for duck, partial in enumerate(rows.partials(1)):
            np.testing.assert_array_equal(partial, np.ones((1, HIDDEN)) * (duck + 1) + layer)
        ask.release()

    def hears(self, duck: int, datagrams: list[bytes]) -> int:
        """How many of these a duck drops as senseless, when they come under the host's name."""
        feed, (ether, _) = self.feeds[duck], self.come[duck]
        before, ether.sender, ether.extra = feed.malformed, feed._where.host, datagrams
        feed._readable(feed._sockets[0])
        return int(feed.malformed - before)

    async def refuses(self, duck: int, datagram: bytes) -> None:
        """The host drops this as senseless, when it comes from a duck's address."""
        before = self.plane.malformed
        self.sent[duck].put([datagram])
        await _until(lambda: self.plane.malformed > before)
        assert self.plane.malformed == before + 1


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    handlers = [FakeDuck(0), FakeDuck(1)]
    async with (
        listening(handlers[0], key=KEY) as (first, end),
        listening(handlers[1], key=KEY) as (second, other),
    ):
        plane = MulticastPlane(Network(mtu=1500))
        transport = MulticastTransport([first, second], credentials=HOST, plane=plane)
        try:
            await transport.start(plan_for(2, hidden=HIDDEN))
            sessions = [next(iter(each._sessions.values())) for each in (end, other)]
            feeds: list[Any] = [session.feed for session in sessions]
            sent = [Outgoing(feed._sockets[0], feed._where.host) for feed in feeds]
            come = [(Ether(feed._sockets[0]), Ether(feed._sockets[1])) for feed in feeds]
            two = Two(transport, feeds, sent, come)
            await two.right(1)
            yield two
            for ether in sent:
                ether.change = lambda datagram: [datagram]
            await two.right(7)
            assert not transport.asks.lost
        finally:
            await transport.close()


@pytest.mark.parametrize("source", [1, wire.HOST])
async def test_an_answer_whose_source_was_changed(two: Two, source: int) -> None:
    """It is dropped, also as one more of the duck that it names, and comes again."""
    before = two.plane.malformed
    two.sent[0].change = _once(Kind.ANSWER, 3, lambda datagram: [_renamed(datagram, source)])
    await two.right(3)
    assert two.plane.malformed == before + 1
    assert two.plane._half.counts.corrupt == 0


async def test_one_ducks_answer_under_the_others_name(two: Two) -> None:
    """All of it, from the other's address and ahead of the other's own."""
    two.sent[1].change = lambda datagram: []
    done = False

    def posing(datagram: bytes) -> list[bytes]:
        nonlocal done
        head = wire.unpack_header(datagram)
        if (head.kind, head.layer) == (Kind.ANSWER, 3):
            two.sent[1].put([_renamed(datagram, 1)])
            if head.fragment + 1 == head.fragments and not done:
                done = True
                two.sent[1].change = lambda datagram: [datagram]
        return [datagram]

    two.sent[0].change = posing
    await two.right(3)
    assert done
    assert two.plane._half.counts.corrupt >= 1


async def test_a_ducks_notes_under_the_others_name(two: Two) -> None:
    two.sent[1].change = lambda datagram: []  # its own would be true signs of life
    two.transport.plane.tick()
    await _until(lambda: bool(two.sent[0].of(Kind.PONG)))
    pong = two.sent[0].of(Kind.PONG)[0]
    await two.refuses(1, pong)  # behind whatever the other said before
    heard = two.plane._heard[1]
    await two.refuses(1, _renamed(pong, 1))
    await two.refuses(1, _renamed(pong, wire.HOST))
    assert two.plane._heard[1] == heard


async def test_what_a_host_says_to_others_or_under_another_name(two: Two) -> None:
    """Nor is what it says to all heard again, or by itself as a duck's."""

    def lossy(datagram: bytes) -> list[bytes]:
        head = wire.unpack_header(datagram)
        begins = (head.kind, head.fragment) == (Kind.ANSWER, 0)
        return [] if begins and not two.come[0][0].of(Kind.NACK) else [datagram]

    two.sent[0].change = lossy
    await two.right(3)
    nack = two.come[0][0].of(Kind.NACK)[0]
    nacks = [feed._half.counts.nacks for feed in two.feeds]
    assert two.hears(1, [nack, _renamed(nack, 0), _renamed(nack, 1)]) == 3
    two.transport.plane.tick()
    await _until(lambda: all(group.of(Kind.PING) for _, group in two.come))
    await _until(lambda: all(ether.of(Kind.PONG) for ether in two.sent))
    ping, ask = two.come[1][1].of(Kind.PING)[0], two.come[1][1].of(Kind.ASK)[0]
    sources = (0, 1, wire.HOST)
    assert two.hears(1, [_renamed(ping, source) for source in sources]) == 3
    assert two.hears(1, [_renamed(ask, source) for source in (0, 1)]) == 2
    own = [
        data for ether in two.sent for data in (ether.of(Kind.PONG)[0], ether.of(Kind.ANSWER)[0])
    ]
    assert two.hears(1, [_renamed(data, source) for data in own for source in sources]) == 12
    assert [feed._half.counts.nacks for feed in two.feeds] == nacks
    for duck, ether in enumerate(two.sent):
        ether.change = lambda datagram: []
        await two.refuses(duck, ping)  # behind whatever the duck said before
    heard = list(two.plane._heard)
    for duck, said in itertools.product(range(2), (ping, nack, ask)):
        await two.refuses(duck, said)
        await two.refuses(duck, _renamed(said, duck))
    assert two.plane._half.counts.corrupt == 0
    assert two.plane._heard == heard
