"""Ducks on this machine: starts N node processes, and sees to it that none outlives us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from duck.errors import TransportError

# Bounds for what nothing else ends: a duck that cannot start says so, or ends.
START_S = 120.0
END_S = 5.0


def threads_each(ducks: int) -> int:
    """How many threads each of so many ducks may have: no more in all than processors."""
    usable = getattr(os, "sched_getaffinity", None)
    processors = len(usable(0)) if usable else os.cpu_count() or 1
    return max(1, processors // ducks)


class LocalDucks:
    """N `duck node` processes listening on loopback ports; `stop` ends and reaps them."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        self._processes = processes
        self.addresses: tuple[str, ...] = ()

    @classmethod
    def launch(cls, count: int, folder: Path, key_file: Path | None = None) -> LocalDucks:
        """Start the processes; `listening` waits for them."""
        environment = dict(os.environ)
        # One row at a time is too little work to split; N ducks would only fight over the cores.
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        command = [
            sys.executable, "-m", "duck", "node", "--listen", "127.0.0.1:0",
            "--model", str(folder), "--parent", str(os.getpid()), "--json", "--log-level", "error",
            "--threads", str(threads_each(count)),
        ]  # fmt: skip
        if key_file:
            command += ["--key-file", str(key_file)]
        ducks = cls([])
        try:
            for _ in range(count):
                # A session of its own: Ctrl-C in the terminal is for the host, which then ends its
                # ducks. Its standard input is a pipe whose other end the system closes when we die.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,
                )
                ducks._processes.append(process)
        except BaseException:
            ducks.kill()
            raise
        return ducks

    async def listening(self) -> None:
        """Wait until all of them listen; fills `addresses`.

        Raises:
            TransportError: one ended or said nothing in time.
        """
        loop = asyncio.get_running_loop()
        lines = [loop.run_in_executor(None, _first_line, process) for process in self._processes]
        try:
            async with asyncio.timeout(START_S):
                texts = await asyncio.gather(*lines)
        except TimeoutError:
            self.kill()  # ends the reads
            raise TransportError(f"local ducks did not start within {START_S:.0f} s") from None
        except asyncio.CancelledError:
            self.kill()
            raise
        addresses = []
        for number, (process, text) in enumerate(zip(self._processes, texts, strict=True)):
            try:
                addresses.append(str(json.loads(text)["address"]))
            except (ValueError, KeyError, TypeError):
                # Its output has ended; its process does so a moment later.
                await loop.run_in_executor(None, _wait, process)
                raise TransportError(
                    f"local duck {number} ended before it listened ({self._ending(process)})"
                ) from None
        self.addresses = tuple(addresses)

    @property
    def labels(self) -> tuple[str, ...]:
        """How errors name the ducks."""
        pairs = zip(self._processes, self.addresses, strict=True)
        return tuple(f"duck {n} ({address}, pid {p.pid})" for n, (p, address) in enumerate(pairs))

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    def ended(self, number: int) -> bool:
        """Whether a duck's process has ended: nobody starts it again."""
        return self._processes[number].poll() is not None

    async def obituary(self, number: int) -> str:
        """How a duck's process ended, "" if it did not.

        The system closes its connections a while before it tells how it ended, on a busy machine
        a long while. In between it closes its output: so who is ending is told from who is frozen.
        """
        process = self._processes[number]
        for _ in range(50):
            if _output_has_ended(process):
                await asyncio.get_running_loop().run_in_executor(None, _wait, process)
                break
            await asyncio.sleep(0.01)
        return self._ending(process) if process.poll() is not None else ""

    @staticmethod
    def _ending(process: subprocess.Popen[bytes]) -> str:
        code = process.poll()
        if code is None:
            return "its process still runs"
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"

    def kill(self) -> None:
        """End all processes at once and reap them; safe to call twice."""
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def _output_has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether nobody can write to its output any more: the process has ended, or is about to."""
    if process.stdout is None or process.stdout.closed:
        return True
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


def _wait(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()
