"""Policies, closed forms and the choice between them, with times that are simply given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duck.plan.closed import ORIGINAL, TUNED, Times, batch, serial, wave
from duck.schedule import (
    BATCH,
    GAIN,
    PINGPONG,
    PROBE_STEPS,
    RECHECK_STEPS,
    SERIAL,
    WAVE,
    Average,
    Chooser,
    Way,
    chunks,
    tokens_per_second,
)

SHARING = replace(TUNED, common=0.9)


@pytest.mark.parametrize(
    ("policy", "sessions", "rows", "want"),
    [
        (SERIAL, 5, 2, (1, 1)),
        (BATCH, 1, 2, (1, 2)),
        (BATCH, 5, 1, (1, 4)),
        (WAVE, 1, 2, (1, 1)),
        (WAVE, 3, 2, (3, 1)),
        (PINGPONG, 1, 2, (2, 1)),
        (PINGPONG, 2, 2, (2, 1)),
        (PINGPONG, 3, 2, (2, 2)),
        (PINGPONG, 4, 2, (2, 2)),
        (PINGPONG, 6, 2, (3, 2)),
        (PINGPONG, 6, 1, (2, 3)),
        (PINGPONG, 0, 2, (2, 1)),
    ],
)
def test_grouping(policy, sessions: int, rows: int, want: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    assert policy.grouping(sessions, rows) == want


def test_chunks() -> None:
    assert [len(part) for part in chunks(range(600), 256)] == [256, 256, 88]
    assert list(chunks([1, 2], 256)) == [[1, 2]]
    assert list(chunks([], 256)) == []


def test_an_average_forgets() -> None:
    average = Average(4)
    for value in (1.0, 2.0, 3.0):
        average.add(value)
    assert average.value == 2
    for _ in range(100):
        average.add(10.0)
    assert average.value == pytest.approx(10)


# the choice


def run(
    chooser: Chooser, steps: int, at: Times, *, accept: float = 0.875, sessions: int = 1
) -> Way:
    """So many steps on a machine with these times; the way of the next one."""
    for number in range(steps):
        way = chooser.way(sessions)
        right = number % 8 < 8 * accept
        seconds = 1 / tokens_per_second(way, at, sessions)
        if chooser.note(way, seconds, proposed=int(way.draft), accepted=int(right)):
            choice = chooser.decide(way, at, sessions=sessions)
            assert "tok/s" in choice.why
    return chooser.way(sessions)


def auto(draft: str = "auto", early: str = "auto", *, can_draft: bool = True) -> Chooser:
    return Chooser("auto", draft, early, can_draft=can_draft)


@pytest.mark.parametrize("schedule", ["serial", "batch", "wave", "pingpong"])
@pytest.mark.parametrize("draft", ["auto", "mtp", "off"])
def test_a_fixed_schedule_stays(schedule: str, draft: str) -> None:
    chooser = Chooser(schedule, draft, "auto", can_draft=True)
    way = run(chooser, 3 * RECHECK_STEPS, TUNED, accept=0)
    assert (way.policy.name, way.draft, way.early) == (schedule, draft != "off", False)
    assert chooser.way(7) == way


def test_no_mtp_layer_no_drafts() -> None:
    assert not Chooser("wave", "mtp", "on", can_draft=False).way(1).draft
    assert auto(can_draft=False).way(1) == Way(BATCH, draft=False)
    assert auto(can_draft=False).way(2) == Way(PINGPONG, draft=False)


def test_auto_tries_one_and_two_rows_first() -> None:
    chooser = auto()
    ways = []
    for _ in range(3 * PROBE_STEPS):
        ways.append(chooser.way(1))
        due = chooser.note(ways[-1], 0.1, proposed=1, accepted=1)
    tried = [Way(policy, draft=True) for policy in (WAVE, BATCH, SERIAL)]
    assert ways == [way for way in tried for _ in range(PROBE_STEPS)]
    assert due


@pytest.mark.parametrize(
    ("at", "accept", "want"),
    [
        (TUNED, 0.875, Way(WAVE, draft=True)),
        (ORIGINAL, 0.875, Way(WAVE, draft=True)),
        (SHARING, 0.875, Way(BATCH, draft=True)),
        (TUNED, 0.125, Way(BATCH, draft=False)),
    ],
)
def test_auto_takes_what_promises_most(at: Times, accept: float, want: Way) -> None:
    assert run(auto(), 40, at, accept=accept) == want


@pytest.mark.parametrize("can_draft", [True, False])
def test_auto_takes_serial_where_overlapping_costs_more_than_it_hides(*, can_draft: bool) -> None:
    """Device and ducks on the same cores: steps that overlap take longer than any form says."""
    at = replace(TUNED, common=0.9)  # else a wave hides more than it costs
    for contention, want in ((1.0, BATCH), (1.2, SERIAL)):
        chooser = auto(can_draft=can_draft)
        for _ in range(40):
            way = chooser.way(1)
            seconds = (serial if way.policy is SERIAL else batch)(at, draft=way.draft) / 1e3
            seconds *= 1 if way.policy is SERIAL else contention
            if chooser.note(way, seconds, proposed=int(way.draft), accepted=int(way.draft)):
                choice = chooser.decide(way, at, sessions=1)
                assert "serial" in choice.why
        assert chooser.way(1) == Way(want, draft=can_draft)


@pytest.mark.parametrize(("gain", "looks"), [(0.9, 1), (0.98, 3), (1.0, 3)])
def test_serial_is_tried_again_only_where_it_comes_close(gain: float, looks: int) -> None:
    """gain: a batch's step by a serial one's."""
    chooser = auto()
    seen = []
    for _ in range(3 * RECHECK_STEPS):
        way = chooser.way(1)
        seen.append(way.policy)
        seconds = gain if way.policy is BATCH else 1.0
        if chooser.note(way, seconds, proposed=1, accepted=1):
            chooser.decide(way, TUNED, sessions=1)
    assert chooser.way(1).policy is WAVE
    assert seen.count(BATCH) == 3 * PROBE_STEPS
    assert seen.count(SERIAL) == looks * PROBE_STEPS


def test_a_step_that_was_held_up_makes_nothing_serial() -> None:
    chooser = auto(can_draft=False)
    for number in range(40):
        way = chooser.way(1)
        form = serial if way.policy is SERIAL else batch
        seconds = form(TUNED, draft=False) / 1e3 + (10 if number == 2 else 0)
        if chooser.note(way, seconds, proposed=0, accepted=0):
            chooser.decide(way, TUNED, sessions=1)
    assert chooser.way(1).policy is BATCH


def test_auto_may_be_told_to_draft() -> None:
    assert run(auto("mtp"), 40, TUNED, accept=0.125).draft
    assert not run(auto("off"), 40, TUNED).draft


def test_auto_with_several_sessions() -> None:
    assert run(auto(), 40, TUNED, sessions=2) == Way(PINGPONG, draft=True)
    assert run(auto(), 40, TUNED, sessions=2, accept=0.125) == Way(PINGPONG, draft=False)


def test_auto_changes_its_mind_only_after_two_looks() -> None:
    chooser = auto()
    assert run(chooser, 40, TUNED).policy is WAVE
    look = RECHECK_STEPS + 3 * PROBE_STEPS
    seen = [run(chooser, look, SHARING) for _ in range(3)]
    assert seen[0].policy is WAVE
    assert seen[-1].policy is BATCH


def test_auto_does_not_swing_over_little() -> None:
    """Times at which batch promises less than GAIN more leave things as they are."""
    chooser = auto("mtp")
    assert run(chooser, 40, TUNED).policy is WAVE
    little = next(
        at
        for at in (replace(TUNED, common=n / 200) for n in range(200))
        if 1.005 < wave(at) / batch(at, draft=True) < GAIN
    )
    assert run(chooser, 6 * RECHECK_STEPS, little).policy is WAVE


def test_early_is_used_where_it_was_faster() -> None:
    for gain, want in ((1.1, True), (0.9, False), (1.0, False)):
        chooser = auto("mtp")
        for _ in range(4 * RECHECK_STEPS):
            way = chooser.way(1)
            seconds = 0.1 / gain if way.early else 0.1
            if chooser.note(way, seconds, proposed=1, accepted=1):
                chooser.decide(way, TUNED, sessions=1)
        assert run(chooser, 40, TUNED).early is want
    assert run(auto(early="on"), 40, TUNED).early
    assert not run(auto(early="off"), 3 * RECHECK_STEPS, TUNED).early
