"""The parts all transports share: row sets, the ring that lends them, and the asks in flight."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from duck import wire
from duck.errors import DuckLost, TransportClosed, TransportError, WireError
from duck.transports import base
from duck.transports.base import Ask, AskTable, RowRing, Rows, check_ids
from tests.flocks import plan_for

LABELS = ("duck 0 (a)", "duck 1 (b)", "duck 2 (c)")
IDS = np.zeros((1, 2), np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_partials_are_aligned_and_lie_behind_the_stamps(dtype: str, rows: int) -> None:
    shape = wire.Shape(5, 2, "float32", dtype, 3)
    landing = Rows(2, shape, 3)
    want = np.arange(2 * rows * 5, dtype=np.float32).reshape(2, rows, 5)
    for duck in range(2):
        message = wire.pack_stamps(duck / 1e6, 7e-6) + wire.to_wire(want[duck], dtype).tobytes()
        landing.landing[duck][: len(message)] = message
    partials = landing.partials(rows)
    np.testing.assert_array_equal(wire.to_float32(partials), want)
    assert landing.stamps() == ((0, 7), (1, 7))
    assert all(partials[duck].ctypes.data % 64 == 0 for duck in range(2))


def test_partials_of_one_set_for_asks_of_many_sizes() -> None:
    landing = Rows(2, wire.Shape(5, 2, "float32", "float32", 3), 3)
    for rows in (1, 3, 1, 2):
        assert landing.partials(rows).shape == (2, rows, 5)
        landing.partials(rows)[1] = rows
        np.testing.assert_array_equal(landing.partials(3)[1, :rows], np.full((rows, 5), rows))


async def test_ring_makes_large_sets_when_they_are_asked_for() -> None:
    ring = RowRing(plan_for(2, max_rows=256))
    free = ring.free
    small, large = await ring.acquire(base.SMALL_ROWS), await ring.acquire(base.SMALL_ROWS + 1)
    assert (small.capacity, large.capacity) == (base.SMALL_ROWS, 256)
    assert ring.free == free - 2
    ring.release(large)
    assert await ring.acquire(256) is large  # not a new one
    for rows in (small, large):
        ring.release(rows)
    assert ring.free == free


async def test_ring_of_a_plan_with_short_asks_only() -> None:
    ring = RowRing(plan_for(2, max_rows=2))
    assert (await ring.acquire(2)).capacity == 2
    with pytest.raises(TransportError, match="3 rows, the plan allows 2"):
        await ring.acquire(3)


async def test_ring_lends_small_sets_to_short_asks_only() -> None:
    """A long ask that waits must not be given a small set, nor hold up the short ones."""
    ring = RowRing(plan_for(2, max_rows=256))
    large = [await ring.acquire(256) for _ in range(base.LARGE_SETS)]
    waiting = asyncio.create_task(ring.acquire(256))
    await asyncio.sleep(0)
    small = await ring.acquire(1)
    ring.release(small)
    await asyncio.sleep(0)
    assert not waiting.done()
    ring.release(large[0])
    assert await waiting is large[0]


def _open(table: AskTable, layer: int, rows: Rows, seconds: float = 100.0) -> Ask:
    return table.open(layer, 1, IDS, rows, asyncio.get_running_loop().time() + seconds)


async def test_duplicates_complete_nothing() -> None:
    table = AskTable(plan_for(3), LABELS)
    ask = _open(table, 1, await table.ring.acquire(1))
    for duck in (2, 2, 0, 0, 2):
        table.arrived(ask, duck, 0, 1)
    assert not ask._future.done()
    table.arrived(ask, 1, 0, 1)
    assert await ask is ask.rows
    assert not table.open_asks
    ask.release()
    table.close()


async def test_whole_answers_that_come_alone_and_together() -> None:
    """When each came is known of all of them; a second time changes nothing."""
    table = AskTable(plan_for(3), LABELS)
    alone, together = [_open(table, layer, await table.ring.acquire(1)) for layer in (1, 2)]
    table.arrived_whole(alone, (1,))
    first = list(alone.arrived_at)
    assert [at > 0 for at in first] == [False, True, False]
    table.arrived_whole(alone, (0, 2))
    assert alone.arrived_at[1] == first[1]
    assert min(alone.arrived_at) >= alone.sent_at
    assert alone.done_at == alone.arrived_at[0] == alone.arrived_at[2]
    table.arrived_whole(together, range(3))
    assert together.arrived_at == [together.done_at] * 3
    table.arrived_whole(together, range(3))
    for ask in (alone, together):
        assert await ask is ask.rows
        ask.release()
    table.close()


async def test_a_loss_ends_only_what_is_still_owed() -> None:
    table = AskTable(plan_for(3), LABELS)
    free = table.ring.free
    whole, owed = [_open(table, layer, await table.ring.acquire(1)) for layer in (1, 2)]
    table.arrived(whole, 1, 0, 1)
    table.lose(1, "gone")
    table.lose(1, "gone again")
    with pytest.raises(DuckLost, match=r"lost duck 1 \(b\) at layer 2 after waiting \d+ ms: gone$"):
        await owed
    table.arrived(whole, 0, 0, 1)
    table.arrived(whole, 2, 0, 1)
    assert await whole is whole.rows
    whole.release()
    with pytest.raises(DuckLost, match=r"at layer 3 after waiting 0 ms: gone$"):
        _open(table, 3, await table.ring.acquire(1))
    assert table.ring.free == free
    table.close()


async def test_deadlines() -> None:
    table = AskTable(plan_for(3), LABELS)
    now = asyncio.get_running_loop().time()
    ask = _open(table, 1, await table.ring.acquire(1), seconds=5)
    table.arrived(ask, 0, 0, 1)
    table.expire(now + 4.9)
    assert not ask._future.done()
    table.expire(now + 5.1)
    with pytest.raises(DuckLost, match=r"duck 1 \(b\) at layer 1.*no answer before the deadline"):
        await ask
    table.close()


async def test_a_host_that_was_held_up_blames_no_duck() -> None:
    """Suspended for an hour in the middle of an ask: the answers may lie in the socket."""
    table = AskTable(plan_for(3), LABELS)
    ask = _open(table, 1, await table.ring.acquire(1), seconds=-3600)
    table._due -= 3601
    table._tick()
    assert not ask._future.done()
    ask.deadline -= 3601
    table._tick()  # in time: now the deadline counts
    with pytest.raises(DuckLost):
        await ask
    table.close()


async def test_an_error_while_looking_at_ducks_does_not_end_the_looking() -> None:
    table = AskTable(plan_for(3), LABELS)
    told: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: told.append(context["exception"]))

    def look() -> None:
        raise ValueError("a bug")

    table.on_tick = look
    timer = table._timer
    loop.call_soon(table._tick)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(told[0], ValueError)
    assert table._timer is not timer
    table.close()


async def test_tickets_are_never_reused_while_they_fit() -> None:
    table = AskTable(plan_for(3), LABELS)
    table._next = 0xFFFFFFFE
    tickets = []
    for _ in range(4):
        ask = _open(table, 1, await table.ring.acquire(1))
        tickets.append(ask.ticket)
        ask.cancel()
    assert tickets == [0xFFFFFFFE, 0xFFFFFFFF, 1, 2]
    table.close()


async def test_a_closed_table() -> None:
    table = AskTable(plan_for(3), LABELS)
    rows = await table.ring.acquire(1)
    table.close()
    table.lose(1, "too late to matter")
    with pytest.raises(TransportClosed):
        _open(table, 1, rows)
    assert not rows.in_use


def test_check_ids() -> None:
    check_ids(np.zeros((0, 2), np.int32), 4)
    check_ids(np.array([[0, 3]], np.int32), 4)
    for wrong in (-1, 4):
        with pytest.raises(WireError):
            check_ids(np.array([[0, wrong]], np.int32), 4)
