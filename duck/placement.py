"""Who holds what: pure functions from the sizes of a model and a flock to slices and the plan.

A slice is a contiguous range of columns of every expert's intermediate dimension. Because
silu(gate x) * up x works column by column, the partial down-projections of all slices add up to the
whole expert's output (design: every duck works on every token, nothing to balance).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from duck import wire
from duck.config import MAX_WEIGHT, MIN_WEIGHT, WANT_WEIGHT
from duck.errors import ConfigError, WireError

TILE = 64
# Version of what a slice's bytes mean; part of its hash, so that nobody attaches to another layout.
LAYOUT = 1
# How a weight is held: as published, bit for bit; or, where somebody chose so, rounded.
RESIDENTS = ("fp8", "bf16", "f32", "int8", "int4")


def equal_slices(columns: int, ducks: int) -> tuple[range, ...]:
    """Equal contiguous column ranges, one per duck, in duck order.

    Multiples of 64 columns while there are 64 for every duck (the resident tile, and what keeps a
    slice inside a 128-wide scale block); else as even as possible.

    Raises:
        ConfigError: no duck at all, or more ducks than columns.
    """
    return weighted_slices(columns, [1] * ducks)


def weighted_slices(columns: int, weights: Sequence[float]) -> tuple[range, ...]:
    """Contiguous column ranges as wide as the ducks' weights, one per duck, in duck order.

    Multiples of 64 columns as in `equal_slices`. Every duck gets at least one unit; the rest goes
    where a width is furthest below its share, so no width is further than it must be from it.

    Raises:
        ConfigError: no duck at all, more ducks than columns, or a weight that is not above 0.
    """
    ducks = len(weights)
    if not 1 <= ducks <= columns:
        raise ConfigError(
            f"{ducks} ducks for {columns} columns: every duck holds at least one column of each "
            f"expert's intermediate dimension, so use 1..{columns} ducks"
        )
    for weight in weights:
        if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(f"weight {weight}: {WANT_WEIGHT}, for every duck")
    unit = TILE if columns % TILE == 0 and columns // TILE >= ducks else 1
    units = columns // unit
    largest = max(weights)
    parts = [weight / largest for weight in weights]
    shares = [units * part / sum(parts) for part in parts]
    widths = [max(1, math.floor(share)) for share in shares]
    spare = max(0, units - sum(widths))  # fewer than ducks: each was rounded down by less than one
    for duck in sorted(range(ducks), key=lambda duck: widths[duck] - shares[duck])[:spare]:
        widths[duck] += 1
    for _ in range(sum(widths) - units):
        wide = [duck for duck in range(ducks) if widths[duck] > 1]
        widths[max(wide, key=lambda duck: widths[duck] - shares[duck])] -= 1
    edges = [0, *itertools.accumulate(width * unit for width in widths)]
    return tuple(range(start, stop) for start, stop in itertools.pairwise(edges))


@dataclass(frozen=True)
class Plan:
    """What the host and every duck must agree on; its hash is compared in HELLO and WELCOME."""

    model: str  # digest of the routed experts
    layers: tuple[int, ...]  # layers with routed experts, the MTP layer's index included
    experts: int
    columns: int  # the intermediate dimension of one expert
    slices: tuple[range, ...]  # duck -> its columns
    shape: wire.Shape
    resident: str = "fp8"  # one of RESIDENTS

    @property
    def ducks(self) -> int:
        return len(self.slices)

    def slice_hash(self, duck: int) -> str:
        """Identifies the bytes a duck must hold: model, columns, layout."""
        columns = self.slices[duck]
        layout = f"{LAYOUT}/{self.resident}"
        text = f"{self.model}/{layout}/{columns.start}:{columns.stop}/{self.columns}"
        return hashlib.sha256(text.encode()).hexdigest()

    def hash(self) -> str:
        return hashlib.sha256(msgpack.packb(self.to_wire())).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """The plan as plain msgpack values."""
        return {
            "model": self.model,
            "layers": list(self.layers),
            "experts": self.experts,
            "columns": self.columns,
            "slices": [[s.start, s.stop] for s in self.slices],
            "hidden": self.shape.hidden,
            "top_k": self.shape.top_k,
            "ask_dtype": self.shape.ask_dtype,
            "answer_dtype": self.shape.answer_dtype,
            "max_rows": self.shape.max_rows,
            "resident": self.resident,
        }

    @classmethod
    def from_wire(cls, message: Mapping[str, Any]) -> Plan:
        """Read and check a plan that a peer sent.

        Raises:
            WireError: a field is absent, of another type or out of its range.
        """
        number = {
            name: _bounded(message, name, limit)
            for name, limit in (
                ("experts", 1 << 15), ("columns", 1 << 20), ("hidden", 1 << 20),
                ("top_k", 1 << 10), ("max_rows", 1 << 16),
            )
        }  # fmt: skip
        layers = wire.field(message, "layers", list)
        if not 1 <= len(layers) <= 1 << 12 or not _increasing(layers, 1 << 14):
            raise WireError("plan: layers must be increasing layer numbers")
        slices = _covering(wire.field(message, "slices", list), number["columns"])
        dtypes = [wire.field(message, name, str) for name in ("ask_dtype", "answer_dtype")]
        if any(dtype not in wire.WIRE_BYTES for dtype in dtypes):
            found = ", ".join(dtype[:20] for dtype in dtypes)
            raise WireError(f"plan: wire dtypes {found}; known are {', '.join(wire.WIRE_BYTES)}")
        shape = wire.Shape(
            number["hidden"], number["top_k"], dtypes[0], dtypes[1], number["max_rows"]
        )
        resident = wire.field(message, "resident", str)
        if resident not in RESIDENTS:
            raise WireError(
                f"plan: resident {resident[:20]!r}; this duck knows {', '.join(RESIDENTS)}"
            )
        largest = max(shape.ask_bytes(shape.max_rows), shape.answer_bytes(shape.max_rows))
        if largest > wire.MESSAGE_LIMIT:
            raise WireError(f"plan: messages of {largest} bytes, at most {wire.MESSAGE_LIMIT}")
        return cls(
            model=wire.field(message, "model", str),
            layers=tuple(layers),
            experts=number["experts"],
            columns=number["columns"],
            slices=slices,
            shape=shape,
            resident=resident,
        )


@dataclass(frozen=True)
class Slice:
    """What one duck holds: all that decides its bytes, and their sizes."""

    hash: str
    model: str  # digest of the routed experts
    layout: int
    resident: str
    start: int  # the columns from start to stop - 1 of the intermediate dimension
    stop: int
    columns: int  # of the whole intermediate dimension
    layers: tuple[int, ...]
    experts: int
    hidden: int
    record_bytes: int  # of one expert
    scale_floats: int  # of one expert

    @classmethod
    def of(cls, plan: Plan, duck: int, record_bytes: int, scale_floats: int) -> Slice:
        """One duck's slice; the sizes are the kernel's."""
        part = plan.slices[duck]
        return cls(
            hash=plan.slice_hash(duck), model=plan.model, layout=LAYOUT, resident=plan.resident,
            start=part.start, stop=part.stop, columns=plan.columns, layers=plan.layers,
            experts=plan.experts, hidden=plan.shape.hidden,
            record_bytes=record_bytes, scale_floats=scale_floats,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"columns {self.start}:{self.stop} of {self.columns} of model {self.model[:12]}"

    @property
    def layer_bytes(self) -> int:
        """Resident bytes of one layer: records and scales of all experts."""
        return self.experts * (self.record_bytes + 4 * self.scale_floats)

    @property
    def nbytes(self) -> int:
        """Resident bytes of all layers."""
        return len(self.layers) * self.layer_bytes


def _bounded(message: Mapping[str, Any], name: str, limit: int) -> int:
    value: int = wire.field(message, name, int)
    if not 1 <= value <= limit:
        raise WireError(f"plan: {name} is {value}, want 1..{limit}")
    return value


def _covering(edges: Sequence[Any], columns: int) -> tuple[range, ...]:
    error = WireError("plan: slices must cover the columns once, in order")
    if len(edges) > wire.HOST - 1:
        raise error
    slices: list[range] = []
    start = 0
    for edge in edges:
        if (
            not isinstance(edge, list)
            or len(edge) != 2
            or not all(type(v) is int for v in edge)
            or edge[0] != start
            or not start < edge[1] <= columns
        ):
            raise error
        slices.append(range(edge[0], edge[1]))
        start = edge[1]
    if start != columns:
        raise error
    return tuple(slices)


def _increasing(numbers: Sequence[Any], limit: int) -> bool:
    if not all(type(n) is int and 0 <= n < limit for n in numbers):
        return False
    return all(a < b for a, b in itertools.pairwise(numbers))
