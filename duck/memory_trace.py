"""What memory is taken when: a line of JSON for every stage of loading and of running.

    {"what": "weights", "s": 12.8, "allocated_bytes": 18491019264, "reserved_bytes": ...,
     "free_bytes": ..., "total_bytes": ..., "host_bytes": ..., "resident_bytes": 18491011072}

allocated, reserved, free and total are a GPU's, null without one; host is this process's. What
follows is the stage's own. When a GPU's memory runs out, its snapshot is written beside the file.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any

import torch

from duck import memory
from duck.budget import Budget
from duck.device import Stage
from duck.errors import OutOfMemory


class MemoryTrace:
    """Notes what is taken; with no path it only explains why there was not enough.

    Args:
        path: the file to write; replaced.
        cuda: whether there is a GPU to ask.
    """

    def __init__(self, path: str | None, *, cuda: bool) -> None:
        self._cuda, self._begun = cuda, time.perf_counter()
        self._path = None if path is None else Path(path)
        self._file: IO[str] | None = None
        if self._path is not None:
            self._file = self._path.open("w", encoding="utf-8")
            if cuda:
                from duck import cuda as calls

                calls.record_memory()

    @property
    def on(self) -> bool:
        return self._file is not None

    def note(self, what: str, **facts: Any) -> None:
        """Write a line; nothing without a file."""
        if self._file is None:
            return
        names = ("allocated_bytes", "reserved_bytes", "free_bytes", "total_bytes")
        device = dict(zip(names, self._device(), strict=True))
        line = {
            "what": what, "s": round(time.perf_counter() - self._begun, 6), **device,
            "host_bytes": memory.process_bytes(), **facts,
        }  # fmt: skip
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()  # whatever ends us, what was before it is there

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def explain(self, budget: Budget, stage: Stage | str, error: BaseException) -> BaseException:
        """One clear line, and a snapshot, if the error is that a GPU's memory ran out."""
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        allocated, reserved, free, total = self._device()
        self.note("out of memory", stage=_name(stage), error=str(error))
        snapshot = ""
        if self._path is not None and self._cuda:
            from duck import cuda as calls

            file = self._path.with_name(self._path.name + ".snapshot.pickle")
            calls.dump_memory(file)
            snapshot = f"; snapshot for pytorch.org/memory_viz: {file}"
        taken = ""
        if None not in (allocated, reserved, free, total):
            taken = (
                f"; {_size(allocated)} allocated, {_size(reserved)} reserved, {_size(free)} of "
                f"{_size(total)} free"
            )
        return OutOfMemory(
            f"GPU memory ran out at {_name(stage)} ({str(error).splitlines()[0].split('. GPU')[0]})"
            f": planned were {budget}{taken}; use a smaller --max-len, --kv fp8, --graphs off, "
            f"fewer sessions at once, or end what else runs on the GPU{snapshot}"
        )

    def _device(self) -> tuple[int | None, ...]:
        if not self._cuda:
            return (None,) * 4
        from duck import cuda as calls

        return calls.memory()


def _name(stage: Stage | str) -> str:
    if isinstance(stage, str):
        return stage
    where = f" of layer {stage.layer}" if stage.layer >= 0 else ""
    return f"{stage.name}{where}, {stage.rows} rows"


def _size(nbytes: int | None) -> str:
    return memory.readable(nbytes or 0)
