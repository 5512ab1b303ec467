"""A checkpoint's tensors, read as published from safetensors files, and only what is asked.

The file format (https://huggingface.co/docs/safetensors) is parsed here and not by the safetensors
library, whose numpy side knows neither fp8 nor bf16, and whose torch side a duck does not have:
8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.

The bytes are never trusted: sizes, offsets, shapes and scales are checked, and every WeightsError
names the tensor, its file and what was expected. Nothing is memory-mapped: a mapped file that is
cut while it is in use ends the process (SIGBUS), a read of it is short and can be told.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from duck.errors import WeightsError
from duck.files import open_regular
from duck.kernels import fp8
from duck.model.config import ModelConfig
from duck.model.tensors import Wanted, wanted

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_HEADER_LIMIT = 100_000_000  # bytes; the safetensors library refuses more as well
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}
_VIEWS: dict[str, npt.DTypeLike] = {  # how numpy sees the dtypes that this package reads
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
}
_PLAIN = ("BF16", "F16", "F32")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_ALL = slice(None)
_READ_AT_ONCE = 1 << 30  # bytes; Linux reads no more than 2 GiB by one call
# Columns are picked from so many bytes of whole rows at a time: they stay in a core's cache.
_STRIPE = 1 << 18
_SCRATCH_BYTES = 1 << 25


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` at `offset` of `file`."""

    name: str
    file: Path
    dtype: str  # as safetensors spells it: "F8_E4M3", "BF16", "F32", ...
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


@dataclass(frozen=True)
class ExpertWeights:
    """Columns `columns` of one expert's intermediate dimension I, as stored.

    Shapes, with S = len(columns) and H = hidden_size: gate and up (S, H), down (H, S). Codes are
    uint8 (e4m3), or uint16 (bf16), float16 or float32 when the checkpoint is not fp8.

    Scales (None when not fp8) are per block along H and per element along I, so they are right for
    a slice that starts inside a block: with (rows, cols) = `block`,

        gate[s, h] = decode(code[s, h]) * gate_scale[s, h // cols]      (S, ceil(H / cols))
        down[h, s] = decode(code[h, s]) * down_scale[h // rows, s]      (ceil(H / rows), S)
    """

    columns: range
    block: tuple[int, int] | None
    gate: Array
    up: Array
    down: Array
    gate_scale: Floats | None
    up_scale: Floats | None
    down_scale: Floats | None

    def dequantise(self) -> tuple[Floats, Floats, Floats]:
        """Return gate (S, H), up (S, H) and down (H, S) in float32."""
        edge = (1, 1) if self.block is None else self.block
        return (
            _dequantise(self.gate, self.gate_scale, (1, edge[1])),
            _dequantise(self.up, self.up_scale, (1, edge[1])),
            _dequantise(self.down, self.down_scale, (edge[0], 1)),
        )


class Checkpoint:
    """A folder of safetensors files with every header checked; data is read when asked for."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None
    ) -> None:
        self._files: dict[Path, FileIO] = {}
        self.folder = folder
        self.tensors = tensors
        self.block = block
        self.bytes_read = 0  # by this thread or, roughly, by several; scales left out
        # Several threads will ask for columns of the same matrix, one after the other: it is read
        # once for all of them, and kept until another is asked for.
        self.shares_columns = False
        self._shared: tuple[str, Array] | None = None
        self._sharing = threading.Lock()
        self._opening = threading.Lock()
        self._own = threading.local()  # each thread's

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Parse the headers of `folder`: model.safetensors, or the shards its index names.

        Raises:
            WeightsError: a file is missing, truncated or inconsistent.
            ConfigError: config.json cannot be used (it says how large an fp8 block is).
        """
        folder = Path(folder)
        block = ModelConfig.load(folder).weight_block_size
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            return cls(folder, _read_header(single), block)
        if index.is_file():
            return cls(folder, _read_index(index), block)
        raise WeightsError(
            f"no weights in {folder}: expected model.safetensors or model.safetensors.index.json"
        )

    def info(self, name: str) -> TensorInfo:
        """Raises WeightsError when the checkpoint has no tensor of that name."""
        info = self.tensors.get(name)
        if info is None:
            raise WeightsError(f"{self.folder} has no tensor {name}")
        return info

    def raw(self, name: str) -> Array:
        """The tensor as stored.

        e4m3, e8m0 and uint8 come as uint8, bf16 as uint16, float16 and float32 as they are.
        """
        stored = self._whole(self.info(name))
        self.bytes_read += stored.nbytes
        return stored

    def f32(self, name: str, rows: slice = _ALL, cols: slice = _ALL) -> Floats:
        """A tensor, or a part of a matrix, as a float32 array of its own.

        fp8 codes are multiplied by their blocks' scales; only the bytes of the part are read.
        Slices have step 1.

        Raises:
            WeightsError: a value is not a finite number, or the scale is missing or misshaped.
        """
        info = self.info(name)
        if not info.shape:
            part = self._whole(info)
        else:
            start, stop, _ = rows.indices(info.shape[0])
            scratch = self._scratch(max(0, stop - start) * info.nbytes // max(1, info.shape[0]))
            part = self._rows(info, start, stop, scratch)
        if len(info.shape) > 1:
            part = part[:, cols]
        if info.dtype != "F8_E4M3":
            self.bytes_read += part.nbytes
            return _finite(_widen(part, info), info)
        scales = self.scale(name)
        assert self.block is not None  # scale() has seen to it
        row, column = rows.indices(info.shape[0])[0], cols.indices(info.shape[1])[0]
        codes = self._codes(info, part)
        return fp8.dequantise(codes, scales, self.block, row=row, column=column)

    def codes(self, name: str, rows: slice = _ALL) -> npt.NDArray[np.uint8]:
        """Rows of an fp8 matrix as stored, none of them NaN; valid until this thread's next read.

        Raises:
            WeightsError: a code is NaN.
        """
        info = self.info(name)
        assert info.dtype == "F8_E4M3"
        start, stop, _ = rows.indices(info.shape[0])
        scratch = self._scratch(max(0, stop - start) * info.nbytes // max(1, info.shape[0]))
        return self._codes(info, self._rows(info, start, stop, scratch))

    def scale(self, name: str) -> Floats:
        """The block scales of an fp8 matrix, float32: (ceil(rows / block), ceil(columns / block)).

        Stored as `<name>_scale_inv` (it multiplies, whatever its name says) or `.scale`, in fp32,
        bf16, fp16 or as powers of two (e8m0 or its codes as uint8).
        """
        scale = self._scale_info(self.info(name))
        stored = self._whole(scale)
        if scale.dtype in ("U8", "F8_E8M0"):
            return _finite(fp8.decode_e8m0(stored), scale)
        return _finite(_widen(stored, scale), scale)

    def scale_nbytes(self, name: str) -> int:
        """Bytes of the scales beside a tensor as stored; 0 where it is not fp8."""
        info = self.info(name)
        return self._scale_info(info).nbytes if info.dtype == "F8_E4M3" else 0

    def nbytes_without_experts(self, config: ModelConfig, *, indexer: bool = False) -> int:
        """Bytes of all tensors a model loads but for the routed experts; scales left out."""
        return sum(
            self.info(want.name).nbytes for want in wanted(config, indexer=indexer, experts=False)
        )

    def expert(self, layer: int, expert: int, columns: range) -> ExpertWeights:
        """A slice of one routed expert; no code in it is a NaN.

        columns: of the intermediate dimension, contiguous. All of down_proj is read: each of its
        rows holds a few bytes of every slice.
        """
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        part = slice(columns.start, columns.stop)
        gate, gate_scale = self._slice(f"{prefix}.gate_proj.weight", part, axis=0)
        up, up_scale = self._slice(f"{prefix}.up_proj.weight", part, axis=0)
        down, down_scale = self._slice(f"{prefix}.down_proj.weight", part, axis=1)
        return ExpertWeights(columns, self.block, gate, up, down, gate_scale, up_scale, down_scale)

    def expert_nbytes(self, layer: int, columns: range) -> int:
        """Bytes of one expert's slice as stored, scales left out: what a duck reads for it."""
        prefix = f"model.layers.{layer}.mlp.experts.0"
        total = 0
        for projection, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            info = self.info(f"{prefix}.{projection}.weight")
            total += info.nbytes * len(columns) // info.shape[axis]
        return total

    def expert_files(self, layers: Sequence[int]) -> list[Path]:
        """The files with routed experts of these layers or their scales, in order."""
        pattern = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.")
        found = ((pattern.match(name), info.file) for name, info in self.tensors.items())
        return sorted({file for match, file in found if match and int(match[1]) in layers})

    def experts_nbytes(self, config: ModelConfig) -> int:
        """Bytes of all routed experts as stored, scales included."""
        return sum(info.nbytes for info in _experts(self, config))

    def check(self, config: ModelConfig, *, indexer: bool = False) -> None:
        """Every tensor the config calls for is there with its shape, dtype and scale, and no other.

        Reads headers only. The indexer's tensors are looked at with `indexer` only: a duck, or a
        host that stays within index_topk tokens, has no use for them. Raises WeightsError for the
        first tensor that is missing, misshaped or unknown.
        """
        known: set[str] = set()
        for want in wanted(config, indexer=indexer):
            info = self._check_one(want, config)
            known.add(info.name)
            if info.dtype == "F8_E4M3":
                known.add(self._scale_info(info).name)
        ignored = _ignored(config, self.tensors)
        for name, info in self.tensors.items():
            if name not in known and not ignored.fullmatch(name):
                raise WeightsError(
                    f"unknown tensor {info} ({info.dtype} {list(info.shape)}): "
                    f"config.json calls for no tensor of that name"
                )

    def _check_one(self, want: Wanted, config: ModelConfig) -> TensorInfo:
        info = self.tensors.get(want.name)
        shape = list(want.shape)
        if info is None:
            hint = ""
            if ".indexer." in want.name:
                hint = f" (of the indexer; --max-len {config.index_topk} would do without)"
            elif want.name.startswith(f"model.layers.{config.num_hidden_layers}."):
                hint = " (of the MTP layer; num_nextn_predict_layers 0 would do without)"
            raise WeightsError(f"{self.folder} has no tensor {want.name}, expected {shape}{hint}")
        if info.shape != want.shape:
            raise WeightsError(f"{info} has shape {list(info.shape)}, expected {shape}")
        allowed = (*_PLAIN, "F8_E4M3") if want.quantisable else _PLAIN
        if info.dtype not in allowed:
            raise WeightsError(f"{info} has dtype {info.dtype}, expected {' or '.join(allowed)}")
        return info

    def _scale_info(self, info: TensorInfo) -> TensorInfo:
        """The scale of an fp8 matrix, its shape and dtype checked."""
        scale = self.tensors.get(_scale_name(info.name, self.tensors))
        if scale is None:
            raise WeightsError(f"{info} is fp8 but has no scale {info.name}_scale_inv")
        if self.block is None:
            raise WeightsError(
                f"{info} is fp8, but config.json has no quantization_config.weight_block_size"
            )
        if len(info.shape) != 2:
            raise WeightsError(f"{info} is fp8 with shape {list(info.shape)}, expected a matrix")
        expected = tuple(
            -(-size // edge) for size, edge in zip(info.shape, self.block, strict=True)
        )
        if scale.shape != expected:
            raise WeightsError(
                f"{scale} has shape {list(scale.shape)}, expected {list(expected)}: one scale per "
                f"{self.block[0]}x{self.block[1]} block of {list(info.shape)}"
            )
        if scale.dtype not in _SCALES:
            raise WeightsError(f"{scale} has dtype {scale.dtype}, expected {' or '.join(_SCALES)}")
        return scale

    def _slice(self, name: str, part: slice, *, axis: int) -> tuple[Array, Floats | None]:
        """Rows (axis 0) or columns (axis 1) of a matrix, with scales spread along them."""
        info = self.info(name)
        if not 0 <= part.start < part.stop <= info.shape[axis]:
            raise WeightsError(
                f"{info} has shape {list(info.shape)}: no slice {part} on axis {axis}"
            )
        stored = self._rows(info, part.start, part.stop) if axis == 0 else self._columns(info, part)
        if info.dtype != "F8_E4M3":
            self.bytes_read += stored.nbytes
            _finite(_widen(stored, info), info)
            return stored, None
        scale = self.scale(name)
        assert self.block is not None  # scale() has seen to it
        spread = fp8.spread(scale, self.block[axis], part.start, part.stop - part.start, axis)
        return self._codes(info, stored), spread

    def _codes(self, info: TensorInfo, stored: Array) -> npt.NDArray[np.uint8]:
        self.bytes_read += stored.nbytes
        if fp8.has_nan(stored):
            raise WeightsError(f"{info} holds the fp8 code of NaN (0x7F or 0xFF)")
        return stored

    def _whole(self, info: TensorInfo) -> Array:
        return self._read(info, 0, info.nbytes).reshape(info.shape)

    def _rows(self, info: TensorInfo, start: int, stop: int, into: Bytes | None = None) -> Array:
        """Rows of a tensor, which lie together.

        into: memory for them, if it is to be used again.
        """
        row_bytes = info.nbytes // max(1, info.shape[0])
        rows = max(0, stop - start)
        stored = self._read(info, start * row_bytes, rows * row_bytes, into)
        return stored.reshape(rows, *info.shape[1:])

    def _columns(self, info: TensorInfo, part: slice) -> Array:
        """Columns of a matrix, as an array of their own."""
        rows = info.shape[0]
        if self.shares_columns:
            with self._sharing:
                if self._shared is None or self._shared[0] != info.name:
                    self._shared = info.name, self._rows(info, 0, rows)
                shared = self._shared[1]
            return np.ascontiguousarray(shared[:, part])
        out = np.empty((rows, part.stop - part.start), _dtype_of(info))
        row_bytes = max(1, info.nbytes // max(1, rows))
        step = max(1, _STRIPE // row_bytes)
        stripe = np.empty(min(step, rows) * row_bytes, np.uint8)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            out[start:stop] = self._rows(info, start, stop, stripe)[:, part]
        return out

    def _read(self, info: TensorInfo, at: int, nbytes: int, into: Bytes | None = None) -> Array:
        """Bytes of a tensor from its byte `at` on, in its dtype, one-dimensional.

        Raises:
            WeightsError: the file cannot be read, or has become shorter than its header says.
        """
        dtype = _dtype_of(info)
        memory = np.empty(nbytes, np.uint8) if into is None else into[:nbytes]
        view, offset = memory.data, info.offset + at
        try:
            handle = self._file(info.file).fileno()
            while view:
                count = os.preadv(handle, [view[:_READ_AT_ONCE]], offset)
                if not count:
                    raise WeightsError(
                        f"{info.file} is truncated: {info.name} ends at byte "
                        f"{info.offset + info.nbytes} of {os.fstat(handle).st_size}"
                    )
                view, offset = view[count:], offset + count
        except OSError as problem:
            raise WeightsError(f"cannot read {info.file}: {problem.strerror}") from problem
        return memory.view(dtype)

    def _scratch(self, nbytes: int) -> Bytes | None:
        """This thread's memory for what is converted at once; None: too much to keep.

        Fresh memory would cost as much again: the system clears every page of it.
        """
        if nbytes > _SCRATCH_BYTES:
            return None
        have: Bytes | None = getattr(self._own, "scratch", None)
        if have is None or len(have) < nbytes:
            have = self._own.scratch = np.empty(nbytes, np.uint8)
        return have

    def _file(self, path: Path) -> FileIO:
        with self._opening:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open_regular(path)
            return file


def _dtype_of(info: TensorInfo) -> npt.DTypeLike:
    dtype = _VIEWS.get(info.dtype)
    if dtype is None:
        raise WeightsError(f"{info} has dtype {info.dtype}, which is not supported")
    return dtype


def experts_digest(checkpoint: Checkpoint, config: ModelConfig) -> str:
    """A hex sha256 that names the routed experts, at the cost of a few bytes of each.

    Two machines whose digests agree hold the same experts for all we can cheaply tell: it covers
    name, dtype, shape and the 64 middle bytes of every routed weight and scale, and the numbers of
    the config that the expert arithmetic depends on. How tensors are spread over files is left out.
    """
    infos = list(_experts(checkpoint, config))
    middles = _middles(infos, 64)
    sizes = (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts)
    digest = hashlib.sha256(json.dumps((sizes, config.weight_block_size)).encode())
    for info in infos:
        digest.update(f"{info.name} {info.dtype} {info.shape}\n".encode())
        digest.update(middles[info.name])
    return digest.hexdigest()


def _experts(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[TensorInfo]:
    """Every weight of the routed experts, each followed by its scale if it has one."""
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                yield checkpoint.info(name)
                scale = checkpoint.tensors.get(_scale_name(name, checkpoint.tensors))
                if scale is not None:
                    yield scale


def _middles(infos: Sequence[TensorInfo], count: int) -> dict[str, bytes]:
    """The `count` bytes in the middle of each tensor, fewer if it is smaller.

    The official files take 90,000 such reads. With the kernel's usual 128 KiB of reading ahead
    they would be 12 GB; so each is a page, and several files are read at a time.
    """
    files: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        files.setdefault(info.file, []).append(info)

    def read(path: Path) -> dict[str, bytes]:
        try:
            with open_regular(path) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                found = {}
                for info in files[path]:
                    file.seek(info.offset + max(0, info.nbytes - count) // 2)
                    found[info.name] = file.read(min(count, info.nbytes))
                return found
        except OSError as problem:
            raise WeightsError(f"cannot read {path}: {problem.strerror}") from problem

    middles: dict[str, bytes] = {}
    with ThreadPoolExecutor(16, "digest") as pool:
        for found in pool.map(read, files):
            middles |= found
    return middles


def _ignored(config: ModelConfig, names: Mapping[str, TensorInfo]) -> re.Pattern[str]:
    """Names beyond the expected ones that are known and not needed."""
    layer = config.num_hidden_layers
    patterns = [
        r".*\.rotary_emb\.inv_freq",  # computed; older files store it
        # Copies of the main model's embedding and head, 3.5 GB in the official files.
        rf"model\.layers\.{layer}\.(embed_tokens|shared_head\.head)\.weight",
    ]
    if config.index_topk is not None:
        # Wanted only by a host whose sessions may pass index_topk tokens.
        patterns.append(r"model\.layers\.\d+\.self_attn\.indexer\..*")
    if config.tie_word_embeddings:
        patterns.append(r"lm_head\.weight")
    for name in names:  # MTP modules that the config leaves unused: known by their eh_proj
        found = re.fullmatch(r"(model\.layers\.(\d+)\.)eh_proj\.weight", name)
        if found and int(found[2]) >= layer + config.mtp_layers:
            patterns.append(re.escape(found[1]) + ".*")
    return re.compile("|".join(patterns))


def _scale_name(weight: str, tensors: Mapping[str, TensorInfo]) -> str:
    """`<weight>_scale_inv`, or `.scale` where that is the spelling present."""
    official, other = f"{weight}_scale_inv", f"{weight.removesuffix('.weight')}.scale"
    return other if other in tensors and official not in tensors else official


def bf16_to_f32(stored: npt.NDArray[np.uint16]) -> Floats:
    """bf16, which numpy does not know and holds as uint16, to float32: exact, a copy."""
    wide = stored.astype(np.uint32)
    wide <<= 16  # in place: fresh memory would cost as much as the shift
    return wide.view(np.float32)


def _widen(stored: Array, info: TensorInfo) -> Floats:
    """bf16 (as uint16), fp16 or fp32 to float32, exactly, as a copy."""
    if info.dtype == "BF16":
        return bf16_to_f32(stored)
    if info.dtype in ("F16", "F32"):
        return stored.astype(np.float32)
    raise WeightsError(f"{info} has dtype {info.dtype}, expected {' or '.join(_PLAIN)}")


def _dequantise(stored: Array, scales: Floats | None, block: tuple[int, int]) -> Floats:
    if scales is not None:
        return fp8.dequantise(stored, scales, block)
    return bf16_to_f32(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


def _finite(values: Floats, info: TensorInfo) -> Floats:
    if not np.isfinite(values).all():
        raise WeightsError(f"{info} holds a value that is not a finite number")
    return values


def _read_index(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a sharded checkpoint: {"weight_map": {tensor: file}}."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise WeightsError(f"{path} is not a safetensors index: {problem!r}") from problem
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{path}: weight_map is no object")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise WeightsError(
                f"{path}: {name} lies in {file!r}, expected a file name of this folder"
            )
        if file not in shards:
            shards[file] = _read_header(path.parent / file)
        if name not in shards[file]:
            raise WeightsError(f"{name} is not in {file}, where {path.name} says it lies")
        tensors[name] = shards[file][name]
    return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, their places checked against its size."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise WeightsError(
                    f"{path} is truncated or no safetensors file: {size} bytes, "
                    f"and a header of {length} bytes announced"
                )
            text = file.read(length)
    except OSError as problem:
        raise WeightsError(f"cannot read {path}: {problem.strerror}") from problem
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise WeightsError(f"{path}: the header is not JSON: {problem}") from problem
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is no JSON object")
    header.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _parse_entry(path, name, entry, data) for name, entry in header.items()}
    end, before = data, "the header"
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise WeightsError(
                f"{info} starts at byte {info.offset}, expected {end}, where {before} ends"
            )
        end, before = info.offset + info.nbytes, info.name
        if end > size:
            raise WeightsError(f"{path} is truncated: {info.name} ends at byte {end} of {size}")
    if end != size:
        raise WeightsError(f"{path} has {size} bytes, expected {end}: bytes that no tensor owns")
    return tensors


def _parse_entry(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One header entry: {"dtype": str, "shape": [sizes], "data_offsets": [begin, end]}."""
    if not isinstance(entry, dict):
        raise WeightsError(f"{path}: the entry of {name} is no JSON object")
    dtype, shape = entry.get("dtype"), _sizes(entry.get("shape"))
    offsets = _sizes(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{name} in {path.name} has a bad shape or data_offsets: {entry}")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise WeightsError(f"{name} in {path.name} has dtype {dtype!r}, which is not supported")
    nbytes, expected = offsets[1] - offsets[0], math.prod(shape) * _BITS[dtype] // 8
    if nbytes != expected:
        raise WeightsError(
            f"{name} in {path.name} has {nbytes} bytes, expected {expected} for "
            f"{dtype} {list(shape)}"
        )
    return TensorInfo(name, path, dtype, shape, data + offsets[0], nbytes)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A short JSON list of whole numbers that can be sizes or places; else None."""
    if not isinstance(value, list) or len(value) > 8:
        return None
    for number in value:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
            return None
    return tuple(value)
