"""The control plane, the duck's end: one port, hosts that come and go, and the asks they bring.

The first message of a connection says what it is: HELLO begins a host's session (see control.py),
any other word may belong to a data plane. A `DuckPlane` brings asks to a `HostSession`, which
checks them and puts them in the worker's queue; the plane then carries the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import structlog

from duck import wire
from duck.config import split_address
from duck.errors import ConfigError, DuckError, TransportError, WireError
from duck.placement import Plan
from duck.seal import NONCE_BYTES, SessionKeys
from duck.transports.base import Handler, check_ids
from duck.transports.control import PROTOCOL, SOFTWARE, nonce_of, versions
from duck.transports.link import Link
from duck.transports.refusals import Refusals
from duck.transports.supply import fetch
from duck.transports.worker import Waiting, Worker

if TYPE_CHECKING:  # certificates are slow to import, and only needed with a key
    from duck.transports.tls import Credentials, Tls

_log = structlog.get_logger(__name__)


class Feed(Protocol):
    """The asks and answers of one session, as a plane moves them."""

    def welcome(self) -> Mapping[str, Any]:
        """The duck's parameters for WELCOME; from now on the host may connect.

        Raises:
            DuckError: this plane cannot serve now; the text travels to the host.
        """
        ...

    def answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        """Carry the partial sums (in the wire dtype) of an ask to the host, or why there are none.

        Called in the worker's thread.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters of this session, for the log when it ends."""
        ...

    def close(self) -> None:
        """The session has ended; called once, in the event loop."""
        ...


class DuckPlane(Protocol):
    """A duck's end of a data plane, for all sessions that chose it."""

    @property
    def name(self) -> str:
        """What HELLO calls it."""
        ...

    @property
    def greeting(self) -> str:
        """The first word of connections that are this plane's, "" if it has none."""
        ...

    def open(self, session: HostSession, offer: Mapping[str, Any]) -> Feed:
        """Begin a session with the host's parameters; what is costly waits for `welcome`.

        Raises:
            WireError: the parameters make no sense.
        """
        ...

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        """Take over a connection that began with this plane's word.

        Raises:
            WireError: it belongs to nobody; the connection ends.
        """
        ...


class HostSession:
    """One host: its plan, how long it waits, and its asks in the worker's queue."""

    MAX_ASKS = 64  # asks one host may have waiting here, and their bytes
    MAX_ASK_BYTES = 1 << 28

    def __init__(
        self,
        number: int,
        host_nonce: bytes,
        keys: SessionKeys | None,
        plan: Plan,
        duck: int,
        patience: tuple[float, float],
        worker: Worker,
        control: Link,
        refuse: Callable[[str], None],
    ) -> None:
        self.id = number
        self.host_nonce, self.nonce = host_nonce, secrets.token_bytes(NONCE_BYTES)
        self.keys = keys  # with a cluster key: what planes seal their frames by
        self.plan, self.duck = plan, duck
        self.feed: Feed  # set once the plane has opened it
        self.heard_at = 0.0  # when its control connection last said anything, by the loop's clock
        self.welcomed = False
        self.control = control
        self.refuse = refuse  # ends it: its host broke the rules, for this reason
        self._worker, self._patience = worker, patience
        self._layers = frozenset(plan.layers)

    def check(self, layer: int, message_bytes: int) -> None:
        """Refuse an ask that the plan does not allow, or that is one too many.

        Raises:
            WireError: the session should end.
        """
        self.plan.shape.rows_of_ask(message_bytes)
        if layer not in self._layers:
            raise WireError(f"ask for layer {layer}, which has no experts")
        asks, size = self._worker.waiting(self.id)
        if asks >= self.MAX_ASKS or size + message_bytes > self.MAX_ASK_BYTES:
            raise WireError(f"{asks} asks of {size} bytes are waiting already")

    def ask(self, ticket: int, layer: int, message: memoryview) -> None:
        """Queue a whole ask that passed `check` and its checksum; the memory is the queue's now.

        Raises:
            WireError: it asks for experts that no slice has.
        """
        body = wire.unpack_ask(message, self.plan.shape)
        check_ids(body.ids, self.plan.experts)
        reply = partial(self.feed.answer, ticket, layer)
        ask = Waiting(layer, body, self.plan.shape, reply, len(message))
        ask.patience_s = self._patience[0] + self._patience[1] * ask.rows
        self._worker.put(self.id, ticket, ask)

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this ask any more."""
        self._worker.drop(self.id, ticket)

    def drop_asks(self) -> None:
        """Nobody waits for any of its asks any more."""
        self._worker.drop_all(self.id)

    def end(self) -> None:
        """The host is gone."""
        self.drop_asks()
        self.feed.close()


class _Loading:
    """What a handler tells and asks the host of one control connection; a `base.Loading`."""

    def __init__(self, link: Link) -> None:
        self.done = self.total = 0
        self._link = link

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        return await fetch(self._link, layer, offset, take)


class ListeningDuck:
    """A `base.DuckEnd` that listens on one port; `serve` runs until it is cancelled.

    Args:
        listen: HOST:PORT; port 0 lets the system choose.
        ready: called with the address in use once it listens.
        planes: the data planes that hosts may choose from.
        credentials: with a cluster key: only hosts that have it too are served.
    """

    MAX_SESSIONS = 16
    MAX_STRANGERS = 256  # connections that have not said who they are
    GREETING_S = 10.0
    # What somebody who has not shown the key may make us keep, where there is one. A HELLO that has
    # no business here fits, and is told so.
    STRANGE_BYTES = 1 << 14
    # The same where there is none, until HELLO has come: far above the largest.
    GREETING_BYTES = 1 << 16
    # A host pings at least once a second while its event loop turns. One that has been silent for
    # so long keeps its place until another host needs it.
    SILENT_S = 15.0

    def __init__(
        self,
        listen: str,
        ready: Callable[[str], None],
        planes: Sequence[DuckPlane],
        credentials: Credentials | None = None,
    ) -> None:
        self._listen, self._ready, self._credentials = listen, ready, credentials
        self._planes = {plane.name: plane for plane in planes}
        self._greetings = {plane.greeting: plane for plane in planes if plane.greeting}
        self._sessions: dict[int, HostSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[Link, None] = {}  # the oldest first
        self._attach = asyncio.Lock()
        self._attaching: _Loading | None = None  # who has the lock
        self._refusals = Refusals()
        self.evicted = 0  # silent hosts that had to make room

    @property
    def refused(self) -> int:
        """Peers turned away: wrong bytes or none, no key, another version, another plan."""
        return self._refusals.count

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
            server = await self._loop.create_server(self._link, host, port)
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            self._worker.end()
            # asyncio puts its own words, and the address once more, before the system's.
            number = getattr(error, "errno", None) or 0
            why = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
            advice = "choose another port, or 0 for any free one"
            if number == errno.EADDRNOTAVAIL:
                advice = "no interface of this machine has that address"
            raise ConfigError(f"cannot listen on {self._listen}: {why}; {advice}") from error
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

    # strangers

    def _link(self) -> Link:
        return _HostLink(self._opened, judge=self._judge)

    def _judge(self, link: Link, first: bytes) -> Tls | None:
        """Whether a new connection is TLS: control of a host with a key."""
        if not wire.looks_like_tls(first):
            # With a key, no more than a plane's greeting is welcome.
            link.limit(self.STRANGE_BYTES if self._credentials else self.GREETING_BYTES)
            return None
        if self._credentials is None:
            raise WireError(
                "the host uses a key, this duck does not: give both the same --key-file, or none"
            )
        return self._credentials.connection()

    def _opened(self, link: Link) -> None:
        """A new connection. When too many say nothing, the one that did so for longest goes."""
        if len(self._strangers) >= self.MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            self._drop(oldest, "too many connections that say nothing")
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
        """A host's control connection from its first word to its end, or a plane's connection."""
        taken = False
        try:
            message = await link.receive(self.GREETING_S)
            self._strangers.pop(link, None)
            if message["t"] == "HELLO":
                if self._credentials and not link.secure:
                    raise WireError(
                        "this duck uses a key, the host does not: give both the same --key-file"
                    )
                await self._control(link, message)
            elif plane := self._greetings.get(message["t"]):
                plane.greet(link, message)
                taken = True
            else:
                due = " or ".join(["HELLO", *self._greetings])
                raise WireError(f"{message['t'][:40]!r} where {due} was due")
        except TimeoutError:
            self._drop(link, f"said nothing for {self.GREETING_S:.0f} s")
        except TransportError:
            return  # it went away
        except DuckError as error:
            self._refuse(link, str(error))
        finally:
            self._strangers.pop(link, None)
            if not taken:
                link.transport.close()

    def _refuse(self, link: Link, reason: str) -> None:
        """Turn a peer away, and tell it why."""
        self._count(link, reason)
        link.refuse(reason)

    def _drop(self, link: Link, reason: str) -> None:
        """End a connection that nobody speaks on."""
        self._count(link, reason)
        link.abort(reason)

    def _count(self, link: Link, reason: str) -> None:
        unlogged = self._refusals.note(self._loop.time())
        if unlogged is not None:
            more = {"unlogged": unlogged} if unlogged else {}
            _log.warning("refused", peer=link.peer, reason=reason, **more)

    # hosts

    async def _control(self, link: Link, hello: Mapping[str, Any]) -> None:
        """HELLO has come: check it, attach, WELCOME, and listen until the host goes."""
        link.limit(wire.CONTROL_LIMIT)  # layers come in pieces
        version = _common_version(hello)
        session = self._session(link, hello)
        plane = self._plane(hello)
        session.feed = plane.open(session, wire.field(hello, "plane", dict))
        self._sessions[session.id] = session
        why, begun, peer = "this duck ends", self._loop.time(), link.peer
        try:
            plan, duck = session.plan, session.duck
            facts = await self._attach_with_progress(link, plan, duck)
            link.send(
                {
                    "t": "WELCOME",
                    "v": version,
                    "software": SOFTWARE,
                    "nonce": session.nonce,
                    "plane": dict(session.feed.welcome()),
                    "plan_hash": plan.hash(),
                    "slice_hash": plan.slice_hash(duck),
                    "pid": os.getpid(),
                    **facts,
                }
            )
            session.welcomed, session.heard_at = True, self._loop.time()
            while (message := await link.receive())["t"] != "BYE":
                session.heard_at = self._loop.time()
                if message["t"] == "PING":
                    link.send({"t": "PONG"})
            why = "the host said goodbye"
        except DuckError as error:
            why = str(error)
            raise
        finally:
            if self._sessions.get(session.id) is session:  # else it was evicted
                del self._sessions[session.id]
            session.end()
            if session.welcomed:
                counts = {name: count for name, count in session.feed.stats().items() if count}
                _log.info(
                    "session_ended", session=session.id, peer=peer, reason=why,
                    seconds=round(self._loop.time() - begun, 3), **counts,
                )  # fmt: skip

    def _session(self, link: Link, hello: Mapping[str, Any]) -> HostSession:
        """Check all that HELLO says of the host and its plan."""
        number, nonce = wire.field(hello, "session", int), nonce_of(hello)
        if not 0 <= number < 1 << 32:
            raise WireError(f"HELLO: session {number} is no 32-bit number")
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
        if len(self._sessions) >= self.MAX_SESSIONS and not self._evict():
            raise WireError(f"this duck already serves {self.MAX_SESSIONS} hosts")
        if number in self._sessions:
            raise WireError(
                f"this duck serves session {number:#x} already: is its address given twice?"
            )
        held = {s.plan.slice_hash(s.duck) for s in self._sessions.values()}
        if held - {plan.slice_hash(duck)}:
            raise WireError(
                "this duck serves another host with another slice; stop that host first"
            )
        refuse = partial(self._refuse, link)
        keys = None
        if self._credentials:
            secret = wire.field(hello, "ask_secret", bytes)
            keys = SessionKeys(self._credentials.key, nonce, secret)
        return HostSession(number, nonce, keys, plan, duck, patience, self._worker, link, refuse)

    def _plane(self, hello: Mapping[str, Any]) -> DuckPlane:
        name = wire.field(hello, "data", str)
        plane = self._planes.get(name)
        if plane is None:
            raise WireError(
                f"this duck has no transport {name[:20]!r}, it has {', '.join(self._planes)}"
            )
        return plane

    def _evict(self) -> bool:
        """Make room: the session that has been silent for longest ends, if that is long enough."""
        now = self._loop.time()
        attached = [s for s in self._sessions.values() if s.welcomed]
        session = min(attached, key=lambda s: s.heard_at, default=None)
        if session is None or now - session.heard_at < self.SILENT_S:
            return False
        self.evicted += 1
        del self._sessions[session.id]
        silent_s = now - session.heard_at
        _log.warning("evicted", session=session.id, silent_s=silent_s)
        session.control.refuse(
            f"this host said nothing for {silent_s:.0f} s, and another one needed its place"
        )
        return True

    async def _attach_with_progress(self, link: Link, plan: Plan, duck: int) -> Mapping[str, Any]:
        """Attach while telling the host how far it is; ends early when the host goes away."""
        loading = _Loading(link)

        async def attach() -> Mapping[str, Any]:
            async with self._attach:  # two hosts at once load the slice once
                self._attaching = loading
                return await self._handler.attach(plan, duck, loading)

        task = self._loop.create_task(attach())
        try:
            while not task.done():
                watched: list[asyncio.Future[Any]] = [task, link.closed]
                await asyncio.wait(watched, timeout=0.5, return_when="FIRST_COMPLETED")
                if link.closed.done():
                    raise TransportError(link.closed.result())
                if not task.done():
                    # Who waits for another host's load is told how far that one is.
                    shown = self._attaching or loading
                    link.send({"t": "LOADING", "done": shown.done, "total": shown.total})
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, DuckError):
                    await task
            elif not task.cancelled():
                task.exception()  # it may have failed in the turn in which its host went away
        return task.result()


class _HostLink(Link):
    """A duck's end of a connection: it reads no more from a host that does not read its answers."""

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


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
    found = wire.field(hello, "v", list)
    software = wire.plain(wire.field(hello, "software", str), 80)
    if len(found) != 2 or not all(type(v) is int for v in found):
        raise WireError("HELLO: field 'v' must be [lowest, highest]")
    version: int = min(PROTOCOL[1], found[1])
    if version < max(PROTOCOL[0], found[0]):
        raise WireError(
            f"this duck ({SOFTWARE}) speaks protocol {versions()}, the host ({software}) "
            f"speaks {found[0]}..{found[1]}: install the same version on both"
        )
    return version
