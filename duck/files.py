"""Opening files that others may have put there: only regular ones, and never waiting for them.

A pipe in a folder of weights would block whoever opens it, a node's event loop and its signals
included; a folder or a device is no better. What is wrong is an OSError with one clear word, as the
system's own are, so that whoever opens says it as it says those.
"""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Literal

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FLAGS = {"r": os.O_RDONLY, "r+": os.O_RDWR, "w": os.O_WRONLY | os.O_CREAT}


def open_regular(path: Path, mode: Literal["r", "r+", "w"] = "r") -> FileIO:
    """Open a file unbuffered, in binary; "w" makes it if need be, and empties it.

    Raises:
        OSError: as `open` does, and for what is no regular file.
    """
    flags = _FLAGS[mode] | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as problem:
        if problem.errno in (errno.ENXIO, errno.EISDIR):  # a pipe that nobody reads, a folder
            raise _strange(path, os.stat(path).st_mode) from problem
        raise
    try:
        mode_found = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode_found):
            raise _strange(path, mode_found)
        if mode == "w":  # only now: nothing else is emptied
            os.truncate(handle, 0)
        return FileIO(handle, {"r": "rb", "r+": "rb+", "w": "wb"}[mode])
    except BaseException:
        os.close(handle)
        raise


def _strange(path: Path, mode: int) -> OSError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return OSError(errno.EINVAL, f"it is {kind}, want a regular file: remove it", str(path))
