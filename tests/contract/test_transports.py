"""What every transport promises, in one suite: a transport is done when it is in MAKERS and green.

The promises are those of duck/transports/base.py.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from duck import wire
from duck.errors import (
    DuckError,
    DuckLost,
    TransportClosed,
    TransportError,
    WeightsError,
    WireError,
)
from duck.flock import Flock, FlockAsk
from duck.transports import listen
from duck.transports.base import SMALL_SETS, Rows, add_up
from duck.transports.control import FlockTransport
from tests.flocks import KEY, MAKERS, WAIT_S, FakeDuck, FakeFlock, fake_flock, listening

pytestmark = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture
async def flock(kind: str) -> AsyncIterator[FakeFlock]:
    """Three ducks; at the end every row set must be free again."""
    async with fake_flock(kind) as flock:
        free = flock.free
        yield flock
        for duck in flock.ducks:
            duck.let_go()
        assert flock.free == free


# --- answers


@pytest.mark.parametrize("ask_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("answer_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4, 5, 16])
async def test_rows_land_per_duck(kind: str, rows: int, ask_dtype: str, answer_dtype: str) -> None:
    async with fake_flock(kind, ask_dtype=ask_dtype, answer_dtype=answer_dtype) as flock:
        free = flock.free
        ask, want = await flock.ask(3, rows)
        landed = await ask
        np.testing.assert_array_equal(landed.partials(rows), want)
        ask.release()
        assert flock.free == free


@pytest.mark.parametrize("answer_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "hidden"), [(1, 7168), (4, 7168), (3, 5), (6, 7168)])
async def test_the_sum_is_that_of_the_partials(
    kind: str, rows: int, hidden: int, answer_dtype: str
) -> None:
    async with fake_flock(kind, hidden=hidden, answer_dtype=answer_dtype) as flock:
        ask, want = await flock.ask(3, rows)
        landed = await ask
        one_by_one = np.array(wire.to_float32(want[0]))
        for partial in want[1:]:
            one_by_one += wire.to_float32(partial)
        total, finite = landed.total(rows)
        np.testing.assert_array_equal(total, one_by_one)
        assert finite
        np.testing.assert_array_equal(landed.partials(rows), want)  # they can be had as well
        np.testing.assert_array_equal(landed.total(rows)[0], one_by_one)
        ask.release()


async def test_one_duck(kind: str) -> None:
    async with fake_flock(kind, ducks=1) as flock:
        ask, want = await flock.ask(0, 2)
        np.testing.assert_array_equal((await ask).partials(2), want)
        ask.release()


@pytest.mark.parametrize("ask_dtype", ["float32", "bfloat16"])
async def test_long_asks_of_several_frames(kind: str, ask_dtype: str) -> None:
    async with fake_flock(kind, hidden=2050, max_rows=256, ask_dtype=ask_dtype) as flock:
        asks = [await flock.ask(layer, rows) for layer, rows in ((1, 256), (2, 1), (3, 255))]
        for (ask, want), rows in zip(asks, (256, 1, 255), strict=True):
            np.testing.assert_array_equal((await ask).partials(rows), want)
            ask.release()


async def test_an_ask_of_a_whole_prompt(kind: str) -> None:
    """Real widths: 4.7 MB to every duck and back from each."""
    shape = {"hidden": 7168, "max_rows": 328, "ask_dtype": "bfloat16", "answer_dtype": "bfloat16"}
    async with fake_flock(kind, ducks=2, **shape) as flock:
        for rows in (328, 1, 327):
            ask, want = await flock.ask(3, rows)
            np.testing.assert_array_equal((await ask).partials(rows), want)
            ask.release()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_summed_in_duck_order_whoever_is_first(
    kind: str, order: tuple[int, ...], flock: FakeFlock
) -> None:
    # In float32 (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order of the sum shows.
    parts = (1e8, 1.0, -1e8)
    for duck, part in zip(flock.ducks, parts, strict=True):
        duck.partial = lambda _layer, x, part=part: np.full_like(x, part)
        duck.hold(1)
    x, ids, weights = flock.inputs(1)
    ask = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
    total = asyncio.create_task(ask.sum())
    await flock.begun(1)
    for number in order:
        flock.ducks[number].let_go()
    want = np.float32(np.float32(1e8) + np.float32(1)) + np.float32(-1e8)
    np.testing.assert_array_equal(await total, np.full((1, 8), want))
    assert want == 0


@pytest.mark.parametrize("answer_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((1, np.nan, 2), "layer 1 do not add up to numbers: not finite from duck 1$"),
        ((np.inf, 1, -np.inf), "not finite from duck 0, 2$"),
        ((3e38, 3e38, 1), "the sum overflows$"),
    ],
)
async def test_sums_that_are_no_numbers(
    kind: str, answer_dtype: str, parts: tuple[float, ...], told: str
) -> None:
    async with fake_flock(kind, answer_dtype=answer_dtype) as flock:
        free = flock.free
        for duck, part in zip(flock.ducks, parts, strict=True):
            duck.partial = lambda _layer, x, part=part: np.full_like(x, part)
        x, ids, weights = flock.inputs(1)
        ask = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
        with pytest.raises(WireError, match=told):
            await ask.sum()
        assert flock.free == free


async def test_rows_that_were_no_numbers_on_the_host(kind: str) -> None:
    """No duck is to blame."""
    async with fake_flock(kind) as flock:
        x, ids, weights = flock.inputs(1)
        x[0, 3] = np.nan
        ask = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
        with pytest.raises(WeightsError, match="layer 1 were no numbers before any duck had them"):
            await ask.sum()


class _Counted(Coroutine[Any, Any, Any]):
    """A coroutine that counts how often it is run on."""

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self.inner, self.runs = inner, 0

    def send(self, value: Any) -> Any:
        self.runs += 1
        return self.inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self.inner.throw(*error)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()


async def test_the_waiter_wakes_once(flock: FakeFlock) -> None:
    """However many ducks answer, in however many pieces."""
    for duck in flock.ducks:
        duck.hold(1)
    ask, _ = await flock.ask(1, 16)

    async def wait() -> None:
        await ask

    counted = _Counted(wait())
    waiting = asyncio.create_task(counted)
    await flock.begun(1)
    for duck in flock.ducks:
        duck.let_go()
    await waiting
    assert counted.runs == 2  # until the wait, and after it
    ask.release()


async def test_asks_may_be_awaited_in_any_order(flock: FakeFlock) -> None:
    asks = [await flock.ask(layer, 2) for layer in range(6)]
    for ask, want in reversed(asks):
        np.testing.assert_array_equal((await ask).partials(2), want)
        ask.release()


async def test_many_tasks_at_once(flock: FakeFlock) -> None:
    async def lane(number: int) -> None:
        for turn in range(12):
            rows = (number + turn) % 6 + 1  # small and large sets
            ask, want = await flock.ask((number + turn) % 10, rows)
            np.testing.assert_array_equal((await ask).partials(rows), want)
            ask.release()

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as lanes:
        for number in range(12):
            lanes.create_task(lane(number))


async def test_the_callers_arrays_are_free_at_once(flock: FakeFlock) -> None:
    for duck in flock.ducks:
        duck.hold(1)
    x, ids, weights = flock.inputs(2)
    want = np.stack([duck.partial(1, x) for duck in flock.ducks])
    rows = await flock.transport.acquire(2)
    ask = flock.transport.ask(1, x, ids, weights, rows, deadline=_soon())
    x[:], ids[:], weights[:] = 0, 0, 0
    for duck in flock.ducks:
        duck.let_go()
    np.testing.assert_array_equal((await ask).partials(2), want)
    ask.release()


async def test_ducks_report_how_long_they_took(flock: FakeFlock) -> None:
    first, _ = await flock.ask(1)
    await first
    for duck in range(3):
        queue_us, compute_us = first.rows.stamps()[duck]
        assert queue_us + compute_us <= first.waited_ms * 1e3 + 1
    first.release()


# --- cancelling


async def test_cancel_frees_the_rows_and_late_answers_land_nowhere(
    kind: str, flock: FakeFlock
) -> None:
    free = flock.free
    for duck in flock.ducks:
        duck.hold(1)
    cancelled, _ = await flock.ask(1, 2)
    await flock.begun(1)
    cancelled.cancel()
    assert flock.free == free
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    # The same rows serve the next asks; the cancelled one's answers come before theirs.
    asks = [await flock.ask(layer, 2) for layer in range(2, 2 + SMALL_SETS)]
    assert cancelled.rows in [ask.rows for ask, _ in asks]
    for duck in flock.ducks:
        duck.let_go()
    for ask, want in asks:
        np.testing.assert_array_equal((await ask).partials(2), want)
    late = flock.transport.stats()["late_answers"]
    # What a bad network loses of them nobody asks for again.
    assert late == 3 or (kind.startswith("multicast") and kind.endswith("faulty") and late < 3)
    for ask, _ in asks:
        ask.release()


async def test_cancel_twice_and_after_the_end(flock: FakeFlock) -> None:
    free = flock.free
    ask, _ = await flock.ask(1)
    await ask
    ask.release()
    ask.cancel()
    ask.release()
    assert flock.free == free
    ask, _ = await flock.ask(1)
    ask.cancel()
    ask.cancel()
    assert flock.free == free


async def test_cancelled_after_the_last_answer_and_before_the_wake_up(flock: FakeFlock) -> None:
    """The one turn of the loop in which an ask is complete and its waiter has not run yet."""
    free = flock.free
    flock.ducks[1].hold(1)
    x, ids, weights = flock.inputs(1)
    ask: FlockAsk = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
    waiting = asyncio.create_task(ask.sum())
    # Registered before the task waits, so called before it is woken.
    ask._ask._future.add_done_callback(lambda _: waiting.cancel())
    await flock.begun(1)
    flock.ducks[1].let_go()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert flock.free == free


async def test_cancelled_while_waiting_for_the_sum(flock: FakeFlock) -> None:
    free = flock.free
    flock.ducks[1].hold(1)
    x, ids, weights = flock.inputs(1)
    ask = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
    waiting = asyncio.create_task(ask.sum())
    await flock.begun(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert flock.free == free


async def test_who_reads_too_late_hurts_nobody(flock: FakeFlock) -> None:
    """The rows serve another ask by then, which is still in flight."""
    x, ids, weights = flock.inputs(1)
    ask: FlockAsk = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
    await ask.arrived()
    rows = ask._rows
    ask.close()
    for duck in flock.ducks:
        duck.hold(2)
    others = [await flock.ask(2) for _ in range(SMALL_SETS)]
    assert rows in [other.rows for other, _ in others]
    for read in (ask.total, ask.pinned):
        with pytest.raises(TransportClosed):
            read()
    for duck in flock.ducks:
        duck.let_go()
    for other, want in others:
        np.testing.assert_array_equal((await other).partials(1), want)
        other.release()


async def test_rows_are_not_given_back_while_they_are_added_up(
    flock: FakeFlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids, weights = flock.inputs(1)
    ask: FlockAsk = await Flock(flock.transport, flock.plan).ask(1, x, ids, weights)
    await ask.arrived()
    closing, given_back = threading.Thread(target=ask.close), []

    def total(rows: Rows, count: int) -> tuple[np.ndarray, bool]:
        closing.start()
        closing.join(0.05)  # it cannot end; if it could, it would be quick
        given_back.append(not rows.in_use)
        return add_up(rows.partials(count))

    monkeypatch.setattr(Rows, "total", total)
    ask.total()
    closing.join()
    assert ask._rows is not None
    assert [*given_back, not ask._rows.in_use] == [False, True]


# --- backpressure


@pytest.mark.parametrize("rows", [1, 16])
async def test_acquire_waits_while_all_sets_are_in_use(flock: FakeFlock, rows: int) -> None:
    taken = []
    while True:
        waiting = asyncio.create_task(flock.transport.acquire(rows))
        await asyncio.sleep(0)
        if not waiting.done():
            break
        taken.append(waiting.result())
    assert len(taken) >= 2
    second = asyncio.create_task(flock.transport.acquire(rows))
    x, ids, weights = flock.inputs(rows)
    for expected in (waiting, second):  # first come, first served
        ask = flock.transport.ask(1, x, ids, weights, taken.pop(), deadline=_soon())
        await ask
        ask.release()
        async with asyncio.timeout(WAIT_S):
            taken.append(await expected)
    for held in taken:
        flock.transport.ask(1, x, ids, weights, held, deadline=_soon()).cancel()


async def test_a_cancelled_waiter_keeps_no_set(flock: FakeFlock) -> None:
    asks = [(await flock.ask(1))[0] for _ in range(SMALL_SETS)]
    gone, late, patient = (
        asyncio.create_task(flock.transport.acquire(1), name=name) for name in ("a", "b", "c")
    )
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait(_waiters(asks))
    asks[0].release()
    late.cancel()  # it was handed the set in this very turn
    rows = await patient
    assert gone.cancelled()
    assert late.cancelled()
    x, ids, weights = flock.inputs(1)
    flock.transport.ask(1, x, ids, weights, rows, deadline=_soon()).cancel()
    for ask in asks[1:]:
        ask.release()


def _waiters(asks: list[Any]) -> list[asyncio.Task[Any]]:
    async def wait(ask: Any) -> None:
        await ask

    return [asyncio.create_task(wait(ask)) for ask in asks]


async def test_more_rows_than_the_plan_allows(flock: FakeFlock) -> None:
    with pytest.raises(TransportError, match="17 rows, the plan allows 16"):
        await flock.transport.acquire(17)


# --- losses


async def test_deadline(flock: FakeFlock) -> None:
    flock.ducks[1].hold(4)
    ask, _ = await flock.ask(4, 2)
    other, _ = await flock.ask(4, 2)  # the same duck owes this one too: it must not wait on
    await _until(lambda: ask.gather.missing == (1,))  # the others may be slow
    ask.deadline = asyncio.get_running_loop().time()
    for late in (ask, other):
        with pytest.raises(DuckLost) as caught:
            await late
        lost = caught.value
        assert (lost.index, lost.layer) == (1, 4)
        assert lost.duck.startswith("duck 1 (")
        assert lost.waited_ms > 0
        assert lost.reason == "no answer before the deadline"
    with pytest.raises(DuckLost):
        await flock.ask(5)


@pytest.mark.parametrize("error", [DuckError("the slice is damaged"), ValueError("a bug")])
async def test_a_duck_that_cannot_answer(flock: FakeFlock, error: Exception) -> None:
    def fail(layer: int, x: np.ndarray) -> np.ndarray:
        raise error

    ask, _ = await flock.ask(2)
    await ask
    ask.release()
    flock.ducks[2].partial, before = fail, flock.ducks[2].partial
    with capture_logs() as logs:
        x, ids, weights = flock.inputs(1)
        rows = await flock.transport.acquire(1)
        ask = flock.transport.ask(7, x, ids, weights, rows, deadline=_soon())
        with pytest.raises(DuckLost, match=str(error)) as caught:
            await ask
    assert (caught.value.index, caught.value.layer) == (2, 7)
    if not isinstance(error, DuckError):  # nobody expected it: the duck says where it came from
        assert any(entry["log_level"] == "error" and entry.get("exc_info") for entry in logs)
    # From now on every ask is refused at once, although the duck could answer again.
    flock.ducks[2].partial = before
    with pytest.raises(DuckLost, match=str(error)) as caught:
        await flock.ask(8)
    assert (caught.value.index, caught.value.layer) == (2, 8)
    assert caught.value.waited_ms == 0


async def test_ids_that_no_duck_has(flock: FakeFlock) -> None:
    """Refused before anything is sent: the rows are free, the flock is whole."""
    x, ids, weights = flock.inputs(1)
    for wrong in (-1, 4):
        ids[0, 1] = wrong
        rows = await flock.transport.acquire(1)
        with pytest.raises(WireError, match=r"want 0\.\.3"):
            flock.transport.ask(1, x, ids, weights, rows, deadline=_soon())
    ask, want = await flock.ask(1)
    np.testing.assert_array_equal((await ask).partials(1), want)
    ask.release()


async def test_a_duck_that_dies(flock: FakeFlock) -> None:
    if flock.ducks[1].die is None:
        pytest.skip("a duck inside the host cannot die alone")
    flock.ducks[1].hold(4)
    ask, _ = await flock.ask(4, 2)
    await _until(lambda: ask.gather.missing == (1,))  # the others may be slow
    flock.ducks[1].die()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(DuckLost) as caught:
            await ask
    assert (caught.value.index, caught.value.layer) == (1, 4)
    with pytest.raises(DuckLost):
        await flock.ask(5)


async def test_ducks_of_another_version(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.startswith("loopback"):
        pytest.skip("a duck inside the host has its version")
    monkeypatch.setattr(listen, "PROTOCOL", (90, 99))
    with pytest.raises(WireError, match=r"duck \d .*speaks protocol .*install the same version"):
        async with fake_flock(kind):
            pass


# --- coming back


@pytest.fixture
def remote(kind: str, flock: FakeFlock) -> FlockTransport:
    """The flock's transport, whose ducks are behind connections."""
    if not isinstance(flock.transport, FlockTransport):
        pytest.skip("a duck inside the host has no connection to lose")
    return flock.transport


async def _lose(flock: FakeFlock, cut: Callable[[], object]) -> None:
    """Cut while three asks fly: one that all owe, one that only the lost duck owes, one it has
    answered.
    """
    flock.ducks[0].hold(3)
    flock.ducks[1].hold(2)
    asks = [(await flock.ask(3))[0]]
    await _until(lambda: asks[0].gather.missing == (0,))  # the others may be slow
    asks += [(await flock.ask(2, rows))[0] for rows in (1, 16)]
    waiters = _waiters(asks)
    cut()
    async with asyncio.timeout(WAIT_S):
        for waiter in waiters:
            with pytest.raises(DuckLost) as caught:
                await waiter
            assert caught.value.index == 1
    for duck in flock.ducks:
        duck.let_go()


async def _works_as_before(flock: FakeFlock) -> None:
    first, want = await flock.again(4, 2)
    np.testing.assert_array_equal((await first).partials(2), want)
    first.release()
    for layer, rows in ((2, 1), (3, 16), (4, 4)) * 2:
        ask, want = await flock.ask(layer, rows)
        np.testing.assert_array_equal((await ask).partials(rows), want)
        ask.release()


async def test_a_lost_connection_is_made_again(flock: FakeFlock, remote: FlockTransport) -> None:
    before, nonce, keys = remote.session, remote.nonce, remote.keys
    await _lose(flock, lambda: remote._control[1].transport.abort())
    with pytest.raises(DuckLost, match="connection closed; reconnecting") as caught:
        await flock.ask(5)
    assert (caught.value.index, caught.value.layer, caught.value.waited_ms) == (1, 5, 0)
    await _works_as_before(flock)
    assert remote.session != before
    assert remote.nonce != nonce
    assert keys is None or remote.keys is not keys
    assert flock.transport.stats()["sessions"] == 2
    # As often as it takes, and every duck keeps what it holds.
    await _lose(flock, lambda: remote._control[1].transport.abort())
    await _works_as_before(flock)
    assert flock.transport.stats()["sessions"] == 3
    assert [facts["warm"] for facts in remote.attached] == [True] * 3


async def test_a_duck_that_starts_again_at_its_address(
    kind: str, flock: FakeFlock, remote: FlockTransport
) -> None:
    key = KEY if "key" in kind else None
    assert flock.ducks[1].die
    await _lose(flock, flock.ducks[1].die)
    await _until(lambda: "failed: cannot reach duck 1" in remote.asks.hope)
    with pytest.raises(DuckLost, match=r"reconnecting, try \d+ failed: cannot reach duck 1"):
        await flock.ask(5)
    async with listening(flock.ducks[1], remote.addresses[1], key=key):
        await _works_as_before(flock)
        await remote.close()


async def test_another_duck_at_its_address(
    kind: str, flock: FakeFlock, remote: FlockTransport
) -> None:
    """The plan is agreed on anew: what refuses it is not taken for the duck that was lost."""
    key = KEY if "key" in kind else None
    assert flock.ducks[1].die
    await _lose(flock, flock.ducks[1].die)

    async def refuse(*_: Any) -> dict[str, Any]:
        raise DuckError("this is another model")

    other = FakeDuck(1)
    other.attach = refuse  # type: ignore[method-assign]
    async with listening(other, remote.addresses[1], key=key):
        await _until(lambda: "this is another model" in remote.asks.hope)
        with pytest.raises(DuckLost, match=r"reconnecting, try .* this is another model"):
            await flock.ask(5)


async def test_close_while_it_reconnects(flock: FakeFlock, remote: FlockTransport) -> None:
    tasks = asyncio.all_tasks()
    assert flock.ducks[1].die
    await _lose(flock, flock.ducks[1].die)
    await _until(lambda: remote.sessions == 2, 0)
    await asyncio.gather(remote.close(), remote.close())
    with pytest.raises(TransportClosed):
        await flock.ask(5)
    # The ducks' tasks for the connections that were begun end once those are seen to be closed.
    await _until(lambda: asyncio.all_tasks() <= tasks)


async def test_only_a_process_that_lives_is_waited_for(
    flock: FakeFlock, remote: FlockTransport
) -> None:
    remote._ended = lambda duck: duck == 1
    assert flock.ducks[1].die
    flock.ducks[1].hold(2)
    ask, _ = await flock.ask(2)
    flock.ducks[1].die()
    with pytest.raises(DuckLost):
        await ask
    with pytest.raises(DuckLost, match=r"connection [^;]*$"):
        await flock.ask(5)
    assert remote._mending is None


# --- closing


async def test_close_twice(flock: FakeFlock) -> None:
    await flock.transport.close()
    await flock.transport.close()
    with pytest.raises(TransportClosed):
        await flock.transport.acquire(1)


async def test_close_with_asks_in_flight(flock: FakeFlock) -> None:
    for duck in flock.ducks:
        duck.hold(1)
    asks = [(await flock.ask(1, rows))[0] for rows in (1, 2, 16)]
    waiters = _waiters(asks)
    await flock.begun(1)
    await flock.transport.close()
    for waiter in waiters:
        with pytest.raises(TransportClosed, match="layer 1"):
            await waiter


async def test_close_wakes_who_waits_for_rows(flock: FakeFlock) -> None:
    held = [await flock.transport.acquire(1) for _ in range(SMALL_SETS)]
    waiting = asyncio.create_task(flock.transport.acquire(1))
    await asyncio.sleep(0)
    await flock.transport.close()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(TransportClosed):
            await waiting
    x, ids, weights = flock.inputs(1)
    for rows in held:
        with pytest.raises(TransportClosed):
            flock.transport.ask(1, x, ids, weights, rows, deadline=_soon())


async def test_close_before_start(kind: str) -> None:
    async with fake_flock(kind) as flock:
        fresh = type(flock.transport)(flock.ducks)  # type: ignore[call-arg]
        await fresh.close()


async def test_nothing_is_left_behind(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """No task outlives its transport, and the event loop had nothing to complain about."""
    before = asyncio.all_tasks()
    with caplog.at_level(logging.DEBUG, "asyncio"):
        async with fake_flock(kind) as flock:
            flock.ducks[0].hold(1)
            await flock.ask(1)
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def _until(condition: Callable[[], bool], pause_s: float = 0.001) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (it is not ours to make an event of)
            await asyncio.sleep(pause_s)


def _soon() -> float:
    return asyncio.get_running_loop().time() + WAIT_S
