"""The control plane, the host's end: who the ducks are, what they hold, whether they live.

One connection a duck carries length-prefixed msgpack: HELLO, LOADING, the layers that the duck
lacks (supply.py), WELCOME, then PING and PONG, so that a duck that computes for long is told apart
from one that is frozen. How asks and answers travel is the business of a `Plane`, which HELLO
names: tcp.py, shm.py. The session's number is the host's choice and the same for all ducks, so an
ask's bytes are the same for all of them too.

When a duck is lost the session is over: asks end with DuckLost, and in the background the host
tries, ever more slowly, to begin a new one with all ducks. It has a new number, new nonces and new
keys, and the plan is agreed on anew, so nothing of the old session counts in it.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import structlog

from duck import __version__, files, wire
from duck.config import is_loopback, split_address
from duck.errors import ConfigError, DuckError, DuckLost, TransportClosed, TransportError, WireError
from duck.placement import Plan
from duck.seal import ASK_SECRET_BYTES, NONCE_BYTES, SessionKeys
from duck.transports.base import ASK_ROW_S, ASK_S, TICK_S, Ask, AskTable, Pin, Rows
from duck.transports.link import Link
from duck.transports.supply import Sender

if TYPE_CHECKING:  # certificates are slow to import, and only needed with a key
    from duck.transports.tls import Credentials

# The versions that this build speaks, lowest and highest; of what is sealed and how, too: ends that
# differ in that would take each other's frames for forged.
PROTOCOL = (3, 3)
SOFTWARE = f"duck {__version__}"
CONNECT_S = 10.0
# A duck that loads says so every half second; so long it may say so without a byte more.
PROGRESS_S = 120.0
# Without any byte from a duck for this many ticks it counts as frozen. Ticks, not seconds: while
# this process itself is held up no tick passes, so a busy host never blames its ducks.
SILENT_TICKS = 12
# A duck that is heard anyway, because it answers, gets a PING every so many ticks, which tells it
# that its host is there; one that was not heard since the last tick gets one at once.
PING_TICKS = 4
# How long a duck that ended its data connection may take to say why.
LAST_WORDS_S = 0.05
# A flock that has lost a duck is gathered again after so long; twice as long from try to try.
RETRY_S, LONGEST_RETRY_S = 0.1, 5.0

# A machine that cannot be reached at all, whatever runs on it.
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Welcome:
    """What one duck agreed to."""

    link: Link  # its control connection
    nonce: bytes  # its own, fresh for this session
    plane: Mapping[str, Any]  # its parameters of the data plane
    facts: Mapping[str, Any]  # all of the message


class Plane(Protocol):
    """The host's end of a data plane, one object for a whole flock.

    It moves asks out and answers in, and completes them in `flock.asks` (an `AskTable`). A duck
    that breaks the plane's rules or is cut off is given up by `flock.asks.lose`.
    """

    @property
    def name(self) -> str:
        """What HELLO calls it."""
        ...

    @property
    def is_private(self) -> bool:
        """Whether nobody else can read or forge what it carries when there is a key.

        Because it seals all of it by `flock.keys`, or because it never leaves this machine.
        """
        ...

    def start(self, flock: FlockTransport) -> None:
        """The plan, the session and the table are known; nobody is connected.

        Called again, after `close`, for the session that follows a loss.
        """
        ...

    def offer(self, duck: int, link: Link) -> Mapping[str, Any]:
        """This plane's parameters for a duck's HELLO, to be sent on this connection."""
        ...

    async def connect(self, duck: int, welcome: Welcome) -> None:
        """Make ready for a duck that has said WELCOME.

        Raises:
            WireError: its parameters make no sense.
            TransportError: it cannot be reached.
        """
        ...

    def send(self, ask: Ask, body: bytes) -> None:
        """Hand an ask to every duck that still lives, before returning.

        Raises:
            TransportError: this session cannot carry it; the ask has failed.
        """
        ...

    def cancel(self, ask: Ask) -> None:
        """A hint to the ducks that have not answered: nobody waits any more."""
        ...

    def forget(self, ask: Ask) -> None:
        """The ask has ended in whatever way; its rows must not be written to from now on.

        Called before they can serve another ask, and before `cancel` if it was cancelled.
        """
        ...

    def tick(self) -> None:
        """Called every `TICK_S`."""
        ...

    def heard(self, duck: int) -> int:
        """Changes with every sign of life that came by this plane."""
        ...

    def stats(self) -> Mapping[str, float]:
        """Counters; "late_answers" are added to the table's."""
        ...

    def close(self) -> None:
        """Give everything back; called once for each `start`, perhaps before `connect`."""
        ...


class FlockTransport:
    """The host's end for ducks at known addresses, over a data plane.

    Args:
        addresses: HOST:PORT of each duck, in duck order.
        plane: how asks and answers travel.
        labels: how errors name each duck.
        progress: called with (duck, bytes done, bytes in all) while ducks load their slices.
        supply: cuts a layer's file for a duck that lacks it: (duck, layer), see `supply.Sender`.
        credentials: with a cluster key: every duck must have it too, and control is inside TLS.
        ended: whether a duck's process is known to have ended: it is not waited for then.

    Raises:
        ConfigError: credentials, and a plane that does not seal.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        plane: Plane,
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        supply: Callable[[int, int], Iterator[memoryview]] | None = None,
        credentials: Credentials | None = None,
        ended: Callable[[int], bool] = lambda _duck: False,
        pin: Pin | None = None,
    ) -> None:
        # Whoever wrote a plane may not have thought of it; whoever gives a key relies on it.
        if credentials and not getattr(plane, "is_private", False):
            raise ConfigError(
                f"--transport {plane.name} does not seal what it carries: leave out --key-file, or "
                "choose another transport"
            )
        self.addresses = tuple(addresses)
        self.labels = tuple(labels or (f"duck {d} ({a})" for d, a in enumerate(addresses)))
        self.plane = plane
        self.session = 0  # drawn anew for each session
        self.sessions = 0  # begun so far
        self.nonce = b""
        self.keys: SessionKeys | None = None  # with credentials: what planes seal their frames by
        self.attached: list[Mapping[str, Any]] = []  # what each duck said in WELCOME
        self._progress, self._supply = progress, supply
        self._credentials, self._ended, self._pin = credentials, ended, pin
        self._links: list[Link] = []  # every connection made for this session
        self._watched: list[tuple[int, Link]] = []  # those whose end is their duck's loss
        self._control: list[Link] = []
        self._table: AskTable | None = None
        self._connected = False  # the plane is started, and perhaps connections are made
        self._mending: asyncio.Task[None] | None = None
        self._random = random.Random()

    async def start(self, plan: Plan) -> None:
        """Shake hands with every duck at once; all of them hold their slices when this returns."""
        assert plan.ducks == len(self.addresses)
        self.plan = plan
        self._table = AskTable(plan, self.labels, self._pin)
        self._table.on_cancel, self._table.on_end = self.plane.cancel, self.plane.forget
        try:
            await self._gather()
        except BaseException:  # also when told to stop
            await self.close()
            raise
        self._table.on_lose = self._mend_soon
        if self._table.lost:  # while others still shook hands
            self._mend_soon()

    async def _gather(self) -> None:
        """Begin a session: its number, nonce and keys, and a handshake with every duck.

        Raises:
            DuckLost, TransportError, WireError, ConfigError: one cannot be reached, is lost or
            refuses; or this machine cannot serve the plane. `_hang_up` is then due.
        """
        plan, asks = self.plan, self.asks
        if self.sessions:
            asks.late_answers += int(self.plane.stats().get("late_answers", 0))
        self.sessions += 1
        self.session, self.nonce = secrets.randbits(32), secrets.token_bytes(NONCE_BYTES)
        if self._credentials:
            secret = secrets.token_bytes(ASK_SECRET_BYTES)
            self.keys = SessionKeys(self._credentials.key, self.nonce, secret)
        self._links, self._watched, self._control = [], [], []
        self._connected = True
        self.plane.start(self)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._attach(duck)) for duck in range(plan.ducks)]
        except BaseExceptionGroup as group_error:
            raise first_error(group_error) from None
        if asks.closed:
            raise TransportClosed("closed while it started")
        welcomes = [task.result() for task in tasks]
        self.attached = [welcome.facts for welcome in welcomes]
        self._control = [welcome.link for welcome in welcomes]
        for duck, link in enumerate(self._control):
            self.watch(link, duck)
        self._heard = [-1] * plan.ducks
        self._silent = [0] * plan.ducks
        self._ticks = 0
        asks.on_tick = self._tick

    def _hang_up(self) -> None:
        """End the session's connections, which tell nobody of it; the second time nothing."""
        if not self._connected:
            return
        self._connected = False
        self.asks.on_tick = None
        for link in self._links:
            link.on_close = None
        for duck, link in enumerate(self._control):
            if duck not in self.asks.lost:
                link.send({"t": "BYE"})
                link.transport.close()  # once BYE is sent
        self.plane.close()
        for link in self._links:
            if not link.transport.is_closing():
                link.abort("closed")

    # after a loss

    def _mend_soon(self) -> None:
        """A duck was lost: see to it that somebody tries to gather the flock again."""
        if self._mending is not None and not self._mending.done():
            return
        if any(map(self._ended, self.asks.lost)):
            return
        self.asks.hope = "; reconnecting"
        self._mending = asyncio.get_running_loop().create_task(self._mend())
        self._mending.add_done_callback(_tell_of_failure)

    async def _mend(self) -> None:
        """Try until all ducks are back in a new session."""
        asks = self.asks
        begun = time.perf_counter()
        for tries in itertools.count(1):
            await asyncio.sleep(retry_s(tries, self._random.random()))
            if any(map(self._ended, asks.lost)):
                asks.hope = ""
                return
            asks.fail_all()
            self._hang_up()
            try:
                await self._gather()
            except (DuckError, OSError) as error:
                self._hang_up()
                if asks.closed:
                    return
                why = str(error) if isinstance(error, DuckError) else error.strerror or str(error)
                asks.hope = f"; reconnecting, try {tries} failed: {why}"
                _log.info("reconnecting", tries=tries, reason=why)
                continue
            asks.reopen()
            for duck, link in self._watched:
                if link.closed.done():  # while the others still shook hands
                    asks.lose(duck, link.closed.result())
            if not asks.lost:
                seconds = time.perf_counter() - begun
                _log.info("reconnected", tries=tries, session=self.session, seconds=seconds)
                return

    # for planes

    @property
    def asks(self) -> AskTable:
        """The asks in flight."""
        assert self._table is not None, "start() comes first"
        return self._table

    def watch(self, link: Link, duck: int) -> None:
        """From now on the duck is lost when this connection ends."""
        self._watched.append((duck, link))
        link.on_close = partial(self._ended_by, link, duck)
        if link.closed.done():  # before we looked
            self.asks.lose(duck, link.closed.result())

    def _ended_by(self, link: Link, duck: int, reason: str) -> None:
        """A watched connection has ended.

        A duck that refuses what came on its data connection says why on its control connection,
        which may be heard a moment later: its end, with those words, is then the reason.
        """
        control = self._control[duck] if self._control else link
        if link is control or link.error:
            self.asks.lose(duck, reason)
            return
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._no_words, link, duck, reason)

    def _no_words(self, link: Link, duck: int, reason: str) -> None:
        if link in self._links:  # else it was of a session that is over
            self.asks.lose(duck, reason)

    def drop(self, duck: int, reason: str) -> None:
        """End a duck's connection, as if it had gone."""
        self._control[duck].abort(reason)

    async def connect(self, duck: int, *, control: bool = False) -> Link:
        """One more connection to a duck's port, in control mode.

        control: it is for control messages, which go inside TLS when there is a key. A plane's own
        connection does not: its greeting is a word used once, and its frames have their own seal.

        Raises:
            DuckLost, TransportError: there is nobody.
        """
        address, label = self.addresses[duck], self.labels[duck]
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        tls = self._credentials.connection() if control and self._credentials else None
        try:
            async with asyncio.timeout(CONNECT_S):
                _, link = await loop.create_connection(lambda: Link(tls=tls), host, port)
        except TimeoutError:
            reason = f"no connection to {address} within {CONNECT_S:.0f} s"
            raise DuckLost(label, None, CONNECT_S * 1e3, reason, index=duck) from None
        except (OSError, ValueError) as error:  # ValueError: a host name that cannot be one
            why = getattr(error, "strerror", None) or error
            raise TransportError(
                f"cannot reach {label}: {why}; {self._advice(address, error)}"
            ) from error
        self._links.append(link)
        return link

    def _advice(self, address: str, error: Exception) -> str:
        """What to do where nobody can be reached."""
        if isinstance(error, socket.gaierror | ValueError):
            return f"check the name in {address}, or give the address in numbers"
        if getattr(error, "errno", None) == errno.EMFILE:
            return files.too_many_open()
        if getattr(error, "errno", None) in _NO_WAY:
            return f"check {address}, and the network between this machine and it"
        start = f"start it with: duck node --listen {address} --model DIR (or --store DIR)"
        if self._credentials:
            return f"{start} --key-file FILE"
        if is_loopback(split_address(address)[0]):
            return start
        return f"{start} --insecure, or better --key-file FILE on both"

    async def expect(self, link: Link, duck: int, *kinds: str) -> dict[str, Any]:
        """The next message of one of these kinds.

        LOADING messages in between are progress, while they progress; silence is a loss.

        Raises:
            DuckLost: it is silent, gone, or stuck while it loads.
            WireError: it refuses, or says something else.
        """
        kind, begun = kinds[0], time.perf_counter()
        shown, moved = -1, begun
        while True:
            try:
                message = await link.receive(CONNECT_S)
            except (TimeoutError, TransportError) as error:
                reason = f"{error} before {kind}"
                if isinstance(error, TimeoutError):
                    reason = f"no {kind} and no sign of life for {CONNECT_S:.0f} s"
                    if kind == "WELCOME" and not link.has_spoken:
                        reason += f"; is {self.addresses[duck]} a duck?"
                raise self._gone(duck, begun, reason) from None
            if message["t"] in kinds:
                return message
            if message["t"] == "ERR":
                text = wire.plain(wire.field(message, "text", str))
                raise WireError(f"{self.labels[duck]} refused: {text}")
            if message["t"] == "HELLO":
                raise wire.Foreign(wire.ECHO)
            if message["t"] != "LOADING":
                raise WireError(
                    f"{self.labels[duck]} sent {message['t'][:40]!r} where {kind} was due"
                )
            done, total = wire.field(message, "done", int), wire.field(message, "total", int)
            now = time.perf_counter()
            if done != shown:
                shown, moved = done, now
            elif now - moved > PROGRESS_S:
                reason = f"it loads, and not a byte more has come for {PROGRESS_S:.0f} s"
                raise self._gone(duck, begun, reason)
            if self._progress:
                self._progress(duck, done, total)

    def _gone(self, duck: int, begun: float, reason: str) -> DuckLost:
        waited_ms = (time.perf_counter() - begun) * 1e3
        return DuckLost(self.labels[duck], None, waited_ms, reason, index=duck)

    # the handshake

    async def _attach(self, duck: int) -> Welcome:
        label = self.labels[duck]
        try:
            return await self._shake_hands(duck)
        except wire.Foreign as error:
            raise WireError(
                f"{label}: {self.addresses[duck]} is not a duck (it answered {error.began})"
            ) from None
        except WireError as error:  # whatever is wrong, say with whom
            text = str(error)
            raise WireError(text if text.startswith(label) else f"{label}: {text}") from None

    async def _shake_hands(self, duck: int) -> Welcome:
        plan, label = self.plan, self.labels[duck]
        link = await self.connect(duck, control=True)
        secret = {"ask_secret": self.keys.ask_secret} if self.keys else {}
        link.send(
            {
                "t": "HELLO",
                **secret,
                "v": list(PROTOCOL),
                "software": SOFTWARE,
                "session": self.session,
                "nonce": self.nonce,
                "plan": plan.to_wire(),
                "plan_hash": plan.hash(),
                "duck": duck,
                "slice_hash": plan.slice_hash(duck),
                "patience": [ASK_S, ASK_ROW_S],
                "data": self.plane.name,
                "plane": dict(self.plane.offer(duck, link)),
            }
        )
        facts = await self._welcome(link, duck)
        version = wire.field(facts, "v", int)
        if not PROTOCOL[0] <= version <= PROTOCOL[1]:
            raise WireError(f"{label} speaks protocol {version}, this host {versions()}")
        for name, want in (("plan_hash", plan.hash()), ("slice_hash", plan.slice_hash(duck))):
            if wire.field(facts, name, str) != want:
                raise WireError(f"{label} answered with another {name.replace('_', ' ')}")
        welcome = Welcome(link, nonce_of(facts), wire.field(facts, "plane", dict), facts)
        await self.plane.connect(duck, welcome)
        return welcome

    async def _welcome(self, link: Link, duck: int) -> dict[str, Any]:
        """Wait for WELCOME; until then the duck may ask for the layers that it lacks."""
        sender = Sender(link, self.plan.layers, partial(self._stream, duck))
        try:
            async with asyncio.TaskGroup() as sending:
                task: asyncio.Task[None] | None = None
                while True:
                    message = await self.expect(link, duck, "WELCOME", "LACK", "GOT")
                    if message["t"] == "LACK":
                        task = sending.create_task(sender.send(message))
                    elif message["t"] == "GOT":
                        sender.got(message)
                    else:
                        if task:
                            task.cancel()  # done, unless the duck is out of its mind
                        return message
        except BaseExceptionGroup as error:
            raise first_error(error) from None

    def _stream(self, duck: int, layer: int) -> Iterator[memoryview]:
        if self._supply is None:
            raise TransportError(
                f"{self.labels[duck]} lacks layer {layer}, and this host has no weights to send"
            )
        return self._supply(duck, layer)

    # asks

    def acquire(self, rows: int = 1) -> Coroutine[Any, Any, Rows]:
        return self.asks.ring.acquire(rows)

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
        """Hand one message to the plane for every duck; see the contract in `base`."""
        asks = self.asks
        ask = asks.open(layer, len(x), ids, rows, deadline)
        try:
            self.plane.send(ask, wire.pack_ask(ids, weights, x))
        except TransportError as error:
            asks.fail(ask, error)
            raise
        return ask

    def _tick(self) -> None:
        """Ping the ducks that are not heard anyway, and count everybody's silence."""
        self.plane.tick()
        self._ticks += 1
        for duck, control in enumerate(self._control):
            heard = control.heard + self.plane.heard(duck)
            self._silent[duck] = 0 if heard != self._heard[duck] else self._silent[duck] + 1
            self._heard[duck] = heard
            if duck in self.asks.lost:
                continue
            if self._silent[duck] >= SILENT_TICKS:
                seconds = SILENT_TICKS * TICK_S
                reason = f"no sign of life for {seconds:.1f} s (frozen or cut off)"
                self.asks.lose(duck, reason)
            if self._silent[duck] or (self._ticks + duck) % PING_TICKS == 0:
                control.send({"t": "PING"})
                control.forget_messages()  # PONGs were signs of life

    def stats(self) -> Mapping[str, float]:
        plane = self.plane.stats()
        late = self.asks.late_answers + plane.get("late_answers", 0)
        return {
            **plane,
            "late_answers": late,
            "rows_free": self.asks.ring.free,
            "sessions": self.sessions,
        }

    async def close(self) -> None:
        """Say BYE and drop the connections; safe to call twice and with asks in flight."""
        if self._table is None:
            return
        self._table.close()
        try:
            if self._mending is not None and not self._mending.done():
                self._mending.cancel()
                await asyncio.wait([self._mending])
        finally:
            self._hang_up()


def retry_s(tries: int, jitter: float) -> float:
    """How long to wait before this try, from 1 on, in seconds.

    jitter: 0 to 1, drawn anew each time: several hosts of one duck should not come together.
    """
    longest = min(LONGEST_RETRY_S, RETRY_S * 2.0 ** min(tries, 32))
    return longest * (1 + jitter) / 2


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    """No error of ours gets lost because nobody waits for the task that met it."""
    if not task.cancelled() and (error := task.exception()):
        _log.error("reconnecting_failed", exc_info=error)


def nonce_of(message: Mapping[str, Any]) -> bytes:
    """The sender's nonce in HELLO or WELCOME.

    Raises:
        WireError: it is not one.
    """
    nonce: bytes = wire.field(message, "nonce", bytes)
    if len(nonce) != NONCE_BYTES:
        raise WireError(f"{message['t']}: nonce of {len(nonce)} bytes, want {NONCE_BYTES}")
    return nonce


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group that says why, not that it was cancelled with the others."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def versions() -> str:
    """The control protocols this build speaks, as text."""
    low, high = PROTOCOL
    return str(low) if low == high else f"{low}..{high}"
