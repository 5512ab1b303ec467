"""TCP: per duck one connection for control and one for data, both to the duck's one port.

A connection starts in control mode (length-prefixed msgpack). The control connection stays there:
HELLO, LOADING, the layers that the duck lacks (supply.py), WELCOME, then PING and PONG, so that a
duck that computes for long is told apart from one that is frozen. A data connection says DATA with
the session's token, gets OK, and from then on carries only data frames; answers are received
straight into the row set of their ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import structlog

from duck import __version__, wire
from duck.config import split_address
from duck.errors import (
    ConfigError,
    DuckError,
    DuckLost,
    TransportClosed,
    TransportError,
    WireError,
)
from duck.placement import Plan
from duck.transports.base import (
    ASK_ROW_S,
    ASK_S,
    TICK_S,
    Ask,
    AskTable,
    Handler,
    Rows,
    check_ids,
)
from duck.transports.link import Link, data_frames, frame_bytes
from duck.transports.supply import Sender, fetch
from duck.transports.worker import Waiting, Worker

PROTOCOL = (1, 1)  # the control protocol versions this build speaks, lowest and highest
SOFTWARE = f"duck {__version__}"
CONNECT_S = 10.0
# Without any byte from a duck for this many ticks it counts as frozen. Ticks, not seconds: while
# this process itself is held up no tick passes, so a busy host never blames its ducks.
SILENT_TICKS = 12
_TEXT_BYTES = 4096  # of a duck's words on why it cannot answer

_log = structlog.get_logger(__name__)


# --- the host's end


class TcpTransport:
    """The host's end for ducks at known addresses.

    Args:
        addresses: HOST:PORT of each duck, in duck order.
        labels: how errors name each duck.
        progress: called with (duck, bytes done, bytes in all) while ducks load their slices.
        supply: cuts a layer's file for a duck that lacks it: (duck, layer), see `supply.Sender`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        supply: Callable[[int, int], Iterator[memoryview]] | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._labels = tuple(labels or (f"duck {d} ({a})" for d, a in enumerate(addresses)))
        self._progress, self._supply = progress, supply
        self.attached: list[Mapping[str, Any]] = []  # what each duck said in WELCOME
        self._links: list[Link] = []  # every connection made
        self._control: list[Link] = []
        self._data: list[Link] = []
        self._sessions: list[int] = []
        self._table: AskTable | None = None

    async def start(self, plan: Plan) -> None:
        """Shake hands with every duck at once; all of them hold their slices when this returns."""
        assert plan.ducks == len(self._addresses)
        self._plan = plan
        self._table = AskTable(plan, self._labels)
        self._table.on_cancel = self._tell_cancelled
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._attach(duck)) for duck in range(plan.ducks)]
            if self._table.closed:
                raise TransportClosed("closed while it started")
        except BaseExceptionGroup as group_error:
            await self.close()
            raise _first_error(group_error) from None
        except BaseException:  # told to stop
            await self.close()
            raise
        for duck, task in enumerate(tasks):
            control, data, session, welcome = task.result()
            self.attached.append(welcome)
            self._control.append(control)
            self._data.append(data)
            self._sessions.append(session)
            for link in (control, data):
                link.on_close = partial(self._table.lose, duck)
                if link.closed.done():  # between its handshake and now
                    self._table.lose(duck, link.closed.result())
        self._heard = [-1] * plan.ducks
        self._silent = [0] * plan.ducks
        self._table.on_tick = self._look_at_ducks

    async def _attach(self, duck: int) -> tuple[Link, Link, int, Mapping[str, Any]]:
        label = self._labels[duck]
        try:
            return await self._shake_hands(duck)
        except WireError as error:  # whatever is wrong, say with whom
            text = str(error)
            raise WireError(text if text.startswith(label) else f"{label}: {text}") from None

    async def _shake_hands(self, duck: int) -> tuple[Link, Link, int, Mapping[str, Any]]:
        plan, label = self._plan, self._labels[duck]
        control = await self._connect(duck)
        control.send(
            {
                "t": "HELLO",
                "v": list(PROTOCOL),
                "software": SOFTWARE,
                "plan": plan.to_wire(),
                "plan_hash": plan.hash(),
                "duck": duck,
                "slice_hash": plan.slice_hash(duck),
                "patience": [ASK_S, ASK_ROW_S],
            }
        )
        welcome = await self._welcome(control, duck)
        version = wire.field(welcome, "v", int)
        if not PROTOCOL[0] <= version <= PROTOCOL[1]:
            raise WireError(f"{label} speaks protocol {version}, this host {_versions()}")
        for name, want in (("plan_hash", plan.hash()), ("slice_hash", plan.slice_hash(duck))):
            if wire.field(welcome, name, str) != want:
                raise WireError(f"{label} answered with another {name.replace('_', ' ')}")
        session, token = wire.field(welcome, "session", int), wire.field(welcome, "token", bytes)
        if not 0 <= session < 1 << 32 or len(token) > 64:
            raise WireError(f"{label} answered with an impossible session")
        data = await self._connect(duck)
        data.send({"t": "DATA", "v": version, "token": token})
        await self._expect(data, duck, "OK")
        data.carry_data(_Answers(self._asks, duck, session))
        return control, data, session, welcome

    async def _welcome(self, link: Link, duck: int) -> dict[str, Any]:
        """Wait for WELCOME; until then the duck may ask for the layers that it lacks."""
        sender = Sender(link, self._plan.layers, partial(self._stream, duck))
        try:
            async with asyncio.TaskGroup() as sending:
                task: asyncio.Task[None] | None = None
                while True:
                    message = await self._expect(link, duck, "WELCOME", "LACK", "GOT")
                    if message["t"] == "LACK":
                        task = sending.create_task(sender.send(message))
                    elif message["t"] == "GOT":
                        sender.got(message)
                    else:
                        if task:
                            task.cancel()  # done, unless the duck is out of its mind
                        return message
        except BaseExceptionGroup as error:
            raise _first_error(error) from None

    def _stream(self, duck: int, layer: int) -> Iterator[memoryview]:
        if self._supply is None:
            raise TransportError(
                f"{self._labels[duck]} lacks layer {layer}, and this host has no weights to send"
            )
        return self._supply(duck, layer)

    async def _connect(self, duck: int) -> Link:
        address, label = self._addresses[duck], self._labels[duck]
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, link = await loop.create_connection(Link, host, port)
        except TimeoutError:
            reason = f"no connection to {address} within {CONNECT_S:.0f} s"
            raise DuckLost(label, None, CONNECT_S * 1e3, reason, index=duck) from None
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            why = getattr(error, "strerror", None) or error
            raise TransportError(
                f"cannot reach {label}: {why}; start it with: "
                f"duck node --listen {address} --model DIR"
            ) from error
        self._links.append(link)
        return link

    async def _expect(self, link: Link, duck: int, *kinds: str) -> dict[str, Any]:
        """The next message of one of these kinds.

        LOADING messages in between are progress; silence is a loss.
        """
        label, kind = self._labels[duck], kinds[0]
        begun = time.perf_counter()
        while True:
            try:
                message = await link.receive(CONNECT_S)
            except (TimeoutError, TransportError) as error:
                waited_ms = (time.perf_counter() - begun) * 1e3
                reason = f"{error} before {kind}"
                if isinstance(error, TimeoutError):
                    reason = f"no {kind} and no sign of life for {CONNECT_S:.0f} s"
                raise DuckLost(label, None, waited_ms, reason, index=duck) from None
            if message["t"] in kinds:
                return message
            if message["t"] == "ERR":
                text = wire.plain(wire.field(message, "text", str))
                raise WireError(f"{label} refused: {text}")
            if message["t"] != "LOADING":
                raise WireError(f"{label} sent {message['t'][:40]!r} where {kind} was due")
            done, total = wire.field(message, "done", int), wire.field(message, "total", int)
            if self._progress:
                self._progress(duck, done, total)

    @property
    def _asks(self) -> AskTable:
        assert self._table is not None, "start() comes first"
        return self._table

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
        """Write one message to every duck; see the contract in `base`."""
        ask = self._asks.open(layer, len(x), ids, rows, deadline)
        body = wire.pack_ask(ids, weights, x)
        for link, session in zip(self._data, self._sessions, strict=True):
            if not link.transport.is_closing():
                frames = data_frames(wire.Kind.ASK, session, ask.ticket, layer, wire.HOST, body)
                link.transport.writelines(frames)
        return ask

    def _tell_cancelled(self, ask: Ask) -> None:
        """A hint: a duck that has not begun this ask need not compute it."""
        pairs = zip(self._data, self._sessions, strict=True)
        for duck, (link, session) in enumerate(pairs):
            if not ask.gather.has(duck) and not link.transport.is_closing():
                link.transport.write(
                    wire.pack_header(
                        wire.Kind.CANCEL, session, ask.ticket, ask.layer, wire.HOST, payload=b""
                    )
                )

    def _look_at_ducks(self) -> None:
        """Ping every duck and count its silence."""
        for duck, (control, data) in enumerate(zip(self._control, self._data, strict=True)):
            heard = control.heard + data.heard
            self._silent[duck] = 0 if heard != self._heard[duck] else self._silent[duck] + 1
            self._heard[duck] = heard
            if duck in self._asks.lost:
                continue
            if self._silent[duck] >= SILENT_TICKS:
                seconds = SILENT_TICKS * TICK_S
                reason = f"no sign of life for {seconds:.1f} s (frozen or cut off)"
                self._asks.lose(duck, reason)
            control.send({"t": "PING"})
            control.forget_messages()  # PONGs were signs of life

    def stats(self) -> Mapping[str, float]:
        late = self._asks.late_answers + sum(link.dropped for link in self._data)
        return {"late_answers": late, "rows_free": self._asks.ring.free}

    async def close(self) -> None:
        """Say BYE and drop the connections; safe to call twice and with asks in flight."""
        if self._table is None:
            return
        if not self._table.closed:
            for duck, link in enumerate(self._control):
                if duck not in self._table.lost:
                    link.send({"t": "BYE"})
                    link.transport.close()  # once BYE is sent
        self._table.close()
        for link in self._links:
            if not link.transport.is_closing():
                link.abort("closed")


class _Answers:
    """What one duck may send on its data connection, and where it lands."""

    def __init__(self, asks: AskTable, duck: int, session: int) -> None:
        self._asks, self._duck, self._session = asks, duck, session
        self._limit = wire.STAMP_BYTES + asks.plan.shape.answer_bytes(asks.plan.shape.max_rows)
        self._text = memoryview(bytearray(_TEXT_BYTES))

    def check(self, header: wire.Header) -> int:
        if header.session != self._session or header.source != self._duck:
            raise WireError(f"a frame of session {header.session:#x}, duck {header.source}")
        if header.kind == wire.Kind.ERROR:
            return frame_bytes(header, _TEXT_BYTES)
        if header.kind != wire.Kind.ANSWER:
            raise WireError(f"a duck sent {header.kind.name}")
        size = frame_bytes(header, self._limit)
        ask = self._asks.open_asks.get(header.ticket)
        if ask is not None:
            expected = wire.STAMP_BYTES + self._asks.plan.shape.answer_bytes(ask.count)
            if header.layer != ask.layer or header.message_bytes != expected:
                raise WireError(
                    f"an answer of {header.message_bytes} bytes for layer {header.layer}, "
                    f"want {expected} for layer {ask.layer}"
                )
            if ask.gather.seen(self._duck, header.fragment):
                raise WireError(f"fragment {header.fragment} of an answer came twice")
        return size

    def place(self, header: wire.Header) -> memoryview | None:
        if header.kind == wire.Kind.ERROR:
            return self._text
        ask = self._asks.open_asks.get(header.ticket)
        return None if ask is None else ask.rows.landing[self._duck][header.offset :]

    def arrived(self, header: wire.Header) -> None:
        if header.kind == wire.Kind.ERROR:
            text = bytes(self._text[: header.message_bytes]).decode("utf-8", "replace")
            raise WireError(f"the duck could not answer: {wire.plain(text)}")
        ask = self._asks.open_asks[header.ticket]
        self._asks.arrived(ask, self._duck, header.fragment, header.fragments)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that says why, not that it was cancelled with the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _versions() -> str:
    low, high = PROTOCOL
    return str(low) if low == high else f"{low}..{high}"


# --- the duck's end


class _HostLink(Link):
    """A duck's end of a connection: it reads no more from a host that does not read its answers."""

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


class _Session:
    """One host: its plan, its data connection, and the ask that is arriving on it."""

    MAX_ASKS = 64  # asks one host may have waiting here, and their bytes
    MAX_ASK_BYTES = 1 << 28

    def __init__(
        self, plan: Plan, duck: int, patience: tuple[float, float], worker: Worker
    ) -> None:
        self.id = secrets.randbits(32)
        self.token = secrets.token_bytes(16)
        self.plan, self.duck = plan, duck
        self.data: Link | None = None
        self._worker, self._patience = worker, patience
        self._loop = asyncio.get_running_loop()
        self._layers = frozenset(plan.layers)
        self._limit = plan.shape.ask_bytes(plan.shape.max_rows)
        self._message = memoryview(b"")
        self._due: tuple[int, int, int, int] | None = None  # of a message that is not whole yet

    def end(self) -> None:
        """The host is gone: nobody wants the answers any more."""
        self._worker.drop_all(self.id)
        if self.data:
            self.data.abort("the session ended")

    # the frames of the data connection

    def check(self, header: wire.Header) -> int:
        if header.session != self.id or header.source != wire.HOST:
            raise WireError(f"a frame of session {header.session:#x}")
        if header.kind == wire.Kind.CANCEL:
            if header.message_bytes or header.fragments != 1:
                raise WireError("CANCEL with a body")
            return 0
        if header.kind != wire.Kind.ASK:
            raise WireError(f"a host sent {header.kind.name}")
        size = frame_bytes(header, self._limit)
        frame = (header.ticket, header.layer, header.message_bytes, header.fragment)
        if self._due is None and header.fragment == 0:
            self._make_room(header)
        elif frame != self._due:
            raise WireError("frames of several asks are mixed")  # TCP keeps their order
        return size

    def _make_room(self, header: wire.Header) -> None:
        self.plan.shape.rows_of_ask(header.message_bytes)
        if header.layer not in self._layers:
            raise WireError(f"ask for layer {header.layer}, which has no experts")
        asks, size = self._worker.waiting(self.id)
        if asks >= self.MAX_ASKS or size + header.message_bytes > self.MAX_ASK_BYTES:
            raise WireError(f"{asks} asks of {size} bytes are waiting already")
        self._message = np.empty(header.message_bytes, np.uint8).data

    def place(self, header: wire.Header) -> memoryview | None:
        return self._message[header.offset :] if header.kind == wire.Kind.ASK else memoryview(b"")

    def arrived(self, header: wire.Header) -> None:
        if header.kind == wire.Kind.CANCEL:
            self._worker.drop(self.id, header.ticket)
            return
        if header.fragment + 1 < header.fragments:
            self._due = (
                header.ticket, header.layer, header.message_bytes, header.fragment + 1
            )  # fmt: skip
            return
        body = wire.unpack_ask(self._message, self.plan.shape)
        self._due, self._message = None, memoryview(b"")
        check_ids(body.ids, self.plan.experts)
        reply = partial(self._answer, header.ticket, header.layer)
        ask = Waiting(header.layer, body, self.plan.shape, reply, header.message_bytes)
        ask.patience_s = self._patience[0] + self._patience[1] * ask.rows
        self._worker.put(self.id, header.ticket, ask)

    # answers

    def _answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        """In the worker's thread: hand an answer's frames to the loop."""
        if isinstance(answer, DuckError):
            kind, message = wire.Kind.ERROR, str(answer).encode()[:_TEXT_BYTES] or b"no reason"
        else:
            kind, message = wire.Kind.ANSWER, stamps + answer.tobytes()
        frames = data_frames(kind, self.id, ticket, layer, self.duck, message)
        with contextlib.suppress(RuntimeError):  # the loop ended while we computed
            self._loop.call_soon_threadsafe(self._send, frames)

    def _send(self, frames: list[bytes | memoryview]) -> None:
        if self.data and not self.data.transport.is_closing():
            self.data.transport.writelines(frames)


class _Loading:
    """What a handler tells and asks the host of one control connection; a `base.Loading`."""

    def __init__(self, link: Link) -> None:
        self.done = self.total = 0
        self._link = link

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        return await fetch(self._link, layer, offset, take)


class TcpDuckEnd:
    """Listens on one port and feeds a handler; `serve` runs until it is cancelled.

    Args:
        listen: HOST:PORT; port 0 lets the system choose.
        ready: called with the address in use once it listens.
    """

    MAX_SESSIONS = 16
    MAX_STRANGERS = 256  # connections that have not said who they are
    GREETING_S = 10.0

    def __init__(self, listen: str, ready: Callable[[str], None]) -> None:
        self._listen = listen
        self._ready = ready
        self._sessions: dict[bytes, _Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[Link, None] = {}  # the oldest first
        self._attach = asyncio.Lock()
        self.refused = 0  # peers turned away: wrong bytes, wrong version, wrong plan

    async def serve(self, handler: Handler) -> None:
        """Accept hosts until cancelled.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        host, port = split_address(self._listen)
        self._worker = Worker(handler)
        try:
            server = await self._loop.create_server(lambda: _HostLink(self._opened), host, port)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            self._worker.end()
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {self._listen}: {why}; "
                "choose another port, or 0 for any free one"
            ) from error
        try:
            address = server.sockets[0].getsockname()
            text = f"[{address[0]}]" if ":" in address[0] else address[0]
            self._ready(f"{text}:{address[1]}")
            await self._loop.create_future()  # until cancelled
        finally:
            server.close()
            while tasks := tuple(self._tasks):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            self._worker.end()

    def _opened(self, link: Link) -> None:
        """A new connection. When too many say nothing, the one that did so for longest goes."""
        if len(self._strangers) >= self.MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort("too many connections that say nothing")
        self._strangers[link] = None
        self._start(self._greet(link))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("connection_failed", exc_info=error)

    async def _greet(self, link: Link) -> None:
        """A host's control connection from its first word to its end, or a data connection."""
        carries_data = False
        try:
            message = await link.receive(self.GREETING_S)
            self._strangers.pop(link, None)
            if message["t"] == "HELLO":
                await self._control(link, message)
            elif message["t"] == "DATA":
                self._carry_data(link, message)
                carries_data = True
            else:
                raise WireError(f"{message['t'][:40]!r} where HELLO or DATA was due")
        except TimeoutError:
            link.abort(f"said nothing for {self.GREETING_S:.0f} s")
        except TransportError:
            return  # it went away
        except DuckError as error:
            self.refused += 1
            _log.warning("refused", reason=str(error))
            link.refuse(str(error))
        finally:
            self._strangers.pop(link, None)
            if not carries_data:
                link.transport.close()

    async def _control(self, link: Link, hello: Mapping[str, Any]) -> None:
        """HELLO has come: check it, attach, WELCOME, and listen until the host goes."""
        version = _common_version(hello)
        plan = Plan.from_wire(wire.field(hello, "plan", dict))
        duck = wire.field(hello, "duck", int)
        if not 0 <= duck < plan.ducks:
            raise WireError(f"HELLO: duck {duck} of {plan.ducks}")
        if plan.hash() != hello.get("plan_hash"):
            raise WireError(
                "HELLO: the plan does not match its hash: host and duck read it differently"
            )
        if plan.slice_hash(duck) != hello.get("slice_hash"):
            raise WireError("HELLO: another slice layout: install the same version on both")
        patience = _patience(hello)
        if len(self._sessions) >= self.MAX_SESSIONS:
            raise WireError(f"this duck already serves {self.MAX_SESSIONS} hosts")
        held = {s.plan.slice_hash(s.duck) for s in self._sessions.values()}
        if held - {plan.slice_hash(duck)}:
            raise WireError(
                "this duck serves another host with another slice; stop that host first"
            )
        session = _Session(plan, duck, patience, self._worker)
        self._sessions[session.token] = session
        try:
            facts = await self._attach_with_progress(link, plan, duck)
            link.send(
                {
                    "t": "WELCOME",
                    "v": version,
                    "software": SOFTWARE,
                    "session": session.id,
                    "token": session.token,
                    "plan_hash": plan.hash(),
                    "slice_hash": plan.slice_hash(duck),
                    "pid": os.getpid(),
                    **facts,
                }
            )
            while (message := await link.receive())["t"] != "BYE":
                if message["t"] == "PING":
                    link.send({"t": "PONG"})
        finally:
            del self._sessions[session.token]
            session.end()

    async def _attach_with_progress(self, link: Link, plan: Plan, duck: int) -> Mapping[str, Any]:
        """Attach while telling the host how far it is; ends early when the host goes away."""
        loading = _Loading(link)

        async def attach() -> Mapping[str, Any]:
            async with self._attach:  # two hosts at once load the slice once
                return await self._handler.attach(plan, duck, loading)

        task = self._loop.create_task(attach())
        try:
            while not task.done():
                watched: list[asyncio.Future[Any]] = [task, link.closed]
                await asyncio.wait(watched, timeout=0.5, return_when="FIRST_COMPLETED")
                if link.closed.done():
                    raise TransportError(link.closed.result())
                if not task.done():
                    link.send({"t": "LOADING", "done": loading.done, "total": loading.total})
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, DuckError):
                    await task
        return task.result()

    def _carry_data(self, link: Link, message: Mapping[str, Any]) -> None:
        session = self._sessions.get(wire.field(message, "token", bytes))
        if session is None or session.data is not None:
            raise WireError("DATA: no such session, or it has its data connection already")
        link.carry_data(session)
        session.data = link
        link.on_close = partial(self._data_closed, session)
        link.send({"t": "OK"})

    def _data_closed(self, session: _Session, reason: str) -> None:
        """Without its data connection a session computes no more."""
        self._worker.drop_all(session.id)
        if session.data and session.data.error:
            self.refused += 1
            _log.warning("refused", reason=reason)


def _patience(hello: Mapping[str, Any]) -> tuple[float, float]:
    """How long the host waits for an answer: seconds, and seconds for each row."""
    found = wire.field(hello, "patience", list)
    if len(found) != 2 or not all(type(s) in (int, float) and 0 <= s < 1e9 for s in found):
        raise WireError("HELLO: field 'patience' must be [seconds, seconds a row]")
    return float(found[0]), float(found[1])


def _common_version(hello: Mapping[str, Any]) -> int:
    """The highest protocol version that both sides speak.

    Raises:
        WireError: there is none.
    """
    versions = wire.field(hello, "v", list)
    software = wire.plain(wire.field(hello, "software", str), 80)
    if len(versions) != 2 or not all(type(v) is int for v in versions):
        raise WireError("HELLO: field 'v' must be [lowest, highest]")
    version: int = min(PROTOCOL[1], versions[1])
    if version < max(PROTOCOL[0], versions[0]):
        raise WireError(
            f"this duck ({SOFTWARE}) speaks protocol {_versions()}, the host ({software}) "
            f"speaks {versions[0]}..{versions[1]}: install the same version on both"
        )
    return version
