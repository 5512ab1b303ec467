"""A timer that keeps to fractions of a millisecond, which event loops round up.

A lost packet costs about a millisecond; the loops' own timers fire up to another one late. Linux
has timers that are files (timerfd), and a file wakes the loop at once. Elsewhere the loop's timer
serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Callable

# Of sys/timerfd.h and time.h; Python's os module has these from 3.13 on.
_CLOCK_MONOTONIC = 1
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC if sys.platform == "linux" else 0
_TIMES = struct.Struct("@llll")  # interval and first time, seconds and nanoseconds each
_LEAST_S = 50e-6  # nothing fires sooner: the loop must turn
# The loop's own timers count in milliseconds: for less it would turn without pause.
_LEAST_LOOP_S = 1e-3


class Timer:
    """Calls back once at a time that may be changed until then.

    Args:
        call: when the time has come.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._times = ctypes.create_string_buffer(_TIMES.size)
        self._file = -1
        if sys.platform == "linux":
            libc = ctypes.PyDLL(None)  # its calls take a microsecond: they keep the GIL
            self._set = libc.timerfd_settime
            self._file = libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        if self._file >= 0:
            self._loop.add_reader(self._file, self._fired)

    def start(self, after_s: float) -> None:
        """Fire so many seconds from now, and not when it was to fire before."""
        after_s = max(after_s, _LEAST_S)
        if self._file >= 0:
            seconds, rest = divmod(after_s, 1.0)
            _TIMES.pack_into(self._times, 0, 0, 0, int(seconds), int(rest * 1e9))
            self._set(self._file, 0, self._times, None)
            return
        if self._handle:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(after_s, _LEAST_LOOP_S), self._call)

    def _fired(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # it was started anew in the same turn of the loop
            return
        self._call()

    def close(self) -> None:
        """Never fire again; the second time nothing."""
        if self._handle:
            self._handle.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1
