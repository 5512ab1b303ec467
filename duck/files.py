"""Opening files: only regular ones, whoever put them there, never waiting for them, and with room
for as many as a process needs.

A pipe in a folder of weights would block whoever opens it, a node's event loop and its signals
included; a folder or a device is no better. What is wrong is an OSError with one clear word, as the
system's own are, so that whoever opens says it as it says those.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Literal

from duck.errors import ConfigError

# What a command has open at once at the least: an event loop, a few connections, a file that is
# read. And what it gets where the system lets it: a duck has up to 256 strangers at its door.
LEAST_FILES, GOOD_FILES = 48, 2048

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


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that takes `path`'s place once the block has ended well.

    Until then what was there stays, whatever goes wrong: a full disk, an interrupt.

    Raises:
        OSError: it cannot take its place.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    beside = path.with_name(f".duck-{os.getpid()}-{os.urandom(6).hex()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # it was not made
            beside.unlink()
        raise


def allow_open_files() -> None:
    """Have the system let this process open as many files as it may need.

    Before anything is opened that cannot say well why it failed: event loops are such things.

    Raises:
        ConfigError: it may open too few.
    """
    limit = _limit()
    if limit is not None and limit < GOOD_FILES:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = GOOD_FILES if hard == resource.RLIM_INFINITY else min(hard, GOOD_FILES)
        with contextlib.suppress(OSError, ValueError):  # the system allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        limit = _limit()
    if limit is None:
        return
    free = limit - _open_files()
    if free < LEAST_FILES:
        raise ConfigError(f"{too_many_open(limit)}; {free} of them are free, want {LEAST_FILES}")


def too_many_open(limit: int | None = None) -> str:
    """The words for a process that may open no more files, with the cure."""
    limit = _limit() if limit is None else limit
    if limit is None:
        return "too many open files"
    told = f"this process may have {limit} files open (ulimit -n)"
    hard = _hard_limit()
    if hard is None or hard >= GOOD_FILES:
        return f"{told}: run ulimit -n {GOOD_FILES}"
    return (
        f"{told}, and its hard limit is {hard} (ulimit -Hn): have {GOOD_FILES} allowed, by nofile "
        "in /etc/security/limits.conf, or LimitNOFILE of its systemd unit"
    )


def _limit() -> int | None:
    """How many files this process may have open; None: nobody says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _hard_limit() -> int | None:
    """How many it may allow itself; None: as many as it likes, or nobody says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def _open_files() -> int:
    """How many are open now, or a guess."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # no such folder, or not even that can be opened
        return 3


def _strange(path: Path, mode: int) -> OSError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return OSError(errno.EINVAL, f"it is {kind}, want a regular file", str(path))
