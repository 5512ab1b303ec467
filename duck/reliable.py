"""Asks and answers over datagrams that may be lost, doubled or overtaken: who sends what again.

Sans-IO: no socket, no clock. Whoever owns the sockets feeds in what arrived with the time `now`
(seconds on any steady clock), lays the bytes where it is told to, and sends what is returned. Sizes
come from the plan alone; a header only chooses among them.

The host owns all timers. An ask goes to all ducks at once; each answers in one burst.

- A burst whose last fragment came and others did not: the host says which are missing (NACK).
- A duck that gave no sign for as long as it usually takes, or for longer after another duck's
  answer than it usually does: the host sends it the ask's last fragment again. That one packet is
  enough for the duck to tell what became of the ask: it is answered (the answer is sent again), it
  is being computed, or there are holes (RNACK, and the host sends what is missing).
- Waits follow each duck's times (RFC 6298: smoothed time and its variation), double from try to
  try up to 50 ms, and grow where they proved impatient. A duck that gives no sign through 200 tries
  is lost; what ends an ask before is its deadline, which its owner keeps.

Only identical bytes are ever sent again: ducks keep their last answers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

from duck import wire
from duck.errors import WireError

# Nothing is asked for again sooner: a lost packet costs about this much. Event loops count in ms.
FLOOR_S = 1e-3
CAP_S = 50e-3
# At the cap these are 10 s: enough for a link that is away for seconds. A duck that is gone or
# frozen is noticed before, on its control connection.
MAX_TRIES = 200
EVERYONE = -1
# IPv4 and UDP headers.
_PACKET_OVERHEAD = 28
# Asks so far behind the newest are none that a host still waits for.
_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class Cut:
    """How messages are cut into datagrams; both ends agree on it.

    payload_bytes: of every fragment but a message's last.
    """

    payload_bytes: int

    @classmethod
    def for_mtu(cls, mtu: int) -> Cut:
        """The cut whose datagrams just fit: 1,440 for 1,500, 8,928 for 9,000 (and for more)."""
        whole = min(mtu, 9000) - _PACKET_OVERHEAD - wire.HEADER_BYTES
        return cls(whole // 16 * 16)

    @classmethod
    def agreed(cls, payload_bytes: int) -> Cut:
        """The cut that a peer proposes.

        Raises:
            WireError: it makes no sense.
        """
        if payload_bytes % 16 or not 512 <= payload_bytes <= 8928:
            raise WireError(f"datagrams of {payload_bytes} bytes: want 512 to 8928, 16 by 16")
        return cls(payload_bytes)

    @property
    def datagram_bytes(self) -> int:
        return wire.HEADER_BYTES + self.payload_bytes

    def fragments(self, message_bytes: int) -> int:
        return -(-message_bytes // self.payload_bytes)

    def check(self, run: Run) -> None:
        """Refuse fragments that are cut in another way.

        Raises:
            WireError: that.
        """
        head, payload = run.header, self.payload_bytes
        stop = head.fragment + run.fragments
        if (
            head.fragments != -(-head.message_bytes // payload)
            or head.offset != head.fragment * payload
            or not head.fragment < stop <= head.fragments
            or run.size != min(stop * payload, head.message_bytes) - head.offset
        ):
            raise WireError(
                f"{run.size} bytes as fragment {head.fragment} of {head.fragments} at {head.offset}"
            )


class Run(NamedTuple):
    """Fragments of one message that arrived together, one after the other."""

    header: wire.Header  # of the first
    fragments: int
    size: int  # payload bytes of all

    @property
    def bits(self) -> int:
        return ((1 << self.fragments) - 1) << self.header.fragment

    @property
    def has_last(self) -> bool:
        return self.header.fragment + self.fragments == self.header.fragments


class Send(NamedTuple):
    """What is to be sent.

    kind: ASK or ANSWER: these fragments of the message again; NACK or RNACK: these are missing.
    duck: to whom, when the host sends; `EVERYONE`: to the group.
    fragments: as bits; of an RNACK None: all.
    """

    kind: wire.Kind
    duck: int
    ticket: int
    fragments: int | None


class Lost(NamedTuple):
    """A duck that gave no sign through all tries."""

    duck: int
    ticket: int


@dataclass(slots=True)
class Counts:
    """What happened besides whole answers; fragments unless said otherwise."""

    nacks: int = 0  # messages: the host told a duck what is missing of its answer
    probes: int = 0  # messages: the host asked a duck that gave no sign
    rnacks: int = 0  # messages: a duck told what is missing of an ask
    working: int = 0  # messages: a duck told that it has the ask and computes
    resent: int = 0  # fragments that were sent again
    duplicates: int = 0
    stale: int = 0  # of messages that nobody waits for any more
    late_answers: int = 0  # answers to asks that were cancelled
    corrupt: int = 0  # messages that failed their check
    limited: int = 0  # requests to send again that came too fast
    evicted: int = 0  # asks in pieces that had to make room

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Patience:
    """How long to wait for one duck before it is asked again.

    As RFC 6298: smoothed time + 4 times its smoothed variation, from `FLOOR_S` to `CAP_S`. The
    variation counts up to eight times as much after waits that proved impatient. A sample counts as
    no further off than eight times the sum of the variation and `FLOOR_S`.

    wait_s: that. soon_s: with half the variation, where asking in vain costs a packet or two: those
    who wait for what was lost twice decide what the slowest rounds take.
    """

    __slots__ = ("_smoothed", "_stretch", "_variation", "soon_s", "wait_s")

    def __init__(self) -> None:
        self._smoothed = self._variation = 0.0
        self._stretch = 1.0
        self.wait_s = self.soon_s = CAP_S

    def sample(self, took_s: float) -> None:
        """It took so long, and was not asked twice (Karn)."""
        if not self._smoothed:
            self._smoothed, self._variation = took_s, took_s / 2
        else:
            # One pause of somebody's machine says nothing of the next answer: much more than usual
            # counts only as it comes again.
            most = 8 * (self._variation + FLOOR_S)
            off = min(max(took_s - self._smoothed, -most), most)
            self._variation += (abs(off) - self._variation) / 4
            self._smoothed += off / 8
        if self._stretch > 1:
            self._stretch = max(1.0, self._stretch * 0.998)
        varies_s = self._variation * self._stretch
        self.wait_s = min(max(self._smoothed + 4 * varies_s, FLOOR_S), CAP_S)
        self.soon_s = min(max(self._smoothed + 2 * varies_s, FLOOR_S), CAP_S)

    def impatient(self) -> None:
        """It was asked again and need not have been."""
        self._stretch = min(self._stretch * 2, 8.0)
        self.wait_s = min(self.wait_s * 2, CAP_S)
        self.soon_s = min(self.soon_s * 2, CAP_S)


# --- the host's half


class _Owed:
    """An open ask: what each duck still owes, and when it is asked again."""

    __slots__ = (
        "answer_bytes",
        "ask_fragments",
        "asked_at",
        "due",
        "due_first",
        "first_at",
        "fragments",
        "full",
        "gaps",
        "last_at",
        "layer",
        "missing",
        "nacked",
        "probed",
        "regretted",
        "regrouped",
        "sent_at",
        "served_at",
        "ticket",
        "tries",
        "wait",
    )  # fmt: skip

    def __init__(
        self, ticket: int, layer: int, ask_fragments: int, answer_bytes: int, fragments: int,
        waits: list[float], now: float,
    ) -> None:  # fmt: skip
        ducks = len(waits)
        self.ticket, self.layer = ticket, layer
        self.ask_fragments, self.answer_bytes, self.fragments = (
            ask_fragments, answer_bytes, fragments
        )  # fmt: skip
        self.full = (1 << fragments) - 1
        self.missing = [self.full] * ducks
        self.sent_at = now
        self.wait = waits
        self.due = [now + wait for wait in waits]
        self.due_first = min(self.due)  # or earlier
        self.tries = [0] * ducks
        self.first_at = [0.0] * ducks  # when an answer began to come that was not asked for again
        self.gaps = [0.0] * ducks  # how long after another answer began
        self.last_at = 0.0  # when the latest answer began
        self.asked_at = [0.0] * ducks  # when a NACK was sent
        self.served_at = [-math.inf] * ducks  # when an RNACK was answered
        # Bits of ducks. Who was asked again for what; and who, as it turned out, in vain.
        self.nacked = self.probed = self.regretted = 0
        # What was sent to the whole group again. Once each: it may be the group that is cut off.
        self.regrouped: set[str] = set()


class _Past(NamedTuple):
    """An ask that ended lately."""

    late: int  # bits of ducks that still owed an answer
    nacked: int  # of those that were asked again, and not in vain so far
    probed: int


class HostHalf:
    """All open asks of one flock.

    Args:
        ducks: how many.
        cut: how asks and answers are cut.
    """

    PAST = 256  # ended asks whose late fragments are told from strangers
    SAMPLES = 8  # so many ducks are timed by one ask

    def __init__(self, ducks: int, cut: Cut) -> None:
        self.counts = Counts()
        # Not before this moment has `due` anything to say.
        self.wake_at = math.inf
        self._cut = cut
        self._open: dict[int, _Owed] = {}
        self._past: dict[int, _Past] = {}
        self._answers = [Patience() for _ in range(ducks)]  # from the ask to the answer
        self._gaps = [Patience() for _ in range(ducks)]  # from another's answer to this duck's
        self._echoes = [Patience() for _ in range(ducks)]  # from a NACK to what it asks for
        self.missed = [0] * ducks  # asks in a row of which nothing came to a duck but when asked
        self._reorder_s = [0.0] * ducks  # how long fragments may be overtaken by the last
        # What came since `settle`.
        self._partial: list[tuple[_Owed, int, float]] = []
        self._wanted: dict[int, dict[int, int]] = {}

    def open(self, ticket: int, layer: int, ask_bytes: int, answer_bytes: int, now: float) -> None:
        """An ask was sent to everyone; its answers are due."""
        fragments = self._cut.fragments(answer_bytes)
        owed = _Owed(
            ticket, layer, self._cut.fragments(ask_bytes), answer_bytes, fragments,
            [patience.wait_s for patience in self._answers], now,
        )  # fmt: skip
        self._past.pop(ticket, None)
        self._open[ticket] = owed
        self.wake_at = min(self.wake_at, owed.due_first)

    def close(self, ticket: int) -> None:
        """The ask is complete, cancelled or has failed; nothing when it is closed already."""
        owed = self._open.pop(ticket, None)
        if owed is None:
            return
        late = 0
        if any(owed.missing):
            late = sum(1 << duck for duck, missing in enumerate(owed.missing) if missing)
        # Of many ducks each is timed now and then: a step has a hundred asks.
        ducks = len(owed.missing)
        turns = -(-ducks // self.SAMPLES)
        for duck in range(ticket % turns, ducks, turns):
            if first_at := owed.first_at[duck]:
                # An answer may come while its ask is still sent to others.
                self._answers[duck].sample(max(first_at - owed.sent_at, 0.0))
                if owed.gaps[duck]:
                    self._gaps[duck].sample(owed.gaps[duck])
        if any(self.missed):
            for duck, first_at in enumerate(owed.first_at):
                if first_at:
                    self.missed[duck] = 0
        fair = ~owed.regretted
        self._past[ticket] = _Past(late, owed.nacked & fair, owed.probed & fair)
        if len(self._past) > self.PAST:
            del self._past[next(iter(self._past))]

    @property
    def tickets(self) -> tuple[int, ...]:
        """The open asks."""
        return tuple(self._open)

    def answer(self, duck: int, run: Run, now: float) -> bool:
        """Fragments of an answer came. Whether they belong into the duck's row, at their offset.

        Raises:
            WireError: they are not of the answer that this ask has.
        """
        head = run.header
        owed = self._open.get(head.ticket)
        if owed is None:
            self._after_the_end(duck, run)
            return False
        if head.layer != owed.layer or head.message_bytes != owed.answer_bytes:
            raise WireError(
                f"an answer of {head.message_bytes} bytes for layer {head.layer}, "
                f"want {owed.answer_bytes} for layer {owed.layer}"
            )
        self._cut.check(run)
        bits = run.bits
        fresh = owed.missing[duck] & bits
        if fresh != bits:
            self._doubled(owed, duck, bits & ~fresh)
            if not fresh:
                return False
        self._landed(owed, duck, bits, now)
        return True

    def doubled(self, duck: int, ticket: int, bits: int) -> None:
        """These fragments of the answer to an open ask came again."""
        self._doubled(self._open[ticket], duck, bits)

    def _doubled(self, owed: _Owed, duck: int, bits: int) -> None:
        self.counts.duplicates += bits.bit_count()
        mark = 1 << duck
        if (owed.nacked | owed.probed) & ~owed.regretted & mark:
            owed.regretted |= mark
            self._needless(duck, nacked=bool(owed.nacked & mark))

    def missing(self, duck: int, ticket: int) -> int:
        """The fragments that this duck's answer to an open ask lacks, as bits."""
        return self._open[ticket].missing[duck]

    def landed(self, duck: int, ticket: int, bits: int, now: float) -> None:
        """Fragments of the answer to an open ask lie where they belong; none of them did before.

        As `answer` does for whoever has compared their headers with what the ask wants.
        """
        self._landed(self._open[ticket], duck, bits, now)

    def landed_whole(self, ticket: int, came: Mapping[int, float]) -> None:
        """The last fragments of these ducks' answers lie where they belong; duck -> when.

        In the order in which they came.
        """
        owed = self._open[ticket]
        last_at = owed.last_at
        for duck, at in came.items():
            missing = owed.missing[duck]
            if (
                missing != owed.full
                or (owed.nacked | owed.probed) >> duck & 1
                or self._reorder_s[duck]
            ):
                owed.last_at = last_at
                self._landed(owed, duck, missing, at)
                last_at = owed.last_at
                continue
            owed.missing[duck] = 0
            owed.first_at[duck] = at
            if last_at:
                owed.gaps[duck] = max(at - last_at, 0.0)
            last_at = max(last_at, at)
        owed.last_at = last_at
        self._may_be_overdue(owed, last_at)

    def _may_be_overdue(self, owed: _Owed, last_at: float) -> None:
        """The ducks that have not answered may be from now on; `_overdue` looks closely."""
        owed.due_first = min(owed.due_first, last_at + FLOOR_S)
        self.wake_at = min(self.wake_at, owed.due_first)

    def _landed(self, owed: _Owed, duck: int, bits: int, now: float) -> None:
        mark, missing = 1 << duck, owed.missing[duck]
        if missing == owed.full and not (owed.nacked | owed.probed) & mark:
            owed.first_at[duck] = now
            if owed.last_at:
                owed.gaps[duck] = max(now - owed.last_at, 0.0)
            owed.last_at = max(owed.last_at, now)
            self._may_be_overdue(owed, owed.last_at)
        elif owed.nacked & mark and owed.tries[duck] == 1:
            self._echoes[duck].sample(now - owed.asked_at[duck])
        owed.tries[duck] = 0
        owed.missing[duck] = missing & ~bits
        if owed.missing[duck]:
            self._partial.append((owed, duck, now))
        elif self._reorder_s[duck]:
            shorter = self._reorder_s[duck] * 0.998
            self._reorder_s[duck] = shorter if shorter > FLOOR_S / 2 else 0.0

    def failed(self, duck: int, ticket: int, now: float) -> None:
        """The answer was whole and failed its check: all of it is missing again."""
        self.counts.corrupt += 1
        owed = self._open[ticket]
        owed.missing[duck] = owed.full
        owed.probed |= 1 << duck
        self._wait(owed, duck, FLOOR_S, now)

    def rnack(self, duck: int, header: wire.Header, payload: bytes, now: float) -> None:
        """A duck told what is missing of an ask; `settle` says what to send.

        Raises:
            WireError: it makes no sense.
        """
        owed = self._open.get(header.ticket)
        if owed is None or not owed.missing[duck]:
            self.counts.stale += 1
            return
        if header.layer != owed.layer:
            raise WireError(f"RNACK for layer {header.layer}, the ask is for {owed.layer}")
        full = (1 << owed.ask_fragments) - 1
        wanted = wire.unpack_missing(payload, owed.ask_fragments) if payload else full
        owed.tries[duck] = 0
        if not wanted:
            # It computes for longer than it usually does: that is no reason to ask more often.
            self.counts.working += 1
            if owed.probed >> duck & 1:
                self._answers[duck].impatient()
                self._gaps[duck].impatient()
            return
        self.counts.rnacks += 1
        if now - owed.served_at[duck] < FLOOR_S:
            self.counts.limited += 1
            return
        owed.served_at[duck] = now
        # It has at most the last fragment, which we sent it when it gave no sign.
        last = 1 << owed.ask_fragments - 1
        self.missed[duck] = self.missed[duck] + 1 if wanted | last == full else 0
        owed.probed |= 1 << duck
        self._wait(owed, duck, self._answers[duck].soon_s, now)
        self._wanted.setdefault(header.ticket, {})[duck] = wanted

    def settle(self, now: float) -> list[Send]:
        """What to send once everything that had arrived was fed in."""
        sends: list[Send] = []
        if not self._partial and not self._wanted:
            return sends
        for owed, duck, at in self._partial:
            missing = owed.missing[duck]
            if not missing or owed.ticket not in self._open or owed.nacked >> duck & 1:
                continue
            # What the last fragment overtook is lost, or late by no more than it usually is.
            wait_s = FLOOR_S if missing >> owed.fragments - 1 else self._reorder_s[duck]
            if at + wait_s > now:
                self._wait(owed, duck, wait_s, at)
            else:
                sends.append(self._nack(owed, duck, now))
        self._partial.clear()
        for ticket, wanted in self._wanted.items():
            sends += self._again(ticket, wanted)
        self._wanted.clear()
        return sends

    def _again(self, ticket: int, wanted: dict[int, int]) -> list[Send]:
        """Send fragments of an ask again: to each duck its own, or to all at once."""
        owed = self._open.get(ticket)
        if owed is None:
            return []
        # A duck that has answered would answer again. While none has, once for all is cheaper.
        nobody = all(missing == owed.full for missing in owed.missing)
        if len(wanted) > 2 and nobody and "ask" not in owed.regrouped:
            owed.regrouped.add("ask")
            union = 0
            for bits in wanted.values():
                union |= bits
            wanted = {EVERYONE: union}
        self.counts.resent += sum(bits.bit_count() for bits in wanted.values())
        return [Send(wire.Kind.ASK, duck, ticket, bits) for duck, bits in wanted.items()]

    def due(self, now: float) -> list[Send | Lost]:
        """What to send because nothing came; and who is lost. Call it when `wake_at` has come."""
        out: list[Send | Lost] = []
        if now < self.wake_at:
            return out
        for owed in self._open.values():
            if now >= owed.due_first:
                self._overdue(owed, now, out)
        self.wake_at = min((owed.due_first for owed in self._open.values()), default=math.inf)
        return out

    def _overdue(self, owed: _Owed, now: float, out: list[Send | Lost]) -> None:
        if owed.last_at:
            asked = owed.nacked | owed.probed
            for duck, bits in enumerate(owed.missing):
                if bits == owed.full and not asked >> duck & 1:
                    gap_due = owed.last_at + self._gaps[duck].soon_s
                    owed.due[duck] = min(owed.sent_at + owed.wait[duck], gap_due)
        late = [duck for duck, bits in enumerate(owed.missing) if bits and owed.due[duck] <= now]
        silent: list[int] = []
        for duck in late:
            if owed.tries[duck] >= MAX_TRIES:
                out.append(Lost(duck, owed.ticket))
                owed.due[duck] = math.inf
            elif owed.missing[duck] == owed.full:
                silent.append(duck)
                owed.probed |= 1 << duck
                owed.tries[duck] += 1
                owed.wait[duck] = min(2 * owed.wait[duck], CAP_S)
                owed.due[duck] = now + owed.wait[duck]
            else:
                out.append(self._nack(owed, duck, now))
        if silent:
            # All of them: the ask was lost on our side.
            if len(silent) == len(owed.missing) > 2 and "probe" not in owed.regrouped:
                owed.regrouped.add("probe")
                silent = [EVERYONE]
            self.counts.probes += len(silent)
            last = 1 << owed.ask_fragments - 1
            out += [Send(wire.Kind.ASK, duck, owed.ticket, last) for duck in silent]
        pairs = zip(owed.due, owed.missing, strict=True)
        owed.due_first = min((due for due, missing in pairs if missing), default=math.inf)

    def _nack(self, owed: _Owed, duck: int, now: float) -> Send:
        self.counts.nacks += 1
        first = not owed.nacked >> duck & 1
        owed.nacked |= 1 << duck
        owed.tries[duck] += 1
        owed.asked_at[duck] = now
        wait_s = self._echoes[duck].soon_s if first else min(2 * owed.wait[duck], CAP_S)
        self._wait(owed, duck, wait_s, now)
        return Send(wire.Kind.NACK, duck, owed.ticket, owed.missing[duck])

    def _wait(self, owed: _Owed, duck: int, wait_s: float, now: float) -> None:
        """Ask this duck again after so long."""
        owed.wait[duck] = wait_s
        owed.due[duck] = now + wait_s
        owed.due_first = min(owed.due_first, now + wait_s)
        self.wake_at = min(self.wake_at, owed.due_first)

    def echoed(self, duck: int, took_s: float) -> None:
        """A PING came back after so long: as long as a NACK takes."""
        self._echoes[duck].sample(took_s)

    def _after_the_end(self, duck: int, run: Run) -> None:
        """Fragments for an ask that is not open."""
        past = self._past.get(run.header.ticket)
        mark = 1 << duck
        if past is None:
            self.counts.stale += run.fragments
        elif past.late & mark:
            if run.has_last:  # count the answer once
                self.counts.late_answers += 1
                self._past[run.header.ticket] = past._replace(late=past.late & ~mark)
        else:
            self.counts.duplicates += run.fragments
            if (past.nacked | past.probed) & mark:
                self._past[run.header.ticket] = past._replace(
                    nacked=past.nacked & ~mark, probed=past.probed & ~mark
                )
                self._needless(duck, nacked=bool(past.nacked & mark))

    def _needless(self, duck: int, *, nacked: bool) -> None:
        """What we asked for came twice: we should have waited for the first.

        Once an ask, in however many datagrams it came.
        """
        if nacked:
            self._reorder_s[duck] = min(max(FLOOR_S, self._reorder_s[duck] * 1.1), 8 * FLOOR_S)
        else:
            self._answers[duck].impatient()
            self._gaps[duck].impatient()


# --- a duck's half


class _Part:
    """An ask that is not whole yet."""

    __slots__ = ("fragments", "layer", "message", "missing")

    def __init__(self, header: wire.Header) -> None:
        self.layer, self.fragments = header.layer, header.fragments
        self.message = memoryview(bytearray(header.message_bytes))
        self.missing = (1 << header.fragments) - 1


class _Answered:
    __slots__ = ("fragments", "nbytes", "resent_at")

    def __init__(self, fragments: int, nbytes: int) -> None:
        self.fragments, self.nbytes, self.resent_at = fragments, nbytes, -math.inf


class DuckHalf:
    """One host's asks on a duck: putting them together, and telling what is missing.

    Args:
        cut: how asks and answers are cut.
        ask_bytes: the sizes that an ask may have by the plan.
        layers: those that have experts.
    """

    PARTS = 16  # asks in pieces at a time
    WORKING = 128  # asks that wait or are computed; more than a duck takes from one host
    # Answers that are kept, and their bytes: more than can pass one that is asked for again.
    ANSWERS = 256
    ANSWER_BYTES = 16 << 20
    CANCELLED = 64

    def __init__(self, cut: Cut, ask_bytes: Collection[int], layers: Collection[int]) -> None:
        self.counts = Counts()
        self._cut, self._ask_bytes, self._layers = cut, ask_bytes, layers
        self._newest: int | None = None
        self._parts: dict[int, _Part] = {}
        self._working: dict[int, int] = {}  # ticket -> fragments of its ask
        self._answers: dict[int, _Answered] = {}
        self._kept_bytes = 0
        self._cancelled: dict[int, None] = {}
        # What came since `settle`: tickets whose last fragment did.
        self._tails: dict[int, int] = {}  # ticket -> layer

    def ask(self, run: Run, now: float) -> memoryview | None:
        """Fragments of an ask came: the message they belong into at their offset, None to drop.

        Raises:
            WireError: the plan has no such ask.
        """
        head = run.header
        if head.message_bytes not in self._ask_bytes or head.layer not in self._layers:
            raise WireError(f"an ask of {head.message_bytes} bytes for layer {head.layer}")
        self._cut.check(run)
        ticket = head.ticket
        if self._is_stale(ticket) or ticket in self._cancelled:
            self.counts.stale += run.fragments
            return None
        if ticket in self._answers or ticket in self._working:
            self.counts.duplicates += run.fragments
            if run.has_last:
                self._tails[ticket] = head.layer
            return None
        part = self._parts.get(ticket)
        if part and (len(part.message) != head.message_bytes or part.layer != head.layer):
            self.counts.corrupt += 1  # one of the two headers is wrong: begin with the newer one
            del self._parts[ticket]
            part = None
        if part is None:
            part = self._parts[ticket] = _Part(head)
            if len(self._parts) > self.PARTS:
                self.counts.evicted += 1
                del self._parts[next(iter(self._parts))]
        self.counts.duplicates += (run.bits & ~part.missing).bit_count()
        part.missing &= ~run.bits
        if run.has_last:
            self._tails[ticket] = head.layer
        return part.message

    def take(self, ticket: int) -> memoryview | None:
        """The ask's message once it is whole; the caller checks it: `took` or `failed`."""
        part = self._parts.get(ticket)
        if part is None or part.missing:
            return None
        del self._parts[ticket]
        return part.message

    def took(self, header: wire.Header) -> None:
        """The ask is good, and is going to be computed."""
        ticket = header.ticket
        self._working[ticket] = header.fragments
        if len(self._working) > self.WORKING:
            # Whoever computes drops what its host waits for no longer, and does not tell us.
            del self._working[next(iter(self._working))]
        self._tails.pop(ticket, None)
        if self._newest is None or 0 < _ahead(ticket, self._newest) < 1 << 31:
            self._newest = ticket

    def failed(self, header: wire.Header) -> None:
        """The ask failed its check: it has to come again."""
        self.counts.corrupt += 1
        self._tails[header.ticket] = header.layer

    def answered(self, ticket: int, nbytes: int) -> list[int]:
        """The answer is there and is sent now: tickets whose kept answers are to be dropped.

        nbytes: of the message. An answer that is not to be kept is among them.
        """
        if self._working.pop(ticket, None) is None:
            return [ticket]  # cancelled meanwhile
        self._answers[ticket] = _Answered(self._cut.fragments(nbytes), nbytes)
        self._kept_bytes += nbytes
        gone = []
        while len(self._answers) > self.ANSWERS or (
            self._kept_bytes > self.ANSWER_BYTES and len(self._answers) > 1
        ):
            oldest = next(iter(self._answers))
            self._kept_bytes -= self._answers.pop(oldest).nbytes
            gone.append(oldest)
        return gone

    def cancel(self, ticket: int) -> None:
        """The host waits no more for this ask, which may not have come yet."""
        self._parts.pop(ticket, None)
        self._tails.pop(ticket, None)
        if self._working.pop(ticket, None) is None and ticket in self._answers:
            return
        self._cancelled[ticket] = None
        if len(self._cancelled) > self.CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    def nack(self, header: wire.Header, payload: bytes, now: float) -> Send | None:
        """The host told what is missing of an answer.

        Raises:
            WireError: it makes no sense.
        """
        answered = self._answers.get(header.ticket)
        if answered is None:
            if self._is_stale(header.ticket) or header.ticket in self._cancelled:
                self.counts.stale += 1
                return None
            # Being computed, or forgotten: then the ask has to come again.
            working = header.ticket in self._working
            return Send(wire.Kind.RNACK, EVERYONE, header.ticket, 0 if working else None)
        self.counts.nacks += 1
        missing = wire.unpack_missing(payload, answered.fragments)
        return self._resend(header.ticket, answered, missing, now)

    def _resend(self, ticket: int, answered: _Answered, missing: int, now: float) -> Send | None:
        if now - answered.resent_at < FLOOR_S / 2:  # a forged or doubled request costs no more
            self.counts.limited += 1
            return None
        answered.resent_at = now
        self.counts.resent += missing.bit_count()
        return Send(wire.Kind.ANSWER, EVERYONE, ticket, missing)

    def settle(self, now: float) -> list[tuple[int, Send]]:
        """What to send once everything that had arrived was fed in, with the layer it is about."""
        sends: list[tuple[int, Send]] = []
        for ticket, layer in self._tails.items():
            answered, part = self._answers.get(ticket), self._parts.get(ticket)
            send: Send | None
            if answered is not None:
                everything = (1 << answered.fragments) - 1
                send = self._resend(ticket, answered, everything, now)
            elif ticket in self._working:
                send = Send(wire.Kind.RNACK, EVERYONE, ticket, 0)
            else:
                missing = part.missing if part else None
                send = Send(wire.Kind.RNACK, EVERYONE, ticket, missing)
                self.counts.rnacks += 1
            if send:
                sends.append((layer, send))
        self._tails.clear()
        return sends

    def ask_fragments(self, ticket: int) -> int:
        """Of how many fragments an RNACK about this ask tells."""
        part = self._parts.get(ticket)
        return part.fragments if part else self._working.get(ticket, 0)

    def _is_stale(self, ticket: int) -> bool:
        return self._newest is not None and _WINDOW < _ahead(self._newest, ticket) < 1 << 31


def _ahead(one: int, other: int) -> int:
    """How many tickets `one` comes after `other`; tickets go around after 2**32."""
    return one - other & 0xFFFFFFFF
