"""What a trace says about overlap: who was busy, who waited for whom, and what it should have been.

Three figures say most. Overlap efficiency is (sum of stages - time) / (sum of stages - largest): 0
when device, ducks and wire took turns, 1 when only the busiest is left to be seen. Exposed expert
wait is the share of the time in which the device had nothing to do while asks were in flight. And
the idle share of the busiest: the one to lower, since the others' idleness costs nothing.
"""

from __future__ import annotations

import bisect
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from duck.errors import ConfigError
from duck.plan.closed import Times
from duck.plan.simulate import SCHEDULES, simulate
from duck.recording import Asked, Recording
from duck.trace import CANCELLED, FAILED, LATE, Span
from duck.wire import plain

# A duck that its asks wait for by less than this share of them is no straggler.
NOTABLE = 0.01

Interval = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """One resource over the time looked at."""

    name: str  # device, ducks (the busiest of them), wire, loop
    busy_ms: float
    share: float
    idle_ms: float


@dataclass(frozen=True)
class Part:
    """Pieces of device work of one kind."""

    name: str
    count: int
    median_ms: float
    total_ms: float


@dataclass(frozen=True)
class DuckFigures:
    """One duck's asks."""

    name: str
    share: float  # of the time, computing
    compute_ms: float  # an ask, median
    queue_ms: float  # an ask, mean
    way_ms: float  # an ask, there and back, median
    gb_s: float | None  # weights read while computing; None: the file does not say their size
    last: float  # share of the asks that waited for this duck last
    behind_ms: float  # an ask: how much later than the median duck its answer came, mean


@dataclass(frozen=True)
class Summary:
    """The figures of one trace."""

    schedule: str
    ended: str | None  # by which error the run ended
    steps: int
    step_ms: float | None  # mean; None: no decode step in it, and all figures are of all of it
    settled: int  # tokens
    time_ms: float  # looked at: all steps, once where several sessions' overlap
    stages: list[Stage]
    parts: list[Part]
    asks: int
    failed: int  # asks; their time is in no figure
    cancelled: int
    overlap_efficiency: float
    exposed_wait: float  # share of the time
    idle_of_busiest: float
    ducks: list[DuckFigures]
    straggler: str | None
    straggler_why: str
    common_experts: float | None  # share of a row's experts that its neighbour has too
    late_us: float | None  # how late the loop heard of the device, 99 of 100 times less
    predicted_ms: float | None  # a step of these stages under this schedule
    dropped: int  # records that were too old to be in the file


def summarize(recording: Recording) -> Summary:
    """The figures of the steps in a trace, or of all of it when there is no step in it.

    Raises:
        ConfigError: nothing in it took any time.
    """
    steps = sorted(recording.on("loop", "step"), key=lambda span: span.start)
    times = _union((span.start, span.end) for span in steps) or _all(recording)
    total = _length(times)
    if not total:
        raise ConfigError("nothing in this trace took any time")
    inside = _Inside(times)
    device = [span for span in recording.on("device") if inside(span)]
    asks = [ask for ask in recording.asks if inside(ask)]
    working = _union((span.start, span.end) for span in device)
    flying = _union((ask.start, ask.end) for ask in asks)
    both = _length(working) + _length(flying) - _length(_union([*working, *flying]))
    computing = [
        sum(ask.answers[duck].end - ask.answers[duck].start for ask in asks if duck in ask.answers)
        for duck in range(len(recording.ducks))
    ]
    named = {"step", "prefill"}
    loop = [span for span in recording.on("loop") if span.name not in named and inside(span)]
    busy = {
        "device": _length(working),
        "ducks": max(computing, default=0.0),
        "wire": sum(_way(ask) for ask in asks),
    }
    if loop:
        busy["loop"] = _length(_union((span.start, span.end) for span in loop))
    stages = [
        Stage(name, us / 1e3, us / total, max(0.0, total - us) / 1e3) for name, us in busy.items()
    ]
    ducks, straggler, why = _ducks(recording, asks, total, computing)
    schedules = Counter(_text(span.args.get("schedule", "unknown")) for span in steps)
    schedule = schedules.most_common(1)[0][0] if schedules else "unknown"
    return Summary(
        schedule=schedule,
        ended=_text(recording.facts["ended"]) if "ended" in recording.facts else None,
        steps=len(steps),
        step_ms=statistics.fmean(span.end - span.start for span in steps) / 1e3 if steps else None,
        settled=sum(n for span in steps if type(n := span.args.get("settled")) is int),
        time_ms=total / 1e3,
        stages=stages,
        parts=_parts(device),
        asks=len(asks),
        failed=len(recording.on("net", FAILED)),
        cancelled=len(recording.on("net", CANCELLED)),
        overlap_efficiency=_efficiency(list(busy.values()), total),
        exposed_wait=(_length(flying) - both) / total,
        idle_of_busiest=max(0.0, 1 - max(busy["device"], busy["ducks"]) / total),
        ducks=ducks,
        straggler=straggler,
        straggler_why=why,
        common_experts=_common(asks, steps),
        late_us=_late(recording, inside),
        predicted_ms=_predicted(schedule, steps, device, asks),
        dropped=recording.dropped,
    )


def _text(value: object) -> str:
    """What a file holds as a text that no terminal obeys."""
    return plain(str(value))[:200]


def _efficiency(stages: Sequence[float], time: float) -> float:
    room = sum(stages) - max(stages, default=0.0)
    return 0.0 if room <= 0 else min(1.0, max(0.0, (sum(stages) - time) / room))


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Intervals that do not touch, in order, covering the same."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _all(recording: Recording) -> list[Interval]:
    things: list[Span | Asked] = [*recording.spans, *recording.asks]
    if not things:
        return []
    return [(min(thing.start for thing in things), max(thing.end for thing in things))]


class _Inside:
    """Whether something began within the times looked at."""

    def __init__(self, times: Sequence[Interval]) -> None:
        self._times = times
        self._starts = [start for start, _ in times]

    def __call__(self, thing: Span | Asked) -> bool:
        return self.at(thing.start)

    def at(self, moment: float) -> bool:
        found = bisect.bisect_right(self._starts, moment) - 1
        return found >= 0 and moment < self._times[found][1]


def _parts(device: Sequence[Span]) -> list[Part]:
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in device:
        by_name[span.name].append((span.end - span.start) / 1e3)
    parts = [Part(name, len(ms), statistics.median(ms), sum(ms)) for name, ms in by_name.items()]
    return sorted(parts, key=lambda part: -part.total_ms)


def _slowest(ask: Asked) -> float:
    """The longest computing of an ask's ducks."""
    return max((answer.compute for answer in ask.answers.values()), default=0.0)


def _way(ask: Asked) -> float:
    """What an ask took beside the duck that answered last: wire, sockets, the loop."""
    if not ask.answers:
        return ask.end - ask.start
    last = max(ask.answers.values(), key=lambda answer: answer.answered)
    return max(0.0, ask.end - ask.start - last.queue - last.compute)


def _ducks(
    recording: Recording, asks: Sequence[Asked], total: float, computing: Sequence[float]
) -> tuple[list[DuckFigures], str | None, str]:
    """Each duck's figures, the one that is waited for most, and why it is."""
    names = recording.ducks
    whole = [ask for ask in asks if len(ask.answers) == len(names)]
    if not whole or not names:
        return [], None, ""
    lasts: Counter[int] = Counter()
    behind = [0.0] * len(names)
    for ask in whole:
        answered = [ask.answers[duck].answered for duck in range(len(names))]
        middle = statistics.median(answered)
        lasts[max(range(len(names)), key=answered.__getitem__)] += 1
        for duck, at in enumerate(answered):
            behind[duck] += at - middle
    sizes = _sizes(recording.facts, len(names))
    ducks = []
    for duck, name in enumerate(names):
        mine = [ask.answers[duck] for ask in whole]
        compute = sum(answer.compute for answer in mine)
        read = sum(len(set().union(*ask.experts)) for ask in whole) * sizes[duck] if sizes else 0.0
        ways = [max(0.0, one.answered - one.queue - one.compute) for one in mine]
        ducks.append(
            DuckFigures(
                name,
                share=computing[duck] / total,
                compute_ms=statistics.median(answer.compute for answer in mine) / 1e3,
                queue_ms=statistics.fmean(answer.queue for answer in mine) / 1e3,
                way_ms=statistics.median(ways) / 1e3,
                gb_s=read / compute / 1e3 if sizes and compute else None,
                last=lasts[duck] / len(whole),
                behind_ms=behind[duck] / len(whole) / 1e3,
            )
        )
    slow = max(ducks, key=lambda duck: duck.behind_ms)
    if slow.behind_ms * 1e3 < NOTABLE * statistics.median(ask.end - ask.start for ask in whole):
        return ducks, None, ""
    by_compute = slow.compute_ms - statistics.median(duck.compute_ms for duck in ducks)
    by_way = slow.way_ms - statistics.median(duck.way_ms for duck in ducks)
    why = "it computes longer" if by_compute >= by_way else "its answers are longer on their way"
    return ducks, slow.name, why


def _sizes(facts: Mapping[str, Any], ducks: int) -> list[float]:
    """Bytes of one expert on each duck, if the file says."""
    sizes = facts.get("expert_bytes")
    if not isinstance(sizes, list) or len(sizes) != ducks:
        return []
    good = [float(size) for size in sizes if isinstance(size, int | float) and 0 < size < 1e12]
    return good if len(good) == ducks else []


def _common(asks: Sequence[Asked], steps: Sequence[Span]) -> float | None:
    """Of the experts of each step's second row, those that the first one has as well."""
    by_session: dict[Any, list[Span]] = defaultdict(list)
    for span in steps:
        by_session[_key(span.args)].append(span)
    begins = {session: [span.start for span in spans] for session, spans in by_session.items()}
    rows: dict[tuple[Any, int, int], list[tuple[int, list[int]]]] = defaultdict(list)
    for ask in asks:
        session = _key(ask.args)
        if session not in begins:
            continue
        step = bisect.bisect_right(begins[session], ask.start)
        lane = ask.args.get("lane")
        order = lane if type(lane) is int else 0
        rows[session, step, ask.layer] += [(order, row) for row in ask.experts]
    common = possible = 0
    for found in rows.values():
        if len(found) == 2:  # of more, or of several sessions, nobody knows who follows whom
            (_, row), (_, after) = sorted(found, key=lambda pair: pair[0])
            common += len({*row} & {*after})
            possible += len({*after})
    return common / possible if possible else None


def _late(recording: Recording, inside: _Inside) -> float | None:
    found = sorted(value for at, value in recording.counters.get(LATE, ()) if inside.at(at))
    return found[len(found) * 99 // 100] if found else None


def _key(args: Mapping[str, Any]) -> str:
    return str(args.get("session"))


def _predicted(
    schedule: str, steps: Sequence[Span], device: Sequence[Span], asks: Sequence[Asked]
) -> float | None:
    """A step of the measured stages, simulated; None where a stage was not measured."""
    if schedule not in SCHEDULES or not steps or not asks:
        return None
    times, draft = measured_times(device, asks)
    if times is None or (schedule == "wave" and not draft):
        return None
    sessions = len({_key(span.args) for span in steps}) if schedule == "pingpong" else 1
    return simulate(times, schedule, draft=draft, sessions=sessions).step_ms


def measured_times(device: Sequence[Span], asks: Sequence[Asked]) -> tuple[Times | None, bool]:
    """What a step was made of, in medians; and whether it made drafts.

    Layers are counted from the asks, so a trace of part of a model predicts that part.
    """
    by: dict[str, list[Span]] = defaultdict(list)
    for span in device:
        by[span.name].append(span)

    def median(name: str, among: Sequence[Span] | None = None) -> float:
        spans = by[name] if among is None else among
        return statistics.median(s.end - s.start for s in spans) / 1e3 if spans else 0.0

    if not by["attend"]:
        return None, False
    draft = bool(by["guess"])
    mtp = {span.layer for span in by["guess"]}
    main = [ask for ask in asks if ask.layer not in mtp]
    if not main or max(ask.rows for ask in main) > 2:  # several sessions in one ask
        return None, draft
    layers = {ask.layer for ask in main}
    alone = [ask for ask in main if ask.rows == 1]
    paired = [ask for ask in main if ask.rows == 2]
    one = [span for span in by["attend"] if span.args.get("rows") == 1]
    two = [span for span in by["attend"] if span.args.get("rows") == 2 and span.layer in layers]
    # What never ran alone is known of pairs only, and then the other way round.
    pair = statistics.median(map(_slowest, paired or alone)) / 1e3
    expert = statistics.median(map(_slowest, alone)) / 1e3 if alone else pair / 2
    pair = pair if paired else 2 * expert
    attend, attend2 = median("attend", one or two), median("attend", two or one)
    way = statistics.median(map(_way, main)) / 1e3
    dense = {span.layer for span in by["dense"]}
    times = Times(
        attend=attend,
        shared=median("shared"),
        expert=expert,
        second_row=attend2 / attend - 1 if attend else 0.0,
        common=2 - pair / expert if expert else 0.0,
        out_fixed=way / 2,
        out_row=0.0,
        back_fixed=way / 2,
        back_row=0.0,
        moe_layers=len(layers),
        dense_layers=len(dense),
        dense=max(0.0, median("dense") - attend),
        head=median("head"),
        combine=median("combine"),
        host=0.0,
    )
    return times, draft


def tables(summary: Summary) -> list[Table]:
    """The figures for people."""
    head = _plain()
    tokens = f", {summary.settled / summary.steps:.2f} tokens each" if summary.settled else ""
    if summary.step_ms is None:
        rows = [
            ("decode steps", "none in this trace; generate more than one token"),
            ("figures below", f"of all of it, prefill and all: {summary.time_ms:.2f} ms"),
        ]
    else:
        rows = [
            ("schedule", summary.schedule),
            ("steps", f"{summary.steps} of {summary.step_ms:.2f} ms{tokens}"),
            ("predicted step", _ms(summary.predicted_ms)),
        ]
    rows += [
        ("overlap efficiency", f"{summary.overlap_efficiency:.0%}"),
        ("exposed expert wait", f"{summary.exposed_wait:.0%} of the time"),
        ("idle of the busiest", f"{summary.idle_of_busiest:.0%}"),
        ("experts common to lanes", _percent(summary.common_experts)),
        ("loop late, 99 of 100", _us(summary.late_us)),
    ]
    if summary.straggler:
        late = max(duck.behind_ms for duck in summary.ducks)
        text = f"{summary.straggler}: {late * 1e3:.0f} us an ask, {summary.straggler_why}"
        rows.append(("waited for most", text))
    if summary.failed or summary.cancelled:
        rows.append(("asks that failed", f"{summary.failed}; {summary.cancelled} cancelled"))
    if summary.ended:
        rows.append(("ended by", summary.ended))
    if summary.dropped:
        rows.append(("not in the file", f"{summary.dropped} older records"))
    for name, value in rows:
        head.add_row(Text(name, "dim"), Text(value))
    stages = _table("stage", "busy ms", "share", "idle ms")
    for stage in summary.stages:
        share = f"{stage.share:.0%}"
        stages.add_row(stage.name, f"{stage.busy_ms:.1f}", share, f"{stage.idle_ms:.1f}")
    parts = _table("device work", "pieces", "median ms", "total ms")
    for part in summary.parts:
        parts.add_row(
            Text(part.name), str(part.count), f"{part.median_ms:.3f}", f"{part.total_ms:.1f}"
        )
    ducks = _table("duck", "busy", "compute ms", "queue ms", "way ms", "GB/s", "last", "behind ms")
    for duck in summary.ducks:
        ducks.add_row(
            Text(duck.name), f"{duck.share:.0%}", f"{duck.compute_ms:.3f}", f"{duck.queue_ms:.3f}",
            f"{duck.way_ms:.3f}", "" if duck.gb_s is None else f"{duck.gb_s:.2f}",
            f"{duck.last:.0%}", f"{duck.behind_ms:+.3f}",
        )  # fmt: skip
    return [head, stages, parts, ducks]


def to_json(summary: Summary) -> dict[str, Any]:
    """Plain values, for machines."""
    return asdict(summary)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} ms"


def _us(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} us"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _plain() -> Table:
    return Table(show_header=False, box=None, padding=(0, 2, 0, 0))


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
