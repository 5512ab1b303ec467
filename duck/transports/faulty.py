"""A bad network, by seed: what tests and benches put between a host and its ducks.

`Faults` is the core: messages go in with a time and come out late, twice, in another order, changed
or never. It is pure, so a datagram transport can put its datagrams through it as they are.

Around the data planes that do not lose (tcp, shm, and the loopback) a fault means this:

    delay, reorder  an ask leaves, or a verified answer is noted, later than it could have been
    duplicate       an answer is noted twice
    drop            an ask is never sent, or an answer never noted: those transports trust the
                    system never to do that, so the ask's deadline passes and a duck is lost
    corrupt         one bit of an answer changes on its way (tcp: in the bytes received, shm: in the
                    duck's place); its check must notice, and the duck is lost
    kill            a duck's control connection ends

So delays, new orders and duplicates must not be noticed at all, and the others must be loud.

Around the datagrams of the multicast transport (`FaultyUdpSocket`) all of them are what a network
does to packets, and none may be noticed.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from typing import Any, Generic, TypeVar

from duck import wire
from duck.transports.base import Ask, AskTable
from duck.transports.control import FlockTransport, Plane, Welcome
from duck.transports.datagrams import Address, UdpSocket
from duck.transports.link import Frames, Link
from duck.transports.shm import HostSlot, ShmPlane
from duck.transports.tcp import TcpPlane

Message = TypeVar("Message")

# A message that is overtaken waits for so many others, or for so long when none come.
_OVERTAKEN_BY = 3
_OVERTAKEN_S = 0.002


class Faults(Generic[Message]):
    """Messages in, some messages out; the same ones for the same seed, calls and times.

    Args:
        seed: of every choice.
        drop, duplicate, reorder, corrupt: the share of messages, 0 to 1, that are lost, come twice,
            are overtaken by others, or have one bit changed.
        delay_s: every message takes a random time of up to so many seconds.
        spoil: changes a message; needed for `corrupt` when messages are not bytes.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        drop: float = 0.0,
        duplicate: float = 0.0,
        reorder: float = 0.0,
        delay_s: float = 0.0,
        corrupt: float = 0.0,
        spoil: Callable[[Message, Random], Message] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.at_work = True  # if not, messages pass as they are
        self._random = Random(seed)
        self._drop, self._duplicate, self._reorder = drop, duplicate, reorder
        self._delay_s, self._corrupt, self._spoil = delay_s, corrupt, spoil
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, Message]] = []  # a heap: when due, who was first
        self._overtaken: list[tuple[int, float, Message]] = []  # until which message, until when

    def put(self, message: Message, now: float) -> None:
        """A message sets out."""
        self.counts["messages"] += 1
        if not self.at_work:
            heapq.heappush(self._waiting, (now, next(self._order), message))
            return
        # Every choice is drawn for every message: one rate does not change what another hits.
        lost, twice, overtaken, changed, late, later = (self._random.random() for _ in range(6))
        if lost < self._drop:
            self.counts["dropped"] += 1
            return
        if changed < self._corrupt:
            self.counts["corrupted"] += 1
            message = self._changed(message)
        number = next(self._order)
        if overtaken < self._reorder:
            self.counts["reordered"] += 1
            self._overtaken.append((number + _OVERTAKEN_BY, now + _OVERTAKEN_S, message))
        else:
            heapq.heappush(self._waiting, (now + late * self._delay_s, number, message))
        if twice < self._duplicate:
            self.counts["duplicated"] += 1
            again = (now + later * self._delay_s, next(self._order), message)
            heapq.heappush(self._waiting, again)
        for until, at, held in tuple(self._overtaken):
            if until <= number:
                self._overtaken.remove((until, at, held))
                heapq.heappush(self._waiting, (now, next(self._order), held))

    def _changed(self, message: Message) -> Message:
        if self._spoil:
            return self._spoil(message, self._random)
        assert isinstance(message, bytes | bytearray | memoryview)
        changed: Any = flip_bit(message, self._random)
        return changed  # type: ignore[no-any-return]

    def get(self, now: float) -> list[Message]:
        """The messages that have arrived by now, in order."""
        for until, at, held in tuple(self._overtaken):
            if at <= now:
                self._overtaken.remove((until, at, held))
                heapq.heappush(self._waiting, (at, next(self._order), held))
        arrived = []
        while self._waiting and self._waiting[0][0] <= now:
            arrived.append(heapq.heappop(self._waiting)[2])
        return arrived

    def next_at(self) -> float | None:
        """When `get` has something again, if nothing more is put; None: never."""
        times = [at for _, at, _ in self._overtaken]
        if self._waiting:
            times.append(self._waiting[0][0])
        return min(times, default=None)


def flip_bit(message: bytes | bytearray | memoryview, random: Random) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(message)
    if changed:
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


class _Pump(Generic[Message]):
    """Faults on the event loop's clock: hands on every message when it arrives."""

    def __init__(self, faults: Faults[Message], hand_on: Callable[[Message], None]) -> None:
        self._faults, self._hand_on = faults, hand_on
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    def put(self, message: Message) -> None:
        self._faults.put(message, self._loop.time())
        self._run()

    def _run(self) -> None:
        if self._ended:
            return
        for message in self._faults.get(self._loop.time()):
            self._hand_on(message)
        if self._timer:
            self._timer.cancel()
            self._timer = None
        at = self._faults.next_at()
        if at is not None:
            self._timer = self._loop.call_at(at, self._run)

    def end(self) -> None:
        self._ended = True
        if self._timer:
            self._timer.cancel()


Note = tuple[Ask, int, int, int]  # the arguments of `AskTable.arrived`


def disturb(table: AskTable, faults: Faults[Note]) -> Callable[[], None]:
    """Have every verified fragment of an answer noted as these faults will; returns what ends it.

    Works for every transport, since all of them note what has arrived in an `AskTable`.
    """
    note = table.arrived

    def hand_on(arrived: Note) -> None:
        ask, duck, fragment, fragments = arrived
        if ask.ticket in table.open_asks:
            note(*arrived)
        elif ask.gather.note(duck, fragment, fragments) and ask.gather.has(duck):
            table.late_answers += 1

    pump = _Pump(faults, hand_on)

    def arrived(ask: Ask, duck: int, fragment: int, fragments: int) -> None:
        pump.put((ask, duck, fragment, fragments))

    def arrived_whole(ask: Ask, ducks: Iterable[int], at: Iterable[float] | None = None) -> None:
        for duck in ducks:
            for fragment in range(ask.fragments):
                arrived(ask, duck, fragment, ask.fragments)

    def end() -> None:
        pump.end()
        del table.arrived, table.arrived_whole  # the class's own again

    table.arrived = arrived  # type: ignore[method-assign]
    table.arrived_whole = arrived_whole  # type: ignore[method-assign]
    return end


class FaultyPlane:
    """A `control.Plane` around another one.

    Args:
        plane: the one that works.
        asks: what happens to asks on their way out.
        answers: what happens to verified answers before they are noted.
        corrupt: the share of answers, 0 to 1, in which a bit changes before they are verified;
            for tcp without a key and for shm.
        kill: the share of asks, 0 to 1, after which a duck is killed.
        seed: of `corrupt` and `kill`.
    """

    def __init__(
        self,
        plane: Plane,
        *,
        asks: Faults[tuple[Ask, bytes]] | None = None,
        answers: Faults[Note] | None = None,
        corrupt: float = 0.0,
        kill: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._random = Random(seed)
        self._corrupt, self._kill = corrupt, kill
        if corrupt:
            plane = _corrupted(plane, corrupt, self._random)
        self._plane = plane
        self._asks: Faults[tuple[Ask, bytes]] = asks or Faults()
        self._answers: Faults[Note] = answers or Faults()
        self._ends: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        return self._plane.name

    @property
    def is_private(self) -> bool:
        return self._plane.is_private

    def start(self, flock: FlockTransport) -> None:
        self._flock = flock
        self._pump = _Pump(self._asks, self._send)
        self._ends = [self._pump.end, disturb(flock.asks, self._answers)]
        self._plane.start(flock)

    def offer(self, duck: int, link: Link) -> Mapping[str, Any]:
        return self._plane.offer(duck, link)

    async def connect(self, duck: int, welcome: Welcome) -> None:
        await self._plane.connect(duck, welcome)

    def send(self, ask: Ask, body: bytes) -> None:
        if self._random.random() < self._kill:
            self._flock.drop(self._random.randrange(self._flock.plan.ducks), "killed by a fault")
        self._pump.put((ask, body))

    def _send(self, message: tuple[Ask, bytes]) -> None:
        if message[0].ticket in self._flock.asks.open_asks:
            self._plane.send(*message)

    def cancel(self, ask: Ask) -> None:
        self._plane.cancel(ask)

    def forget(self, ask: Ask) -> None:
        self._plane.forget(ask)

    def tick(self) -> None:
        self._plane.tick()

    def heard(self, duck: int) -> int:
        return self._plane.heard(duck)

    def stats(self) -> Mapping[str, float]:
        return self._plane.stats()

    def close(self) -> None:
        for end in self._ends:
            end()
        self._ends = []
        self._plane.close()


# --- datagrams

Datagram = tuple[bytes, Address]


def spoil_datagram(datagram: Datagram, random: Random) -> Datagram:
    """One bit of its bytes changes; for `Faults.spoil`."""
    return flip_bit(datagram[0], random), datagram[1]


class FaultyUdpSocket(UdpSocket):
    """A socket whose datagrams meet these faults, each for itself.

    Args:
        address, options: as of a `UdpSocket`.
        out: what happens to those that are sent.
        back: what happens to those that come.
    """

    def __init__(
        self, address: Address, *, out: Faults[Datagram], back: Faults[Datagram], **options: Any
    ) -> None:
        super().__init__(address, **options)
        self._arrived: list[Datagram] = []
        self._reader: Callable[[], None] | None = None
        self._out = _Pump(out, self._send_one)
        self._back = _Pump(back, self._hand_on)
        self._draining = False

    @property
    def collects(self) -> bool:
        return False  # every datagram is looked at

    def listen(self, reader: Callable[[], None]) -> None:
        self._reader = reader
        super().listen(reader)

    def send(self, train: bytes | memoryview, size: int, to: Address) -> None:
        view = memoryview(train)
        for start in range(0, len(view), size):
            self._out.put((bytes(view[start : start + size]), to))

    def _send_one(self, datagram: Datagram) -> None:
        super().send(datagram[0], len(datagram[0]), datagram[1])

    def drain(self) -> Iterator[tuple[memoryview, int, Address]]:
        self._draining = True
        for train, size, sender in super().drain():
            for start in range(0, len(train), size):
                self._back.put((bytes(train[start : start + size]), sender))
        self._draining = False
        arrived, self._arrived = self._arrived, []
        for data, sender in arrived:
            yield memoryview(bytearray(data)), len(data), sender

    def _hand_on(self, datagram: Datagram) -> None:
        self._arrived.append(datagram)
        if self._reader and not self._draining:  # it was late, and nobody is looking
            self._reader()

    def close(self) -> None:
        self._out.end()
        self._back.end()
        super().close()


# --- bits that change on their way


def _corrupted(plane: Plane, share: float, random: Random) -> Plane:
    """The same plane with a bit of some answers changed before they are verified.

    Raises:
        ValueError: not for this plane.
    """
    if type(plane) is TcpPlane:
        return _CorruptTcp(share, random)
    if type(plane) is ShmPlane:
        return _CorruptShm(share, random)
    raise ValueError(f"bits cannot be changed under the {plane.name} plane here")


class _CorruptTcp(TcpPlane):
    """Changes a bit of a payload when it is whole, just before its checksum is looked at."""

    def __init__(self, share: float, random: Random) -> None:
        super().__init__()
        self._share, self._random = share, random

    def _collects(self) -> bool:
        return False  # every frame goes the long way, by `place`

    async def connect(self, duck: int, welcome: Welcome) -> None:
        await super().connect(duck, welcome)
        link = self._links[duck]
        assert link._frames is not None
        assert link._sealed is None, "a sealed frame is opened elsewhere"
        link._frames = _CorruptFrames(link, link._frames, self._share, self._random)


class _CorruptFrames:
    """A `link.Frames` around another one."""

    def __init__(self, link: Link, frames: Frames, share: float, random: Random) -> None:
        self._link, self._frames = link, frames
        self._share, self._random = share, random

    def check(self, header: wire.Header) -> int:
        return self._frames.check(header)

    def place(self, header: wire.Header) -> memoryview | None:
        place, size = self._frames.place(header), self._link._size
        if place is not None and self._link._have >= size and self._random.random() < self._share:
            place[self._random.randrange(size)] ^= 1 << self._random.randrange(8)
        return place

    def arrived(self, header: wire.Header) -> None:
        self._frames.arrived(header)


class _CorruptShm(ShmPlane):
    """Changes a bit in a duck's place, once its answer is there."""

    def __init__(self, share: float, random: Random) -> None:
        super().__init__()
        self._share, self._random = share, random
        self._looked: set[tuple[int, int]] = set()

    def _take(self, slot: HostSlot) -> None:
        memory, place = slot.memory, slot.place
        for duck in range(memory.layout.ducks):
            offset = place.answers + duck * place.stride
            ticket = memory.word(offset + 8)
            if slot.ask and ticket == slot.ask.ticket and (ticket, duck) not in self._looked:
                self._looked.add((ticket, duck))
                if self._random.random() < self._share:
                    at = offset + wire.HEADER_BYTES + self._random.randrange(wire.STAMP_BYTES)
                    memory.raw[at] ^= 1 << self._random.randrange(8)
        super()._take(slot)
