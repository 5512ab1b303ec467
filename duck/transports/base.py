"""The contract between the Flock and whatever carries its asks, in words and in shared parts.

The promises of a Transport:

- `start` returns when every duck has said WELCOME to the same plan, and raises otherwise.
- `acquire` gives a free row set and waits while all are in use: that is the backpressure.
- `ask` sends one layer's rows to every duck before it returns; the caller's arrays are its own
  again. When it raises, the row set is free. Awaiting the Ask gives the row set, after a single
  wake-up: every duck's partial sums in `partials(rows)[duck]`, or their sum by `total(rows)`. Both
  are made of verified answers only. Answers in shared memory are verified not before that, as they
  are copied or added: `partials` and `total` then raise DuckLost for the one that is damaged.
- Asks may complete out of order. They are idempotent by (session, ticket).
- `Ask.cancel` stops waiting and frees the row set at once; late answers are counted and dropped,
  and can never land in rows that serve another ask. `Ask.release` gives the row set back after use.
- A wait ends: with the rows, with `DuckLost` (deadline passed, connection gone, no sign of life, or
  the duck says that it cannot answer), or with `TransportClosed`. After a duck is lost every
  further ask raises the same `DuckLost` at once. Transports over connections meanwhile try to
  begin a new session with all ducks, and once they have, asks work again; an ask never outlives
  its session, and nothing that belongs to an older one is ever taken for an answer.
- `close` may be called twice and with asks in flight, which then raise `TransportClosed`.

Transports import no torch, and know nothing of models: layers are numbers, rows are bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NoReturn, Protocol

import numpy as np

from duck import wire
from duck.errors import DuckError, DuckLost, TransportClosed, TransportError, WireError
from duck.gather import Gather
from duck.kernels import library
from duck.placement import Plan

# Row sets: decode asks (a few rows) take a small one from a ring, long asks a big one.
SMALL_ROWS = 4
SMALL_SETS = 8
LARGE_SETS = 2
_ALIGN = 64
_STAMPS = struct.Struct("<II")  # what there is in wire.STAMPS
_IDS = np.dtype(np.int32)
# A duck that shows signs of life may take this long for an ask, plus its share a row: a bound for
# what nothing else catches. Frozen and dead ducks are noticed within seconds. Ducks are told, and
# drop what is older.
ASK_S = 30.0
ASK_ROW_S = 0.5
# How often a transport looks at its ducks and its deadlines.
TICK_S = 0.25


# Makes memory of so many bytes, (bytes,) uint8; see `Rows`.
Pin = Callable[[int], np.ndarray]


class Unread(Protocol):
    """Answers that have come, and are neither copied nor verified yet.

    Its functions raise DuckLost for one that is damaged; in any thread, while the row set is not
    given back: from then on it may serve another ask, whose answers have not come.
    """

    def land(self) -> None:
        """Copy all of them, verified, into the row set."""
        ...

    def total(self) -> tuple[np.ndarray, bool]:
        """Add them up as they are verified; see `Rows.total`."""
        ...


class Rows:
    """One landing place per duck, preallocated: stamps, then that duck's partial sums.

    Every row starts on a 64-byte boundary; the 16 bytes of stamps lie just before it, so that an
    answer message is received in one stretch.

    Args:
        number: which row set of its flock this is; see `set_capacities`.
        pin: gives memory that a GPU reads by itself, zeroed, of so many bytes.
    """

    def __init__(
        self,
        ducks: int,
        shape: wire.Shape,
        capacity: int,
        number: int = 0,
        pin: Pin | None = None,
    ) -> None:
        self._shape = shape
        self.capacity, self.number = capacity, number
        self.pinned = pin is not None
        size = -(-shape.answer_bytes(capacity) // _ALIGN) * _ALIGN
        nbytes = ducks * (size + _ALIGN) + _ALIGN
        raw = np.zeros(nbytes, np.uint8) if pin is None else pin(nbytes)
        start = -raw.ctypes.data % _ALIGN
        self._memory = raw[start : start + ducks * (size + _ALIGN)].reshape(ducks, size + _ALIGN)
        first = _ALIGN - wire.STAMP_BYTES
        self._stamps = self._memory[:, first : first + _STAMPS.size]
        self._partials = self._view(1)
        self.landing = tuple(row.data[first:] for row in self._memory)
        # For native code: where the first landing place is, and how far apart they are. Before each
        # there is room for a frame's header, which may then come in the same stretch.
        self.address: int = self._memory.ctypes.data + first
        self.stride: int = self._memory.strides[0]
        self.in_use = False
        self.unread: Unread | None = None  # of the ask in flight, if its answers lie elsewhere

    def partials(self, rows: int) -> np.ndarray:
        """(ducks, rows, hidden) in the answer dtype (bfloat16 as uint16), a view.

        Raises:
            DuckLost: an answer is damaged, and it is noticed only now.
        """
        if self.unread:
            self.unread.land()
            self.unread = None
        if self._partials.shape[1] != rows:
            self._partials = self._view(rows)
        return self._partials

    def total(self, rows: int) -> tuple[np.ndarray, bool]:
        """(rows, hidden) float32: all partial sums added in duck order; is it finite?

        Raises:
            DuckLost: as `partials`.
        """
        return self.unread.total() if self.unread else add_up(self.partials(rows))

    def _view(self, rows: int) -> np.ndarray:
        stop = _ALIGN + self._shape.answer_bytes(rows)
        view = self._memory[:, _ALIGN:stop].view(wire.wire_array(self._shape.answer_dtype))
        return view.reshape(len(self._memory), rows, self._shape.hidden)

    def stamps(self) -> tuple[tuple[int, int], ...]:
        """(queue_us, compute_us) of each duck, as it reported them."""
        return tuple(_STAMPS.iter_unpack(self._stamps.tobytes()))


def add_up(partials: np.ndarray) -> tuple[np.ndarray, bool]:
    """(T, hidden) float32: partial sums (ducks, T, hidden) added in duck order; is it finite?"""
    if library.is_loaded():
        return library.sum_rows(partials)
    total: np.ndarray = np.array(wire.to_float32(partials[0]))
    with np.errstate(over="ignore", invalid="ignore"):
        for partial in partials[1:]:
            total += wire.to_float32(partial)
    return total, bool(np.isfinite(total).all())


def set_capacities(shape: wire.Shape) -> tuple[int, ...]:
    """How many rows each row set of a flock takes: the small sets, then the large ones."""
    small = min(SMALL_ROWS, shape.max_rows)
    large = LARGE_SETS if shape.max_rows > small else 0
    return (small,) * SMALL_SETS + (shape.max_rows,) * large


class RowRing:
    """The free row sets of one flock; `acquire` waits for one.

    pin: see `Rows`; for the small sets, which every step uses. Large ones are made late, in the
    event loop, where pinning so much would take too long.
    """

    def __init__(self, plan: Plan, pin: Pin | None = None) -> None:
        self._plan, self._pin = plan, pin
        capacities = set_capacities(plan.shape)
        self._small_rows = capacities[0]
        self._free_small = [self._make(number) for number in range(SMALL_SETS)]
        self._free_large: list[Rows] = []
        # Made when the first long ask needs one: decode-only hosts never pay for them.
        self._unmade = list(range(SMALL_SETS, len(capacities)))
        self._waiting: list[tuple[bool, asyncio.Future[Rows]]] = []
        self._closed = False

    async def acquire(self, rows: int) -> Rows:
        """A free set for an ask of `rows` rows, marked as in use.

        Raises:
            TransportError: more rows than the plan allows.
            TransportClosed: the ring is closed, or was while we waited.
        """
        if self._closed:
            raise TransportClosed("the transport is closed")
        if rows > self._plan.shape.max_rows:
            raise TransportError(
                f"ask of {rows} rows, the plan allows {self._plan.shape.max_rows}: send fewer"
            )
        large = rows > self._small_rows
        free = self._free_large if large else self._free_small
        if large and not free and self._unmade:
            free.append(self._make(self._unmade.pop()))
        if free:
            chosen = free.pop()
            chosen.in_use = True
            return chosen
        future: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._waiting.append((large, future))
        try:
            return await future
        except asyncio.CancelledError:
            # The set may have been handed over in the same turn that cancelled us: pass it on.
            if future.done() and not future.cancelled() and not future.exception():
                self.release(future.result())
            raise
        finally:
            self._waiting = [w for w in self._waiting if w[1] is not future]

    def _make(self, number: int) -> Rows:
        capacity = set_capacities(self._plan.shape)[number]
        pin = self._pin if capacity == self._small_rows else None
        return Rows(self._plan.ducks, self._plan.shape, capacity, number, pin)

    def release(self, rows: Rows) -> None:
        """Give a set back; the first matching waiter gets it."""
        assert rows.in_use
        large = rows.capacity > self._small_rows
        for wants_large, future in self._waiting:
            if wants_large == large and not future.done():
                future.set_result(rows)
                return
        rows.in_use = False
        (self._free_large if large else self._free_small).append(rows)

    def close(self) -> None:
        """End every wait for a set, now and later."""
        self._closed = True
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(TransportClosed("closed while an ask waited for rows"))

    @property
    def free(self) -> int:
        """How many sets are free or not made yet."""
        return len(self._free_small) + len(self._free_large) + len(self._unmade)


class Ask:
    """One request to all ducks in flight; awaiting it gives the row set.

    Made by `AskTable.open`.
    """

    __slots__ = (
        "_freed",
        "_future",
        "_table",
        "answer_bytes",
        "arrived_at",
        "count",
        "deadline",
        "done_at",
        "fragments",
        "gather",
        "layer",
        "rows",
        "sent_at",
        "ticket",
    )  # fmt: skip

    def __init__(
        self, table: AskTable, ticket: int, layer: int, count: int, rows: Rows, deadline: float
    ) -> None:
        self._table = table
        self.ticket, self.layer, self.count, self.rows = ticket, layer, count, rows
        self.deadline = deadline
        # Of each duck's message, without its header.
        self.answer_bytes = wire.STAMP_BYTES + count * table.row_bytes
        self.fragments = -(-self.answer_bytes // wire.FRAME_LIMIT)
        self.gather = Gather(table.ducks, self.fragments)
        self.sent_at = time.perf_counter()
        self.arrived_at = [0.0] * table.ducks  # when each duck's answer was whole
        self.done_at = 0.0
        self._future: asyncio.Future[Rows] = table.loop.create_future()
        self._freed = False

    def __await__(self) -> Generator[Any, None, Rows]:
        return self._future.__await__()

    @property
    def waited_ms(self) -> float:
        """Milliseconds since the ask was sent, until now or until it was complete."""
        return ((self.done_at or time.perf_counter()) - self.sent_at) * 1e3

    def cancel(self) -> None:
        """Stop waiting and free the rows, whatever became of the ask; once they are free: nothing.

        So it is right for whoever was told to stop while it waited: the last answer may have come
        in the same turn.
        """
        self._table.cancel(self)

    def release(self) -> None:
        """Give the rows back after use."""
        if not self._freed:
            self._freed = True
            self.rows.unread = None
            self._table.ring.release(self.rows)


class AskTable:
    """The asks in flight of one transport: who waits for what, and how each wait ends."""

    def __init__(self, plan: Plan, labels: tuple[str, ...], pin: Pin | None = None) -> None:
        self.plan, self.ducks = plan, plan.ducks
        self._experts = plan.experts
        self.row_bytes = plan.shape.answer_bytes(1)
        self.loop = asyncio.get_running_loop()
        self.ring = RowRing(plan, pin)
        self.labels = labels
        self.open_asks: dict[int, Ask] = {}
        self.lost: dict[int, str] = {}  # duck -> why
        self.hope = ""  # what is done about the loss, for whoever asks meanwhile
        self.closed = False
        self.late_answers = 0
        self.on_cancel: Callable[[Ask], None] | None = None
        # The ask is open no more, however it ended: nothing may be written to its rows from now on.
        self.on_end: Callable[[Ask], None] | None = None
        self.on_tick: Callable[[], None] | None = None
        self.on_lose: Callable[[], None] | None = None
        self._next = 1
        self._due = self.loop.time() + TICK_S
        self._timer = self.loop.call_at(self._due, self._tick)

    def open(self, layer: int, count: int, ids: np.ndarray, rows: Rows, deadline: float) -> Ask:
        """A new ask of `count` rows with the next ticket.

        Raises:
            DuckLost, TransportClosed, WireError: the flock cannot answer, or has no such experts;
            the rows are free again.
        """
        assert 1 <= count <= rows.capacity
        try:
            if self.closed or self.lost:
                self._refuse(layer)
            check_ids(ids, self._experts)
        except DuckError:
            self.ring.release(rows)
            raise
        ask = Ask(self, self._next, layer, count, rows, deadline)
        self._next = self._next % 0xFFFFFFFF + 1
        self.open_asks[ask.ticket] = ask
        return ask

    def _refuse(self, layer: int) -> NoReturn:
        if self.closed:
            raise TransportClosed("the transport is closed")
        duck, reason = next(iter(self.lost.items()))
        raise DuckLost(self.labels[duck], layer, 0.0, reason + self.hope, index=duck)

    def arrived(self, ask: Ask, duck: int, fragment: int, fragments: int) -> None:
        """A verified fragment lies in the row set; completes the ask when it was the last.

        Raises:
            WireError: it does not belong to this ask.
        """
        if ask.gather.note(duck, fragment, fragments) and ask.gather.has(duck):
            ask.arrived_at[duck] = now = time.perf_counter()
            if ask.gather.complete:
                self._complete(ask, now)

    def arrived_whole(
        self, ask: Ask, ducks: Collection[int], at: Iterable[float] | None = None
    ) -> None:
        """All of these ducks' verified answers lie in the row set, in however many fragments.

        ducks: each once. at: when each was there, in perf_counter's seconds; now if not given.
        """
        now, gather = time.perf_counter(), ask.gather
        if len(ducks) == self.ducks:
            gather.note_all()
        else:
            for duck in ducks:
                gather.note_whole(duck)
        for duck, when in zip(ducks, repeat(now) if at is None else at, strict=False):
            ask.arrived_at[duck] = when
        if gather.complete:
            self._complete(ask, now)

    def _end(self, ask: Ask) -> bool:
        """The ask is open no more; False if it was not."""
        if self.open_asks.pop(ask.ticket, None) is None:
            return False
        if self.on_end:
            self.on_end(ask)
        return True

    def _complete(self, ask: Ask, now: float) -> None:
        if self._end(ask):
            ask.done_at = now
            if not ask._future.done():
                ask._future.set_result(ask.rows)

    def cancel(self, ask: Ask) -> None:
        if self._end(ask):
            if self.on_cancel:
                self.on_cancel(ask)
            ask._future.cancel()
        ask.release()

    def fail(self, ask: Ask, error: TransportError) -> None:
        """End one ask with an error and free its rows."""
        if not self._end(ask):
            return
        if not ask._future.done():
            ask._future.set_exception(error)
            # The waiter may be cancelled before it looks: the error was then told to nobody, and
            # that is right.
            ask._future.exception()
        ask.release()

    def lose(self, duck: int, reason: str) -> None:
        """A duck is gone: every ask that it still owes ends with DuckLost."""
        if duck in self.lost or self.closed:
            return
        self.lost[duck] = reason
        for ask in tuple(self.open_asks.values()):
            if not ask.gather.has(duck):
                self._fail_by(ask, duck, reason)
        if self.on_lose:
            self.on_lose()

    def in_loop(self, call: Callable[[int], None], duck: int) -> None:
        """Call it from any thread: at once where the event loop runs, else as soon as it may."""
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self.loop:
            call(duck)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody asks any more
                self.loop.call_soon_threadsafe(call, duck)

    def loss(self, ask: Ask, duck: int, reason: str) -> DuckLost:
        """What ends an ask, or tells that its answers are damaged."""
        return DuckLost(self.labels[duck], ask.layer, ask.waited_ms, reason, index=duck)

    def _fail_by(self, ask: Ask, duck: int, reason: str) -> None:
        self.fail(ask, self.loss(ask, duck, reason))

    def fail_all(self) -> None:
        """The session ends by a loss: so do the asks that the lost duck had answered already."""
        duck, reason = next(iter(self.lost.items()))
        for ask in tuple(self.open_asks.values()):
            self._fail_by(ask, duck, reason)

    def reopen(self) -> None:
        """All ducks are back, in a new session."""
        assert not self.open_asks
        self.lost.clear()
        self.hope = ""

    def _tick(self) -> None:
        now = self.loop.time()
        if now - self._due > TICK_S:
            # It was us who were held up (suspended, or a long pause): no duck is to blame for it.
            for ask in self.open_asks.values():
                ask.deadline += now - self._due
        self._due = now + TICK_S
        self._timer = self.loop.call_at(self._due, self._tick)
        if self.on_tick:
            self.on_tick()
        self.expire(now)

    def expire(self, now: float) -> None:
        """Lose the ducks that owe an answer past its deadline (`now` on the loop's clock)."""
        for ask in tuple(self.open_asks.values()):
            if now >= ask.deadline and ask.ticket in self.open_asks:
                self.lose(ask.gather.missing[0], "no answer before the deadline")

    def close(self) -> None:
        """End every wait with TransportClosed; the second time nothing."""
        self.closed = True
        self._timer.cancel()
        for ask in tuple(self.open_asks.values()):
            self.fail(ask, TransportClosed(f"closed with an ask in flight at layer {ask.layer}"))
        self.ring.close()


class Transport(Protocol):
    """The host's end, one object for a whole flock.

    Its constructor takes `pin`, as `Rows` has it.
    """

    @property
    def attached(self) -> Sequence[Mapping[str, Any]]:
        """What each duck said when it attached: warm, and the bytes it holds, read, received."""
        ...

    async def start(self, plan: Plan) -> None: ...
    async def acquire(self, rows: int = 1) -> Rows: ...
    def ask(
        self,
        layer: int,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        rows: Rows,
        *,
        deadline: float,
    ) -> Ask:
        """Send rows to every duck.

        x: (T, hidden) in the ask's wire dtype; ids: (T, top_k) int32; weights: (T, top_k) float32;
        deadline: on the event loop's clock.
        """
        ...

    def stats(self) -> Mapping[str, float]: ...
    async def close(self) -> None: ...


class Loading(Protocol):
    """What a duck tells its host while it loads, and asks of it."""

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of the slice have come."""
        ...

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        """Have the host send a layer's file, from a byte on.

        take: gets the pieces in order, one after the other, each in a thread. Returns the sha256 of
        the whole file as the host made it, in hex.

        Raises:
            TransportError: the host is gone, or has nothing to send.
            WireError: it sent something else. And whatever `take` raises.
        """
        ...


class Handler(Protocol):
    """What a duck does with its bytes; the duck's end of a transport drives it."""

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        """Hold this plan's slice (loading it if need be); facts for WELCOME.

        Raises:
            DuckError: it cannot; the text travels to the host.
        """
        ...

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Partial sums (T, hidden) float32; blocking, called in a worker thread."""
        ...


class DuckEnd(Protocol):
    """The duck's end: listens and feeds asks to a handler until cancelled."""

    async def serve(self, handler: Handler) -> None: ...


def check_ids(ids: np.ndarray, experts: int) -> None:
    """Refuse expert ids that no slice has.

    Raises:
        WireError: an id outside 0..experts-1.
    """
    # A negative one is large without its sign: one look is enough. So few numbers are looked at
    # sooner like this than numpy finds out how to.
    plain = ids.dtype == _IDS and ids.size and ids.flags.c_contiguous
    if plain and max(ids.data.cast("B").cast("I")) < experts:
        return
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= experts):
        raise WireError(f"expert ids {int(ids.min())}..{int(ids.max())}, want 0..{experts - 1}")
