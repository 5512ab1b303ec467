"""The real pipeline over emulated stages: the same tokens, no stage shorter than told, overlap."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from duck.cli import main
from duck.errors import DuckError
from duck.plan import overlap
from duck.plan.closed import TUNED
from duck.plan.overlap import SESSIONS, bench_pipeline
from duck.plan.simulate import YIELDS
from duck.recording import read

FEW = replace(TUNED, moe_layers=4, dense_layers=1)


def test_every_schedule_runs_and_none_beats_its_bound(tmp_path: Path) -> None:
    rows = bench_pipeline(FEW, ducks=3, steps=2, scale=2.0, folder=tmp_path)
    assert [row.schedule for row in rows] == list(SESSIONS)
    for row in rows:
        # Deadlines are kept from when a stage could start, so no session's step is ever too fast,
        # however slow this machine is now.
        assert row.step_ms >= row.bound_ms / row.sessions * 0.999
        assert row.loop_us > 0
        assert 0 <= row.overlap_efficiency <= 1
        assert 0 < row.device <= 1
        assert 0 < row.ducks <= 1
        recording = read(tmp_path / f"{row.schedule}.json.gz")
        assert len(recording.ducks) == 3
        # Each ask as long as its times say, in microseconds and twice as long.
        for ask in recording.asks:
            assert ask.end - ask.start >= 2e3 * FEW.flight(ask.rows) * 0.999
            assert len(ask.answers) == 3


def test_device_works_on_one_lane_while_ducks_work_on_the_other(tmp_path: Path) -> None:
    bench_pipeline(FEW, schedules=["wave"], ducks=1, steps=2, scale=2.0, folder=tmp_path)
    recording = read(tmp_path / "wave.json.gz")
    across = 0
    for span in recording.on("device", "attend"):
        for ask in recording.asks:
            flying = ask.start < span.end and span.start < ask.end
            if flying and ask.layer != FEW.moe_layers + FEW.dense_layers:
                assert ask.args["lane"] != span.args["lane"]
                across += 1
    assert across > 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only some systems can pin")
def test_the_loops_work_is_timed_on_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = overlap._Run.run

    def run(self: overlap._Run) -> None:
        seen.append((self._scale, len(os.sched_getaffinity(0))))
        real(self)

    monkeypatch.setattr(overlap._Run, "run", run)
    before = os.sched_getaffinity(0)
    bench_pipeline(FEW, schedules=["wave"], ducks=1, steps=1, scale=0.5)
    assert seen == [(0.5, len(before)), (0.0, 1)]
    assert os.sched_getaffinity(0) == before


def test_tokens_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = iter([[1, 2, 3], [1, 2, 4]])
    real = overlap._Run.run

    def run(self: overlap._Run) -> None:
        real(self)
        if self._scale:
            self.tokens = next(settled)

    monkeypatch.setattr(overlap._Run, "run", run)
    with pytest.raises(DuckError, match="schedules settled other tokens"):
        bench_pipeline(FEW, schedules=["serial", "batch"], ducks=1, steps=1, scale=0.5)


def test_the_simulator_orders_device_work_as_the_device_does() -> None:
    from duck.device import OVERTAKEN

    assert {name: OVERTAKEN[name] for name in YIELDS} == YIELDS


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "pipeline", "--layers", "3", "--scale", "1", "--steps", "1", "--ducks", "2"]
    assert main([*words, "--schedule", "wave", "--json"]) == 0
    out, err = capfd.readouterr()
    assert not err
    report = json.loads(out)
    [row] = report["rows"]
    assert (row["schedule"], report["times"]["moe_layers"]) == ("wave", 3)
    assert main([*words, "--schedule", "batch"]) == 0
    out, err = capfd.readouterr()
    assert "simulated" in out
    assert "batch" in out
    assert "--scale 1: threads wake up late by as much as stages take" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--scale", "0"), "--scale 0.0: want 0.1 to 1000"),
        (("--steps", "0"), "--steps 0: want 1 to 100"),
        (("--ducks", "999"), "--ducks 999"),
        (("--layers", "0"), "--layers 0"),
        (("--schedule", "tide"), "want some of serial, batch, wave, pingpong"),
        (("--traces", "no/such"), "--traces no/such: no such folder"),
        (("--traces", ""), "--traces is empty"),
        (("--traces", "x" * 300), "x: no such folder"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "pipeline", *words]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert said in err
    assert err.count("\n") == 1
