"""How much memory this process may still take, and whether its arena lies on huge pages.

Linux tells both in /proc and in the control groups; elsewhere nothing is known, and nothing is
refused. `root` is for tests, which bring their own /proc.
"""

from __future__ import annotations

from pathlib import Path

from duck.errors import ConfigError

# Beside its weights a duck needs the interpreter, numpy, and buffers for asks on their way.
OVERHEAD_BYTES = 120 << 20
_ROOT = Path("/")


def check_fits(
    needed_bytes: int, given_back_bytes: int = 0, *, local: int = 0, root: Path = _ROOT
) -> None:
    """Refuse a slice that memory has no room for, before any of it is read.

    given_back_bytes: held now, and free by then. local: the slices of so many ducks on this machine
    instead of a duck's own.

    Raises:
        ConfigError: needs more than is free.
    """
    free = free_bytes(root)
    if free is None:
        return
    needed, free = needed_bytes + max(1, local) * OVERHEAD_BYTES, free + given_back_bytes
    if needed > free:
        who = "the ducks on this machine need" if local else "needs"
        raise ConfigError(
            f"{who} {readable(needed)}, {readable(free)} free: use ducks on more machines, or give "
            "this one narrower slices"
        )


def free_bytes(root: Path = _ROOT) -> int | None:
    """What may still be allocated without swapping; None where the system does not say."""
    available = _fields(root / "proc/meminfo").get("MemAvailable")
    rooms = [] if available is None else [available]
    rooms += _group_rooms(root)
    return min(rooms, default=None)


def huge_bytes(root: Path = _ROOT) -> int | None:
    """Bytes of this process that lie on huge pages; None where the system does not say."""
    return _fields(root / "proc/self/smaps_rollup").get("AnonHugePages")


def process_bytes(root: Path = _ROOT) -> int | None:
    """Bytes of the machine's memory that this process takes; None where nobody says."""
    return _fields(root / "proc/self/status").get("VmRSS")


def readable(size: int) -> str:
    """Bytes for people: "21.8 GiB", "64.0 KiB"."""
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.1f} {unit}"
    return f"{size / 1024:.1f} KiB"


def _group_rooms(root: Path) -> list[int]:
    """What each control group around this process leaves free: versions 1 and 2 of the kernel's.

    A group's own page cache counts as free: the kernel drops it before it refuses memory.
    """
    rooms = []
    for line in _lines(root / "proc/self/cgroup"):
        _, kinds, path = ([*line.split(":", 2), "", ""])[:3]
        if kinds == "":
            mount, limit, usage = "sys/fs/cgroup", "memory.max", "memory.current"
            cache = "inactive_file"
        elif "memory" in kinds.split(","):
            mount, limit, usage = (
                "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
            )  # fmt: skip
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's, and what is mounted here is the group itself.
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                rooms.append(max(0, most - used + _fields(folder / "memory.stat").get(cache, 0)))
            if folder == root / mount:
                break
    return rooms


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    """The file's number; None without one, or for "max"."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name: 123 kB" (in bytes) or "name 123"."""
    found = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found
