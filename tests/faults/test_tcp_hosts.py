"""A duck and the peers that connect to it: strangers, hosts of other versions, liars, the gone.

Whatever they send, the duck goes on serving the honest ones, and tells why it refuses where it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from duck import wire
from duck.errors import ConfigError, WeightsError
from duck.node import Node
from duck.placement import Plan
from duck.slices import ModelSource
from duck.transports.listen import ListeningDuck
from duck.transports.tcp import TcpDuckPlane, TcpTransport
from tests.checkpoints import CONFIG, make_checkpoint
from tests.faults.peers import Host, Peer, hello
from tests.flocks import WAIT_S, FakeDuck, info_logger, listening, plan_for

PLAN = plan_for(1)
OTHER_SLICE = plan_for(2)


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
    """A listening duck; whatever a test did to it, it must serve an honest host afterwards."""
    async with listening(duck) as (address, end):
        yield address, end
        duck.let_go()
        await _serves(address)
        assert not end._strangers


async def _serves(address: str, plan: Plan = PLAN) -> None:
    transport = TcpTransport([address])
    try:
        await transport.start(plan)
        rows = await transport.acquire(1)
        deadline = asyncio.get_running_loop().time() + WAIT_S
        x, ids = np.ones((1, 8), np.float32), np.zeros((1, 2), np.int32)
        ask = transport.ask(9, x, ids, ids.astype(np.float32), rows, deadline=deadline)
        np.testing.assert_array_equal((await ask).partials(1)[0], x + 9)
        ask.release()
    finally:
        await transport.close()


async def _until(condition: Callable[[], bool]) -> None:
    """Turn the event loop until something another connection does has come true."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (it is not ours to make an event of)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("goodbye", [True, False])
async def test_the_end_of_a_session_is_logged(
    served: tuple[str, ListeningDuck], monkeypatch: pytest.MonkeyPatch, goodbye: bool
) -> None:
    monkeypatch.setattr("duck.transports.listen._log", info_logger())
    address, end = served
    with capture_logs() as logs:
        control = await Peer.connect(address)
        control.say("HELLO", **hello(PLAN))
        assert (await control.hear())["t"] == "WELCOME"
        if goodbye:
            control.say("BYE")
        else:
            control.close()
        await _until(lambda: any(log["event"] == "session_ended" for log in logs))
    (event,) = [log for log in logs if log["event"] == "session_ended"]
    assert event["reason"] == ("the host said goodbye" if goodbye else "connection closed")
    assert event["peer"].startswith("127.0.0.1:")
    assert event["seconds"] >= 0
    assert not end._sessions


# --- strangers


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"GET / HTTP/1.1\r\nHost: pond\r\n\r\n", "another protocol, which begins 'GET / HTTP"),
        (b"\xff\xff\xff\xff", "at most 65536"),
        ((1 << 16 | 1).to_bytes(4, "little"), "of 65537 bytes, at most 65536"),
        (b"\4\0\0\0junk", "no msgpack"),
        (b"\1\0\0\0\x80", "without a kind"),
        (wire.encode_control({"t": "WHO" * 100}), "where HELLO or DATA was due"),
        (wire.encode_control({"t": "DATA", "token": b"guess"}), "with an unknown word"),
        (
            wire.encode_control({"t": "DATA", "token": b"guess"}) + bytes(range(32)) * 9,
            "with an unknown word, or one that was used before",
        ),
        (wire.encode_control({"t": "DATA"}), "field 'token'"),
        (wire.encode_control({"t": "HELLO"}), "field 'v'"),
    ],
)
async def test_garbage_on_the_port(
    served: tuple[str, ListeningDuck], data: bytes, told: str
) -> None:
    address, end = served
    peer = await Peer.connect(address)
    peer.writer.write(data)
    answer = await peer.hear()
    assert answer["t"] == "ERR"
    assert told in answer["text"]
    assert await peer.ended()
    assert end.refused == 1


async def test_a_thousand_connections_that_say_nothing(served: tuple[str, ListeningDuck]) -> None:
    address, end = served
    end.MAX_STRANGERS = 32
    silent = [await Peer.connect(address) for _ in range(1000)]
    # An honest host is served at once, not when the silent ones have timed out.
    await _serves(address)
    assert len(end._strangers) <= 32
    assert 1000 - 32 <= end.refused <= 1000
    for peer in silent:
        peer.close()
    await _until(lambda: not end._strangers)


async def test_a_peer_that_connects_and_stalls(served: tuple[str, ListeningDuck]) -> None:
    address, end = served
    end.GREETING_S = 0.05
    with capture_logs() as logs:
        silent, slow = await Peer.connect(address), await Peer.connect(address)
        slow.writer.write(wire.encode_control({"t": "HELLO", **hello(PLAN)})[:-1])
        assert await silent.ended()
        assert await slow.ended()
    assert end.refused == 2
    told = [(entry["event"], entry["reason"]) for entry in logs if entry["event"] == "refused"]
    assert told == [("refused", "said nothing for 0 s")] * 2
    end.GREETING_S = WAIT_S


async def test_what_a_stranger_may_make_a_duck_keep(served: tuple[str, ListeningDuck]) -> None:
    """Until it has said HELLO, far less than a host may; every one of them is counted."""
    address, end = served
    for strange in range(3):
        peer = await Peer.connect(address)
        peer.writer.write(wire.encode_control({"t": "X", "x": bytes(1 << 19)}))
        assert "at most 65536" in (await peer.hear())["text"]
        assert await peer.ended()
        assert end.refused == strange + 1
    async with Host.attached(address, PLAN) as host:  # and a host then
        host.control.say("PING", x=bytes(1 << 19))
        assert (await host.control.hear())["t"] == "PONG"


# --- HELLO


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"v": [4, 5]}, "speaks protocol 3, the host (duck 0.0.0 (test)) speaks 4..5: install the"),
        ({"v": [2, 2]}, "speaks protocol 3, the host (duck 0.0.0 (test)) speaks 2..2: install the"),
        ({"v": [0, 0]}, "speaks 0..0"),
        ({"v": [3, 1]}, "speaks 3..1"),
        ({"v": [1]}, "[lowest, highest]"),
        ({"v": ["1", "1"]}, "[lowest, highest]"),
        ({"v": 1}, "field 'v' is int"),
        ({"software": None}, "field 'software'"),
        ({"software": "\x1b[2Jevil\n", "v": [9, 9]}, "the host ( [2Jevil )"),
        ({"plan": [1]}, "field 'plan' is list"),
        ({"plan": {}}, "plan: field"),
        ({"plan": {**PLAN.to_wire(), "hidden": -1}}, "hidden is -1"),
        ({"plan": {**PLAN.to_wire(), "ask_dtype": "x" * 50_000}}, "wire dtypes xxxx"),
        ({"plan_hash": "0" * 64}, "does not match its hash"),
        ({"plan_hash": None}, "does not match its hash"),
        ({"slice_hash": "0" * 64}, "another slice layout"),
        ({"patience": [30.0]}, "patience"),
        ({"patience": [-1, 0]}, "patience"),
        ({"patience": [float("nan"), 0]}, "patience"),
        ({"patience": None}, "patience"),
        ({"duck": 1}, "duck 1 of 1"),
        ({"duck": -1}, "duck -1 of 1"),
        ({"duck": True}, "field 'duck' is bool"),
        ({"session": 1 << 32}, "is no 32-bit number"),
        ({"session": -1}, "is no 32-bit number"),
        ({"session": True}, "field 'session' is bool"),
        ({"session": None}, "field 'session'"),
        ({"nonce": b"x" * 15}, "nonce of 15 bytes, want 16"),
        ({"nonce": "x" * 16}, "field 'nonce' is str"),
        ({"data": "pigeon"}, "this duck has no transport 'pigeon', it has tcp, shm"),
        ({"data": 7}, "field 'data' is int"),
        ({"plane": []}, "field 'plane' is list"),
        ({"plane": {"checksum": "sum"}}, "checksum 'sum', this duck has crc32, crc32c"),
        ({"plane": {"checksum": 3}}, "field 'checksum' is int"),
    ],
)
async def test_hello_that_is_refused(
    served: tuple[str, ListeningDuck], duck: FakeDuck, changes: dict[str, Any], told: str
) -> None:
    address, end = served
    peer = await Peer.connect(address)
    peer.say("HELLO", **{**hello(PLAN), **changes})
    answer = await peer.hear()
    assert answer["t"] == "ERR"
    assert told in answer["text"]
    assert len(answer["text"]) < 1001
    assert await peer.ended()
    assert not duck.attached
    assert not end._sessions


async def test_a_newer_host_that_still_speaks_our_version(
    served: tuple[str, ListeningDuck],
) -> None:
    peer = await Peer.connect(served[0])
    peer.say("HELLO", **hello(PLAN, v=[2, 7], more="fields that we do not know"))
    welcome = await peer.hear()
    assert (welcome["t"], welcome["v"]) == ("WELCOME", 3)
    peer.say("BYE")
    assert await peer.ended()


async def test_host_of_another_slice_while_one_is_served(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    async with Host.attached(address, PLAN) as first:
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(OTHER_SLICE))
        assert "serves another host with another slice" in (await peer.hear())["text"]
        # The same slice may be shared.
        async with Host.attached(address, PLAN) as second:
            assert first.session != second.session
            for host in (first, second):
                host.data.writer.write(host.ask())
                assert (await host.data.frame())[0].session == host.session
        first.control.say("BYE")
        assert await first.control.ended()
    await _until(lambda: not end._sessions)
    async with Host.attached(address, OTHER_SLICE):
        assert [plan for plan, _ in duck.attached][-1] == OTHER_SLICE


async def test_more_hosts_than_a_duck_serves(served: tuple[str, ListeningDuck]) -> None:
    address, end = served
    end.MAX_SESSIONS = 1
    async with Host.attached(address, PLAN):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        assert "already serves 1 hosts" in (await peer.hear())["text"]
    await _until(lambda: not end._sessions)


async def test_one_session_twice(served: tuple[str, ListeningDuck]) -> None:
    """Another host may not take over asks and answers of a session that lives."""
    address, _ = served
    async with Host.attached(address, PLAN) as host:
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN, session=host.session))
        assert "is its address given twice?" in (await peer.hear())["text"]
        host.data.writer.write(host.ask())
        assert (await host.data.frame())[0].session == host.session


async def test_a_silent_host_keeps_its_place_until_another_needs_it(
    served: tuple[str, ListeningDuck],
) -> None:
    address, end = served
    end.MAX_SESSIONS, end.SILENT_S = 2, 1000.0
    async with contextlib.AsyncExitStack() as stack:
        lively, silent = [
            await stack.enter_async_context(Host.attached(address, PLAN)) for _ in range(2)
        ]
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        assert "already serves 2 hosts" in (await peer.hear())["text"]
        # Both have been silent for longer now; the one that spoke last is spared.
        end.SILENT_S = 0.0
        before = end._sessions[lively.session].heard_at
        lively.control.say("PING")
        await _until(lambda: end._sessions[lively.session].heard_at > before)
        async with Host.attached(address, PLAN) as new:
            assert (await silent.control.hear())["text"].startswith("this host said nothing for")
            assert await silent.data.ended()
            assert set(end._sessions) == {lively.session, new.session}
            for host in (lively, new):
                host.data.writer.write(host.ask())
                assert (await host.data.frame())[0].session == host.session
    assert end.evicted == 1


async def test_an_evicted_host_is_told_why(
    served: tuple[str, ListeningDuck], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, end = served
    monkeypatch.setattr("duck.transports.control.LAST_WORDS_S", WAIT_S)
    end.MAX_SESSIONS, end.SILENT_S = 1, 0.0
    transport = TcpTransport([address])
    try:
        await transport.start(PLAN)
        async with Host.attached(address, PLAN):
            await _until(lambda: bool(transport.asks.lost))
        assert "another one needed its place" in transport.asks.lost[0]
    finally:
        await transport.close()


async def test_a_host_that_is_gone_without_a_word(served: tuple[str, ListeningDuck]) -> None:
    address, end = served
    async with Host.attached(address, PLAN):
        pass
    await _until(lambda: not end._sessions)
    async with Host.attached(address, OTHER_SLICE):
        pass
    await _until(lambda: not end._sessions)


# --- a real slice


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=0)


def _real_plan(source: ModelSource, ducks: int = 2, **changes: Any) -> Plan:
    config = source.config
    plan = plan_for(ducks, hidden=config.hidden_size)
    return Plan(
        **{
            "model": source.digest,
            "layers": config.moe_layers,
            "experts": config.n_routed_experts,
            "columns": CONFIG["moe_intermediate_size"],
            "slices": plan_slices(CONFIG["moe_intermediate_size"], ducks),
            "shape": plan.shape,
            **changes,
        }
    )


def plan_slices(columns: int, ducks: int) -> tuple[range, ...]:
    half = columns // ducks
    return tuple(range(duck * half, (duck + 1) * half) for duck in range(ducks))


async def test_a_duck_of_another_model(folder: Path) -> None:
    source = ModelSource(folder)
    async with listening(Node(source)) as (address, _):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(_real_plan(source, model="f" * 64)))
        text = (await peer.hear())["text"]
        assert f"this duck holds another model: its folder {folder.name}" in text
        assert "the host's model has ffffffffffff" in text
        for changes in ({"layers": (1,)}, {"experts": 15}):
            peer = await Peer.connect(address)
            peer.say("HELLO", **hello(_real_plan(source, **changes)))
            assert "the host's plan has sizes" in (await peer.hear())["text"]


async def test_a_slice_stays_when_its_host_goes(folder: Path) -> None:
    source = ModelSource(folder)
    async with listening(Node(source)) as (address, end):
        for duck, warm in ((0, False), (0, True), (1, False), (1, True), (0, False)):
            async with Host.attached(address, _real_plan(source), duck) as host:
                assert host.welcome["warm"] is warm
                assert host.welcome["resident_bytes"] > 0
            await _until(lambda: not end._sessions)


async def test_a_damaged_file_is_told_to_the_host(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(folder)

    def load(*_: Any) -> None:
        raise WeightsError("model.safetensors: tensor x is cut off")

    monkeypatch.setattr(source, "load", load)
    async with listening(Node(source)) as (address, end):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(_real_plan(source)))
        assert (await peer.hear())["text"] == "model.safetensors: tensor x is cut off"
        await _until(lambda: not end._sessions)
        monkeypatch.undo()  # the file is whole again
        async with Host.attached(address, _real_plan(source)) as host:
            assert host.welcome["warm"] is False


# --- loading


class SlowDuck(FakeDuck):
    """Loads until it is told that its disk is done."""

    def __init__(self) -> None:
        super().__init__(0)
        self.loading = asyncio.Event()
        self.disk = asyncio.Event()
        self.stopped = asyncio.Event()
        self.error: Exception | None = None
        self.loads = 0

    async def attach(
        self, plan: Plan, duck: int, progress: Callable[[int, int], None]
    ) -> Mapping[str, Any]:
        if not self.attached:
            self.loads += 1
            progress(3, 10)
            self.loading.set()
            try:
                await self.disk.wait()
            except asyncio.CancelledError:
                self.stopped.set()
                raise
            if self.error:
                raise self.error
        return await super().attach(plan, duck, progress)


async def test_long_loads_show_progress() -> None:
    slow = SlowDuck()
    seen = asyncio.Event()
    told: list[tuple[int, int, int]] = []

    def progress(*args: int) -> None:
        told.append(args)
        seen.set()

    async with listening(slow) as (address, _):
        transport = TcpTransport([address], None, progress)
        starting = asyncio.create_task(transport.start(PLAN))
        async with asyncio.timeout(WAIT_S):
            await seen.wait()
        assert set(told) == {(0, 3, 10)}
        slow.disk.set()
        await starting
        await transport.close()


async def test_two_hosts_load_one_slice_once() -> None:
    slow = SlowDuck()
    async with listening(slow) as (address, end):
        peers = [await Peer.connect(address) for _ in range(2)]
        for peer in peers:
            peer.say("HELLO", **hello(PLAN))
        await slow.loading.wait()
        await _until(lambda: len(end._sessions) == 2)
        slow.disk.set()
        assert [(await peer.hear())["warm"] for peer in peers] == [False, True]
        assert slow.loads == 1
        for peer in peers:
            peer.close()


async def test_who_waits_for_anothers_load_is_told_its_progress() -> None:
    """Else its host would think that it is stuck."""
    slow = SlowDuck()
    told: list[tuple[int, int, int]] = []

    async with listening(slow) as (address, _):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        await slow.loading.wait()
        transport = TcpTransport([address], None, lambda *args: told.append(args))
        starting = asyncio.create_task(transport.start(PLAN))
        await _until(lambda: bool(told))
        assert set(told) == {(0, 3, 10)}
        slow.disk.set()
        await starting
        await transport.close()
        peer.close()


async def test_a_host_that_goes_while_its_slice_is_loaded() -> None:
    slow = SlowDuck()
    async with listening(slow) as (address, end):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        await slow.loading.wait()
        peer.close()
        async with asyncio.timeout(WAIT_S):
            await slow.stopped.wait()
        slow.disk.set()
        await _until(lambda: not end._sessions)
        await _serves(address, OTHER_SLICE_OF_ONE)


OTHER_SLICE_OF_ONE = plan_for(1, model="another")


async def test_a_duck_that_stops_while_it_loads() -> None:
    slow = SlowDuck()
    async with listening(slow) as (address, _):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        await slow.loading.wait()
    assert slow.stopped.is_set()
    assert await peer.ended()


async def test_a_load_that_fails_in_the_turn_in_which_its_host_goes() -> None:
    """Nobody is left to be told; asyncio must not complain of it in the log."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))

    class Torn(FakeDuck):
        async def attach(self, plan: Plan, duck: int, progress: Any) -> Mapping[str, Any]:
            progress._link.abort("its host died")
            raise ConfigError("no room")

    async with listening(Torn(0)) as (address, end):
        peer = await Peer.connect(address)
        peer.say("HELLO", **hello(PLAN))
        assert await peer.ended()
        await _until(lambda: not end._sessions)
    gc.collect()
    assert not complaints


async def test_a_bug_while_loading_is_logged_and_the_host_let_go() -> None:
    slow = SlowDuck()
    slow.error = KeyError("a bug")
    with capture_logs() as logs:
        async with listening(slow) as (address, end):
            peer = await Peer.connect(address)
            peer.say("HELLO", **hello(PLAN))
            slow.disk.set()
            assert await peer.ended()
            await _until(lambda: not end._sessions)
            slow.error = None
            await _serves(address)
    (entry,) = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["event"] == "connection_failed"
    assert isinstance(entry["exc_info"], KeyError)


# --- DATA


async def test_data_connections_of_nobody(served: tuple[str, ListeningDuck]) -> None:
    address, _ = served
    async with Host.attached(address, PLAN) as host:
        for token in (
            b"",
            bytes(16),
            host.welcome["plane"]["token"][:-1],
            host.welcome["plane"]["token"],
        ):
            peer = await Peer.connect(address)
            peer.say("DATA", token=token)
            assert "unknown word, or one that was used" in (await peer.hear())["text"]
            assert await peer.ended()
        host.data.writer.write(host.ask())  # the rightful one still works
        await host.data.frame()


async def test_frames_ahead_of_the_switch(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    """A second connection may not smuggle bytes past the handshake."""
    address, _ = served
    control = await Peer.connect(address)
    control.say("HELLO", **hello(PLAN, session=1))
    token = (await control.hear())["plane"]["token"]
    host = Host(PLAN, control, control, 1, {})
    for ahead in (host.ask(), b"\1\2", wire.encode_control({"t": "PING"})):
        data = await Peer.connect(address)
        data.writer.write(wire.encode_control({"t": "DATA", "token": token}) + ahead)
        assert (await data.hear())["t"] == "ERR"
        assert await data.ended()
    # The session is still to be had.
    data = await Peer.connect(address)
    data.say("DATA", token=token)
    assert (await data.hear())["t"] == "OK"
    assert duck.begun.empty()
    control.close()


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD_FRAMES: dict[str, Callable[[Host], bytes]] = {
    "checksum": lambda host: _flip(host.ask(), 28),
    "payload": lambda host: _flip(host.ask(), 40),
    "ticket changed under way": lambda host: _flip(host.ask(), 8),
    "magic": lambda host: _flip(host.ask(), 0),
    "version": lambda host: _flip(host.ask(), 2),
    "session": lambda host: host.ask(session=host.session ^ 1),
    "source": lambda host: host.ask(source=0),
    "layer without experts": lambda host: host.ask(layer=10),
    "an answer": lambda host: host.ask(kind=wire.Kind.ANSWER),
    "an error": lambda host: host.ask(kind=wire.Kind.ERROR),
    "half a row": lambda host: host.ask(body=bytes(PLAN.shape.ask_bytes(1) - 1)),
    "17 rows": lambda host: host.ask(17),
    "no rows": lambda host: host.ask(body=b""),
    "4 GB": lambda host: host.ask(message_bytes=0xFFFFFFFF, fragments=4096),
    "expert 4 of 4": lambda host: host.ask(expert=4),
    "expert -1": lambda host: host.ask(expert=-1),
    "a fragment too many": lambda host: host.ask(fragments=2),
    "the second fragment": lambda host: host.ask(fragments=2, fragment=1),
    "an offset": lambda host: host.ask(offset=1),
    "CANCEL with a body": lambda host: host.ask(kind=wire.Kind.CANCEL),
}


@pytest.mark.parametrize("bad", BAD_FRAMES)
async def test_frames_that_no_host_may_send(
    served: tuple[str, ListeningDuck], duck: FakeDuck, bad: str
) -> None:
    address, end = served
    with capture_logs() as logs:
        async with Host.attached(address, PLAN) as host:
            host.data.writer.write(BAD_FRAMES[bad](host))
            assert await host.data.ended()
            await _until(lambda: end.refused == 1)
            # Another host is not disturbed, nor is the duck busy for ever.
            await _serves(address)
    assert duck.begun.qsize() == 1  # only the ask of `_serves`
    assert [entry["event"] for entry in logs] == ["refused"]


async def test_frames_of_two_asks_mixed() -> None:
    plan = plan_for(1, hidden=1 << 17, max_rows=4)  # an ask of four rows is two frames and a bit
    duck = FakeDuck(0)
    async with listening(duck) as (address, _):
        for second in ({"ticket": 2}, {"layer": 2}, {}):
            async with Host.attached(address, plan) as host:
                whole = host.ask(4)
                first = whole[: 32 + wire.FRAME_LIMIT]
                host.data.writer.write(first + host.ask(4, **second))
                assert await host.data.ended()
        async with Host.attached(address, plan) as host:
            host.data.writer.write(host.ask(4))
            assert (await host.data.frame())[0].fragments == 3
    assert duck.begun.qsize() == 1


# --- asks that wait


async def test_cancelled_asks_are_not_computed(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    duck.hold(1)
    async with Host.attached(address, PLAN) as host:
        host.data.writer.write(host.ask())
        assert await duck.begun.get() == 1
        host.data.writer.write(
            host.ask(layer=2, ticket=2) + host.ask(layer=3, ticket=3) + host.cancel(2)
        )
        session = host.session
        # Not how many: in between, when the third has not come yet, it is one as well.
        await _until(lambda: list(end._worker._asks) == [(session, 3)])
        duck.let_go()
        assert [(await host.data.frame())[0].ticket for _ in range(2)] == [1, 3]
        assert await duck.begun.get() == 3
        host.data.writer.write(host.cancel(1) + host.cancel(99))  # over, and never heard of
        host.data.writer.write(host.ask(ticket=4))
        assert (await host.data.frame())[0].ticket == 4


async def test_asks_of_two_hosts_for_one_layer_are_one_pass(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    duck.hold(1)
    async with Host.attached(address, PLAN) as one, Host.attached(address, PLAN) as other:
        one.data.writer.write(one.ask())
        assert await duck.begun.get() == 1
        one.data.writer.write(one.ask(2, layer=2, ticket=2))
        other.data.writer.write(other.ask(3, layer=2, ticket=7))
        for host in (one, other):
            session = host.session
            await _until(lambda session=session: end._worker.waiting(session)[0] == 1)
        duck.let_go()
        assert [(await one.data.frame())[0].ticket for _ in range(2)] == [1, 2]
        header, body = await other.data.frame()
        assert header.ticket == 7
        assert len(body) == wire.STAMP_BYTES + PLAN.shape.answer_bytes(3)
        assert [duck.begun.get_nowait()] == [2]
        assert duck.begun.empty()


async def test_asks_of_a_host_that_is_gone_are_not_computed(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    duck.hold(1)
    async with Host.attached(address, PLAN) as host:
        host.data.writer.write(host.ask(ticket=1))
        assert await duck.begun.get() == 1
        for ticket in (2, 3):
            host.data.writer.write(host.ask(ticket=ticket))
        session = host.session
        await _until(lambda: end._worker.waiting(session)[0] == 2)
    await _until(lambda: not end._sessions)
    assert end._worker.waiting(session) == (0, 0)
    duck.let_go()
    assert duck.begun.empty()


async def test_more_asks_than_a_host_may_have_waiting(
    served: tuple[str, ListeningDuck], duck: FakeDuck
) -> None:
    address, end = served
    duck.hold(1)
    async with Host.attached(address, PLAN) as host:
        host.data.writer.write(host.ask())
        await duck.begun.get()
        many = b"".join(host.ask(ticket=ticket, layer=2) for ticket in range(2, 66))
        # Cancelled ones do not count, however many there were.
        cancelled = b"".join(host.ask(ticket=70, layer=2) + host.cancel(70) for _ in range(100))
        host.data.writer.write(cancelled + many)
        session = host.session
        await _until(lambda: end._worker.waiting(session)[0] == 64)
        host.data.writer.write(host.ask(ticket=66))
        assert await host.data.ended()
    assert end.refused == 1


async def test_a_host_that_reads_no_answers_is_read_no_more(duck: FakeDuck) -> None:
    """Else its answers would fill the duck's memory."""
    plan = plan_for(1, hidden=1 << 16, max_rows=4)
    async with listening(duck) as (address, end), Host.attached(address, plan) as host:
        transport = host.data.reader._transport  # type: ignore[attr-defined]
        transport.pause_reading()
        ask = host.ask(4)
        stuck = asyncio.create_task(_write_on(host.data, ask))
        (session,) = end._sessions.values()
        duck_side = session.feed.link.transport  # type: ignore[attr-defined]
        # What it was given to compute is bounded, and so is what waits to be sent.
        await _until(lambda: not duck_side.is_reading())
        assert not stuck.done()
        waiting = end._worker.waiting(session.id)[1] + duck_side.get_write_buffer_size()
        assert waiting <= 70 * len(ask)
        stuck.cancel()
        transport.resume_reading()
        header, _ = await host.data.frame()
        assert header.kind == wire.Kind.ANSWER
        await _until(duck_side.is_reading)


async def _write_on(peer: Peer, data: bytes) -> None:
    while True:
        peer.writer.write(data)
        await peer.writer.drain()


async def test_a_worker_that_is_in_the_middle_of_an_ask_when_the_duck_stops() -> None:
    duck = FakeDuck(0)
    duck.hold(1)
    async with listening(duck) as (address, _), Host.attached(address, PLAN) as host:
        host.data.writer.write(host.ask())
        await duck.begun.get()
    duck.let_go()
    for thread in threading.enumerate():
        if thread.name == "experts":
            thread.join(WAIT_S)
            assert not thread.is_alive()


# --- addresses


async def test_a_port_in_use(served: tuple[str, ListeningDuck]) -> None:
    address, _ = served
    with pytest.raises(
        ConfigError, match=f"cannot listen on {address}: .*in use.*; choose another"
    ):
        await ListeningDuck(address, lambda _: None, [TcpDuckPlane()]).serve(FakeDuck(1))


async def test_an_address_of_another_machine() -> None:
    told = r"cannot listen on 192\.0\.2\.1:0: Cannot assign requested address; no interface"
    with pytest.raises(ConfigError, match=told):  # an address that RFC 5737 keeps for examples
        await ListeningDuck("192.0.2.1:0", lambda _: None, [TcpDuckPlane()]).serve(FakeDuck(0))


@pytest.mark.parametrize("host", ["[fe80::1%pond7]", "..", "x" * 300])
async def test_addresses_that_are_none(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        await ListeningDuck(f"{host}:0", lambda _: None, [TcpDuckPlane()]).serve(FakeDuck(0))


async def test_ipv6(duck: FakeDuck) -> None:
    try:
        async with listening(duck, "[::1]:0") as (address, _):
            assert address.startswith("[::1]:")
            await _serves(address)
    except ConfigError as error:
        pytest.skip(f"no IPv6 here: {error}")
