"""A trace file, read back: every value is checked, since the file may be cut short or anyone's."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duck.errors import ConfigError
from duck.files import open_regular
from duck.trace import DUCKS, FORMAT, HOST, NO_LAYER, Span, Trace
from duck.wire import plain

# Far above what `Trace` writes; a small compressed file could claim to hold any amount.
LARGEST = 1 << 30
_TEXT = 200  # names longer than this are not ours


@dataclass(frozen=True, slots=True)
class Answer:
    """What one duck did for an ask; microseconds."""

    start: float  # of computing
    end: float
    queue: float
    compute: float
    answered: float  # after the ask was sent


@dataclass(slots=True)
class Asked:
    """An ask to all ducks; microseconds."""

    layer: int
    rows: int
    start: float
    end: float
    experts: list[list[int]]
    args: Mapping[str, Any]
    answers: dict[int, Answer] = field(default_factory=dict)  # by duck


@dataclass(slots=True)
class Recording:
    """What a trace file holds; times in microseconds since its first record."""

    ducks: tuple[str, ...]
    facts: Mapping[str, Any]
    spans: list[Span]  # of the device, the loop and other tracks of the host
    asks: list[Asked]
    counters: dict[str, list[tuple[float, float]]]  # (time, value) by name
    dropped: int  # records that were too old to be in the file

    def on(self, track: str, name: str | None = None) -> list[Span]:
        """The spans of one track, or those of them with one name."""
        return [span for span in self.spans if span.track == track and name in (None, span.name)]


def read(path: str | Path) -> Recording:
    """Read a file that `Trace.write` wrote, compressed or not.

    Raises:
        ConfigError: it cannot be read, is cut short, or is no trace of ours.
    """
    path = Path(path)
    try:
        text = _text(path)
        if not text:
            raise ConfigError(f"{path}: no whole JSON file (it is empty)")
        document = json.loads(text)
    except ConfigError:  # it is a ValueError too
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path}: no whole JSON file ({_brief(error)})") from error
    try:
        return _recording(document)
    except _Wrong as wrong:
        raise ConfigError(f"{path}: {wrong}; want a file of duck generate --trace") from None


def recording_of(trace: Trace) -> Recording:
    """What a trace would have written, read back."""
    about = {"format": FORMAT, **trace.facts, "ducks": list(trace.ducks), "dropped": {}}
    return _recording({"traceEvents": list(trace.events()), "otherData": about})


def _text(path: Path) -> bytes:
    with open_regular(path) as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            data = file.read(LARGEST + 1)
        else:
            with gzip.open(file) as unpacked:
                data = unpacked.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ConfigError(f"{path}: more than {LARGEST >> 20} MiB; trace fewer steps")
    return data


def _brief(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "lists within lists, too deep to read"
    return " ".join(str(error).split())[:120] or type(error).__name__


class _Wrong(Exception):
    """The document is not what we write."""


def _recording(document: Any) -> Recording:
    about = document.get("otherData") if isinstance(document, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise _Wrong(f"no otherData with format {FORMAT!r} in it")
    names, events = about.get("ducks"), document.get("traceEvents")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Wrong("otherData.ducks is no list of names")
    if not isinstance(events, list):
        raise _Wrong("traceEvents is no list")
    dropped = about.get("dropped")
    lost = dropped.values() if isinstance(dropped, dict) else ()
    found = Recording(
        tuple(plain(name)[:_TEXT] for name in names),
        about,
        [],
        [],
        {},
        sum(n for n in lost if isinstance(n, int)),
    )
    answers: list[tuple[int, int, Answer]] = []
    by_number: dict[int, Asked] = {}
    for number, event in enumerate(events):
        if not isinstance(event, dict):
            raise _Wrong(f"event {number} is no object")
        try:
            if event.get("ph") == "X":
                _event(found, by_number, answers, event)
            elif event.get("ph") == "C":
                _counter(found, event)
        except _Wrong as wrong:
            raise _Wrong(f"event {number}: {wrong}") from None
    for ask, duck, answer in answers:
        if ask not in by_number:
            raise _Wrong(f"an answer of duck {duck} to ask {ask}, which is not there")
        by_number[ask].answers[duck] = answer
    return found


def _event(
    found: Recording,
    by_number: dict[int, Asked],
    answers: list[tuple[int, int, Answer]],
    event: dict[str, Any],
) -> None:
    args = event.get("args", {})
    if not isinstance(args, dict):
        raise _Wrong("args is no object")
    name, track = _name(event, "name"), _name(event, "cat")
    start = _number(event, "ts")
    end = start + _number(event, "dur")
    layer = _whole(args, "layer") if "layer" in args else NO_LAYER
    process = event.get("pid")
    if process == DUCKS:
        duck = _whole(event, "tid")
        if duck >= len(found.ducks):
            raise _Wrong(f"duck {duck} of {len(found.ducks)}")
        times = (_number(args, key) for key in ("queue_us", "compute_us", "answered_us"))
        answers.append((_whole(args, "ask"), duck, Answer(start, end, *times)))
    elif process != HOST:
        raise _Wrong(f"process {process!r:.40}")
    elif track == "net" and "ask" in args:
        experts = args.get("experts")
        if not isinstance(experts, list) or not all(_ids(row) for row in experts):
            raise _Wrong("experts is no list of rows of ids")
        ask = Asked(layer, len(experts), start, end, experts, args)
        if by_number.setdefault(_whole(args, "ask"), ask) is not ask:
            raise _Wrong(f"a second ask {args['ask']}")
        found.asks.append(ask)
    else:
        found.spans.append(Span(track, name, layer, start, end, args))


def _counter(found: Recording, event: dict[str, Any]) -> None:
    args = event.get("args")
    value = args.get("value") if isinstance(args, dict) else None
    if not isinstance(value, int | float) or not abs(value) < 1e15:
        raise _Wrong(f"value is {value!r:.40}, want a number")
    at = _number(event, "ts")
    found.counters.setdefault(_name(event, "name"), []).append((at, float(value)))


def _ids(row: Any) -> bool:
    return isinstance(row, list) and all(type(expert) is int for expert in row)


def _name(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or len(value) > _TEXT:
        raise _Wrong(f"{key} is {value!r:.40}, want a short text")
    return plain(value)  # nobody's terminal is to obey a file


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or not 0 <= value < 1e15:  # nor NaN
        raise _Wrong(f"{key} is {value!r:.40}, want a number from 0 up")
    return float(value)


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise _Wrong(f"{key} is {value!r:.40}, want a whole number from 0 up")
    return value
