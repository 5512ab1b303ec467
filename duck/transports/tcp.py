"""TCP: per duck one connection for control and one for data, both to the duck's one port.

A connection starts in control mode (length-prefixed msgpack). The control connection stays there:
HELLO, LOADING, WELCOME, then PING and PONG, so that a duck that computes for long is told apart
from one
that is frozen. A data connection says DATA with the session's token, gets OK, and from then on
carries
only data frames; answers are received straight into the row set of the ask they belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import structlog

import duck
from duck import wire
from duck.config import split_address
from duck.errors import ConfigError, DuckError, DuckLost, TransportError, WireError
from duck.placement import Plan
from duck.transports.base import Ask, AskTable, Handler, Rows, check_ids, compute_answer

PROTOCOL = (1, 1)  # the control protocol versions this build speaks, lowest and highest
CONNECT_S = 10.0
# Without any byte from a duck for this many watch ticks it counts as frozen. Ticks, not seconds:
# while
# this process itself is held up no tick passes, so a busy host never blames its ducks.
TICK_S = 0.25
SILENT_TICKS = 14
_CONTROL_BUFFER = 1 << 16
_MAX_UNREAD = 64  # control messages a peer may send ahead of us

_log = structlog.get_logger(__name__)


class Link(asyncio.BufferedProtocol):
    """One connection: control messages until `carry_data`, then data frames placed by their header.

    place: given a checked header, where its payload belongs (exactly its size), or None to drop it.
    It is asked again for every stretch received, so memory that is given up is never written again.
    """

    def __init__(self) -> None:
        self.heard = 0  # receptions: any change is a sign of life
        self.messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_close: Callable[[str], None] | None = None
        self._decoder = wire.ControlDecoder()
        self._buffer = memoryview(bytearray(_CONTROL_BUFFER))
        self._data = False
        self._head = bytearray(wire.HEADER_BYTES)
        self._header: wire.Header | None = None
        self._have = 0
        self._size = 0
        self._dropped = False

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, _sizehint: int) -> memoryview:
        if not self._data:
            return self._buffer
        if self._header is None:
            return memoryview(self._head)[self._have :]
        place = None if self._dropped else self._place(self._header)
        if place is None:
            self._dropped = True
            return self._buffer[: self._size - self._have]
        return place[self._have : self._size]

    def buffer_updated(self, count: int) -> None:
        self.heard += 1
        try:
            if self._data:
                self._received(count)
            else:
                self._control(count)
        except WireError as error:
            self.abort(str(error))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        reason = "connection closed" if exc is None else f"connection lost ({exc})"
        if not self.closed.done():
            self.closed.set_result(reason)
        self.messages.put_nowait(None)
        if self.on_close:
            self.on_close(self.closed.result())

    # control

    def _control(self, count: int) -> None:
        for message in self._decoder.feed(self._buffer[:count]):
            if self.messages.qsize() >= _MAX_UNREAD:
                raise WireError(f"more than {_MAX_UNREAD} unread control messages")
            self.messages.put_nowait(message)

    def send(self, message: Mapping[str, Any]) -> None:
        if not self.transport.is_closing():
            self.transport.write(wire.encode_control(message))

    async def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next control message.

        Raises:
            TransportError: the connection ended; TimeoutError: nothing came in time.
        """
        async with asyncio.timeout(timeout_s):
            message = await self.messages.get()
        if message is None:
            self.messages.put_nowait(None)
            raise TransportError(
                self.closed.result() if self.closed.done() else "connection closed"
            )
        return message

    # data

    def carry_data(
        self,
        place: Callable[[wire.Header], memoryview | None],
        arrived: Callable[[wire.Header], None],
        payload_bytes: Callable[[wire.Header], int],
    ) -> None:
        """Switch to data frames.

        payload_bytes: checks a header against the plan and gives its payload's size, or raises
        WireError.
        """
        if self._decoder.pending or not self.messages.empty():
            raise WireError("bytes ahead of the switch to data frames")
        self._place, self._arrived, self._payload_bytes = place, arrived, payload_bytes
        self._data = True

    def _received(self, count: int) -> None:
        self._have += count
        if self._header is None:
            if self._have < wire.HEADER_BYTES:
                return
            header = wire.unpack_header(self._head)
            self._size = self._payload_bytes(header)
            self._header, self._have = header, 0
            self._dropped = False
        if self._have < self._size:
            return
        header = self._header
        if not self._dropped:
            place = self._place(header)
            if place is not None:
                if not wire.check_crc(self._head, place[: self._size]):
                    raise WireError("a data frame failed its checksum")
                self._arrived(header)
        self._header, self._have = None, 0

    def abort(self, reason: str) -> None:
        """Close at once, for this reason."""
        if not self.closed.done():
            self.closed.set_result(reason)
        self.transport.abort()


def frame_bytes(header: wire.Header, limit: int) -> int:
    """The payload size of a frame of a message that is cut as `wire.answer_frames` does.

    Raises:
        WireError: a message larger than `limit`, or cut in another way.
    """
    if not 0 < header.message_bytes <= limit:
        raise WireError(f"message of {header.message_bytes} bytes, at most {limit}")
    fragments = -(-header.message_bytes // wire.FRAME_LIMIT)
    if header.fragments != fragments or header.offset != header.fragment * wire.FRAME_LIMIT:
        raise WireError(f"fragment {header.fragment} of {header.fragments} at {header.offset}")
    return min(wire.FRAME_LIMIT, header.message_bytes - header.offset)


def data_frames(
    kind: wire.Kind, session: int, ticket: int, layer: int, source: int, body: bytes | memoryview
) -> list[bytes | memoryview]:
    """A message as frames, ready for `writelines`."""
    view = memoryview(body)
    out: list[bytes | memoryview] = []
    for fragment, fragments, offset, size in wire.answer_frames(len(view)):
        payload = view[offset : offset + size]
        out.append(
            wire.pack_header(
                kind, session, ticket, layer, source, payload=payload, fragment=fragment,
                fragments=fragments, message_bytes=len(view), offset=offset,
            )
        )  # fmt: skip
        out.append(payload)
    return out


async def _connect(address: str, label: str) -> Link:
    host, port = split_address(address)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            _, link = await loop.create_connection(Link, host, port)
    except TimeoutError:
        reason = f"no connection to {address} within {CONNECT_S:.0f} s"
        raise DuckLost(label, None, CONNECT_S * 1e3, reason) from None
    except OSError as error:
        raise TransportError(
            f"cannot reach {label}: {error.strerror or error}; start it with: "
            f"duck node --listen {address} --model DIR"
        ) from error
    return link


# --- the host's end


class TcpTransport:
    """The host's end for ducks at known addresses.

    Args:
        addresses: HOST:PORT of each duck, in duck order.
        labels: how errors name each duck.
        progress: called with (duck, bytes done, bytes in all) while ducks load their slices.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._labels = tuple(labels or (f"duck {d} ({a})" for d, a in enumerate(addresses)))
        self._progress = progress
        self._control: list[Link] = []
        self._data: list[Link] = []
        self._table: AskTable | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self, plan: Plan) -> None:
        """Shake hands with every duck at once; all of them hold their slices when this returns."""
        assert plan.ducks == len(self._addresses)
        self._plan = plan
        self._loop = asyncio.get_running_loop()
        self._table = AskTable(plan, self._labels)
        self._table.on_cancel = self._tell_cancelled
        self._limit = wire.STAMP_BYTES + plan.shape.answer_bytes(plan.shape.max_rows)
        pairs: list[tuple[Link, Link, int]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._shake_hands(duck)) for duck in range(plan.ducks)]
            pairs = [task.result() for task in tasks]
        except BaseExceptionGroup as group_error:
            await self.close()
            raise _first_error(group_error) from None
        self._control = [pair[0] for pair in pairs]
        self._data = [pair[1] for pair in pairs]
        self._sessions = [pair[2] for pair in pairs]
        for duck, link in enumerate([*self._control, *self._data]):
            self._watch_close(link, duck % plan.ducks)
        self._watch = self._loop.create_task(self._watch_ducks(), name="tcp-watch")

    def _watch_close(self, link: Link, duck: int) -> None:
        link.on_close = lambda reason: self._asks.lose(duck, reason)
        if link.closed.done():  # between its handshake and now
            self._asks.lose(duck, link.closed.result())

    async def _shake_hands(self, duck: int) -> tuple[Link, Link, int]:
        label = self._labels[duck]
        control = await _connect(self._addresses[duck], label)
        data: Link | None = None
        try:
            plan = self._plan
            control.send(
                {
                    "t": "HELLO",
                    "v": list(PROTOCOL),
                    "software": _software(),
                    "plan": plan.to_wire(),
                    "plan_hash": plan.hash(),
                    "duck": duck,
                    "slice_hash": plan.slice_hash(duck),
                }
            )
            welcome = await self._expect(control, label, "WELCOME", duck)
            version = wire.field(welcome, "v", int)
            if not PROTOCOL[0] <= version <= PROTOCOL[1]:
                raise WireError(f"{label} speaks protocol {version}, this host {_versions()}")
            for name, want in (("plan_hash", plan.hash()), ("slice_hash", plan.slice_hash(duck))):
                if wire.field(welcome, name, str) != want:
                    raise WireError(f"{label} answered with another {name.replace('_', ' ')}")
            session = wire.field(welcome, "session", int)
            data = await _connect(self._addresses[duck], label)
            data.send({"t": "DATA", "v": version, "token": wire.field(welcome, "token", bytes)})
            await self._expect(data, label, "OK", duck)
            data.carry_data(
                lambda header: self._place(header, duck, session),
                lambda header: self._arrived(header, duck),
                lambda header: frame_bytes(header, self._limit),
            )
        except BaseException:
            control.transport.abort()
            if data is not None:
                data.transport.abort()
            raise
        return control, data, session

    async def _expect(self, link: Link, label: str, kind: str, duck: int) -> dict[str, Any]:
        """The next message of this kind; loading messages in between are progress, silence is a
        loss.
        """
        begun = time.perf_counter()
        while True:
            try:
                message = await link.receive(CONNECT_S)
            except TimeoutError:
                waited_ms = (time.perf_counter() - begun) * 1e3
                reason = f"no {kind} and no sign of life for {CONNECT_S:.0f} s"
                raise DuckLost(label, None, waited_ms, reason, index=duck) from None
            except TransportError as error:
                waited_ms = (time.perf_counter() - begun) * 1e3
                raise DuckLost(
                    label, None, waited_ms, f"{error} before {kind}", index=duck
                ) from None
            if message["t"] == kind:
                return message
            if message["t"] == "ERR":
                raise WireError(f"{label} refused: {wire.field(message, 'text', str)[:2000]}")
            if message["t"] != "LOADING":
                raise WireError(f"{label} sent {message['t'][:40]!r} where {kind} was due")
            if self._progress:
                done, total = wire.field(message, "done", int), wire.field(message, "total", int)
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
        ask = self._asks.open(layer, len(x), rows, deadline)
        body = wire.pack_ask(ids, weights, x)
        for link, session in zip(self._data, self._sessions, strict=True):
            if not link.transport.is_closing():
                frames = data_frames(wire.Kind.ASK, session, ask.ticket, layer, wire.HOST, body)
                link.transport.writelines(frames)
        return ask

    def _place(self, header: wire.Header, duck: int, session: int) -> memoryview | None:
        """Where an answer belongs: its ask's row, or nowhere when the ask is over."""
        if header.session != session or header.source != duck:
            raise WireError(f"answer of session {header.session:#x}, duck {header.source}")
        if header.kind == wire.Kind.ERROR:
            return self._error_text(header)
        if header.kind != wire.Kind.ANSWER:
            raise WireError(f"a duck sent {header.kind.name}")
        ask = self._asks.open_asks.get(header.ticket)
        if ask is None:
            return None
        expected = wire.STAMP_BYTES + self._plan.shape.answer_bytes(ask.count)
        if header.layer != ask.layer or header.message_bytes != expected:
            raise WireError(
                f"answer of {header.message_bytes} bytes for layer {header.layer}, "
                f"want {expected} for layer {ask.layer}"
            )
        start = header.offset
        return ask.rows.landing[duck][start : start + wire.FRAME_LIMIT]

    def _error_text(self, header: wire.Header) -> memoryview:
        if header.fragments != 1 or header.message_bytes > 4096:
            raise WireError("oversized error frame")
        self._error = bytearray(header.message_bytes)
        return memoryview(self._error)

    def _arrived(self, header: wire.Header, duck: int) -> None:
        if header.kind == wire.Kind.ERROR:
            text = self._error.decode("utf-8", "replace")
            raise WireError(f"the duck could not answer: {text}")
        ask = self._asks.open_asks.get(header.ticket)
        if ask is None:
            self._asks.late_answers += 1
            return
        self._asks.arrived(ask, duck, header.fragment, header.fragments)

    def _tell_cancelled(self, ask: Ask) -> None:
        """A hint: a duck that has not begun this ask need not compute it."""
        for duck, (link, session) in enumerate(zip(self._data, self._sessions, strict=True)):
            if not ask.gather.has(duck) and not link.transport.is_closing():
                link.transport.write(
                    wire.pack_header(
                        wire.Kind.CANCEL, session, ask.ticket, ask.layer, wire.HOST, payload=b""
                    )
                )

    async def _watch_ducks(self) -> None:
        """Ping every duck, count its silence, and end asks that are past their deadline."""
        ducks = range(self._plan.ducks)
        heard = [-1] * self._plan.ducks
        silent = [0] * self._plan.ducks
        while True:
            await asyncio.sleep(TICK_S)
            for duck in ducks:
                now = self._control[duck].heard + self._data[duck].heard
                silent[duck] = 0 if now != heard[duck] else silent[duck] + 1
                heard[duck] = now
                if silent[duck] >= SILENT_TICKS:
                    seconds = SILENT_TICKS * TICK_S
                    self._asks.lose(
                        duck, f"no sign of life for {seconds:.1f} s (frozen or cut off)"
                    )
                self._control[duck].send({"t": "PING"})
                # Answers to pings are only signs of life; take them off the queue.
                _drain(self._control[duck])
            self._asks.expire(self._loop.time())

    def stats(self) -> Mapping[str, float]:
        return {"late_answers": self._asks.late_answers, "rows_free": self._asks.ring.free}

    async def close(self) -> None:
        """Say BYE and drop the connections; safe to call twice and with asks in flight."""
        if self._table is None or self._table.closed:
            return
        self._table.close()
        if self._watch:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        for link in self._control:
            link.send({"t": "BYE"})
        for link in [*self._control, *self._data]:
            link.transport.close()


def _drain(link: Link) -> None:
    while not link.messages.empty():
        message = link.messages.get_nowait()
        if message is None:
            link.messages.put_nowait(None)
            return


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that says why, not that it was cancelled with the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _software() -> str:
    return f"duck {duck.__version__}"


def _versions() -> str:
    low, high = PROTOCOL
    return str(low) if low == high else f"{low}..{high}"


# --- the duck's end


class _Session:
    """One host: its control connection, its data connection, and the asks it waits for."""

    def __init__(self, plan: Plan, duck: int) -> None:
        self.id = secrets.randbits(32)
        self.token = secrets.token_bytes(16)
        self.plan, self.duck = plan, duck
        self.data: Link | None = None
        self.asks: dict[int, bytearray] = {}  # ticket -> the message as it arrives
        self.waiting: dict[int, None] = {}  # complete asks not yet begun, for CANCEL
        self.received: dict[int, int] = {}  # ticket -> fragments


class TcpDuckEnd:
    """Listens on one port and feeds a handler; `serve` runs until it is cancelled.

    Args:
        listen: HOST:PORT; port 0 lets the system choose.
        ready: called with the address in use once it listens.
    """

    MAX_SESSIONS = 16
    MAX_ASKS = 64  # asks one host may have waiting here
    MAX_UNGREETED = 256  # connections that have not said who they are
    GREETING_S = 10.0

    def __init__(self, listen: str, ready: Callable[[str], None]) -> None:
        self._listen = listen
        self._ready = ready
        self._sessions: dict[bytes, _Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ungreeted = 0
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
        try:
            server = await self._loop.create_server(self._accept, host, port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {self._listen}: {error.strerror or error}; "
                "choose another port, or 0 for any free one"
            ) from error
        worker = ThreadPoolExecutor(1, thread_name_prefix="experts")
        self._worker = worker
        try:
            address = server.sockets[0].getsockname()
            text = f"[{address[0]}]" if ":" in address[0] else address[0]
            self._ready(f"{text}:{address[1]}")
            await self._loop.create_future()  # until cancelled
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for session in self._sessions.values():
                if session.data:
                    session.data.transport.abort()
            worker.shutdown(wait=False, cancel_futures=True)

    def _accept(self) -> Link:
        link = Link()
        self._start(self._greet(link))
        return link

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _greet(self, link: Link) -> None:
        """A new connection: a host's control connection, or the data connection of a known
        session.
        """
        self._ungreeted += 1
        try:
            if self._ungreeted > self.MAX_UNGREETED:
                link.abort("too many connections that said nothing")
                return
            try:
                message = await link.receive(self.GREETING_S)
            finally:
                self._ungreeted -= 1
            if message["t"] == "HELLO":
                await self._control(link, message)
            elif message["t"] == "DATA":
                self._carry_data(link, message)
            else:
                raise WireError(f"{message['t'][:40]!r} where HELLO or DATA was due")
        except TimeoutError:
            link.abort("said nothing")
        except TransportError:
            return  # it went away
        except DuckError as error:
            self.refused += 1
            _log.warning("refused", reason=str(error))
            link.send({"t": "ERR", "text": str(error)})
            link.transport.close()

    async def _control(self, link: Link, hello: Mapping[str, Any]) -> None:
        versions = wire.field(hello, "v", list)
        software = wire.field(hello, "software", str)[:80]
        if len(versions) != 2 or not all(type(v) is int for v in versions):
            raise WireError("HELLO: field 'v' must be [lowest, highest]")
        version = min(PROTOCOL[1], versions[1])
        if version < max(PROTOCOL[0], versions[0]):
            raise WireError(
                f"this duck ({_software()}) speaks protocol {_versions()}, the host ({software}) "
                f"speaks {versions[0]}..{versions[1]}: install the same version on both"
            )
        plan = Plan.from_wire(wire.field(hello, "plan", dict))
        duck_index = wire.field(hello, "duck", int)
        if not 0 <= duck_index < plan.ducks:
            raise WireError(f"HELLO: duck {duck_index} of {plan.ducks}")
        if plan.hash() != hello.get("plan_hash"):
            raise WireError(
                "HELLO: the plan does not match its hash: host and duck read it differently"
            )
        if plan.slice_hash(duck_index) != hello.get("slice_hash"):
            raise WireError("HELLO: another slice layout: install the same version on both")
        if len(self._sessions) >= self.MAX_SESSIONS:
            raise WireError(f"this duck already serves {self.MAX_SESSIONS} hosts")
        busy = [s for s in self._sessions.values() if not _same_slice(s, plan, duck_index)]
        if busy:
            raise WireError(
                "this duck serves another host with another slice; stop that host first"
            )
        session = _Session(plan, duck_index)
        self._sessions[session.token] = session
        try:
            facts = await self._attach_with_progress(link, plan, duck_index)
            link.send(
                {
                    "t": "WELCOME",
                    "v": version,
                    "software": _software(),
                    "session": session.id,
                    "token": session.token,
                    "plan_hash": plan.hash(),
                    "slice_hash": plan.slice_hash(duck_index),
                    "pid": os.getpid(),
                    **facts,
                }
            )
            while (message := await link.receive())["t"] != "BYE":
                if message["t"] == "PING":
                    link.send({"t": "PONG"})
        finally:
            del self._sessions[session.token]
            if session.data:
                session.data.transport.abort()
        link.transport.close()

    async def _attach_with_progress(
        self, link: Link, plan: Plan, duck_index: int
    ) -> Mapping[str, Any]:
        """Attach while telling the host how far it is; ends early when the host goes away."""
        progress = [0, 0]

        def note(done: int, total: int) -> None:
            progress[:] = done, total

        async def attach() -> Mapping[str, Any]:
            async with self._attach:  # two hosts at once load the slice once
                return await self._handler.attach(plan, duck_index, note)

        task = self._loop.create_task(attach())
        try:
            while not task.done():
                watched: list[asyncio.Future[Any]] = [task, link.closed]
                await asyncio.wait(watched, timeout=0.5, return_when="FIRST_COMPLETED")
                if link.closed.done():
                    raise TransportError(link.closed.result())
                if not task.done():
                    link.send({"t": "LOADING", "done": progress[0], "total": progress[1]})
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, DuckError):
                    await task
        return task.result()

    # asks

    def _carry_data(self, link: Link, message: Mapping[str, Any]) -> None:
        session = self._sessions.get(wire.field(message, "token", bytes))
        if session is None or session.data is not None:
            raise WireError("DATA: no such session, or it has its data connection already")
        session.data = link
        shape = session.plan.shape
        limit = shape.ask_bytes(shape.max_rows)
        link.carry_data(
            lambda header: self._place(session, header),
            lambda header: self._arrived(session, header),
            lambda header: _ask_frame_bytes(session, header, limit),
        )
        # Losing the data connection ends the session's use: the control connection tells the host.
        link.on_close = lambda _reason: session.asks.clear()
        link.send({"t": "OK"})

    def _place(self, session: _Session, header: wire.Header) -> memoryview:
        message = session.asks.get(header.ticket)
        if message is None:
            if len(session.asks) + len(session.waiting) >= self.MAX_ASKS:
                raise WireError(f"more than {self.MAX_ASKS} asks waiting")
            message = session.asks[header.ticket] = bytearray(header.message_bytes)
        elif len(message) != header.message_bytes:
            raise WireError("fragments of different messages under one ticket")
        return memoryview(message)[header.offset : header.offset + wire.FRAME_LIMIT]

    def _arrived(self, session: _Session, header: wire.Header) -> None:
        if header.kind == wire.Kind.CANCEL:
            session.asks.pop(header.ticket, None)
            session.received.pop(header.ticket, None)
            session.waiting.pop(header.ticket, None)
            return
        count = session.received.get(header.ticket, 0)
        if header.fragment != count:  # TCP keeps order; anything else is a broken peer
            raise WireError(f"fragment {header.fragment} where {count} was due")
        if count + 1 < header.fragments:
            session.received[header.ticket] = count + 1
            return
        session.received.pop(header.ticket, None)
        body = wire.unpack_ask(session.asks.pop(header.ticket), session.plan.shape)
        check_ids(body.ids, session.plan.experts)
        if header.layer not in session.plan.layers:
            raise WireError(f"ask for layer {header.layer}, which has no experts")
        session.waiting[header.ticket] = None
        asked = time.perf_counter()
        self._worker.submit(self._answer, session, header.ticket, header.layer, body, asked)

    def _answer(
        self, session: _Session, ticket: int, layer: int, body: wire.AskBody, asked: float
    ) -> None:
        """In the worker thread: compute one ask and hand its frames to the loop."""
        if ticket not in session.waiting:
            return  # cancelled, or the host is gone
        session.waiting.pop(ticket, None)
        begun = time.perf_counter()
        kind = wire.Kind.ANSWER
        try:
            answer = compute_answer(self._handler, layer, body, session.plan.shape)
            stamps = wire.STAMPS.pack(
                int((begun - asked) * 1e6), int((time.perf_counter() - begun) * 1e6)
            )
            message = stamps + answer.tobytes()
        except DuckError as error:
            kind, message = wire.Kind.ERROR, str(error).encode()[:4096]
        frames = data_frames(kind, session.id, ticket, layer, session.duck, message)
        with contextlib.suppress(RuntimeError):  # the loop ended while we computed
            self._loop.call_soon_threadsafe(_send_frames, session, frames)


def _send_frames(session: _Session, frames: deque[bytes] | list[bytes | memoryview]) -> None:
    if session.data and not session.data.transport.is_closing():
        session.data.transport.writelines(frames)


def _ask_frame_bytes(session: _Session, header: wire.Header, limit: int) -> int:
    if header.session != session.id or header.source != wire.HOST:
        raise WireError(f"frame of session {header.session:#x}")
    if header.kind == wire.Kind.CANCEL:
        if header.message_bytes:
            raise WireError("CANCEL with a body")
        return 0
    if header.kind != wire.Kind.ASK:
        raise WireError(f"a host sent {header.kind.name}")
    size = frame_bytes(header, limit)
    session.plan.shape.rows_of_ask(header.message_bytes)
    return size


def _same_slice(session: _Session, plan: Plan, duck_index: int) -> bool:
    return session.plan.slice_hash(session.duck) == plan.slice_hash(duck_index)
