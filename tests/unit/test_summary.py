"""What `duck trace summarize` says of simulated steps with known figures, and of bad files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from duck import recording
from duck.cli import main
from duck.errors import ConfigError
from duck.plan.closed import TUNED
from duck.plan.simulate import Busy, simulate
from duck.recording import Recording, read
from duck.summary import Summary, summarize, tables
from duck.trace import CANCELLED, FAILED, Trace

DUCKS = 3
MS = 1e-3


def played(schedule: str, *, steps: int = 2, slow: int | None = None) -> Trace:
    """A simulation as a trace: the same spans, as a pipeline would have recorded them.

    slow: that duck's answers came last, 10 us after the others'.
    """
    found = simulate(TUNED, schedule, steps=steps)
    trace = Trace(tuple(f"duck {number}" for number in range(DUCKS)))
    trace.about(expert_bytes=[1_000_000] * DUCKS)
    begun = 0.0
    for number, end in enumerate(found.ends):
        args = {"index": number, "session": 0, "schedule": schedule, "settled": 2}
        trace.span("loop", "step", begun, end * MS, **args)
        begun = end * MS
    sent: dict[tuple[int, int], Busy] = {}
    computed: dict[tuple[int, int], Busy] = {}
    layers = TUNED.moe_layers + TUNED.dense_layers
    for span in found.spans:
        key = (span.lane, span.layer)
        rows = 2 if schedule != "wave" and span.layer < layers else 1
        if span.resource == "device":
            layer = layers if span.name == "guess" else span.layer
            rows = 2 if span.layer == layers else rows
            where = {"lane": span.lane, "session": 0, "rows": rows}
            trace.span("device", span.name, span.start * MS, span.end * MS, layer, **where)
        elif span.resource == "out":
            sent[key] = span
        elif span.resource == "ducks":
            computed[key] = span
        elif span.resource == "back":
            arrived = sent[key].end + TUNED.out_fixed
            work = computed[key]
            took = round((work.end - work.start) * 1e3), round((work.start - arrived) * 1e3)
            done = (span.end + TUNED.back_fixed) * MS
            times = [done - (0 if duck == slow else 10e-6) for duck in range(DUCKS)]
            ids = np.array([[0, 1, 2, 3 + span.lane]] * rows, np.int32)
            ids[rows - 1 :, 3] += rows - 1
            trace.ask(
                span.layer, sent[key].start * MS, done, [took[::-1]] * DUCKS, ids, times,
                lane=span.lane, session=0,
            )  # fmt: skip
    return trace


def recorded(trace: Trace, tmp_path: Path) -> Recording:
    path = tmp_path / "trace.json.gz"
    trace.write(path)
    return read(path)


def stage(summary: Summary, name: str) -> Any:
    return next(stage for stage in summary.stages if stage.name == name)


@pytest.mark.parametrize("schedule", ["serial", "batch", "wave"])
def test_figures_of_a_simulated_step(schedule: str, tmp_path: Path) -> None:
    found = simulate(TUNED, schedule, steps=2)
    summary = summarize(recorded(played(schedule), tmp_path))
    assert summary.schedule == schedule
    assert (summary.steps, summary.settled) == (2, 4)
    assert summary.step_ms == pytest.approx(found.step_ms, rel=1e-3)
    assert stage(summary, "device").share == pytest.approx(found.device, abs=2e-3)
    assert stage(summary, "ducks").share == pytest.approx(found.ducks, abs=2e-3)
    assert summary.idle_of_busiest == pytest.approx(1 - max(found.device, found.ducks), abs=2e-3)
    # Of four experts three are common, whether the rows share an ask or not.
    assert summary.common_experts == pytest.approx(0.75)
    # What was measured makes the step that was measured.
    assert summary.predicted_ms == pytest.approx(found.step_ms, rel=5e-3)


def test_overlap_efficiency_tells_schedules_apart(tmp_path: Path) -> None:
    efficiency = {
        schedule: summarize(recorded(played(schedule), tmp_path)).overlap_efficiency
        for schedule in ("serial", "batch", "wave")
    }
    assert efficiency["serial"] < 0.01
    assert 0.02 < efficiency["batch"] < 0.2
    assert efficiency["wave"] > 0.8


def test_exposed_wait_is_device_idle_while_asks_fly(tmp_path: Path) -> None:
    trace = Trace(("duck 0",))
    trace.span("loop", "step", 0, 10 * MS, schedule="batch", session=1)
    trace.span("device", "attend", 0, 2 * MS, 3)
    trace.ask(3, 2 * MS, 8 * MS, [(0, 5000)], np.zeros((1, 2), np.int32))
    trace.span("device", "shared", 2 * MS, 3 * MS, 3)
    summary = summarize(recorded(trace, tmp_path))
    assert summary.exposed_wait == pytest.approx(0.5)
    assert stage(summary, "device").busy_ms == pytest.approx(3)
    assert stage(summary, "ducks").busy_ms == pytest.approx(5)
    assert stage(summary, "wire").busy_ms == pytest.approx(1)
    assert summary.idle_of_busiest == pytest.approx(0.5)
    # (3 + 5 + 1 - 10) / (9 - 5) is below nothing: nobody overlapped, and 1 ms nobody worked.
    assert summary.overlap_efficiency == 0


def test_how_late_the_loop_was_within_steps(tmp_path: Path) -> None:
    trace = played("serial")
    begun, ended = trace.spans()[0].start, trace.spans()[1].end
    for number in range(1000):
        at = begun + (ended - begun) * number / 1001 - number / 1e6  # heard within the steps
        trace.span("device", "attend", at, at, late_us=float(number))
        trace.span("device", "attend", ended + 1.0, ended + 1.0, late_us=1e9)
    trace.count("another", begun, 1e9)
    assert summarize(recorded(trace, tmp_path)).late_us == 990
    assert summarize(recorded(played("serial"), tmp_path)).late_us is None


def test_asks_that_came_to_nothing_are_counted(tmp_path: Path) -> None:
    trace = played("serial")
    for number, name in enumerate((FAILED, CANCELLED, CANCELLED)):
        trace.span("net", name, number * MS, (number + 1) * MS, 3, why="")
    found, plain = (
        summarize(recorded(trace, tmp_path)),
        summarize(recorded(played("serial"), tmp_path)),
    )
    assert (found.failed, found.cancelled) == (1, 2)
    assert (plain.failed, plain.cancelled) == (0, 0)
    assert found.stages == plain.stages  # nor do they make anything busier
    console = Console(width=80)
    with console.capture() as captured:
        console.print(tables(found)[0])
    assert "1; 2 cancelled" in captured.get()


def test_the_straggler_has_a_name_and_a_reason(tmp_path: Path) -> None:
    summary = summarize(recorded(played("wave", slow=2), tmp_path))
    assert summary.straggler == "duck 2"
    assert summary.straggler_why == "its answers are longer on their way"
    slow = summary.ducks[2]
    assert slow.last == 1
    assert slow.behind_ms == pytest.approx(0.010, abs=1e-3)
    assert slow.compute_ms == pytest.approx(TUNED.expert, rel=0.01)
    # Four experts of a megabyte in 0.58 ms.
    assert slow.gb_s == pytest.approx(4 * 1e6 / 0.58e-3 / 1e9, rel=0.01)


def test_ducks_that_are_alike_have_no_straggler(tmp_path: Path) -> None:
    assert summarize(recorded(played("wave"), tmp_path)).straggler is None


def test_a_trace_without_steps_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    trace = Trace()
    trace.span("device", "dense", 1.0, 1.004, 0)
    summary = summarize(recorded(trace, tmp_path))
    assert (summary.steps, summary.time_ms) == (0, pytest.approx(4))
    assert summary.predicted_ms is None
    assert summary.step_ms is None
    with pytest.raises(ConfigError, match="nothing in this trace took any time"):
        summarize(recorded(Trace(), tmp_path))


# the command


def run(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["trace", "summarize", *words])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "wave.json"
    played("wave", steps=3).write(path)
    return path


def test_table_json_and_picture(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, str(file))
    assert (code, err) == (0, "")
    for word in ("wave", "overlap efficiency", "predicted step", "attend", "duck 1", "GB/s"):
        assert word in out
    png = tmp_path / "steps.png"
    code, out, err = run(capfd, str(file), "--json", "--png", str(png), "--steps", "1:3")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["steps"] == 3
    assert {"overlap_efficiency", "exposed_wait", "predicted_ms", "straggler"} <= set(figures)
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < 150_000


def corrupt(event: dict[str, Any] | Any, **about: Any) -> str:
    return json.dumps({"traceEvents": [event], "otherData": {
        "format": "duck trace 1", "ducks": ["duck 0"], "dropped": {}, **about,
    }})  # fmt: skip


SPAN = {"ph": "X", "name": "a", "cat": "device", "pid": 1, "tid": 0, "ts": 0, "dur": 1, "args": {}}
ANSWER = {"ask": 0, "queue_us": 0, "compute_us": 1, "answered_us": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bad.json: no whole JSON file (it is empty)"),
        ('{"traceEvents":[{"ph":"X","na', "no whole JSON file"),
        ("[" * 200_000, "bad.json: no whole JSON file (lists within lists, too deep to read)"),
        ('{"ts": 1' + "0" * 5000 + "}", "no whole JSON file"),
        ("[]", "format 'duck trace 1'"),
        ('{"traceEvents": [], "otherData": {"format": "other"}}', "format 'duck trace 1'"),
        (corrupt({**SPAN, "ph": "C"}), "event 0: value is None, want a number"),
        (corrupt({**SPAN, "ph": "C", "args": {"value": 1e300}}), "value is 1e+300"),
        (corrupt(SPAN, ducks="x"), "ducks is no list of names"),
        (corrupt(7), "event 0 is no object"),
        (corrupt({**SPAN, "ts": float("nan")}), "event 0: ts is nan, want a number"),
        (corrupt({**SPAN, "ts": -1}), "ts is -1"),
        (corrupt({**SPAN, "dur": 10**300}), "dur is 1000"),
        (corrupt({**SPAN, "name": "x" * 300}), "name is 'xxx"),
        (corrupt({**SPAN, "pid": 9}), "process 9"),
        (corrupt({**SPAN, "args": []}), "args is no object"),
        (corrupt({**SPAN, "args": {"layer": 1.5}}), "layer is 1.5"),
        (corrupt({**SPAN, "pid": 2, "tid": 1}), "duck 1 of 1"),
        (corrupt({**SPAN, "pid": 2, "args": ANSWER}), "an answer of duck 0 to ask 0, which is not"),
        (corrupt({**SPAN, "cat": "net", "args": {"ask": 0, "experts": [[1.5]]}}), "experts is no"),
        (corrupt({**SPAN, "dur": 0}), "bad.json: nothing in this trace took any time"),
    ],
)
def test_bad_files_are_one_line(
    text: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    for data in (text.encode(), gzip.compress(text.encode())):
        path.write_bytes(data)
        code, out, err = run(capfd, str(path))
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1


def test_a_pipe_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.json")
    code, out, err = run(capfd, str(tmp_path / "t.json"))
    assert (code, out) == (2, "")
    assert err == f"duck: {tmp_path}/t.json: it is a pipe, want a regular file\n"


def test_a_file_cut_anywhere_is_one_line(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = file.read_bytes()
    packed = gzip.compress(whole)
    path = tmp_path / "cut.json"
    for data in (whole[:-3], whole[: len(whole) // 2], packed[:-1], packed[: len(packed) // 2],
                 packed[:12] + b"\xff" * 40 + packed[52:]):  # fmt: skip
        path.write_bytes(data)
        code, out, err = run(capfd, str(path))
        assert (code, out) == (2, "")
        assert "no whole JSON file" in err or "Not a gzipped" in err
        assert err.count("\n") == 1


def test_names_in_a_file_command_neither_terminal_nor_typesetter(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = Trace(("\x1b[2J[bold]$\\frac", "duck 1"))
    trace.about(ended="\x1b]0;title\x07[red]lost duck 1")
    trace.span("loop", "step", 0, 1, schedule="$\\sqrt\x1b[31m[blink]", session="$x")
    trace.span("device", "[link=x]\x1b", 0, 0.5, 3, session="$x")
    trace.ask(3, 0.2, 0.9, [(0, 1000)] * 2, np.zeros((1, 2), np.int32), session="$x")
    path = tmp_path / "trace.json"
    trace.write(path)
    code, out, err = run(capfd, str(path), "--png", str(tmp_path / "x.png"))
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]lost duck 1" in out  # as it stands there
    assert "[link=x]" in out


def test_a_file_that_unpacks_to_too_much_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "LARGEST", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 22)))
    with pytest.raises(ConfigError, match=r"^\S+bomb.json.gz: more than 1 MiB"):
        read(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.json",), "No such file"),
        ((".",), "it is a folder"),
        (("FILE", "--png", "x.png", "--steps", "3"), "--steps '3': want two numbers as 3:6"),
        (("FILE", "--png", "x.png", "--steps", "2:9"), "--steps 2:9: the trace has steps 0:3"),
        (("FILE", "--steps", "0:1"), "--steps chooses what --png draws"),
        (("FILE", "--png", "/nowhere/x.png"), "--png /nowhere/x.png: no such folder"),
        (("FILE", "--png", "x.png", "--steps", "5:3"), "--steps 5:3: the first number must be"),
        (("FILE", "--png", "x.png", "--steps", ""), "--steps '': want two numbers"),
        (("FILE", "--steps", ""), "--steps '': want two numbers"),
        (("FILE", "--png", ""), "--png '' is no file"),
        (("FILE", "--png", "x.json"), "--png 'x.json': pictures are PNG: give a name that ends in"),
        (("FILE", "--png", "FILE"), "pictures are PNG"),
        (("FILE", "--png", "x" * 300 + ".png"), "xxx': File name too long"),
    ],
)
def test_bad_words_are_one_line(
    words: tuple[str, ...], said: str, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capfd, *(str(file) if word == "FILE" else word for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_picture_never_takes_the_place_of_its_trace(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace, link = tmp_path / "trace.png", tmp_path / "link.png"
    trace.write_bytes(file.read_bytes())
    link.symlink_to(trace)
    for png in (trace, link):
        code, out, err = run(capfd, str(trace), "--png", str(png))
        assert (code, out) == (2, "")
        assert err == f"duck: --png {png}: that is the trace itself: give another name\n"
    assert trace.read_bytes() == file.read_bytes()


def test_a_trace_without_decode_steps_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = Trace()
    trace.span("loop", "prefill", 1.0, 1.005)
    trace.span("device", "attend", 1.0, 1.004, 0)
    path = tmp_path / "prefill.json"
    trace.write(path)
    code, out, _ = run(capfd, str(path))
    assert code == 0
    assert "none in this trace" in out
    for word in ("predicted step", "schedule", "0 of"):
        assert word not in out
    code, out, err = run(capfd, str(path), "--png", str(tmp_path / "x.png"))
    assert (code, out) == (2, "")
    assert err == "duck: --png: no decode step to draw; generate more than one token\n"
    assert list(tmp_path.iterdir()) == [path]
