"""A clock that jumps, and a device and ducks whose times are given: overlap as exact numbers.

`VirtualLoop` is asyncio's event loop with a selector that never sleeps: when nothing is ready, its
clock jumps to the next timer. Under it the real pipeline runs over an emulated model, device and
flock, so a step of 95 ms takes as long as its bookkeeping, and every time in it is exact.

The emulated model's next token is a fixed permutation of the last one, and its MTP layer guesses
right but for every eighth token; the device's order is the real one's.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from duck import wire
from duck.device import OVERTAKEN, Later, Ran, Stage
from duck.meter import Meter
from duck.model.cache import KVCache, PlainRows
from duck.model.router import Routed
from duck.pipeline import Pipeline
from duck.plan.closed import Times
from duck.sampling import Sampling
from duck.session import Session

Result = TypeVar("Result")

VOCABULARY = 64


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else can happen, and then all at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns = 0
        self.at_turn: dict[int, Callable[[], object]] = {}  # to happen in between two turns
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class _Jump(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        loop = self._loop
        loop.turns += 1
        if loop.turns in loop.at_turn:
            loop.at_turn.pop(loop.turns)()
            return []  # what it made ready comes first
        events = super().select(0)
        if not events:
            # Neither a timer nor anything ready: without help from outside nothing ever happens.
            assert timeout is not None, "all tasks wait, and nothing will wake them"
            loop.now += max(0.0, timeout)
        return events


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on a clock that starts at 0; no task may outlive it, and no error be lost."""
    lost: list[dict[str, Any]] = []

    async def alone() -> Result:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, what: lost.append(what))
        result = await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks outlive what started them: {left}"
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(alone())
    assert not lost, f"told to the loop, not to who waits: {lost}"
    return result


@dataclass(frozen=True)
class Did:
    """A piece of work of the device, or an ask (name "ask": sent to answered)."""

    name: str
    layer: int
    lane: int
    session: int
    rows: int
    start: float
    end: float


class VirtualDevice:
    """One piece of work at a time, in the real device's order, each as long as it is told."""

    def __init__(self, seconds: Callable[[Stage], float]) -> None:
        self.did: list[Did] = []
        self._seconds = seconds
        self._queue: list[tuple[int, int, Stage, Callable[[], Any], asyncio.Future[Any]]] = []
        self._number = itertools.count()
        self._busy = False

    async def run(self, stage: Stage, work: Callable[[], Later[Result]]) -> Ran[Result]:
        future: asyncio.Future[Ran[Result]] = asyncio.get_running_loop().create_future()
        number = next(self._number)
        turn = number + OVERTAKEN.get(stage.name, 0)
        heapq.heappush(self._queue, (turn, number, stage, work, future))
        self._serve()
        return await future

    def _serve(self) -> None:
        while self._queue and not self._busy:
            _, _, stage, work, future = heapq.heappop(self._queue)
            if not future.cancelled():
                self._busy = True
                loop = asyncio.get_running_loop()
                start = loop.time()
                end = start + self._seconds(stage)
                loop.call_at(end, self._finish, stage, work, future, start, end)

    def _finish(
        self,
        stage: Stage,
        work: Callable[[], Any],
        future: asyncio.Future[Any],
        start: float,
        end: float,
    ) -> None:
        self._busy = False
        result, error = None, None
        try:
            result = work().finish()  # also for whoever was cancelled: it had begun
        except Exception as raised:
            error = raised
        self.did.append(
            Did(stage.name, stage.layer, stage.lane, stage.session, stage.rows, start, end)
        )
        self._serve()
        if future.done():
            return
        if error is None:
            future.set_result(Ran(result, start, end))
        else:
            future.set_exception(error)

    @property
    def idle(self) -> bool:
        return not self._busy and not self._queue


class VirtualAsk:
    """Answered at a time that was known when it was sent."""

    def __init__(
        self, flock: VirtualFlock, rows: int, sent: float, done: float, stamp: tuple[int, int]
    ) -> None:
        self.rows = rows
        loop = asyncio.get_running_loop()
        self.sent_at, self.done_at = sent, done
        self.ducks_us, self.arrived_at = (stamp,) * flock.plan.ducks, (done,) * flock.plan.ducks
        self._flock, self._future = flock, loop.create_future()
        self._timer = loop.call_at(done, self._future.set_result, None)
        flock.open.add(self)

    async def arrived(self) -> None:
        await self._future

    def pinned(self) -> None:
        return None

    def total(self) -> np.ndarray:
        assert self in self._flock.open, "summed after it was closed"
        return np.zeros((self.rows, 1), np.float32)

    def close(self) -> None:
        self._timer.cancel()
        self._flock.open.discard(self)


class VirtualFlock:
    """All ducks as one, answering in order, behind a wire with two directions.

    Args:
        times: how long all takes.
        experts: milliseconds the ducks take, of (layer, rows), instead.
        late: seconds by which an answer is late, while others overtake it.
    """

    def __init__(
        self,
        times: Times,
        experts: Callable[[int, int], float] | None = None,
        late: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.open: set[VirtualAsk] = set()
        self.busy: list[tuple[float, float]] = []
        self.plan: Any = SimpleNamespace(
            ducks=32, shape=wire.Shape(1, 8, "float32", "float32", 256)
        )
        self._times = times
        self._experts = experts or (lambda _layer, rows: times.expert_rows(rows))
        self._late = late
        self._out_free = self._ducks_free = self._back_free = 0.0

    async def ask(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> VirtualAsk:
        times, rows, sent = self._times, len(ids), asyncio.get_running_loop().time()
        self._out_free = max(sent, self._out_free) + times.out_row * rows / 1e3
        there = self._out_free + times.out_fixed / 1e3
        start = max(there, self._ducks_free)
        self._ducks_free = start + self._experts(layer, rows) / 1e3
        self.busy.append((start, self._ducks_free))
        self._back_free = max(self._ducks_free, self._back_free) + times.back_row * rows / 1e3
        stamp = round((start - there) * 1e6), round((self._ducks_free - start) * 1e6)
        done = self._back_free + times.back_fixed / 1e3 + self._late()
        return VirtualAsk(self, rows, sent, done, stamp)


class _Layer:
    """Passes rows on; its attention checks that the KV it needs is there."""

    def __init__(self, index: int, is_moe: bool) -> None:
        self.index, self.is_moe = index, is_moe

    def attend(
        self, x: Tensor, cache: KVCache, position: int, *, last: int | None = None
    ) -> Tensor:
        cache.latents.write(self.index, position, x + 1)  # 0 is what was never written
        seen = (cache.latents.read(self.index, position + len(x))[:, 0] - 1).long()
        assert (seen >= 0).all(), "attended to KV that was not there yet"
        # All but the last row are settled tokens, or a rejected guess was not overwritten.
        assert (after(seen[:-2]) == seen[1:-1]).all(), f"attended to what was not said: {seen}"
        return x if last is None else x[len(x) - last :]

    def dense(self, x: Tensor) -> Tensor:
        return x

    def route(self, x: Tensor) -> Routed:
        rows = len(x)
        ids = torch.arange(8, dtype=torch.int32).repeat(rows, 1) + self.index
        return Routed(x, ids, torch.ones(rows, 8))

    def shared(self, h: Tensor) -> Tensor:
        return h

    def merge(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        return x


def after(token: Any) -> Any:
    """The token that follows; of an int or of each in a tensor."""
    return (token * 13 + 7) % VOCABULARY


@dataclass
class _Mtp:
    layer: _Layer

    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor:
        return torch.tensor(tokens, dtype=torch.float32)[:, None]

    def final(self, x: Tensor) -> Tensor:
        return x + 0.5  # marks a guess


@dataclass
class VirtualModel:
    """A row is its token; `logits` names the next."""

    moe_layers: int
    dense_layers: int
    layers: Sequence[_Layer] = field(init=False)
    mtp: _Mtp = field(init=False)

    def __post_init__(self) -> None:
        count = self.moe_layers + self.dense_layers
        self.layers = [_Layer(index, index >= self.dense_layers) for index in range(count)]
        self.mtp = _Mtp(_Layer(count, is_moe=True))

    def new_cache(self, capacity: int) -> KVCache:
        number = PlainRows(1, torch.float32, torch.float32)
        return KVCache(len(self.layers) + 1, number, capacity, device=torch.device("cpu"))

    def embed(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.float32)[:, None]

    def final(self, x: Tensor) -> Tensor:
        return x

    def logits(self, h: Tensor) -> Tensor:
        rows = torch.zeros(len(h), VOCABULARY)
        for number, value in enumerate(h[:, 0].tolist()):
            right = after(int(value))
            wrong = value % 1 and right % 8 == 3
            rows[number, (right + 1) % VOCABULARY if wrong else right] = 1
        return rows


def stage_seconds(times: Times) -> Callable[[Stage], float]:
    """How long a device of these times takes for each stage."""
    ms = {
        "attend": times.attend_rows,
        "dense": lambda rows: times.attend_rows(rows) + times.dense,
        "shared": lambda rows: times.shared,
        "combine": lambda rows: times.combine,
        "head": lambda rows: times.head + times.host,
        "guess": lambda rows: times.head + times.host,
        "final": lambda rows: 0.0,
        "feed": lambda rows: times.attend_rows(rows),
        "grow": lambda rows: 0.0,
    }
    return lambda stage: ms[stage.name](stage.rows) / 1e3


class Emulation:
    """The real pipeline over an emulated model, device and flock; make it inside the loop."""

    def __init__(
        self,
        times: Times,
        *,
        seconds: Callable[[Stage], float] | None = None,
        experts: Callable[[int, int], float] | None = None,
        late: Callable[[], float] = lambda: 0.0,
        **options: Any,
    ) -> None:
        self.model = VirtualModel(times.moe_layers, times.dense_layers)
        self.device = VirtualDevice(seconds or stage_seconds(times))
        self.flock = VirtualFlock(times, experts, late)
        loop = asyncio.get_running_loop()
        self.pipeline = Pipeline(self.model, self.device, self.flock, clock=loop.time, **options)

    def session(self) -> Session:
        return Session(self.model, 64, pairs=self.pipeline.drafts)

    async def answer(self, session: Session, first: int, prompt: int, tokens: int) -> Meter:
        """Run a prompt of so many tokens that follow `first`, and check the answer's."""
        said = following(first, prompt + tokens)
        meter = Meter()
        async with session.answering():
            session.reserve(prompt)
            await self.pipeline.prefill(session, session.rewind_to(said[:prompt]))
            sampling = Sampling(max_tokens=tokens)
            settled = self.pipeline.decode(session, sampling, tokens, meter)
            async with aclosing(settled):
                answer = [token.token async for token in settled]
        assert answer == said[prompt:]
        return meter


def following(first: int, count: int) -> list[int]:
    """So many tokens, each after the other."""
    said = [first]
    while len(said) < count:
        said.append(after(said[-1]))
    return said
