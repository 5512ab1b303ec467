"""What was done, and what its stages took: of one answer, and of a whole pipeline."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from duck.plan.closed import Times
from duck.schedule import Average

LATE_SAMPLES = 4096
# Asks whose ducks' reports are taken in at once: one by one, 32 ducks would cost each ask 20 us.
TOGETHER = 16
# What is told of a running engine is of its last so many seconds of work, one more or less.
LATELY_S = 10


@dataclass
class Meter:
    """What one answer did."""

    steps: int = 0
    accepted: int = 0  # of the drafts
    drafts: list[tuple[int, int]] = field(default_factory=list)  # (completion index, guess)
    schedules: Counter[str] = field(default_factory=Counter)  # steps under each
    # Experts common to the two rows of a step, and how many there could be.
    shared_experts: int = 0
    possible_experts: int = 0

    def experts(self, sure: np.ndarray, guess: np.ndarray | None = None) -> tuple[int, int]:
        """Count what the rows of a step have in common; how many experts, and of how many.

        sure, guess: (layers, top_k) ids.
        """
        if guess is None:
            return 0, 0
        shared = int((sure[:, :, None] == guess[:, None, :]).sum())
        self.shared_experts += shared
        self.possible_experts += sure.size
        return shared, sure.size


@dataclass(frozen=True)
class Totals:
    """Seconds of work since the pipeline was made."""

    device: float = 0.0
    ducks: float = 0.0  # the slowest duck's computing of each ask
    wire: float = 0.0  # the rest of each ask, without waiting in ducks' queues
    each_duck: tuple[float, ...] = ()  # computing

    def since(self, before: Totals) -> Totals:
        """The difference to an earlier moment."""
        earlier = before.each_duck or (0.0,) * len(self.each_duck)
        return Totals(
            self.device - before.device,
            self.ducks - before.ducks,
            self.wire - before.wire,
            tuple(now - then for now, then in zip(self.each_duck, earlier, strict=True)),
        )


class Stages:
    """What the stages of all answers took, in sums and as running means by number of rows."""

    def __init__(self, ducks: int) -> None:
        self._device_s = self._ducks_s = self._wire_s = 0.0
        self._each_duck_s = np.zeros(ducks)
        self.late_s: deque[float] = deque(maxlen=LATE_SAMPLES)  # how late the event loop was lately
        self._device: dict[tuple[str, int], Average] = {}
        self._asks: dict[int, tuple[Average, Average]] = {}  # (duck, wire) of asks of n rows
        # (rows, seconds, ducks_us) of asks that are not in the figures yet.
        self._fresh: list[tuple[int, float, Sequence[tuple[int, int]]]] = []

    def worked(self, stage: str, rows: int, seconds: float, *, late: float) -> None:
        """The device did a piece of work; late: seconds until the loop heard."""
        self.late_s.append(late)
        self._device_s += seconds
        mean = self._device.get((stage, rows))
        if mean is None:
            mean = self._device[stage, rows] = Average()
        mean.add(seconds)

    def asked(self, rows: int, seconds: float, ducks_us: Sequence[tuple[int, int]]) -> None:
        """An ask was answered. ducks_us: (queue, compute) as the ducks say; kept, not copied."""
        self._fresh.append((rows, seconds, ducks_us))
        if len(self._fresh) >= TOGETHER:
            self._take_in()

    def _take_in(self) -> None:
        """Add the fresh asks to sums and means."""
        fresh, self._fresh = self._fresh, []
        if not fresh:
            return
        # A queue and a compute of 32 bits each: together they need more.
        told = np.array([ducks_us for _, _, ducks_us in fresh], np.int64)
        self._each_duck_s += told[:, :, 1].sum(axis=0) / 1e6
        slowest = told[np.arange(len(fresh)), told.sum(axis=2).argmax(axis=1)] / 1e6
        for (rows, seconds, _), (queue, compute) in zip(fresh, slowest.tolist(), strict=True):
            # A duck may say what it likes; it cannot have taken longer than the ask.
            compute = min(seconds, compute)
            wire = max(0.0, seconds - compute - queue)
            self._ducks_s += compute
            self._wire_s += wire
            means = self._asks.get(rows)
            if means is None:
                means = self._asks[rows] = Average(), Average()
            means[0].add(compute)
            means[1].add(wire)

    def late_p99_s(self) -> float:
        """The 99th percentile of how late the event loop was lately; 0 before anything ran."""
        ordered = sorted(self.late_s)
        return ordered[len(ordered) * 99 // 100] if ordered else 0.0

    def totals(self) -> Totals:
        """The sums so far."""
        self._take_in()
        each = tuple(self._each_duck_s.tolist())
        return Totals(self._device_s, self._ducks_s, self._wire_s, each)

    def times(self, moe_layers: int, dense_layers: int) -> Times:
        """The running means as the closed forms take them; 0 for what never ran.

        What was only seen with more rows, as in groups of sessions, counts row by row.

        moe_layers, dense_layers: of the model.
        """
        self._take_in()

        def device(stage: str, rows: int) -> float:
            mean = self._device.get((stage, rows))
            return mean.value * 1e3 if mean else 0.0

        def one(stage: str) -> float:
            seen = {
                rows: mean.value for (name, rows), mean in self._device.items() if name == stage
            }
            return _of_one_row(seen) * 1e3

        duck = _of_one_row({rows: d.value for rows, (d, _) in self._asks.items()}) * 1e3
        wire = _of_one_row({rows: w.value for rows, (_, w) in self._asks.items()}) * 1e3
        duck2, wire2 = (mean.value * 1e3 for mean in self._asks.get(2, (Average(), Average())))
        attend, attend2 = one("attend"), device("attend", 2)
        row = min(wire, max(0.0, wire2 - wire))
        return Times(
            attend=attend,
            second_row=attend2 / attend - 1 if attend and attend2 else 0.0,
            shared=one("shared"),
            expert=duck,
            common=2 - duck2 / duck if duck and duck2 else 0.0,
            # There is no telling the way there from the way back, nor does it matter.
            out_fixed=(wire - row) / 2,
            out_row=row / 2,
            back_fixed=(wire - row) / 2,
            back_row=row / 2,
            moe_layers=moe_layers,
            dense_layers=dense_layers,
            dense=max(0.0, one("dense") - attend),
            head=((device("head", 2) or one("head")) + one("guess")) / 2,
            combine=one("combine"),
            host=0.0,  # measured with the head
        )


class Lately:
    """What a pipeline did in its last seconds of work, for whoever watches it run.

    Pauses in which there was nothing to do count as if they had not been.
    """

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._running = 0  # steps and prompts
        self._since = 0.0  # when the first of them began
        self._now = _Mark(0.0, stages.totals())
        self._marks = deque([replace(self._now)], maxlen=LATELY_S)  # a second of work apart

    def began(self, now: float) -> None:
        """A step or a prompt is on its way."""
        if not self._running:
            self._since = now
        self._running += 1

    def ended(self, now: float) -> None:
        """It is no more, whatever became of it."""
        mark = self._now
        mark.active += now - self._since
        self._since = now
        self._running -= 1
        if mark.active - self._marks[-1].active >= 1.0:
            mark.totals = self._stages.totals()
            self._marks.append(replace(mark))

    def common(self, shared: int, possible: int) -> None:
        """So many experts were common to a session's rows in a step, of so many."""
        self._now.shared += shared
        self._now.possible += possible

    def figures(self, now: float) -> dict[str, float]:
        """Shares of the time: device_busy, ducks_busy, overlap_efficiency; and expert_overlap."""
        before, mark = self._marks[0], self._now
        active = mark.active - before.active + (now - self._since if self._running else 0.0)
        possible = mark.possible - before.possible
        return {
            **shares(self._stages.totals().since(before.totals), active),
            "expert_overlap": (mark.shared - before.shared) / possible if possible else 0.0,
        }


@dataclass
class _Mark:
    """Sums up to a moment."""

    active: float  # seconds in which there was work
    totals: Totals
    shared: int = 0
    possible: int = 0


def shares(work: Totals, seconds: float) -> dict[str, float]:
    """How busy device and ducks were in that time, and how much of their work overlapped."""
    if seconds <= 0:
        return dict.fromkeys(("device_busy", "ducks_busy", "overlap_efficiency"), 0.0)
    ducks = sum(work.each_duck) / len(work.each_duck)
    return {
        "device_busy": min(1.0, work.device / seconds),
        "ducks_busy": min(1.0, ducks / seconds),
        "overlap_efficiency": overlap_efficiency([work.device, work.ducks, work.wire], seconds),
    }


def _of_one_row(means: Mapping[int, float]) -> float:
    """Of one row, or the share of one in the fewest that were seen. means: by number of rows."""
    fewest = min(means, default=1)
    return means.get(fewest, 0.0) / fewest


def overlap_efficiency(stages: Sequence[float], wall: float) -> float:
    """(sum of stages - step) / (sum of stages - largest): 0 when nothing overlaps, 1 at best."""
    room = sum(stages) - max(stages, default=0.0)
    return 0.0 if room <= 0 else min(1.0, max(0.0, (sum(stages) - wall) / room))
