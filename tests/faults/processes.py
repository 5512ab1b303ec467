"""Processes that a test started, found by a mark in their environment, whoever their parent is.

Only processes with the mark of the running test are ever signalled.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar

import pytest

MARK = "DUCK_TEST_MARK"
PATIENCE_S = 120.0  # for what happens soon, on a machine that may be busy
Found = TypeVar("Found")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="finds processes through /proc")


class Marked:
    """All processes that descend from what a test started."""

    def __init__(self) -> None:
        self.mark = f"{MARK}={uuid.uuid4().hex}"
        self.runs: list[Run] = []
        self.environment = {
            **os.environ,
            MARK: self.mark.partition("=")[2],
            "OMP_NUM_THREADS": "1",
        }

    def pids(self, word: str = "") -> list[int]:
        """Those that live and have `word` among their arguments; zombies do not live."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # it ended meanwhile
                    marked = self.mark.encode() in (entry / "environ").read_bytes().split(b"\0")
                    if marked and (
                        not word or word.encode() in (entry / "cmdline").read_bytes().split(b"\0")
                    ):
                        found.append(int(entry.name))
        return sorted(found)

    def ducks(self) -> list[int]:
        """The node processes, in the order they were started."""
        return self.pids("node")

    def wait_for_ducks(self, count: int) -> list[int]:
        """Wait until that many node processes run."""
        return _wait(lambda: found if len(found := self.ducks()) >= count else None)

    def wait_until_none(self) -> None:
        """Wait until none lives: the orphans' last chance to end by themselves."""
        _wait(lambda: True if not self.pids() else None, left=self.pids)

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _wait(probe: Callable[[], Found | None], left: Callable[[], object] = str) -> Found:
    give_up = time.monotonic() + PATIENCE_S
    while (found := probe()) is None:
        if time.monotonic() > give_up:
            pytest.fail(f"still waiting after {PATIENCE_S:.0f} s {left()}")
        time.sleep(0.01)
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    _wait(lambda: condition() or None)


@contextlib.contextmanager
def marked() -> Iterator[Marked]:
    """A fresh mark; in the end nothing with it is left, whatever the test did."""
    processes = Marked()
    try:
        yield processes
    finally:
        processes.kill()
        for run in processes.runs:
            run.reap()


class Run:
    """A run of the command line whose output goes to files; made by `start` and `start_warm`."""

    def __init__(
        self,
        processes: Marked,
        process: subprocess.Popen[bytes] | ForkServerProcess,
        out: Path,
    ) -> None:
        self._process, self._out = process, out
        processes.runs.append(self)
        assert process.pid is not None
        self.pid: int = process.pid

    def alive(self) -> bool:
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll() is None
        return self._process.is_alive()

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """Its exit code, or None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(seconds)
            return None
        self._process.join(seconds)
        return self._process.exitcode

    def close_input(self) -> None:
        assert isinstance(self._process, subprocess.Popen)
        assert self._process.stdin is not None
        self._process.stdin.close()

    def reap(self) -> None:
        """It was killed: take note of its end."""
        self.wait()
        if not isinstance(self._process, subprocess.Popen):
            self._process.close()
        elif self._process.stdin:
            self._process.stdin.close()

    def signal(self, number: signal.Signals) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def said(self, name: str = "stderr") -> str:
        return (self._out / name).read_text()

    def wait_for(self, text: str, name: str = "stderr") -> str:
        """Wait until its output has `text`; everything it wrote so far."""

        def probe() -> str | None:
            return said if text in (said := self.said(name)) else None

        return _wait(probe, left=lambda: f"for {text!r}; alive={self.alive()} {self.said()}")

    def wait_for_text(self) -> None:
        """Wait until the answer has begun."""
        wait_until(lambda: bool((self._out / "stdout").stat().st_size))


def _files(out: Path) -> tuple[int, int]:
    out.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    return os.open(out / "stdout", flags), os.open(out / "stderr", flags)


def start(
    processes: Marked,
    out: Path,
    *words: str | Path,
    stdin: int = subprocess.DEVNULL,
    **environment: str,
) -> Run:
    """`python -m duck ...` with a mark."""
    stdout, stderr = _files(out)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "duck", *map(str, words)],
            stdin=stdin, stdout=stdout, stderr=stderr,
            env={**processes.environment, **environment},
        )  # fmt: skip
    finally:
        os.close(stdout)
        os.close(stderr)
    return Run(processes, process, out)


def _main(words: list[str], mark: str, out: Path) -> None:
    for number, file in zip((1, 2), _files(out), strict=True):
        os.dup2(file, number)
        os.close(file)
    os.environ[MARK] = mark
    sys.argv = ["duck", *words]
    from duck.__main__ import main

    (out / "started").touch()
    sys.exit(main())


def warm_up() -> None:
    """Start the process that `start_warm` forks from. Before a mark is set, or it inherits it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # it keeps the value of its start
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["duck.terminal", __name__])
    multiprocessing.forkserver.ensure_running()


def start_warm(processes: Marked, out: Path, *words: str | Path) -> Run:
    """The same command in a process that has torch loaded already: many runs in little time."""
    for file in _files(out):
        os.close(file)
    mark = processes.environment[MARK]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_main, args=([*map(str, words)], mark, out))
    process.start()
    wait_until((out / "started").exists)
    return Run(processes, process, out)
