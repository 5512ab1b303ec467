"""Refusals: every one is counted, and a flood of them is a few lines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from duck.transports.refusals import Refusals


def test_a_few_are_all_logged() -> None:
    refusals = Refusals()
    assert [refusals.note(float(second)) for second in range(200)] == [0] * 200
    assert refusals.count == 200


def test_a_flood_is_a_few_lines_and_then_one_a_second() -> None:
    refusals = Refusals()
    lines = [refusals.note(1000.0 + number / 1000) for number in range(10_000)]
    told = [line for line in lines if line is not None]
    assert refusals.count == 10_000
    assert lines[: Refusals.LINES] == [0] * Refusals.LINES
    assert len(told) == Refusals.LINES + 9
    assert refusals.note(2000.0) == 10_000 - sum(told) - len(told)


@given(st.lists(st.floats(0, 1e6), max_size=300))
def test_every_refusal_is_in_a_line_or_in_the_next_ones_number(times: list[float]) -> None:
    refusals = Refusals()
    told = [refusals.note(now) for now in sorted(times)]
    seen = sum(1 + line for line in told if line is not None)
    last = refusals.note(1e9)
    assert last is not None
    assert seen + last == len(times)
    assert refusals.count == len(times) + 1
