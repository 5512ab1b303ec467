"""How fast a duck gets its slice: from a cold disk beside dd, and warm.

    python scripts/bench_load.py [--folder DIR] [--layers 9] [--repeats 7] [--json]

Makes a slice of DeepSeek-V3's real widths (hidden 7168, 64 columns, 256 experts; 9 layers are
3.2 GB) with random codes, few of them subnormal, as in trained weights. Then, in turn, `dd` reads
its files and a duck loads them, the page cache emptied of them before each; the figure is the
median of the paired ratios. Last, hosts attach to a `duck node` process that holds the slice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from duck import log, wire
from duck.node import Node
from duck.placement import Plan
from duck.slices import StoreSource, slice_of
from duck.store import Store, file_header
from duck.transports.tcp import TcpTransport

HIDDEN, COLUMNS, EXPERTS = 7168, 64, 256
ATTACHES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="where to put the slice (default: a new one)")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    log.configure()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        plan = make_slice(folder, options.layers)
        figures = {**machine(), **measure(folder, plan, options.repeats)}
        figures |= asyncio.run(measure_warm(folder, plan))
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
    else:
        show(figures)


def make_slice(folder: Path, layers: int) -> Plan:
    """A store with every layer, kept if it is there already."""
    shape = wire.Shape(HIDDEN, 8, "bfloat16", "bfloat16", 256)
    numbers = tuple(range(3, 3 + layers))
    plan = Plan("0" * 64, numbers, EXPERTS, COLUMNS, (range(COLUMNS),), shape)
    what = slice_of(plan, 0)
    store = Store(folder)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, what.record_bytes * 16, np.uint8)
    codes[(codes & 0x7F) == 0x7F] -= 1  # NaN
    subnormal = ((codes & 0x7F) - 1).view(np.uint8) < 7
    codes[subnormal & (rng.random(len(codes)) > 1 / 400)] |= 0x20  # one in 8,000 stays
    scales = np.full((EXPERTS, what.scale_floats), 2.0**27, np.float32)
    with store.claim(what):
        for layer in sorted(set(what.layers) - store.whole().keys()):
            with store.write(layer) as writer:
                writer.write(file_header(what))
                for _ in range(EXPERTS):
                    start = rng.integers(0, len(codes) - what.record_bytes)
                    writer.write(codes[start : start + what.record_bytes].data)
                writer.write(scales.data)
                writer.finish()
    return plan


def measure(folder: Path, plan: Plan, repeats: int) -> dict[str, Any]:
    """Cold loads beside dd, in turn."""
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    dd_s, load_s, from_disk = [], [], []
    for _ in range(repeats):
        dd_s.append(cold(files, lambda: dd(files)))
        before = disk_bytes()
        load_s.append(cold(files, lambda: asyncio.run(load(folder, plan))))
        from_disk.append((disk_bytes() - before) / size)
    return {
        "slice_bytes": size,
        "dd_mb_s": size / statistics.median(dd_s) / 1e6,
        "load_mb_s": size / statistics.median(load_s) / 1e6,
        "load_to_dd": statistics.median(d / n for d, n in zip(dd_s, load_s, strict=True)),
        "load_from_disk": min(from_disk),  # below 1: some of it came from the page cache
        "dd_s": dd_s,
        "load_s": load_s,
    }


def cold(files: list[Path], work: Callable[[], object]) -> float:
    """Seconds of some work, with none of the files in the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def dd(files: list[Path]) -> None:
    for path in files:
        command = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none"]
        subprocess.run(command, check=True)


class Quiet:
    """Progress that nobody looks at."""

    def __call__(self, done: int, total: int) -> None:
        pass

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        raise AssertionError("every layer is there")


async def load(folder: Path, plan: Plan) -> None:
    """All that a node does between HELLO and WELCOME, its arena new."""
    facts = await Node(StoreSource(folder)).attach(plan, 0, Quiet())
    assert not facts["warm"]


def disk_bytes() -> int:
    """What this process has caused to be read from disks."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    raise AssertionError("no read_bytes in /proc/self/io")


async def measure_warm(folder: Path, plan: Plan) -> dict[str, Any]:
    """Hosts that come and go: how long until the ducks are theirs."""
    command = ["duck", "node", "--listen", "127.0.0.1:0", "--store", str(folder), "--json"]
    node = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, stdout=subprocess.PIPE
    )
    try:
        assert node.stdout is not None
        address = json.loads(await node.stdout.readline())["address"]
        attach_s, moved, resident = [], 0, 0
        for number in range(ATTACHES + 1):
            host = TcpTransport([address])
            begun = time.perf_counter()
            await host.start(plan)
            if number:  # the first one loads
                attach_s.append(time.perf_counter() - begun)
                moved += host.attached[0]["read_bytes"] + host.attached[0]["received_bytes"]
            resident = memory_of(node.pid)
            await host.close()
    finally:
        node.terminate()
        await node.wait()
    return {
        "warm_ms": statistics.median(attach_s) * 1e3,
        "warm_ms_worst": max(attach_s) * 1e3,
        "warm_weight_bytes": moved,
        "node_over_slice_bytes": resident - slice_of(plan, 0).nbytes,
    }


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else platform.machine(), "cpus": os.cpu_count()}


def show(figures: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    ratios = [d / n for d, n in zip(figures["dd_s"], figures["load_s"], strict=True)]
    rows = (
        ("machine", f"{figures['cpu']}, {figures['cpus']} processors"),
        ("slice", f"{figures['slice_bytes'] / 1e9:.2f} GB, columns {COLUMNS}, {EXPERTS} experts"),
        ("dd", f"{figures['dd_mb_s']:.0f} MB/s"),
        ("cold load", f"{figures['load_mb_s']:.0f} MB/s"),
        (
            "ratio", f"{figures['load_to_dd']:.2f} ({min(ratios):.2f} .. {max(ratios):.2f} in "
            f"{len(ratios)} pairs); {figures['load_from_disk']:.0%} read from disk",
        ),
        (
            "warm attach", f"{figures['warm_ms']:.1f} ms, worst of {ATTACHES} "
            f"{figures['warm_ms_worst']:.1f} ms; {figures['warm_weight_bytes']} weight bytes",
        ),
        ("node's memory", f"slice + {figures['node_over_slice_bytes'] / 1e6:.0f} MB"),
    )  # fmt: skip
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    main()
