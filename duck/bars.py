"""Progress on stderr: bars with bytes and rate, or what is at work; nothing off a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.text import Text

from duck.memory import readable

console = Console(stderr=True)


class _Speed(ProgressColumn):
    """Bytes a second in the units of our tables; rich's own column knows only powers of 1,000."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{readable(int(speed))}/s" if speed else "", style="progress.data.speed")


@contextlib.contextmanager
def bars(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each name that is told of: call it with (name, bytes done, bytes in all)."""
    columns = (
        TextColumn(f"{verb} {{task.description}}"), BarColumn(), DownloadColumn(binary_units=True),
        _Speed(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as shown:
        tasks: dict[str, TaskID] = {}

        def note(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield note


@contextlib.contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """One line with what is at work now: call it with the text."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)
