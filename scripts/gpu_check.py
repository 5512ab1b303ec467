#!/usr/bin/env python3
"""Check and time the GPU kernels on the machine at hand: correct at the real shapes, and how fast.

    python3 scripts/gpu_check.py                      # all of it, in less than nine minutes
    python3 scripts/gpu_check.py --layers 30          # a GPU with less than 32 GB
    python3 scripts/gpu_check.py --json numbers.json

Needs torch, triton and numpy, nothing else: no network, no checkpoint, no installation. Weights are
random. Every kernel is compared with its reference in float32 or float64 at the widths of
DeepSeek-V3.2; then come times, by CUDA events, in replayed CUDA graphs, with more weights than the
L2 cache holds, beside what copying memory reaches on the same GPU. Last, the attention side of the
whole model: every layer with attention, indexer, router and shared expert, in fp8, the ducks' sums
left out of the time.

Exit code: 0 if every kernel is correct, 1 if not, 2 without a GPU that can run them.
`--device cpu --tiny` runs all but the times anywhere, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from duck.kernels.device import Kernels
    from duck.kernels.matrix import Fp8Matrix

Result = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The widths of a model, and what it is checked with."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    index_heads: int = 64
    index_width: int = 128
    topk: int = 2048
    experts: int = 256
    groups: int = 8
    kept: int = 4
    chosen: int = 8
    shared: int = 2048
    ducks: int = 16
    rows: tuple[int, ...] = (1, 2, 8, 64)
    dense: tuple[int, ...] = (0, 37, 2047, 5000)  # positions of dense attention
    context: int = 16_384  # tokens of sparse attention
    contexts: tuple[int, ...] = (1024, 2048, 16_384, 65_536)  # that layers are timed at

    @property
    def scale(self) -> float:
        """Of attention scores, without YaRN's share."""
        return float((self.nope + self.rope) ** -0.5)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name and (out, in) of a layer's fp8 matrices."""
        return {
            "q_a": (self.q_rank, self.hidden),
            "q_b": (self.heads * (self.nope + self.rope), self.q_rank),
            "kv_a": (self.rank + self.rope, self.hidden),
            "o": (self.hidden, self.heads * self.value),
            "index wq_b": (self.index_heads * self.index_width, self.q_rank),
            "index wk": (self.index_width, self.hidden),
            "shared gate, up": (2 * self.shared, self.hidden),
            "shared down": (self.hidden, self.shared),
        }


REAL = Shape()
TINY = Shape(
    hidden=160, heads=4, q_rank=48, rank=32, nope=16, rope=8, value=16, index_heads=5,
    index_width=32, topk=12, experts=16, groups=4, kept=2, chosen=4, shared=24, ducks=3,
    rows=(1, 2), dense=(0, 20), context=40, contexts=(10, 40),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
    problem = obstacle(args.device)
    if problem is not None:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    result = measure(args)
    print(report(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(check["ok"] for check in result["checks"]) else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check and time the GPU kernels at DeepSeek-V3.2's shapes.",
        epilog="Exit code: 0 correct, 1 a kernel is wrong, 2 no GPU that can run them.",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--layers", type=int, default=62, help="of the whole model (default 62)")
    parser.add_argument("--only", choices=("checks", "kernels", "layers"), help="one part of it")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after (500)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    if args.layers < 1:
        parser.error(f"--layers {args.layers}: want at least 1")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu interprets the kernels, far too slowly but for --tiny: add it")
    return args


def obstacle(device: str) -> str | None:
    """Why nothing can be run, in one line."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        return f"{missing}: this needs torch, triton and numpy"
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here; --device cpu --tiny checks the kernels without one"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, fp8 needs 8.9"
    return None


def measure(args: argparse.Namespace) -> Result:
    """All of it, as a dict that is JSON."""
    import torch
    import triton

    from duck.kernels.device import pick

    device = torch.device(args.device)
    cuda = device.type == "cuda"
    shape = TINY if args.tiny else REAL
    clock = Clock(args.seconds)
    kernels = pick(device, "triton")
    result: Result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": "tiny" if args.tiny else "DeepSeek-V3.2",
        "checks": [], "kernels": [], "layers": [], "skipped": [],
    }  # fmt: skip

    def wanted(part: str) -> bool:
        return args.only in (None, part)

    with torch.inference_mode():
        if wanted("checks"):
            for name, check in checks(shape, device, kernels):
                clock.run(result, "checks", name, check)
        if cuda and (wanted("kernels") or wanted("layers")):
            result["copy_gbs"] = copy_rate(device)
        if cuda and wanted("kernels"):
            for name, time_it in timings(shape, device, kernels, result["copy_gbs"]):
                clock.run(result, "kernels", name, time_it)
        if cuda and wanted("layers"):
            clock.run_all(
                result, "layers", whole_model(shape, device, kernels, args.layers, result)
            )
    result["seconds"] = round(clock.spent(), 1)
    return result


class Clock:
    """Runs what there is time for; notes what there is not."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    def spent(self) -> float:
        return time.monotonic() - self._start

    def run(self, result: Result, part: str, name: str, work: Callable[[], Result]) -> None:
        if self.spent() > self._seconds:
            result["skipped"].append(f"{part}: {name}")
        else:
            result[part].append({"name": name, **work()})

    def run_all(
        self, result: Result, part: str, works: Iterator[tuple[str, Callable[[], Result]]]
    ) -> None:
        """As `run`, of works that take time to make."""
        while True:
            if self.spent() > self._seconds:
                result["skipped"].append(f"{part}: what would follow")
                return
            following = next(works, None)
            if following is None:
                return
            self.run(result, part, *following)


# correctness

Check = Callable[[], Result]


def compared(got: Tensor, expected: Tensor, tolerance: float) -> Result:
    """Where numbers are not finite they must be the same kind; the rest agrees as a whole."""
    import torch

    got, expected = got.double(), expected.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(kind(got), kind(expected)):
            wrong = int((kind(got) != kind(expected)).sum())
            return {
                "error": None, "tolerance": tolerance, "ok": False,
                "why": f"{kind.__name__} differs in {wrong} of {got.numel()} places",
            }  # fmt: skip
    finite = torch.isfinite(expected)
    size = float(expected[finite].norm())
    error = float((got[finite] - expected[finite]).norm()) / (size or 1.0)
    return {"error": error, "tolerance": tolerance, "ok": error <= tolerance}


def same(got: Tensor, expected: Tensor) -> Result:
    """Whether all numbers are equal."""
    different = int((got != expected).sum())
    return {"error": different / max(1, got.numel()), "tolerance": 0.0, "ok": different == 0}


def checks(shape: Shape, device: torch.device, kernels: Kernels) -> Iterator[tuple[str, Check]]:
    """Every kernel beside its reference."""
    yield from linear_checks(shape, device, kernels)
    yield from row_checks(shape, device, kernels)
    yield from attention_checks(shape, device, kernels)
    yield from indexer_checks(shape, device, kernels)
    yield "a layer, 2 rows", lambda: layer_check(shape, device, kernels)


def linear_checks(
    shape: Shape, device: torch.device, kernels: Kernels
) -> Iterator[tuple[str, Check]]:
    import torch

    make = Random(device)
    for name, size in shape.matrices().items():

        def check(size: tuple[int, int] = size) -> Result:
            weight = make.fp8(*size)
            x = make.rows(max(shape.rows), size[1])
            expected = x.double() @ weight.dequantised().double().T
            worst: Result = {"error": -1.0, "tolerance": 1e-5, "ok": True}
            for rows in shape.rows:
                got = kernels.linear_f32(x[:rows], weight)
                found = compared(got, expected[:rows], 1e-5)
                if rows <= 8 and not torch.equal(got[:1], kernels.linear_f32(x[:1], weight)):
                    return {**found, "ok": False, "why": f"row 0 of {rows} is not row 0 alone"}
                if not found["ok"]:
                    return {**found, "why": f"{rows} rows"}
                worst = max(worst, found, key=lambda one: one["error"])
            return worst

        yield f"fp8 linear {name} {size[0]} x {size[1]}", check

    def gated() -> Result:
        up, down = (make.fp8(*shape.matrices()[f"shared {name}"]) for name in ("gate, up", "down"))
        x = make.rows(2, shape.hidden)
        gate, raised = (x.float() @ up.dequantised().T).chunk(2, dim=-1)
        inner = (torch.nn.functional.silu(gate) * raised).to(x.dtype)
        expected = inner.double() @ down.dequantised().double().T
        return compared(kernels.swiglu_f32(x, (up,), down), expected, 5e-3)

    yield "shared expert", gated


def row_checks(shape: Shape, device: torch.device, kernels: Kernels) -> Iterator[tuple[str, Check]]:
    import torch

    from duck.kernels.device import REFERENCE
    from duck.kernels.reference.router import Rule

    make = Random(device)
    weight = 1 + make.numbers(shape.hidden) / 8
    x, change = make.rows(2, shape.hidden), make.numbers(2, shape.hidden)

    def add_norm() -> Result:
        got, expected = (one.add_norm(x, change, weight, 1e-6) for one in (kernels, REFERENCE))
        if not torch.equal(got[0], expected[0]):
            return same(got[0], expected[0])
        return compared(got[1], expected[1], 2e-3)

    def rms_norm() -> Result:
        got, expected = (one.rms_norm(x, weight, 1e-6) for one in (kernels, REFERENCE))
        return compared(got, expected, 2e-3)

    yield "norm", rms_norm
    yield "residual and norm", add_norm

    cos, sin = make.tables(64, shape.rope // 2)
    position = make.position(40)

    def rotate() -> Result:
        heads = make.rows(2, shape.heads, shape.nope + shape.rope)[..., shape.nope :]
        got, expected = (one.rotate_at(heads, cos, sin, position) for one in (kernels, REFERENCE))
        return compared(got, expected, 2e-3)

    yield "rotation", rotate
    for kind in ("bf16", "fp8"):

        def append(kind: str = kind) -> Result:
            kv, norm = make.rows(2, shape.rank + shape.rope), 1 + make.numbers(shape.rank) / 8
            written = []
            for one in (kernels, REFERENCE):
                held = make.latents(shape, 64, kind, zero=True)
                one.append_latents(kv, norm, 1e-6, cos, sin, held, position)
                written.append(numbers(held, shape.rank))
            return compared(*written, 5e-3)

        yield f"append latents {kind}", append

    def route() -> Result:
        gate, bias = make.numbers(shape.experts, shape.hidden), make.numbers(shape.experts) / 10
        gate *= 1.5 * shape.hidden**-0.5
        rule = Rule(
            count=shape.chosen, groups=shape.groups, kept=shape.kept, sigmoid=True, pairs=True,
            normalise=True, scale=2.5,
        )  # fmt: skip
        ids, weights = kernels.route(x, gate, bias, rule)
        expected_ids, expected = REFERENCE.route(x, gate, bias, rule)
        found = same(ids, expected_ids)
        return compared(weights, expected, 1e-5) if found["ok"] else found

    yield "router", route

    def combine() -> Result:
        partials, shared = make.numbers(shape.ducks, 2, shape.hidden), make.numbers(2, shape.hidden)
        got, expected = (one.combine(x, partials, shared) for one in (kernels, REFERENCE))
        return same(got, expected)

    yield "sum of ducks", combine


def attention_checks(
    shape: Shape, device: torch.device, kernels: Kernels
) -> Iterator[tuple[str, Check]]:
    import torch

    from duck.kernels.device import REFERENCE

    make = Random(device)
    wk = make.rows(shape.heads, shape.nope, shape.rank) * shape.nope**-0.5
    wv = make.rows(shape.heads, shape.value, shape.rank) * shape.rank**-0.5
    most = max(shape.dense) + max(shape.rows)

    def attended(
        one: Kernels, rows: int, held: Tensor, at: int, selected: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        q = Random(device, 1).rows(rows, shape.heads, shape.nope + shape.rope).to(dtype)
        return one.attend(
            q[..., : shape.nope], q[..., shape.nope :].contiguous(), held,
            wk.to(dtype), wv.to(dtype), shape.scale, make.position(at), selected,
        )  # fmt: skip

    # What a row of bf16 loses: its folded query, its weights and its result are rounded to it.
    tolerance = 1.5e-2
    for kind in ("bf16", "fp8"):
        for rows in shape.rows:
            for at in shape.dense:

                def dense(kind: str = kind, rows: int = rows, at: int = at) -> Result:
                    held = make.latents(shape, most, kind)
                    got = attended(kernels, rows, held, at, None, torch.bfloat16)
                    exact = attended(REFERENCE, rows, held, at, None, torch.float32)
                    found = compared(got, exact, tolerance)
                    alone = attended(kernels, 1, held, at, None, torch.bfloat16)
                    if rows == 2 and not torch.equal(got[:1], alone):
                        return {**found, "ok": False, "why": "row 0 of 2 is not row 0 alone"}
                    return found

                yield f"attention dense {kind}, {rows} rows at {at}", dense

        def sparse(kind: str = kind) -> Result:
            held = make.latents(shape, shape.context, kind)
            at = shape.context - 2
            order = torch.rand(2, at, device=device).argsort(dim=-1)[:, : shape.topk]
            selected = order.sort(dim=-1).values.int()
            got = attended(kernels, 2, held, at, selected, torch.bfloat16)
            exact = attended(REFERENCE, 2, held, at, selected, torch.float32)
            return compared(got, exact, tolerance)

        yield f"attention to {shape.topk} of {shape.context}, {kind}", sparse

        def few(kind: str = kind) -> Result:
            """Fewer tokens than are selected: the bits of dense attention."""
            held, at = make.latents(shape, shape.topk, kind), shape.topk // 2
            selected = torch.full((1, shape.topk), -1, dtype=torch.int32, device=device)
            selected[0, : at + 1] = torch.arange(at + 1, device=device)
            got = attended(kernels, 1, held, at, selected, torch.bfloat16)
            return same(got, attended(kernels, 1, held, at, None, torch.bfloat16))

        yield f"attention to all of few, {kind}", few

    for value in (float("inf"), float("nan")):

        def strange(value: float = value) -> Result:
            held = make.latents(shape, shape.topk, "bf16")
            at = shape.topk - 3
            held[at // 2, 3] = value
            held[at + 1 :] = value  # nobody sees it
            got = attended(kernels, 1, held, at, None, torch.bfloat16)
            exact = attended(REFERENCE, 1, held, at, None, torch.float32)
            return compared(got, exact, tolerance)

        yield f"attention with {value} in the cache", strange

    def float32() -> Result:
        held = make.latents(shape, 64, "float32")
        got, exact = (
            attended(one, 2, held, 50, None, torch.float32) for one in (kernels, REFERENCE)
        )
        return compared(got, exact, 1e-5)

    yield "attention float32", float32


def indexer_checks(
    shape: Shape, device: torch.device, kernels: Kernels
) -> Iterator[tuple[str, Check]]:
    import torch

    from duck.kernels import indexer_triton
    from duck.kernels.device import REFERENCE
    from duck.kernels.reference.device import index_scores

    make = Random(device)
    cos, sin = make.tables(shape.context, shape.rope // 2)
    width = shape.index_width
    at = shape.context - 2
    position = make.position(at)

    def held_keys(one: Kernels, kind: str) -> Tensor:
        dtype, size = (torch.uint8, width + 4) if kind == "fp8" else (torch.float32, width)
        held = torch.zeros(shape.context, size, dtype=dtype, device=device)
        norm = 1 + make.numbers(width, seed=5) / 8, make.numbers(width, seed=6) / 8
        projected = make.rows(shape.context, width, seed=7)
        one.append_keys(projected, norm, 1e-6, cos, sin, make.position(0), held)
        return held

    def asked(one: Kernels, kind: str) -> tuple[Tensor, Tensor]:
        projected = make.rows(2, shape.index_heads, width, seed=8)
        x, proj = (
            make.rows(2, shape.hidden, seed=9),
            make.numbers(shape.index_heads, shape.hidden, seed=10),
        )
        scale = (shape.index_heads * width * shape.hidden) ** -0.5
        return one.index_queries(projected, x, proj, scale, cos, sin, position, fp8=kind == "fp8")

    for kind in ("fp8", "exact"):

        def keys(kind: str = kind) -> Result:
            got, expected = (numbers(held_keys(one, kind), width) for one in (kernels, REFERENCE))
            return compared(got, expected, 2e-3 if kind == "fp8" else 1e-5)

        def queries(kind: str = kind) -> Result:
            got, expected = (
                query.float() * weights[..., None]
                for query, weights in (asked(one, kind) for one in (kernels, REFERENCE))
            )
            return compared(got, expected, 2e-3 if kind == "fp8" else 1e-5)

        def scores(kind: str = kind) -> Result:
            query, weights = asked(kernels, kind)
            held = held_keys(kernels, kind)
            got = indexer_triton.scores(query, weights, held, position)
            exact = index_scores(query.float(), weights, numbers(held, width))
            return compared(got[:, : at + 1], exact[:, : at + 1], 1e-5)

        def selection(kind: str = kind) -> Result:
            """Of whole chains: the share of tokens that only one of both selects."""
            held = held_keys(REFERENCE, kind)
            got, expected = (
                one.select(*asked(one, kind), held, position, shape.topk)
                for one in (kernels, REFERENCE)
            )
            missed = [
                len(set(a) ^ set(b)) / 2 / shape.topk
                for a, b in zip(got.tolist(), expected.tolist(), strict=True)
            ]
            return {"error": max(missed), "tolerance": 2e-3, "ok": max(missed) <= 2e-3}

        yield f"index keys, {kind}", keys
        yield f"index queries, {kind}", queries
        yield f"index scores of {shape.context}, {kind}", scores
        yield f"selection of {shape.topk} of {shape.context}, {kind}", selection

    def ties() -> Result:
        """Of equal scores the lower positions: what a stable sort gives."""
        values = make.numbers(2, shape.context).mul_(4).round_()
        got = indexer_triton.largest(values, position, shape.topk)
        values[0, at + 1 :] = float("-inf")
        order = values.sort(dim=-1, descending=True, stable=True).indices[:, : shape.topk]
        return same(got, order.sort(dim=-1).values)

    yield f"selection among ties, {shape.topk} of {shape.context}", ties


def layer_check(shape: Shape, device: torch.device, kernels: Kernels) -> Result:
    """A whole layer, by the kernels and by the references."""
    from duck.kernels.device import REFERENCE

    layer = Layer(shape, device, kernels, capacity=shape.context, seed=3)
    layer.place(shape.context - 2, 2)
    x = Random(device, 4).rows(2, shape.hidden)
    partials = Random(device, 5).numbers(shape.ducks, 2, shape.hidden) / 10
    got = layer(x, partials)
    layer.kernels = REFERENCE
    return compared(got, layer(x, partials), 2e-2)


# random parts


class Random:
    """Makes tensors on a device, the same ones for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        import torch

        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def numbers(self, *size: int, seed: int | None = None) -> Tensor:
        """float32, normal."""
        import torch

        if seed is not None:
            self._generator.manual_seed(seed)
        return torch.randn(size, generator=self._generator, device=self.device)

    def rows(self, *size: int, seed: int | None = None) -> Tensor:
        """bfloat16, normal."""
        return self.numbers(*size, seed=seed).bfloat16()

    def fp8(self, out: int, width: int) -> Fp8Matrix:
        """A matrix as published, that keeps the size of what it is multiplied with."""
        import torch

        from duck.kernels.matrix import Fp8Matrix

        codes = torch.empty(out, width, dtype=torch.float8_e4m3fn, device=self.device)
        for start in range(0, out, 4096):  # float32 of a part at a time
            stop = min(out, start + 4096)
            codes[start:stop] = (
                (self.numbers(stop - start, width) * 60).clamp_(-448, 448).to(torch.float8_e4m3fn)
            )
        edge = 128
        scales = torch.exp2(self.numbers(-(-out // edge), -(-width // edge)) / 2)
        return Fp8Matrix(codes, scales / 60 * width**-0.5, (edge, edge))

    def position(self, number: int) -> Tensor:
        import torch

        return torch.full((1,), number, dtype=torch.int32, device=self.device)

    def tables(self, positions: int, pairs: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, without YaRN."""
        import torch

        speeds = 10_000.0 ** -(torch.arange(pairs, device=self.device) / pairs)
        angles = torch.arange(positions, device=self.device)[:, None] * speeds
        return angles.cos(), angles.sin()

    def latents(self, shape: Shape, capacity: int, kind: str, *, zero: bool = False) -> Tensor:
        """A layer's cache of bf16, fp8 or float32."""
        import torch

        from duck.kernels.reference.device import pack_fp8

        width = shape.rank + shape.rope
        rows = torch.zeros(capacity, width, device=self.device)
        for start in range(0, 0 if zero else capacity, 8192):
            rows[start : start + 8192] = self.numbers(min(8192, capacity - start), width)
        if kind == "fp8":
            return pack_fp8(rows, shape.rank)
        return rows if kind == "float32" else rows.bfloat16()

    def index_keys(self, shape: Shape, capacity: int) -> Tensor:
        """A layer's cache of index keys, fp8."""
        import torch

        from duck.kernels.reference.device import pack_fp8

        width = shape.index_width
        held = torch.empty(capacity, width + 4, dtype=torch.uint8, device=self.device)
        for start in range(0, capacity, 8192):
            part = self.numbers(min(8192, capacity - start), width)
            held[start : start + 8192] = pack_fp8(part, width)
        return held


def numbers(held: Tensor, coded: int) -> Tensor:
    """A cache's numbers, float32."""
    import torch

    from duck.kernels.reference.device import unpack_fp8

    return unpack_fp8(held, coded, torch.float32) if held.dtype == torch.uint8 else held.float()


class Layer:
    """One decoder layer of random weights: all but its routed experts."""

    def __init__(
        self, shape: Shape, device: torch.device, kernels: Kernels, *, capacity: int, seed: int = 0
    ) -> None:
        from duck.kernels.reference.router import Rule

        make = Random(device, seed)
        self.kernels, self._shape, self._make = kernels, shape, make
        self._fp8 = {name: make.fp8(*size) for name, size in shape.matrices().items()}
        self._wk = make.rows(shape.heads, shape.nope, shape.rank) * shape.nope**-0.5
        self._wv = make.rows(shape.heads, shape.value, shape.rank) * shape.rank**-0.5
        self._norms = [
            1 + make.numbers(width) / 8
            for width in (shape.hidden, shape.rank, shape.q_rank, shape.hidden)
        ]
        width = shape.index_width
        self._index_norm = 1 + make.numbers(width) / 8, make.numbers(width) / 8
        self._proj = make.numbers(shape.index_heads, shape.hidden) * shape.hidden**-0.5
        self._gate = make.numbers(shape.experts, shape.hidden) * 1.5 * shape.hidden**-0.5
        self._bias = make.numbers(shape.experts) / 10
        self._rule = Rule(
            count=shape.chosen, groups=shape.groups, kept=shape.kept, sigmoid=True, pairs=True,
            normalise=True, scale=2.5,
        )  # fmt: skip
        self._held = make.latents(shape, capacity, "fp8")
        self._held_keys = make.index_keys(shape, capacity)
        self.turns = make.tables(capacity, shape.rope // 2)
        self.sparse = True
        self.place(0, 1)

    def place(self, position: int, rows: int) -> None:
        """Where the rows of the next calls are."""
        self._position, self._seen = self._make.position(position), position + rows

    def __call__(self, x: Tensor, partials: Tensor) -> Tensor:
        """From the layer's input (T, hidden) and the ducks' partial sums to its output."""
        k, shape, position, eps = self.kernels, self._shape, self._position, 1e-6
        rows, width = len(x), shape.index_width
        h = k.rms_norm(x, self._norms[0], eps)
        kv = k.linear(h, self._fp8["kv_a"])
        k.append_latents(kv, self._norms[1], eps, *self.turns, self._held, position)
        q_latent = k.rms_norm(k.linear(h, self._fp8["q_a"]), self._norms[2], eps)
        q = k.linear(q_latent, self._fp8["q_b"]).view(rows, shape.heads, -1)
        q_nope = q[..., : shape.nope]
        q_pe = k.rotate_at(q[..., shape.nope :], *self.turns, position)
        selected = None
        if self.sparse:
            key = k.linear(h, self._fp8["index wk"])
            k.append_keys(key, self._index_norm, eps, *self.turns, position, self._held_keys)
            asked = k.linear(q_latent, self._fp8["index wq_b"]).view(rows, -1, width)
            scale = (shape.index_heads * width) ** -0.5
            query, weights = k.index_queries(
                asked, h, self._proj, scale, *self.turns, position, fp8=True
            )
            selected = k.select(query, weights, self._held_keys, position, shape.topk)
        out = k.attend(
            q_nope, q_pe, self._held, self._wk, self._wv, shape.scale, position, selected
        )
        change = k.linear_f32(out.flatten(1), self._fp8["o"])
        x, h = k.add_norm(x, change, self._norms[3], eps)
        k.route(h, self._gate, self._bias, self._rule)
        shared = k.swiglu_f32(h, (self._fp8["shared gate, up"],), self._fp8["shared down"])
        return k.combine(x, partials, shared)

    def nbytes(self, rows: int) -> int:
        """That a call reads at least: weights once, the cache as attention is dense or sparse."""
        used = [name for name in self._fp8 if self.sparse or not name.startswith("index")]
        total = sum(self._fp8[name].nbytes for name in used)
        total += self._wk.nbytes + self._wv.nbytes + self._gate.nbytes
        latent = self._held.shape[1]
        if not self.sparse:
            return total + self._seen * latent
        total += self._proj.nbytes + rows * min(self._seen, self._shape.topk) * latent
        if self._seen > self._shape.topk:
            total += self._seen * self._held_keys.shape[1]
        return total

    def held_nbytes(self) -> int:
        """On the device."""
        plain = (self._wk, self._wv, self._gate, self._proj, self._held, self._held_keys)
        return sum(part.nbytes for part in (*self._fp8.values(), *plain, *self.turns))


# times


def microseconds(work: Callable[[], object], times: int) -> float:
    """Of one call, the median of `times`, by events on the device."""
    import torch

    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def captured(calls: Sequence[Callable[[], object]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, after each has run once: that compiles the kernels."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    graph.replay()
    return graph


def copy_rate(device: torch.device) -> float:
    """GB/s read and written by copying 1 GiB within the device's memory."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source), 15) / 1e3


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many of them are four times what the L2 cache holds; 2 at least, 64 at most."""
    import torch

    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-4 * cache // nbytes)))


def timed(
    calls: Sequence[Callable[[], object]], nbytes: int, copy_gbs: float, target: float | None = None
) -> Result:
    """Calls that read `nbytes` each, in one graph. target: the share of the copy that is wanted."""
    graph = captured(calls)
    each = microseconds(graph.replay, 15) / len(calls)
    gbs = nbytes / each / 1e3
    share = gbs / copy_gbs
    met = None if target is None else share >= target
    return {"us": each, "mib": nbytes / 2**20, "gbs": gbs, "share": share, "met": met}


def timings(
    shape: Shape, device: torch.device, kernels: Kernels, copy_gbs: float
) -> Iterator[tuple[str, Check]]:
    """Each kernel alone."""
    import torch

    from duck.kernels import attention_triton, indexer_triton

    make = Random(device)
    for rows in (1, 2):
        for name, size in shape.matrices().items():

            def product(size: tuple[int, int] = size, rows: int = rows) -> Result:
                nbytes = size[0] * size[1]
                weights = [make.fp8(*size) for _ in range(copies_of(nbytes, device))]
                x = make.rows(rows, size[1])
                calls = [lambda w=w: kernels.linear(x, w) for w in weights]  # type: ignore[misc]
                target = 0.7 if nbytes >= 32 << 20 else None
                return timed(calls, weights[0].nbytes, copy_gbs, target)

            yield f"fp8 linear {name}, {rows} rows", product

        for name, size in (
            ("fold", (shape.rank, shape.nope)),
            ("unfold", (shape.value, shape.rank)),
        ):

            def folded(size: tuple[int, int] = size, rows: int = rows, name: str = name) -> Result:
                out, width = size
                nbytes = 2 * shape.heads * out * width
                weights = [
                    make.rows(shape.heads, *(size if name == "unfold" else size[::-1]))
                    for _ in range(copies_of(nbytes, device))
                ]
                if name == "fold":
                    weights = [weight.transpose(1, 2) for weight in weights]
                x = make.rows(rows, shape.heads, width)
                call = attention_triton.heads_linear
                calls = [lambda w=w: call(x, w) for w in weights]  # type: ignore[misc]
                return timed(calls, nbytes, copy_gbs)

            yield f"{name} wk or wv, {rows} rows", folded

        for kind in ("bf16", "fp8"):
            for context, sparse in (
                (2048, False),
                (16_384, False),
                (65_536, False),
                (65_536, True),
            ):

                def attended(
                    rows: int = rows,
                    kind: str = kind,
                    context: int = context,
                    sparse: bool = sparse,
                ) -> Result:
                    held = make.latents(shape, context, kind)
                    seen = rows * shape.topk if sparse else context
                    nbytes = seen * held.shape[1] * held.element_size()
                    count = min(16, copies_of(nbytes, device))
                    caches = [held, *(held.clone() for _ in range(count - 1))]
                    query = make.rows(rows, shape.heads, shape.rank)
                    query_pe = make.rows(rows, shape.heads, shape.rope)
                    position = make.position(context - rows)
                    selected = None
                    if sparse:
                        order = torch.rand(rows, context - rows, device=device).argsort(dim=-1)
                        selected = order[:, : shape.topk].sort(dim=-1).values.int()
                    calls = [
                        lambda c=c: attention_triton.attend_latents(  # type: ignore[misc]
                            query, query_pe, c, shape.scale, position, selected
                        )
                        for c in caches
                    ]
                    return timed(calls, nbytes, copy_gbs, 0.7)

                what = f"{shape.topk} of {context}" if sparse else f"{context} dense"
                yield f"attention {kind} to {what}, {rows} rows", attended

        for context in (16_384, 65_536):

            def scored(rows: int = rows, context: int = context) -> Result:
                held = make.index_keys(shape, context)
                caches = [held.clone() for _ in range(min(16, copies_of(held.nbytes, device)))]
                query = make.rows(rows, shape.index_heads, shape.index_width)
                weights, position = (
                    make.numbers(rows, shape.index_heads),
                    make.position(context - rows),
                )
                calls = [
                    lambda c=c: indexer_triton.scores(query, weights, c, position)  # type: ignore[misc]
                    for c in caches
                ]
                return timed(calls, held.nbytes, copy_gbs)

            def picked(rows: int = rows, context: int = context) -> Result:
                values, position = make.numbers(rows, context), make.position(context - rows)
                calls = [lambda: indexer_triton.largest(values, position, shape.topk)] * 8
                return timed(calls, 5 * values.nbytes, copy_gbs)

            yield f"index scores of {context}, {rows} rows", scored
            yield f"the highest {shape.topk} of {context}, {rows} rows", picked


def whole_model(
    shape: Shape, device: torch.device, kernels: Kernels, layers: int, result: Result
) -> Iterator[tuple[str, Check]]:
    """The attention side, layer after layer, at several lengths: eager and as CUDA graphs."""
    import torch

    capacity = max(shape.contexts)
    stack = [Layer(shape, device, kernels, capacity=capacity)]
    # Beside the layers: scratch, and the graphs' memory.
    fitting = 1 + int((torch.cuda.mem_get_info(device)[0] - (2 << 30)) / stack[0].held_nbytes())
    if fitting < layers:
        result["skipped"].append(f"layers: {layers - fitting} of {layers}, which do not fit")
    for number in range(1, min(layers, fitting)):
        stack.append(Layer(shape, device, kernels, capacity=capacity, seed=number))
        stack[-1].turns = stack[0].turns
    for rows in (1, 2):
        for context in shape.contexts:
            for sparse in (False, True):
                if sparse or context <= shape.topk:
                    name = f"{rows} rows, {context} tokens, {'sparse' if sparse else 'dense'}"

                    def work(
                        rows: int = rows, context: int = context, sparse: bool = sparse
                    ) -> Result:
                        return stack_times(stack, rows, context, sparse, result["copy_gbs"])

                    yield name, work


def stack_times(
    stack: Sequence[Layer], rows: int, context: int, sparse: bool, copy_gbs: float
) -> Result:
    """Microseconds a layer of all of them in order, and what the memory's rate allows."""
    import torch

    shape, make = REAL, Random(torch.device("cuda"), 7)
    start = make.rows(rows, shape.hidden)
    partials = make.numbers(shape.ducks, rows, shape.hidden) / 10
    for layer in stack:
        layer.sparse = sparse
        layer.place(context - rows, rows)

    def eager() -> None:
        x = start
        for layer in stack:
            x = layer(x, partials)

    eager()
    launches = launches_of(lambda: stack[0](start, partials))
    eager_us = microseconds(eager, 5) / len(stack)

    graphs: list[torch.cuda.CUDAGraph] = []
    inputs = [start]
    for layer in stack:
        kept: list[Tensor] = []
        pool = graphs[0].pool() if graphs else None
        graphs.append(captured([lambda la=layer, k=kept: k.append(la(inputs[-1], partials))], pool))  # type: ignore[misc]
        inputs.append(kept[-1])  # the one that replays write

    def replay() -> None:
        for graph in graphs:
            graph.replay()

    replay()
    graph_us = microseconds(replay, 15) / len(stack)
    bound = stack[0].nbytes(rows) / copy_gbs / 1e3
    return {
        "rows": rows, "context": context, "sparse": sparse, "layers": len(stack),
        "eager_us": eager_us, "graph_us": graph_us, "bound_us": bound,
        "share": bound / graph_us, "launches": launches,
        "met": graph_us <= 2 * bound + 2 * launches,
    }  # fmt: skip


def launches_of(work: Callable[[], object]) -> int:
    """Kernels and copies that the device runs for it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in profiler.events())


# the report


def report(result: Result) -> str:
    """The tables, as text."""
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}"]
    if result["checks"]:
        wrong = [check for check in result["checks"] if not check["ok"]]
        right = len(result["checks"]) - len(wrong)
        lines += [
            "",
            f"correct: {right} of {len(result['checks'])} checks at {result['shape']}'s shapes",
        ]
        for check in result["checks"]:
            error = "-" if check["error"] is None else f"{check['error']:.1e}"
            mark = "ok" if check["ok"] else f"WRONG {check.get('why', '')}".rstrip()
            lines.append(f"  {check['name']:<48} {error:>8} of {check['tolerance']:.0e}  {mark}")
    if "copy_gbs" in result:
        lines += ["", f"copying memory: {result['copy_gbs']:.0f} GB/s, read and written"]
    if result["kernels"]:
        lines += ["", f"  {'kernel':<48} {'MiB':>7} {'us':>8} {'GB/s':>6}  share of the copy"]
        for row in result["kernels"]:
            lines.append(
                f"  {row['name']:<48} {row['mib']:>7.1f} {row['us']:>8.1f} {row['gbs']:>6.0f} "
                f"{row['share']:>5.0%}{_met(row['met'], ' (70 %)')}"
            )
    if result["layers"]:
        count = result["layers"][0]["layers"]
        lines += [
            "",
            f"us a layer, of {count} layers in order",
            f"  {'rows, context':<34} {'eager':>8} {'graphs':>8} {'bound':>7} {'share':>6} launches",
        ]
        for row in result["layers"]:
            lines.append(
                f"  {row['name']:<34} {row['eager_us']:>8.1f} {row['graph_us']:>8.1f} "
                f"{row['bound_us']:>7.1f} {row['share']:>6.0%} {row['launches']:>8}"
                f"{_met(row['met'], ' (2 bounds + 2 us a launch)')}"
            )
    lines += [f"left out: {name}" for name in result["skipped"]]
    if "seconds" in result:
        lines += ["", f"{result['seconds']} s"]
    return "\n".join(lines)


def _met(met: bool | None, target: str) -> str:
    """How a number stands to what is wanted of it."""
    return "" if met is None else (" met" if met else " MISSED") + target


if __name__ == "__main__":
    sys.exit(main())
