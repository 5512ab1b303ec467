"""Shared memory whose other side is strange: descriptors that are none, messages nobody may put
there, ducks that are late, that spoil the counts, or that change an answer once it was looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import os
import socket
import stat
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duck import wire
from duck.errors import DuckLost, TransportError, WireError
from duck.placement import Plan
from duck.transports import shm
from duck.transports.base import Ask, Rows
from duck.transports.control import PING_TICKS
from duck.transports.listen import ListeningDuck
from duck.transports.shm import Layout, ShmTransport, Slot
from tests.faults.peers import Peer, ScriptedDuck, hello
from tests.flocks import WAIT_S, FakeDuck, fake_flock, listening, plan_for
from tests.virtual import run

PLAN = plan_for(1)


@pytest.fixture(autouse=True)
async def _peers() -> AsyncIterator[None]:
    yield
    await Peer.close_all()


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where ducks put their sockets: at the end nothing may be left there."""
    short = tempfile.mkdtemp(dir="/tmp")  # a socket's path may have 107 bytes
    monkeypatch.setattr(tempfile, "tempdir", short)
    return Path(short)


@pytest.fixture(autouse=True)
def _nothing_is_left(folders: Path) -> Any:
    yield
    assert not list(folders.iterdir())
    folders.rmdir()


def _open_files() -> Counter[str]:
    """Memory, eventfds and the like that this process has open."""
    gc.collect()  # a failed task's memory goes with its traceback
    names: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            names[os.readlink(f"/proc/self/fd/{name}")] += 1
    return Counter({name: n for name, n in names.items() if "memfd" in name or "anon" in name})


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (it is not ours to make an event of)
            await asyncio.sleep(0.001)


async def _ask(transport: ShmTransport, layer: int = 5, rows: int = 1) -> Ask:
    landing = await transport.acquire(rows)
    x, ids = np.ones((rows, 8), np.float32), np.zeros((rows, 2), np.int32)
    deadline = asyncio.get_running_loop().time() + WAIT_S
    return transport.ask(layer, x, ids, ids.astype(np.float32), landing, deadline=deadline)


# How the answers to an ask may be read.
READS: dict[str, Callable[[Rows], object]] = {
    "partials": lambda rows: rows.partials(1),
    "total": lambda rows: rows.total(1),
}


async def _lost(ask: Ask, read: str) -> DuckLost:
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(DuckLost) as caught:
            READS[read](await ask)
    ask.cancel()
    return caught.value


# --- hosts made by hand


@pytest.fixture
async def duck() -> AsyncIterator[FakeDuck]:
    handler = FakeDuck(0)
    yield handler
    handler.let_go()


@pytest.fixture
async def served(duck: FakeDuck) -> AsyncIterator[tuple[str, ListeningDuck]]:
    """A listening duck; whatever a test did to it, it must serve an honest host afterwards."""
    before = _open_files()
    async with listening(duck) as (address, end):
        yield address, end
        duck.let_go()
        transport = ShmTransport([address])
        await transport.start(PLAN)
        ask = await _ask(transport, 9)
        np.testing.assert_array_equal((await ask).partials(1)[0], np.full((1, 8), 10))
        ask.release()
        await transport.close()
        await _until(lambda: not end._sessions)
    assert not _open_files() - before


class ShmHost:
    """A host whose memory and messages are made by hand."""

    session = 1234

    def __init__(self, plan: Plan = PLAN) -> None:
        self.plan, self.layout = plan, Layout(plan)
        self._stack = contextlib.ExitStack()
        self.file = self._close_later(shm._memory_file(self.layout.nbytes))
        self.asks = self._close_later(os.eventfd(0, os.EFD_NONBLOCK))
        self.answers = self._close_later(os.eventfd(0, os.EFD_NONBLOCK))
        self.memory = shm.Memory(self.file, self.layout)

    def _close_later(self, descriptor: int) -> int:
        self._stack.callback(os.close, descriptor)
        return descriptor

    def __enter__(self) -> ShmHost:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def shake_hands(self, address: str) -> str:
        """HELLO; the path of the duck's socket."""
        self.control = await Peer.connect(address)
        self.control.say("HELLO", **hello(self.plan, data="shm", session=self.session))
        welcome = await self.control.hear()
        assert welcome["t"] == "WELCOME", welcome
        return str(welcome["plane"]["socket"])

    async def hand_over(
        self, path: str, descriptors: list[int] | None = None, data: bytes = b"duck"
    ) -> str:
        """Connect and hand over descriptors; the duck's answer."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as link:
            link.setblocking(False)
            await loop.sock_connect(link, path)
            given = [self.file, self.asks, self.answers] if descriptors is None else descriptors
            socket.send_fds(link, [data], given)
            async with asyncio.timeout(WAIT_S):
                return (await loop.sock_recv(link, 4096)).decode()

    async def attached(self, address: str) -> None:
        assert await self.hand_over(await self.shake_hands(address)) == "OK"

    def body(self, rows: int = 1, expert: int = 0) -> bytes:
        shape = self.plan.shape
        return wire.pack_ask(
            np.full((rows, shape.top_k), expert),
            np.ones((rows, shape.top_k)),
            np.ones((rows, shape.hidden), np.float32),
        )

    def put(
        self, slot: Slot, ticket: int, body: bytes | None = None, *, seen_as: int = 0, **head: int
    ) -> None:
        """An ask; `head` replaces fields of its header, `seen_as` the slot's ticket."""
        body = self.body() if body is None else body
        fields = {
            "kind": wire.Kind.ASK, "session": self.session, "ticket": ticket, "layer": 1,
            "source": wire.HOST, "nbytes": len(body), **head,
        }  # fmt: skip
        self.memory.put(slot.ask, shm._header(**fields), body, None)  # type: ignore[arg-type]
        self.memory.set_ticket(slot, seen_as or ticket)

    def signal(self) -> None:
        os.eventfd_write(self.asks, 1)

    async def answered(self) -> None:
        """Wait for a signal of the duck."""
        loop, signalled = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.answers, signalled.set)
        try:
            async with asyncio.timeout(WAIT_S):
                await signalled.wait()
            os.eventfd_read(self.answers)
        finally:
            loop.remove_reader(self.answers)


def _pipe(host: ShmHost) -> int:
    ends = os.pipe()
    return [host._close_later(end) for end in ends][1]


HANDED: dict[str, tuple[Callable[[ShmHost], dict[str, Any]], str]] = {
    "nothing": (lambda _: {"descriptors": []}, "0 descriptors, want memory and two"),
    "too few": (lambda h: {"descriptors": [h.file, h.asks]}, "2 descriptors"),
    "another word": (lambda _: {"data": b"goose"}, "3 descriptors"),
    "no memory": (lambda h: {"descriptors": [h.asks, h.asks, h.answers]}, "memory of 0 bytes"),
    "a pipe as memory": (lambda h: {"descriptors": [_pipe(h), h.asks, h.answers]}, "memory of"),
    "a pipe as signal": (
        lambda h: {"descriptors": [h.file, h.asks, _pipe(h)]}, "a descriptor that is no eventfd",
    ),
    "memory of another plan": (
        lambda h: {"descriptors": [h._close_later(shm._memory_file(4096)), h.asks, h.answers]},
        "memory of 4096 bytes, want",
    ),
}  # fmt: skip


@pytest.mark.parametrize("handed", HANDED)
async def test_what_is_no_memory(served: tuple[str, ListeningDuck], handed: str) -> None:
    address, end = served
    make, told = HANDED[handed]
    with ShmHost() as host:
        path = await host.shake_hands(address)
        assert told in await host.hand_over(path, **make(host))
        assert told in (await host.control.hear())["text"]
        assert await host.control.ended()
        await _until(lambda: not end._sessions)
    assert end.refused == 1


async def test_only_this_user_and_only_once(
    served: tuple[str, ListeningDuck], folders: Path
) -> None:
    address, _ = served
    with ShmHost() as host:
        path = Path(await host.shake_hands(address))
        assert path.parent.parent == folders
        assert [stat.S_IMODE(os.stat(p).st_mode) for p in (path.parent, path)] == [0o700, 0o600]
        assert await host.hand_over(str(path)) == "OK"
        assert not list(folders.iterdir())  # noqa: ASYNC240 (a moment, and nobody waits)
        with pytest.raises(OSError):
            await host.hand_over(str(path))
        host.control.close()


async def test_a_long_temporary_folder(
    served: tuple[str, ListeningDuck], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, _ = served
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with ShmHost() as host:
        await host.attached(address)
        host.control.close()


def _no_folder_at_all() -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")


@pytest.mark.parametrize(
    ("usual", "why"),
    [(lambda: "/nothing/here", "No such file"), (_no_folder_at_all, "No usable temporary")],
    ids=["missing", "none"],
)
async def test_no_folder_for_the_socket(
    served: tuple[str, ListeningDuck],
    monkeypatch: pytest.MonkeyPatch,
    usual: Callable[[], str],
    why: str,
) -> None:
    address, end = served
    with monkeypatch.context() as changed:
        changed.setattr(tempfile, "gettempdir", usual)
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN, data="shm"))
        told = (await peer.hear())["text"]
        assert told.startswith(f"no folder for a unix socket ({why}")
        assert "--transport tcp" in told
        await _until(lambda: not end._sessions)


async def test_another_user(
    served: tuple[str, ListeningDuck], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, end = served
    with ShmHost() as host:
        path = await host.shake_hands(address)
        monkeypatch.setattr(os, "geteuid", lambda: 4_000_000_000)
        assert "ours 4000000000" in await host.hand_over(path)
        monkeypatch.undo()
        await _until(lambda: not end._sessions)


async def test_a_host_that_never_comes_for_its_socket(
    served: tuple[str, ListeningDuck], folders: Path
) -> None:
    address, end = served
    with ShmHost() as host:
        await host.shake_hands(address)
        host.control.close()
        await _until(lambda: not end._sessions)
    assert not list(folders.iterdir())  # noqa: ASYNC240 (a moment, and nobody waits)


def _one_bit(host: ShmHost, slot: Slot) -> None:
    host.put(slot, 1)
    host.memory.raw[slot.ask + 40] ^= 1


BAD_ASKS: dict[str, tuple[Callable[[ShmHost, Slot], None], str]] = {
    "one bit": (_one_bit, "an ask failed its checksum"),
    "nothing there": (lambda h, slot: h.memory.set_ticket(slot, 1), "magic 0x0000"),
    "another ticket": (lambda h, slot: h.put(slot, 2, seen_as=1), "in the place of ask 1"),
    "session": (lambda h, slot: h.put(slot, 1, session=99), "of session 0x63"),
    "source": (lambda h, slot: h.put(slot, 1, source=0), "in the place of ask 1"),
    "an answer": (lambda h, slot: h.put(slot, 1, kind=wire.Kind.ANSWER), "ANSWER 1 of session"),
    "layer": (lambda h, slot: h.put(slot, 1, layer=10), "ask for layer 10"),
    "half a row": (
        lambda h, slot: h.put(slot, 1, bytes(PLAN.shape.ask_bytes(1) - 1)), "want 1..16 rows",
    ),
    "too large": (lambda h, slot: h.put(slot, 1, nbytes=1 << 31), f"an ask of {1 << 31} bytes"),
    "rows of a larger slot": (lambda h, slot: h.put(slot, 1, h.body(5)), "bytes in"),
    "expert 4 of 4": (lambda h, slot: h.put(slot, 1, h.body(expert=4)), "expert ids 4..4"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ASKS)
async def test_asks_that_no_host_may_put(
    served: tuple[str, ListeningDuck], duck: FakeDuck, bad: str
) -> None:
    address, end = served
    put, told = BAD_ASKS[bad]
    with ShmHost() as host:
        await host.attached(address)
        put(host, host.layout.slots[0])
        host.signal()
        assert told in (await host.control.hear())["text"]
        assert await host.control.ended()
        await _until(lambda: not end._sessions)
    assert end.refused == 1
    assert duck.begun.empty()


async def test_asks_by_hand(served: tuple[str, ListeningDuck], duck: FakeDuck) -> None:
    """Two slots at once, a cancelled one, and one that was given to another ask."""
    address, end = served
    duck.hold(1)
    with ShmHost() as host:
        await host.attached(address)
        first, second, third = host.layout.slots[:3]
        host.put(first, 1)
        host.signal()
        assert await duck.begun.get() == 1
        host.put(second, 3, layer=3)
        host.put(third, 2, layer=2)
        host.signal()
        await _until(lambda: end._worker.waiting(host.session)[0] == 2)
        host.memory.set_ticket(third, 0)
        host.put(second, 4, layer=4)
        host.signal()
        waiting = end._worker
        await _until(lambda: [key[1] for key in waiting._asks] == [4])
        host.memory.set_ticket(first, 0)  # it computes that: its answer will be late
        duck.let_go()
        assert await duck.begun.get() == 4
        await host.answered()
        head = wire.unpack_header(host.memory.header(second.answers))
        assert (head.ticket, head.layer, head.source) == (4, 4, 0)
        assert host.memory.header(first.answers) == bytes(32)
        assert host.memory.header(third.answers) == bytes(32)
        assert host.memory.word(0) == 1  # late answers
        host.control.close()


# --- ducks made by hand


class ShmDuck:
    """A duck that takes the memory, and whose test then does with it what it likes."""

    def __init__(self, folder: Path, plan: Plan = PLAN) -> None:
        self.plan, self.layout = plan, Layout(plan)
        self.path = str(folder / "socket")
        self.scripted = ScriptedDuck({"plane": {"socket": self.path}})
        self._stack = contextlib.ExitStack()

    @contextlib.asynccontextmanager
    async def hosted(self) -> AsyncIterator[tuple[ShmTransport, ShmDuck]]:
        loop = asyncio.get_running_loop()
        with self._stack, socket.socket(socket.AF_UNIX) as listener:
            listener.setblocking(False)
            listener.bind(self.path)
            listener.listen()
            async with self.scripted.listening():
                transport = ShmTransport([self.scripted.address])
                starting = asyncio.create_task(transport.start(self.plan))
                try:
                    async with asyncio.timeout(WAIT_S):
                        link, _ = await loop.sock_accept(listener)
                        self._take(link)
                        await starting
                    yield transport, self
                finally:
                    starting.cancel()
                    await transport.close()
                    os.unlink(self.path)

    def _take(self, link: socket.socket) -> None:
        with link:
            link.setblocking(True)
            _, descriptors, _, _ = socket.recv_fds(link, 64, 3)
            for descriptor in descriptors:
                self._stack.callback(os.close, descriptor)
            link.send(b"OK")
        self.memory = shm.Memory(descriptors[0], self.layout)
        self.file, _, self.to_host = descriptors

    def asked(self, ask: Ask) -> wire.Header:
        """The header of an ask as it lies in the memory."""
        slot = self.layout.slots[ask.rows.number]
        assert self.memory.word(slot.ticket) == ask.ticket
        return wire.unpack_header(self.memory.header(slot.ask))

    def answer(self, ask: Ask, value: float, *, count: bool = True, **head: int) -> None:
        """Put an answer of one row; `head` replaces fields of its header."""
        slot = self.layout.slots[ask.rows.number]
        sums = np.full((ask.count, 8), value, np.float32)
        fields = {
            "kind": wire.Kind.ANSWER, "session": self._session, "ticket": ask.ticket,
            "layer": ask.layer, "source": 0, "nbytes": 16 + sums.nbytes, **head,
        }  # fmt: skip
        self.memory.put(slot.answers, shm._header(**fields), bytes(16), sums)  # type: ignore[arg-type]
        if count:
            self.memory.add(slot.count, 1)

    def take_session(self, transport: ShmTransport) -> None:
        self._session = transport.session

    def signal(self) -> None:
        os.eventfd_write(self.to_host, 1)


@pytest.fixture
async def hand(folders: Path) -> AsyncIterator[tuple[ShmTransport, ShmDuck]]:
    async with ShmDuck(folders).hosted() as (transport, duck):
        duck.take_session(transport)
        yield transport, duck


Hand = tuple[ShmTransport, ShmDuck]


async def test_an_answer_by_hand(hand: Hand) -> None:
    transport, duck = hand
    ask = await _ask(transport, layer=5)
    header = duck.asked(ask)
    assert (header.layer, header.ticket) == (5, ask.ticket)
    duck.answer(ask, 3)
    duck.signal()
    np.testing.assert_array_equal((await ask).partials(1)[0], np.full((1, 8), 3))
    ask.release()


async def test_an_answer_that_is_changed_once_it_was_read(hand: Hand) -> None:
    transport, duck = hand
    ask = await _ask(transport)
    duck.answer(ask, 3)
    duck.signal()
    rows = await ask
    np.testing.assert_array_equal(rows.total(1)[0], np.full((1, 8), 3))
    np.testing.assert_array_equal(rows.partials(1)[0], np.full((1, 8), 3))
    duck.memory.raw[duck.layout.slots[rows.number].answers :] = 0xFF
    np.testing.assert_array_equal(rows.total(1)[0], np.full((1, 8), 3))
    np.testing.assert_array_equal(rows.partials(1)[0], np.full((1, 8), 3))
    ask.release()


@pytest.mark.parametrize("read", READS)
async def test_an_answer_that_is_changed_once_it_has_come(hand: Hand, read: str) -> None:
    transport, duck = hand
    ask = await _ask(transport)
    duck.answer(ask, 3)
    duck.signal()
    rows = await ask
    duck.memory.raw[duck.layout.slots[rows.number].answers + 70] ^= 1
    with pytest.raises(DuckLost, match="failed its checksum"):
        READS[read](rows)
    ask.release()
    with pytest.raises(DuckLost, match="failed its checksum"):
        await _ask(transport)


async def test_a_damaged_answer_that_is_added_up_in_a_thread(hand: Hand) -> None:
    """It is lost for that one at once, and for all as soon as the event loop hears of it."""
    transport, duck = hand
    ask, other = await _ask(transport), await _ask(transport)
    _spoil(duck, ask, 70)
    duck.signal()
    rows = await ask
    with pytest.raises(DuckLost, match="failed its checksum"):
        await asyncio.to_thread(rows.total, 1)
    ask.release()
    with pytest.raises(DuckLost, match="failed its checksum"):
        await other


@pytest.mark.parametrize("at", [2, 8], ids=["header", "ticket"])
async def test_a_header_that_is_changed_once_it_has_come(hand: Hand, at: int) -> None:
    """To add up needs no header; who copies looks at it again."""
    transport, duck = hand
    ask = await _ask(transport)
    duck.answer(ask, 3)
    duck.signal()
    rows = await ask
    duck.memory.raw[duck.layout.slots[rows.number].answers + at] ^= 1
    np.testing.assert_array_equal(rows.total(1)[0], np.full((1, 8), 3))
    for _ in range(2):
        with pytest.raises(DuckLost, match="failed its checksum"):
            rows.partials(1)
    ask.release()


async def test_damage_of_an_old_session_is_no_loss_in_the_new_one() -> None:
    async with fake_flock("shm") as flock:
        transport, free = flock.transport, flock.free
        assert isinstance(transport, ShmTransport)
        asks = [await flock.ask(layer) for layer in (1, 2, 3)]
        for ask, _ in asks:
            await ask
        for ask, _ in asks[:2]:
            slot = ask.rows.unread
            assert isinstance(slot, shm.HostSlot)
            slot.memory.raw[slot.place.answers + 70] ^= 1
        with pytest.raises(DuckLost, match="failed its checksum"):
            asks[0][0].rows.total(1)
        await _until(lambda: not transport.asks.lost)
        assert transport.sessions == 2
        with pytest.raises(DuckLost, match="failed its checksum"):
            asks[1][0].rows.total(1)
        assert not transport.asks.lost
        whole, want = asks[2]  # nothing is wrong with it
        np.testing.assert_array_equal(whole.rows.partials(1), want)
        for ask, _ in asks:
            ask.release()
        ask, want = await flock.ask(4)
        np.testing.assert_array_equal((await ask).partials(1), want)
        ask.release()
        assert flock.free == free


async def test_a_late_answer_never_lands_in_another_asks_rows(hand: Hand) -> None:
    transport, duck = hand
    late = await _ask(transport, layer=1)
    late.cancel()
    ask = await _ask(transport, layer=1)
    assert ask.rows is late.rows
    for count in (True, False):  # whatever it does to the count
        duck.answer(late, 666, count=count)
        duck.signal()
        before = transport.stats()["wakeups"]
        await _until(lambda before=before: transport.stats()["wakeups"] > before)  # type: ignore[misc]
        assert not ask.gather.has(0)
    duck.answer(ask, 3)
    duck.signal()
    np.testing.assert_array_equal((await ask).partials(1)[0], np.full((1, 8), 3))
    ask.release()


async def test_a_duck_that_answers_is_pinged_now_and_then_only(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, duck = hand
    transport.asks.on_tick = None  # we tick by hand
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(transport._control[0], "send", said.append)
    for _ in range(2 * PING_TICKS):
        ask = await _ask(transport)
        duck.answer(ask, 3)
        duck.signal()
        await ask
        ask.release()
        transport._tick()
    assert said == [{"t": "PING"}] * 2
    for _ in range(3):  # it is silent
        transport._tick()
    assert said == [{"t": "PING"}] * 5


@pytest.mark.parametrize("count", [0, 1 << 31, 0xFFFFFFFF])
async def test_counts_that_are_spoilt(hand: Hand, count: int) -> None:
    """A signal that never comes only costs time: the host looks by itself now and then."""
    transport, duck = hand
    ask = await _ask(transport)
    duck.memory.words[duck.layout.slots[ask.rows.number].count // 4] = count
    duck.answer(ask, 3, count=False)
    async with asyncio.timeout(WAIT_S):
        np.testing.assert_array_equal((await ask).partials(1)[0], np.full((1, 8), 3))
    ask.release()


def _spoil(duck: ShmDuck, ask: Ask, at: int) -> None:
    duck.answer(ask, 3)
    duck.memory.raw[duck.layout.slots[ask.rows.number].answers + at] ^= 1


def _says_why(duck: ShmDuck, ask: Ask) -> None:
    slot = duck.layout.slots[ask.rows.number]
    text = b"no \x1b[2J more memory"
    head = shm._header(wire.Kind.ERROR, duck._session, ask.ticket, ask.layer, 0, len(text))
    duck.memory.put(slot.answers, head, text, None)


BAD_ANSWERS: dict[str, tuple[Callable[[ShmDuck, Ask], None], str]] = {
    "checksum": (lambda duck, ask: _spoil(duck, ask, 28), "failed its checksum"),
    "sums": (lambda duck, ask: _spoil(duck, ask, 60), "failed its checksum"),
    "stamps": (lambda duck, ask: _spoil(duck, ask, 33), "failed its checksum"),
    "magic": (lambda duck, ask: _spoil(duck, ask, 0), "does not speak duck"),
    "version": (lambda duck, ask: _spoil(duck, ask, 2), "data frames of version"),
    "session": (lambda duck, ask: duck.answer(ask, 3, session=1), "of session 0x1"),
    "source": (lambda duck, ask: duck.answer(ask, 3, source=1), "duck 1, which nobody"),
    "layer": (lambda duck, ask: duck.answer(ask, 3, layer=6), "for layer 6"),
    "an ask": (lambda duck, ask: duck.answer(ask, 3, kind=wire.Kind.ASK), "which nobody asked"),
    "too short": (lambda duck, ask: duck.answer(ask, 3, nbytes=47), "an answer of 47 bytes"),
    "4 GB": (lambda duck, ask: duck.answer(ask, 3, nbytes=(1 << 32) - 1), "answer of 4294967295"),
    "an error too long": (
        lambda duck, ask: duck.answer(ask, 3, kind=wire.Kind.ERROR, nbytes=4097), "which nobody",
    ),
    "an error": (_says_why, r"the duck could not answer: no  \[2J more memory$"),
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("bad", BAD_ANSWERS)
async def test_answers_that_no_duck_may_put(hand: Hand, bad: str, read: str) -> None:
    transport, duck = hand
    free = transport.stats()["rows_free"]
    ask = await _ask(transport, layer=5)
    put, told = BAD_ANSWERS[bad]
    put(duck, ask)
    duck.signal()
    lost = await _lost(ask, read)
    assert (lost.index, lost.layer) == (0, 5)
    with pytest.raises(DuckLost, match=told):
        raise lost
    assert transport.stats()["rows_free"] == free
    with pytest.raises(DuckLost):
        await _ask(transport)


async def test_memory_that_nobody_can_shrink(hand: Hand) -> None:
    """To read what was cut off would kill the reader."""
    _, duck = hand
    for nbytes in (0, duck.layout.nbytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(duck.file, nbytes)


@pytest.mark.parametrize("path", ["/nothing/here", "", "\0", "x" * 200, "/dev/null"])
async def test_a_duck_whose_socket_cannot_be_reached(path: str) -> None:
    before = _open_files()
    async with ScriptedDuck({"plane": {"socket": path}}).listening() as duck:
        transport = ShmTransport([duck.address])
        with pytest.raises(TransportError, match=r"shares no memory with this host .*--transport"):
            await transport.start(PLAN)
    assert not _open_files() - before


def test_a_duck_that_does_not_take_the_memory(folders: Path) -> None:
    """On a clock that jumps."""

    async def main() -> None:
        async with ScriptedDuck({"plane": {"socket": path}}).listening() as duck:
            transport = ShmTransport([duck.address])
            with pytest.raises(DuckLost, match="did not take the shared memory within 10 s"):
                await transport.start(PLAN)

    path = str(folders / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        run(main())
        os.unlink(path)


async def test_a_duck_that_refuses_the_memory(folders: Path) -> None:
    path = str(folders / "socket")

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"not \x1b today")
        await reader.read(100)
        writer.close()

    server = await asyncio.start_unix_server(refuse, path)
    async with server, ScriptedDuck({"plane": {"socket": path}}).listening() as duck:
        transport = ShmTransport([duck.address])
        with pytest.raises(WireError, match="did not take the shared memory: not   today"):
            await transport.start(PLAN)
    os.unlink(path)


@pytest.mark.parametrize("ducks", [1, 2, 8, 9, 10, 16, 17, 32, 64])
def test_every_duck_is_woken_once(ducks: int) -> None:
    """By the host, or by one duck that the host wakes."""
    groups, wakes = shm.wake_groups(ducks)
    assert len(groups) == len(wakes) == ducks
    woken = [duck for duck in range(ducks) if groups[duck] == 0]
    assert len(woken) <= max(8, math.isqrt(ducks - 1) + 1)
    assert all(wakes[duck] is None for duck in range(ducks) if groups[duck])
    by_others = [wakes[duck] for duck in woken if wakes[duck] is not None]
    assert sorted(by_others) == sorted(set(groups) - {0})  # type: ignore[type-var]
    sizes = [groups.count(group) for group in set(groups)]
    assert max(sizes) <= 8


async def test_more_ducks_than_the_host_wakes_itself() -> None:
    """Twelve: four are woken by the host, eight by those; asks and cancels reach all."""
    async with fake_flock("shm", ducks=12) as flock:
        for layer in range(3):
            ask, want = await flock.ask(layer, 2)
            np.testing.assert_array_equal((await ask).partials(2), want)
            ask.release()
        free = flock.free
        ask, _ = await flock.ask(3, 1)
        ask.cancel()
        ask, want = await flock.ask(4, 1)
        np.testing.assert_array_equal((await ask).partials(1), want)
        ask.release()
        assert flock.free == free
