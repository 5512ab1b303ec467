"""Where attention, norms, routing and the head are computed: one worker thread, off the event loop.

The event loop stays free to hear the ducks; the worker runs one piece of work at a time, in order.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from duck.errors import ConfigError

Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device:
    """A torch device and dtype, and the thread that computes on it.

    Args:
        device: auto, cpu or cuda.
        dtype: auto (float32 on the CPU, bfloat16 on CUDA), float32 or bfloat16.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """

    def __init__(self, device: str, dtype: str) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        self.torch = torch.device(device)
        self.name = device
        self.dtype_name = dtype
        self.dtype = DTYPES[dtype]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="device")

    async def run(self, work: Callable[[], Result], busy: Busy | None = None) -> Result:
        """Compute `work()` on the worker under inference mode, and count its time as `busy`.

        Cancelling stops the wait, not the work: it finishes in the background and its result is
        dropped.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, _infer, work, busy)

    def free_bytes(self) -> int | None:
        """What a GPU has free; None of a CPU, whose memory `duck.memory` knows."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.name == "cuda" else None

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)


class Busy:
    """Seconds of device work of one generation."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


def _infer(work: Callable[[], Result], busy: Busy | None) -> Result:
    begun = time.perf_counter()
    with torch.inference_mode():
        result = work()
    if busy is not None:
        busy.seconds += time.perf_counter() - begun
    return result


def limit_threads() -> None:
    """Bound torch's own threads.

    One row at a time is memory-bound: beyond a few cores more threads add nothing, and their
    spinning takes
    cores from ducks on the same machine.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(8, (os.cpu_count() or 1) // 2)))
