"""One duck as a process: holds its slice of every expert and answers asks. Imports no torch.

`duck node --model DIR` reads its columns from a folder on its own disk once a host has said which
slice it wants; the path never travels. The slice stays in memory: a later host with the same slice
attaches at once. A node started by a host (`--parent`) ends with it, however that host dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from duck.config import is_loopback, split_address
from duck.errors import ConfigError
from duck.kernels.reference.experts import ReferenceExperts
from duck.placement import Plan
from duck.slices import Experts, SliceSource
from duck.transports.tcp import TcpDuckEnd

_log = structlog.get_logger(__name__)


class Node:
    """A duck's memory and arithmetic, behind whatever transport; a `transports.base.Handler`."""

    def __init__(self, source: SliceSource) -> None:
        self._source = source
        self._held = ""  # slice hash of what is resident
        self._experts: Experts | None = None

    async def attach(
        self, plan: Plan, duck: int, progress: Callable[[int, int], None]
    ) -> Mapping[str, Any]:
        """Hold this plan's slice, loading it off the event loop unless it is here already."""
        self._source.check(plan)
        want = plan.slice_hash(duck)
        warm = want == self._held
        if not warm:
            # Give the old slice back before the new one is read: both may not fit.
            self._held, self._experts = "", None
            begun = time.perf_counter()
            self._experts = await _in_thread(lambda check: self._load(plan, duck, progress, check))
            self._held = want
            _log.info(
                "slice_loaded", duck=duck, columns=str(plan.slices[duck]),
                resident_bytes=self._experts.nbytes, seconds=round(time.perf_counter() - begun, 3),
            )  # fmt: skip
        assert self._experts is not None
        return {"warm": warm, "resident_bytes": self._experts.nbytes}

    def _load(
        self,
        plan: Plan,
        duck: int,
        progress: Callable[[int, int], None],
        check: Callable[[], None],
    ) -> Experts:
        columns = len(plan.slices[duck])
        experts = ReferenceExperts(plan.layers, plan.experts, plan.shape.hidden, columns)

        def note(done: int, total: int) -> None:
            check()
            progress(done, total)

        self._source.load(plan, duck, experts, note)
        return experts

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Partial sums (T, hidden) float32 of one ask; blocking."""
        assert self._experts is not None
        out = np.empty(x.shape, np.float32)
        self._experts.forward(layer, x, ids, weights, out)
        return out


async def _in_thread(work: Callable[[Callable[[], None]], Experts]) -> Experts:
    """Run blocking work that calls `check` now and then; cancelling us ends it at its next one."""
    cancelled = False

    def check() -> None:
        if cancelled:
            raise asyncio.CancelledError

    task = asyncio.get_running_loop().run_in_executor(None, work, check)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancelled = True
        with contextlib.suppress(asyncio.CancelledError):
            await task
        raise


def run_node(
    listen: str, folder: Path, *, insecure: bool, parent: int | None, as_json: bool
) -> None:
    """Serve until interrupted, terminated, or orphaned.

    Raises:
        ConfigError, WeightsError: an address or a folder that cannot be used.
    """
    host, _port = split_address(listen)
    if not is_loopback(host) and not insecure:
        raise ConfigError(
            f"--listen {listen} is open to other machines, and keys are not built yet: anyone "
            "there could read your prompts; use a loopback address, or --insecure on a network "
            "you trust"
        )
    if parent is not None:
        _die_with(parent)
    source = SliceSource(folder)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(source, listen, parent is not None, as_json))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop does the same, slower
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(source: SliceSource, listen: str, watch_stdin: bool, as_json: bool) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    told = False

    def stop() -> None:
        nonlocal told
        told = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)

    def ready(address: str) -> None:
        if as_json:
            line = json.dumps({"event": "listening", "address": address, "pid": os.getpid()})
        else:
            line = f"duck listening on {address}, model {source.folder}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    if watch_stdin:
        await loop.connect_read_pipe(lambda: _EndOfInput(stop), sys.stdin)
    try:
        await TcpDuckEnd(listen, ready).serve(Node(source))
    except asyncio.CancelledError:
        if not told:  # Ctrl-C: the runner makes a KeyboardInterrupt of it
            raise


class _EndOfInput(asyncio.Protocol):
    """Ends the node when its standard input does: the host that held the other end is gone."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()


def _die_with(parent: int) -> None:
    """Ask Linux to kill us when the parent dies: reaches us even while we are stopped."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise ConfigError(f"--parent {parent} is not the process that started this node")
