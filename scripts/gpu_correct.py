"""Whether every kernel is right: each beside its reference, at a model's widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_parts import Layer, Random, Shape, numbers
from gpu_whole import whole_check
from torch import Tensor

from duck.kernels import indexer_triton
from duck.kernels.device import REFERENCE, Kernels
from duck.kernels.reference.device import index_scores
from duck.kernels.reference.router import Rule

Result = dict[str, Any]
Check = Callable[[], Result]


def compared(got: Tensor, expected: Tensor, tolerance: float) -> Result:
    """Where numbers are not finite they must be the same kind; the rest agrees as a whole."""
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
    yield "a small model by graphs, and without", lambda: whole_check(shape, device, kernels)


def linear_checks(
    shape: Shape, device: torch.device, kernels: Kernels
) -> Iterator[tuple[str, Check]]:
    make = Random(device)
    for name, size in shape.matrices().items():

        def check(size: tuple[int, int] = size) -> Result:
            weight = make.fp8(*size)
            x = make.rows(max(shape.rows), size[1])
            expected = x.double() @ weight.dequantised().double().T
            worst: Result = {"error": -1.0, "tolerance": 5e-5, "ok": True}
            for rows in shape.rows:
                got = kernels.linear_f32(x[:rows], weight)
                found = compared(got, expected[:rows], 5e-5)
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

    def project() -> Result:
        inner = make.rows(2, shape.heads * shape.value)
        matrix = make.fp8(shape.hidden, shape.heads * shape.value)
        got, expected = (
            one.project_add_norm(x, inner, matrix, weight, 1e-6) for one in (kernels, REFERENCE)
        )
        first = compared(got[0], expected[0], 2e-3)
        return compared(got[1], expected[1], 2e-3) if first["ok"] else first

    yield "norm", rms_norm
    yield "residual and norm", add_norm
    yield "projection, residual and norm", project

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
            return compared(written[0], written[1], 5e-3)

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
            return compared(got[:, : at + 1], exact[:, : at + 1], 5e-5)

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
    layer = Layer(shape, device, kernels, capacity=shape.context, seed=3)
    layer.place(shape.context - 2, 2)
    x = Random(device, 4).rows(2, shape.hidden)
    partials = Random(device, 5).numbers(shape.ducks, 2, shape.hidden) / 10
    got = layer(x, partials)
    layer.kernels = REFERENCE
    return compared(got, layer(x, partials), 2e-2)
