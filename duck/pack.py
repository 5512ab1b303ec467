"""`duck pack`: cuts a model into the slices of all ducks, one folder each.

The checkpoint is read once, expert by expert, and every duck gets its columns of that expert: no
more than one expert is in memory, however many ducks there are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from duck import wire
from duck.errors import ConfigError
from duck.memory import readable
from duck.model.config import ModelConfig
from duck.model.weights import Checkpoint, experts_digest
from duck.placement import Plan, Slice, weighted_slices
from duck.slices import layer_stream, resident_format, slice_of
from duck.store import Store, check_room, file_bytes

# called with the bytes written so far, and in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packed:
    """One duck's folder after packing."""

    folder: Path
    slice: Slice
    sha256: dict[int, str]  # layer -> of its file
    source_bytes: int  # of all routed experts in the checkpoint
    written_bytes: int  # this time; what was there already is left alone

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        what = self.slice
        return {
            "folder": str(self.folder), "slice": what.hash, "model": what.model,
            "columns": [what.start, what.stop], "resident": what.resident,
            "modules": len(what.layers), "source_bytes": self.source_bytes,
            "theory_bytes": self.source_bytes * (what.stop - what.start) // what.columns,
            "resident_bytes": what.nbytes, "written_bytes": self.written_bytes,
            "sha256": {str(layer): digest for layer, digest in self.sha256.items()},
        }  # fmt: skip


def show(packed: Sequence[Packed]) -> None:
    """The folders as a table on stdout."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("folder")
    for name in ("columns", "layers", "source", "theory", "resident", "written now"):
        table.add_column(name, justify="right")
    for duck in packed:
        facts = duck.to_json()
        names = ("source_bytes", "theory_bytes", "resident_bytes", "written_bytes")
        table.add_row(
            duck.folder.name, f"{duck.slice.start}:{duck.slice.stop}", str(facts["modules"]),
            *(readable(facts[name]) for name in names),
        )  # fmt: skip
    Console().print(table)


def pack(
    model: Path, weights: Sequence[float], out: Path, progress: Progress | None = None
) -> list[Packed]:
    """Write out/duck-000, out/duck-001, ...; what an earlier call finished is kept.

    weights: one a duck; slices are as wide.

    Raises:
        ConfigError: a folder holds another slice, or has no room.
        WeightsError: a weight is missing or not a number.
    """
    checkpoint, plan = plan_for(model, weights)
    slices = [slice_of(plan, duck) for duck in range(plan.ducks)]
    folders = [out / f"duck-{duck:03}" for duck in range(plan.ducks)]
    stores = [Store(folder) for folder in folders]
    for store, want in zip(stores, slices, strict=True):
        store.check(want)
    _check_strangers(out, folders)
    with contextlib.ExitStack() as stack:
        for store, want in zip(stores, slices, strict=True):
            stack.enter_context(store.claim(want))
        todo = [_missing(store, want) for store, want in zip(stores, slices, strict=True)]
        total = sum(len(some) * file_bytes(w) for some, w in zip(todo, slices, strict=True))
        check_room(out, total)
        job = _Job(checkpoint, progress or (lambda _done, _total: None), total)
        workers = stack.enter_context(ThreadPoolExecutor(os.cpu_count(), "pack"))
        for layer in plan.layers:
            job.layer(
                layer,
                [(s, w) for s, w, some in zip(stores, slices, todo, strict=True) if layer in some],
                workers,
            )
    return [
        Packed(
            store.folder, want,
            {layer: stored.sha256 for layer, stored in sorted(store.whole().items())},
            checkpoint.experts_nbytes(ModelConfig.load(model)),
            len(some) * file_bytes(want),
        )
        for store, want, some in zip(stores, slices, todo, strict=True)
    ]  # fmt: skip


def plan_for(model: Path, weights: Sequence[float]) -> tuple[Checkpoint, Plan]:
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
        resident=resident_format(checkpoint, config),
    )
    return checkpoint, plan


class _Job:
    """Writing layers, and how far it is."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress, total: int) -> None:
        self._checkpoint, self._progress, self._total = checkpoint, progress, total
        self._done = 0

    def layer(
        self, layer: int, stores: Sequence[tuple[Store, Slice]], workers: ThreadPoolExecutor
    ) -> None:
        """One layer of all ducks that lack it: in step, so that an expert is read for all."""
        if not stores:
            return
        with contextlib.ExitStack() as stack:
            ducks = [
                (stack.enter_context(store.write(layer)),
                 layer_stream(self._checkpoint, want, layer))
                for store, want in stores
            ]  # fmt: skip

            def step(number: int) -> int:
                writer, stream = ducks[number]
                piece = next(stream, None)
                if piece is None:
                    writer.finish()
                    return 0
                writer.write(piece)
                return len(piece)

            written = -1
            while written:
                written = sum(workers.map(step, range(len(ducks))))
                self._done += written
                self._progress(self._done, self._total)


def _missing(store: Store, want: Slice) -> set[int]:
    """Layers without a file of the right size: one that was damaged is written anew."""
    whole = {
        layer
        for layer, stored in store.whole().items()
        if stored.path.stat().st_size == stored.nbytes == file_bytes(want)
    }
    return set(want.layers) - whole


def _check_strangers(out: Path, ours: Sequence[Path]) -> None:
    """Folders of a pack for more ducks would look as if they belonged to this one."""
    found = {path for path in out.glob("duck-*") if path.is_dir()} if out.is_dir() else set()
    if strangers := sorted(found - set(ours)):
        raise ConfigError(
            f"{out} holds {strangers[0].name}, of a pack for more than {len(ours)} ducks: use "
            "another --out, or remove it"
        )
