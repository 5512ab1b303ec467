"""Shared memory as a data plane, for ducks on the host's own machine: one file in memory, one
wake-up for all ducks and one back for the host.

The host makes the file and hands it, with two eventfds, to every duck over a unix socket that only
their common user can reach. Each row set of the flock has a *slot* in it: a place for its ask, and
one for every duck's answer. To ask, the host puts the message there, writes the slot's ticket and
signals all ducks at once, or of many some, which signal the others (`wake_groups`). A duck copies
the ask, computes, puts its answer in its place and adds one to the slot's count; whoever makes the
count full signals the host, which looks at all headers in one native call. The answers of a decode
step stay where they are until they are wanted: then one pass copies them block by block, verifies
their checksums and adds them up. Long answers are copied and verified as they come.

Why answers are copied, and not added where they lie: what a duck can write to must never hold what
is summed. A late duck (its ask was cancelled, and the slot serves another ask) can then do no harm,
because its place is its own and what lies there bears the old ticket; nor can one that changes its
answer after it was verified. A copy of a few kilobytes stays in the nearest cache until it has been
checked and added, so it costs little.

Nothing found in the memory is trusted. Tickets and counts only say that it may be worth looking;
each side knows from the plan where everything lies and how large it may be.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import select
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from duck import wire
from duck.errors import ConfigError, DuckError, DuckLost, TransportError, WireError
from duck.kernels import library
from duck.placement import Plan
from duck.transports import control
from duck.transports.base import Ask, Rows, set_capacities
from duck.transports.control import FlockTransport, Welcome
from duck.transports.link import Link
from duck.transports.listen import HostSession

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

_LINE = 64  # bytes of a cache line: what different processes write lies on different lines
_ALL_AT_ONCE = 8  # so many ducks are woken by the host itself
_TEXT_BYTES = 4096  # of a duck's words on why it cannot answer
_HELLO = b"duck"
_OK = b"OK"
_BAD_CHECKSUM = "an answer failed its checksum"
_GOOD = library.MESSAGE_GOOD
_CREDENTIALS = struct.Struct("3i")
_SLOT = struct.Struct("<8QIi28sI")  # duck_slot of duck.h


def is_available() -> bool:
    """Whether this system has what shared memory needs: Linux's eventfds and epoll."""
    return hasattr(os, "eventfd") and hasattr(select, "epoll") and hasattr(socket, "send_fds")


# --- what lies where


@dataclass(frozen=True, slots=True)
class Slot:
    """The places of one row set in the memory, as byte offsets."""

    ticket: int  # u32: the ask that the slot serves, 0 for none
    count: int  # u32: how many ducks have put their answers
    ask: int  # the ask's message
    ask_bytes: int  # the largest body of an ask
    answers: int  # the first duck's message, the others' a stride apart
    stride: int
    swift: bool  # answers are short: only the last duck signals, and all are taken in one go


class Layout:
    """Where everything lies; the same on both ends because it follows from the plan alone."""

    def __init__(self, plan: Plan) -> None:
        shape, ducks = plan.shape, plan.ducks
        self.ducks = ducks
        at = ducks * _LINE  # a line for each duck: how many answers it did not put, being late
        slots = []
        capacities = set_capacities(shape)
        for capacity in capacities:
            ask_bytes = shape.ask_bytes(capacity)
            # As in a row set, partial sums start on a line: header and stamps lie before it.
            answer = _LINE + max(shape.answer_bytes(capacity), _TEXT_BYTES)
            stride, ask = _lines(answer), at + 2 * _LINE
            answers = ask + _lines(wire.HEADER_BYTES + ask_bytes)
            before = _LINE - wire.HEADER_BYTES - wire.STAMP_BYTES
            swift = capacity == capacities[0]
            slots.append(Slot(at, at + _LINE, ask, ask_bytes, answers + before, stride, swift))
            at = answers + ducks * stride
        self.slots = tuple(slots)
        self.nbytes = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE


def wake_groups(ducks: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """The wake-up group of each duck, and the one that it wakes in turn.

    Waking a process takes its waker microseconds. Up to eight ducks are all in group 0, which the
    host wakes; of more, only about the square root of them, and each of those wakes a group.
    """
    first = ducks if ducks <= _ALL_AT_ONCE else math.isqrt(ducks - 1) + 1
    groups = tuple(0 if duck < first else 1 + (duck - first) % first for duck in range(ducks))
    wakes = tuple(
        duck + 1 if duck < first and duck + 1 in groups else None for duck in range(ducks)
    )
    return groups, wakes


def _lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


class Memory:
    """The mapped file; goes when nobody refers to it any more."""

    def __init__(self, file: int, layout: Layout) -> None:
        self.layout = layout
        self.raw = np.frombuffer(mmap.mmap(file, layout.nbytes), np.uint8)
        self.words = self.raw.data.cast("I")
        self.address: int = self.raw.ctypes.data

    def word(self, offset: int) -> int:
        return self.words[offset // 4]

    def add(self, offset: int, value: int) -> int:
        """Add to a word, in one step for all processes; returns what was there."""
        return library.atomic_add_u32(self.address + offset, value)

    def set_ticket(self, slot: Slot, ticket: int) -> None:
        """By an atomic addition, since only the host writes it: all it wrote before is seen."""
        self.add(slot.ticket, ticket - self.words[slot.ticket // 4])

    def header(self, offset: int) -> bytes:
        return self.raw[offset : offset + wire.HEADER_BYTES].tobytes()

    def put(self, offset: int, header: bytes, first: bytes, second: np.ndarray | None) -> None:
        """Put a message: a header without its checksum, and a body in one or two parts."""
        more = 0 if second is None else second.nbytes
        native = library.swift() if len(first) + more <= library.SWIFT_BYTES else library.native()
        address = None if second is None else second.ctypes.data
        native.duck_message_put(self.address + offset, header, first, len(first), address, more)

    def get(self, offset: int, header: bytes, into: np.ndarray) -> int:
        """Copy the body of one message of this header; its state."""
        state = np.zeros(1, np.uint8)
        native = library.swift() if into.nbytes <= library.SWIFT_BYTES else library.native()
        native.duck_messages_get(
            self.address + offset, 0, 1, header, into.nbytes, into.ctypes.data, 0,
            state.ctypes.data,
        )  # fmt: skip
        return int(state[0])


def _header(
    kind: wire.Kind, session: int, ticket: int, layer: int, source: int, nbytes: int
) -> bytes:
    """The header of a message that is one piece; its checksum is put in with the body."""
    return wire.HEADER.pack(
        wire.MAGIC, wire.VERSION, kind, session, ticket, layer, source, 0, 1, nbytes, 0, 0
    )


# --- the host's end


class HostSlot:
    """A slot as the host uses it: the ask in flight, and what native code knows to put and take.

    The answers of a swift slot stay where they are until somebody wants them: it is a
    `base.Unread`.

    Args:
        rows: the row set that it serves.
        flock: in whose session it is made.
        wake: the eventfd that wakes the ducks.
    """

    def __init__(self, memory: Memory, rows: Rows, flock: FlockTransport, wake: int) -> None:
        self.memory, self._flock, self._session = memory, flock, flock.session
        self.place = place = memory.layout.slots[rows.number]
        self.ask: Ask | None = None
        self.states = bytearray(memory.layout.ducks)
        self.taken = 0  # answers, the last time it was looked at
        self.known = b""  # the states then
        want = _header(wire.Kind.ANSWER, self._session, 0, 0, 0, 0)[:28]
        self._table = bytearray(
            _SLOT.pack(
                memory.address + place.ticket, memory.address + place.count,
                memory.address + place.ask, memory.address + place.answers, place.stride,
                rows.address, rows.stride, library.address_of(self.states),
                memory.layout.ducks, wake, want, 0,
            )
        )  # fmt: skip
        self.address = library.address_of(self._table)
        native = library.swift() if place.swift else library.native()
        self.put, self._land = native.duck_slot_ask, native.duck_slot_take
        self.take = native.duck_slot_look if place.swift else native.duck_slot_take
        self._sum = native.duck_slot_sum
        shape = flock.plan.shape
        self._hidden, self._bf16 = shape.hidden, shape.answer_dtype == "bfloat16"

    def land(self) -> None:
        ducks = self.memory.layout.ducks
        self.states[:] = bytes(ducks)
        if self._land(self.address) != ducks:
            # Or with another header than the one that came, or none: what is wrong with it by now
            # is as good as a wrong checksum.
            self._lose(next(d for d, state in enumerate(self.states) if state != _GOOD))

    def total(self) -> tuple[np.ndarray, bool]:
        assert self.ask is not None
        total = np.empty((self.ask.count, self._hidden), np.float32)
        bad = ctypes.c_int()
        finite = self._sum(self.address, self._bf16, library.place_of(total), ctypes.byref(bad))
        if bad.value >= 0:
            self._lose(bad.value)
        return total, bool(finite)

    def _lose(self, duck: int) -> NoReturn:
        """It is lost; what was asked of it meanwhile too.

        Raises:
            DuckLost: that.
        """
        asks, ask = self._flock.asks, self.ask
        assert ask is not None
        asks.in_loop(self._lost, duck)
        raise asks.loss(ask, duck, _BAD_CHECKSUM)

    def _lost(self, duck: int) -> None:
        """In the event loop. If another session has begun, it begins without this loss."""
        if self._flock.session == self._session:
            self._flock.asks.lose(duck, _BAD_CHECKSUM)


class ShmPlane:
    """A `control.Plane`: the host's end of the shared memory."""

    name = "shm"
    is_private = True

    def __init__(self) -> None:
        self._opened = contextlib.ExitStack()
        self._memory: Memory | None = None

    def start(self, flock: FlockTransport) -> None:
        """Make the memory.

        Raises:
            ConfigError: this system has no shared memory of our kind.
        """
        if not is_available():
            raise ConfigError("--transport shm needs Linux: use --transport tcp")
        self._flock = flock
        self._loop = asyncio.get_running_loop()
        self._late = self._wakeups = self._signals = self._whole = 0
        ducks = flock.plan.ducks
        layout = Layout(flock.plan)
        self._file = _memory_file(layout.nbytes)
        self._opened.callback(os.close, self._file)
        self._memory = Memory(self._file, layout)
        self._groups, self._wakes = wake_groups(ducks)
        self._to_ducks = [self._eventfd() for _ in set(self._groups)]
        self._to_host = self._eventfd()
        self._loop.add_reader(self._to_host, self._woken)
        self._opened.callback(self._loop.remove_reader, self._to_host)
        self._asks, self._all = flock.asks, range(ducks)
        self._none = bytes(ducks)
        self._slots: dict[int, HostSlot] = {}  # those that have been used, by their row sets
        self._flying: dict[int, HostSlot] = {}  # those of them that have an ask in flight

    def _eventfd(self) -> int:
        descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._opened.callback(os.close, descriptor)
        return descriptor

    def offer(self, duck: int, link: Link) -> Mapping[str, Any]:
        return {}

    async def connect(self, duck: int, welcome: Welcome) -> None:
        """Hand the memory to a duck."""
        path = wire.field(welcome.plane, "socket", str)
        label = self._flock.labels[duck]
        with socket.socket(socket.AF_UNIX) as link:
            link.setblocking(False)
            try:
                async with asyncio.timeout(control.CONNECT_S):
                    await self._loop.sock_connect(link, path)
                    _check_peer(link)
                    asks = self._to_ducks[self._groups[duck]]
                    descriptors = [self._file, asks, self._to_host]
                    wakes = self._wakes[duck]
                    if wakes is not None:
                        descriptors.append(self._to_ducks[wakes])
                    socket.send_fds(link, [_HELLO], descriptors)
                    answer = await self._loop.sock_recv(link, _TEXT_BYTES)
            except TimeoutError:
                reason = f"it did not take the shared memory within {control.CONNECT_S:.0f} s"
                raise DuckLost(label, None, control.CONNECT_S * 1e3, reason, index=duck) from None
            except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
                why = getattr(error, "strerror", None) or error
                raise TransportError(
                    f"{label} shares no memory with this host ({why}): shm is for ducks of the "
                    "same user on the same machine; use --transport tcp"
                ) from error
        if answer != _OK:
            text = wire.plain(answer.decode("utf-8", "replace"))
            raise WireError(f"{label} did not take the shared memory: {text or 'no reason given'}")

    def send(self, ask: Ask, body: bytes) -> None:
        number = ask.rows.number
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = self._slot(ask.rows)
        slot.ask, slot.taken, slot.known = ask, 0, self._none
        self._flying[number] = slot
        if slot.place.swift:
            ask.rows.unread = slot
        slot.put(slot.address, ask.ticket, ask.layer, ask.answer_bytes, body, len(body))
        self._signals += 1

    def _slot(self, rows: Rows) -> HostSlot:
        assert self._memory is not None
        return HostSlot(self._memory, rows, self._flock, self._to_ducks[0])

    def forget(self, ask: Ask) -> None:
        self._flying.pop(ask.rows.number, None)

    def cancel(self, ask: Ask) -> None:
        memory = self._memory
        assert memory is not None
        memory.set_ticket(memory.layout.slots[ask.rows.number], 0)
        with contextlib.suppress(BlockingIOError):  # 2^64 times and nobody looked
            os.eventfd_write(self._to_ducks[0], 1)
        self._signals += 1

    # answers

    def _woken(self) -> None:
        try:  # noqa: SIM105 (a context manager takes as long as the call)
            os.eventfd_read(self._to_host)
        except BlockingIOError:
            pass
        self._wakeups += 1
        self._look()

    def tick(self) -> None:
        """Look once more, whatever the counts say: they are the ducks' to spoil."""
        self._look()

    def _look(self) -> None:
        for number, slot in tuple(self._flying.items()):
            if number in self._flying:  # else it ended with the one before, by a loss
                self._take(slot)

    def _take(self, slot: HostSlot) -> None:
        """Take the answers that have come since the last time."""
        asks, ask = self._asks, slot.ask
        assert ask is not None
        taken = slot.take(slot.address)
        if taken == slot.taken:
            return
        if taken == len(self._all) and not slot.taken:
            asks.arrived_whole(ask, self._all)
        else:
            self._take_some(slot, ask)
            slot.taken, slot.known = taken, bytes(slot.states)
        self._whole += ask.gather.complete

    def _take_some(self, slot: HostSlot, ask: Ask) -> None:
        """There are answers, but not all, or not all now, or some that are none."""
        news = [duck for duck in self._all if slot.states[duck] != slot.known[duck]]
        for duck in news:
            if slot.states[duck] != _GOOD:
                self._asks.lose(duck, self._what_is_wrong(slot, duck))
                return  # the ask is lost with it
        self._asks.arrived_whole(ask, news)

    @staticmethod
    def _what_is_wrong(slot: HostSlot, duck: int) -> str:
        """Why an answer is none: the duck's own words, or what we found."""
        memory, place = slot.memory, slot.place
        if slot.states[duck] == library.MESSAGE_BAD:
            return _BAD_CHECKSUM
        offset = place.answers + duck * place.stride
        raw = memory.header(offset)
        try:
            header = wire.unpack_header(raw)
        except WireError as error:
            return str(error)
        if header.kind == wire.Kind.ERROR and 0 < header.message_bytes <= _TEXT_BYTES:
            text = np.empty(header.message_bytes, np.uint8)
            if memory.get(offset, raw, text) == _GOOD:
                words = wire.plain(text.tobytes().decode("utf-8", "replace"))
                return f"the duck could not answer: {words}"
        return (
            f"an answer of {header.message_bytes} bytes for layer {header.layer} of session "
            f"{header.session:#x}, duck {header.source}, which nobody asked for"
        )

    def heard(self, duck: int) -> int:
        """How many asks all ducks have answered; the control connection says more."""
        return self._whole

    def stats(self) -> Mapping[str, float]:
        if self._memory:
            ducks = range(self._memory.layout.ducks)
            self._late = sum(self._memory.word(duck * _LINE) for duck in ducks)
        calls = self._signals + self._wakeups
        return {"late_answers": self._late, "wakeups": self._wakeups, "calls": calls}

    def close(self) -> None:
        self._opened.close()
        if self._memory:
            self.stats()
            self._memory = None
            self._slots, self._flying = {}, {}


def _memory_file(nbytes: int) -> int:
    """A file without a name, as large as said for ever.

    Nobody who has it can shrink it, which would kill whoever reads what was cut off.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("duck", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        return file
    # mode 0600, gone from its folder at once
    file, name = tempfile.mkstemp(prefix="duck-")
    os.unlink(name)
    os.ftruncate(file, nbytes)
    return file


def _short_folder() -> str:
    """Where a socket may lie: its path has room for 107 bytes, and TMPDIR may need more."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= 80 else "/tmp"


def _check_peer(link: socket.socket) -> None:
    """Refuse another user at the other end.

    Raises:
        PermissionError: it is one.
    """
    found = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, user, _group = _CREDENTIALS.unpack(found)
    if user != os.geteuid():
        raise PermissionError(f"its user is {user}, ours {os.geteuid()}")


class ShmTransport(FlockTransport):
    """The host's end for ducks on this machine."""

    def __init__(
        self,
        addresses: Sequence[str],
        labels: Sequence[str] | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        supply: Callable[[int, int], Iterator[memoryview]] | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(addresses, ShmPlane(), labels, progress, supply, credentials)


# --- the duck's end


class ShmDuckPlane:
    """A `listen.DuckPlane`: every session gets its memory from its host."""

    name = "shm"
    greeting = ""

    def open(self, session: HostSession, offer: Mapping[str, Any]) -> ShmFeed:
        return ShmFeed(session)

    def greet(self, link: Link, message: Mapping[str, Any]) -> None:
        raise WireError("shm has no connections of its own")


class ShmFeed:
    """A `listen.Feed`: one host's memory, and the asks that were seen in it."""

    def __init__(self, session: HostSession) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._layout = Layout(session.plan)
        self._seen = [0] * len(self._layout.slots)  # the tickets that each slot had
        self._slots: dict[int, Slot] = {}  # ticket -> where its answer goes
        self._opened = contextlib.ExitStack()
        # Between the worker's thread, which writes answers, and `close`.
        self._lock = threading.Lock()
        self._memory: Memory | None = None

    # taking the memory

    def welcome(self) -> Mapping[str, Any]:
        """Listen on a unix socket that only this user can reach, for one connection."""
        try:
            folder = Path(
                self._opened.enter_context(
                    tempfile.TemporaryDirectory(prefix="duck-", dir=_short_folder())
                )
            )
            path = str(folder / "s")
            listener = self._opened.enter_context(socket.socket(socket.AF_UNIX))
            listener.setblocking(False)
            listener.bind(path)
            os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
            listener.listen(1)
        except OSError as error:
            raise ConfigError(
                f"no folder for a unix socket ({error.strerror or error}): set TMPDIR to one with "
                "a short path that may be written, or use --transport tcp"
            ) from error
        self._watch(listener, self._accept)
        return {"socket": path}

    def _watch(self, source: socket.socket, call: Callable[[socket.socket], None]) -> None:
        self._loop.add_reader(source, call, source)
        self._opened.callback(self._loop.remove_reader, source)

    def _accept(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except OSError:  # it is gone already
            return
        self._opened.close()  # nobody else may come: no listener, no folder
        self._opened.enter_context(link)
        link.setblocking(False)
        self._watch(link, self._receive)

    def _receive(self, link: socket.socket) -> None:
        reason = ""
        with self._opened.pop_all():  # the socket is done with, whatever comes of it
            try:
                _check_peer(link)
                data, descriptors, _, _ = socket.recv_fds(link, 64, 4, socket.MSG_CMSG_CLOEXEC)
                with contextlib.ExitStack() as received:
                    for descriptor in descriptors:
                        received.callback(os.close, descriptor)
                    self._attach(data, descriptors)
            except (OSError, ValueError, WireError) as error:  # ValueError: it cannot be mapped
                reason = str(error)
            with contextlib.suppress(OSError):
                link.send(reason.encode()[:_TEXT_BYTES] or _OK)
        if reason:
            self._session.refuse(reason)

    def _attach(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Map the memory and listen for asks.

        Raises:
            OSError, WireError: these are not what a host hands over.
        """
        if data != _HELLO or not 3 <= len(descriptors) <= 4:
            raise WireError(
                f"{len(descriptors)} descriptors, want memory and two eventfds, or three"
            )
        file, asks, answers, *others = descriptors
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size != self._layout.nbytes:
            raise WireError(f"memory of {found.st_size} bytes, want {self._layout.nbytes}")
        for descriptor in (asks, answers, *others):
            if os.readlink(f"/proc/self/fd/{descriptor}") != "anon_inode:[eventfd]":
                raise WireError("a descriptor that is no eventfd")
        memory = Memory(file, self._layout)
        # Every write to the eventfd wakes every duck, because all wait for its edges and nobody
        # reads its value: one call of the host, however many ducks there are.
        edges = select.epoll()
        self._opened.callback(edges.close)
        self._asks = os.dup(asks)
        self._opened.callback(os.close, self._asks)
        self._answers = os.dup(answers)
        self._opened.callback(os.close, self._answers)
        os.set_blocking(self._answers, False)
        self._others = [os.dup(descriptor) for descriptor in others]
        for descriptor in self._others:
            self._opened.callback(os.close, descriptor)
            os.set_blocking(descriptor, False)
        edges.register(self._asks, select.EPOLLIN | select.EPOLLET)
        self._memory = memory
        self._wait_for_asks(edges)

    def _wait_for_asks(self, edges: select.epoll) -> None:
        self._loop.add_reader(edges.fileno(), self._woken, edges)
        self._opened.callback(self._loop.remove_reader, edges.fileno())

    # asks

    def _woken(self, edges: select.epoll) -> None:
        edges.poll(0)
        self._wake_others()
        try:
            self._look()
        except WireError as error:
            self._loop.remove_reader(edges.fileno())
            self._session.drop_asks()
            self._session.refuse(str(error))

    def _wake_others(self) -> None:
        for descriptor in self._others:
            with contextlib.suppress(BlockingIOError):  # 2^64 times and nobody looked
                os.eventfd_write(descriptor, 1)

    def _look(self) -> None:
        memory = self._memory
        if memory is None:  # the session has ended
            return
        fresh: list[tuple[int, Slot]] = []
        for number, slot in enumerate(self._layout.slots):
            ticket = memory.word(slot.ticket)
            before = self._seen[number]
            if ticket == before:
                continue
            self._seen[number] = ticket
            self._slots.pop(before, 0)
            self._session.cancel(before)  # if it has not begun
            if ticket:
                fresh.append((ticket, slot))
        for ticket, slot in sorted(fresh, key=lambda pair: pair[0]):
            self._read(memory, ticket, slot)

    def _read(self, memory: Memory, ticket: int, slot: Slot) -> None:
        """Copy an ask and queue it, unless the slot is given to another ask meanwhile.

        Raises:
            WireError: no host may put this there.
        """
        raw = memory.header(slot.ask)
        whole = False
        message = np.empty(0, np.uint8)
        try:
            header = wire.unpack_header(raw)
            known = (wire.Kind.ASK, self._session.id, ticket, wire.HOST)
            if (header.kind, header.session, header.ticket, header.source) != known:
                raise WireError(
                    f"{header.kind.name} {header.ticket} of session {header.session:#x} in the "
                    f"place of ask {ticket}"
                )
            if header.fragments != 1 or header.message_bytes > slot.ask_bytes:
                raise WireError(f"an ask of {header.message_bytes} bytes in {slot.ask_bytes}")
            self._session.check(header.layer, header.message_bytes)
            message = np.empty(header.message_bytes, np.uint8)
            whole = memory.get(slot.ask, raw, message) == library.MESSAGE_GOOD
            if not whole:
                raise WireError("an ask failed its checksum")
        except WireError:
            if memory.word(slot.ticket) == ticket:
                raise
            return  # overwritten while we read: the next wake-up brings what is there now
        self._slots[ticket] = slot
        self._session.ask(ticket, header.layer, message.data)

    # answers

    def answer(
        self, ticket: int, layer: int, answer: np.ndarray | DuckError, stamps: bytes
    ) -> None:
        """In the worker's thread: put an answer in its place, and tell the host if it is time."""
        session = self._session
        if isinstance(answer, DuckError):
            kind, first, second = wire.Kind.ERROR, str(answer).encode()[:_TEXT_BYTES], None
            first = first or b"no reason"
        else:
            kind, first, second = wire.Kind.ANSWER, stamps, answer
        size = len(first) + (0 if second is None else second.nbytes)
        header = _header(kind, session.id, ticket, layer, session.duck, size)
        with self._lock:
            memory = self._memory
            if memory is None:
                return
            slot = self._slots.pop(ticket, None)
            if slot is None or memory.word(slot.ticket) != ticket:
                memory.add(session.duck * _LINE, 1)  # late: nobody waits for it any more
                return
            memory.put(slot.answers + session.duck * slot.stride, header, first, second)
            full = memory.add(slot.count, 1) + 1 >= self._layout.ducks
            if full or not slot.swift or kind == wire.Kind.ERROR:
                with contextlib.suppress(BlockingIOError):  # its reader has not looked for ages
                    os.eventfd_write(self._answers, 1)

    def stats(self) -> Mapping[str, float]:
        return {}  # nothing is lost here, and what is wrong ends the session

    def close(self) -> None:
        with self._lock:
            self._memory = None
            self._opened.close()
