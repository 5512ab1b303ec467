"""After a loss: when the host tries again, what becomes of what the old session left, real nodes.

What every transport promises of it is in tests/contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import duck
from duck import wire
from duck.errors import DuckLost
from duck.flock import FlockAsk
from duck.keys import ClusterKey
from duck.transports.control import LONGEST_RETRY_S, RETRY_S, FlockTransport, retry_s
from duck.transports.listen import ListeningDuck
from duck.transports.shm import HostSlot
from duck.transports.tcp import TcpTransport
from duck.transports.tls import Credentials, Role
from duck.transports.trains import sealed
from tests.checkpoints import make_checkpoint
from tests.faults.processes import Marked, Run, linux_only, marked, start
from tests.flocks import KEY, WAIT_S, FakeDuck, FakeFlock, Multicast, listening, plan_for
from tests.virtual import run


async def _until(condition: Callable[[], object], pause_s: float = 0.001) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(pause_s)


async def _cut(transport: FlockTransport, duck: int) -> None:
    """End a duck's control connection, and see that it is noticed."""
    transport._control[duck].transport.abort()
    await _until(lambda: transport.asks.lost, 0)


# --- when


def test_the_waits_grow_to_a_limit() -> None:
    waits = [retry_s(tries, 1.0) for tries in range(1, 10)]
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]
    assert [retry_s(tries, 0.0) for tries in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert retry_s(10_000, 1.0) == LONGEST_RETRY_S
    assert min(retry_s(1, jitter / 10) for jitter in range(11)) == RETRY_S


class _Timed(TcpTransport):
    """Notes when it connects to a duck."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.times: list[float] = []

    async def connect(self, duck: int, *, control: bool = False) -> Any:
        if control:
            self.times.append(asyncio.get_running_loop().time())
        return await super().connect(duck, control=control)


def test_tries_on_a_clock_that_jumps() -> None:
    """Against a port without a listener, then with one again; then it begins anew."""

    async def main() -> None:
        loop, node = asyncio.get_running_loop(), FakeDuck(0)
        async with listening(node) as (address, _):
            transport = _Timed([address])
            await transport.start(plan_for(1))
            assert node.die
            node.die()
            await _until(lambda: transport.asks.lost, 0)
        lost_at, transport.times = loop.time(), []
        for count in range(9):  # each within the patience of `_until`
            await _until(lambda count=count: len(transport.times) > count, 0.01)
        waits = np.diff([lost_at, *transport.times])
        longest = np.array([retry_s(tries, 1.0) for tries in range(1, 10)])
        assert (waits <= longest + 0.02).all()
        assert (waits >= longest / 2 - 0.02).all()
        assert len(set(np.round(waits[5:], 3))) == 4  # not in step with others
        async with listening(node, address):
            await _until(lambda: not transport.asks.lost, 0.01)
            assert len(transport.times) == 10
            await _cut(transport, 0)
            again_at = loop.time()
            await _until(lambda: not transport.asks.lost, 0.01)
            assert transport.times[10] - again_at <= retry_s(1, 1.0) + 0.02
            await transport.close()

    run(main())


# --- what the old session left


@contextlib.asynccontextmanager
async def _multicast(
    key: ClusterKey | None,
) -> AsyncIterator[tuple[FakeFlock, FlockTransport, ListeningDuck]]:
    """Two ducks; the transport, and the first duck's end."""
    async with contextlib.AsyncExitStack() as stack:
        nodes = [FakeDuck(number) for number in range(2)]
        ends = [await stack.enter_async_context(listening(node, key=key)) for node in nodes]
        credentials = Credentials(key, Role.HOST) if key else None
        transport = Multicast([address for address, _ in ends], credentials=credentials)
        stack.push_async_callback(transport.close)
        plan = plan_for(2)
        await transport.start(plan)
        for node in nodes:
            stack.callback(node.let_go)
        yield FakeFlock(transport, nodes, plan, np.random.default_rng(0)), transport, ends[0][1]


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
async def test_answers_of_the_old_session_are_dropped_and_counted(key: ClusterKey | None) -> None:
    """From the right address, for a ticket that is open, sealed by the old session's keys."""
    async with _multicast(key) as (flock, transport, end):
        (old,) = [end._sessions[transport.session]]
        await _cut(transport, 0)
        first, _ = await flock.again(1)
        await first
        first.release()
        (new,) = end._sessions.values()
        flock.ducks[0].hold(2)
        ask, want = await flock.ask(2)
        await flock.begun(2)
        wrong = np.full((1, flock.plan.shape.hidden), 77, np.float32)
        body = wire.pack_stamps(0, 0) + wrong.tobytes()
        kind = wire.Kind.ANSWER
        message = sealed(old.feed._sealer, kind, old.id, ask.ticket, 2, body)
        late = wire.datagrams(kind, old.id, ask.ticket, 2, 0, message, 1440)
        before = transport.stats()["malformed"]
        new.feed._sockets[0].send(late, len(late), new.feed._where.host)
        await _until(lambda: transport.stats()["malformed"] > before)
        assert not ask.gather.has(0)
        flock.ducks[0].let_go()
        np.testing.assert_array_equal((await ask).partials(1), want)
        ask.release()


async def test_late_answers_are_counted_over_all_sessions() -> None:
    async with contextlib.AsyncExitStack() as stack:
        nodes = [FakeDuck(number) for number in range(2)]
        ends = [await stack.enter_async_context(listening(node)) for node in nodes]
        transport = TcpTransport([address for address, _ in ends])
        stack.push_async_callback(transport.close)
        plan = plan_for(2)
        await transport.start(plan)
        flock = FakeFlock(transport, nodes, plan, np.random.default_rng(0))
        nodes[0].hold(1)
        gone, _ = await flock.ask(1)
        await flock.begun(1)
        gone.cancel()
        nodes[0].let_go()
        ask, _ = await flock.ask(2)  # its answer comes after the late one
        await ask
        ask.release()
        late = transport.stats()["late_answers"]
        assert late >= 1
        await _cut(transport, 1)
        ask, want = await flock.again(3)
        np.testing.assert_array_equal((await ask).partials(1), want)
        ask.release()
        assert transport.sessions == 2
        assert transport.stats()["late_answers"] == late


# --- real nodes

PROMPT = [5, 6, 7]
ANSWER = duck.Sampling(max_tokens=12, ignore_eos=True)


def _node(processes: Marked, folder: Path, out: Path, listen: str, *more: str) -> tuple[Run, str]:
    words = ("node", "--listen", listen, "--model", folder, "--json", *more)
    node = start(processes, out, *words)
    line = json.loads(node.wait_for("\n", "stdout"))
    return node, line["address"]


async def _rest(answer: AsyncIterator[duck.Piece]) -> None:
    async for _ in answer:
        pass


@linux_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["tcp", "shm", "multicast"])
@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "keyed"])
async def test_an_engine_goes_on_when_its_duck_is_back(
    tmp_path: Path, transport: str, keyed: bool
) -> None:
    """Killed in the middle of an answer, and started again at its address; the same tokens."""
    folder = make_checkpoint(tmp_path / "model", seed=0)
    more: tuple[str, ...] = ()
    if keyed:
        ClusterKey.create(tmp_path / "key")
        more = ("--key-file", str(tmp_path / "key"))
    with marked() as processes:
        nodes = [
            _node(processes, folder, tmp_path / str(n), "127.0.0.1:0", *more) for n in range(2)
        ]
        addresses = [address for _, address in nodes]
        options = {"ducks": ",".join(addresses), "transport": transport}
        if keyed:
            options["key_file"] = str(tmp_path / "key")
        async with duck.Engine.open(folder, **options) as engine:
            want = (await engine.generate(PROMPT, ANSWER)).token_ids
            session = engine.session()
            answer = engine.stream(PROMPT, ANSWER, session=session)
            await anext(answer)
            os.kill(nodes[1][0].pid, signal.SIGKILL)
            with pytest.raises(DuckLost) as caught:
                await _rest(answer)
            assert caught.value.index == 1
            with pytest.raises(DuckLost, match="reconnecting"):
                await engine.generate(PROMPT, ANSWER)
            _node(processes, folder, tmp_path / "again", addresses[1], *more)
            async with asyncio.timeout(WAIT_S):
                while True:
                    try:
                        done = await engine.generate(PROMPT, ANSWER, session=session)
                        break
                    except DuckLost:
                        await asyncio.sleep(0.01)
            assert done.token_ids == want
            # And with what the session holds by now.
            again = await engine.generate([*PROMPT, *want], ANSWER, session=session)
            whole = await engine.generate([*PROMPT, *want], ANSWER)
            assert again.token_ids == whole.token_ids


@linux_only
@pytest.mark.timeout(600)
@pytest.mark.parametrize("schedule", ["serial", "wave"])
async def test_an_engine_goes_on_after_an_answer_that_was_damaged_once_it_had_come(
    tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shared memory it is noticed by whoever adds up, on the device's worker."""
    folder = make_checkpoint(tmp_path / "model", seed=0)
    options = {"ducks": "local:2", "transport": "shm", "schedule": schedule}
    arrived, damage = FlockAsk.arrived, asyncio.Event()
    place = (0, 0)  # layer and rows of the ask

    async def come(ask: FlockAsk) -> None:
        await arrived(ask)
        if damage.is_set() and (ask._ask.layer, ask._ask.count) == place:
            damage.clear()
            assert ask._rows is not None
            slot = ask._rows.unread
            assert isinstance(slot, HostSlot)
            slot.memory.raw[slot.place.answers + slot.place.stride + 70] ^= 1  # of duck 1

    monkeypatch.setattr(FlockAsk, "arrived", come)
    async with duck.Engine.open(folder, **options) as engine:
        transport = engine._pipeline._flock._transport
        free = transport.stats()["rows_free"]
        want = (await engine.generate(PROMPT, ANSWER)).token_ids
        # The prompt's, also where the sum goes to the norm; and a step's.
        for session, place in enumerate([(1, 3), (2, 3), (1, 1)], 2):
            damage.set()
            with pytest.raises(DuckLost) as caught:
                await engine.generate(PROMPT, ANSWER)
            assert re.fullmatch(
                rf"lost duck 1 \(.*\) at layer {place[0]} after waiting \d+ ms: "
                "an answer failed its checksum", str(caught.value),
            )  # fmt: skip
            assert not damage.is_set()
            assert transport.stats()["rows_free"] == free
            with pytest.raises(DuckLost, match="checksum; reconnecting"):
                await engine.generate(PROMPT, ANSWER)
            await _until(lambda: not transport.asks.lost)
            assert (await engine.generate(PROMPT, ANSWER)).token_ids == want
            assert transport.stats()["sessions"] == session
        assert transport.stats()["rows_free"] == free
