"""A picture of some steps of a trace: one row for the device, the asks, and each duck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duck import files
from duck.errors import ConfigError
from duck.recording import Recording
from duck.trace import Span
from duck.wire import plain

# Colours that also people tell apart who see few of them: lanes 0 and 1, and whatever comes after.
LANES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DUCK_ROWS = 8  # more would be too thin to see


def draw(recording: Recording, path: Path, first: int, stop: int) -> None:
    """Write steps first to stop - 1 of a trace, counted from 0, as a PNG.

    Raises:
        ConfigError: there are no such steps, or the file cannot be written.
    """
    steps = sorted(recording.on("loop", "step"), key=lambda span: span.start)
    if not steps:
        raise ConfigError("--png: no decode step to draw; generate more than one token")
    if not 0 <= first < stop <= len(steps):
        raise ConfigError(f"--steps {first}:{stop}: the trace has steps 0:{len(steps)}")
    start, end = steps[first].start, max(step.end for step in steps[first:stop])
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ConfigError("--png needs matplotlib: install duck-llm[host]") from None
    # Names come from the file: a dollar sign in one begins no formula.
    with rc_context({"text.parse_math": False}):
        _save(recording, path, start, end, _title(steps[first:stop]))


def _title(steps: Sequence[Span]) -> str:
    schedule = plain(str(steps[0].args.get("schedule", "")), 40)
    return f"{schedule} · {len(steps)} step{'s' * (len(steps) > 1)}"


def _save(recording: Recording, path: Path, start: float, end: float, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = _Colours()
    rows = _rows(recording, start, end, colours)
    scale = _scale(recording)
    figure = Figure(figsize=(11, 0.9 + 0.34 * len(rows)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for number, (_, bars) in enumerate(rows):
        for colour in sorted({colour for _, _, colour in bars}):
            chosen = [(at, length) for at, length, one in bars if one == colour]
            pieces = [((at - start) / 1e3 / scale, length / 1e3 / scale) for at, length in chosen]
            axes.broken_barh(pieces, (number - 0.4, 0.8), color=LANES[colour], linewidth=0)
    axes.set_yticks(range(len(rows)), [name[:40] for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, (end - start) / 1e3 / scale)
    axes.set_xlabel("milliseconds")
    axes.legend(
        handles=[Patch(color=LANES[colour], label=name) for name, colour in colours.named()],
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(LANES), frameon=False, fontsize="small",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left")
    try:
        with files.whole(path) as beside:
            figure.savefig(beside, format="png")
    except OSError as error:
        raise ConfigError(f"--png {path}: {error.strerror or error}") from error


Bars = list[tuple[float, float, int]]  # start, duration, colour


def _rows(
    recording: Recording, start: float, end: float, colours: _Colours
) -> Sequence[tuple[str, Bars]]:
    device: Bars = [
        (span.start, span.end - span.start, colours.of(span.args))
        for span in recording.on("device")
        if span.start < end and span.end > start
    ]
    asks = [ask for ask in recording.asks if ask.start < end and ask.end > start]
    by_colour: dict[int, Bars] = {}
    for ask in asks:
        colour = colours.of(ask.args)
        by_colour.setdefault(colour, []).append((ask.start, ask.end - ask.start, colour))
    rows: list[tuple[str, Bars]] = [("device", device)]
    for number, colour in enumerate(sorted(by_colour)):
        rows.append(("asks" if number == 0 else f"asks {number + 1}", by_colour[colour]))
    for duck in range(min(DUCK_ROWS, len(recording.ducks))):
        bars = []
        for ask in asks:
            answer = ask.answers.get(duck)
            if answer is not None:
                length = answer.end - answer.start
                bars.append((answer.start, length, colours.of(ask.args)))
        rows.append((recording.ducks[duck], bars))
    return rows


class _Colours:
    """Each lane of each session has its own, as long as there are."""

    def __init__(self) -> None:
        self._sessions: dict[str, int] = {}
        self._used: set[tuple[int, bool]] = set()

    def of(self, args: Mapping[str, Any]) -> int:
        session = self._sessions.setdefault(str(args.get("session")), len(self._sessions))
        guess = args.get("lane") == 1
        self._used.add((session, guess))
        return self._colour(session, guess)

    @staticmethod
    def _colour(session: int, guess: bool) -> int:
        return (2 * session + guess) % len(LANES)

    def named(self) -> list[tuple[str, int]]:
        """What each colour stands for, as far as they are different."""
        several = len(self._sessions) > 1
        apart = any(guess for _, guess in self._used)
        names = []
        for session, guess in sorted(self._used)[: len(LANES)]:
            who = f"session {session + 1}" if several else ""
            lane = ("guess" if guess else "sure row") if apart else ("" if several else "all rows")
            names.append((f"{who} {lane}".strip(), self._colour(session, guess)))
        return names


def _scale(recording: Recording) -> float:
    """How much longer than told everything took, in emulated runs."""
    scale = recording.facts.get("scale")
    return float(scale) if isinstance(scale, int | float) and 1e-3 < scale < 1e6 else 1.0
