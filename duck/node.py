"""One duck as a process: holds its slice of every expert and answers asks. Imports no torch.

`duck node --model DIR` reads its columns from a folder on its own disk once a host has said which
slice it wants; `duck node --store DIR` reads packed layers, and has the host send those it lacks.
The slice stays in memory: a later host with the same slice attaches at once. A node started by a
host (`--parent`) ends with it, however that host dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog

from duck import memory
from duck.config import is_loopback, split_address
from duck.errors import ConfigError, WeightsError, WireError
from duck.kernels import library
from duck.kernels.experts import SPIN_US, NativeExperts
from duck.keys import ClusterKey
from duck.placement import Plan, Slice
from duck.slices import Arena, ModelSource, Source, StoreSource, adopt, slice_of
from duck.transports.base import Loading
from duck.transports.listen import ListeningDuck
from duck.transports.planes import duck_planes
from duck.wire import plain

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

# A smaller arena lies in caches anyway, whatever its pages.
SMALL_ARENA_BYTES = 64 << 20

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Kernel:
    """How the expert kernel uses this machine; see `kernels.experts.NativeExperts`."""

    threads: int = 0  # 0: one for each processor
    spin_us: int = SPIN_US
    pin: bool = False


@dataclass
class _Held:
    """What is in memory."""

    want: Slice
    arena: Arena
    loaded: set[int] = field(default_factory=set)


class Node:
    """A duck's memory and arithmetic, behind whatever transport; a `transports.base.Handler`.

    Args:
        source: where its slice is read from.
        kernel: how the expert kernel uses this machine.
        check_fits: raises when so many bytes do not fit once so many are given back.
    """

    def __init__(
        self,
        source: Source,
        kernel: Kernel = Kernel(),
        check_fits: Callable[[int, int], None] = memory.check_fits,
    ) -> None:
        self._source, self._kernel, self._check_fits = source, kernel, check_fits
        self._held: _Held | None = None

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        """Hold this plan's slice, loading off the event loop what is not in memory already."""
        begun = time.perf_counter()
        want = await _in_thread(lambda _: slice_of(plan, duck))
        held = self._held
        if held is None or held.want != want:
            self._check_source(plan, duck, want)
            self._check_fits(want.nbytes, held.arena.nbytes if held else 0)
            # Give the old slice back before the new one is read: both may not fit.
            self._held = held = None
            arena = NativeExperts(
                want.layers, want.experts, want.hidden, want.stop - want.start,
                resident=want.resident, threads=self._kernel.threads, spin_us=self._kernel.spin_us,
                pin=self._kernel.pin,
            )  # fmt: skip
            self._held = held = _Held(want, arena)
        load = _Load(self._source, held, loading)
        await load.run()
        seconds = time.perf_counter() - begun
        facts = {
            "warm": load.total == 0,
            "resident_bytes": held.arena.nbytes,
            "read_bytes": load.read_bytes,
            "received_bytes": load.received_bytes,
            "load_s": seconds,
        }
        _log.info("attached", duck=duck, slice=str(want), layers=len(want.layers), **facts)
        if load.total:
            _warn_of_small_pages(held.arena.nbytes)
        return facts

    def _check_source(self, plan: Plan, duck: int, want: Slice) -> None:
        """Raises ConfigError, with advice where hosts' usual mistakes explain it."""
        source = self._source
        try:
            source.check(want)
        except ConfigError as error:
            store = source.store if isinstance(source, StoreSource) else None
            for other in range(plan.ducks):
                if store and store.slice and plan.slice_hash(other) == store.slice.hash:
                    raise ConfigError(
                        f"{store.folder} is duck {other}'s of this plan, and the host has this "
                        f"duck as duck {duck}: change the order of its --ducks"
                    ) from error
            raise

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Partial sums (T, hidden) float32 of one ask; blocking.

        Raises:
            WireError: a row names an expert twice.
        """
        assert self._held is not None
        out = np.empty(x.shape, np.float32)
        try:
            self._held.arena.forward(layer, x, ids, weights, out)
        except ValueError as error:
            raise WireError(str(error)) from error
        return out


class _Load:
    """Bringing the layers into memory that are not there yet; counts the bytes and where from."""

    def __init__(self, source: Source, held: _Held, loading: Loading) -> None:
        self.read_bytes = self.received_bytes = 0
        self._source, self._held, self._loading = source, held, loading
        self._missing = [n for n in held.want.layers if n not in held.loaded]
        self.total = len(self._missing) * held.want.layer_bytes

    async def run(self) -> None:
        if not self._missing:  # a warm duck's disk may sleep
            return
        want, arena = self._held.want, self._held.arena
        has = await _in_thread(lambda _: self._source.has(want))
        here = [layer for layer in self._missing if layer in has]
        if here:
            await _in_thread(lambda check: self._source.load(want, here, arena, self._read, check))
            self._held.loaded.update(here)
        lacking = [layer for layer in self._missing if layer not in has]
        if lacking:
            source = self._source
            assert isinstance(source, StoreSource)  # a model folder has all layers
            with contextlib.ExitStack() as stack:
                claim = source.claim(want, lacking)
                await _in_thread(lambda _: stack.enter_context(claim))
                for layer in lacking:
                    await self._receive(source, layer)
                    self._held.loaded.add(layer)

    def _read(self, nbytes: int) -> None:
        self.read_bytes += nbytes
        self._note()

    def _note(self) -> None:
        done = self.read_bytes + self.received_bytes
        self._loading(min(done, self.total), self.total)

    async def _receive(self, source: StoreSource, layer: int) -> None:
        """Have the host send one layer, or the rest of it, into memory and the store."""
        want, arena = self._held.want, self._held.arena

        def take(data: bytes) -> None:
            writer.write(data)
            self.received_bytes += len(data)
            self._note()

        async def send() -> None:
            try:
                sha256 = await self._loading.fetch(layer, writer.nbytes, take)
                await _in_thread(lambda _: writer.finish(sha256))
            finally:
                writer.close()

        writer = await _in_thread(lambda _: source.receive(want, layer, arena))
        kept = writer.nbytes
        self._read(kept)
        try:
            await send()
        except WeightsError:
            if not kept:
                raise
            # What an earlier try left was not what it should be, and is gone now: all of it again.
            writer = await _in_thread(lambda _: source.receive(want, layer, arena))
            await send()
        await _in_thread(lambda _: adopt(want, layer, arena))


def _warn_of_small_pages(resident_bytes: int) -> None:
    """Weights on small pages cost a duck a good part of its bandwidth: its owner should know."""
    huge = memory.huge_bytes()
    if huge is not None and resident_bytes >= SMALL_ARENA_BYTES and huge < 0.9 * resident_bytes:
        _log.warning(
            "few_huge_pages", huge_bytes=huge, resident_bytes=resident_bytes,
            remedy="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or free memory",
        )  # fmt: skip


Result = TypeVar("Result")


async def _in_thread(work: Callable[[Callable[[], None]], Result]) -> Result:
    """Run blocking work that calls `check` now and then: cancelling us ends it there."""
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
    listen: str,
    *,
    model: Path | None,
    store: Path | None,
    kernel: Kernel,
    key_file: Path | None,
    insecure: bool,
    parent: int | None,
    as_json: bool,
) -> None:
    """Serve until interrupted, terminated, or orphaned; the slice comes from a model or a store.

    Raises:
        ConfigError, WeightsError: an address, a key or a folder that cannot be used.
    """
    host, _port = split_address(listen)
    key = ClusterKey.read(key_file) if key_file else None
    if not is_loopback(host) and not key and not insecure:
        _check_name(listen, host)
        raise ConfigError(
            f"--listen {listen} is open to other machines, and anyone there could read your "
            "prompts: give host and ducks a --key-file (duck key FILE makes one), or --insecure "
            "on a network you trust"
        )
    if parent is not None:
        _die_with(parent)
    library.native()  # compiled now if need be, not while a host waits
    assert (model is None) != (store is None)
    source = ModelSource(model) if model else StoreSource(store or Path())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the runner then replaces
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        node = Node(source, kernel)
        runner.run(_serve(node, str(source), listen, key, parent is not None, as_json))


def _check_name(listen: str, host: str) -> None:
    """Refuse a host name that is none, which no key would mend."""
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {listen}: {why}; give an address of this machine"
        ) from error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform; asyncio's own loop does the same, slower
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(
    node: Node, source: str, listen: str, key: ClusterKey | None, watch_stdin: bool, as_json: bool
) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)

    def ready(address: str) -> None:
        if as_json:
            told = {"event": "listening", "address": address, "pid": os.getpid()}
            line = json.dumps({**told, "key": key.fingerprint} if key else told)
        else:
            line = f"duck listening on {address}, {plain(source)}"
            if key:
                line += f", key {key.fingerprint}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    if watch_stdin:
        await loop.connect_read_pipe(lambda: _EndOfInput(stop), sys.stdin)
    try:
        credentials = _credentials(key)
        await ListeningDuck(listen, ready, duck_planes(), credentials).serve(node)
    except asyncio.CancelledError:
        if not stopped:  # Ctrl-C: the runner makes a KeyboardInterrupt of it
            raise


def _credentials(key: ClusterKey | None) -> Credentials | None:
    if key is None:
        return None
    from duck.transports.tls import Credentials, Role  # slow to import, and only needed now

    return Credentials(key, Role.DUCK)


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
