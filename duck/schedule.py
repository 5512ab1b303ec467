"""Schedules: how a step's rows are grouped and ordered, and which one should be fastest here.

A schedule is a policy over the same code, never other code: whether the guess travels in the sure
token's ask or half a layer behind it, whether anything overlaps, how many steps run at once.
`Chooser` puts what was measured into the closed forms of `plan.closed` and takes what promises
most. Pure: no clock, no event loop; times are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from duck.plan import closed
from duck.plan.closed import Times

# Steps in which `auto` measures one way of running; a step has dozens of layers, so few suffice.
PROBE_STEPS = 4
# Steps between two looks at a choice. Routing and acceptance drift with the text.
RECHECK_STEPS = 128
# A way must promise this much more than the present one, twice, before `auto` changes to it.
GAIN = 1.03
# Rows in one step's ask: what the small row sets of a transport hold. Larger groups would gain
# little: only experts that their rows have in common are read once for more of them.
STEP_ROWS = 4


@dataclass(frozen=True)
class Policy:
    """What a schedule allows.

    apart: the sure rows and the guesses are two lanes, the guesses half a layer behind.
    overlap: the shared expert is computed while the ask flies, and prompts go in two lanes.
    """

    name: str
    apart: bool
    overlap: bool

    @property
    def chunks_in_flight(self) -> int:
        """Chunks of a prompt that are on their way at once, each half a layer behind the other."""
        return 2 if self.overlap else 1

    def grouping(self, sessions: int, rows_each: int) -> tuple[int, int]:
        """(steps at once, sessions in a step) for so many sessions that want to go on.

        rows_each: rows of a session in a step, 2 with drafts.
        """
        most = max(1, STEP_ROWS // rows_each)
        if self is SERIAL:
            return 1, 1
        if self is BATCH:
            return 1, most
        if self is WAVE:
            return max(1, sessions), 1
        steps = max(2, -(-sessions // most))
        return steps, max(1, -(-sessions // steps))


SERIAL = Policy("serial", apart=False, overlap=False)
BATCH = Policy("batch", apart=False, overlap=True)
WAVE = Policy("wave", apart=True, overlap=True)
PINGPONG = Policy("pingpong", apart=False, overlap=True)
POLICIES = {policy.name: policy for policy in (SERIAL, BATCH, WAVE, PINGPONG)}


@dataclass(frozen=True)
class Way:
    """How a step is run.

    draft: with a guess; early: the sure lane starts while its guess is still being made.
    """

    policy: Policy
    draft: bool
    early: bool = False

    def __str__(self) -> str:
        drafts = "with drafts" if self.draft else "without drafts"
        return f"{self.policy.name} {drafts}{', started early' if self.early else ''}"


def tokens_per_second(way: Way, times: Times, sessions: int = 1) -> float:
    """What a way promises, over all sessions, by the closed forms."""
    if way.policy is PINGPONG:
        step_ms = closed.pingpong(times, sessions, draft=way.draft)
    elif way.policy is WAVE and way.draft:
        step_ms, sessions = closed.wave(times), 1
    else:
        form = closed.serial if way.policy is SERIAL else closed.batch
        step_ms, sessions = form(times, draft=way.draft), 1
    if step_ms <= 0:  # nothing was measured
        return 0.0
    return 1e3 * sessions * times.tokens(draft=way.draft) / step_ms


@dataclass(frozen=True)
class Choice:
    """A way, and the reason for it in words."""

    way: Way
    why: str


class Chooser:
    """Says how the next step is run, and learns from every step.

    With a fixed schedule it always says the same. `auto` tries the ways whose times it needs for a
    few steps each, takes what the closed forms promise most of, and looks again from time to time;
    for one session and for several it chooses apart. No form knows what overlapping costs where
    device and ducks share cores, so serial is tried as well, beside batch.

    Args:
        schedule: auto, or a policy's name.
        draft: auto: as long as drafts pay (with a fixed schedule: always); mtp: always; off.
        early: on, off, or auto: where it was measured to gain.
        can_draft: the model has an MTP layer.
    """

    def __init__(self, schedule: str, draft: str, early: str, *, can_draft: bool) -> None:
        drafts = can_draft and draft != "off"
        self._accept = Average()
        self._one: _Choosing | None = None
        self._several: _Choosing | None = None
        if schedule != "auto":
            policy = POLICIES[schedule]
            self._fixed = Way(policy, drafts, early=drafts and policy.apart and early == "on")
            return
        plain = [] if drafts and draft == "mtp" else [False]
        one = [Way(policy, draft=True) for policy in (WAVE, BATCH, SERIAL)] if drafts else []
        alone = [Way(policy, off) for off in plain for policy in (BATCH, SERIAL)]
        self._one = _Choosing(one, alone, early)
        several = [Way(PINGPONG, draft=True)] if drafts else []
        self._several = _Choosing(several, [Way(PINGPONG, off) for off in plain], early)

    def way(self, sessions: int) -> Way:
        """How the next step is run while so many sessions want to go on."""
        choosing = self._several if sessions > 1 else self._one
        return choosing.next() if choosing else self._fixed

    def note(self, way: Way, seconds: float, *, proposed: int, accepted: int) -> bool:
        """Learn from a step. True when it is time to `decide`.

        proposed, accepted: guesses made, and those that were right.
        """
        for number in range(proposed):
            self._accept.add(float(number < accepted))
        choosing = self._several if way.policy is PINGPONG else self._one
        return choosing.note(way, seconds) if choosing else False

    def decide(self, way: Way, times: Times, *, sessions: int) -> Choice:
        """Take the way that promises most; a change needs GAIN, and to be the better one twice.

        way: of the step after which it was time.
        times: as measured, but for how often guesses are right, which is known here.
        """
        choosing = self._several if way.policy is PINGPONG else self._one
        assert choosing is not None
        sessions = max(2, sessions) if way.policy is PINGPONG else 1
        times = replace(times, accept=self._accept.value)
        speeds = {way: tokens_per_second(way, times, sessions) for way in choosing.candidates}
        speeds = choosing.as_tried(speeds)
        chosen = choosing.decide(speeds)
        promised = ", ".join(f"{each} {speed:.1f} tok/s" for each, speed in speeds.items())
        return Choice(chosen, f"{promised}; measured {_told(times)}")


class _Choosing:
    """The choice between some ways, in one situation.

    Args:
        drafting: ways that give both rows' times; each is tried first.
        plain: ways that need no trial, since the times of one row tell enough.
        early: as for Chooser.
    """

    def __init__(self, drafting: Sequence[Way], plain: Sequence[Way], early: str) -> None:
        self.candidates = [*drafting, *plain]
        self._early = early
        self._step_s: dict[Way, Average] = {}
        self._way = self._started(self.candidates[0])
        self._probes = list(drafting) if len(self.candidates) > 1 else []
        # One row's times come from a wave, or from steps without drafts.
        if len(self.candidates) > 1 and not any(way.policy.apart for way in drafting):
            self._probes += plain
        self._trials = list(self._probes)
        self._serial_gain: float | None = None  # a batch's step by a serial one's, when both ran
        self._probed: dict[Way, list[float]] = {}  # seconds of the steps of the last trials
        self._tried = 0  # steps of the present trial
        self._age = 0  # steps since the last look
        self._decided = False
        self._rival: Way | None = None  # promised more than the present way at the last look

    def next(self) -> Way:
        return self._started(self._probes[0]) if self._probes else self._way

    def note(self, way: Way, seconds: float) -> bool:
        self._step_s.setdefault(way, Average()).add(seconds)
        if self._probes:
            if way == self._started(self._probes[0]):
                self._probed.setdefault(way, []).append(seconds)
                self._tried += 1
            if self._tried < PROBE_STEPS:
                return False
            self._tried = 0
            self._probes.pop(0)
            return not self._probes
        self._age += 1
        if self._age >= RECHECK_STEPS and self._trials:
            self._age = 0
            self._probed.clear()
            # What overlapping costs depends on the machine, not on the text: where serial was
            # clearly slower it stays so.
            tried = self._serial_gain is None or self._serial_gain * GAIN > 1
            self._probes = [way for way in self._trials if tried or way.policy is not SERIAL]
            if self._early == "auto" and self._way.policy.apart:
                self._probes.append(replace(self._way, early=not self._way.early))
        return False

    def as_tried(self, speeds: Mapping[Way, float]) -> dict[Way, float]:
        """What the ways promise, with serial as much beside batch as it was seen to be."""
        for draft in (True, False):
            together, apart = (self._probed.get(Way(policy, draft)) for policy in (BATCH, SERIAL))
            if together and apart:
                # The middle: a few steps are timed, and any of them may have been held up.
                self._serial_gain = median(together) / max(1e-9, median(apart))
                break
        found = dict(speeds)
        for way in speeds:
            if way.policy is SERIAL and self._serial_gain is not None:
                found[way] = speeds[replace(way, policy=BATCH)] * self._serial_gain
        return found

    def decide(self, speeds: Mapping[Way, float]) -> Way:
        best, present = max(speeds, key=speeds.__getitem__), replace(self._way, early=False)
        better = best != present and speeds[best] >= GAIN * speeds[present]
        if better and (not self._decided or self._rival == best):
            self._way, better = best, False
        self._rival = best if better else None
        self._decided = True
        self._way = self._started(replace(self._way, early=False))
        return self._way

    def _started(self, way: Way) -> Way:
        """The way with the sure lane started early, where that is wanted or was seen to gain."""
        if way.early or not (way.policy.apart and way.draft):
            return way
        early = self._early == "on"
        if self._early == "auto":
            soon, late = (
                self._step_s.get(replace(way, early=when), Average()) for when in (True, False)
            )
            early = bool(soon.count and late.count) and soon.value * GAIN < late.value
        return replace(way, early=early)


def _told(t: Times) -> str:
    return (
        f"attend {t.attend:.3f} ms a layer, {t.second_row:.0%} more for a second row, "
        f"shared {t.shared:.3f} ms, ducks {t.expert:.3f} ms with {t.common:.0%} of experts common, "
        f"wire {t.out(1) + t.back(1):.3f} ms, guesses right {t.accept:.0%}"
    )


class Average:
    """A running mean that forgets: of all values at first, then of about the last `memory`."""

    __slots__ = ("_memory", "count", "value")

    def __init__(self, memory: int = 256) -> None:
        self._memory = memory
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        """Take in one more."""
        self.count += 1
        self.value += (value - self.value) / min(self.count, self._memory)


def chunks(tokens: Sequence[int], largest: int) -> Iterator[Sequence[int]]:
    """A prompt in lanes; the same under every schedule, so that all compute the same rows."""
    for start in range(0, len(tokens), largest):
        yield tokens[start : start + largest]
