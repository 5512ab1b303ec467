"""What was measured, as sums for the statistics and as times for the choice of a schedule."""

from __future__ import annotations

import numpy as np
import pytest

from duck.meter import Lately, Meter, Stages, Totals, overlap_efficiency


def test_times_from_one_and_two_rows() -> None:
    stages = Stages(ducks=2)
    for stage, one, two in (("attend", 1.0, 1.1), ("shared", 0.2, 0.3), ("dense", 1.5, 1.7)):
        stages.worked(stage, 1, one, late=0.0)
        stages.worked(stage, 2, two, late=0.0)
    stages.worked("combine", 1, 0.1, late=0.0)
    stages.worked("guess", 1, 2.0, late=0.0)
    stages.worked("head", 2, 3.0, late=0.0)
    # Each ask's queue and compute are the slowest duck's; what is left is the wire.
    stages.asked(1, 5.0, [(0, 1_000_000), (1_000_000, 3_000_000)])
    stages.asked(2, 6.0, [(0, 4_500_000), (500_000, 1_000_000)])
    times = stages.times(5, 1)
    assert (times.moe_layers, times.dense_layers) == (5, 1)
    ms = {"attend": 1e3, "shared": 200, "dense": 500, "combine": 100, "head": 2500, "expert": 3e3}
    assert {name: getattr(times, name) for name in ms} == pytest.approx(ms)
    assert times.second_row == pytest.approx(0.1)
    assert times.common == pytest.approx(0.5)
    assert times.out(1) + times.back(1) == pytest.approx(1e3)
    assert times.out(2) + times.back(2) == pytest.approx(1.5e3)


def test_times_that_were_only_seen_with_more_rows() -> None:
    stages = Stages(ducks=1)
    stages.worked("attend", 4, 2.0, late=0.0)
    stages.asked(4, 3.0, [(0, 2_000_000)])
    times = stages.times(5, 0)
    assert (times.attend, times.expert) == pytest.approx((500, 500))
    assert (times.second_row, times.common, times.shared) == (0, 0, 0)


def test_totals_are_what_came_since() -> None:
    stages = Stages(ducks=2)
    assert stages.totals().since(Totals()) == Totals(each_duck=(0, 0))
    stages.worked("attend", 1, 1.0, late=0.0)
    stages.asked(1, 2.0, [(0, 500_000), (0, 1_000_000)])
    before = stages.totals()
    stages.worked("head", 1, 2.0, late=0.0)
    stages.asked(1, 3.0, [(250_000, 500_000), (0, 250_000)])
    assert stages.totals().since(before) == Totals(2.0, 0.5, 2.25, (0.5, 0.25))


def test_a_duck_cannot_have_taken_longer_than_its_ask() -> None:
    stages = Stages(ducks=1)
    stages.asked(1, 1.0, [(2**32 - 1, 2**32 - 1)])
    assert stages.totals().ducks == 1
    assert stages.totals().wire == 0


def test_many_asks_are_taken_in_together() -> None:
    stages = Stages(ducks=2)
    for number in range(1, 101):
        stages.asked(1, number, [(0, 500_000), (0, number * 10_000)])
    totals = stages.totals()
    assert totals.each_duck == pytest.approx((50, 50.5))
    assert totals.ducks == pytest.approx(50 * 0.5 + sum(n / 100 for n in range(51, 101)))
    assert totals.ducks + totals.wire == pytest.approx(sum(range(1, 101)))


def test_lately_is_the_last_seconds_of_work() -> None:
    stages = Stages(ducks=1)
    lately = Lately(stages)
    nothing = dict.fromkeys(
        ("device_busy", "ducks_busy", "overlap_efficiency", "expert_overlap"), 0.0
    )
    assert lately.figures(5.0) == nothing
    now = 100.0
    for second in range(40):  # the device is busy in half of each at first, then in a quarter
        lately.began(now)
        lately.began(now + 0.2)  # another session's
        stages.worked("attend", 1, 0.5 if second < 20 else 0.25, late=0.0)
        stages.asked(1, 0.75, [(0, 750_000)])
        lately.common(1, 4 if second < 20 else 8)
        lately.ended(now + 0.5)
        assert 0 < lately.figures(now + 0.6)["device_busy"] <= 0.5 / 0.6 + 1e-9
        lately.ended(now + 1.0)
        now += 60.0  # a pause is no work
        if second == 19:
            assert lately.figures(now)["device_busy"] == pytest.approx(0.5)
            assert lately.figures(now)["expert_overlap"] == 0.25
    found = lately.figures(now)
    want = {"device_busy": 0.25, "ducks_busy": 0.75, "expert_overlap": 0.125}
    assert found == pytest.approx({**want, "overlap_efficiency": 0.0})


def test_lateness() -> None:
    stages = Stages(ducks=1)
    assert stages.late_p99_s() == 0
    for number in range(100):
        stages.worked("attend", 1, 1.0, late=number / 100)
    assert stages.late_p99_s() == 0.99


def test_common_experts() -> None:
    meter = Meter()
    assert meter.experts(np.array([[1, 2], [3, 4]]), np.array([[2, 5], [6, 7]])) == (1, 4)
    assert (meter.shared_experts, meter.possible_experts) == (1, 4)
    meter.experts(np.array([[1, 2]]))  # a step of one row
    assert meter.possible_experts == 4


def test_overlap_efficiency() -> None:
    assert overlap_efficiency([2, 3], 5) == 0
    assert overlap_efficiency([2, 3], 3) == 1
    assert overlap_efficiency([2, 4], 5) == 0.5
    assert overlap_efficiency([2, 3], 9) == 0
    assert overlap_efficiency([3], 3) == overlap_efficiency([], 1) == 0
