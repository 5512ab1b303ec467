"""The recorder: what it keeps, where it places what ducks report, and the file it writes."""

from __future__ import annotations

import gzip
import json
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck.errors import ConfigError
from duck.trace import OFF, Span, Trace, anchor
from tests.perfetto import check_schema

DUCKS = ("duck 0", "duck 1")
IDS = np.array([[3, 1], [1, 200]], np.int32)


def sample() -> Trace:
    """Two lanes of one layer: asks that overlap, and device work beside them."""
    trace = Trace(DUCKS)
    trace.about(schedule="wave")
    trace.span("loop", "step", 10.0, 10.010, index=0, session=0, settled=2)
    trace.span("device", "attend", 10.0, 10.001, 4, lane=0)
    trace.ask(4, 10.001, 10.004, [(0, 1000), (200, 1000)], IDS[:1], (10.003, 10.004), lane=0)
    trace.span("device", "attend", 10.001, 10.002, 4, lane=1)
    trace.ask(4, 10.002, 10.005, [(500, 1000), (800, 1000)], IDS[1:], (10.005, 10.005), lane=1)
    trace.count("late_us", 10.004, 12.5)
    return trace


def events(trace: Trace, phase: str) -> list[dict[str, Any]]:
    return [event for event in trace.events() if event["ph"] == phase]


def test_file_is_what_perfetto_reads(tmp_path: Path) -> None:
    for name in ("trace.json", "trace.json.gz"):
        path = tmp_path / name
        sample().write(path)
        data = path.read_bytes()
        document = json.loads(gzip.decompress(data) if name.endswith("gz") else data)
        check_schema(document)
        assert document["otherData"]["schedule"] == "wave"
        assert document["otherData"]["ducks"] == list(DUCKS)
        assert document["otherData"]["dropped"] == {"spans": 0, "asks": 0, "counts": 0}


def test_events_say_what_was_recorded() -> None:
    spans = events(sample(), "X")
    step = next(event for event in spans if event["name"] == "step")
    assert (step["ts"], step["dur"]) == (0, 10_000)
    assert step["args"] == {"index": 0, "session": 0, "settled": 2}
    attend = [event for event in spans if event["name"] == "attend"]
    assert [event["args"] for event in attend] == [
        {"layer": 4, "lane": 0},
        {"layer": 4, "lane": 1},
    ]
    asks = [event for event in spans if event["cat"] == "net"]
    assert [event["args"]["experts"] for event in asks] == [[[3, 1]], [[1, 200]]]
    ducks = [event for event in spans if event["pid"] == 2]
    # Slack 1 ms of the first: half before, half after; the others alike.
    assert [(event["tid"], event["ts"], event["dur"]) for event in ducks] == [
        (0, 1500, 1000),
        (0, 3250, 1000),
        (1, 2100, 1000),
        (1, 3400, 1000),
    ]
    about = {"layer": 4, "ask": 1, "queue_us": 800, "compute_us": 1000, "answered_us": 3000}
    assert ducks[3]["args"] == about


def test_asks_that_overlap_get_rows_of_their_own() -> None:
    threads = {
        event["args"]["name"]: event["tid"]
        for event in events(sample(), "M")
        if event["name"] == "thread_name" and event["pid"] == 1
    }
    assert list(threads) == ["loop", "device", "net", "net 2"]
    asks = [event for event in events(sample(), "X") if event["cat"] == "net"]
    assert [event["tid"] for event in asks] == [threads["net"], threads["net 2"]]


def test_spans_that_nest_share_a_row_and_neighbours_do() -> None:
    trace = Trace()
    for start, end in ((0, 10), (1, 5), (5, 9), (2, 4), (10, 12)):
        trace.span("loop", "x", start, end)
    assert {event["tid"] for event in events(trace, "X")} == {0}
    trace.span("loop", "x", 8, 11)  # reaches out of the first
    assert {event["tid"] for event in events(trace, "X")} == {0, 1}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), max_size=40))
def test_rows_never_cross(pairs: list[tuple[int, int]]) -> None:
    trace = Trace()
    for start, length in pairs:
        trace.span("loop", "x", start / 1e6, (start + length) / 1e6)
    spans = events(trace, "X")
    assert len(spans) == len(pairs)
    for number, a in enumerate(spans):
        for b in spans[number + 1 :]:
            if a["tid"] != b["tid"]:
                continue
            a_end, b_end = a["ts"] + a["dur"], b["ts"] + b["dur"]
            apart = a_end <= b["ts"] or b_end <= a["ts"]
            nested = (a["ts"] <= b["ts"] and b_end <= a_end) or (
                b["ts"] <= a["ts"] and a_end <= b_end
            )
            assert apart or nested


seconds = st.floats(0, 1)


@given(seconds, seconds, seconds, seconds, st.floats(-1, 3))
def test_anchor_keeps_to_what_can_have_been(
    sent: float, wait: float, queue: float, compute: float, free: float
) -> None:
    arrived = sent + wait
    start, end = anchor(sent, arrived, queue, compute, free)
    assert start >= max(sent, free) - 1e-12
    assert start <= end <= max(arrived, free)
    if queue + compute <= wait and free <= sent:
        assert end - start == pytest.approx(compute)
        assert start - sent - queue == pytest.approx(arrived - end)  # as long there as back


def test_newest_are_kept_and_older_of_the_other_kinds_not_shown() -> None:
    trace = Trace(("duck 0",), spans=100, ask_events=12)  # two asks
    for number in range(5):
        at = float(number)
        trace.span("device", "attend", at, at + 0.1, number)
        trace.ask(number, at + 0.2, at + 0.4, [(0, 1)], IDS[:1])
    assert trace.dropped() == {"spans": 0, "asks": 3, "counts": 0}
    assert [ask.layer for ask in trace.asks()] == [3, 4]
    shown = [event for event in events(trace, "X") if event["cat"] == "device"]
    assert [event["args"]["layer"] for event in shown] == [4]  # layer 3's lies before its ask


def test_threads_record_at_once() -> None:
    trace = Trace((), spans=50)

    def record() -> None:
        for number in range(1000):
            trace.span("device", "x", number, number + 1)

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trace.dropped()["spans"] == 3950
    assert len(trace.spans()) == 50


def test_asks_come_back_as_recorded() -> None:
    ask = sample().asks()[1]
    assert (ask.layer, ask.rows, ask.sent, ask.done) == (4, 1, 10.002, 10.005)
    assert ask.ducks_us == ((500, 1000), (800, 1000))
    assert ask.arrived == (10.005, 10.005)
    np.testing.assert_array_equal(ask.ids, IDS[1:])
    assert ask.args == {"lane": 1}
    assert sample().spans()[1] == Span("device", "attend", 4, 10.0, 10.001, {"lane": 0})


def test_off_records_nothing() -> None:
    OFF.span("device", "attend", 0, 1, 3, lane=1)
    OFF.ask(0, 0, 1, [(0, 1)], IDS)
    OFF.count("x", 0, 1)
    OFF.about(model="x")
    assert not OFF.on
    assert not OFF.spans()
    assert not OFF.asks()
    assert not OFF.counts()
    assert not OFF.facts
    assert OFF.dropped() == {"spans": 0, "asks": 0, "counts": 0}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_full_disk_leaves_the_older_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    sample().write(path)
    before = path.read_bytes()
    larger = sample()
    larger.about(noise=random.Random(1).randbytes(50_000).hex())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(ConfigError, match=f"--trace .*{name}: File too large"):
            larger.write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_no_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> Iterator[dict[str, Any]]:
        yield {}
        raise KeyboardInterrupt

    trace = sample()
    monkeypatch.setattr(trace, "events", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace.write(tmp_path / "trace.json")
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    link, file = tmp_path / "link.json", tmp_path / "file.json"
    link.symlink_to(file)
    sample().write(link)
    assert link.is_symlink()
    assert json.loads(file.read_text())["traceEvents"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--trace .*none/trace.json: No such file"):
        sample().write(tmp_path / "none" / "trace.json")
