"""`duck bench kernel`: how near the expert kernel comes to the memory and to the processor.

Every figure pairs the kernel with a yardstick measured within the same tenth of a second, because
the speed of a shared machine drifts: reading the same memory as fast as possible (for few rows), or
torch's float32 matrix product (for many). The ratio given is the median of the pairs' ratios.
Weights come from memory and not from a cache: calls walk through all experts of all layers before
any comes again. The machine should be doing nothing else.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duck.errors import ConfigError
from duck.kernels import fp8
from duck.kernels.experts import BLOCK, NativeExperts, Sizes, available_isas, pack
from duck.model.weights import ExpertWeights

ROWS = (1, 2, 4, 16, 64, 328)
# Of one call; the widest prefill has 2,048, and rows and results must fit beside the weights.
MAX_ROWS = 8192
PREFILL_ROWS = 328
"""From this many rows on the yardstick is torch."""
_SAMPLE_S = 0.02  # at least, for one measurement of either side of a pair


@dataclass(frozen=True)
class Shape:
    """What a duck holds of each layer."""

    name: str
    hidden: int
    columns: int
    experts: int
    top_k: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.columns


# A slice as in DeepSeek-V3 over 32 ducks; and whole experts, as few as fit a small machine.
SLICE = Shape("slice 64 of 2048", 7168, 64, 256, 8)
WHOLE = Shape("whole experts", 7168, 2048, 32, 8)


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    shape: str
    resident: str
    isa: str
    threads: int
    rows: int
    us_per_token: float
    gb_s: float  # resident bytes of the distinct experts chosen
    stream_gb_s: float
    ratio: float  # median of the pairs' gb_s / stream_gb_s
    gflop_s: float
    hot_gw_s: float | None = None  # G weights a second out of cache: what the cores could do
    torch_gflop_s: float | None = None
    torch_ratio: float | None = None
    torch_same_isa_gflop_s: float | None = None  # torch held to the same instructions
    torch_same_isa_ratio: float | None = None


def bench_kernel(
    *,
    isas: Sequence[str] = (),
    threads: Sequence[int] = (),
    residents: Sequence[str] = ("fp8",),
    shapes: Sequence[Shape] = (SLICE, WHOLE),
    rows: Sequence[int] = ROWS,
    memory_gib: float = 3.0,
    repeats: int = 20,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure; returns a report of plain values for JSON, and for `tables`.

    isas: default: the vector sets that this processor has. threads: default: one, and all.
    residents: how the experts are held. memory_gib: of weights per shape and resident. note:
    called with what is about to be measured.

    Raises:
        ConfigError: a resident, an instruction set or a size that this machine does not have.
    """
    isas = list(isas) or [isa for isa in available_isas() if isa != "scalar"] or ["scalar"]
    processors = len(os.sched_getaffinity(0))
    counts = list(threads) or sorted({1, processors})
    report: dict[str, Any] = {
        "cpu": _cpu_name(),
        "processors": processors,
        "repeats": repeats,
        "stream": [],
        "rows": [],
    }
    yardsticks = _Torches(max(rows) >= PREFILL_ROWS)
    try:
        for shape, resident in itertools.product(shapes, residents):
            note(f"{shape.name}: {memory_gib:.1f} GiB of random weights as {resident}")
            with _Bench(shape, resident, memory_gib, repeats) as bench:
                report["huge_pages"] = bench.native.huge_page_share()
                if not report["stream"]:
                    note("stream read")
                    report["stream"] = [
                        {"threads": count, "gb_s": bench.stream(count)}
                        for count in sorted({*range(1, min(processors, 8) + 1), *counts})
                    ]
                for isa, count, some in itertools.product(isas, counts, rows):
                    note(f"{shape.name}, {resident}, {isa}, threads {count}, rows {some}")
                    report["rows"].append(asdict(bench.row(isa, count, some, yardsticks)))
    finally:
        yardsticks.close()
    return report


class _Bench:
    """One shape's weights in memory."""

    def __init__(self, shape: Shape, resident: str, memory_gib: float, repeats: int) -> None:
        sizes = Sizes.of(shape.hidden, shape.columns, resident)
        self._expert_bytes = sizes.record_bytes
        layers = int(memory_gib * 2**30 / (shape.experts * self._expert_bytes))
        if layers < 1:
            need = shape.experts * self._expert_bytes / 2**30
            raise ConfigError(
                f"{shape.name} takes {need:.1f} GiB a layer, allowed are {memory_gib}"
            )
        self._shape, self._repeats = shape, repeats
        self._rng = np.random.default_rng(0)
        self.native = NativeExperts(
            range(layers), shape.experts, shape.hidden, shape.columns, resident=resident
        )
        # One expert, packed once: rounding it again and again would take minutes.
        record = np.empty(sizes.record_bytes, np.uint8)
        scales = np.empty(sizes.scale_floats, np.float32)
        pack(_random_weights(self._rng, shape), resident, record, scales)
        for layer in range(layers):
            self.native.records(layer)[:] = record
            self.native.scales(layer)[:] = scales
            for expert in range(shape.experts):
                self.native.adopt(layer, expert, 0)
        self._layers = layers
        self._offset = 0

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.native.close()

    def stream(self, threads: int) -> float:
        """GB/s of reading, median."""
        self.native.tune(threads=threads)
        return statistics.median(self._stream_once() for _ in range(self._repeats))

    def row(self, isa: str, threads: int, rows: int, yardsticks: _Torches) -> Row:
        self.native.tune(threads=threads, isa=isa)
        shape = self._shape
        asks = self._asks(rows)
        out = np.empty((rows, shape.hidden), np.float32)
        torches = yardsticks.start(isa, threads) if rows >= PREFILL_ROWS else []
        pairs = [
            (self._stream_once(), self._kernel_once(asks, out), [torch() for torch in torches])
            for _ in range(self._repeats + 1)
        ][1:]  # the first warms up
        stream = [stream for stream, _, _ in pairs]
        kernel = [kernel for _, kernel, _ in pairs]
        seconds = [time_s for time_s, _ in kernel]
        gb_s = [nbytes / time_s / 1e9 for time_s, nbytes in kernel]
        flop = 2 * shape.expert_weights * shape.top_k * rows
        gflop_s = [flop / time_s / 1e9 for time_s in seconds]
        more: dict[str, float | None] = {}
        names = ("torch", "torch_same_isa")
        for name, found in zip(
            names, zip(*(torch for _, _, torch in pairs), strict=True), strict=False
        ):
            more[f"{name}_gflop_s"] = statistics.median(found)
            more[f"{name}_ratio"] = _ratio(gflop_s, found)
        if rows == 1 and self._expert_bytes * shape.top_k < 32 << 20:
            more["hot_gw_s"] = self._hot(out)
        return Row(
            shape.name, self.native.resident, isa, threads, rows,
            us_per_token=statistics.median(seconds) / rows * 1e6,
            gb_s=statistics.median(gb_s),
            stream_gb_s=statistics.median(stream),
            ratio=_ratio(gb_s, stream),
            gflop_s=statistics.median(gflop_s),
            **more,
        )  # fmt: skip

    def _asks(self, rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, int]]:
        """Forever: layer, x, ids, weights and the bytes of the experts they choose."""
        shape, rng = self._shape, self._rng
        x = rng.standard_normal((rows, shape.hidden)).astype(np.float32)
        weights = rng.uniform(0.1, 1, (rows, shape.top_k)).astype(np.float32)
        prepared = []
        # One row: every expert of a layer once before any comes again. More: routed at random.
        for part in range(max(1, shape.experts // shape.top_k) if rows == 1 else 4):
            if rows == 1:
                first = part * shape.top_k
                ids = np.arange(first, first + shape.top_k)[None] % shape.experts
            else:
                ids = rng.random((rows, shape.experts)).argsort(axis=1)[:, : shape.top_k]
            nbytes = len(np.unique(ids)) * self._expert_bytes
            prepared.append((x, np.ascontiguousarray(ids, np.int32), weights, nbytes))
        for ask in itertools.cycle(prepared):
            for layer in range(self._layers):
                yield layer, *ask

    def _kernel_once(self, asks: Iterator[Any], out: np.ndarray) -> tuple[float, float]:
        """Mean seconds and mean bytes of a call, over at least `_SAMPLE_S`."""
        calls = total = 0
        begun = now = time.perf_counter()
        while now - begun < _SAMPLE_S:
            layer, x, ids, weights, nbytes = next(asks)
            self.native.forward(layer, x, ids, weights, out)
            calls += 1
            total += nbytes
            now = time.perf_counter()
        return (now - begun) / calls, total / calls

    def _stream_once(self) -> float:
        step = min(64 << 20, self.native.nbytes)
        done = 0
        begun = now = time.perf_counter()
        while now - begun < _SAMPLE_S:
            if self._offset + step > self.native.nbytes:
                self._offset = 0
            self.native.read(self._offset, step)
            self._offset += step
            done += step
            now = time.perf_counter()
        return done / (now - begun) / 1e9

    def _hot(self, out: np.ndarray) -> float:
        """G weights a second when the same experts come again and again."""
        layer, x, ids, weights, nbytes = next(self._asks(1))
        same = itertools.repeat((layer, x, ids, weights, nbytes))
        samples = [self._kernel_once(same, out) for _ in range(5)]
        count = self._shape.expert_weights * self._shape.top_k
        return max(count / time_s / 1e9 for time_s, _ in samples)


class _Torches:
    """torch's float32 matrix product in processes of its own, for this one imports no torch."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._running: dict[tuple[str, int], list[subprocess.Popen[str]]] = {}

    def start(self, isa: str, threads: int) -> list[Callable[[], float]]:
        """Functions that measure GFLOP/s once: torch as it is, then held to `isa`; or none."""
        if not self._wanted or isa == "scalar":
            return []
        key = isa, threads
        if key not in self._running:
            held = "AVX512" if isa == "avx512" else "AVX2"
            self._running[key] = [
                self._spawn(threads, {}),
                self._spawn(threads, {"MKL_ENABLE_INSTRUCTIONS": held}),
            ]
        try:
            return [_measure(process) for process in self._running[key]]
        except (OSError, ValueError):  # there is no torch
            self._wanted = False
            return []

    def close(self) -> None:
        for process in itertools.chain(*self._running.values()):
            process.kill()
            process.communicate()

    @staticmethod
    def _spawn(threads: int, environment: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _TORCH, str(threads), str(_SAMPLE_S)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, **environment},
        )  # fmt: skip


def _measure(process: subprocess.Popen[str]) -> Callable[[], float]:
    def measure() -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    measure()  # the first loads and warms up; ValueError when the process has ended
    return measure


# Large enough to run at full speed, small enough for a sample of 20 ms on a small machine.
_TORCH = """
import sys, time
import torch
threads, sample_s = int(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(threads)
size = 1536
a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
for _ in range(3):
    torch.matmul(a, b, out=out)
for line in sys.stdin:
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < sample_s:
        torch.matmul(a, b, out=out)
        done += 1
    print(2 * size**3 * done / (time.perf_counter() - begun) / 1e9, flush=True)
"""


def tables(report: dict[str, Any]) -> str:
    """The report for people: few rows beside reading, many beside torch; 80 columns wide."""
    lines = [
        f"{report['cpu']}, {report['processors']} processors; "
        + (f"{report['huge_pages']:.0%} on huge pages" if report["huge_pages"] is not None else ""),
        "plain read of memory: "
        + ", ".join(
            f"{each['gb_s']:.1f} GB/s by {each['threads']} thread{'s' * (each['threads'] > 1)}"
            for each in report["stream"]
        ),
    ]
    few = [row for row in report["rows"] if row["rows"] < PREFILL_ROWS]
    many = [row for row in report["rows"] if row["rows"] >= PREFILL_ROWS]
    if few:
        lines += ["", *_lines(few, _FEW)]
        lines += [
            "us: microseconds a token. GB/s: weights read from memory. read: by the fastest",
            "plain read. /read: kernel to plain read, median of pairs. hot: 10^9 weights a",
            "second when experts come again out of cache: what the cores could do.",
        ]
    if many:
        lines += ["", *_lines(many, _MANY)]
        lines += [
            "torch: GFLOP/s of its float32 matrix product. same: of torch held to the same",
            "instruction set. /torch, /same: kernel to torch, medians of pairs.",
        ]
    return "\n".join(lines)


# A column: its heading, the row's key, its width and digits; texts stand on the left.
_Columns = Sequence[tuple[str, str, int, int]]
_ROW: _Columns = (
    ("", "shape", 17, -1), ("as", "resident", 5, -1), ("isa", "isa", 6, -1),
    ("thr", "threads", 4, 0), ("rows", "rows", 5, 0), ("us", "us_per_token", 8, 1),
)  # fmt: skip
_FEW: _Columns = (
    *_ROW, ("GB/s", "gb_s", 7, 1), ("read", "stream_gb_s", 7, 1), ("/read", "ratio", 6, 2),
    ("hot", "hot_gw_s", 7, 1),
)  # fmt: skip
_MANY: _Columns = (
    *_ROW, ("GFLOP/s", "gflop_s", 8, 1), ("torch", "torch_gflop_s", 7, 1),
    ("/torch", "torch_ratio", 7, 2), ("same", "torch_same_isa_gflop_s", 7, 1),
    ("/same", "torch_same_isa_ratio", 6, 2),
)  # fmt: skip


def _lines(rows: Sequence[dict[str, Any]], columns: _Columns) -> Iterator[str]:
    yield "".join(
        f"{name:{width}}" if digits < 0 else f"{name:>{width}}"
        for name, _, width, digits in columns
    ).rstrip()
    for row in rows:
        cells = (_cell(row[key], width, digits) for _, key, width, digits in columns)
        yield "".join(cells).rstrip()


def _cell(value: str | float | None, width: int, digits: int) -> str:
    if value is None or isinstance(value, str):
        return f"{value or '':{width}}"
    return f"{value:{width}.{digits}f}"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _random_weights(rng: np.random.Generator, shape: Shape) -> ExpertWeights:
    """Gaussian weights in the codes of a checkpoint; few enough different ones to make quickly."""
    codes, _ = fp8.quantise(rng.standard_normal((1024, 1024)).astype(np.float32), BLOCK)
    wide, tall = (shape.columns, shape.hidden), (shape.hidden, shape.columns)
    blocks = -(-shape.hidden // BLOCK[0])

    def matrix(seed: int, size: tuple[int, int]) -> np.ndarray:
        return np.resize(np.roll(codes, seed * 7919), size)

    def scales(*size: int) -> np.ndarray:
        return rng.uniform(1e-4, 2e-4, size).astype(np.float32)

    return ExpertWeights(
        range(shape.columns), BLOCK, matrix(0, wide), matrix(1, wide), matrix(2, tall),
        scales(shape.columns, blocks), scales(shape.columns, blocks), scales(blocks, shape.columns),
    )  # fmt: skip


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            names = [
                line.partition(":")[2].strip() for line in info if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
