"""Free memory as Linux tells it: /proc/meminfo, and the control groups around the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from duck import memory
from duck.errors import ConfigError

GIB = 1 << 30


def system(root: Path, available: int, cgroup: str = "", **files: str) -> Path:
    """A /proc and /sys of our own; files are named by their path under sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    total, free = 2 * available >> 10, 5
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {total} kB\nMemFree:  {free} kB\nMemAvailable:   {available >> 10} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_the_machine_has(tmp_path: Path) -> None:
    assert memory.free_bytes(system(tmp_path, 15 * GIB)) == 15 * GIB


def test_a_limit_of_the_second_version(tmp_path: Path) -> None:
    """The nearest of all limits above; the group's own page cache is free."""
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": f"{1 * GIB}\n",
        "a/memory.max": f"{8 * GIB}\n",
        "a/memory.current": f"{3 * GIB}\n",
        "a/memory.stat": f"anon {1 * GIB}\ninactive_file {2 * GIB}\n",
    }
    root = system(tmp_path, 15 * GIB, "0::/a/b\n", **files)
    assert memory.free_bytes(root) == 7 * GIB


def test_a_limit_of_the_first_version(tmp_path: Path) -> None:
    """In a container the path may be unknown here: the mounted folder is the group itself."""
    files = {
        "memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/memory.usage_in_bytes": f"{1 * GIB}\n",
        "memory/memory.stat": f"total_inactive_file {GIB}\n",
    }
    text = "5:devices:/\n4:cpu,memory:/docker/123\n0::/\n"
    assert memory.free_bytes(system(tmp_path, 15 * GIB, text, **files)) == 4 * GIB


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert memory.free_bytes(tmp_path) is None
    assert memory.huge_bytes(tmp_path) is None
    memory.check_fits(1 << 60, root=tmp_path)


def test_no_room(tmp_path: Path) -> None:
    root = system(tmp_path, int(15.1 * GIB))
    with pytest.raises(ConfigError, match=r"^needs 21\.8 GiB, 15\.1 GiB free"):
        memory.check_fits(int(21.8 * GIB) - memory.OVERHEAD_BYTES, root=root)
    memory.check_fits(int(21.8 * GIB), given_back_bytes=7 * GIB, root=root)
    memory.check_fits(14 * GIB, root=root)
    with pytest.raises(
        ConfigError, match=r"^the ducks on this machine need 15\.5 GiB, 15\.1 GiB free"
    ):
        memory.check_fits(15 * GIB, local=4, root=root)


def test_huge_pages(tmp_path: Path) -> None:
    system(tmp_path, GIB)
    (tmp_path / "proc/self/smaps_rollup").write_text(
        "5581b000-7ffe3000 ---p 00000000 00:00 0      [rollup]\nRss:   900 kB\n"
        "AnonHugePages:     40960 kB\n"
    )
    assert memory.huge_bytes(tmp_path) == 40 << 20


def test_this_machine() -> None:
    free = memory.free_bytes()
    assert free is None or free > 0
