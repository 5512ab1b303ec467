"""A host and ducks that are strange, frozen, gone or lying: every wait ends with an error that
names the duck, and nothing unverified reaches a sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from duck import wire
from duck.errors import DuckLost, TransportClosed, TransportError, WireError
from duck.kernels import library
from duck.keys import ClusterKey
from duck.placement import Plan
from duck.transports import base, control, receive
from duck.transports.base import Ask
from duck.transports.control import _NO_WAY
from duck.transports.listen import ListeningDuck
from duck.transports.tcp import TcpTransport
from duck.transports.tls import Credentials, Role
from tests.faults.peers import Peer, ScriptedDuck, answer, host_of
from tests.flocks import KEY, WAIT_S, FakeDuck, listening, plan_for
from tests.virtual import run

PLAN = plan_for(1)
IDS = np.zeros((1, 2), np.int32)


@pytest.fixture(autouse=True, params=["in Python", "natively", "in a thread"])
def _receiving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the host receives its frames."""
    monkeypatch.setattr(library, "is_loaded", lambda: request.param != "in Python")
    if request.param == "in a thread":
        monkeypatch.setattr(receive, "THREAD_FROM", 1)


@pytest.fixture(autouse=True)
async def _peers() -> AsyncIterator[None]:
    yield
    await Peer.close_all()


async def _ask(transport: TcpTransport, layer: int = 5, rows: int = 1, hidden: int = 8) -> Ask:
    landing = await transport.acquire(rows)
    x, ids = np.ones((rows, hidden), np.float32), np.zeros((rows, 2), np.int32)
    deadline = asyncio.get_running_loop().time() + WAIT_S
    return transport.ask(layer, x, ids, ids.astype(np.float32), landing, deadline=deadline)


async def _lost(ask: Ask) -> DuckLost:
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(DuckLost) as caught:
            await ask
    return caught.value


# --- starting


async def _start(duck: ScriptedDuck, plan: Plan = PLAN) -> None:
    async with duck.listening():
        transport = TcpTransport([duck.address], ["duck 0 (scripted)"])
        try:
            async with asyncio.timeout(WAIT_S):
                await transport.start(plan)
        finally:
            assert all(link.transport.is_closing() for link in transport._links)


@pytest.mark.parametrize(
    ("welcome", "told"),
    [
        ({"v": 2}, "speaks protocol 2, this host 3"),
        ({"v": "1"}, "field 'v' is str"),
        ({"plan_hash": "0"}, "another plan hash"),
        ({"plan_hash": None}, "field 'plan_hash'"),
        ({"slice_hash": "0"}, "another slice hash"),
        ({"nonce": b""}, "nonce of 0 bytes, want 16"),
        ({"nonce": None}, "field 'nonce'"),
        ({"plane": None}, "field 'plane'"),
        ({"plane": {}}, "field 'token'"),
        ({"plane": {"token": b"x" * 65}}, "impossible token"),
        ({"plane": {"token": "text"}}, "field 'token' is str"),
    ],
)
async def test_welcomes_that_are_none(welcome: dict[str, Any], told: str) -> None:
    with pytest.raises(WireError, match=rf"^duck 0 \(scripted\).*{told}"):
        await _start(ScriptedDuck(welcome))


def _says(*messages: dict[str, Any]) -> Callable[[Peer, dict[str, Any]], Awaitable[None]]:
    async def script(peer: Peer, _hello: dict[str, Any]) -> None:
        for message in messages:
            peer.writer.write(wire.encode_control(message))
        await peer.ended()

    return script


def _writes(data: bytes) -> Callable[[Peer, dict[str, Any]], Awaitable[None]]:
    async def script(peer: Peer, _hello: dict[str, Any]) -> None:
        peer.writer.write(data)
        await peer.ended()

    return script


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            _says({"t": "ERR", "text": "no\x1b[2J\nroom"}),
            r"refused: no \[2J room$",
        ),
        (_says({"t": "ERR"}), "field 'text'"),
        (_says({"t": "OK"}), r"sent 'OK' where WELCOME was due"),
        (_says({"t": "LOADING", "done": "x", "total": 1}), "field 'done'"),
        (_says(*[{"t": "LOADING", "done": 1, "total": 1}] * 200), "unread control messages"),
        (
            _writes(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
            r"127\.0\.0\.1:\d+ is not a duck \(it answered 'SSH-2.0-OpenSSH_9.2p1'\)$",
        ),
        (
            _writes(b"\0\0\1\1HTTP"),
            r"127\.0\.0\.1:\d+ is not a duck \(it answered bytes 00 00 01 01 48 54 54 50\)$",
        ),
        (_writes(b"\1\0\0\0\xc1"), r"is not a duck \(it answered bytes 01 00 00 00 c1\)$"),
        (_says({"t": "HELLO"}), r"is not a duck \(it answered what it was sent\)$"),
    ],
)
async def test_answers_to_hello_that_are_none(script: Any, told: str) -> None:
    with pytest.raises(WireError, match=rf"^duck 0 \(scripted\).*{told}"):
        await _start(ScriptedDuck(script=script))


async def test_a_duck_that_closes_instead_of_answering() -> None:
    async def leave(peer: Peer, _hello: dict[str, Any]) -> None:
        peer.close()

    with pytest.raises(DuckLost, match=r"lost duck 0 .*outside an ask.* before WELCOME") as caught:
        await _start(ScriptedDuck(script=leave))
    assert caught.value.layer is None


def test_a_duck_that_accepts_and_stalls() -> None:
    """On a clock that jumps, which runs ahead of no message, however busy the machine is."""
    told = r"no WELCOME and no sign of life for 10 s; is 127\.0\.0\.1:\d+ a duck\?$"

    async def main() -> float:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(DuckLost, match=told):
            await _start(ScriptedDuck(script=_says()))
        return asyncio.get_running_loop().time() - begun

    assert run(main()) == control.CONNECT_S


def test_a_duck_that_loads_for_longer_than_a_silence_may_be() -> None:
    async def load(peer: Peer, hello: dict[str, Any]) -> None:
        for done in range(3):
            peer.say("LOADING", done=done, total=3)
            await asyncio.sleep(0.9 * control.CONNECT_S)  # its disk is slow
        peer.say("ERR", text="enough")
        await peer.ended()

    async def main() -> None:
        with pytest.raises(WireError, match="enough"):
            await _start(ScriptedDuck(script=load))

    run(main())


async def test_a_duck_that_loads_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it loads, again and again, and never a byte more."""
    monkeypatch.setattr(control, "PROGRESS_S", 0.05)
    told = asyncio.Event()

    async def load(peer: Peer, hello: dict[str, Any]) -> None:
        peer.say("LOADING", done=6, total=9)
        peer.say("LOADING", done=7, total=9)
        while True:
            told.clear()
            peer.say("LOADING", done=7, total=9)
            async with asyncio.timeout(WAIT_S):
                await told.wait()

    async with ScriptedDuck(script=load).listening() as duck:
        transport = TcpTransport([duck.address], None, lambda *_: told.set())
        with pytest.raises(DuckLost, match="it loads, and not a byte more has come for") as caught:
            async with asyncio.timeout(WAIT_S):
                await transport.start(PLAN)
    assert caught.value.waited_ms >= 50


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1:1", r"duck node --listen 127.0.0.1:1 --model DIR \(or --store DIR\)$"),
        # A name that is refused without asking anybody, who may take his time.
        ("[fe80::1%pond7]:1", r"check the name in \[fe80::1%pond7\]:1, or give"),
        ("..:1", "check the name in ..:1, or give"),
    ],
)
async def test_nobody_there(host: str, told: str) -> None:
    transport = TcpTransport([host])
    with pytest.raises(TransportError, match=f"cannot reach duck 0 .*{told}"):
        await transport.start(PLAN)


@pytest.mark.parametrize(
    ("address", "key", "number", "told"),
    [
        ("10.0.0.1:5", None, errno.ENETUNREACH, "check 10.0.0.1:5, and the network"),
        ("10.0.0.1:5", None, errno.EHOSTUNREACH, "check 10.0.0.1:5, and the network"),
        ("10.0.0.1:5", None, errno.ECONNREFUSED, "--insecure, or better --key-file FILE on both"),
        ("10.0.0.1:5", KEY, errno.ECONNREFUSED, "(or --store DIR) --key-file FILE"),
        ("127.0.0.1:5", KEY, errno.ECONNREFUSED, "(or --store DIR) --key-file FILE"),
        ("127.0.0.1:5", None, errno.ECONNREFUSED, "(or --store DIR)"),
    ],
)
def test_advice(address: str, key: ClusterKey | None, number: int, told: str) -> None:
    credentials = Credentials(key, Role.HOST) if key else None
    transport = TcpTransport([address], credentials=credentials)
    assert transport._advice(address, OSError(number, "no")).endswith(told) or number in _NO_WAY
    assert told in transport._advice(address, OSError(number, "no"))


async def test_one_duck_refuses_and_the_others_are_let_go() -> None:
    """Else they would go on thinking that they serve a host."""
    plan = plan_for(3)
    both = asyncio.Event()

    async def refuse(peer: Peer, _hello: dict[str, Any]) -> None:
        await both.wait()
        peer.say("ERR", text="not today")
        await peer.ended()

    async with contextlib.AsyncExitStack() as stack:
        honest = [await stack.enter_async_context(listening(FakeDuck(n))) for n in range(2)]
        duck = await stack.enter_async_context(ScriptedDuck(script=refuse).listening())
        transport = TcpTransport([honest[0][0], honest[1][0], duck.address])
        starting = asyncio.create_task(transport.start(plan))
        async with asyncio.timeout(WAIT_S):
            while not all(_attached(end) for _, end in honest):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            both.set()
            with pytest.raises(WireError, match="refused: not today"):
                await starting
            while any(end._sessions for _, end in honest):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await transport.close()


def _attached(end: ListeningDuck) -> bool:
    return any(session.feed.link for session in end._sessions.values())


@pytest.mark.parametrize("how", ["cancel", "close"])
async def test_told_to_stop_while_starting(how: str) -> None:
    reached = asyncio.Event()

    async def stall(peer: Peer, _hello: dict[str, Any]) -> None:
        reached.set()
        await peer.ended()

    plan = plan_for(2)
    async with (
        listening(FakeDuck(0)) as (address, end),
        ScriptedDuck(script=stall).listening() as duck,
    ):
        transport = TcpTransport([address, duck.address])
        starting = asyncio.create_task(transport.start(plan))
        async with asyncio.timeout(WAIT_S):
            await reached.wait()
            while not _attached(end):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if how == "cancel":
                starting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await starting
            else:
                await transport.close()
                with pytest.raises((TransportClosed, DuckLost)):
                    await starting
            while end._sessions:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert all(link.transport.is_closing() for link in transport._links)


# --- answering


async def test_answers_in_another_order_than_the_asks() -> None:
    async with host_of(ScriptedDuck(), PLAN) as (transport, data):
        asks = [await _ask(transport, layer) for layer in range(4)]
        headers = [(await data.frame())[0] for _ in asks]
        for header in reversed(headers):
            data.writer.write(answer(PLAN, header, np.full((1, 8), header.layer)))
        for ask in (asks[2], asks[0], asks[3], asks[1]):
            rows = await ask
            np.testing.assert_array_equal(rows.partials(1), np.full((1, 1, 8), ask.layer))
            ask.release()


async def test_fragments_mixed_and_a_cancelled_ask_between() -> None:
    """Long answers interleaved; the rows of the cancelled one already serve another ask."""
    plan = plan_for(1, hidden=1 << 17, max_rows=4)
    frame = 32 + wire.FRAME_LIMIT
    async with host_of(ScriptedDuck(), plan) as (transport, data):
        first = await _ask(transport, 1, 4, 1 << 17)
        gone = await _ask(transport, 2, 4, 1 << 17)
        heads = []
        for _ in range(2):
            heads.append((await data.frame())[0])
            for _ in range(heads[-1].fragments - 1):
                await data.frame()
        rng = np.random.default_rng(0)
        values = [rng.standard_normal((4, 1 << 17), np.float32) for _ in range(3)]
        one, two = (answer(plan, head, part) for head, part in zip(heads, values, strict=False))
        data.writer.write(one[: 2 * frame] + two[frame : frame + 5000])
        link = transport.plane._links[0]
        async with asyncio.timeout(WAIT_S):  # until it is inside the second fragment of `two`
            while (  # noqa: ASYNC110
                not (head := link._header) or head.ticket != gone.ticket or link._have < 4000
            ):
                await asyncio.sleep(0.001)
        gone.cancel()
        third = await _ask(transport, 3, 4, 1 << 17)
        assert third.rows is gone.rows
        assert (await data.frame())[0].kind == wire.Kind.CANCEL
        head = (await data.frame())[0]
        for _ in range(head.fragments - 1):
            await data.frame()
        three = answer(plan, head, values[2])
        data.writer.write(two[frame + 5000 : 2 * frame] + three[: 2 * frame])
        # What comes late must not touch what has landed.
        data.writer.write(two[:frame] + two[2 * frame :] + three[2 * frame :] + one[2 * frame :])
        for ask, part in ((first, values[0]), (third, values[2])):
            np.testing.assert_array_equal((await ask).partials(4)[0], part)
            ask.release()
        assert transport.stats()["late_answers"] == 1


async def test_a_late_answer_right_before_one_that_is_waited_for() -> None:
    """They come in one stretch; nothing that comes after may touch the row of the second."""
    plan = plan_for(2)
    rng = np.random.default_rng(0)
    late, first, second = (rng.standard_normal((rows, 8), np.float32) for rows in (1, 2, 1))
    ducks = [ScriptedDuck(), ScriptedDuck()]
    async with contextlib.AsyncExitStack() as stack:
        for duck in ducks:
            await stack.enter_async_context(duck.listening())
        transport = TcpTransport([duck.address for duck in ducks])
        stack.push_async_callback(transport.close)
        await transport.start(plan)
        peers = [await duck.data.get() for duck in ducks]
        gone = await _ask(transport, 1)
        gone.cancel()
        asks = [await _ask(transport, 2, rows=2), await _ask(transport, 3)]
        for peer in peers:
            heads = [(await peer.frame())[0] for _ in range(4)]
        heads = [head for head in heads if head.kind == wire.Kind.ASK]
        values = (late, first, second)
        parts = [answer(plan, head, part) for head, part in zip(heads, values, strict=True)]
        peers[0].writer.write(parts[0] + parts[1] + parts[2])
        async with asyncio.timeout(WAIT_S):
            while not asks[1].gather.has(0):  # noqa: ASYNC110 (all of it has come)
                await asyncio.sleep(0.001)
        assert asks[0].gather.has(0)
        assert not asks[0].gather.has(1)
        for head, part in zip(heads[1:], values[1:], strict=True):
            peers[1].writer.write(answer(plan, head, part + 1, source=1))
        for ask, part in zip(asks, values[1:], strict=True):
            partials = (await ask).partials(len(part))
            np.testing.assert_array_equal(partials, np.stack([part, part + 1]))
            ask.release()


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


OK = np.ones((1, 8))
BAD_ANSWERS: dict[str, tuple[Callable[[wire.Header], bytes], str]] = {
    "checksum": (lambda ask: _flip(answer(PLAN, ask, OK), 28), "failed its checksum"),
    "sums": (lambda ask: _flip(answer(PLAN, ask, OK), 60), "failed its checksum"),
    "stamps": (lambda ask: _flip(answer(PLAN, ask, OK), 33), "failed its checksum"),
    "magic": (lambda ask: _flip(answer(PLAN, ask, OK), 0), "does not speak duck"),
    "session": (lambda ask: answer(PLAN, ask, OK, session=ask.session ^ 1), "a frame of session"),
    "source": (lambda ask: answer(PLAN, ask, OK, source=1), "duck 1"),
    "layer": (lambda ask: answer(PLAN, ask, OK, layer=6), "for layer 6"),
    "an ask": (lambda ask: answer(PLAN, ask, OK, kind=wire.Kind.ASK), "a duck sent ASK"),
    "too short": (lambda ask: answer(PLAN, ask, OK[:, :7]), "want 48"),
    "too long": (lambda ask: answer(PLAN, ask, np.ones((2, 8))), "want 48"),
    "far too long": (
        lambda ask: answer(PLAN, ask, OK, message_bytes=0xFFFFFFFF, fragments=4096), "at most",
    ),
    "fragments": (lambda ask: answer(PLAN, ask, OK, fragments=2), "fragment 0 of 2"),
    "offset": (lambda ask: answer(PLAN, ask, OK, offset=1), "at 1"),
    "an error too long": (
        lambda ask: answer(PLAN, ask, np.ones((1, 2000)), kind=wire.Kind.ERROR), "at most 4096",
    ),
    "an error": (
        lambda ask: answer(
            PLAN, ask, np.zeros((1, 0)), stamps=b"no \x1b[2J more\nmemory", kind=wire.Kind.ERROR
        ),
        r"the duck could not answer: no  \[2J more memory$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ANSWERS)
async def test_answers_that_no_duck_may_send(bad: str) -> None:
    async with host_of(ScriptedDuck(), PLAN) as (transport, data):
        free = transport.stats()["rows_free"]
        ask = await _ask(transport, layer=5)
        header, _ = await data.frame()
        make, told = BAD_ANSWERS[bad]
        data.writer.write(make(header) + answer(PLAN, header, OK))  # a good one comes too late
        lost = await _lost(ask)
        assert (lost.index, lost.layer) == (0, 5)
        with pytest.raises(DuckLost, match=told):
            raise lost
        assert transport.stats()["rows_free"] == free


async def test_an_error_that_comes_in_pieces() -> None:
    """Its bytes must survive from one reception to the next."""
    async with host_of(ScriptedDuck(), PLAN) as (transport, data):
        ask = await _ask(transport)
        header, _ = await data.frame()
        frame = answer(
            PLAN, header, np.zeros((1, 0)), stamps=b"cannot " * 100, kind=wire.Kind.ERROR
        )
        link = transport.plane._links[0]
        for start in range(0, len(frame), 100):
            heard = link.heard
            data.writer.write(frame[start : start + 100])
            while link.heard == heard:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert (await _lost(ask)).reason.endswith("cannot " * 100)


async def test_an_answer_that_comes_twice() -> None:
    """The second could be cut off half-way, over rows that were already verified."""
    plan = plan_for(2)
    async with contextlib.AsyncExitStack() as stack:
        liar = await stack.enter_async_context(ScriptedDuck().listening())
        slow = await stack.enter_async_context(ScriptedDuck().listening())
        transport = TcpTransport([liar.address, slow.address])
        stack.push_async_callback(transport.close)
        await transport.start(plan)
        ask = await _ask(transport, 3)
        honest, data = await slow.data.get(), await liar.data.get()
        header, _ = await data.frame()
        data.writer.write(answer(plan, header, OK) + answer(plan, header, OK * 2)[:50])
        assert await data.ended()
        honest.writer.write(answer(plan, (await honest.frame())[0], OK * 3, source=1))
        np.testing.assert_array_equal((await ask).partials(1), np.stack([OK, OK * 3]))
        ask.release()
        with pytest.raises(DuckLost, match=r"duck 0 .*fragment 0 of an answer came twice"):
            await _ask(transport)


async def test_answers_to_asks_that_nobody_made() -> None:
    """They may be late; they are counted and dropped."""
    async with host_of(ScriptedDuck(), PLAN) as (transport, data):
        ask = await _ask(transport)
        header, _ = await data.frame()
        for ticket in (header.ticket + 1, 0, 0xFFFFFFFF):
            data.writer.write(answer(PLAN, header, OK * 9, ticket=ticket))
        data.writer.write(answer(PLAN, header, OK))
        np.testing.assert_array_equal((await ask).partials(1)[0], OK)
        ask.release()
        assert transport.stats()["late_answers"] == 3


@pytest.mark.parametrize("which", ["control", "data"])
async def test_a_duck_that_is_gone_in_the_middle_of_an_ask(which: str) -> None:
    duck = ScriptedDuck()
    async with host_of(duck, PLAN) as (transport, data):
        control = await duck.control.get()
        ask = await _ask(transport, layer=8)
        header, _ = await data.frame()
        data.writer.write(answer(PLAN, header, OK)[:-1])
        (control if which == "control" else data).close()
        lost = await _lost(ask)
        assert lost.layer == 8
        assert lost.duck == f"duck 0 ({duck.address})"
        assert lost.reason.startswith("connection")
        assert lost.waited_ms > 0
        with pytest.raises(DuckLost):
            await _ask(transport)


async def test_a_duck_that_freezes_in_the_middle_of_an_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TICK_S", 1000.0)  # only the test ticks
    duck = ScriptedDuck()
    async with host_of(duck, PLAN) as (transport, data):
        duck.answers_pings = False
        ask = await _ask(transport, layer=8)
        await data.frame()
        for _ in range(control.SILENT_TICKS):  # before the first, there was a sign of life
            transport._tick()
        assert not transport.asks.lost
        transport._tick()
        lost = await _lost(ask)
        assert (lost.index, lost.layer) == (0, 8)
        assert lost.reason.startswith("no sign of life for")
        assert lost.waited_ms > 0


async def test_a_duck_that_computes_for_long_is_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TICK_S", 1000.0)  # only the test ticks
    async with host_of(ScriptedDuck(), PLAN) as (transport, data):
        ask = await _ask(transport)
        header, _ = await data.frame()
        (link,) = transport._control
        for _ in range(3 * control.SILENT_TICKS):
            heard = link.heard
            transport._tick()
            transport._tick()  # now it has been silent for a tick: it is pinged
            async with asyncio.timeout(WAIT_S):
                while link.heard == heard:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        assert not transport.asks.lost
        data.writer.write(answer(PLAN, header, OK))
        np.testing.assert_array_equal((await ask).partials(1)[0], OK)
        ask.release()


async def test_pongs_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "TICK_S", 0.001)
    monkeypatch.setattr(control, "SILENT_TICKS", 100_000)  # as they are short
    async with host_of(ScriptedDuck(), PLAN) as (transport, _):
        link = transport._control[0]
        async with asyncio.timeout(WAIT_S):
            while link.heard < 100:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert link.messages.qsize() < 64
        assert not transport.asks.lost


async def test_a_duck_lost_before_its_answer_is_missed_only_by_asks_it_owes() -> None:
    duck = ScriptedDuck()
    async with host_of(duck, PLAN) as (transport, data):
        whole, owed = await _ask(transport, 1), await _ask(transport, 2)
        header, _ = await data.frame()
        data.writer.write(answer(PLAN, header, OK))
        rows = await whole
        data.close()
        assert (await _lost(owed)).layer == 2
        np.testing.assert_array_equal(rows.partials(1)[0], OK)
        whole.release()


async def test_an_answer_that_lies_there_and_is_not_told_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Received by the thread, not noted: the same duck's next frame must not be laid over it."""
    library.native()
    monkeypatch.setattr(library, "is_loaded", lambda: True)
    monkeypatch.setattr(receive, "THREAD_FROM", 1)
    plan = plan_for(2)
    async with contextlib.AsyncExitStack() as stack:
        liar = await stack.enter_async_context(ScriptedDuck().listening())
        honest = await stack.enter_async_context(ScriptedDuck().listening())
        transport = TcpTransport([liar.address, honest.address])
        stack.push_async_callback(transport.close)
        await transport.start(plan)
        ask = await _ask(transport, 3)
        data, other = await liar.data.get(), await honest.data.get()
        header, _ = await data.frame()
        plane: Any = transport.plane
        before = plane._collector.heard(0)
        data.writer.write(answer(plan, header, OK))
        while plane._collector.heard(0) == before:  # the event loop does not turn meanwhile
            os.sched_yield()
        plane._links[0].feed(answer(plan, header, OK * 2)[:50])
        assert "came twice" in str(plane._links[0].error)
        other.writer.write(answer(plan, (await other.frame())[0], OK * 3, source=1))
        with contextlib.suppress(DuckLost):
            np.testing.assert_array_equal((await ask).partials(1), np.stack([OK, OK * 3]))
