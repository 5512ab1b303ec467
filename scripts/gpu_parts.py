"""What gpu_check.py measures with: the model's widths, random tensors, one layer of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duck.kernels.device import Kernels
from duck.kernels.matrix import Fp8Matrix
from duck.kernels.reference.device import pack_fp8, unpack_fp8
from duck.kernels.reference.router import Rule


@dataclass(frozen=True)
class Shape:
    """The widths of a model, and what it is checked with."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    index_heads: int = 64
    index_width: int = 128
    topk: int = 2048
    experts: int = 256
    groups: int = 8
    kept: int = 4
    chosen: int = 8
    shared: int = 2048
    ducks: int = 16
    rows: tuple[int, ...] = (1, 2, 8, 64)
    dense: tuple[int, ...] = (0, 37, 2047, 5000)  # positions of dense attention
    context: int = 16_384  # tokens of sparse attention
    contexts: tuple[int, ...] = (1024, 2048, 16_384, 65_536)  # that layers are timed at

    @property
    def scale(self) -> float:
        """Of attention scores, without YaRN's share."""
        return float((self.nope + self.rope) ** -0.5)

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name and (out, in) of a layer's fp8 matrices."""
        return {
            "q_a, kv_a": (self.q_rank + self.rank + self.rope, self.hidden),
            "q_b": (self.heads * (self.nope + self.rope), self.q_rank),
            "o": (self.hidden, self.heads * self.value),
            "index wq_b": (self.index_heads * self.index_width, self.q_rank),
            "index wk": (self.index_width, self.hidden),
            "shared gate, up": (2 * self.shared, self.hidden),
            "shared down": (self.hidden, self.shared),
        }


REAL = Shape()
TINY = Shape(
    hidden=160, heads=4, q_rank=48, rank=32, nope=16, rope=8, value=16, index_heads=5,
    index_width=32, topk=12, experts=16, groups=4, kept=2, chosen=4, shared=24, ducks=3,
    rows=(1, 2), dense=(0, 20), context=40, contexts=(10, 40),
)  # fmt: skip


class Random:
    """Makes tensors on a device, the same ones for the same seed."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def numbers(self, *size: int, seed: int | None = None) -> Tensor:
        """float32, normal."""
        if seed is not None:
            self._generator.manual_seed(seed)
        return torch.randn(size, generator=self._generator, device=self.device)

    def rows(self, *size: int, seed: int | None = None) -> Tensor:
        """bfloat16, normal."""
        return self.numbers(*size, seed=seed).bfloat16()

    def fp8(self, out: int, width: int) -> Fp8Matrix:
        """A matrix as published, that keeps the size of what it is multiplied with."""
        codes = torch.empty(out, width, dtype=torch.float8_e4m3fn, device=self.device)
        for start in range(0, out, 4096):  # float32 of a part at a time
            stop = min(out, start + 4096)
            codes[start:stop] = (
                (self.numbers(stop - start, width) * 60).clamp_(-448, 448).to(torch.float8_e4m3fn)
            )
        edge = 128
        scales = torch.exp2(self.numbers(-(-out // edge), -(-width // edge)) / 2)
        return Fp8Matrix(codes, scales / 60 * width**-0.5, (edge, edge))

    def position(self, number: int) -> Tensor:
        return torch.full((1,), number, dtype=torch.int32, device=self.device)

    def tables(self, positions: int, pairs: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, without YaRN."""
        speeds = 10_000.0 ** -(torch.arange(pairs, device=self.device) / pairs)
        angles = torch.arange(positions, device=self.device)[:, None] * speeds
        return angles.cos(), angles.sin()

    def latents(self, shape: Shape, capacity: int, kind: str, *, zero: bool = False) -> Tensor:
        """A layer's cache of bf16, fp8 or float32."""
        width = shape.rank + shape.rope
        rows = torch.zeros(capacity, width, device=self.device)
        for start in range(0, 0 if zero else capacity, 8192):
            rows[start : start + 8192] = self.numbers(min(8192, capacity - start), width)
        if kind == "fp8":
            return pack_fp8(rows, shape.rank)
        return rows if kind == "float32" else rows.bfloat16()

    def index_keys(self, shape: Shape, capacity: int) -> Tensor:
        """A layer's cache of index keys, fp8."""
        width = shape.index_width
        held = torch.empty(capacity, width + 4, dtype=torch.uint8, device=self.device)
        for start in range(0, capacity, 8192):
            part = self.numbers(min(8192, capacity - start), width)
            held[start : start + 8192] = pack_fp8(part, width)
        return held


def numbers(held: Tensor, coded: int) -> Tensor:
    """A cache's numbers, float32."""
    return unpack_fp8(held, coded, torch.float32) if held.dtype == torch.uint8 else held.float()


class Layer:
    """One decoder layer of random weights: all but its routed experts."""

    def __init__(
        self, shape: Shape, device: torch.device, kernels: Kernels, *, capacity: int, seed: int = 0
    ) -> None:

        make = Random(device, seed)
        self.kernels, self._shape, self._make = kernels, shape, make
        self._fp8 = {name: make.fp8(*size) for name, size in shape.matrices().items()}
        self._wk = make.rows(shape.heads, shape.nope, shape.rank) * shape.nope**-0.5
        self._wv = make.rows(shape.heads, shape.value, shape.rank) * shape.rank**-0.5
        self._norms = [
            1 + make.numbers(width) / 8
            for width in (shape.hidden, shape.rank, shape.q_rank, shape.hidden)
        ]
        width = shape.index_width
        self._index_norm = 1 + make.numbers(width) / 8, make.numbers(width) / 8
        self._proj = make.numbers(shape.index_heads, shape.hidden) * shape.hidden**-0.5
        self._gate = make.numbers(shape.experts, shape.hidden) * 1.5 * shape.hidden**-0.5
        self._bias = make.numbers(shape.experts) / 10
        self._rule = Rule(
            count=shape.chosen, groups=shape.groups, kept=shape.kept, sigmoid=True, pairs=True,
            normalise=True, scale=2.5,
        )  # fmt: skip
        self._held = make.latents(shape, capacity, "fp8")
        self._held_keys = make.index_keys(shape, capacity)
        self.turns = make.tables(capacity, shape.rope // 2)
        self.sparse = True
        self.place(0, 1)

    def place(self, position: int, rows: int) -> None:
        """Where the rows of the next calls are."""
        self._position, self._seen = self._make.position(position), position + rows

    def __call__(self, x: Tensor, partials: Tensor) -> Tensor:
        """From the layer's input (T, hidden) and the ducks' partial sums to its output."""
        k, shape, position, eps = self.kernels, self._shape, self._position, 1e-6
        rows, width = len(x), shape.index_width
        h = k.rms_norm(x, self._norms[0], eps)
        q_a, kv = k.linear(h, self._fp8["q_a, kv_a"]).tensor_split([shape.q_rank], dim=-1)
        k.append_latents(kv, self._norms[1], eps, *self.turns, self._held, position)
        q_latent = k.rms_norm(q_a, self._norms[2], eps)
        q = k.linear(q_latent, self._fp8["q_b"]).view(rows, shape.heads, -1)
        q_nope = q[..., : shape.nope]
        q_pe = k.rotate_at(q[..., shape.nope :], *self.turns, position)
        selected = None
        if self.sparse:
            key = k.linear(h, self._fp8["index wk"])
            k.append_keys(key, self._index_norm, eps, *self.turns, position, self._held_keys)
            asked = k.linear(q_latent, self._fp8["index wq_b"]).view(rows, -1, width)
            scale = (shape.index_heads * width) ** -0.5
            query, weights = k.index_queries(
                asked, h, self._proj, scale, *self.turns, position, fp8=True
            )
            selected = k.select(query, weights, self._held_keys, position, shape.topk)
        out = k.attend(
            q_nope, q_pe, self._held, self._wk, self._wv, shape.scale, position, selected
        )
        x, h = k.project_add_norm(x, out.flatten(1), self._fp8["o"], self._norms[3], eps)
        k.route(h, self._gate, self._bias, self._rule)
        shared = k.swiglu_f32(h, (self._fp8["shared gate, up"],), self._fp8["shared down"])
        return k.combine(x, partials, shared)

    def nbytes(self, rows: int) -> int:
        """That a call reads at least: weights once, the cache as attention is dense or sparse."""
        used = [name for name in self._fp8 if self.sparse or not name.startswith("index")]
        total = sum(self._fp8[name].nbytes for name in used)
        total += self._wk.nbytes + self._wv.nbytes + self._gate.nbytes
        latents = rows * min(self._seen, self._shape.topk) if self.sparse else self._seen
        total += latents * self._held.shape[1]
        if self.sparse:
            total += self._proj.nbytes
        if self.sparse and self._seen > self._shape.topk:
            total += self._seen * self._held_keys.shape[1]
        return int(total)

    def held_nbytes(self) -> int:
        """On the device."""
        plain = (self._wk, self._wv, self._gate, self._proj, self._held, self._held_keys)
        return sum(part.nbytes for part in (*self._fp8.values(), *plain, *self.turns))
