"""Products with block-scaled fp8 matrices, in Triton: few rows (decode) and many (prefill).

    y[t, n] = sum over k of x[t, k] * codes[n, k] * scales[n // block[0], k // block[1]]

With few rows the matrix's bytes bound it: every code is read once, at the rate of the memory. So
the matrix, not the rows, is the tall operand of the tensor cores (y is made transposed, 64 of its
columns by 16 rows at a time), and a matrix with few columns of output is split along k until some
hundreds of programs stream it. Codes become bf16, which is exact, in registers; a block's scale is
applied in float32 to the sum over its 128 columns.

No atomics: each split writes its partial sums, and a second kernel adds them. For 1 to 16
rows the tiles and splits depend on the matrix alone, so a row's bits do not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duck.kernels.common_triton import dot_dtype, rounded
from duck.kernels.matrix import Fp8Matrix, Matrix
from duck.kernels.reference import linear as plain

FEW = 16
"""Rows that are computed alike, whatever their number."""

_PROGRAMS = 512
"""That a matrix is split for: 3 to 4 on each processor of an H200 (132) or an RTX 5090 (170).

A constant, so that splits, and with them the order of sums, are the same on every GPU.
"""
_LEAST_BLOCKS = 2  # of columns in a split; with fewer, partial sums would be most of the traffic
_HELD = 8192  # partial sums that a program of the second kernel loads at once


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def _multiply(
    x,
    codes,
    scales,
    out,
    rows,
    n,
    k,
    x_stride,
    scale_stride,
    ROW_EDGE: tl.constexpr,
    COLUMN_EDGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sums over one split of k for a tile of y. Grid: (tiles of n, splits, tiles of rows).

    x: (rows, k), rows x_stride apart. codes: (n, k). out: (splits, rows, n). BLOCK_K divides
    COLUMN_EDGE, so that a step has one scale a row of codes, and a single one if BLOCK_N divides
    ROW_EDGE. WHOLE_K: BLOCK_K divides k. PER_SPLIT: steps of BLOCK_K that a split takes.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_n, in_rows = columns < n, row < rows
    step = tl.arange(0, BLOCK_K)
    first = split * PER_SPLIT

    code_at = codes + columns[:, None] * k + step[None, :]
    x_at = x + row[None, :] * x_stride + step[:, None]
    ONE_SCALE: tl.constexpr = ROW_EDGE % BLOCK_N == 0
    if ONE_SCALE:
        scale_at = scales + (tile * BLOCK_N // ROW_EDGE) * scale_stride
        in_scales = True
    else:
        scale_at = scales + (columns // ROW_EDGE) * scale_stride
        in_scales = in_n
    # A step's scale is read a step ahead, or every step would wait for it.
    scale = tl.load(scale_at + first * BLOCK_K // COLUMN_EDGE, mask=in_scales)
    total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for number in range(PER_SPLIT):
        ahead = first + tl.minimum(number + 1, PER_SPLIT - 1)
        next_scale = tl.load(scale_at + ahead * BLOCK_K // COLUMN_EDGE, mask=in_scales)
        start = (first + number) * BLOCK_K
        if WHOLE_K:
            tile_codes = tl.load(code_at + start, mask=in_n[:, None], other=0.0)
            tile_x = tl.load(x_at + start, mask=in_rows[None, :], other=0.0)
        else:
            in_k = start + step < k
            tile_codes = tl.load(code_at + start, mask=in_n[:, None] & in_k[None, :], other=0.0)
            tile_x = tl.load(x_at + start, mask=in_rows[None, :] & in_k[:, None], other=0.0)
        dots = tl.dot(tile_codes.to(DOT), tile_x.to(DOT), input_precision="ieee")
        if ONE_SCALE:
            total += dots * scale
        else:
            total += dots * scale[:, None]
        scale = next_scale
    place = (split * rows + row[None, :]) * n + columns[:, None]
    total = rounded(total, out.dtype.element_ty)
    tl.store(out + place, total, mask=in_n[:, None] & in_rows[None, :])


@triton.jit(do_not_specialize=["splits", "rows"])
def _add_splits(partials, out, splits, rows, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add (splits, rows, n) up. Grid: (tiles of n, rows)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    total = _sum_of_splits(partials, splits, rows, n, row, column, column < n, SPLITS)
    tl.store(out + row * n + column, rounded(total, out.dtype.element_ty), mask=column < n)


@triton.jit(do_not_specialize=["splits", "rows"])
def _gate(partials, out, splits, rows, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up from (splits, rows, 2 n): gate's columns come first. Grid: as above."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = column < n
    gate = _sum_of_splits(partials, splits, rows, 2 * n, row, column, inside, SPLITS)
    up = _sum_of_splits(partials, splits, rows, 2 * n, row, column + n, inside, SPLITS)
    inner = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * n + column, rounded(inner, out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_splits(partials, splits, rows, n, row, column, inside, SPLITS: tl.constexpr):
    """All are loaded at once: a loop would wait for the memory at every turn."""
    split = tl.arange(0, SPLITS)
    at = partials + (split[:, None] * rows + row) * n + column[None, :]
    mask = (split < splits)[:, None] & inside[None, :]
    return tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """As reference.linear.linear: (T, in) times (out, in), in x's dtype."""
    if isinstance(weight, Fp8Matrix):
        return _linear_fp8(x, weight, x.dtype)
    return plain.linear(x, weight)


def linear_f32(x: Tensor, weight: Matrix) -> Tensor:
    """As reference.linear.linear_f32: the same in float32."""
    if isinstance(weight, Fp8Matrix):
        return _linear_fp8(x, weight, torch.float32)
    return plain.linear_f32(x, weight)


def swiglu_f32(x: Tensor, gate_up: Sequence[Matrix], down: Matrix) -> Tensor:
    """As reference.linear.swiglu_f32. One matrix of both halves takes one pass less."""
    if not all(isinstance(part, Fp8Matrix) for part in gate_up):
        return plain.swiglu_f32(x, gate_up, down)
    parts = [partial_sums(x, part) for part in gate_up if isinstance(part, Fp8Matrix)]
    if len(parts) == 1:
        [partials] = parts
    else:
        partials = torch.cat([part.sum(0, keepdim=True) for part in parts], dim=-1)
    rows, width = partials.shape[1:]
    inner = x.new_empty(rows, width // 2)
    _finish(_gate, partials, inner)
    return linear_f32(inner, down)


def _linear_fp8(x: Tensor, weight: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    partials = partial_sums(x, weight, dtype)
    return partials[0] if len(partials) == 1 else added_up(partials, dtype)


def _finish(kernel: Any, partials: Tensor, out: Tensor) -> None:
    """Run the second kernel over out (T, n)."""
    splits, (rows, n) = partials.shape[0], out.shape
    held = triton.next_power_of_2(splits)
    block = max(64, min(256, _HELD // held))
    if rows:
        grid = (triton.cdiv(n, block), rows)
        kernel[grid](
            partials, out, splits, rows, n, SPLITS=held, BLOCK=block, enable_fp_fusion=False
        )


def added_up(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, out) of partial sums (splits, T, out)."""
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    _finish(_add_splits, partials, out)
    return out


def partial_sums(x: Tensor, weight: Fp8Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """(splits, T, out) float32, to be added up; a single one is in `dtype`.

    x: (T, in), its rows contiguous.
    """
    rows, (n, k) = x.shape[0], weight.shape
    row_edge, column_edge = weight.block
    # Places are 32-bit numbers.
    assert x.shape[1] == k
    assert x.stride(1) == 1
    assert n * k < 2**31
    block_k = math.gcd(column_edge, 128)
    few = rows <= FEW
    block_t, block_n, warps, stages = (FEW, 64, 4, 4) if few else (64, 128, 8, 3)
    blocks, tiles = triton.cdiv(k, block_k), triton.cdiv(n, block_n)
    row_tiles = triton.cdiv(rows, block_t)
    splits = min(_PROGRAMS // (tiles * max(1, row_tiles)), blocks // _LEAST_BLOCKS)
    splits = max(count for count in range(1, max(1, splits) + 1) if blocks % count == 0)
    out = x.new_empty(splits, rows, n, dtype=dtype if splits == 1 else torch.float32)
    assert out.numel() < 2**31
    if rows:
        _multiply[tiles, splits, row_tiles](
            x,
            weight.codes,
            weight.scales,
            out,
            rows,
            n,
            k,
            x.stride(0),
            weight.scales.stride(0),
            ROW_EDGE=row_edge,
            COLUMN_EDGE=column_edge,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            WHOLE_K=k % block_k == 0,
            PER_SPLIT=blocks // splits,
            DOT=dot_dtype(x),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )
    return out
