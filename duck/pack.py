"""`duck pack`: cuts a model into the slices of all ducks, one folder each.

The checkpoint is read once, expert by expert, and every duck gets its columns of that expert: no
more than one expert is in memory, however many ducks there are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from rich.console import Console
from rich.table import Table

from duck import wire
from duck.errors import ConfigError, WeightsError
from duck.memory import readable
from duck.model.config import ModelConfig
from duck.model.weights import Checkpoint, experts_digest
from duck.placement import Plan, Slice, weighted_slices
from duck.slices import choose_resident, layer_stream, slice_of
from duck.store import LayerWriter, SourceFile, Store, check_room, file_bytes

# called with the bytes written so far, and in all
Progress = Callable[[int, int], None]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Packed:
    """One duck's folder after packing."""

    folder: Path
    slice: Slice
    sha256: dict[int, str]  # layer -> of its file
    source_bytes: int  # of all routed experts in the checkpoint
    verified_bytes: int  # were there already, and are what their sha256 says
    written_bytes: int  # this time

    @property
    def theory_bytes(self) -> int:
        """This duck's share of the source."""
        what = self.slice
        return self.source_bytes * (what.stop - what.start) // what.columns

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        what = self.slice
        return {
            "folder": str(self.folder), "slice": what.hash, "model": what.model,
            "columns": [what.start, what.stop], "resident": what.resident,
            "modules": len(what.layers), "source_bytes": self.source_bytes,
            "theory_bytes": self.theory_bytes,
            "resident_bytes": what.nbytes, "verified_bytes": self.verified_bytes,
            "written_bytes": self.written_bytes,
            "sha256": {str(layer): digest for layer, digest in self.sha256.items()},
        }  # fmt: skip


def show(packed: Sequence[Packed]) -> None:
    """The folders as a table on stdout."""
    table = Table(
        box=None, padding=(0, 1, 0, 0), header_style="dim", caption_justify="left",
        caption="source: all routed experts in the checkpoint; theory: this duck's share of them; "
        "resident: what a duck's memory takes",
    )  # fmt: skip
    table.add_column("folder")
    for name in ("columns", "layers", "as", "source", "theory", "resident", "verified", "written"):
        table.add_column(name, justify="right")
    sizes = [
        (duck.source_bytes, duck.theory_bytes, duck.slice.nbytes, duck.verified_bytes,
         duck.written_bytes)
        for duck in packed
    ]  # fmt: skip
    for duck, some in zip(packed, sizes, strict=True):
        table.add_row(
            duck.folder.name, f"{duck.slice.start}:{duck.slice.stop}",
            str(len(duck.slice.layers)), duck.slice.resident, *map(readable, some),
        )  # fmt: skip
    if len(packed) > 1:
        source, *others = zip(*sizes, strict=True)
        table.add_row(
            "all", "", "", "", readable(source[0]), *(readable(sum(some)) for some in others)
        )
    Console().print(table)


def pack(
    model: Path,
    weights: Sequence[float],
    out: Path,
    progress: Progress | None = None,
    *,
    experts: str = "exact",
    verifying: Progress | None = None,
) -> list[Packed]:
    """Write out/duck-000, out/duck-001, ...; what an earlier call finished is verified and kept.

    weights: one a duck; slices are as wide. experts: as the option of that name. verifying: told
    of the bytes read, as `progress` of those written.

    Raises:
        ConfigError: a folder holds another slice, or one cut from other files, or has no room.
        WeightsError: a weight is missing or not a number; a file changed while it was read.
    """
    checkpoint, plan = plan_for(model, weights, experts)
    checkpoint.shares_columns = plan.ducks > 1
    sources = _sources(checkpoint, plan)
    ducks = [_Duck(out / f"duck-{duck:03}", slice_of(plan, duck)) for duck in range(plan.ducks)]
    for duck in ducks:
        duck.store.check(duck.want)
        duck.store.check_sources(sources)
        duck.find_missing()
    _check_strangers(out, [duck.store.folder for duck in ducks])
    _check_room(out, ducks)  # before anything is written
    with contextlib.ExitStack() as stack:
        for duck in ducks:
            stack.enter_context(duck.store.claim(duck.want, sources))
            duck.find_missing()
        workers = stack.enter_context(ThreadPoolExecutor(os.cpu_count(), "pack"))
        _verify(ducks, workers, verifying or (lambda _done, _total: None))
        _check_room(out, ducks)
        total = sum(duck.missing_bytes for duck in ducks)
        done = 0
        for layer in plan.layers:
            for written in _layer(checkpoint, layer, ducks, workers):
                done += written
                if progress:
                    progress(done, total)
    if _sources(checkpoint, plan) != sources:
        raise WeightsError(
            f"the files of {model} changed while they were read: remove {out}, and pack again"
        )
    source_bytes = checkpoint.experts_nbytes(ModelConfig.load(model))
    return [duck.packed(source_bytes) for duck in ducks]


class _Duck:
    """One folder, and what it must get."""

    def __init__(self, folder: Path, want: Slice) -> None:
        self.store, self.want = Store(folder), want
        self.missing: set[int] = set()

    def find_missing(self) -> None:
        """Note the layers without a file."""
        self.missing = set(self.want.layers) - self.store.whole().keys()

    @property
    def found(self) -> set[int]:
        """The other layers."""
        return set(self.want.layers) - self.missing

    def verify(self, layer: int, progress: Callable[[int], None]) -> None:
        """A layer that is not what its sha256 says is missing: it is written anew."""
        if not self.store.is_right(layer, progress):
            _log.warning("damaged", file=str(self.store.path(layer)), remedy="it is packed again")
            self.missing.add(layer)

    @property
    def missing_bytes(self) -> int:
        return len(self.missing) * file_bytes(self.want)

    def packed(self, source_bytes: int) -> Packed:
        hashes = {layer: stored.sha256 for layer, stored in sorted(self.store.whole().items())}
        verified = len(self.found) * file_bytes(self.want)
        return Packed(
            self.store.folder, self.want, hashes, source_bytes, verified, self.missing_bytes
        )


def _sources(checkpoint: Checkpoint, plan: Plan) -> list[SourceFile]:
    """The files that hold routed experts, as they are now."""
    return [SourceFile.of(path) for path in checkpoint.expert_files(plan.layers)]


def _check_room(out: Path, ducks: Sequence[_Duck]) -> None:
    needed = sum(duck.missing_bytes for duck in ducks)
    check_room(out, needed, sum(duck.store.parts(duck.missing) for duck in ducks))


def _verify(ducks: Sequence[_Duck], workers: ThreadPoolExecutor, progress: Progress) -> None:
    """Read what is there: a repeated pack promises the same hashes, not the same sizes."""
    total = sum(len(duck.found) * file_bytes(duck.want) for duck in ducks)
    done, failed, lock = 0, False, threading.Lock()

    def step(nbytes: int) -> None:
        nonlocal done
        if failed:
            raise WeightsError("another file cannot be read")
        with lock:
            done += nbytes
            progress(done, total)

    jobs = [(duck, layer) for duck in ducks for layer in sorted(duck.found)]
    try:
        for _ in workers.map(lambda job: job[0].verify(job[1], step), jobs):
            pass
    except BaseException:
        failed = True  # the others end at their next stretch
        raise


def _layer(
    checkpoint: Checkpoint, layer: int, ducks: Sequence[_Duck], workers: ThreadPoolExecutor
) -> Iterator[int]:
    """Write one layer of all ducks that lack it, in step, so that an expert is read for all.

    Yields the bytes written, again and again.
    """
    with contextlib.ExitStack() as stack:
        jobs = [
            (stack.enter_context(duck.store.write(layer)),
             layer_stream(checkpoint, duck.want, layer))
            for duck in ducks if layer in duck.missing
        ]  # fmt: skip

        def step(job: tuple[LayerWriter, Iterator[memoryview]]) -> bool:
            """One piece; False when there is none left."""
            writer, stream = job
            piece = next(stream, None)
            if piece is not None:
                writer.write(piece)
            return piece is not None

        written = 0
        while jobs and all(list(workers.map(step, jobs))):
            before, written = written, sum(writer.nbytes for writer, _ in jobs)
            yield written - before
        for _ in workers.map(lambda job: job[0].finish(), jobs):
            pass


def plan_for(
    model: Path, weights: Sequence[float], experts: str = "exact"
) -> tuple[Checkpoint, Plan]:
    """The model's checkpoint, and a plan with slices as wide as the weights say.

    Raises:
        ConfigError, WeightsError: the folder or the weights cannot be used.
    """
    config = ModelConfig.load(model)
    if not config.moe_layers:
        raise ConfigError(f"{model}: no layer has routed experts; duck runs mixtures of experts")
    slices = weighted_slices(config.moe_intermediate_size, weights)
    checkpoint = Checkpoint.open(model)
    checkpoint.check(config)
    plan = Plan(
        model=experts_digest(checkpoint, config),
        layers=config.moe_layers,
        experts=config.n_routed_experts,
        columns=config.moe_intermediate_size,
        slices=slices,
        # A slice does not depend on what travels on the wire.
        shape=wire.Shape(config.hidden_size, config.num_experts_per_tok, "float32", "float32", 1),
        resident=choose_resident(checkpoint, config, experts),
    )
    return checkpoint, plan


def _check_strangers(out: Path, ours: Sequence[Path]) -> None:
    """Folders of a pack for more ducks would look as if they belonged to this one."""
    found = {path for path in out.glob("duck-*") if path.is_dir()} if out.is_dir() else set()
    if strangers := sorted(found - set(ours)):
        raise ConfigError(
            f"{out} holds {strangers[0].name}, of a pack for more than {len(ours)} ducks: use "
            "another --out, or remove it"
        )
