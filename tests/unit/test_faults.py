"""The bad network itself: what goes in, what comes out, and that a seed decides which."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest

from duck.transports.faulty import Faults, flip_bit

SENT = [bytes([number]) * 8 for number in range(200)]


def through(faults: Faults[bytes], step_s: float = 0.001) -> list[bytes]:
    """One message every step; then whatever is still on its way."""
    arrived: list[bytes] = []
    now = 0.0
    for message in SENT:
        now += step_s
        faults.put(message, now)
        arrived += faults.get(now)
    while (at := faults.next_at()) is not None:
        assert at > now
        now = at
        got = faults.get(now)
        assert got
        arrived += got
    return arrived


def test_a_good_network() -> None:
    faults: Faults[bytes] = Faults(1)
    assert through(faults) == SENT
    assert faults.counts == {"messages": 200}


@pytest.mark.parametrize(
    "rates",
    [
        {"drop": 0.3}, {"duplicate": 0.3}, {"reorder": 0.3}, {"delay_s": 0.01}, {"corrupt": 0.3},
        {"drop": 0.1, "duplicate": 0.2, "reorder": 0.2, "delay_s": 0.003, "corrupt": 0.1},
    ],
)  # fmt: skip
def test_a_seed_decides(rates: dict[str, Any]) -> None:
    first, again, other = (through(Faults(seed, **rates)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_drop() -> None:
    faults: Faults[bytes] = Faults(2, drop=0.25)
    arrived = through(faults)
    assert arrived == [message for message in SENT if message in arrived]
    assert len(arrived) == 200 - faults.counts["dropped"]
    assert 20 < faults.counts["dropped"] < 80


def test_duplicate() -> None:
    faults: Faults[bytes] = Faults(2, duplicate=0.25)
    arrived = through(faults)
    assert [message for message, _ in itertools.groupby(arrived)] == SENT
    assert len(arrived) == 200 + faults.counts["duplicated"]
    assert 20 < faults.counts["duplicated"] < 80


@pytest.mark.parametrize("step_s", [0.0001, 0.01])
def test_reorder(step_s: float) -> None:
    """An overtaken message comes a few places or a few milliseconds later, never lost."""
    faults: Faults[bytes] = Faults(2, reorder=0.25)
    arrived = through(faults, step_s)
    assert sorted(arrived) == SENT
    moved = max(abs(arrived.index(message) - at) for at, message in enumerate(SENT))
    assert moved <= 8
    # At a slow pace the wait for others ends before they come.
    assert (moved > 0) == (step_s < 0.002)


def test_delay() -> None:
    faults: Faults[int] = Faults(3, delay_s=0.5)
    for number in range(100):
        faults.put(number, 10.0)
    early = faults.get(10.25)
    assert 25 < len(early) < 75
    assert sorted(early + faults.get(10.5)) == list(range(100))
    assert faults.next_at() is None


def test_faults_that_are_not_at_work() -> None:
    faults: Faults[bytes] = Faults(2, drop=0.5, duplicate=0.5, reorder=0.5, corrupt=0.5)
    faults.at_work = False
    messages = [bytes([number]) for number in range(50)]
    for message in messages:
        faults.put(message, 1.0)
    assert faults.get(1.0) == messages
    faults.at_work = True
    for message in messages:
        faults.put(message, 2.0)
    assert faults.get(3.0) != messages


def test_corrupt() -> None:
    faults: Faults[bytes] = Faults(2, corrupt=0.25)
    arrived = through(faults)
    changed = [(a, b) for a, b in zip(SENT, arrived, strict=True) if a != b]
    assert len(changed) == faults.counts["corrupted"]
    for sent, came in changed:
        bits = [(a ^ b).bit_count() for a, b in zip(sent, came, strict=True)]
        assert sum(bits) == 1


def test_corrupt_what_is_not_bytes() -> None:
    faults: Faults[int] = Faults(2, corrupt=1.0, spoil=lambda number, random: -number)
    faults.put(5, 0.0)
    assert faults.get(0.0) == [-5]


def test_one_rate_does_not_change_what_another_hits() -> None:
    few = through(Faults(5, drop=0.2))
    more = through(Faults(5, drop=0.2, duplicate=0.5))
    assert [message for message, _ in itertools.groupby(more)] == few


def test_nothing_to_flip() -> None:
    assert flip_bit(b"", Random(0)) == b""
