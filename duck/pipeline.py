"""Lanes on their way through the layers, and what is made of them: prefill, decode, score.

Inside one lane every layer waits for the one before it: its own attention can never overlap its own
experts. Two lanes can. While the ducks work on layer n for one of them, the device attends for the
other. A lane waits for two things only, the device and its ask, and for one condition: whoever
attends to another lane's tokens needs that lane's KV of the same layer, and nothing else of it.
Every schedule is this code with a different policy, and gives the same tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import structlog
import torch
from torch import Tensor

from duck.device import Later, Ran, Stage, now
from duck.draft import Bet, Outcome, Settled, settle
from duck.errors import DuckError
from duck.meter import Lately, Meter, Stages
from duck.placement import Plan
from duck.sampling import Sampling
from duck.schedule import Chooser, Policy, Way, chunks
from duck.session import Session
from duck.steps import Steps
from duck.trace import CANCELLED, FAILED, OFF, Trace
from duck.walk import Layer, Sent, Walk, Walks, fetch

# Rows of one prefill lane. Long enough that ducks read each expert once for many rows, short enough
# that a row set of all ducks' answers stays small and a cancelled prompt ends soon.
PREFILL_ROWS = 256
# Hidden rows that wait for the MTP layer while nothing is drafted; then they are fed at once.
UNFED_ROWS = 64

Result = TypeVar("Result")

_log = structlog.get_logger(__name__)


class Device(Protocol):
    """Computes, one piece of work at a time."""

    async def run(self, stage: Stage, work: Callable[[], Later[Result]]) -> Ran[Result]: ...


class FlyingAsk(Protocol):
    """An ask that was sent; see `flock.FlockAsk`."""

    @property
    def ducks_us(self) -> Sequence[tuple[int, int]]: ...
    @property
    def sent_at(self) -> float: ...
    @property
    def arrived_at(self) -> Sequence[float]: ...
    @property
    def done_at(self) -> float: ...
    async def arrived(self) -> None: ...
    def pinned(self) -> np.ndarray | None: ...
    def total(self) -> np.ndarray: ...
    def close(self) -> None: ...


class Flock(Protocol):
    """All ducks; see `flock.Flock`."""

    @property
    def plan(self) -> Plan: ...
    async def ask(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> FlyingAsk: ...


class Mtp(Protocol):
    """The layer that drafts; see `model.mtp.MtpModule`."""

    @property
    def layer(self) -> Layer: ...
    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor: ...
    def final(self, x: Tensor) -> Tensor: ...


class Model(Protocol):
    """All but the routed experts; see `model.transformer.Transformer`."""

    @property
    def layers(self) -> Sequence[Layer]: ...
    @property
    def mtp(self) -> Mtp | None: ...
    def embed(self, tokens: Sequence[int]) -> Tensor: ...
    def final(self, x: Tensor) -> Tensor: ...
    def logits(self, h: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Span:
    """Rows of one session in a lane: its tokens, from `position` on.

    The device computes span by span, so a session's rows do not depend on who travels with them.
    """

    session: Session
    tokens: Sequence[int]
    position: int


class Lane:
    """Rows on their way through the layers. Close it: it may hold an ask's row set.

    Args:
        spans: the rows, of one session or several.
        walks: where the device has each span's.
        make: computes, on the device, the rows that enter the next layer.
        behind: the lane whose KV this one attends to; it may be anywhere ahead.
        number: 0, or 1 for guesses that trail.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        walks: Sequence[Walk],
        make: Callable[[], None],
        *,
        behind: Lane | None = None,
        number: int = 0,
    ) -> None:
        self.spans, self.behind, self.number = spans, behind, number
        self.walks, self.make = walks, make
        self.rows = sum(len(span.tokens) for span in spans)
        self.ids: dict[int, np.ndarray] = {}  # of each layer, for whoever is behind
        self.ask: FlyingAsk | None = None  # what `make` still needs
        self._written = 0  # layers whose KV is in the cache
        self._waiting: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.retire()

    def release(self) -> None:
        """Give back the row set of the last layer's answers, once they are summed or unwanted."""
        if self.ask is not None:
            self.ask.close()
            self.ask = None

    def retire(self) -> None:
        """Forget all but whose rows it had, and that their KV is written.

        Others may be behind it for a while yet.
        """
        self.release()
        for walk in self.walks:
            walk.close()
        self.walks, self.make, self.behind = (), _nothing, None

    def wrote(self, layer: int) -> None:
        """The KV of this layer and all before it is in the cache."""
        self._written = layer + 1
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def kv(self, layer: int) -> None:
        """Wait until the KV of a layer is written. One lane at most is behind another."""
        while self._written <= layer:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


class Pipeline:
    """Runs lanes of one model over one device and one flock.

    Args:
        model: all but the routed experts.
        device: computes it.
        flock: the routed experts.
        schedule, draft, early: as on the command line.
        walks: how the device has rows.
        trace: where spans go.
        clock: of `device` and `flock`, in seconds.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        flock: Flock,
        *,
        schedule: str = "serial",
        draft: str = "auto",
        early: str = "auto",
        walks: Walks | None = None,
        trace: Trace = OFF,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._device, self._flock = model, device, flock
        self._mtp = model.mtp if draft != "off" else None
        self._walks = walks or Walks()
        self._trace, self._clock = trace, clock
        self._wire_bits = flock.plan.shape.ask_dtype == "bfloat16"
        self._chunk = min(PREFILL_ROWS, flock.plan.shape.max_rows)
        self.stages = Stages(flock.plan.ducks)
        self._lately = Lately(self.stages)
        self.chooser = Chooser(schedule, draft, early, can_draft=self._mtp is not None)
        # The plain loop is plain in all: with `serial` prompts overlap nothing either.
        self._prompts = self.chooser.way(1).policy
        self._steps: Steps[Bet, Outcome] = Steps(self._step, self.chooser)

    @property
    def drafts(self) -> bool:
        """Whether sessions keep what drafting needs."""
        return self._mtp is not None

    def stats(self) -> dict[str, Any]:
        """What is going on: how the last seconds of work were spent, and under which schedule."""
        return {
            "sessions": self._steps.sessions,
            "schedule": self.chooser.way(self._steps.sessions).policy.name,
            **self._lately.figures(self._clock()),
            "loop_late_p99_s": self.stages.late_p99_s(),
        }

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Held while a step or a prompt is on its way."""
        self._lately.began(self._clock())
        try:
            yield
        finally:
            self._lately.ended(self._clock())

    # one lane

    async def forward(self, lane: Lane, policy: Policy) -> list[Tensor]:
        """All layers and the last norm: (rows, hidden) of each span."""
        for layer in self._model.layers:
            await self.block(layer, lane, policy)
        asked = lane.ask

        def final() -> Later[list[Tensor]]:
            lane.make()
            finite = [walk.finite() for walk in lane.walks]
            h = [self._model.final(walk.x) for walk in lane.walks]
            return Later(lambda: _vouched(asked, finite, h))

        # Now, not with the head: while it waits for others a lane must hold no row set.
        h = await self._run("final", lane, None, final)
        lane.release()
        return h

    async def block(self, layer: Layer, lane: Lane, policy: Policy) -> None:
        """One layer.

        The sum of the answers, the residual and the next layer's attention are one piece of work:
        one trip to the device between two asks.
        """
        if lane.behind is not None:
            await lane.behind.kv(layer.index)
        make, walks, asked = lane.make, lane.walks, lane.ask

        if not layer.is_moe:

            def dense() -> Later[None]:
                make()
                finite = [walk.finite() for walk in walks] if asked is not None else []
                for walk in walks:
                    walk.attend(layer)
                return Later(lambda: _vouched(asked, finite, None))

            await self._run("dense", lane, layer, dense)
            lane.release()
            lane.wrote(layer.index)
            lane.make = _nothing
            return

        def attend() -> Later[_Message]:
            make()
            for walk in walks:
                walk.attend(layer)
            sent = [walk.sent() for walk in walks]
            return Later(lambda: self._message(asked, [parts() for parts in sent]))

        message = await self._run("attend", lane, layer, attend)
        rows, ids, weights = message
        lane.release()
        lane.wrote(layer.index)
        lane.ids[layer.index] = ids
        ask = lane.ask = await self._flock.ask(layer.index, rows, ids, weights)

        def share() -> Later[None]:
            for walk in walks:
                walk.share(layer)
            return now(None)

        try:
            if policy.overlap:
                await self._run("shared", lane, layer, share, rows=len(rows))
                await ask.arrived()
            else:
                await ask.arrived()
                await self._run("shared", lane, layer, share, rows=len(rows))
        except BaseException as error:
            self._broke_off(ask, layer, lane, len(rows), error)
            raise
        self._arrived(ask, layer, lane, ids)

        def merge() -> None:
            counts = [len(walk.x) for walk in walks]
            for walk, part in zip(walks, _routed(ask, counts, walks[0].x.device), strict=True):
                walk.merge(layer, part)

        lane.make = merge

    def _message(self, asked: FlyingAsk | None, sent: Sequence[Sent]) -> _Message:
        """What goes to the ducks, of all walks.

        Raises:
            WireError: their last answers were no numbers.
        """
        _vouched(asked, [lambda: all(parts.finite for parts in sent)], None)
        return _Message(
            np.concatenate([self._to_wire(parts.rows) for parts in sent]),
            np.concatenate([parts.ids.numpy() for parts in sent]),
            np.concatenate([parts.weights.numpy() for parts in sent]),
        )

    def _to_wire(self, h: Tensor) -> np.ndarray:
        """Rows as they travel: float32, or bfloat16 as its bits."""
        if self._wire_bits:
            return h.to(torch.bfloat16).view(torch.uint16).numpy()
        return h.to(torch.float32).numpy()

    async def _run(
        self,
        name: str,
        lane: Lane,
        layer: Layer | None,
        work: Callable[[], Later[Result]],
        *,
        rows: int | None = None,
    ) -> Result:
        """Compute for a lane on the device, and note how long it took."""
        stage = Stage(
            name,
            lane.rows if rows is None else rows,
            -1 if layer is None else layer.index,
            lane.number,
            lane.spans[0].session.number,
        )
        return await self._compute(stage, work)

    async def reserve(self, session: Session, capacity: int) -> None:
        """Make room for so many positions, on the device's worker."""
        if capacity > session.cache.capacity:

            def grow() -> Later[None]:
                session.reserve(capacity, self._walks.least)
                return now(None)

            await self._device.run(Stage("grow", 0, session=session.number), grow)

    async def _compute(self, stage: Stage, work: Callable[[], Later[Result]]) -> Result:
        ran = await self._device.run(stage, work)
        self.stages.worked(stage.name, stage.rows, ran.ended - ran.begun, late=ran.late)
        if self._trace.on:
            self._trace.span(
                "device", stage.name, ran.begun, ran.ended, stage.layer,
                lane=stage.lane, session=stage.session, rows=stage.rows, late_us=ran.late * 1e6,
            )  # fmt: skip
        return ran.result

    def _arrived(self, ask: FlyingAsk, layer: Layer, lane: Lane, ids: np.ndarray) -> None:
        self.stages.asked(len(ids), ask.done_at - ask.sent_at, ask.ducks_us)
        if self._trace.on:
            self._trace.ask(
                layer.index, ask.sent_at, ask.done_at, ask.ducks_us, ids, ask.arrived_at,
                lane=lane.number, session=lane.spans[0].session.number,
            )  # fmt: skip

    def _broke_off(
        self, ask: FlyingAsk, layer: Layer, lane: Lane, rows: int, error: BaseException
    ) -> None:
        """An ask came to nothing: it failed, or nobody wants its answers any more."""
        if self._trace.on:
            failed = isinstance(error, DuckError)
            self._trace.span(
                "net", FAILED if failed else CANCELLED, ask.sent_at, self._clock(), layer.index,
                lane=lane.number, session=lane.spans[0].session.number, rows=rows,
                why=str(error) if failed else "",
            )  # fmt: skip

    # chunks of a prompt

    async def _through(
        self,
        session: Session,
        tokens: Sequence[int],
        policy: Policy,
        done: Callable[[Span, Tensor], Awaitable[None]],
    ) -> None:
        """Run tokens after the session's position through all layers, chunk after chunk.

        Each chunk is half a layer behind the one before it: it attends to that one's KV of the same
        layer while that one's experts are computed. `done` gets the chunks in order, each with its
        (rows, hidden).
        """
        flying: deque[tuple[Lane, asyncio.Task[list[Tensor]]]] = deque()
        position, before = session.length, None

        async def land() -> None:
            lane, task = flying.popleft()
            [h] = await task
            lane.retire()
            await done(lane.spans[0], h)

        with ExitStack() as lanes:
            async with _together() as group:
                for chunk in chunks(tokens, self._chunk):
                    if len(flying) == policy.chunks_in_flight:
                        await land()
                    span = Span(session, chunk, position)
                    lane = lanes.enter_context(self._lane([span], behind=before))
                    flying.append((lane, group.create_task(self.forward(lane, policy))))
                    position, before = position + len(chunk), lane
                while flying:
                    await land()

    def _lane(
        self,
        spans: Sequence[Span],
        rows: Callable[[], Sequence[Tensor]] | None = None,
        *,
        last: int | None = None,
        decode: bool = False,
        behind: Lane | None = None,
        number: int = 0,
    ) -> Lane:
        """A lane that begins with `rows()` of each span; None: with its embedded tokens.

        last: so many rows a span leave a layer, though all write their KV. decode: of a step.
        """
        walks = [
            self._walks.begin(span.session, len(span.tokens), span.position, last, decode=decode)
            for span in spans
        ]

        def make() -> None:
            first = [self._model.embed(s.tokens) for s in spans] if rows is None else rows()
            for walk, x in zip(walks, first, strict=True):
                walk.enter(x)

        return Lane(spans, walks, make, behind=behind, number=number)

    async def prefill(self, session: Session, tokens: Sequence[int]) -> None:
        """Run `tokens` after what the session holds; leaves the last one's hidden row."""
        begun = self._clock()

        async def done(span: Span, h: Tensor) -> None:
            session.tokens += span.tokens
            session.length += len(span.tokens)
            if self._mtp is None:
                session.hidden = [h[-1:]]
            else:
                session.hidden.append(h)
                await self._feed(self._mtp, session)

        with self._working():
            await self._through(session, tokens, self._prompts, done)
        if self._trace.on:
            self._trace.span(
                "loop", "prefill", begun, self._clock(), session=session.number, rows=len(tokens)
            )

    async def _feed(self, mtp: Mtp, session: Session) -> None:
        """Write the MTP layer's KV for all pairs known: no experts are needed for a layer's KV.

        Pair j is (hidden j, token j + 1). The last hidden row is kept: its token is not chosen yet,
        or the next guess is made from it.
        """
        kept = session.hidden[-1][-1:]
        rows = session.unfed - 1
        if rows:
            tokens = session.tokens[session.mtp_length + 1 :][:rows]
            hidden, position = session.hidden, session.mtp_length

            def write() -> Later[None]:
                x = mtp.combine(tokens, torch.cat(hidden)[:rows])
                mtp.layer.attend(x, session.cache, position, last=0)
                return now(None)

            await self._compute(Stage("feed", rows, mtp.layer.index, 0, session.number), write)
        session.mtp_length += rows
        session.hidden = [kept]

    # decode

    async def decode(
        self, session: Session, sampling: Sampling, limit: int, meter: Meter
    ) -> AsyncGenerator[Settled, None]:
        """Yield up to `limit` tokens after the session's; stop whenever the caller does.

        Every step runs the last settled token and, with drafts, the guess for the one after it.
        When the guess equals the token then settled, its row counts too; else the next step
        overwrites its KV.
        """
        first = await self._first(session, sampling)
        session.tokens.append(first.token)
        yield first
        index = 1
        while index < limit:
            if self._mtp is not None and session.unfed > UNFED_ROWS:
                await self._feed(self._mtp, session)
            # A guess is worth its row only if the step could settle two more tokens.
            bet = Bet(session, sampling, meter, may_draft=limit - index > 1)
            await self.reserve(session, session.length + 1 + bet.may_draft)
            outcome = await self._steps.step(bet)
            self._apply(bet, outcome, index)
            for settled in outcome.settled:
                session.tokens.append(settled.token)
                index += 1
                yield settled

    async def _first(self, session: Session, sampling: Sampling) -> Settled:
        """The token after the prompt, from the hidden row that prefill left."""
        h, position = session.hidden[-1][-1:], len(session.tokens)

        def head() -> Later[Settled]:
            logits = self._logits(h)
            return Later(lambda: settle(logits(), sampling, position, None)[0])

        return await self._compute(Stage("head", 1, session=session.number), head)

    def _apply(self, bet: Bet, outcome: Outcome, index: int) -> None:
        """What a step gave becomes the session's."""
        session, meter = bet.session, bet.meter
        meter.steps += 1
        if outcome.guess is not None:
            meter.drafts.append((index - 1, outcome.guess))
            meter.accepted += len(outcome.settled) - 1
            # All pairs known when the guess was made have been fed for it.
            session.mtp_length = session.length
            session.hidden = []
        if self._mtp is None:
            session.hidden = []
        session.hidden.append(outcome.hidden)
        session.length += len(outcome.settled)

    async def _step(self, bets: Sequence[Bet], way: Way) -> list[Outcome]:
        """One step of some sessions, which are left as they were."""
        begun = self._clock()
        drafts = way.draft and self._mtp is not None and any(bet.may_draft for bet in bets)
        guesses: list[int | None] = [None] * len(bets)
        with self._working(), ExitStack() as open_lanes:
            async with _together() as step:
                lanes: list[Lane] = []
                flying: list[asyncio.Task[list[Tensor]]] = []

                def start(spans: list[Span], behind: Lane | None = None) -> None:
                    lane = self._lane(spans, decode=True, behind=behind, number=len(lanes))
                    lanes.append(open_lanes.enter_context(lane))
                    flying.append(step.create_task(self.forward(lane, way.policy)))

                sure = [Span(b.session, b.session.tokens[-1:], b.session.length) for b in bets]
                if drafts and way.early and way.policy.apart:
                    start(sure)
                if drafts:
                    guesses = await self._guess(bets, way.policy)
                pairs = list(zip(sure, guesses, strict=True))
                if not way.policy.apart:
                    start([s if g is None else replace(s, tokens=[*s.tokens, g]) for s, g in pairs])
                else:
                    if not lanes:
                        start(sure)
                    bold = [
                        replace(s, tokens=[g], position=s.position + 1)
                        for s, g in pairs
                        if g is not None
                    ]
                    if bold:
                        start(bold, behind=lanes[0])
            hidden = _rows_of(bets, lanes, [task.result() for task in flying])
            outcomes = await self._settle(bets, guesses, hidden)
        for bet in bets:
            bet.meter.schedules[way.policy.name] += 1
            if lanes[0].ids:  # else only the MTP layer has experts
                self._lately.common(*bet.meter.experts(*_experts_of(bet.session, lanes)))
        self._note(bets, outcomes, way, begun)
        return outcomes

    async def _guess(self, bets: Sequence[Bet], policy: Policy) -> list[int | None]:
        """Feed the MTP layer the newest pairs; guess the token after each session's last one.

        All pairs write KV, only the last one of a session needs experts.
        """
        mtp = self._mtp
        assert mtp is not None
        sessions = [bet.session for bet in bets if bet.may_draft]
        spans = [Span(s, s.tokens[-s.unfed :], s.mtp_length) for s in sessions]

        def combine() -> Later[list[Tensor]]:
            pairs = zip(sessions, spans, strict=True)
            return now([mtp.combine(span.tokens, torch.cat(s.hidden)) for s, span in pairs])

        def guess() -> Later[list[int]]:
            lane.make()
            finite = [walk.finite() for walk in lane.walks]
            h = torch.cat([mtp.final(walk.x) for walk in lane.walks])
            best = fetch(torch.argmax(self._model.logits(h), dim=-1))
            return Later(lambda: _vouched(asked, finite, best()[0].tolist()))

        with self._lane(spans, lambda: combined, last=1, decode=True) as lane:
            combined = await self._run("combine", lane, mtp.layer, combine)
            await self.block(mtp.layer, lane, policy)
            asked = lane.ask
            guessed = await self._run("guess", lane, mtp.layer, guess, rows=len(spans))
        tokens = iter(guessed)
        return [next(tokens) if bet.may_draft else None for bet in bets]

    async def _settle(
        self, bets: Sequence[Bet], guesses: Sequence[int | None], parts: Sequence[Sequence[Tensor]]
    ) -> list[Outcome]:
        """The head, once for all rows, and every session's choice. parts: rows of each session."""

        def head() -> Later[list[Outcome]]:
            hidden = [torch.cat(list(mine)) for mine in parts]
            logits = self._logits(torch.cat(hidden))

            def choose() -> list[Outcome]:
                ends = np.cumsum([len(h) for h in hidden])[:-1]
                outcomes = []
                of_each = np.split(logits(), ends)
                for bet, guess, h, mine in zip(bets, guesses, hidden, of_each, strict=True):
                    settled = settle(mine, bet.sampling, len(bet.session.tokens), guess)
                    outcomes.append(Outcome(settled, h[: len(settled)], guess))
                return outcomes

            return Later(choose)

        rows = sum(len(h) for mine in parts for h in mine)
        return await self._compute(Stage("head", rows, session=bets[0].session.number), head)

    def _logits(self, h: Tensor) -> Callable[[], np.ndarray]:
        """Launch the head; its logits, once the device has computed them."""
        logits = fetch(self._model.logits(h))
        return lambda: logits()[0].numpy()

    def _note(
        self, bets: Sequence[Bet], outcomes: Sequence[Outcome], way: Way, begun: float
    ) -> None:
        """Tell the trace of a step, and the chooser, which may want to choose."""
        ended = self._clock()
        for bet, outcome in zip(bets, outcomes, strict=True):
            if self._trace.on:
                self._trace.span(
                    "loop", "step", begun, ended, session=bet.session.number,
                    index=bet.meter.steps, schedule=way.policy.name, settled=len(outcome.settled),
                )  # fmt: skip
        proposed = sum(outcome.guess is not None for outcome in outcomes)
        if way.draft and not proposed:
            return  # an answer's last token: such a step tells nothing about drafts
        accepted = sum(len(outcome.settled) - 1 for outcome in outcomes)
        if self.chooser.note(way, ended - begun, proposed=proposed, accepted=accepted):
            moe = sum(layer.is_moe for layer in self._model.layers)
            times = self.stages.times(moe, len(self._model.layers) - moe)
            sessions = self._steps.sessions
            choice = self.chooser.decide(way, times, sessions=sessions)
            _log.info("schedule_chosen", way=str(choice.way), sessions=sessions, why=choice.why)

    # score

    async def score(
        self, session: Session, tokens: Sequence[int], *, mtp: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits of every position, (T, vocab) float32; with `mtp` also its (T - 1, vocab).

        session: a fresh one.
        """
        logits: list[np.ndarray] = []
        hidden: list[Tensor] = []

        async def done(span: Span, h: Tensor) -> None:
            del span
            hidden.append(h)
            logits.append(await self._head(session, h))

        await self._through(session, tokens, self._prompts, done)
        if not mtp:
            return np.concatenate(logits), None
        module = self._model.mtp
        if module is None:
            raise DuckError("this model has no MTP layer to score")
        guesses = [np.zeros((0, logits[0].shape[1]), np.float32)]
        together = Stage("combine", len(tokens), session=session.number)
        pairs = await self._compute(together, lambda: now(torch.cat(hidden)[:-1]))
        for start in range(0, len(pairs), self._chunk):
            h = pairs[start : start + self._chunk]
            span = Span(session, tokens[start + 1 : start + 1 + len(h)], start)
            guesses.append(await self._score_pairs(module, span, h))
        return np.concatenate(logits), np.concatenate(guesses)

    async def _score_pairs(self, mtp: Mtp, span: Span, h: Tensor) -> np.ndarray:
        """The MTP layer's logits of (hidden j, token j + 1)."""

        def final() -> Later[Tensor]:
            lane.make()
            [walk] = lane.walks
            finite, h = walk.finite(), mtp.final(walk.x)
            return Later(lambda: _vouched(asked, [finite], h))

        with self._lane([span], lambda: [mtp.combine(span.tokens, h)]) as lane:
            await self.block(mtp.layer, lane, self._prompts)
            asked = lane.ask
            return await self._head(span.session, await self._run("final", lane, None, final))

    async def _head(self, session: Session, h: Tensor) -> np.ndarray:
        stage = Stage("head", len(h), session=session.number)
        return await self._compute(stage, lambda: Later(self._logits(h)))


class _Message(NamedTuple):
    """What a layer sends its ducks: see `transports.base.Transport.ask`."""

    rows: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def _nothing() -> None:
    pass


def _vouched(
    asked: FlyingAsk | None, finite: Sequence[Callable[[], bool]], result: Result
) -> Result:
    """The result, which may come of a sum that only the device has added up.

    Raises:
        WireError: the answers are no numbers; names the duck.
    """
    if asked is not None and not all(is_finite() for is_finite in finite):
        asked.total()
    return result


def _routed(ask: FlyingAsk, counts: Sequence[int], device: torch.device) -> Sequence[Tensor]:
    """The ducks' answers for walks of so many rows, as layer.merge takes them.

    Their sum; or the partial sums themselves, where the device can read them and adds them up.
    """
    partials = ask.pinned()
    if partials is None:
        return torch.split(torch.from_numpy(ask.total()).to(device), list(counts))
    tensor = torch.from_numpy(partials)
    if tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    return torch.split(tensor, list(counts), dim=1)


def _rows_of(
    bets: Sequence[Bet], lanes: Sequence[Lane], hidden: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Each session's hidden rows, the sure one first; hidden: of every lane and span."""
    parts: dict[Session, list[Tensor]] = {bet.session: [] for bet in bets}
    for lane, tensors in zip(lanes, hidden, strict=True):
        for span, h in zip(lane.spans, tensors, strict=True):
            parts[span.session].append(h)
    return [parts[bet.session] for bet in bets]


def _experts_of(session: Session, lanes: Sequence[Lane]) -> tuple[np.ndarray, ...]:
    """The experts of a session's rows in a step, (layers, top_k) of each."""
    rows = []
    for lane in lanes:
        at = 0
        for span in lane.spans:
            stop = at + len(span.tokens)
            if span.session is session:
                ids = [of_layer[at:stop] for of_layer in lane.ids.values()]
                rows += list(np.stack(ids, axis=1))
            at = stop
    return tuple(rows)


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises the first error as it is, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
