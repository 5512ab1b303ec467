"""The Engine wires everything: a loaded model, its device, its flock. The only object a script
needs.

async with duck.Engine.open("path", ducks="local:4") as engine:
    async for piece in engine.stream("Is 391 prime?", duck.Sampling(max_tokens=64)):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import structlog
import torch

from duck import log, memory, placement, wire
from duck.budget import Budget, plan_memory
from duck.config import Ducks, Options, model_folder
from duck.device import CLOSED, Device, Later, Stage, limit_threads, now, switching_fast
from duck.errors import ConfigError, DuckError, TransportClosed
from duck.flock import Flock
from duck.kernels import library
from duck.kernels.device import pick
from duck.keys import ClusterKey
from duck.local import LocalDucks, threads_each
from duck.memory_trace import MemoryTrace
from duck.meter import Meter, Totals, shares
from duck.model.config import ModelConfig
from duck.model.tokenizer import StopScanner, TextStream
from duck.model.transformer import Transformer
from duck.model.weights import Checkpoint, experts_digest
from duck.node import Kernel, Node
from duck.pipeline import PREFILL_ROWS, Pipeline
from duck.placement import Plan
from duck.prompts import Prompt, Prompts
from duck.report import DuckLoad, LoadReport
from duck.sampling import Sampling, TokenLogprobs
from duck.session import Session
from duck.slices import ModelSource, choose_resident, layer_stream, slice_of
from duck.trace import OFF, Trace
from duck.transports import shm
from duck.transports.base import Pin, Transport
from duck.transports.control import FlockTransport
from duck.transports.loopback import LoopbackTransport
from duck.transports.planes import host_plane
from duck.walk import Walks

if TYPE_CHECKING:
    from duck.transports.tls import Credentials

Loaded = TypeVar("Loaded")

# called with (what is being loaded, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: text may be empty while a character or a stop text is incomplete."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" or "length" on the last piece
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, when asked for
    stats: dict[str, Any] = field(default_factory=dict)  # on the last piece


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: dict[str, Any]
    logprobs: list[TokenLogprobs]


class Engine:
    """A loaded model with its flock; made by `Engine.open`."""

    def __init__(
        self,
        prompts: Prompts,
        model: Transformer,
        pipeline: Pipeline,
        plan: Plan,
        transport: str,
        load: LoadReport,
        trace: Trace,
        note: Callable[..., Awaitable[None]],
    ) -> None:
        self.prompts, self.config, self.tokenizer = prompts, prompts.config, prompts.tokenizer
        self.plan, self.transport, self.load = plan, transport, load
        self.trace = trace  # what is recorded; its `on` may be changed between two steps
        self._model, self._pipeline, self._note = model, pipeline, note

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: str | Path,
        *,
        progress: Progress | None = None,
        planned: Callable[[Budget], None] | None = None,
        **options: Any,
    ) -> AsyncIterator[Engine]:
        """Load a model folder ("demo": the shipped one) and gather its flock.

        planned: called once, before anything large is loaded, with what memory is for.
        options: as on the command line: ducks, transport, placement, schedule, draft, early,
        device, dtype, kv, indexer, max_len, graphs, answers, experts, key_file, trace,
        memory_trace.

        Raises:
            ConfigError, WeightsError: the folder or an option cannot be used.
            TransportError, WireError: a duck cannot be reached or refuses.
        """
        try:
            chosen = Options(**options)
        except TypeError as error:
            raise ConfigError(
                str(error).replace("Options.__init__() got an", "Engine.open:")
            ) from None
        folder = model_folder(path)
        prompts = Prompts(folder, chosen.max_len)
        config = prompts.config
        if not config.moe_layers:
            raise ConfigError(
                f"{folder}: no layer has routed experts; duck runs mixtures of experts"
            )
        ducks = Ducks.parse(chosen.ducks)
        key_path = chosen.key_path()
        key = ClusterKey.read(key_path, chosen.key_named()) if key_path else None
        slices = placement.weighted_slices(config.moe_intermediate_size, chosen.weights())
        checkpoint = Checkpoint.open(folder)
        checkpoint.check(config)

        if not structlog.is_configured():  # its own default would print every event into the answer
            log.configure()
        limit_threads()
        note = progress or (lambda _what, _done, _total: None)
        async with AsyncExitStack() as stack:
            stack.enter_context(switching_fast())
            trace: Trace = OFF
            if chosen.trace is not None:
                trace = Trace(ducks.short_names)
                # Whatever ends us: it is then to be seen what had happened until then.
                stack.callback(trace.write, chosen.trace)
                stack.push(partial(_note_end, trace))
            device = Device(chosen.device, chosen.dtype)
            stack.callback(device.close)
            walks, pin = _rows_on(device, chosen.graphs)
            taken = MemoryTrace(chosen.memory_trace, cuda=device.name == "cuda")
            stack.callback(taken.close)
            taken.note("opened")
            kind = _transport_kind(chosen, ducks)
            in_process = kind == "loopback"
            plane = host_plane(kind, ducks.network)  # refuses before anything is loaded
            local: LocalDucks | None = None
            if in_process or ducks.local or kind == "shm":
                # Compiled now if need be: they would all do so at once, and be late.
                await _load(lambda _: library.native())
            if ducks.local and not in_process:
                local = LocalDucks.launch(ducks.local, folder, key_path)  # they start while we load
                stack.callback(local.kill)
            plan = Plan(
                model=await _load(lambda _: experts_digest(checkpoint, config)),
                layers=config.moe_layers,
                experts=config.n_routed_experts,
                columns=config.moe_intermediate_size,
                slices=slices,
                shape=_shape(config, device, chosen),
                resident=choose_resident(checkpoint, config, chosen.experts),
            )
            needed = 0
            if in_process or local:
                needed = sum(slice_of(plan, duck).nbytes for duck in range(plan.ducks))
                memory.check_fits(needed, local=plan.ducks)
                needed += plan.ducks * memory.OVERHEAD_BYTES
            budget = _budget(config, device, chosen, needed)
            prompts.max_len = budget.holding.max_len
            device.explain = partial(taken.explain, budget)
            taken.note("planned", **budget.to_json())
            if planned:
                planned(budget)

            def read(check: Callable[[], None]) -> Transformer:
                def step(done: int, total: int) -> None:
                    check()
                    note("host", done, total)

                return Transformer.load(
                    checkpoint, config, budget.holding, device=device.torch, progress=step
                )

            try:
                model = await _load(read)
            except torch.OutOfMemoryError as error:
                raise taken.explain(budget, "loading weights", error) from None
            taken.note("weights", resident_bytes=model.tally.resident_bytes)
            transport: Transport
            if in_process:
                source, kernel = ModelSource(folder), Kernel(threads_each(len(slices)))
                transport = LoopbackTransport([Node(source, kernel) for _ in slices], pin)
            else:
                addresses, labels = ducks.addresses, ducks.labels
                if local:
                    await local.listening()
                    addresses, labels = local.addresses, local.labels
                transport = FlockTransport(
                    addresses,
                    plane,
                    labels,
                    lambda duck, done, total: note(f"duck {duck}", done, total),
                    lambda duck, layer: layer_stream(checkpoint, slice_of(plan, duck), layer),
                    _credentials(key),
                    local.ended if local else lambda _duck: False,
                    pin,
                )
            flock = Flock(transport, plan, local.obituary if local else None)
            stack.push_async_callback(flock.close)
            # The worker may be adding answers up: it ends before their memory goes.
            stack.callback(device.close)
            await flock.start()
            taken.note("ducks")
            pipeline = Pipeline(
                model, device, flock,
                schedule=chosen.schedule, draft=chosen.draft, early=chosen.early, trace=trace,
                walks=walks,
            )  # fmt: skip
            trace.about(
                model=folder.name, transport=kind, dtype=device.dtype_name,
                # What a duck reads for each expert that an ask names.
                expert_bytes=[slice_of(plan, duck).record_bytes for duck in range(plan.ducks)],
            )  # fmt: skip
            load = _report(checkpoint, model, budget, plan, transport.attached)

            async def note_running(what: str, **facts: Any) -> None:
                def ask() -> Later[None]:
                    taken.note(what, segments=walks.segments, **facts)
                    return now(None)

                if taken.on:  # on the worker: a GPU is asked
                    await device.run(Stage("note", 0), ask)

            yield cls(prompts, model, pipeline, plan, kind, load, trace, note_running)

    def stats(self) -> dict[str, Any]:
        """What is going on now; cheap enough to ask for every second.

        sessions: in a step or waiting for one; schedule: the next step's; device_busy, ducks_busy,
        overlap_efficiency, expert_overlap: as in an answer's statistics, but over the last ten
        seconds or so of work, all sessions together; loop_late_p99_s: how late the event loop heard
        of the device lately; transport, ducks.
        """
        return {
            **self._pipeline.stats(), "transport": self.transport, "ducks": self.plan.ducks,
        }  # fmt: skip

    # answers

    def session(self) -> Session:
        """An empty conversation; pass it to `stream` again and again to keep its KV cache."""
        return Session(self._model, 0, pairs=self._pipeline.drafts)

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        chat: bool = False,
        session: Session | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Answer piece by piece; the last piece has a finish_reason and the statistics.

        session: continues it where its tokens agree with the prompt's. Closing the iterator frees
        all else.
        """
        sampling = sampling or Sampling()
        ids = self.prompts.encode(prompt, chat=chat)
        session = session or self.session()
        limit = self.prompts.limit(len(ids), sampling.max_tokens)
        async with _closing_told(), session.answering():
            await self._pipeline.reserve(session, len(ids) + min(limit, 256))
            rest = session.rewind_to(ids)
            run = _Run(self, self._pipeline, sampling, len(ids), len(rest))
            facts = {"session": session.number, "kv_bytes": session.cache.nbytes}
            await self._note("session", tokens=len(ids), **facts)
            await self._pipeline.prefill(session, rest)
            await self._note("prompt", tokens=len(rest), **facts)
            decode = self._pipeline.decode(session, sampling, limit, run.meter)
            async with aclosing(decode):
                async for settled in decode:
                    piece = run.settle(settled.token, settled.logprobs, last=run.count + 1 == limit)
                    yield piece
                    if piece.finish_reason:
                        facts["kv_bytes"] = session.cache.nbytes
                        await self._note("answer", tokens=run.count, **facts)
                        return

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        chat: bool = False,
        session: Session | None = None,
    ) -> Completion:
        """The whole answer at once."""
        text, ids, chances, last = [], [], [], Piece("", [])
        async for last in self.stream(prompt, sampling, chat=chat, session=session):
            text.append(last.text)
            ids += last.token_ids
            chances += last.logprobs
        assert last.finish_reason
        return Completion("".join(text), ids, last.finish_reason, last.stats, chances)

    async def score(self, prompt: Prompt, mtp: bool = False) -> Any:
        """Teacher-forced logits.

        Returns:
            (T, vocab) float32; with `mtp` a pair, the second (T - 1, vocab): row j from hidden j,
            token j + 1.
        """
        ids = self.prompts.encode(prompt, answer=False)
        if mtp and not self.config.mtp_layers:
            raise ConfigError("this model has no MTP layer to score")
        session = Session(self._model, 0)
        async with _closing_told():
            await self._pipeline.reserve(session, len(ids))
            logits, guesses = await self._pipeline.score(session, ids, mtp=mtp)
        return (logits, guesses) if mtp else logits


@asynccontextmanager
async def _closing_told() -> AsyncIterator[None]:
    """Tell who is answered while the engine is closed that it is: it knows of no transport."""
    try:
        yield
    except TransportClosed as error:
        raise DuckError(CLOSED) from error


class _Run:
    """The bookkeeping of one answer: text, reasons to finish, statistics."""

    def __init__(
        self,
        engine: Engine,
        pipeline: Pipeline,
        sampling: Sampling,
        prompt_tokens: int,
        prefilled: int,
    ) -> None:
        self.meter = Meter()
        self.count = 0
        self._engine, self._pipeline, self._sampling = engine, pipeline, sampling
        self._prompt_tokens, self._prefilled = prompt_tokens, prefilled
        self._text = TextStream(engine.tokenizer) if engine.tokenizer else None
        self._scanner = StopScanner(sampling.stop)
        if sampling.stop and self._text is None:
            raise ConfigError("stop texts need a tokenizer.json in the model folder")
        self._begun = time.perf_counter()
        self._first = 0.0
        self._before = Totals()

    def settle(self, token: int, chances: TokenLogprobs | None, *, last: bool) -> Piece:
        """One more token: its piece of text, and whether it is the last."""
        self.count += 1
        if self.count == 1:
            self._first = time.perf_counter()
            self._before = self._pipeline.stages.totals()
        ended = token in self._engine.config.eos_token_ids and not self._sampling.ignore_eos
        text, stopped = "", False
        if self._text and not ended:
            text, stopped = self._scanner.feed(self._text.feed(token))
        reason = "stop" if ended or stopped else "length" if last else None
        if reason and self._text and not stopped:
            rest, stopped = self._scanner.feed(self._text.finish())
            text += rest if stopped else rest + self._scanner.finish()
        return Piece(
            text, [token], reason, [chances] if chances else [], self._stats() if reason else {}
        )

    def _stats(self) -> dict[str, Any]:
        """As design 5.1: times in seconds, shares of the decode time.

        Device and ducks are busy for all answers that are being made at the time.
        """
        now = time.perf_counter()
        meter, work = self.meter, self._pipeline.stages.totals().since(self._before)
        ttft, decode = self._first - self._begun, now - self._first
        settled = self.count - 1
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.count,
            "ttft_s": ttft,
            "tpot_s": decode / settled if settled else 0.0,
            "prefill_tok_s": self._prefilled / ttft if ttft else 0.0,
            "decode_tok_s": settled / decode if settled else 0.0,
            "steps": meter.steps,
            "drafts_proposed": len(meter.drafts),
            "drafts_accepted": meter.accepted,
            "draft_tokens": [list(pair) for pair in meter.drafts],
            "schedule": self._schedule(),
            "transport": self._engine.transport,
            "ducks": self._engine.plan.ducks,
            **shares(work, decode if settled else 0.0),
            "expert_overlap": (
                meter.shared_experts / meter.possible_experts if meter.possible_experts else 0.0
            ),
        }

    def _schedule(self) -> str:
        """The schedule of most of the answer's steps."""
        if not self.meter.schedules:
            return self._pipeline.chooser.way(1).policy.name
        return self.meter.schedules.most_common(1)[0][0]


def _credentials(key: ClusterKey | None) -> Credentials | None:
    if key is None:
        return None
    from duck.transports.tls import Credentials, Role  # slow to import, and only needed now

    return Credentials(key, Role.HOST)


def _note_end(trace: Trace, _kind: object, error: BaseException | None, _at: object) -> None:
    """Have a trace say what ended the run, if it was an error."""
    if isinstance(error, Exception):
        trace.about(ended=str(error) or type(error).__name__)


def _rows_on(device: Device, graphs: str) -> tuple[Walks, Pin | None]:
    """How rows walk on a device, and what memory of the host it reads by itself.

    Raises:
        ConfigError: graphs are asked for where there are no kernels that can be recorded.
    """
    if device.name != "cuda":
        return Walks(slots=graphs == "on"), None
    triton = pick(device.torch).name == "triton"
    if graphs == "on" and not triton:
        raise ConfigError(
            "--graphs on: this GPU does not run the kernels that can be recorded, which needs "
            "compute capability 8.9; leave it out"
        )
    if not triton:
        return Walks(), None
    from duck import cuda

    slots = graphs != "off"
    capture = cuda.Capturer() if slots else None
    return Walks(slots=slots, capture=capture, watched=True), cuda.pinned


def _budget(config: ModelConfig, device: Device, options: Options, ducks_bytes: int) -> Budget:
    """ducks_bytes: what ducks on this machine are about to take."""
    free = memory.free_bytes() if device.name == "cpu" else device.free_bytes()
    if free is not None and device.name == "cpu":
        free -= ducks_bytes
    return plan_memory(
        config,
        device=device.name,
        free_bytes=free,
        dtype=device.dtype_name,
        kv=options.kv,
        indexer=options.indexer,
        max_len=options.max_len,
        fp8_kept=pick(device.torch).fp8,
    )


def _report(
    checkpoint: Checkpoint,
    model: Transformer,
    budget: Budget,
    plan: Plan,
    attached: Sequence[Mapping[str, Any]],
) -> LoadReport:
    source_bytes = checkpoint.experts_nbytes(model.config)
    return LoadReport(
        tuple(model.tally.categories.values()),
        model.holding.token_nbytes(model.config),
        budget,
        [
            DuckLoad.of(
                f"duck {duck}", part, plan.columns, len(plan.layers), source_bytes, attached[duck]
            )
            for duck, part in enumerate(plan.slices)
        ],
    )


def _transport_kind(options: Options, ducks: Ducks) -> str:
    """The transport that is meant by "auto"."""
    if options.transport != "auto":
        return options.transport
    return "shm" if ducks.local and shm.is_available() else "tcp"


def _shape(config: ModelConfig, device: Device, options: Options) -> wire.Shape:
    ask = device.dtype_name
    return wire.Shape(
        hidden=config.hidden_size,
        top_k=config.num_experts_per_tok,
        ask_dtype=ask,
        answer_dtype="float32" if options.answers == "f32" else ask,
        max_rows=PREFILL_ROWS,
    )


async def _load(work: Callable[[Callable[[], None]], Loaded]) -> Loaded:
    """Blocking work in a thread; it calls what it is given now and then, so that Ctrl-C ends it."""
    cancelled = False

    def check() -> None:
        if cancelled:
            raise asyncio.CancelledError

    try:
        return await asyncio.to_thread(work, check)
    except asyncio.CancelledError:
        cancelled = True
        raise


def logits_to_logprobs(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """(T - 1,) log probability of each token after the first, float64."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(rows)), list(ids[1:])]
    found: np.ndarray = chosen - np.log(np.exp(rows).sum(axis=1))
    return found
