"""UDP as a data plane: one multicast carries an ask to all ducks, answers come back by unicast.

Every interface of the host that ducks are reached through (a `Nic`) has a socket and a group of its
own. Ducks join the group of the interface that their control connection came by. What is lost is
asked for again by `duck.reliable`; this module owns the sockets and the one timer, lays bytes into
rows, and does what the two halves say. Answers of more than a few rows, their asks, and words of
failure go over a TCP connection, as in tcp.py.

At the start the host sends PINGs as large as the interface allows, to the group: a duck whose PONG
of that size comes back is reached in both directions. Otherwise all use 1,500 bytes, or 1,280, and
a duck that does not hear those either is refused by name. From then on a PING every tick is a sign
of life that does not wait for TCP to send again.

Datagrams from anybody but the agreed addresses, of other sessions, or that make no sense are
dropped and counted. No sum contains a row whose message failed its check.

With a cluster key every message is sealed as a whole (sealed.py) before it is cut, and opened when
all of it is there: a forged datagram can spoil a message, which then comes again, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import structlog

from duck import wire
from duck.config import MAX_MTU, MIN_MTU, Network, group_address
from duck.errors import ConfigError, DuckError, TransportError, WireError
from duck.kernels import library
from duck.reliable import EVERYONE, Cut, DuckHalf, HostHalf, Lost, Run, Send
from duck.seal import Opener, Sealer, open_answers, overhead
from duck.transports.base import SMALL_ROWS, Ask
from duck.transports.control import FlockTransport, Welcome
from duck.transports.datagrams import (
    Address,
    Interface,
    UdpSocket,
    interface_named,
    interface_with,
    too_small,
)
from duck.transports.link import Link
from duck.transports.listen import HostSession
from duck.transports.receive import Arriving, Receiver
from duck.transports.sealed import message_head
from duck.transports.tcp import TcpDuckPlane, TcpFeed, TcpPlane
from duck.transports.timer import Timer
from duck.transports.trains import (
    ETHERNET_MTU,
    TUNNEL_MTU,
    ipv4,
    lay,
    message_room,
    note,
    note_payload,
    parts,
    runs,
    sealed,
    verified,
)

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

_log = structlog.get_logger(__name__)

# Event loops may have a clock that counts milliseconds (uvloop): too coarse for the times of a LAN.
_clock = time.perf_counter

# How long a duck may take to answer PINGs of a size before a smaller one is tried, or it is
# refused: switches take a moment to learn who has joined a group.
_TRY_S, _LAST_TRY_S = 0.5, 4.0
_PING_S = 0.02  # between the first two PINGs; then twice as long, and so on
# So many asks in a row of which a duck got nothing by multicast: its owner should know. They reach
# it all the same, one by one.
_MISSED = 50
# What a host says in a single datagram.
_FROM_HOST = frozenset({wire.Kind.PING, wire.Kind.NACK, wire.Kind.CANCEL})
# Room in the receive buffer: so many times the most that one ask makes arrive at once.
_ROOM = 4


# --- the host's end


class Nic:
    """One interface of the host: its socket, its group, and the ducks behind it.

    Args:
        interface: which.
        group: GROUP or GROUP:PORT; "": one is drawn.
        receive_bytes: for the receive buffer.
        make_socket: takes the arguments of a `UdpSocket`.

    Raises:
        TransportError: the system refuses, or gives too small a buffer.
    """

    def __init__(
        self,
        interface: Interface,
        group: str,
        receive_bytes: int,
        make_socket: Callable[..., UdpSocket] = UdpSocket,
    ) -> None:
        here = interface.address
        try:
            # Looped back, because ducks may run on this very machine.
            self.socket = make_socket(
                (here, 0), interface=here, loop=True, receive_bytes=receive_bytes
            )
        except OSError as error:
            raise TransportError(
                f"no UDP on interface {interface.name} ({here}): {error.strerror}"
            ) from error
        if (found := self.socket.receive_bytes) < receive_bytes:
            self.socket.close()
            raise TransportError(too_small(found, receive_bytes))
        # A group of the local scope (RFC 2365) that is unlikely to be anybody else's. The port is
        # ours on this address, so no other host on this machine has both.
        low = secrets.randbits(16)
        where, port = group_address(group or f"239.255.{low >> 8}.{low & 255}")
        self.group: Address = (where, port or self.socket.address[1])
        self.interface = interface
        self.ducks: list[int] = []


class MulticastPlane:
    """A `control.Plane`: the host's end.

    Args:
        network: which interfaces, groups and packets to use.
        make_socket: makes the host's sockets; for tests, see `faulty.FaultyUdpSocket`.

    Raises:
        ConfigError: an interface that cannot be used.
    """

    name = "multicast"
    is_private = True

    def __init__(
        self,
        network: Network | None = None,
        make_socket: Callable[..., UdpSocket] = UdpSocket,
    ) -> None:
        network = network or Network()
        groups = network.groups or ("",) * len(network.interfaces)
        pairs = zip(network.interfaces, groups, strict=True)
        self._chosen = {(nic := interface_named(name)).address: (nic, at) for name, at in pairs}
        self._mtu = network.mtu
        self._make_socket = make_socket
        self._tcp = TcpPlane(SMALL_ROWS)

    def start(self, flock: FlockTransport) -> None:
        self._flock, self._closed = flock, False
        self._nics: dict[str, Nic] = {}  # by the interface's address
        self._receiver: Receiver | None = None  # once all agree on how answers are cut
        self._loop = asyncio.get_running_loop()
        plan = flock.plan
        self._small = min(SMALL_ROWS, plan.shape.max_rows)
        self._cut = Cut.for_mtu(self._mtu or ETHERNET_MTU)
        self._half = HostHalf(plan.ducks, self._cut)
        self._ducks: dict[Address, int] = {}
        self._addresses: dict[int, Address] = {}
        self._nic_of: dict[int, Nic] = {}
        self._trains: dict[int, tuple[bytes, int]] = {}  # ticket -> its datagrams, its layer
        # With a key: what seals all that is for every duck, and NACKs for one; what opens answers.
        self._sealer = Sealer(flock.keys.to_all(self.name)) if flock.keys else None
        self._sealers: dict[int, Sealer] = {}
        self._openers: dict[int, Opener] = {}
        self._tag_bytes = overhead(wire.Kind.ANSWER) if flock.keys else 0
        # Of an answer to a small ask, as it travels.
        self._largest = wire.STAMP_BYTES + plan.shape.answer_bytes(self._small) + self._tag_bytes
        # Sealed answers are put together here.
        self._arriving = Arriving(self._openers, plan.ducks, self._largest)
        self._heard = [0] * plan.ducks
        self._warned: set[int] = set()  # ducks that multicasts do not reach
        self._agreed: asyncio.Future[None] = self._loop.create_future()
        self._pinged: dict[int, float] = {}  # numbers of the last PINGs, and when they were sent
        self._pongs: set[tuple[int, int]] = set()  # (number, duck), while sizes are tried
        self._ponged = asyncio.Event()
        self._next_ping = 0
        self._timer = Timer(self._wake)
        self._wakes_at = math.inf  # when it does
        self.strangers = 0  # datagrams from unknown addresses
        self.malformed = 0  # datagrams that make no sense
        self._tcp.start(flock)
        # What covers answers is settled now, whatever is loaded while ducks shake hands; a receiver
        # knows no checksum but this one.
        self._natively = flock.keys is not None or self._tcp.checksum is library.crc32c

    # connecting

    def offer(self, duck: int, link: Link) -> Mapping[str, Any]:
        """Where to listen, and where the answers go."""
        nic = self._nic(duck, link)
        self._nic_of[duck] = nic
        nic.ducks.append(duck)
        return {
            **self._tcp.offer(duck, link),
            "group": nic.group[0],
            "port": nic.group[1],
            "answers": nic.socket.address[1],
        }

    def _nic(self, duck: int, link: Link) -> Nic:
        """The interface that this duck is reached through, with its socket."""
        here = ipv4(link.transport.get_extra_info("sockname"))
        label = self._flock.labels[duck]
        if here is None:
            raise TransportError(f"multicast needs IPv4, and {label} has another address")
        if nic := self._nics.get(here):
            return nic
        if here in self._chosen:
            interface, group = self._chosen[here]
        elif self._chosen:
            chosen = ", ".join(interface.name for interface, _ in self._chosen.values())
            raise TransportError(
                f"{label} is reached through {here}, which is not on {chosen}; "
                "add its interface to [host] interface"
            )
        else:
            interface, group = interface_with(here), ""
        nic = self._nics[here] = Nic(interface, group, self._receive_bytes(), self._make_socket)
        nic.socket.listen(partial(self._readable, nic))
        return nic

    def _receive_bytes(self) -> int:
        """Room for what all ducks send at once: the answers of one small ask, several times."""
        shape = self._flock.plan.shape
        message = wire.STAMP_BYTES + shape.answer_bytes(self._small)
        return _ROOM * self._flock.plan.ducks * message_room(message)

    async def connect(self, duck: int, welcome: Welcome) -> None:
        """Open the duck's TCP connection, and once all ducks are there, try the network."""
        await self._tcp.connect(duck, welcome)
        port = wire.field(welcome.plane, "port", int)
        there = ipv4(welcome.link.transport.get_extra_info("peername"))
        if not 0 < port < 65536 or there is None:
            raise WireError(f"{self._flock.labels[duck]} answered with UDP port {port}")
        address = (there, port)
        if address in self._ducks:
            raise WireError(f"{self._flock.labels[duck]} has the UDP port of another duck")
        if keys := self._flock.keys:
            self._sealers[duck] = Sealer(keys.to_duck(self.name, duck, welcome.nonce))
            self._openers[duck] = Opener(keys.to_host(self.name, duck, welcome.nonce))
        self._ducks[address] = duck
        self._addresses[duck] = address
        if len(self._ducks) == self._flock.plan.ducks:
            await self._agree()
            self._agreed.set_result(None)
        else:
            await self._agreed

    async def _agree(self) -> None:
        """Find the largest datagrams that every duck gets and sends; tell them the cut."""
        smallest = min((nic.interface for nic in self._nics.values()), key=lambda one: one.mtu)
        if self._mtu and self._mtu > smallest.mtu:
            raise TransportError(
                f"flock.toml: [host] mtu {self._mtu} is more than the {smallest.mtu} bytes that "
                f"interface {smallest.name} sends: choose less, leave it out, or run: "
                f"ip link set {smallest.name} mtu {self._mtu}"
            )
        mtu = self._mtu or smallest.mtu
        if mtu < MIN_MTU:
            raise TransportError(
                f"interface {smallest.name} sends packets of {mtu} bytes at most, want {MIN_MTU}; "
                f"run: ip link set {smallest.name} mtu {ETHERNET_MTU}, or use --transport tcp"
            )
        smaller = () if self._mtu else (ETHERNET_MTU, TUNNEL_MTU)
        tries = [mtu, *(size for size in smaller if size < mtu)]
        silent: set[int] = set()
        for size in tries:
            cut, last = Cut.for_mtu(size), size == tries[-1]
            silent = await self._reach(cut, 0, _LAST_TRY_S if last else _TRY_S)
            if not silent:
                silent = await self._reach(cut, cut.payload_bytes, _LAST_TRY_S)
            if not silent:
                self._cut = cut
                self._half = HostHalf(self._flock.plan.ducks, cut)
                if self._natively and all(nic.socket.collects for nic in self._nics.values()):
                    self._receive_natively(cut)
                return
        duck = min(silent)
        nic = self._nic_of[duck]
        sizes = " or ".join(str(min(size, MAX_MTU)) for size in tries)
        raise TransportError(
            f"{self._flock.labels[duck]} answers on TCP, but no UDP packet of {sizes} bytes went "
            f"to group {nic.group[0]} on {nic.interface.name} and back in {_LAST_TRY_S:.0f} s: let "
            "UDP pass the firewalls and multicast pass the switches; if a cable on the way carries "
            f"less, set mtu ({MIN_MTU} or more) under [host] in flock.toml; or use --transport tcp"
        )

    def _receive_natively(self, cut: Cut) -> None:
        flock = self._flock
        self._receiver = receiver = Receiver(
            flock.session, flock.plan.ducks, check=flock.keys is None,
            payload_bytes=cut.payload_bytes,
        )  # fmt: skip
        for duck, address in self._addresses.items():
            receiver.add_sender(duck, address)
        for nic in self._nics.values():
            nic.socket.deafen()
            receiver.add_socket(nic.socket.socket.fileno())
        self._loop.add_reader(receiver.descriptor, self._collect)

    async def _reach(self, cut: Cut, use: int, patience_s: float) -> set[int]:
        """PING all ducks with datagrams of this size until each has answered; who has not."""
        silent = set(self._addresses)
        give_up = _clock() + patience_s
        wait_s = _PING_S
        numbers: set[int] = set()
        while silent and (left := give_up - _clock()) > 0:
            for nic in self._nics.values():
                behind = silent.intersection(nic.ducks)
                # To all at first; then by name, so that nobody answers twice.
                for duck in [wire.HOST] if len(behind) == len(nic.ducks) else behind:
                    numbers.add(self._ping(nic, duck, use, cut.payload_bytes))
            next_try = _clock() + min(wait_s, left)
            wait_s *= 2
            while silent and (left := next_try - _clock()) > 0:
                self._ponged.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._ponged.wait()
                silent -= {duck for number, duck in self._pongs if number in numbers}
        self._pongs.clear()
        return silent

    def _ping(self, nic: Nic, duck: int, use: int, size: int) -> int:
        """PING one duck or all (`wire.HOST`) behind an interface; the PING's number.

        size: of the datagram's payload.
        """
        self._next_ping = number = (self._next_ping + 1) & 0xFFFFFFFF
        self._pinged[number] = _clock()
        if len(self._pinged) > 1024:
            del self._pinged[next(iter(self._pinged))]
        if self._sealer:
            size -= overhead(wire.Kind.PING)
        ping = wire.pack_ping(duck, use, size)
        self._note(nic, nic.group, wire.Kind.PING, number, 0, ping, self._sealer)
        return number

    def _note(
        self,
        nic: Nic,
        to: Address,
        kind: wire.Kind,
        ticket: int,
        layer: int,
        payload: bytes,
        sealer: Sealer | None,
    ) -> None:
        """One small message in one datagram."""
        session = self._flock.session
        data = note(sealer, kind, session, ticket, layer, wire.HOST, payload)
        nic.socket.send(data, len(data), to)

    # asks

    def send(self, ask: Ask, body: bytes) -> None:
        if ask.count > self._small:
            self._tcp.send(ask, body)
            return
        cut, session, kind = self._cut, self._flock.session, wire.Kind.ASK
        message = sealed(self._sealer, kind, session, ask.ticket, ask.layer, body)
        train = wire.datagrams(
            kind, session, ask.ticket, ask.layer, wire.HOST, message, cut.payload_bytes,
            self._tcp.checksum,
        )  # fmt: skip
        self._trains[ask.ticket] = (train, ask.layer)
        answer = ask.answer_bytes + self._tag_bytes
        if self._receiver:  # before the first answer can come
            place, stride = ask.rows.address, ask.rows.stride
            if self._sealer:
                place, stride = self._arriving.take(ask.ticket), self._arriving.stride
            waiting = self._receiver.open(ask, answer, cut.fragments(answer), place, stride)
            if waiting and self._sealer:
                waiting.landings = self._arriving.landings(ask, 0, answer)
        for nic in self._nics.values():
            nic.socket.send(train, cut.datagram_bytes, nic.group)
        self._half.open(ask.ticket, ask.layer, len(message), answer, _clock())
        self._arm()

    def cancel(self, ask: Ask) -> None:
        if ask.count > self._small:
            self._tcp.cancel(ask)
            return
        for nic in self._nics.values():
            self._note(nic, nic.group, wire.Kind.CANCEL, ask.ticket, ask.layer, b"", self._sealer)

    def forget(self, ask: Ask) -> None:
        if ask.count > self._small:
            self._tcp.forget(ask)
            return
        ticket = ask.ticket
        if self._receiver:
            self._receiver.forget(ticket)
        self._half.close(ticket)
        self._trains.pop(ticket, None)
        self._arriving.give_back(ticket)

    # receiving

    def _readable(self, nic: Nic) -> None:
        """A socket has something, and nothing native to receive it."""
        now = _clock()
        self._take(nic.socket.drain(), now)
        self._settle(now)

    def _collect(self) -> None:
        """Take what was received natively."""
        assert self._receiver
        now = _clock()
        events, trains = self._receiver.collect()
        good: dict[int, dict[int, float]] = {}
        for ticket, duck, what, _, bits, at in events:
            if what == library.MESSAGE_GOOD:
                if ticket in good:
                    good[ticket][duck] = at
                else:
                    good[ticket] = {duck: at}
            elif not self._receiver.get(ticket):  # it ended after they came
                continue
            elif what == library.EVENT_DOUBLED:
                self._half.doubled(duck, ticket, bits)
            else:
                self._half.landed(duck, ticket, bits, at)
                if what == library.MESSAGE_BAD:
                    self._failed(duck, ticket, now)
        for ticket, came in good.items():
            if waiting := self._receiver.get(ticket):
                self._half.landed_whole(ticket, came)
                if self._sealer:
                    ask = waiting.ask
                    head = message_head(
                        wire.Kind.ANSWER, self._flock.session, ticket, ask.layer,
                        ask.answer_bytes + self._tag_bytes,
                    )  # fmt: skip
                    heads = itertools.repeat(head)
                    for duck in open_answers(heads, waiting.landings, came):
                        del came[duck]
                        self._failed(duck, ticket, now)
                self._arrived(waiting.ask, came, came.values())
        self._take(trains, now)
        self._settle(now)

    def _take(self, trains: Iterable[tuple[memoryview, int, Address]], now: float) -> None:
        """Datagrams of whatever kind and origin."""
        for train, size, sender in trains:
            duck = self._ducks.get(sender)
            if duck is None:
                self.strangers += 1
                continue
            try:
                self._received(duck, train, size, now)
            except WireError:
                self.malformed += 1

    def _settle(self, now: float) -> None:
        self._do(self._half.settle(now))
        self._do(self._half.due(now))
        self._arm()

    def _failed(self, duck: int, ticket: int, now: float) -> None:
        """An answer is whole, and is not the one that was sent."""
        self._half.failed(duck, ticket, now)
        if self._receiver:
            self._receiver.again(ticket, duck)

    def _received(self, duck: int, train: memoryview, size: int, now: float) -> None:
        for run, data in runs(train, size):
            head = run.header
            if head.session != self._flock.session or head.source != duck:
                raise WireError(f"a datagram of session {head.session:#x}, duck {head.source}")
            if head.kind == wire.Kind.ANSWER:
                self._answer(duck, run, data, size, now)
                continue
            payload = note_payload(head, data, self._openers.get(duck))
            self._heard[duck] += 1
            if head.kind == wire.Kind.RNACK:
                self._half.rnack(duck, head, payload, now)
                if self._half.missed[duck] == _MISSED and duck not in self._warned:
                    self._warned.add(duck)
                    _log.warning(
                        "multicasts_do_not_arrive", duck=self._flock.labels[duck],
                        group=self._nic_of[duck].group[0],
                        remedy="enable an IGMP querier on the switch, or turn IGMP snooping off",
                    )  # fmt: skip
            elif head.kind == wire.Kind.PONG:
                sent_at = self._pinged.get(head.ticket)
                if sent_at is not None:
                    self._half.echoed(duck, now - sent_at)
                if not self._agreed.done():
                    self._pongs.add((head.ticket, duck))
                    self._ponged.set()
            else:
                raise WireError(f"a duck sent {head.kind.name}")

    def _answer(self, duck: int, run: Run, data: memoryview, size: int, now: float) -> None:
        head = run.header
        if self._receiver and self._receiver.get(head.ticket):
            raise WireError(f"fragments that ask {head.ticket} does not have")
        if not self._half.answer(duck, run, now):
            return
        ask = self._flock.asks.open_asks[head.ticket]
        row = place = ask.rows.landing[duck]
        if self._sealer:
            self._arriving.take(ask.ticket)
            place = self._arriving.of(ask.ticket, duck)
        lay(data, size, place, run)
        if not self._half.missing(duck, head.ticket):
            message = place[: head.message_bytes]
            if verified(self._openers.get(duck), head, message, row, self._tcp.checksum):
                self._arrived(ask, (duck,), (now,))
            else:
                self._failed(duck, head.ticket, now)

    def _arrived(self, ask: Ask, ducks: Collection[int], at: Iterable[float]) -> None:
        """These ducks' answers lie in their rows, and are those that were sent."""
        for duck in ducks:
            self._heard[duck] += 1
        self._flock.asks.arrived_whole(ask, ducks, at)

    def _do(self, sends: Sequence[Send | Lost]) -> None:
        for send in sends:
            if isinstance(send, Lost):
                self._flock.asks.lose(
                    send.duck,
                    "it gave no sign by UDP for long, though its TCP connection lives: "
                    "is UDP blocked on the way?",
                )
                continue
            held = self._trains.get(send.ticket)
            if held is None:
                continue
            train, layer = held
            if send.kind == wire.Kind.ASK:
                nics = (
                    list(self._nics.values())
                    if send.duck == EVERYONE
                    else [self._nic_of[send.duck]]
                )
                for nic in nics:
                    to = nic.group if send.duck == EVERYONE else self._addresses[send.duck]
                    for part in parts(train, self._cut.datagram_bytes, send.fragments or 0):
                        nic.socket.send(part, self._cut.datagram_bytes, to)
            else:
                ask = self._flock.asks.open_asks.get(send.ticket)
                if ask is None:
                    continue
                fragments = self._cut.fragments(ask.answer_bytes + self._tag_bytes)
                payload = wire.pack_missing(send.fragments or 0, fragments)
                self._note(
                    self._nic_of[send.duck], self._addresses[send.duck], send.kind, send.ticket,
                    layer, payload, self._sealers.get(send.duck),
                )  # fmt: skip

    # time

    def _arm(self) -> None:
        """See to it that `_wake` is called when the half has something to say."""
        wake_at = self._half.wake_at
        if self._closed or self._wakes_at <= wake_at:
            return
        self._wakes_at = wake_at
        self._timer.start(wake_at - _clock())

    def _wake(self) -> None:
        self._wakes_at = math.inf
        # What lies in the socket already is not late: it is taken before who is late is asked.
        if self._receiver:
            self._collect()
            return
        now = _clock()
        for nic in self._nics.values():
            self._take(nic.socket.drain(), now)
        self._settle(now)

    def tick(self) -> None:
        for nic in self._nics.values():
            self._ping(nic, wire.HOST, self._cut.payload_bytes, wire.PING_BYTES)

    def heard(self, duck: int) -> int:
        return self._tcp.heard(duck) + self._heard[duck]

    def stats(self) -> Mapping[str, float]:
        """Counters as `reliable.Counts`, and those of all sockets together."""
        counts: dict[str, float] = dict(self._half.counts.to_dict())
        long = self._tcp.stats()
        counts["late_answers"] += long["late_answers"]
        sockets = [nic.socket for nic in self._nics.values()]
        for name in ("calls", "datagrams", "send_calls", "unsent"):
            counts[name] = sum(getattr(sock, name) for sock in sockets)
        counts["calls"] += long["calls"]
        if self._receiver:
            counts["calls"] += self._receiver.receptions
            counts["datagrams"] += self._receiver.datagrams
        return {
            **counts,
            "strangers": self.strangers,
            "malformed": self.malformed,
            "payload_bytes": self._cut.payload_bytes,
            "sends_trains": all(sock.sends_trains for sock in sockets),
            "receives_trains": all(sock.receives_trains for sock in sockets),
        }

    def close(self) -> None:
        self._closed = True
        self._timer.close()
        if not self._agreed.done():
            self._agreed.cancel()
        if self._receiver:
            self._loop.remove_reader(self._receiver.descriptor)
            self._receiver.close()  # before its sockets
            self._receiver = None
        for nic in self._nics.values():
            nic.socket.close()
        self._tcp.close()


class MulticastTransport(FlockTransport):
    """The host's end for ducks at known addresses, with asks by multicast."""

    def __init__(
        self,
        addresses: Sequence[str],
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        supply: Callable[[int, int], Iterator[memoryview]] | None = None,
        credentials: Credentials | None = None,
        *,
        plane: MulticastPlane | None = None,
    ) -> None:
        plane = plane or MulticastPlane()
        super().__init__(addresses, plane, labels, progress, supply, credentials)


# --- the duck's end


class MulticastDuckPlane:
    """A `listen.DuckPlane`; its sessions have TCP connections too, which are `tcp`'s to greet."""

    name = "multicast"
    greeting = ""

    def __init__(self, tcp: TcpDuckPlane) -> None:
        self._tcp = tcp

    def open(self, session: HostSession, offer: Mapping[str, Any]) -> MulticastFeed:
        where = Where.of(session, offer)
        return MulticastFeed(session, self._tcp.open(session, offer), where)

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        raise WireError("no connection begins like that")


class Where(NamedTuple):
    """The addresses of one session."""

    here: str  # of this duck, as its host reaches it
    host: Address  # where asks come from and answers go
    group: Address

    @classmethod
    def of(cls, session: HostSession, offer: Mapping[str, Any]) -> Where:
        """Those that a host offers. Its own address is the one that it connected from.

        Raises:
            WireError: they make no sense.
        """
        named = {"t": "HELLO", **offer}
        group, port = wire.field(named, "group", str), wire.field(named, "port", int)
        answers = wire.field(named, "answers", int)
        try:
            group_address(f"{group}:{port}")
        except ConfigError as error:
            raise WireError(f"HELLO: {error}") from None
        if not 0 < answers < 65536:
            raise WireError(f"HELLO: UDP port {answers}")
        transport = session.control.transport
        here = ipv4(transport.get_extra_info("sockname"))
        host = ipv4(transport.get_extra_info("peername"))
        if here is None or host is None:
            raise WireError("multicast needs IPv4: give this duck's IPv4 address")
        return cls(here, (host, answers), (group, port))


class MulticastFeed:
    """A `listen.Feed`: one host's asks from its group, and answers back to its socket."""

    def __init__(self, session: HostSession, tcp: TcpFeed, where: Where) -> None:
        self.strangers = 0  # datagrams from others than the host
        self.malformed = 0  # datagrams that make no sense
        self._session, self._tcp, self._where = session, tcp, where
        self.checksum = tcp.checksum
        self._loop = asyncio.get_running_loop()
        self._small = min(SMALL_ROWS, session.plan.shape.max_rows)
        self._half: DuckHalf | None = None  # once the host has said how messages are cut
        self._cut = Cut.for_mtu(ETHERNET_MTU)
        self._kept: dict[int, tuple[bytes, int]] = {}  # ticket -> the answer's datagrams, its layer
        self._sockets: list[UdpSocket] = []
        # Answers are sealed in the worker's thread, notes in the loop's: kinds of their own.
        self._sealer: Sealer | None = None
        self._openers: dict[wire.Kind, Opener] = {}
        if keys := session.keys:
            name, duck = MulticastDuckPlane.name, session.duck
            self._sealer = Sealer(keys.to_host(name, duck, session.nonce))
            to_all, to_us = (
                Opener(keys.to_all(name)),
                Opener(keys.to_duck(name, duck, session.nonce)),
            )
            kinds = wire.Kind
            self._openers = {
                kinds.ASK: to_all, kinds.CANCEL: to_all, kinds.PING: to_all, kinds.NACK: to_us,
            }  # fmt: skip

    def welcome(self) -> Mapping[str, Any]:
        """Join the group.

        Raises:
            ConfigError: the system refuses, or gives too small a buffer.
        """
        here, _, group = self._where
        needed = _ROOM * message_room(self._session.plan.shape.ask_bytes(self._small))
        try:
            for address, joined in (((here, 0), ""), (group, group[0])):
                self._sockets.append(
                    UdpSocket(address, interface=here, group=joined, receive_bytes=needed)
                )
        except OSError as error:
            raise ConfigError(
                f"cannot join group {group[0]} port {group[1]} on {here}: {error.strerror}"
            ) from error
        for sock in self._sockets:
            if sock.receive_bytes < needed:
                raise ConfigError(f"on this duck {too_small(sock.receive_bytes, needed)}")
            sock.listen(partial(self._readable, sock))
        return {**self._tcp.welcome(), "port": self._sockets[0].address[1]}

    def stats(self) -> Mapping[str, float]:
        """Counters as `reliable.Counts`, and of datagrams that were not the host's."""
        counts = self._half.counts.to_dict() if self._half else {}
        return {
            **counts, "strangers": self.strangers, "malformed": self.malformed,
        }  # fmt: skip

    def close(self) -> None:
        self._tcp.close()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    # receiving

    def _readable(self, sock: UdpSocket) -> None:
        now = _clock()
        for train, size, sender in sock.drain():
            if sender != self._where.host:
                self.strangers += 1
                continue
            try:
                self._received(train, size, now)
            except WireError:
                self.malformed += 1
        if self._half:
            for layer, send in self._half.settle(now):
                self._do(layer, send)

    def _received(self, train: memoryview, size: int, now: float) -> None:
        for run, data in runs(train, size):
            head = run.header
            if head.session != self._session.id or head.source != wire.HOST:
                raise WireError(f"a datagram of session {head.session:#x}, from {head.source}")
            if head.kind == wire.Kind.ASK:
                if self._half:
                    self._ask(self._half, run, data, size, now)
                continue
            if head.kind not in _FROM_HOST:
                raise WireError(f"a host sent {head.kind.name}")
            payload = note_payload(head, data, self._openers.get(head.kind))
            if head.kind == wire.Kind.PING:
                self._ping(head, payload)
            elif self._half is None:
                continue
            elif head.kind == wire.Kind.NACK:
                send = self._half.nack(head, payload, now)
                if send:
                    self._do(head.layer, send)
            else:
                self._half.cancel(head.ticket)
                self._session.cancel(head.ticket)

    def _ask(self, half: DuckHalf, run: Run, data: memoryview, size: int, now: float) -> None:
        head = run.header
        place = half.ask(run, now)
        if place is None:
            return
        lay(data, size, place, run)
        message = half.take(head.ticket)
        if message is None:
            return
        body = message
        opener = self._openers.get(head.kind)
        if opener:
            body = memoryview(bytearray(len(message) - overhead(head.kind)))
        if not verified(opener, head, message, body, self.checksum):
            half.failed(head)
            return
        self._session.check(head.layer, len(body))
        half.took(head)
        try:
            self._session.ask(head.ticket, head.layer, body)
        except WireError:
            half.cancel(head.ticket)
            raise

    def _ping(self, head: wire.Header, payload: bytes) -> None:
        duck, use = wire.unpack_ping(payload)
        if duck not in (wire.HOST, self._session.duck):
            return
        if use and self._half is None:
            plan = self._session.plan
            more = overhead(wire.Kind.ASK) if self._sealer else 0
            sizes = {plan.shape.ask_bytes(rows) + more for rows in range(1, self._small + 1)}
            self._cut = Cut.agreed(use)
            self._half = DuckHalf(self._cut, sizes, frozenset(plan.layers))
        elif use and use != self._cut.payload_bytes:
            raise WireError(f"datagrams of {use} bytes, {self._cut.payload_bytes} were agreed")
        self._note(wire.Kind.PONG, head.ticket, 0, payload)

    # sending

    def answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        """In the worker's thread: make an answer's datagrams and hand them to the loop."""
        if isinstance(answer, DuckError) or len(answer) > self._small:
            self._tcp.answer(ticket, layer, answer, stamps)
            return
        kind, session, duck = wire.Kind.ANSWER, self._session.id, self._session.duck
        body = stamps + answer.tobytes()
        try:
            message = sealed(self._sealer, kind, session, ticket, layer, body)
        except TransportError as error:  # answered twice: no bug may end the thread, or be sealed
            self._loop.call_soon_threadsafe(self._session.refuse, str(error))
            return
        train = wire.datagrams(
            kind, session, ticket, layer, duck, message, self._cut.payload_bytes,
            self.checksum,
        )  # fmt: skip
        with contextlib.suppress(RuntimeError):  # the loop ended while we computed
            self._loop.call_soon_threadsafe(self._answered, ticket, layer, train, len(message))

    def _answered(self, ticket: int, layer: int, train: bytes, nbytes: int) -> None:
        if not self._sockets or self._half is None:
            return
        self._sockets[0].send(train, self._cut.datagram_bytes, self._where.host)
        self._kept[ticket] = (train, layer)
        for gone in self._half.answered(ticket, nbytes):
            self._kept.pop(gone, None)

    def _do(self, layer: int, send: Send) -> None:
        assert self._half is not None
        if send.kind == wire.Kind.ANSWER:
            train, _ = self._kept[send.ticket]
            size = self._cut.datagram_bytes
            for part in parts(train, size, send.fragments or 0):
                self._sockets[0].send(part, size, self._where.host)
            return
        payload = b""
        if send.fragments is not None:
            payload = wire.pack_missing(send.fragments, self._half.ask_fragments(send.ticket))
        self._note(wire.Kind.RNACK, send.ticket, layer, payload)

    def _note(self, kind: wire.Kind, ticket: int, layer: int, payload: bytes) -> None:
        """One small message in one datagram."""
        session = self._session
        data = note(self._sealer, kind, session.id, ticket, layer, session.duck, payload)
        self._sockets[0].send(data, len(data), self._where.host)
