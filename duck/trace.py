"""What happened when: spans on tracks, written once as a file that ui.perfetto.dev opens.

Recording must not change what it shows: a span is one tuple appended to a bounded queue, an ask to
all ducks is one record, and everything else (events, flows, rows for spans that overlap) is made
when the file is written. The newest records are kept; the file says how many older ones are not in
it. Times are seconds of one clock, the recorder's caller's; ducks have no clocks: they report
durations, and `anchor` places them between an ask and its answer.

Tracks: `device` (what the device computed), `loop` (steps, and what the event loop itself did),
`net` (asks, from sending to the last answer), one for each duck, and any other name.

Names that `duck trace summarize` understands. On `loop`: `step` with index, session, schedule and
settled (how many tokens), and `prefill`. On `device`, with layer, session and lane (0 the sure
token's, 1 the guess's): `attend` (what an ask waits for), `dense` (a dense layer, attention and
MLP), `shared`, `merge`; `embed`, `final`, `head`, `combine` (the MTP layer's input), `guess`; with
late_us, how much later the event loop heard of the end, they make a counter as well. Asks
carry session and lane as well. On `net`: `ask failed` and `ask cancelled`, with why. Other names
count as what their track did.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from duck import files
from duck.errors import ConfigError

# Newest records kept: at about 300 bytes a span and 170 for each duck of an ask this stays below
# 100 MB, and the file below what a browser opens.
SPANS = 150_000
COUNTS = 150_000
ASK_EVENTS = 400_000  # events that the asks become: each duck's span and flow

NO_LAYER = -1
HOST, DUCKS = 1, 2  # process ids in the file
FORMAT = "duck trace 1"  # how a reader knows a file of ours
# A counter: how late the event loop heard that the device was done, in microseconds.
LATE = "loop late us"
# Asks that came to nothing, as spans on `net`: they have no answers to draw.
FAILED, CANCELLED = "ask failed", "ask cancelled"
_FIRST = ("loop", "device", "net")  # the order of the tracks in the file; others follow
# A flow is bound to the span around its time, which must lie inside the span, not on its edge.
_INSIDE = 1e-9


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time on a track."""

    track: str
    name: str
    layer: int  # NO_LAYER: of no layer
    start: float
    end: float
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class AskSpan:
    """An ask, and what its ducks reported of it."""

    layer: int
    rows: int
    sent: float
    done: float
    ducks_us: tuple[tuple[int, int], ...]  # (queue, compute) of each duck
    arrived: tuple[float, ...]  # when each duck's answer was whole; `done` where nobody looked
    ids: np.ndarray  # (rows, top_k) experts
    args: Mapping[str, Any]


class Trace:
    """Records until `write`. Methods may be called from any thread.

    Args:
        ducks: their names, in duck order.
        spans: so many of the newest spans are kept.
        ask_events: so many events of the newest asks are kept; an ask has 2 + 4 for each duck.
    """

    on = True
    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        ducks: Sequence[str] = (),
        *,
        spans: int = SPANS,
        counts: int = COUNTS,
        ask_events: int = ASK_EVENTS,
    ) -> None:
        self.ducks = tuple(ducks)
        self.facts: dict[str, Any] = {}  # what the file says about the run; plain values
        asks = max(1, ask_events // (2 + 4 * len(self.ducks)))
        # Appending to a deque and counting by itertools are each one step of the interpreter, so
        # the device's thread and the event loop need no lock.
        self._spans: deque[tuple[Any, ...]] = deque(maxlen=spans)
        self._asks: deque[tuple[Any, ...]] = deque(maxlen=asks)
        self._counts: deque[tuple[str, float, float]] = deque(maxlen=counts)
        self._seen = {name: itertools.count() for name in ("spans", "asks", "counts")}
        self._span_seen, self._ask_seen, self._count_seen = self._seen.values()

    def about(self, **facts: Any) -> None:
        """Add to what the file says about the run."""
        self.facts.update(facts)

    def span(
        self, track: str, name: str, start: float, end: float, layer: int = NO_LAYER, **args: Any
    ) -> None:
        """Note that `name` took from start to end on a track. args: plain values."""
        next(self._span_seen)
        self._spans.append((track, name, layer, start, end, args))

    def ask(
        self,
        layer: int,
        sent: float,
        done: float,
        ducks_us: Sequence[tuple[int, int]],
        ids: np.ndarray,
        arrived: Sequence[float] | None = None,
        **args: Any,
    ) -> None:
        """Note an ask that was answered. What is given is kept, not copied: leave it as it is.

        ducks_us: (queue, compute) microseconds of every duck; ids: (rows, top_k) experts asked for;
        arrived: when each duck's answer was whole, if somebody looked; args: plain values, such as
        the session and lane.
        """
        next(self._ask_seen)
        self._asks.append((layer, sent, done, ducks_us, ids, arrived, args))

    def count(self, name: str, at: float, value: float) -> None:
        """Note a counter's value."""
        next(self._count_seen)
        self._counts.append((name, at, value))

    # what was recorded

    def spans(self) -> list[Span]:
        """The spans kept, in the order of recording."""
        return [
            Span(track, name, layer, start, end, args or {})
            for track, name, layer, start, end, args in tuple(self._spans)
        ]

    def asks(self) -> list[AskSpan]:
        """The asks kept, in the order of recording."""
        found = []
        for layer, sent, done, ducks_us, ids, times, args in tuple(self._asks):
            # A time of 0 is of an answer whose arrival nobody noted.
            arrived = tuple(at or done for at in times or (0.0,) * len(self.ducks))
            found.append(AskSpan(layer, len(ids), sent, done, tuple(ducks_us), arrived, ids, args))
        return found

    def counts(self) -> list[tuple[str, float, float]]:
        """The counters' values kept: (name, time, value)."""
        return list(self._counts)

    def dropped(self) -> dict[str, int]:
        """How many records of each kind were too old to be kept."""
        kept = {"spans": self._spans, "asks": self._asks, "counts": self._counts}
        # A count is looked at through its repr, "count(17)": taking the next would count.
        seen = {name: int(repr(count)[6:-1]) for name, count in self._seen.items()}
        return {name: max(0, seen[name] - len(kept[name])) for name in kept}

    # the file

    def write(self, path: str | Path) -> None:
        """Write everything as Chrome trace events; a name that ends in .gz is compressed.

        A file of that name is replaced once all is written.

        Raises:
            ConfigError: the file cannot be written.
        """
        path = Path(path)
        try:
            with _create(path) as file:
                file.write('{"traceEvents":[\n')
                separator = ""
                for event in self.events():
                    file.write(separator + json.dumps(event, separators=(",", ":")))
                    separator = ",\n"
                about = {
                    "format": FORMAT,
                    **self.facts,
                    "ducks": list(self.ducks),
                    "dropped": self.dropped(),
                }
                file.write('\n],"displayTimeUnit":"ms","otherData":')
                json.dump(about, file)
                file.write("}\n")
        except OSError as error:
            raise ConfigError(f"--trace {path}: {error.strerror or error}") from error

    def events(self) -> Iterator[dict[str, Any]]:
        """Chrome trace events; ts and dur are microseconds since the first record.

        M names processes and threads, X is a span, s t f the flow of an ask to each duck and back,
        C a counter.
        """
        spans, asks, counts = self._covered()
        starts = [*(s.start for s in spans), *(a.sent for a in asks), *(at for _, at, _ in counts)]
        zero = min(starts, default=0.0)
        tracks: dict[str, list[tuple[Span, int]]] = {name: [] for name in _FIRST}
        for span in spans:
            tracks.setdefault(span.track, []).append((span, -1))
        for number, ask in enumerate(asks):
            args = {"ask": number, "rows": ask.rows, **ask.args, "experts": ask.ids.tolist()}
            name = f"ask {ask.layer}"
            tracks["net"].append((Span("net", name, ask.layer, ask.sent, ask.done, args), number))

        yield _named("process_name", HOST, 0, "host")
        yield _named("process_name", DUCKS, 0, "ducks")
        net = [0] * len(asks)  # the thread that shows each ask
        thread = 0
        for track, members in tracks.items():
            first = thread
            for row, (span, number) in _rows(members):
                if first + row >= thread:
                    thread += 1
                    name = track if row == 0 else f"{track} {row + 1}"
                    yield from _thread(HOST, first + row, name)
                if number >= 0:
                    net[number] = first + row
                yield _x(HOST, first + row, span, zero)
        for duck, name in enumerate(self.ducks):
            yield from _thread(DUCKS, duck, name)
            free = -np.inf
            for number, ask in enumerate(asks):
                queue_us, compute_us = ask.ducks_us[duck]
                arrived = min(max(ask.arrived[duck], ask.sent), ask.done)
                start, free = anchor(ask.sent, arrived, queue_us / 1e6, compute_us / 1e6, free)
                about = {
                    "ask": number, "queue_us": queue_us, "compute_us": compute_us,
                    "answered_us": _us(arrived - ask.sent),
                }  # fmt: skip
                yield _x(DUCKS, duck, Span(name, "experts", ask.layer, start, free, about), zero)
                flow = number * len(self.ducks) + duck + 1
                yield _flow("s", HOST, net[number], flow, ask.sent + _INSIDE - zero)
                yield _flow("t", DUCKS, duck, flow, min(start + _INSIDE, free) - zero)
                yield _flow("f", HOST, net[number], flow, arrived - _INSIDE - zero)
        late = (
            (LATE, span.end + span.args["late_us"] / 1e6, span.args["late_us"])
            for span in spans
            if "late_us" in span.args
        )
        for name, at, value in itertools.chain(counts, late):
            yield {
                "ph": "C", "name": name, "pid": HOST, "tid": 0, "ts": _us(at - zero),
                "args": {"value": value},
            }  # fmt: skip

    def _covered(self) -> tuple[list[Span], list[AskSpan], list[tuple[str, float, float]]]:
        """What to show: where old records of one kind are lost, nothing older of the others."""
        spans, asks, counts = self.spans(), self.asks(), self.counts()
        oldest = {
            "spans": min((span.end for span in spans), default=-np.inf),
            "asks": min((ask.sent for ask in asks), default=-np.inf),
            "counts": min((at for _, at, _ in counts), default=-np.inf),
        }
        first = max(
            (oldest[name] for name, lost in self.dropped().items() if lost), default=-np.inf
        )
        return (
            [span for span in spans if span.start >= first],
            sorted((ask for ask in asks if ask.sent >= first), key=lambda ask: ask.sent),
            [count for count in counts if count[1] >= first],
        )


class NoTrace(Trace):
    """Records nothing; hot code asks `trace.on` before it gathers what to record."""

    on = False

    def span(
        self, track: str, name: str, start: float, end: float, layer: int = NO_LAYER, **args: Any
    ) -> None:
        pass

    def ask(
        self,
        layer: int,
        sent: float,
        done: float,
        ducks_us: Sequence[tuple[int, int]],
        ids: np.ndarray,
        arrived: Sequence[float] | None = None,
        **args: Any,
    ) -> None:
        pass

    def count(self, name: str, at: float, value: float) -> None:
        pass

    def about(self, **facts: Any) -> None:
        pass


OFF = NoTrace(spans=0, counts=0)


def anchor(
    sent: float, arrived: float, queue: float, compute: float, free: float
) -> tuple[float, float]:
    """When a duck computed, on the host's clock: (start, end).

    sent, arrived: when the host sent the ask and had the answer; queue, compute: how long the duck
    says it held the ask before computing, and computed; free: when it was done with its last one.

    What the duck does not account for is the way there and back, halved: the centre of the slack.
    A duck computes one ask at a time, so it never starts before it was free, and never ends after
    its answer was here.
    """
    slack = max(0.0, arrived - sent - queue - compute)
    end = min(arrived - slack / 2, arrived)
    start = max(end - compute, sent, free)
    return start, min(max(end, start + compute), max(arrived, start))


def _rows(members: Sequence[tuple[Span, int]]) -> Iterator[tuple[int, tuple[Span, int]]]:
    """Spread a track's spans over rows: on one row spans lie side by side or one in the other."""
    open_ends: list[list[float]] = []
    for member in sorted(members, key=lambda member: (member[0].start, -member[0].end)):
        span = member[0]
        row = 0
        while row < len(open_ends) and not _fits(open_ends[row], span):
            row += 1
        if row == len(open_ends):
            open_ends.append([])
        open_ends[row].append(span.end)
        yield row, member


def _fits(ends: list[float], span: Span) -> bool:
    """Whether a row has room; ends: of its open spans, the innermost last."""
    while ends and ends[-1] <= span.start:
        ends.pop()
    return not ends or span.end <= ends[-1]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)  # a viewer's clock counts nanoseconds


def _x(process: int, thread: int, span: Span, zero: float) -> dict[str, Any]:
    args = dict(span.args) if span.layer == NO_LAYER else {"layer": span.layer, **span.args}
    start = _us(span.start - zero)
    return {
        "ph": "X", "name": span.name, "cat": span.track, "pid": process, "tid": thread,
        # From rounded ends: spans that touch still do, and none reaches into the next.
        "ts": start, "dur": round(max(0.0, _us(span.end - zero) - start), 3), "args": args,
    }  # fmt: skip


def _flow(phase: str, process: int, thread: int, flow: int, at: float) -> dict[str, Any]:
    event = {
        "ph": phase, "name": "ask", "cat": "flow", "id": flow, "pid": process, "tid": thread,
        "ts": _us(at),
    }  # fmt: skip
    return {**event, "bp": "e"} if phase == "f" else event


def _named(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _thread(process: int, thread: int, name: str) -> Iterator[dict[str, Any]]:
    yield _named("thread_name", process, thread, name)
    order = {"sort_index": thread}
    yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": order}


@contextlib.contextmanager
def _create(path: Path) -> Iterator[TextIO]:
    with files.whole(path) as beside, beside.open("xb") as file:
        packed = gzip.GzipFile(path.name, "wb", 5, file) if path.name.endswith(".gz") else file
        with io.TextIOWrapper(packed, encoding="utf-8") as text:
            yield text
