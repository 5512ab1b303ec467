"""Every call to CUDA that is not a kernel: events, pinned memory, captured graphs, snapshots.

Here and nowhere else, because machines without a GPU run none of it: what uses it gets it handed in
and is tested there with something else in its place. `scripts/gpu_check.py` runs it on a GPU.

All work is launched on the device's default stream, whatever the thread: so a cache that one thread
grows is grown before another thread's kernels read it. Graphs alone are captured on a stream of
their own, since the default one cannot be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SNAPSHOT_EVENTS = 100_000
"""Allocations and frees that a memory snapshot tells of."""


def mark() -> Callable[[], None]:
    """Mark where the stream is; calling the result sleeps until the device has come so far."""
    # Blocking: the thread sleeps. Waiting in a loop would hear some microseconds sooner, and take a
    # core from ducks on the same machine.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize


def pinned(nbytes: int) -> np.ndarray:
    """Zeroed memory of the host that the device reads and writes by itself: (nbytes,) uint8."""
    memory: np.ndarray = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


def pinned_like(tensor: Tensor) -> Tensor:
    """Room for a tensor in the host's memory, pinned."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class Capturer:
    """Records work as CUDA graphs, which share one pool of memory.

    Sharing is right because nothing that outlives a replay lies in the pool: the work's inputs and
    outputs were allocated before it was captured, and no two graphs run at once.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # Never freed: torch refuses a pool whose graphs were all gone for a while.
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work` once, then record it; the result does it again, with one call.

        Done once, it has compiled its kernels and given libraries their workspaces, neither of
        which may happen while it is recorded.
        """
        before = torch.cuda.current_stream()
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            work()
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are checked: others wait for events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the first error says more
                    graph.capture_end()
                raise
            graph.capture_end()
        self._first = self._first or graph
        before.wait_stream(self._stream)
        return graph.replay


def memory() -> tuple[int, int, int, int]:
    """Bytes of the device: allocated and reserved by this process, free, in all."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free, total


def record_memory() -> None:
    """From now on keep for a snapshot who allocated what; slows allocations down a little."""
    torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)


def dump_memory(path: Path) -> None:
    """Write a snapshot of the device's memory, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
