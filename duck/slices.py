"""Where a duck's slice comes from: a model folder on its own disk, or a store of packed layers.

Either fills the records and scales of whole layers, in place. A layer that a store lacks is sent by
the host, which cuts it from its own checkpoint with `layer_stream`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog

from duck.errors import ConfigError, WeightsError
from duck.kernels.experts import LOSSY, Sizes, pack, resident_for
from duck.model.config import ModelConfig
from duck.model.weights import Checkpoint, experts_digest
from duck.placement import Plan, Slice
from duck.store import LayerImage, LayerWriter, Store, check_room, file_bytes, file_header

Progress = Callable[[int], None]  # resident bytes that have come, of one stretch
Check = Callable[[], None]  # called now and then; raises when the work is to end

_log = structlog.get_logger(__name__)


class Arena(Protocol):
    """Resident slices: memory to fill, and their arithmetic."""

    @property
    def nbytes(self) -> int: ...
    def records(self, layer: int) -> np.ndarray:
        """(experts, record_bytes) uint8."""
        ...

    def scales(self, layer: int) -> np.ndarray:
        """(experts, scale_floats) float32."""
        ...

    def adopt(self, layer: int, expert: int, start: int) -> None:
        """Use what was put into records and scales, once; start: the slice's first column."""
        ...

    def forward(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, out: np.ndarray
    ) -> None:
        """Partial sums; see `kernels.reference.experts` for the meaning."""
        ...


class Source(Protocol):
    """What a duck can read its slice from."""

    def check(self, want: Slice) -> None:
        """Raises ConfigError when it is of another model, or holds another slice."""
        ...

    def has(self, want: Slice) -> Collection[int]:
        """The layers that it can read now; raises as `check`."""
        ...

    def load(
        self, want: Slice, layers: Sequence[int], arena: Arena, progress: Progress, check: Check
    ) -> None:
        """Read layers that it has into memory; blocking."""
        ...

    def __str__(self) -> str:
        """How people are told what it is."""
        ...


def slice_of(plan: Plan, duck: int) -> Slice:
    """One duck's slice with the kernel's sizes."""
    sizes = Sizes.of(plan.shape.hidden, len(plan.slices[duck]), plan.resident)
    return Slice.of(plan, duck, sizes.record_bytes, sizes.scale_floats)


def choose_resident(checkpoint: Checkpoint, config: ModelConfig, experts: str) -> str:
    """The resident for a choice of the user's, who is told when it is not exact.

    experts: "exact", or one of `kernels.experts.LOSSY`.
    """
    if experts == "exact":
        return resident_format(checkpoint, config)
    _log.warning(
        "lossy_experts", experts=experts, error=f"about {LOSSY[experts]:.0%} rms of a layer's sum",
        remedy="--experts exact computes with the published weights",
    )  # fmt: skip
    return experts


def resident_format(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """The resident that holds all routed experts exactly, in the fewest bytes."""
    dtypes = {
        checkpoint.info(f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight").dtype
        for layer in config.moe_layers
        for expert in range(config.n_routed_experts)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    found = {resident_for(dtype, checkpoint.block) for dtype in dtypes}
    return found.pop() if len(found) == 1 else "f32"


class ModelSource:
    """A model folder: a duck reads its columns of every expert from the published files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ModelConfig.load(folder)
        self.checkpoint = Checkpoint.open(folder)
        self.checkpoint.check(self.config)
        self.digest = experts_digest(self.checkpoint, self.config)

    def __str__(self) -> str:
        return f"model {self.folder}"

    def check(self, want: Slice) -> None:
        if want.model != self.digest:
            raise ConfigError(
                f"this duck holds another model: its folder {self.folder.name} has experts "
                f"{self.digest[:12]}, the host's model has {want.model[:12]}; start both with the "
                "same files"
            )
        mine = (
            self.config.moe_layers, self.config.n_routed_experts,
            self.config.moe_intermediate_size, self.config.hidden_size,
            # Any model can be rounded; held exactly it can be in one way only.
            want.resident if want.resident in LOSSY
            else resident_format(self.checkpoint, self.config),
        )  # fmt: skip
        theirs = (want.layers, want.experts, want.columns, want.hidden, want.resident)
        if mine != theirs:
            raise ConfigError(f"the host's plan has sizes {theirs}, this duck's model has {mine}")

    def has(self, want: Slice) -> Collection[int]:
        return want.layers

    def load(
        self, want: Slice, layers: Sequence[int], arena: Arena, progress: Progress, check: Check
    ) -> None:
        columns = range(want.start, want.stop)
        for layer in layers:
            records, scales = arena.records(layer), arena.scales(layer)
            for expert in range(want.experts):
                check()
                weights = self.checkpoint.expert(layer, expert, columns)
                pack(weights, want.resident, records[expert], scales[expert])
                arena.adopt(layer, expert, want.start)
                progress(records[expert].nbytes + scales[expert].nbytes)


class StoreSource:
    """A folder of packed layers; what it lacks can be received from a host."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)  # read now: a damaged manifest is told at the start
        if self.store.slice is None:
            _check_no_pack(folder)

    def __str__(self) -> str:
        held = self.store.slice
        return f"store {self.store.folder} ({held or 'empty'})"

    def check(self, want: Slice) -> None:
        self.store.check(want)

    def has(self, want: Slice) -> Collection[int]:
        self.store = Store(self.store.folder)  # duck pack may have been here since
        self.store.check(want)
        return self.store.whole().keys() & set(want.layers)

    def load(
        self, want: Slice, layers: Sequence[int], arena: Arena, progress: Progress, check: Check
    ) -> None:
        images = {layer: _image(want, layer, arena) for layer in layers}
        self.store.load(images, progress, check, lambda layer: self._adopt(want, layer, arena))

    def _adopt(self, want: Slice, layer: int, arena: Arena) -> None:
        try:
            adopt(want, layer, arena)
        except WeightsError as error:  # it was packed like that: its hash is right
            raise WeightsError(
                f"{self.store.path(layer)}: {error}; it was packed from a damaged model: remove "
                "this file, and pack it from, or have it sent by, one that is right"
            ) from error

    @contextlib.contextmanager
    def claim(self, want: Slice, layers: Collection[int]) -> Iterator[None]:
        """Hold the folder for receiving these layers.

        Raises:
            ConfigError: it is another's, or its disk has no room.
        """
        # Before anything is written, its manifest too.
        check_room(self.store.folder, len(layers) * file_bytes(want), self.store.parts(layers))
        with self.store.claim(want):
            yield

    def receive(self, want: Slice, layer: int, arena: Arena) -> LayerWriter:
        """Go on with a layer that a host sends; inside `claim`."""
        return self.store.receive(layer, _image(want, layer, arena))


def _check_no_pack(folder: Path) -> None:
    """A folder that `duck pack` wrote for several ducks is no store, and would become one."""
    inside = [path.name for path in islice(folder.glob("duck-*"), 1000) if path.is_dir()]
    if inside:
        names = sorted(inside)
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"--store {folder} holds {shown}: name one of them, as --store {folder / names[0]}"
        )


def adopt(want: Slice, layer: int, arena: Arena) -> None:
    """A layer is in place, and verified: use it."""
    for expert in range(want.experts):
        arena.adopt(layer, expert, want.start)


def _image(want: Slice, layer: int, arena: Arena) -> LayerImage:
    return LayerImage(want, arena.records(layer), arena.scales(layer))


def layer_stream(checkpoint: Checkpoint, want: Slice, layer: int) -> Iterator[memoryview]:
    """The bytes of a layer's file, cut from a checkpoint one expert at a time; blocking.

    First the header, then one piece for each expert, then the scales. A piece is good until the
    next one is asked for.

    Raises:
        WeightsError: a weight is missing or not a number.
    """
    yield memoryview(file_header(want))
    columns = range(want.start, want.stop)
    record = np.empty(want.record_bytes, np.uint8)
    scales = np.empty((want.experts, want.scale_floats), np.float32)
    for expert in range(want.experts):
        weights = checkpoint.expert(layer, expert, columns)
        pack(weights, want.resident, record, scales[expert])
        yield record.data
    yield scales.reshape(-1).view(np.uint8).data
