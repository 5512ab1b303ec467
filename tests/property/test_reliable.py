"""Both halves of the datagram protocol over a network that loses, doubles, delays and corrupts.

Virtual time: a heap of events. Everything travels as bytes, as it does on a wire.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duck import wire
from duck.errors import WireError
from duck.reliable import (
    CAP_S,
    EVERYONE,
    FLOOR_S,
    MAX_TRIES,
    Cut,
    DuckHalf,
    HostHalf,
    Lost,
    Patience,
    Run,
    Send,
)

SESSION = 7
CUT = Cut(48)
SIZES = (20, 48, 49, 300, 470)  # of asks: one fragment, just one, two, and more


@dataclass
class Weather:
    """What the network does to each datagram."""

    loss: float = 0.0
    double: float = 0.0
    corrupt: float = 0.0
    jitter_s: float = 0.0  # up to so much late: later ones overtake it
    away: tuple[float, float] = (0.0, 0.0)  # nothing passes from then until then


@dataclass
class World:
    """A host and its ducks, their messages, the network between them, and the clock."""

    ducks: int
    weather: Weather
    random: random.Random
    compute_s: float = 100e-6
    now: float = 0.0
    sent: int = 0
    lost: set[int] = field(default_factory=set)
    done: dict[int, float] = field(default_factory=dict)  # ticket -> when it was complete

    def __post_init__(self) -> None:
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.host = Host(self)
        self.nodes = [Duck(self, number) for number in range(self.ducks)]

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), do))

    def travel(self, to: Callable[[bytes], None], datagram: bytes) -> None:
        self.sent += 1
        weather, rng = self.weather, self.random
        for _ in range(2 if rng.random() < weather.double else 1):
            if rng.random() < weather.loss or weather.away[0] <= self.now < weather.away[1]:
                continue
            data = bytearray(datagram)
            if rng.random() < weather.corrupt:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            delay = 20e-6 + rng.random() * weather.jitter_s
            self.at(self.now + delay, lambda data=bytes(data): to(data))

    def run(self, until: float = math.inf) -> None:
        """Let everything happen that happens until then, or until nothing is open."""
        while self.host.half.tickets:
            event_at = self.events[0][0] if self.events else math.inf
            when = min(event_at, self.host.half.wake_at)
            assert when < math.inf, "somebody waits for nothing"
            if when > until:
                break
            self.now = max(self.now, when)
            if self.host.half.wake_at <= event_at:
                self.host.wake()
            else:
                heapq.heappop(self.events)[2]()
        self.host.check_bounds()
        for node in self.nodes:
            node.check_bounds()


class Host:
    def __init__(self, world: World) -> None:
        self.world = world
        self.half = HostHalf(world.ducks, CUT)
        self.trains: dict[int, bytes] = {}
        self.rows: dict[int, list[bytearray]] = {}
        self.whole: dict[int, set[int]] = {}

    def ask(self, ticket: int, body: bytes, answer_bytes: int, *, arrives: bool = True) -> None:
        train = wire.datagrams(wire.Kind.ASK, SESSION, ticket, 3, wire.HOST, body, 48)
        self.trains[ticket] = train
        self.rows[ticket] = [bytearray(answer_bytes) for _ in range(self.world.ducks)]
        self.whole[ticket] = set()
        self.half.open(ticket, 3, len(body), answer_bytes, self.world.now)
        if arrives:
            for part in _split(train):
                for node in self.world.nodes:
                    self.world.travel(node.receive, part)

    def cancel(self, ticket: int) -> None:
        self.half.close(ticket)
        note = wire.pack_header(wire.Kind.CANCEL, SESSION, ticket, 3, wire.HOST, payload=b"")
        for node in self.world.nodes:
            self.world.travel(node.receive, note)

    def receive(self, duck: int, data: bytes) -> None:
        try:
            header = wire.unpack_header(data)
            if header.kind == wire.Kind.ANSWER:
                self._answer(duck, header, data[32:])
            elif wire.check_crc(data[:32], data[32:]) and header.kind == wire.Kind.RNACK:
                self.half.rnack(duck, header, data[32:], self.world.now)
        except WireError:
            return
        self.send(self.half.settle(self.world.now))

    def _answer(self, duck: int, header: wire.Header, payload: bytes) -> None:
        if header.session != SESSION or header.source != duck:
            return
        if not self.half.answer(duck, Run(header, 1, len(payload)), self.world.now):
            return
        row = self.rows[header.ticket][duck]
        row[header.offset : header.offset + len(payload)] = payload
        if self.half.missing(duck, header.ticket):
            return
        if not wire.check_message(header, bytes(row)):
            self.half.failed(duck, header.ticket, self.world.now)
            return
        whole = self.whole[header.ticket]
        assert duck not in whole, "an answer counted twice"
        whole.add(duck)
        if len(whole) == self.world.ducks:
            self.half.close(header.ticket)
            self.world.done[header.ticket] = self.world.now

    def wake(self) -> None:
        self.send(self.half.due(self.world.now))

    def send(self, sends: list[Send | Lost] | list[Send]) -> None:
        for send in sends:
            if isinstance(send, Lost):
                self.world.lost.add(send.ticket)
                self.half.close(send.ticket)
                continue
            nodes = self.world.nodes if send.duck == EVERYONE else [self.world.nodes[send.duck]]
            for node in nodes:
                if send.kind == wire.Kind.ASK:
                    for number, part in enumerate(_split(self.trains[send.ticket])):
                        if send.fragments >> number & 1:
                            self.world.travel(node.receive, part)
                else:
                    fragments = CUT.fragments(len(self.rows[send.ticket][0]))
                    payload = wire.pack_missing(send.fragments, fragments)
                    head = wire.pack_header(
                        wire.Kind.NACK, SESSION, send.ticket, 3, wire.HOST, payload=payload
                    )
                    self.world.travel(node.receive, head + payload)

    def check_bounds(self) -> None:
        assert len(self.half._past) <= HostHalf.PAST
        assert not self.half._partial
        assert not self.half._wanted


class Duck:
    """Answers with its number and the ask's bytes, repeated."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.half = DuckHalf(CUT, SIZES, {3})
        self.kept: dict[int, bytes] = {}
        self.computed: list[int] = []

    def receive(self, data: bytes) -> None:
        now = self.world.now
        try:
            header = wire.unpack_header(data)
            payload = data[32:]
            if header.session != SESSION or header.source != wire.HOST:
                return
            if header.kind == wire.Kind.ASK:
                place = self.half.ask(Run(header, 1, len(payload)), now)
                if place is not None:
                    place[header.offset : header.offset + len(payload)] = payload
                    self._take(header)
            elif not wire.check_crc(data[:32], payload):
                return
            elif header.kind == wire.Kind.NACK:
                send = self.half.nack(header, payload, now)
                if send:
                    self._send(header.layer, send)
            elif header.kind == wire.Kind.CANCEL:
                self.half.cancel(header.ticket)
        except WireError:
            return
        for layer, send in self.half.settle(now):
            self._send(layer, send)

    def _take(self, header: wire.Header) -> None:
        message = self.half.take(header.ticket)
        if message is None:
            return
        if not wire.check_message(header, message):
            self.half.failed(header)
        else:
            self.half.took(header)
            size = len(self.world.host.rows[header.ticket][0])
            answer = expected(self.number, bytes(message), size)
            self.computed.append(header.ticket)
            spread = 1 + 0.2 * self.world.random.random()
            done = self.world.now + self.world.compute_s * spread
            self.world.at(done, lambda: self._answer(header, answer))

    def _answer(self, header: wire.Header, answer: bytes) -> None:
        train = wire.datagrams(
            wire.Kind.ANSWER, SESSION, header.ticket, header.layer, self.number, answer, 48
        )
        self.kept[header.ticket] = train
        for part in _split(train):
            self._travel(part)
        for ticket in self.half.answered(header.ticket, len(answer)):
            self.kept.pop(ticket, None)

    def _send(self, layer: int, send: Send) -> None:
        if send.kind == wire.Kind.ANSWER:
            for number, part in enumerate(_split(self.kept[send.ticket])):
                if send.fragments >> number & 1:
                    self._travel(part)
            return
        payload = b""
        if send.fragments is not None:
            payload = wire.pack_missing(send.fragments, self.half.ask_fragments(send.ticket))
        head = wire.pack_header(
            wire.Kind.RNACK, SESSION, send.ticket, layer, self.number, payload=payload
        )
        self._travel(head + payload)

    def _travel(self, data: bytes) -> None:
        self.world.travel(lambda data: self.world.host.receive(self.number, data), data)

    def check_bounds(self) -> None:
        half = self.half
        assert len(half._parts) <= DuckHalf.PARTS
        assert len(half._working) <= DuckHalf.WORKING
        assert len(half._cancelled) <= DuckHalf.CANCELLED
        assert set(self.kept) == set(half._answers)
        assert len(half._answers) <= DuckHalf.ANSWERS
        assert half._kept_bytes == sum(a.nbytes for a in half._answers.values())


def _split(train: bytes) -> list[bytes]:
    size = CUT.datagram_bytes
    return [train[start : start + size] for start in range(0, len(train), size)]


def expected(duck: int, ask: bytes, size: int) -> bytes:
    """What a duck answers."""
    return (bytes([duck]) + ask * (size // len(ask) + 1))[:size]


def body(ticket: int, size: int) -> bytes:
    return random.Random(ticket).randbytes(size)


def check(world: World, sizes: dict[int, tuple[int, int]]) -> None:
    """Every ask ended, and the complete ones hold what the ducks computed."""
    assert not world.host.half.tickets, "an ask never ended"
    assert set(world.done) | world.lost == set(sizes)
    for ticket in world.done:
        ask_bytes, answer_bytes = sizes[ticket]
        for duck, row in enumerate(world.host.rows[ticket]):
            assert bytes(row) == expected(duck, body(ticket, ask_bytes), answer_bytes)


def storm(
    world: World, asks: list[tuple[int, int]], gap_s: float = 300e-6, until: float = 600.0
) -> None:
    """Send these asks (their bytes, and the answers'), one after the other, and let them end."""
    sizes = dict(enumerate(asks, 1))
    for ticket, (ask_bytes, answer_bytes) in sizes.items():
        world.host.ask(ticket, body(ticket, ask_bytes), answer_bytes)
        world.run(world.now + gap_s)
        world.now += gap_s
    world.run(until)
    check(world, sizes)


ASKS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(17, 700)), min_size=1, max_size=8)
SHARE = st.floats(0, 0.4)


@given(ASKS, st.integers(1, 4), SHARE, SHARE, SHARE, st.floats(0, 5e-3), st.integers())
def test_any_weather_ends_in_complete(
    asks: list[tuple[int, int]], ducks: int, loss: float, double: float, corrupt: float,
    jitter_s: float, seed: int,
) -> None:  # fmt: skip
    weather = Weather(loss, double, corrupt / 4, jitter_s)
    world = World(ducks, weather, random.Random(seed))
    storm(world, asks)
    assert not world.lost


@pytest.mark.parametrize(("asks", "ducks"), [(1, 1), (3, 2), (2, 5)])
def test_no_network_at_all_ends_in_lost(asks: int, ducks: int) -> None:
    world = World(ducks, Weather(loss=1), random.Random(0))
    storm(world, [(470, 476)] * asks)
    assert len(world.lost) == asks
    assert world.now < 1.1 * MAX_TRIES * CAP_S
    assert world.host.half.counts.probes <= asks * ducks * MAX_TRIES


@given(ASKS, st.integers(1, 3), st.floats(0, 3e-3), st.integers())
@settings(max_examples=20)
def test_a_link_that_is_away_for_two_seconds(
    asks: list[tuple[int, int]], ducks: int, begins: float, seed: int
) -> None:
    weather = Weather(loss=0.01, away=(begins, begins + 2))
    world = World(ducks, weather, random.Random(seed))
    storm(world, asks)
    assert not world.lost
    assert world.now < begins + 2 + 0.5


@pytest.mark.parametrize("ducks", [1, 8, 32])
def test_no_storm_without_loss(ducks: int) -> None:
    """Nothing is asked for again: computing takes 100 us, then suddenly 0.4 ms, then 20 ms."""
    world = World(ducks, Weather(), random.Random(1))
    ticket = 0
    for compute_s, rounds in ((100e-6, 60), (400e-6, 60), (20e-3, 60)):
        world.compute_s = compute_s
        world.host.half.counts.nacks = world.host.half.counts.probes = 0
        for _ in range(rounds):
            ticket += 1
            world.host.ask(ticket, body(ticket, 470), 476)
            world.run()
        counts = world.host.half.counts
        assert counts.nacks == 0
        # Only the first round after the ducks grew slower finds out that they did.
        assert counts.probes <= 6 * ducks
        assert counts.resent == 0
    assert sum(len(node.computed) for node in world.nodes) == ticket * ducks


def test_a_lost_packet_costs_a_millisecond() -> None:
    """At 1 % loss hardly a round takes longer than 5 ms, and most take none."""
    world = World(8, Weather(loss=0.01, jitter_s=5e-6), random.Random(3))
    took = []
    for ticket in range(1, 401):
        begun = world.now
        world.host.ask(ticket, body(ticket, 470), 476)
        world.run()
        took.append(world.done[ticket] - begun)
    took.sort()
    assert took[200] < 1.2e-3
    assert took[396] < 5e-3


def test_at_twenty_percent_reordering_little_is_asked_twice() -> None:
    """The wait for what was overtaken is learned."""
    world = World(4, Weather(), random.Random(5))

    def overtaken(to: Callable[[bytes], None], datagram: bytes) -> None:
        late = world.random.random() < 0.2
        world.at(world.now + (300e-6 if late else 20e-6), lambda: to(datagram))

    world.travel = overtaken  # type: ignore[method-assign]
    for ticket in range(1, 501):
        world.host.ask(ticket, body(ticket, 470), 476)
        world.run()
    counts = world.host.half.counts
    assert counts.nacks < 0.2 * 500 * 4
    assert counts.corrupt == 0


def test_the_answer_cache_serves_whoever_lost_the_whole_answer() -> None:
    world = World(1, Weather(), random.Random(0))
    node = world.nodes[0]
    world.host.ask(1, body(1, 300), 476)
    world.run(world.now + 30e-6)  # the ask has come
    world.weather.loss = 1
    world.run(world.now + 5e-3)
    world.weather.loss = 0
    world.run()
    check(world, {1: (300, 476)})
    assert node.computed == [1]  # once: the rest came from the cache
    assert node.half.counts.resent == CUT.fragments(476)


@pytest.mark.parametrize("ducks", [2, 3, 8])
def test_a_group_that_reaches_nobody(ducks: int) -> None:
    """As a switch does that forgot its members: what is sent to one duck still comes."""
    world = World(ducks, Weather(), random.Random(0))
    send = world.host.send
    world.host.send = lambda sends: send([s for s in sends if s.duck != EVERYONE])  # type: ignore[method-assign]
    for ticket in range(1, 21):
        begun = world.now
        world.host.ask(ticket, body(ticket, 470), 476, arrives=False)
        world.run()
        assert world.done[ticket] - begun < 5 * CAP_S
    check(world, dict.fromkeys(range(1, 21), (470, 476)))


def test_an_ask_that_nobody_got_is_sent_to_all_at_once() -> None:
    world = World(4, Weather(), random.Random(0))
    world.host.ask(1, body(1, 470), 476, arrives=False)
    world.run()
    check(world, {1: (470, 476)})
    counts = world.host.half.counts
    assert counts.probes == 1
    assert counts.nacks == 0


def test_asks_that_only_come_when_asked_for_are_counted_in_a_row() -> None:
    world = World(2, Weather(), random.Random(0))
    for ticket, arrives in enumerate((True, False, False, False), 1):
        world.host.ask(ticket, body(ticket, 470), 476, arrives=arrives)
        world.run()
    assert world.host.half.missed == [3, 3]
    world.host.ask(9, body(9, 470), 476)
    world.run()
    assert world.host.half.missed == [0, 0]


def test_cancelled_asks_are_forgotten_and_late_answers_counted_once() -> None:
    world = World(2, Weather(), random.Random(0), compute_s=5e-3)
    world.host.ask(1, body(1, 300), 476)
    world.run(world.now + 1e-3)
    world.host.cancel(1)
    world.host.ask(2, body(2, 300), 476)
    world.run()
    assert world.host.half.counts.late_answers == 2
    assert 2 in world.done
    assert 1 not in world.done
    for node in world.nodes:
        assert 1 not in node.kept


def test_a_cancel_that_overtakes_its_ask() -> None:
    half = DuckHalf(CUT, SIZES, {3})
    half.cancel(5)
    head = wire.unpack_header(
        wire.pack_header(wire.Kind.ASK, SESSION, 5, 3, wire.HOST, payload=bytes(20))
    )
    assert half.ask(Run(head, 1, 20), 0.0) is None
    assert half.counts.stale == 1
    assert half.settle(0.0) == []


def test_stale_tickets_are_dropped_also_around_the_end_of_the_numbers() -> None:
    half = DuckHalf(CUT, SIZES, {3})

    def ask(ticket: int) -> bool:
        head = wire.unpack_header(
            wire.pack_header(wire.Kind.ASK, SESSION, ticket, 3, wire.HOST, payload=bytes(20))
        )
        if half.ask(Run(head, 1, 20), 0.0) is None:
            return False
        assert half.take(ticket) is not None
        half.took(head)
        half.answered(ticket, 20)
        return True

    assert ask(0xFFFFFFF0)
    assert ask(5)  # the numbers went around
    assert ask(0xFFFFFFF5)  # a little late
    assert not ask(0x90000000)
    assert not ask(0xFFFE0000)
    assert ask(100_000)
    assert not ask(6)
    assert half.counts.stale == 3


def test_requests_that_come_too_fast_are_not_served() -> None:
    """A forged or doubled NACK or RNACK costs one small packet, not an answer each."""
    world = World(1, Weather(), random.Random(0))
    world.host.ask(1, body(1, 300), 476)
    world.run()
    node = world.nodes[0]
    payload = wire.pack_missing((1 << 10) - 1, 10)
    nack = wire.pack_header(wire.Kind.NACK, SESSION, 1, 3, wire.HOST, payload=payload) + payload
    before = world.sent
    world.now += 1
    for _ in range(1000):
        node.receive(nack)
    assert world.sent - before == 10
    assert node.half.counts.limited == 999
    host = world.host
    host.half.open(2, 3, 300, 476, world.now)
    host.trains[2] = host.trains[1]
    rnack = wire.pack_header(wire.Kind.RNACK, SESSION, 2, 3, 0, payload=b"")
    before = world.sent
    for _ in range(1000):
        host.receive(0, rnack)
    assert world.sent - before == CUT.fragments(300)


def test_waits_follow_the_times_and_stay_in_their_bounds() -> None:
    patience = Patience()
    assert patience.wait_s == CAP_S
    for _ in range(100):
        patience.sample(10e-6)
    assert patience.wait_s == FLOOR_S
    for _ in range(100):
        patience.sample(8e-3)
    assert 8e-3 < patience.wait_s < 10e-3
    before = patience.wait_s
    patience.impatient()
    assert patience.wait_s == 2 * before
    for _ in range(100):
        patience.sample(1.0)
    assert patience.wait_s == CAP_S


def test_one_pause_does_not_make_the_next_waits_long() -> None:
    patience = Patience()
    for _ in range(100):
        patience.sample(1e-3)
    patience.sample(50e-3)
    assert 5e-3 < patience.wait_s < 15e-3
    for _ in range(20):
        patience.sample(50e-3)  # it was no pause: this is how long it takes
    assert patience.wait_s == CAP_S


@pytest.mark.parametrize("ended", [False, True])
def test_an_answer_that_was_asked_for_in_vain_counts_once(ended: bool) -> None:
    """In however many datagrams it comes twice: the next one that is lost is missed soon."""
    half, fragments, now = HostHalf(2, Cut(48)), 10, 0.0

    def missed_after(ticket: int) -> float:
        half.open(ticket, 1, 40, 48 * fragments, now)
        half.landed(0, ticket, (1 << fragments) - 1, now + 1e-3)
        while not half.due(half.wake_at):
            pass
        assert half.missing(1, ticket)
        return half.wake_at - now

    for ticket in range(1, 60):
        half.open(ticket, 1, 40, 48 * fragments, now)
        for duck in range(2):
            half.landed(duck, ticket, (1 << fragments) - 1, now + (1 + duck / 10) * 1e-3)
        half.close(ticket)
        now += 0.1
    before = missed_after(60)
    half.landed(1, 60, (1 << fragments) - 1, now + before)
    if ended:
        half.close(60)
    for fragment in range(fragments):
        head = wire.Header(
            wire.Kind.ANSWER, 1, 60, 1, 1, fragment, fragments, 48 * fragments, 48 * fragment, 0
        )
        assert not half.answer(1, Run(head, 1, 48), now + before)
    if not ended:
        half.close(60)
    now += 0.1
    assert half.counts.duplicates == fragments
    assert before < missed_after(61) < 3 * before


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(wire.Kind)), st.integers(0, 3), st.integers(0, 5),
            st.integers(0, 20), st.integers(0, 20), st.sampled_from([*SIZES, 1, 476, 9999]),
            st.integers(0, 500), st.binary(max_size=60), st.integers(0, 3), st.booleans(),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_headers_of_any_kind_break_nothing(frames: list[tuple[object, ...]]) -> None:
    """Any header, sealed with a right checksum: the asks still end, with the right bytes."""
    world = World(2, Weather(), random.Random(0))
    world.host.ask(1, body(1, 300), 476, arrives=False)
    for kind, ticket, layer, fragment, more, size, offset, payload, duck, to_host in frames:
        try:
            data = wire.pack_header(
                kind, SESSION, ticket, layer, duck if to_host else wire.HOST, payload=payload,
                fragment=fragment, fragments=fragment + more, message_bytes=size, offset=offset,
            ) + payload  # fmt: skip
        except ValueError:
            continue
        if to_host:
            world.host.receive(duck % 2, data)
        else:
            world.nodes[duck % 2].receive(data)
    for node in world.nodes:
        node.half._cancelled.clear()
    world.run()
    check(world, {1: (300, 476)})


@given(st.binary(max_size=300), st.integers(1, 90))
def test_bitmaps_of_any_bytes(data: bytes, fragments: int) -> None:
    try:
        missing = wire.unpack_missing(data, fragments)
    except WireError:
        return
    assert wire.pack_missing(missing, fragments) == data


@given(st.binary(min_size=1, max_size=700), st.integers(1, 9))
def test_a_train_is_the_message(message: bytes, sixteenths: int) -> None:
    cut = Cut(sixteenths * 16)
    train = wire.datagrams(wire.Kind.ANSWER, 1, 2, 3, 4, message, cut.payload_bytes)
    whole = bytearray(len(message))
    at = 0
    for fragment in range(cut.fragments(len(message))):
        datagram = train[at : at + cut.datagram_bytes]
        at += len(datagram)
        header = wire.unpack_header(datagram)
        payload = datagram[32:]
        cut.check(Run(header, 1, len(payload)))
        assert header.fragment == fragment
        whole[header.offset : header.offset + len(payload)] = payload
        assert wire.check_message(header, message)
    assert at == len(train)
    assert whole == message
    broken = bytearray(message)
    broken[0] ^= 1
    assert not wire.check_message(header, bytes(broken))


@pytest.mark.parametrize(("mtu", "payload"), [(1500, 1440), (9000, 8928), (65536, 8928)])
def test_cuts_fill_their_packets(mtu: int, payload: int) -> None:
    assert Cut.for_mtu(mtu).payload_bytes == payload


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_duck_is_missed_soon_after_the_others_answered(answered: int) -> None:
    """All take 5 or 15 ms, but about the same in each round: who is silent when others are not is
    asked again after a millisecond or two, and not after as long as a round may take.
    """
    half, now = HostHalf(3, Cut(48)), 0.0
    for ticket in range(1, 60):
        half.open(ticket, 1, 40, 40, now)
        for duck in range(3):
            half.landed(duck, ticket, 1, now + (0.005, 0.015)[ticket % 2] + duck * 1e-4)
        half.close(ticket)
        now += 0.1
    half.open(60, 1, 40, 40, now)
    for duck in range(answered):
        half.landed(duck, 60, 1, now + 0.005)
    asked: list[Send] = []
    while not asked:
        now_due = half.wake_at
        asked = [send for send in half.due(now_due) if isinstance(send, Send)]
    waited = now_due - now
    assert {send.kind for send in asked} == {wire.Kind.ASK}
    if answered:
        assert waited < 0.008
        assert {send.duck for send in asked} == set(range(answered, 3))
    else:
        assert waited > 0.015
