"""`duck bench generate`: one duck's true share of a real model's layers, measured end to end.

Real are the widths, the router, the wire's bytes, the socket, the duck's process and its kernel;
the weights are random. One duck of 32 holds 1/32 of every expert, so a few layers fit a small
machine, and since every layer is alike a few are enough: the stages measured here make the step of
the whole model, by the same simulation that the pipeline is held to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from duck import memory, wire
from duck.device import Device, limit_threads, switching_fast
from duck.emulate import EmulatedDevice
from duck.flock import Flock
from duck.kernels.device import REFERENCE
from duck.meter import Meter
from duck.model.cache import KVCache
from duck.model.config import ModelConfig, Rope, Yarn
from duck.model.holding import Holding
from duck.model.layers import Loader
from duck.model.router import Routed
from duck.model.tally import Tally
from duck.model.tensors import Kind, wanted
from duck.model.transformer import DecoderLayer, Transformer
from duck.pipeline import Pipeline
from duck.placement import Plan
from duck.plan.closed import ORIGINAL, Times
from duck.plan.simulate import simulate
from duck.recording import recording_of
from duck.sampling import Sampling
from duck.session import Session
from duck.summary import Summary, measured_times, summarize
from duck.synthetic import random_duck, transport_to
from duck.trace import Trace
from duck.walk import Layer

SCHEDULES = ("serial", "batch", "wave")
VOCABULARY = 4096  # of 129280: the head is not what is measured here
_KV = "model.layers.{}.self_attn.kv_b_proj.weight"
ORIGINAL_MS = 122.3  # a step of the published run: 15.301 tokens a second, 1.871 a step


def v32(layers: int) -> ModelConfig:
    """DeepSeek-V3.2's shape with so many layers, all with routed experts; the last one drafts."""
    return ModelConfig(
        model_type="deepseek_v32", vocab_size=VOCABULARY, hidden_size=7168, intermediate_size=18432,
        moe_intermediate_size=2048, num_hidden_layers=layers - 1, num_nextn_predict_layers=1,
        num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=0, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True,
        routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
        rms_norm_eps=1e-6, rope=Rope(10000.0, Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),
        max_position_embeddings=163840, tie_word_embeddings=False, index_topk=2048,
        index_n_heads=64, index_head_dim=128, indexer_rope_interleave=False,
        weight_block_size=(128, 128), bos_token_id=0, eos_token_ids=(1,),
    )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was measured, and what it makes of the whole model."""

    layers: int
    of_ducks: int  # this one duck holds one part of so many
    resident_bytes: int
    measured: dict[str, Summary]  # by schedule
    times: Times  # of one layer's stages here, and of the rest as the original has it
    predicted_ms: dict[str, float]  # by schedule: a step of 61 layers on so many such ducks
    original_ms: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_generate(
    *,
    layers: int = 8,
    of_ducks: int = 32,
    attend_ms: float | None = None,
    shared_ms: float = ORIGINAL.shared,
    steps: int = 20,
    threads: int = 0,
    schedules: Sequence[str] = SCHEDULES,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run steps with drafts through a few layers.

    Args:
        layers: with routed experts, the drafting one included.
        of_ducks: the duck holds 2048 / of_ducks columns of every expert.
        attend_ms: attention and shared expert take given times, as on some GPU; None: they are
            computed here, one layer's weights standing for all.
        shared_ms: with attend_ms, the shared expert.
        steps: that are timed, after two that are not.
        threads: of the duck's kernel; 0: one for each processor.
        schedules: each is run, on the same duck.
        note: called with what is at work.

    Raises:
        ConfigError: memory has no room for it.
        TransportError: the duck did not start, or was lost.
    """
    config = v32(layers)
    limit_threads()
    paced = attend_ms is not None
    given = None if attend_ms is None else _given(attend_ms, shared_ms)
    columns = config.moe_intermediate_size // of_ducks
    plan = Plan(
        model="random", layers=config.moe_layers, experts=config.n_routed_experts,
        columns=columns, slices=(range(columns),),
        shape=wire.Shape(config.hidden_size, config.num_experts_per_tok, "bfloat16", "bfloat16", 4),
    )  # fmt: skip
    arena = layers * config.n_routed_experts * 3 * config.hidden_size * plan.columns
    memory.check_fits(arena + _host_bytes(config, paced=paced), local=1)
    note("random weights of the host")
    with torch.inference_mode():
        model = RandomModel(config, paced=paced)
    runs = {}
    with random_duck(threads) as address:
        for schedule in schedules:
            note(f"{schedule}: {steps} steps of {layers} layers")
            run = _Run(model, plan, address, schedule, given, steps)
            with switching_fast():
                asyncio.run(run.go())
            runs[schedule] = run
    times = _times(list(runs.values()), given)
    return Report(
        layers=layers,
        of_ducks=of_ducks,
        resident_bytes=next(iter(runs.values())).resident_bytes,
        measured={schedule: run.summary for schedule, run in runs.items()},
        times=times,
        predicted_ms={name: simulate(times, name).step_ms for name in SCHEDULES},
        original_ms=ORIGINAL_MS,
    )


def _given(attend_ms: float, shared_ms: float) -> Times:
    """Attention and shared expert as told; the rest of a step as long as it takes."""
    return Times(
        attend=attend_ms, shared=shared_ms, expert=0.0, dense=0.0, head=0.0, combine=0.0, host=0.0
    )


def shapes_without_experts(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a host loads for short sessions."""
    return {want.name: want.shape for want in wanted(config, experts=False)}


def _host_bytes(config: ModelConfig, *, paced: bool) -> int:
    """About what the host's weights take: one layer's and all routers', or those alone."""
    routers = (config.num_hidden_layers + 1) * config.n_routed_experts * config.hidden_size
    sizes = shapes_without_experts(config)
    # Every layer rearranges the keys' and values' matrix into one of its own.
    own = (config.num_hidden_layers + 1) * _numbers(sizes[_KV.format(0)])
    first = sum(_numbers(shape) for name, shape in sizes.items() if ".layers.0." in name)
    rest = 2 * config.hidden_size**2 + 2 * config.vocab_size * config.hidden_size
    return 4 * (routers + own if paced else routers + own + first + rest)


def _numbers(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _times(runs: Sequence[_Run], given: Times | None) -> Times:
    """One layer's stages as measured over all runs; what is not in them as the original has it."""
    device, asks = [], []
    for run in runs:
        recording = recording_of(run.trace)
        steps = sorted(recording.on("loop", "step"), key=lambda span: span.start)
        begun = steps[run.skipped].start
        device += [span for span in recording.on("device") if span.start >= begun]
        asks += [ask for ask in recording.asks if ask.start >= begun]
    found, _ = measured_times(device, asks)
    assert found is not None, "every schedule here attends and asks"
    device_times = given or found
    # Of the wire this machine shows what is fixed: its rows travel through memory. Rows take the
    # original's Ethernet.
    return replace(
        ORIGINAL,
        attend=device_times.attend,
        second_row=device_times.second_row,
        shared=device_times.shared,
        expert=found.expert,
        common=found.common,
        out_fixed=found.out_fixed,
        back_fixed=found.back_fixed,
    )


class _Run:
    """One schedule."""

    skipped = 2  # steps, while caches and threads warm up

    def __init__(
        self,
        model: RandomModel,
        plan: Plan,
        address: str,
        schedule: str,
        given: Times | None,
        steps: int,
    ) -> None:
        self._model, self._plan, self._address = model, plan, address
        self._schedule, self._given, self._steps = schedule, given, steps
        self.resident_bytes = 0
        self.trace = Trace(("duck 0",))
        self.trace.about(expert_bytes=[3 * plan.shape.hidden * plan.columns])
        self.summary: Summary

    async def go(self) -> None:
        transport = transport_to(self._address)
        flock = Flock(transport, self._plan)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(flock.close)
            if self._given is None:
                device = Device("cpu", "float32")
            else:
                device = EmulatedDevice(self._given, 1.0)
            stack.callback(device.close)
            await flock.start()
            self.resident_bytes = int(transport.attached[0].get("resident_bytes", 0))
            pipeline = Pipeline(
                self._model, device, flock,
                schedule=self._schedule, draft="mtp", early="off", trace=self.trace,
            )  # fmt: skip
            meter, most = Meter(), 2 * (self._steps + self.skipped) + 2
            decode = pipeline.decode(self._model.session(), Sampling(), most, meter)
            async with aclosing(decode):
                async for _ in decode:
                    if meter.steps >= self._steps + self.skipped:
                        break
        recording = recording_of(self.trace)
        steps = sorted(recording.on("loop", "step"), key=lambda span: span.start)
        warm = steps[self.skipped].start
        recording.spans = [span for span in recording.spans if span.start >= warm]
        recording.asks = [ask for ask in recording.asks if ask.start >= warm]
        self.summary = summarize(recording)


class RandomModel:
    """A `pipeline.Model` of random weights; every row enters as other noise, so experts vary.

    paced: attention and shared experts are not computed.
    """

    def __init__(self, config: ModelConfig, *, paced: bool) -> None:
        self._rng = torch.Generator().manual_seed(1)
        self._hidden, self._paced = config.hidden_size, paced
        # Short sessions, as the original's: no indexer.
        holding = Holding.choose(config, dtype="float32", max_len=config.index_topk)
        inner = Transformer(RandomLoader(config, virtual=paced), config, holding)
        assert inner.mtp is not None
        self._inner, self._mtp = inner, inner.mtp
        self.layers = [self._layer(layer) for layer in inner.layers]
        self.mtp = _RandomMtp(self, self._layer(inner.mtp.layer))

    def _layer(self, layer: DecoderLayer) -> Layer:
        return _Paced(layer) if self._paced else layer

    def session(self) -> Session:
        """As if a prompt of one token had been run."""
        session = Session(self._inner, 128, pairs=True)
        session.tokens, session.length = [1], 1
        session.hidden = [self.embed([1])]
        return session

    def embed(self, tokens: Sequence[int]) -> Tensor:
        return torch.randn(len(tokens), self._hidden, generator=self._rng)

    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor:
        """The drafting layer's input."""
        return self.embed(tokens) if self._paced else self._mtp.combine(tokens, h)

    def final(self, x: Tensor) -> Tensor:
        return self._inner.final(x)

    def logits(self, h: Tensor) -> Tensor:
        return torch.zeros(len(h), VOCABULARY) if self._paced else self._inner.logits(h)


@dataclass(frozen=True)
class _RandomMtp:
    """The drafting layer of a RandomModel."""

    model: RandomModel
    layer: Layer

    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor:
        return self.model.combine(tokens, h)

    def final(self, x: Tensor) -> Tensor:
        return self.model.final(x)


@dataclass(frozen=True)
class _Paced:
    """A layer whose attention and shared expert take their time elsewhere; the router is real."""

    real: DecoderLayer

    @property
    def index(self) -> int:
        return self.real.index

    @property
    def is_moe(self) -> bool:
        return self.real.is_moe

    def attend(
        self, x: Tensor, cache: KVCache, position: int, *, last: int | None = None
    ) -> Tensor:
        return x if last is None else x[len(x) - last :]

    def dense(self, x: Tensor) -> Tensor:
        raise AssertionError("every layer here has routed experts")

    def route(self, x: Tensor) -> Routed:
        return self.real.route(x)

    def shared(self, h: Tensor) -> Tensor:
        return torch.zeros_like(h)

    def merge(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        return self.real.merge(x, shared, routed)


class RandomLoader(Loader):
    """Gives parameters of the right shapes that were never trained.

    All layers share the large matrices of one: they are read from memory all the same, being far
    larger than caches. Routers are each layer's own.

    virtual: the large matrices are one number each, for layers that do not use them.
    """

    def __init__(self, config: ModelConfig, *, virtual: bool) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.kernels, self._fp8_kept = REFERENCE, False
        self.tally = Tally()
        self._shapes, self._virtual = shapes_without_experts(config), virtual
        self._made: dict[str, Tensor] = {}
        self._rng = torch.Generator().manual_seed(0)

    def _tensor(self, kind: Kind, name: str, dtype: torch.dtype) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        if name.endswith("mlp.gate.weight"):
            return self._random(shape)
        if self._virtual:
            return torch.zeros(()).expand(shape)
        part = name.split(".", 3)[-1] if name.startswith("model.layers.") else name
        if part not in self._made:
            self._made[part] = self._random(shape)
        return self._made[part]

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape)
        return made.normal_(0, shape[-1] ** -0.5, generator=self._rng)


def tables(report: Report) -> list[Table]:
    """The report for people."""
    stages = _table("schedule", "step ms", "attend", "shared", "duck", "queue", "way", "GB/s")
    for schedule, summary in report.measured.items():
        parts = {part.name: part.median_ms for part in summary.parts}
        [duck] = summary.ducks
        stages.add_row(
            schedule, f"{summary.step_ms or 0.0:.2f}", f"{parts['attend']:.3f}",
            f"{parts['shared']:.3f}", f"{duck.compute_ms:.3f}", f"{duck.queue_ms:.3f}",
            f"{duck.way_ms:.3f}", f"{duck.gb_s or 0:.1f}",
        )  # fmt: skip
    whole = _table("61 layers", "step ms", "tok/s", "original")
    for schedule, step_ms in report.predicted_ms.items():
        tok_s = report.times.tokens(draft=True) / step_ms * 1e3
        whole.add_row(schedule, f"{step_ms:.1f}", f"{tok_s:.1f}", f"{report.original_ms:.1f}")
    return [stages, whole]


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
