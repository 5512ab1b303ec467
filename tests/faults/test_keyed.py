"""Hosts and ducks with a key, and those who have none or another: who sits on the wire, replays,
forges or floods gets nothing, is counted, and the honest go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from duck import wire
from duck.errors import ConfigError, DuckLost, TransportError, WireError
from duck.keys import ClusterKey
from duck.placement import Plan
from duck.seal import NONCE_BYTES, Sealer, SessionKeys, overhead
from duck.transports.base import Ask
from duck.transports.control import FlockTransport
from duck.transports.listen import ListeningDuck
from duck.transports.sealed import sealed_frames
from duck.transports.tcp import TcpPlane, TcpTransport
from duck.transports.tls import Credentials, Role
from tests.faults.peers import TOKEN, Peer, hello
from tests.flocks import KEY, WAIT_S, FakeDuck, listening, plan_for

PLAN = plan_for(1)
OTHER_KEY = ClusterKey(bytes(range(1, 33)))
HOST = Credentials(KEY, Role.HOST)
SECRET = b"s" * 32


@pytest.fixture(autouse=True)
async def _peers() -> AsyncIterator[None]:
    yield
    await Peer.close_all()


@pytest.fixture
async def duck() -> AsyncIterator[FakeDuck]:
    handler = FakeDuck(0)
    yield handler
    handler.let_go()


@pytest.fixture
async def served(duck: FakeDuck) -> AsyncIterator[tuple[str, ListeningDuck]]:
    """A duck with a key; whatever a test did to it, it serves an honest host afterwards."""
    async with listening(duck, key=KEY) as (address, end):
        yield address, end
        duck.let_go()
        async with attached(address) as transport:
            await _right(await _ask(transport), 9)
        assert not end._strangers


@contextlib.asynccontextmanager
async def attached(
    address: str, credentials: Credentials | None = HOST, plan: Plan = PLAN
) -> AsyncIterator[TcpTransport]:
    transport = TcpTransport([address], ["duck 0 (pond)"], credentials=credentials)
    try:
        async with asyncio.timeout(WAIT_S):
            await transport.start(plan)
        yield transport
    finally:
        await transport.close()


async def _ask(transport: TcpTransport, layer: int = 9) -> Ask:
    rows = await transport.acquire(1)
    x, ids = np.ones((1, 8), np.float32), np.zeros((1, 2), np.int32)
    deadline = asyncio.get_running_loop().time() + WAIT_S
    return transport.ask(layer, x, ids, ids.astype(np.float32), rows, deadline=deadline)


async def _right(ask: Ask, layer: int) -> None:
    """It is answered, with what that layer's answer is."""
    async with asyncio.timeout(WAIT_S):
        rows = await ask
    np.testing.assert_array_equal(rows.partials(1)[0], np.ones((1, 8)) + layer)
    ask.release()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (it is not ours to make an event of)
            await asyncio.sleep(0.001)


# --- keys that do not fit


@pytest.mark.parametrize(
    ("host_key", "duck_key", "host_told", "duck_told"),
    [
        (KEY, OTHER_KEY, "the duck has another key than this host", "the host has another key"),
        (KEY, None, "the duck uses no key, this host does", "the host uses a key, this duck does"),
        (None, KEY, "this duck uses a key, the host does not", "the host does not: give both"),
    ],
)
async def test_keys_that_do_not_fit(
    duck: FakeDuck,
    host_key: ClusterKey | None,
    duck_key: ClusterKey | None,
    host_told: str,
    duck_told: str,
) -> None:
    credentials = Credentials(host_key, Role.HOST) if host_key else None
    with capture_logs() as logs:
        async with listening(duck, key=duck_key) as (address, end):
            with pytest.raises(WireError) as caught:
                async with attached(address, credentials):
                    pass
            await _until(lambda: end.refused == 1)
    assert str(caught.value).startswith("duck 0 (pond)")
    assert host_told in str(caught.value)
    assert "key" in str(caught.value)
    assert "\n" not in str(caught.value)
    (event,) = [log for log in logs if log["event"] == "refused"]
    assert duck_told in event["reason"]
    assert event["peer"].startswith("127.0.0.1:")
    assert not duck.attached


@pytest.mark.parametrize(
    ("says", "shown"),
    [
        (b"HTTP/1.1 400 Bad Request\r\nServer: pond\r\n\r\n", "'HTTP/1.1 400 Bad Request'"),
        (b"\x9f\x00\x02\x03\x04\x05\x06\x07\x08", "bytes 9f 00 02 03 04 05 06 07"),
        (b"", "what it was sent"),
    ],
)
async def test_a_server_that_is_no_duck(says: bytes, shown: str) -> None:
    """It is told from a duck without a key."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says or await reader.read(1 << 16))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        told = rf"{address} is not a duck \(it answered {shown}\)$"
        with pytest.raises(WireError, match=told):
            async with attached(address, Credentials(KEY, Role.HOST)):
                pass


async def test_a_duck_of_another_cluster_learns_nothing(duck: FakeDuck) -> None:
    """Not even the plan: HELLO waits for the duck's certificate."""
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            heard.extend(await reader.read(1 << 16))
        writer.transport.abort()

    other = Credentials(OTHER_KEY, Role.DUCK).context
    other.verify_mode = ssl.CERT_NONE  # it would take any host
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=other)
    try:
        host, port = server.sockets[0].getsockname()
        with pytest.raises(WireError, match="the duck has another key than this host"):
            async with attached(f"{host}:{port}"):
                pass
    finally:
        server.close()
        await server.wait_closed()
    assert not heard


# --- by hand, with another TLS than ours


async def test_asyncios_tls_and_ours_understand_each_other(
    served: tuple[str, ListeningDuck],
) -> None:
    peer = await Peer.connect(served[0], HOST)
    peer.say("HELLO", **hello(PLAN, ask_secret=SECRET))
    welcome = await peer.hear()
    assert welcome["t"] == "WELCOME"
    assert len(welcome["nonce"]) == NONCE_BYTES
    peer.say("BYE")
    assert await peer.ended()


@pytest.mark.parametrize("secret", [None, b"", b"s" * 31, b"s" * 33, "s" * 32])
async def test_hello_without_a_good_secret(served: tuple[str, ListeningDuck], secret: Any) -> None:
    peer = await Peer.connect(served[0], HOST)
    peer.say("HELLO", **hello(PLAN, ask_secret=secret))
    answer = await peer.hear()
    assert answer["t"] == "ERR"
    assert "secret" in answer["text"]
    assert await peer.ended()
    assert served[1].refused == 1


async def test_an_oversized_message_inside_tls(served: tuple[str, ListeningDuck]) -> None:
    peer = await Peer.connect(served[0], HOST)
    peer.writer.write((wire.CONTROL_LIMIT + 1).to_bytes(4, "little"))
    assert "at most 1048576" in (await peer.hear())["text"]
    assert await peer.ended()
    assert served[1].refused == 1


async def test_a_stranger_cannot_make_a_duck_keep_much(
    served: tuple[str, ListeningDuck],
) -> None:
    peer = await Peer.connect(served[0])
    peer.writer.write(b"\1\x40\0\0" + bytes(100))
    assert "of 16385 bytes, at most 16384" in (await peer.hear())["text"]
    assert await peer.ended()
    # Though a host without a key, with a flock as large as they come, is told what is wrong.
    plan = plan_for(64)
    assert len(wire.encode_control({"t": "HELLO", **hello(plan)})) < 8000
    peer = await Peer.connect(served[0])
    peer.say("HELLO", **hello(plan))
    assert "this duck uses a key" in (await peer.hear())["text"]
    assert served[1].refused == 2


async def test_a_data_connection_inside_tls(served: tuple[str, ListeningDuck]) -> None:
    peer = await Peer.connect(served[0], HOST)
    peer.say("DATA", token=TOKEN)
    assert "unknown word" in (await peer.hear())["text"]
    control = await Peer.connect(served[0], HOST)
    control.say("HELLO", **hello(PLAN, ask_secret=SECRET))
    token = (await control.hear())["plane"]["token"]
    peer = await Peer.connect(served[0], HOST)
    peer.say("DATA", token=token)
    assert "no TLS on their connection" in (await peer.hear())["text"]
    control.close()


# --- on the data connection


class HandHost:
    """A host made by hand that has the key; its frames are what a test makes of them."""

    def __init__(self, control: Peer, data: Peer, said: dict[str, Any], nonce: bytes) -> None:
        self.control, self.data, self.session = control, data, said["session"]
        self.keys = SessionKeys(KEY, said["nonce"], SECRET)
        self.sealer = Sealer(self.keys.to_all("tcp"))
        self.nonce = nonce

    @classmethod
    @contextlib.asynccontextmanager
    async def attached(cls, address: str) -> AsyncIterator[HandHost]:
        control = await Peer.connect(address, HOST)
        said = hello(PLAN, ask_secret=SECRET, nonce=b"n" * NONCE_BYTES)
        control.say("HELLO", **said)
        welcome = await control.hear()
        data = await Peer.connect(address)
        data.say("DATA", token=welcome["plane"]["token"])
        assert (await data.hear())["t"] == "OK"
        yield cls(control, data, said, welcome["nonce"])
        control.close()
        data.close()

    def ask(self, ticket: int = 1, sealer: Sealer | None = None, **head: Any) -> bytes:
        fields = {"session": self.session, "layer": 1, "source": wire.HOST, **head}
        body = wire.pack_ask(
            np.zeros((1, 2), np.int32), np.ones((1, 2), np.float32), np.ones((1, 8), np.float32)
        )
        kind = wire.Kind.ASK
        return bytes(sealed_frames(sealer or self.sealer, kind, ticket=ticket, body=body, **fields))

    async def answer(self) -> tuple[wire.Header, bytes]:
        async with asyncio.timeout(WAIT_S):
            head = await self.data.reader.readexactly(wire.HEADER_BYTES)
            header = wire.unpack_header(head)
            size = header.message_bytes + overhead(header.kind)
            return header, await self.data.reader.readexactly(size)


def _flip(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


def _moved(host: HandHost, **head: Any) -> bytes:
    """A frame's seal under another header."""
    frame = host.ask()
    fields = {"session": host.session, "layer": 1, "source": wire.HOST, "ticket": 1, **head}
    moved = wire.pack_header(wire.Kind.ASK, payload=b"", message_bytes=48, **fields)
    return moved[:28] + bytes(4) + frame[32:]


BAD_ASKS: dict[str, tuple[Callable[[HandHost], bytes], str]] = {
    "replayed": (lambda host: host.ask(5) * 2, "ASK 5 came before"),
    "replayed later": (
        lambda host: (first := host.ask(5)) + host.ask(6) + first, "ASK 5 came before",
    ),
    "body": (lambda host: _flip(host.ask(), 60), "not authentic"),
    "tag": (lambda host: _flip(host.ask(), 95), "not authentic"),
    "header": (lambda host: _flip(host.ask(), 8), "not authentic"),
    "checksum": (lambda host: _flip(host.ask(), 28), "has no seal"),
    "another ticket": (lambda host: _moved(host, ticket=2), "not authentic"),
    "another layer": (lambda host: _moved(host, layer=2), "not authentic"),
    "another session": (lambda host: _moved(host, session=host.session ^ 1), "a frame of session"),
    "another source": (lambda host: _moved(host, source=0), "a frame of session"),
    "no seal": (
        lambda host: wire.pack_header(
            wire.Kind.ASK, host.session, 1, 1, wire.HOST, payload=bytes(48)
        ) + bytes(64), "has no seal",
    ),
    "no seal, its sizes right": (lambda host: host.ask()[:32] + bytes(64), "not authentic"),
    "another key": (
        lambda host: host.ask(
            sealer=Sealer(SessionKeys(OTHER_KEY, b"n" * 16, SECRET).to_all("tcp"))
        ), "not authentic",
    ),
    "another session's secret": (
        lambda host: host.ask(sealer=Sealer(SessionKeys(KEY, b"n" * 16, b"t" * 32).to_all("tcp"))),
        "not authentic",
    ),
    "one duck's words to its host": (
        lambda host: host.ask(sealer=Sealer(host.keys.to_host("tcp", 0, host.nonce))),
        "not authentic",
    ),
    "meant for another plane": (
        lambda host: host.ask(sealer=Sealer(host.keys.to_all("multicast"))), "not authentic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ASKS)
async def test_asks_that_no_duck_computes(
    served: tuple[str, ListeningDuck], duck: FakeDuck, bad: str
) -> None:
    address, end = served
    make, told = BAD_ASKS[bad]
    with capture_logs() as logs:
        async with HandHost.attached(address) as host:
            host.data.writer.write(make(host))
            assert await host.data.ended()
            await _until(lambda: end.refused == 1)
    assert [told in log["reason"] for log in logs if log["event"] == "refused"] == [True]
    if "replayed" not in bad:
        assert duck.begun.empty()


async def test_answers_are_sealed_and_cancels_are_understood(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    duck.hold(1)
    async with HandHost.attached(address) as host:
        cancel = sealed_frames(host.sealer, wire.Kind.CANCEL, host.session, 2, 1, wire.HOST, b"")
        host.data.writer.write(host.ask(1))
        assert await duck.begun.get() == 1
        host.data.writer.write(host.ask(2))
        await _until(lambda: end._worker.waiting(host.session)[0] == 1)
        host.data.writer.write(cancel)
        await _until(lambda: end._worker.waiting(host.session)[0] == 0)
        duck.let_go()
        header, sealed = await host.answer()
        assert (header.ticket, header.kind) == (1, wire.Kind.ANSWER)
        assert np.full(8, 2, np.float32).tobytes() not in sealed
        host.data.writer.write(cancel)
        assert await host.data.ended()
    assert end.refused == 1


class Tap:
    """Somebody who sits on the wire between a host and a duck, and sees and changes all of it.

    change: gets (to the duck?, frame) for every data frame and says what is passed on.
    """

    def __init__(self, address: str) -> None:
        self.change: Callable[[bool, bytes], bytes] = lambda _to_duck, frame: frame
        self.seen = bytearray()
        self._target = address
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Tap]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host, port = self._target.split(":")
        onward, back = await asyncio.open_connection(host, int(port))
        first = await reader.read(3)
        data = not wire.looks_like_tls(first)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, back, data, True, first))
                group.create_task(self._carry(onward, writer, data, False, b""))
        finally:
            for each in (writer, back):
                each.transport.abort()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        data: bool,
        to_duck: bool,
        first: bytes,
    ) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            if data:  # the greeting, in the clear
                head = first + await reader.readexactly(4 - len(first))
                body = await reader.readexactly(int.from_bytes(head, "little"))
                self._pass(writer, head + body)
            else:
                self._pass(writer, first)
            while not data and (piece := await reader.read(1 << 16)):
                self._pass(writer, piece)
            while data:
                head = await reader.readexactly(wire.HEADER_BYTES)
                header = wire.unpack_header(head)
                size = header.message_bytes + overhead(header.kind)
                frame = head + await reader.readexactly(size)
                self._pass(writer, self.change(to_duck, frame))
        if writer.can_write_eof():
            writer.write_eof()

    def _pass(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        self.seen += data
        writer.write(data)


async def test_who_listens_learns_nothing(served: tuple[str, ListeningDuck]) -> None:
    async with Tap(served[0]).listening() as tap, attached(tap.address) as transport:
        for layer in range(5):
            await _right(await _ask(transport, layer), layer)
    assert len(tap.seen) > 2000
    for secret in (
        b"HELLO", b"software", PLAN.hash().encode(), transport.nonce,
        np.ones(4, np.float32).tobytes(), np.full(4, 5, np.float32).tobytes(),
    ):  # fmt: skip
        assert secret not in tap.seen


def _second(
    change: Callable[[bytes, bytes], bytes], to_duck: bool
) -> Callable[[bool, bytes], bytes]:
    """Changes the second frame in one direction, knowing the first."""
    before: list[bytes] = []

    def changed(direction: bool, frame: bytes) -> bytes:
        if direction is not to_duck:
            return frame
        before.append(frame)
        return change(before[0], frame) if len(before) == 2 else frame

    return changed


# What is done to the second frame, and what becomes of its ask: to the duck, and to the host.
CHANGES: dict[str, tuple[Callable[[bytes, bytes], bytes], str, str]] = {
    "replaces it by the one before": (lambda first, _: first, "lost", "never answered"),
    "repeats the one before": (lambda first, frame: first + frame, "lost", "right"),
    "sends it twice": (lambda _, frame: frame + frame, "lost or right", "right"),
    "puts the one before under its header": (
        lambda first, frame: frame[:32] + first[32:], "lost", "lost",
    ),
    "changes a bit of the header": (lambda _, frame: _flip(frame, 12), "lost", "lost"),
    "changes a bit of the body": (lambda _, frame: _flip(frame, 70), "lost", "lost"),
    "changes a bit of the seal": (lambda _, frame: _flip(frame, len(frame) - 1), "lost", "lost"),
    "cuts it off": (lambda _, frame: frame[:-1], "lost", "lost"),
}  # fmt: skip


REFUSALS = (
    "not authentic",
    "came before",
    "a frame of session",
    "a data frame has no seal",
    "an answer of",
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("to_duck", [True, False], ids=["to the duck", "to the host"])
async def test_who_changes_what_is_said(
    served: tuple[str, ListeningDuck],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    to_duck: bool,
) -> None:
    """Never a wrong sum: the duck is lost, or what came again is dropped and counted."""
    # A duck that refuses says why, which has to pass the tap.
    monkeypatch.setattr("duck.transports.control.LAST_WORDS_S", WAIT_S)
    address, end = served
    make, at_duck, at_host = CHANGES[change]
    expected = at_duck if to_duck else at_host
    async with Tap(address).listening() as tap, attached(tap.address) as transport:
        tap.change = _second(make, to_duck)
        await _right(await _ask(transport, 1), 1)
        ask = await _ask(transport, 2)
        if change == "cuts it off":  # the rest is waited for, until the next frame makes no sense
            with contextlib.suppress(DuckLost):
                await (await _ask(transport, 3))
        match expected:
            case "lost":
                with pytest.raises(DuckLost) as caught:
                    await _right(ask, 2)
                assert transport.stats()["refused"] == (not to_duck)
                # Who refuses says why, and both ends know it.
                assert re.search("|".join(REFUSALS), caught.value.reason), caught.value.reason
            case "right":
                await _right(ask, 2)
                await _until(lambda: transport.stats()["late_answers"] == 1)
                await _right(await _ask(transport, 3), 3)
            case "never answered":
                await _until(lambda: transport.stats()["late_answers"] == 1)
                await _right(await _ask(transport, 3), 3)
                ask.cancel()
            case _:  # the second copy ends the session, which may overtake the answer to the first
                with contextlib.suppress(DuckLost):
                    await _right(ask, 2)
        if to_duck:
            await _until(lambda: end.refused == 1)


# --- tickets


async def test_a_session_that_has_used_all_its_tickets_ends(
    served: tuple[str, ListeningDuck],
) -> None:
    async with attached(served[0]) as transport:
        free = transport.stats()["rows_free"]
        await _right(await _ask(transport, 1), 1)
        transport.asks._next = 0xFFFFFFFF
        await _right(await _ask(transport, 2), 2)
        with pytest.raises(TransportError, match="ticket 1 was used before in this session"):
            await _ask(transport, 3)
        assert transport.stats()["rows_free"] == free


# --- floods


async def test_ten_thousand_random_connections(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    """Garbage, silence, beginnings of handshakes: what can be refused is, and is counted, and a
    host that was there before goes on being served.
    """
    address, end = served
    noise = _Noise(address)
    with capture_logs() as logs:
        async with attached(address) as transport:
            for batch in range(100):
                await asyncio.gather(*(noise.connect() for _ in range(100)))
                if batch % 10 == 0:
                    await _right(await _ask(transport, batch // 10), batch // 10)
            await _until(lambda: not end._strangers)
            await _right(await _ask(transport, 3), 3)
    assert noise.refused > 4000
    assert end.refused >= noise.refused
    lines = [log for log in logs if log["event"] == "refused"]
    assert 0 < len(lines) < 500
    assert len(duck.attached) == 1


class _Noise:
    """Strangers; `refused` counts those who were told so by the end of their connection."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self._address = (host, int(port))
        self._rng = random.Random(5)
        self._client_hello = HOST.connection().to_send()
        self.refused = 0

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        data, wrong = self._data()
        with socket.socket() as stranger:
            stranger.setblocking(False)
            await loop.sock_connect(stranger, self._address)
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(stranger, data)
                while wrong and await loop.sock_recv(stranger, 4096):
                    pass
            self.refused += wrong

    def _data(self) -> tuple[bytes, bool]:
        """What a stranger says, and whether it can only be refused."""
        rng, hello = self._rng, self._client_hello
        match rng.randrange(6):
            case 0:
                return b"", False
            case 1:
                return hello[: rng.randrange(1, len(hello))], False
            case 2:
                return _flip(hello, rng.randrange(5, len(hello))), False
            case 3:  # a record longer than there are
                return b"\x16\x03\x01\xff" + rng.randbytes(100), True
            case _:  # a control message of at least 16 MB
                return rng.randbytes(3) + b"\1" + rng.randbytes(rng.randrange(300)), True


async def test_a_handshake_that_stalls(served: tuple[str, ListeningDuck]) -> None:
    address, end = served
    end.GREETING_S = 0.05
    half = await Peer.connect(address)
    half.writer.write(HOST.connection().to_send()[:-1])
    assert await half.ended()
    done: Peer | None = None
    while done is None:  # as long as a whole handshake takes here
        with contextlib.suppress(ConnectionError):
            done = await Peer.connect(address, HOST)
        end.GREETING_S *= 2
    assert await done.ended()
    end.GREETING_S = WAIT_S


def test_a_plane_that_does_not_seal() -> None:
    """Somebody's own, which has not heard of keys."""

    class Bare(TcpPlane):
        name = "pigeon"
        is_private = False

    FlockTransport(["127.0.0.1:1"], Bare())
    with pytest.raises(ConfigError, match="--transport pigeon does not seal what it carries"):
        FlockTransport(["127.0.0.1:1"], Bare(), credentials=HOST)
