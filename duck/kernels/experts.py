"""One duck's experts on the native kernel: the exact bytes of the checkpoint, at memory speed.

Residents. Sums are float32, in one order whatever the rows, threads or processor. Exact are

    fp8    e4m3 codes with 128 x 128 scales, 8 bits a weight: the official checkpoints
    bf16   checkpoints in bfloat16
    f32    everything else (float16, fp8 with other blocks), dequantised; 4 bytes a weight

and lossy, made from any checkpoint, and used only when somebody asks for them:

    int8   weights and inputs rounded to -127..127 steps of their row's group of 128: 8.3 bits a
           weight. The layer's output is off by about 2 % rms. For prefill: twice as fast.
    int4   weights rounded to -8..7 steps of their row's group of 32, inputs to -127..127 of such a
           group: 4.5 bits a weight, so little more than half a duck's memory. Off by about 15 %.

The layouts are those of `native/tile.h`, `native/dots.h` and `native/resident.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from duck.errors import ConfigError, WeightsError
from duck.kernels import fp8, library
from duck.memory import readable
from duck.model.weights import ExpertWeights

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

RESIDENTS = ("fp8", "bf16", "f32", "int8", "int4")
LOSSY = {"int8": 0.02, "int4": 0.15}
"""Residents that are not exact, and by how much a layer's output is off: rms, about."""
BLOCK = (128, 128)
SPIN_US = 2000
"""How long a thread without work stays awake: longer than one layer of a decode step takes."""

MAX_THREADS, MAX_SPIN_US = 1024, 10_000_000

_STORED = {"fp8": np.uint8, "bf16": np.uint16, "f32": np.float32}


def resident_for(dtype: str, block: tuple[int, int] | None) -> str:
    """The resident that holds a checkpoint's experts exactly, in the fewest bytes.

    dtype: as safetensors spells it.
    """
    if dtype == "F8_E4M3" and block == BLOCK:
        return "fp8"
    return "bf16" if dtype == "BF16" else "f32"


@dataclass(frozen=True)
class Sizes:
    """What one expert takes."""

    record_bytes: int
    scale_floats: int

    @classmethod
    def of(cls, hidden: int, columns: int, resident: str) -> Sizes:
        """Raises ConfigError for sizes that the kernel cannot hold."""
        code = _code(resident)
        for name, value in (("hidden", hidden), ("columns", columns)):
            if not 1 <= value < 1 << 22:
                raise ConfigError(
                    f"{name} is {value}: the expert kernel holds 1 .. {(1 << 22) - 1}"
                )
        native = library.native()
        return cls(
            native.duck_record_bytes(hidden, columns, code),
            native.duck_scale_floats(hidden, columns, code),
        )


def pack(weights: ExpertWeights, resident: str, record: Bytes, scales: Floats) -> None:
    """Write an expert's slice in its resident form, into memory of the caller's.

    record: (record_bytes,); scales: (scale_floats,).

    Raises:
        WeightsError: a weight or scale is not a finite number, or the resident cannot hold them.
    """
    columns, hidden = weights.gate.shape
    sizes = Sizes.of(hidden, columns, resident)
    _check("record", record, np.uint8, (sizes.record_bytes,))
    _check("scales", scales, np.float32, (sizes.scale_floats,))
    source = _Source(weights, resident)
    status = library.native().duck_pack(
        hidden, columns, _code(resident), source.start, *source.pointers,
        record.ctypes.data, scales.ctypes.data,
    )  # fmt: skip
    if status:
        raise WeightsError(_trouble(status, "the slice"))


class NativeExperts:
    """The slices of all experts of some layers, and their forward pass.

    Args:
        layers: the layers that have experts.
        experts: experts in each layer.
        hidden: the model's hidden size.
        columns: columns of the intermediate dimension held here.
        resident: one of RESIDENTS.
        threads: that work on one forward, its caller included; 0: all processors we may use.
        spin_us: how long a thread without work stays awake before it sleeps.
        pin: keep every thread on a processor of its own; for machines that do nothing else.
        isa: "avx512", "avx2" or "scalar"; None: the best there is.

    Raises:
        ConfigError: sizes, resident or isa that cannot be, or too little memory.
    """

    def __init__(
        self,
        layers: Sequence[int],
        experts: int,
        hidden: int,
        columns: int,
        *,
        resident: str = "fp8",
        threads: int = 0,
        spin_us: int = SPIN_US,
        pin: bool = False,
        isa: str | None = None,
    ) -> None:
        self._pool: int | None = None
        self._handle = ctypes.c_void_p()
        self._native = library.native()
        self.sizes = Sizes.of(hidden, columns, resident)
        self.resident, self.hidden, self.columns, self.experts = resident, hidden, columns, experts
        self._places = {layer: place for place, layer in enumerate(layers)}
        status = self._native.duck_experts_create(
            len(self._places), experts, hidden, columns, _code(resident), None,
            ctypes.byref(self._handle),
        )  # fmt: skip
        if status == library.NO_MEMORY:
            one = self.sizes.record_bytes + 4 * self.sizes.scale_floats
            raise ConfigError(
                f"the system refuses the {readable(len(layers) * experts * one)} of memory that "
                f"{len(layers)} layers of {experts} experts take: see ulimit -v, or give this duck "
                "a narrower slice"
            )
        if status:
            raise ConfigError(_trouble(status, f"{len(layers)} layers of {experts} experts"))
        self.nbytes: int = self._native.duck_experts_bytes(self._handle)
        self.tune(threads=threads, spin_us=spin_us, pin=pin, isa=isa)

    def tune(
        self,
        *,
        threads: int = 0,
        spin_us: int = SPIN_US,
        pin: bool = False,
        isa: str | None = None,
    ) -> None:
        """Go on with other threads or another instruction set; results stay the same bits.

        Not while another thread calls `forward`.
        """
        name = self._native.duck_isa(None if isa is None else isa.encode())
        if name is None:
            raise ConfigError(f"isa {isa!r}: this processor has {', '.join(available_isas())}")
        for what, value, most in (
            ("threads", threads, MAX_THREADS), ("spin_us", spin_us, MAX_SPIN_US)
        ):  # fmt: skip
            if not 0 <= value <= most:
                raise ConfigError(f"{what} {value}: want 0 to {most}")
        pool = self._native.duck_pool_create(threads, spin_us, int(pin))
        if pool is None:
            raise ConfigError(f"the system refuses {threads} threads")
        self._native.duck_experts_use(self._open(), name)
        old, self._pool = self._pool, pool
        if old is not None:
            self._native.duck_pool_destroy(old)
        self.isa: str = name.decode()
        self.threads: int = self._native.duck_pool_threads(pool)

    def load(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Take over one expert's slice; different experts may be loaded at the same time.

        Raises:
            WeightsError: names the expert that has a weight or scale that is not a finite number.
        """
        if weights.gate.shape != (self.columns, self.hidden):
            raise ValueError(
                f"layer {layer} expert {expert}: gate is {weights.gate.shape}, "
                f"want {(self.columns, self.hidden)}"
            )
        source = _Source(weights, self.resident)
        status = self._native.duck_experts_load(
            self._open(), self._place(layer), expert, source.start, *source.pointers
        )
        if status:
            raise WeightsError(_trouble(status, f"layer {layer} expert {expert}"))

    def records(self, layer: int) -> Bytes:
        """(experts, record_bytes): where `pack`ed bytes may be put, to be adopted."""
        pointer = self._native.duck_experts_records(self._open(), self._place(layer))
        return np.ctypeslib.as_array(pointer, (self.experts, self.sizes.record_bytes))

    def scales(self, layer: int) -> Floats:
        """(experts, scale_floats) that belong to `records`."""
        shape = self.experts, self.sizes.scale_floats
        if not shape[1]:
            return np.empty(shape, np.float32)
        pointer = self._native.duck_experts_scales(self._open(), self._place(layer))
        return np.ctypeslib.as_array(pointer, shape)

    def adopt(self, layer: int, expert: int, start: int) -> None:
        """Use what was put into `records` and `scales`. May change those bytes: do it once.

        start: the slice's first column.

        Raises:
            WeightsError: names the expert that has a weight or scale that is not a finite number.
        """
        status = self._native.duck_experts_adopt(self._open(), self._place(layer), expert, start)
        if status:
            raise WeightsError(_trouble(status, f"layer {layer} expert {expert}"))

    def forward(
        self, layer: int, x: Floats, ids: npt.NDArray[np.int32], weights: Floats, out: Floats
    ) -> None:
        """Partial sums of the chosen experts over this slice; blocking, without the GIL.

        x: (T, hidden) float32; ids: (T, K) int32, -1 for none; weights: (T, K) float32; out:
        (T, hidden) float32, all contiguous.
        y = sum_k weights_k * down_k (silu(gate_k x) * (up_k x))   (DeepSeek-V3 report, 2.1.2)
        A row whose input or result is not finite comes out as NaN.

        Raises:
            ValueError: arrays of another shape or type, an id that is no expert or stands twice in
                a row, an expert that was not loaded. `out` is untouched.
        """
        rows, top_k = ids.shape if ids.ndim == 2 else (-1, -1)
        _check("x", x, np.float32, (rows, self.hidden))
        _check("ids", ids, np.int32, (rows, top_k))
        _check("weights", weights, np.float32, (rows, top_k))
        _check("out", out, np.float32, (rows, self.hidden))
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        bad_row = ctypes.c_int(-1)
        status = self._native.duck_experts_forward(
            self._open(), self._pool, self._place(layer), rows, top_k, x.ctypes.data,
            ids.ctypes.data, weights.ctypes.data, out.ctypes.data, ctypes.byref(bad_row),
        )  # fmt: skip
        if status:
            row = bad_row.value
            where = f"layer {layer} row {row}"
            if row >= 0:
                where += f" with experts {ids[row].tolist()}"
            raise ValueError(_trouble(status, where))

    def read(self, offset: int, nbytes: int) -> None:
        """Read resident bytes as fast as this machine can, whatever instruction set `forward` uses:
        what it is measured against.
        """
        self._native.duck_experts_read(self._open(), self._pool, offset, nbytes)

    def huge_page_share(self) -> float | None:
        """The part of the weights' memory that lies on huge pages; None where unknown.

        Without them streaming is 10 to 15 % slower. Meaningful once the weights are loaded.
        """
        address = ctypes.cast(
            self._native.duck_experts_records(self._open(), 0), ctypes.c_void_p
        ).value
        assert address is not None
        return _huge_page_share(address, address + self.nbytes)

    def close(self) -> None:
        """Give threads and memory back. Views of `records` and `scales` are dead after this."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        pool, self._pool = self._pool, None
        if handle:
            self._native.duck_experts_destroy(handle)
        if pool is not None:
            self._native.duck_pool_destroy(pool)

    def __del__(self) -> None:
        if hasattr(self, "_native"):
            self.close()

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise ValueError("these experts were closed")
        return self._handle

    def _place(self, layer: int) -> int:
        place = self._places.get(layer)
        if place is None:
            raise ValueError(f"no layer {layer} here, only {list(self._places)}")
        return place


def available_isas() -> list[str]:
    """The instruction sets of this processor that the kernel knows, best first."""
    names = ("avx512", "avx2", "scalar")
    return [name for name in names if library.native().duck_isa(name.encode())]


def _huge_page_share(start: int, stop: int) -> float | None:
    inside, huge_kib = False, 0
    try:
        with open("/proc/self/smaps", encoding="ascii", errors="replace") as smaps:
            for line in smaps:
                head, _, rest = line.partition(" ")
                if not head.endswith(":"):
                    first, _, last = head.partition("-")
                    inside = int(first, 16) < stop and start < int(last, 16)
                elif inside and head == "AnonHugePages:":
                    huge_kib += int(rest.split()[0])
    except OSError:
        return None
    return min(1.0, huge_kib * 1024 / (stop - start))


class _Source:
    """A slice as the library takes it; keeps the arrays that its pointers point to."""

    def __init__(self, weights: ExpertWeights, resident: str) -> None:
        self.start = weights.columns.start
        matrices = self._matrices(weights, resident)
        self._arrays = [_rows_contiguous(matrix) for matrix in matrices]
        self.pointers: list[Any] = []
        for array in self._arrays:
            self.pointers += [array.ctypes.data, array.strides[0] // array.itemsize]
        if resident == "fp8":
            self._arrays += self._block_scales(weights)
            self.pointers += [array.ctypes.data for array in self._arrays[3:]]
        else:
            self.pointers += [None] * 3

    @staticmethod
    def _matrices(weights: ExpertWeights, resident: str) -> tuple[Any, ...]:
        matrices = weights.gate, weights.up, weights.down
        if resident == "f32" or resident in LOSSY:
            floats = weights.dequantise()
            for codes, values in zip(matrices, floats, strict=True):
                if codes.dtype == np.uint8 and fp8.has_nan(codes):
                    # Which dequantise takes for numbers; the library finds NaN, and names it.
                    values[(codes & 0x7F) == 0x7F] = np.nan
            return floats
        stored = {matrix.dtype for matrix in matrices}
        blocks = BLOCK if resident == "fp8" else None
        if stored != {np.dtype(_STORED[resident])} or (weights.block != blocks and blocks):
            kinds = ", ".join(sorted(map(str, stored)))
            raise WeightsError(
                f"a resident of {resident} cannot hold weights of {kinds} in blocks of "
                f"{weights.block}"
            )
        return matrices

    @staticmethod
    def _block_scales(weights: ExpertWeights) -> list[Floats]:
        """One scale per block again, of the blocks that the slice touches."""
        assert weights.gate_scale is not None
        assert weights.up_scale is not None
        assert weights.down_scale is not None
        start, stop = weights.columns.start, weights.columns.stop
        edge = BLOCK[0]
        # A column of every block: its first, or the slice's first where it starts inside one.
        first = [
            max(block * edge, start) - start for block in range(start // edge, -(-stop // edge))
        ]
        return [
            np.ascontiguousarray(weights.gate_scale[first], np.float32),
            np.ascontiguousarray(weights.up_scale[first], np.float32),
            np.ascontiguousarray(weights.down_scale[:, first], np.float32),
        ]


def _rows_contiguous(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The matrix itself if its rows are, whatever lies between them."""
    step = matrix.strides[0]
    fits = matrix.strides[1] == matrix.itemsize and step >= 0 and step % matrix.itemsize == 0
    return matrix if fits else np.ascontiguousarray(matrix)


def _check(name: str, array: npt.NDArray[Any], dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        found = f"{array.dtype} {array.shape}"
        found += "" if array.flags.c_contiguous else ", not contiguous"
        raise ValueError(f"{name} is {found}; want {np.dtype(dtype)} {shape}")


def _code(resident: str) -> int:
    if resident not in RESIDENTS:
        raise ConfigError(f"resident {resident!r}: want one of {', '.join(RESIDENTS)}")
    return RESIDENTS.index(resident)


def _trouble(status: int, what: str) -> str:
    reasons = {
        library.BAD_SHAPE: "sizes or indices that cannot be",
        library.NO_MEMORY: "the system has too little memory",
        library.NOT_A_NUMBER: "a weight or scale is NaN or infinite",
        library.BAD_ID: "an id is no expert of this layer",
        library.TWICE: "one expert stands there twice",
        library.NOT_LOADED: "one of these was never loaded",
    }
    return f"{what}: {reasons.get(status, f'the expert kernel failed with status {status}')}"
