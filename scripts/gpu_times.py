"""How fast the kernels are: each alone, and the attention side of a whole model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gpu_parts import Layer, Random, Shape
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from duck.kernels import attention_triton, indexer_triton
from duck.kernels.device import Kernels

Result = dict[str, Any]
Check = Callable[[], Result]


def microseconds(work: Callable[[], object], times: int) -> float:
    """Of one call, the median of `times`, by events on the device."""
    found: list[float] = []
    for _ in range(times):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return statistics.median(found)


def captured(calls: Sequence[Callable[[], object]], pool: Any = None) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, after each has run once: that compiles the kernels."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source), 15) / 1e3


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many of them are four times what the L2 cache holds; 2 at least, 64 at most."""
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
    make = Random(device)
    for rows in (1, 2):
        for name, size in shape.matrices().items():

            def product(size: tuple[int, int] = size, rows: int = rows) -> Result:
                nbytes = size[0] * size[1]
                weights = [make.fp8(*size) for _ in range(copies_of(nbytes, device))]
                x = make.rows(rows, size[1])
                calls = [lambda w=w: kernels.linear(x, w) for w in weights]
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
                calls = [lambda w=w: call(x, w) for w in weights]
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
                        lambda c=c: attention_triton.attend_latents(
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
                    lambda c=c: indexer_triton.scores(query, weights, c, position) for c in caches
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
                        return stack_times(shape, stack, rows, context, sparse, result["copy_gbs"])

                    yield name, work


def stack_times(
    shape: Shape, stack: Sequence[Layer], rows: int, context: int, sparse: bool, copy_gbs: float
) -> Result:
    """Microseconds a layer of all of them in order, and what the memory's rate allows."""
    make = Random(torch.device("cuda"), 7)
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

        def call(layer: Layer = layer, kept: list[Tensor] = kept) -> None:
            kept.append(layer(inputs[-1], partials))

        graphs.append(captured([call], graphs[0].pool() if graphs else None))
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
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profiler.events() or ())
