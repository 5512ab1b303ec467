"""A model, a device and ducks that take given times and compute next to nothing.

With them the real pipeline, flock and schedules run on any machine as if on the one whose times
they are given, so that overlap can be judged where cores are few. Every emulated stage keeps an
absolute deadline, from when it could start at the earliest, and sleeps in a thread: a late wake-up
is not carried on, and no event loop's timer is asked to be precise.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from duck import wire
from duck.device import Device, Later, Ran, Stage, now
from duck.model.cache import KVCache, PlainRows
from duck.model.router import Routed
from duck.placement import Plan, equal_slices
from duck.plan.closed import Times
from duck.session import Session
from duck.transports.base import Ask, AskTable, Rows

VOCABULARY = 1024
HIDDEN = 64
EXPERTS, TOP_K = 256, 8

Result = TypeVar("Result")


def plan_of(times: Times, ducks: int) -> Plan:
    """A plan for emulated ducks: the layers of `times` and one more, which drafts."""
    layers = tuple(range(times.dense_layers, times.dense_layers + times.moe_layers + 1))
    shape = wire.Shape(HIDDEN, TOP_K, "float32", "float32", 16)
    columns = 64 * ducks
    return Plan("emulated", layers, EXPERTS, columns, equal_slices(columns, ducks), shape)


class EmulatedDevice(Device):
    """The real device's worker and its order of work; a piece takes what `times` says.

    Args:
        times: of the stages.
        scale: how much longer everything takes.
    """

    def __init__(self, times: Times, scale: float) -> None:
        super().__init__("cpu", "float32")
        self._times, self._scale = times, scale
        self._free_at = 0.0

    async def run(self, stage: Stage, work: Callable[[], Later[Result]]) -> Ran[Result]:
        """Compute `work()` and wait until its time is over.

        What is told of when it ran is when it would have: from when it could start.
        """
        asked = time.perf_counter()

        def paced() -> Later[Ran[Result]]:
            start = max(asked, self._free_at)
            result = work().finish()
            end = self._free_at = max(start + self.seconds(stage), time.perf_counter())
            sleep_until(end)
            return now(Ran(result, start, end))

        ran = await super().run(stage, paced)
        done = ran.result
        return Ran(done.result, done.begun, done.ended, ran.late)

    def seconds(self, stage: Stage) -> float:
        """How long a piece of work takes."""
        times = self._times
        attend = times.attend_rows(stage.rows)
        ms = {
            "attend": attend,
            "feed": attend,
            "dense": attend + times.dense,
            "shared": times.shared,
            "combine": times.combine,
            "head": times.head + times.host,
            "guess": times.head + times.host,
        }
        return ms.get(stage.name, 0.0) * self._scale / 1e3


class EmulatedTransport:
    """A `transports.base.Transport` whose ducks are a schedule of deadlines kept by one thread.

    Asks and answers share their way with others of the same direction, and the ducks, all equally
    fast, answer in order. Every partial sum is zero.
    """

    def __init__(self, times: Times, scale: float) -> None:
        self._times, self._scale = times, scale
        self._table: AskTable | None = None
        self.attached: Sequence[Mapping[str, Any]] = ()
        self._out_free = self._ducks_free = self._back_free = 0.0
        self._due: list[tuple[float, int, Ask, float, float]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def _asks(self) -> AskTable:
        assert self._table is not None, "start() comes first"
        return self._table

    async def start(self, plan: Plan) -> None:
        """Nothing to gather."""
        self._loop = asyncio.get_running_loop()
        self._table = AskTable(plan, tuple(f"duck {number}" for number in range(plan.ducks)))
        self._all = range(plan.ducks)
        self._thread = threading.Thread(target=self._run, name="emulated ducks", daemon=True)
        self._thread.start()

    async def acquire(self, rows: int = 1) -> Rows:
        return await self._asks.ring.acquire(rows)

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
        """Work out when the answers come, and have the thread wait for it."""
        ask = self._asks.open(layer, len(x), ids, rows, deadline)
        times, count, scale = self._times, len(x), self._scale / 1e3
        self._out_free = max(ask.sent_at, self._out_free) + times.out_row * count * scale
        arrives = self._out_free + times.out_fixed * scale
        starts = max(arrives, self._ducks_free)
        self._ducks_free = starts + times.expert_rows(count) * scale
        self._back_free = max(self._ducks_free, self._back_free) + times.back_row * count * scale
        due = self._back_free + times.back_fixed * scale
        entry = due, ask.ticket, ask, starts - arrives, self._ducks_free - starts
        with self._changed:
            heapq.heappush(self._due, entry)
            self._changed.notify()
        return ask

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                # Answers come in the order of the asks, so nothing later can be due earlier.
                due, _, ask, queue_s, compute_s = heapq.heappop(self._due)
            sleep_until(due)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, ask, queue_s, compute_s)

    def _deliver(self, ask: Ask, queue_s: float, compute_s: float) -> None:
        asks = self._asks
        if ask.ticket not in asks.open_asks:
            asks.late_answers += 1
            return
        stamps = wire.pack_stamps(queue_s, compute_s)
        for place in ask.rows.landing:
            place[: wire.STAMP_BYTES] = stamps
        asks.arrived_whole(ask, self._all)

    def stats(self) -> Mapping[str, float]:
        return {"late_answers": self._asks.late_answers, "rows_free": self._asks.ring.free}

    async def close(self) -> None:
        """End the thread; may be called twice."""
        if self._table is None:
            return
        self._table.close()
        with self._changed:
            self._ended = True
            self._changed.notify()


def sleep_until(deadline: float) -> None:
    """Sleep until a moment of perf_counter's."""
    left = deadline - time.perf_counter()
    if left > 0:
        time.sleep(left)


# the model


class EmulatedModel:
    """As many layers as `times` has; a token decides the next one, and the draft mostly agrees."""

    def __init__(self, times: Times) -> None:
        count = times.dense_layers + times.moe_layers
        self.layers = [EmulatedLayer(n, n >= times.dense_layers) for n in range(count)]
        self.mtp = EmulatedMtp(EmulatedLayer(count, True), times.accept)

    def new_cache(self, capacity: int) -> KVCache:
        """Room for one number a layer, which nobody writes."""
        number = PlainRows(1, torch.float32, torch.float32)
        return KVCache(len(self.layers) + 1, number, capacity, device=torch.device("cpu"))

    def session(self) -> Session:
        """As if a prompt of one token had been run."""
        session = Session(cast(Any, self), 64, pairs=True)  # which asks us for a cache only
        session.tokens, session.length = [1], 1
        session.hidden = [self.embed([1])]
        return session

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Rows that hold their token; the second number is added to what is predicted."""
        x = torch.zeros(len(tokens), HIDDEN)
        x[:, 0] = torch.tensor(tokens, dtype=torch.float32)
        return x

    def final(self, x: Tensor) -> Tensor:
        return x

    def logits(self, h: Tensor) -> Tensor:
        """One token is certain. The generator visits every token once."""
        after = (h[:, 0].long() * 5 + 3 + h[:, 1].long()) % VOCABULARY
        return torch.nn.functional.one_hot(after, VOCABULARY).float()


@dataclass(frozen=True)
class EmulatedLayer:
    """A layer that lets its rows pass."""

    index: int
    is_moe: bool

    def attend(
        self, x: Tensor, cache: KVCache, position: int, *, last: int | None = None
    ) -> Tensor:
        assert cache.capacity >= position + len(x)
        return x if last is None else x[len(x) - last :]

    def dense(self, x: Tensor) -> Tensor:
        return x

    def route(self, x: Tensor) -> Routed:
        first = x[:, :1].int() % (EXPERTS // TOP_K) * TOP_K
        ids = first + torch.arange(TOP_K, dtype=torch.int32)
        return Routed(x, ids, torch.full((len(x), TOP_K), 1 / TOP_K))

    def shared(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    def merge(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        return x + shared + routed


@dataclass(frozen=True)
class EmulatedMtp:
    """Guesses the right token as often as told."""

    layer: EmulatedLayer
    accept: float

    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor:
        x = torch.zeros(len(tokens), HIDDEN)
        for row, token in enumerate(tokens):
            x[row, 0] = token
            x[row, 1] = float(token * 619 % VOCABULARY >= self.accept * VOCABULARY)
        return x

    def final(self, x: Tensor) -> Tensor:
        return x
