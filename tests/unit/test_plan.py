"""The simulator against published figures, closed forms against the simulator, dependencies."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import defaultdict

import pytest

from duck.plan import closed
from duck.plan.closed import ORIGINAL, TUNED, Times
from duck.plan.simulate import Busy, Simulated, simulate

LAYERS = TUNED.moe_layers + TUNED.dense_layers


@pytest.mark.parametrize(
    ("schedule", "sessions", "tuned", "original"),
    [
        ("serial", 1, 95.0, 125.2),
        ("batch", 1, 92.9, 122.3),
        ("wave", 1, 74.0, 91.8),
        ("pingpong", 2, 129.6, 133.9),
    ],
)
def test_steps_with_drafts_as_published(
    schedule: str, sessions: int, tuned: float, original: float
) -> None:
    assert simulate(TUNED, schedule, sessions=sessions).step_ms == pytest.approx(tuned, rel=0.01)
    found = simulate(ORIGINAL, schedule, sessions=sessions).step_ms
    assert found == pytest.approx(original, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "options", "tuned", "original"),
    [
        ("serial", {"draft": False}, 59.4, 87.8),
        ("batch", {"draft": False}, 57.4, 84.9),
        ("pingpong", {"draft": False, "sessions": 2}, 72.6, 89.6),
        ("batch", {"pieces": 8}, 83.1, 112.4),
        ("wave", {"pieces": 8}, 73.8, 91.7),
    ],
)
def test_steps_without_drafts_and_in_pieces(
    schedule: str, options: dict[str, int], tuned: float, original: float
) -> None:
    assert simulate(TUNED, schedule, **options).step_ms == pytest.approx(tuned, rel=0.01)
    assert simulate(ORIGINAL, schedule, **options).step_ms == pytest.approx(original, rel=0.01)


@pytest.mark.parametrize(
    ("schedule", "device", "ducks"), [("batch", 0.20, 0.66), ("wave", 0.45, 0.92)]
)
def test_shares_as_published(schedule: str, device: float, ducks: float) -> None:
    found = simulate(TUNED, schedule)
    assert found.device == pytest.approx(device, abs=0.01)
    assert found.ducks == pytest.approx(ducks, abs=0.01)


def _random_times(rng: random.Random) -> Times:
    return Times(
        attend=rng.uniform(0.1, 0.8),
        shared=rng.uniform(0.01, 0.08),
        expert=rng.uniform(0.2, 1.2),
        common=rng.uniform(0, 0.4),
        out_fixed=rng.uniform(0.01, 0.2),
        out_row=rng.uniform(0.005, 0.08),
        back_fixed=rng.uniform(0.01, 0.2),
        back_row=rng.uniform(0.005, 0.08),
        dense=rng.uniform(0.1, 0.4),
        head=rng.uniform(0.5, 2),
    )


def test_closed_forms_and_simulation_agree() -> None:
    rng = random.Random(5)
    errors: dict[str, list[float]] = defaultdict(list)
    for _ in range(60):
        times = _random_times(rng)
        draft = rng.random() < 0.5
        for name, formula in (("serial", closed.serial), ("batch", closed.batch)):
            played = simulate(times, name, draft=draft, steps=2).step_ms
            assert formula(times, draft=draft) == pytest.approx(played, rel=1e-9)
        played = simulate(times, "pingpong", draft=draft, sessions=2, steps=3).step_ms
        told = closed.pingpong(times, 2, draft=draft)
        errors["pingpong"].append(abs(told / played - 1))
        played = simulate(times, "wave", steps=2).step_ms
        errors["wave"].append(abs(closed.wave(times) / played - 1))
        assert played >= closed.bound(times, rows=2, together=False)
    assert statistics.median(errors["wave"]) <= 0.0016
    assert max(errors["wave"]) <= 0.012
    assert statistics.median(errors["pingpong"]) <= 0.01
    assert max(errors["pingpong"]) <= 0.03


def _of(found: Simulated, resource: str) -> list[Busy]:
    return [span for span in found.spans if span.resource == resource]


def test_wave_keeps_both_at_work_on_different_lanes() -> None:
    found = simulate(TUNED, "wave", steps=1)
    ducks = _of(found, "ducks")
    together = 0
    for span in _of(found, "device"):
        for asked in ducks:
            if span.name == "attend" and asked.start < span.end and span.start < asked.end:
                assert span.lane != asked.lane
                together += 1
    assert together > TUNED.moe_layers  # each layer of either lane hides behind the other's experts


def test_serial_overlaps_nothing() -> None:
    spans = sorted(simulate(TUNED, "serial", steps=2).spans, key=lambda span: span.start)
    for one, following in itertools.pairwise(spans):
        assert one.end <= following.start + 1e-9


@pytest.mark.parametrize(
    ("schedule", "sessions"), [("serial", 1), ("batch", 1), ("wave", 1), ("pingpong", 3)]
)
def test_nothing_starts_before_what_it_needs(schedule: str, sessions: int) -> None:
    found = simulate(TUNED, schedule, sessions=sessions, steps=1)
    by: dict[tuple[int, int, str], dict[int, Busy]] = defaultdict(dict)
    for span in found.spans:
        by[span.session, span.lane, span.name].setdefault(span.layer, span)
    for (session, lane, name), spans in by.items():
        if name == "attend":
            for layer, span in spans.items():
                if layer == LAYERS:  # the MTP layer follows the head
                    assert span.start >= by[session, 0, "head"][-1].end - 1e-9
                elif layer > TUNED.dense_layers:  # the answers of the layer before
                    fixed = TUNED.back_fixed
                    answered = by[session, lane, "answers"][layer - 1].end + fixed
                    assert span.start >= answered - 1e-9
                if lane == 1:  # the KV of the sure row
                    assert span.start >= by[session, 0, "attend"][layer].end - 1e-9
        if name == "experts":
            for layer, span in spans.items():
                attended = by[session, lane, "attend"][layer].end
                assert span.start >= attended + TUNED.out_fixed - 1e-9


@pytest.mark.parametrize("resource", ["device", "ducks", "out", "back"])
def test_nothing_is_used_twice_at_once(resource: str) -> None:
    spans = sorted(_of(simulate(TUNED, "pingpong", sessions=3), resource), key=lambda s: s.start)
    assert spans
    for one, following in itertools.pairwise(spans):
        assert one.end <= following.start + 1e-9


def test_early_start_gains_a_little_here_and_is_complete() -> None:
    plain, early = simulate(TUNED, "wave"), simulate(TUNED, "wave", early=True)
    assert len(plain.spans) == len(early.spans)
    assert early.step_ms < plain.step_ms


def test_tokens_a_step() -> None:
    assert TUNED.tokens(draft=True) == pytest.approx(1.871)
    assert TUNED.tokens(draft=False) == 1
