"""A decode step played out event by event: device, ducks, wire and loop, under each schedule.

Pure. The schedules are written here once more, as short walks that wait for what they depend on and
use one thing at a time, so that what the pipeline measures can be held against it: a step that
takes longer than its simulation has lost time that the dependencies do not explain.

What is simulated: a device that runs one piece at a time, in the order they were wished for but for
`YIELDS`; ducks as one, all equally fast, answering asks in order; the wire as two directions, each
busy for an ask's rows and late by a fixed time. Between lanes the guess follows the sure row: at
each layer it waits for that row's KV, and for nothing else.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from duck.plan.closed import Times

SCHEDULES = ("serial", "batch", "wave", "pingpong")
# So many pieces of device work that came later may go before one of these: nothing flies that they
# hold up. As `device.OVERTAKEN`.
YIELDS = {"shared": 4, "guess": 8, "head": 8}
STEPS = 6  # a step depends on the one before only where sessions meet, and settles soon


@dataclass(frozen=True, slots=True)
class Busy:
    """Something was in use."""

    resource: str  # device, ducks, out, back
    name: str
    session: int
    lane: int
    layer: int  # -1: of no layer
    start: float  # milliseconds
    end: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulation shows."""

    step_ms: float  # in which every session makes one step
    device: float  # share of the time in use
    ducks: float
    spans: tuple[Busy, ...]
    ends: tuple[float, ...]  # when each step ended, all sessions'


def simulate(
    times: Times,
    schedule: str,
    *,
    draft: bool = True,
    sessions: int = 1,
    pieces: int = 1,
    early: bool = False,
    steps: int = STEPS,
) -> Simulated:
    """Play out `steps` steps of every session.

    Args:
        times: what a step is made of.
        schedule: serial, batch, wave (needs drafts) or pingpong (as batch, for several sessions).
        draft: every step guesses a token and runs two rows.
        sessions: that run at once; each is a group of its own.
        pieces: asks and answers travel in so many, the ducks working on the first ones while the
            rest is on its way.
        early: in wave the sure row starts while the next guess is being made.
        steps: of each session.
    """
    assert schedule in SCHEDULES
    assert draft or schedule != "wave"
    if pieces > 1:
        times = replace(times, out_row=times.out_row / pieces, back_row=times.back_row / pieces)
    world = _World()
    ends: list[float] = []
    for session in range(sessions):
        walk = _Walk(world, times, session, overlapped=schedule != "serial")
        world.start(walk.session(schedule, draft=draft, early=early, steps=steps, ends=ends))
    world.run()
    # The first step of each starts at once with the others', which later steps do not.
    span = ends[-1] - ends[sessions - 1]
    return Simulated(
        step_ms=span / (steps - 1) if steps > 1 else ends[-1],
        device=_share(world.spans, "device", ends[-1]),
        ducks=_share(world.spans, "ducks", ends[-1]),
        spans=tuple(world.spans),
        ends=tuple(ends),
    )


def _share(spans: Sequence[Busy], resource: str, time: float) -> float:
    return sum(span.end - span.start for span in spans if span.resource == resource) / time


class _Signal:
    """Something that will have happened."""

    __slots__ = ("happened", "waiting")

    def __init__(self) -> None:
        self.happened = False
        self.waiting: list[Steps] = []


@dataclass(slots=True)
class _Use:
    """A walk's wish: this resource for so long."""

    resource: str
    ms: float
    name: str
    session: int
    lane: int = 0
    layer: int = -1
    yields: int = 0  # how many later wishes for the resource may overtake it


# A walk yields what it waits for.
Steps = Generator["_Use | _Signal | float", None, None]


class _World:
    """The clock, the queues, and what was used when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.spans: list[Busy] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._queues: dict[str, list[tuple[int, int, _Use, Steps]]] = {}
        self._numbers: dict[str, int] = {}
        self._in_use: set[str] = set()
        self._order = itertools.count()
        self._signals: dict[Steps, _Signal] = {}

    def start(self, walk: Steps) -> _Signal:
        """Begin a walk now; the signal is its end."""
        done = self._signals[walk] = _Signal()
        self._at(self.now, lambda: self._advance(walk))
        return done

    def tell(self, signal: _Signal) -> None:
        """It has happened: who waited goes on."""
        signal.happened = True
        for walk in signal.waiting:
            self._at(self.now, lambda walk=walk: self._advance(walk))  # type: ignore[misc]
        signal.waiting.clear()

    def run(self) -> None:
        while self._agenda:
            self.now, _, happen = heapq.heappop(self._agenda)
            happen()

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._order), happen))

    def _advance(self, walk: Steps) -> None:
        try:
            wish = next(walk)
            while isinstance(wish, _Signal) and wish.happened:
                wish = next(walk)
        except StopIteration:
            self.tell(self._signals.pop(walk))
            return
        if isinstance(wish, _Signal):
            wish.waiting.append(walk)
        elif isinstance(wish, _Use):
            queue = self._queues.setdefault(wish.resource, [])
            number = self._numbers[wish.resource] = self._numbers.get(wish.resource, 0) + 1
            heapq.heappush(queue, (number + wish.yields, number, wish, walk))
            self._serve(wish.resource)
        else:
            self._at(self.now + wish, lambda: self._advance(walk))

    def _serve(self, resource: str) -> None:
        queue = self._queues[resource]
        if resource in self._in_use or not queue:
            return
        _, _, use, walk = heapq.heappop(queue)
        self._in_use.add(resource)
        end = self.now + use.ms
        span = Busy(resource, use.name, use.session, use.lane, use.layer, self.now, end)
        self.spans.append(span)

        def release() -> None:
            # The resource takes what waits already; what its last user wants next comes after.
            self._in_use.discard(resource)
            self._serve(resource)
            self._advance(walk)

        self._at(end, release)


class _Walk:
    """One session's steps."""

    def __init__(self, world: _World, times: Times, session: int, *, overlapped: bool) -> None:
        self._world, self._times, self._session = world, times, session
        self._overlapped = overlapped
        self._layers = times.dense_layers + times.moe_layers

    def session(
        self, schedule: str, *, draft: bool, early: bool, steps: int, ends: list[float]
    ) -> Steps:
        world, rows = self._world, 1 + draft
        ahead: _Signal | None = None  # the sure lane, when it started before its step
        kv: Sequence[_Signal] = ()
        for step in range(steps):
            if schedule == "wave":
                if ahead is None:
                    kv = self._signals()
                    ahead = world.start(self._lane(1, 0, writes=kv))
                guess = world.start(self._lane(1, 1, reads=kv))
                yield ahead
                yield guess
                ahead = None
            else:
                yield world.start(self._lane(rows, 0))
            yield from self._choose("head")
            if draft:
                if early and schedule == "wave" and step < steps - 1:
                    kv = self._signals()
                    ahead = world.start(self._lane(1, 0, writes=kv))
                yield from self._draft()
            ends.append(world.now)

    def _signals(self) -> Sequence[_Signal]:
        return [_Signal() for _ in range(self._layers)]

    def _lane(
        self,
        rows: int,
        lane: int,
        writes: Sequence[_Signal] = (),
        reads: Sequence[_Signal] = (),
    ) -> Steps:
        """Rows through all layers, of whose KV `writes` tell, and which wait for `reads`."""
        times = self._times
        for layer in range(self._layers):
            if reads:
                yield reads[layer]
            if layer < times.dense_layers:
                yield self._device("dense", times.attend_rows(rows) + times.dense, lane, layer)
            else:
                yield self._device("attend", times.attend_rows(rows), lane, layer)
            if writes:
                self._world.tell(writes[layer])
            if layer >= times.dense_layers:
                yield from self._experts(rows, lane, layer)

    def _experts(self, rows: int, lane: int, layer: int) -> Steps:
        answered = self._world.start(self._ask(rows, lane, layer))
        if not self._overlapped:
            yield answered
        yield self._device("shared", self._times.shared, lane, layer)
        yield answered

    def _ask(self, rows: int, lane: int, layer: int) -> Steps:
        times, session = self._times, self._session
        yield _Use("out", times.out_row * rows, "ask", session, lane, layer)
        yield times.out_fixed
        yield _Use("ducks", times.expert_rows(rows), "experts", session, lane, layer)
        yield _Use("back", times.back_row * rows, "answers", session, lane, layer)
        yield times.back_fixed

    def _choose(self, name: str) -> Steps:
        yield self._device(name, self._times.head + self._times.host)

    def _draft(self) -> Steps:
        yield self._device("combine", self._times.combine)
        yield self._device("attend", self._times.attend_rows(2), layer=self._layers)
        yield from self._experts(1, 0, self._layers)
        yield from self._choose("guess")

    def _device(self, name: str, ms: float, lane: int = 0, layer: int = -1) -> _Use:
        return _Use("device", ms, name, self._session, lane, layer, YIELDS.get(name, 0))
