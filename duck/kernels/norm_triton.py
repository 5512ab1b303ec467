"""Norms, the residual sum before them, rotation, and what is written to the cache, in Triton.

A row is a program: some ten kilobytes are read and written once, so what bounds these is the time
that a kernel takes to start. Hence they do in one what would be six kernels in plain torch.
All of it is float32 between loading and storing, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duck.kernels.common_triton import rounded
from duck.kernels.fp8_triton import encode, group_scale, largest_size
from duck.kernels.linear_triton import added_up, linear_f32, partial_sums
from duck.kernels.matrix import Fp8Matrix, Matrix
from duck.kernels.reference import FP8_GROUP

_MOST_SPLITS = 8
"""That a row's program adds up; more would not fit its registers."""


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x,
    change,
    weight,
    total,
    out,
    eps,
    width,
    x_stride,
    rows,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make out = weight * y / sqrt(mean(y^2) + eps), y = x or, with SPLITS, x + change rounded.

    Grid: (rows). x: (rows, width), rows x_stride apart. change: (SPLITS, rows, width), to be added
    up. total (where y goes), out: (rows, width). weight: (width,) float32.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if SPLITS:
        at = change + row * width + column
        added = tl.load(at, mask=inside, other=0.0)
        for _ in tl.static_range(1, SPLITS):
            at += rows * width
            added += tl.load(at, mask=inside, other=0.0)
        y += added
        near = rounded(y, total.dtype.element_ty)
        tl.store(total + row * width + column, near, mask=inside)
        y = near.to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0)
    normed = w * (y * scale)
    tl.store(out + row * width + column, rounded(normed, out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, position, out, pairs, row_stride, head_stride, BLOCK: tl.constexpr):
    """Turn the pairs (x[2j], x[2j+1]) of every head. Grid: (rows, heads).

    x: (rows, heads, 2 * pairs) by its strides, contiguous in a head; out likewise, dense. cos, sin:
    (positions, pairs). Row t is at position[0] + t.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, BLOCK)
    inside = pair < pairs
    angle = (tl.load(position) + row) * pairs + pair
    c = tl.load(cos + angle, mask=inside)
    s = tl.load(sin + angle, mask=inside)
    at = x + row * row_stride + head * head_stride + 2 * pair
    first = tl.load(at, mask=inside).to(tl.float32)
    second = tl.load(at + 1, mask=inside).to(tl.float32)
    to = out + (row * tl.num_programs(1) + head) * 2 * pairs + 2 * pair
    tl.store(to, rounded(first * c - second * s, out.dtype.element_ty), mask=inside)
    tl.store(to + 1, rounded(second * c + first * s, out.dtype.element_ty), mask=inside)


@triton.jit
def _append(
    kv,
    weight,
    cos,
    sin,
    position,
    coded,
    scaled,
    plain,
    eps,
    rank,
    pairs,
    kv_stride,
    coded_stride,
    scaled_stride,
    plain_stride,
    plain_start,
    scaled_start,
    FP8: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Norm, rotate and round a row, and write it at its position. Grid: (rows).

    kv: (rows, rank + 2 * pairs). The cache is seen as its codes (uint8), its scales (float32) and
    its plain numbers (bf16), each with its own stride; without FP8 only as the last.
    """
    row = tl.program_id(0)
    at = tl.load(position) + row
    place = at.to(tl.int64)
    kv += row * kv_stride
    kind = kv.dtype.element_ty

    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < rank
    c = tl.load(kv + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(c * c, axis=1), axis=0) / rank + eps)
    w = tl.load(weight + column, mask=inside, other=0.0)
    c = rounded(w * (c * scale), kind).to(tl.float32)
    if FP8:
        scale = group_scale(largest_size(c, 1))
        codes = encode(tl.div_rn(c, scale[:, None]))
        tl.store(coded + place * coded_stride + column, codes, mask=inside)
        place_of_scale = scaled + place * scaled_stride + scaled_start + group
        tl.store(place_of_scale, scale, mask=group * GROUP < rank)
    else:
        tl.store(
            plain + place * plain_stride + column, rounded(c, plain.dtype.element_ty), mask=inside
        )

    pair = tl.arange(0, PAIRS)
    some = pair < pairs
    turn = tl.load(cos + at * pairs + pair, mask=some)
    lift = tl.load(sin + at * pairs + pair, mask=some)
    x = tl.load(kv + rank + 2 * pair, mask=some).to(tl.float32)
    y = tl.load(kv + rank + 2 * pair + 1, mask=some).to(tl.float32)
    first = rounded(x * turn - y * lift, kind).to(tl.float32)
    second = rounded(y * turn + x * lift, kind).to(tl.float32)
    to = plain + place * plain_stride + plain_start + 2 * pair
    tl.store(to, rounded(first, plain.dtype.element_ty), mask=some)
    tl.store(to + 1, rounded(second, plain.dtype.element_ty), mask=some)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As reference.device.rms_norm, of rows (T, width) contiguous in themselves."""
    assert x.dim() == 2
    assert x.stride(1) == 1
    rows, width = x.shape
    out = x.new_empty(rows, width)
    if rows:
        _norm(x, None, weight, x, out, eps)
    return out


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As reference.device.add_norm, of rows (T, width); change is contiguous."""
    return _add_norm(x, change[None], weight, eps)


def project_add_norm(
    x: Tensor, inner: Tensor, weight: Matrix, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As reference.linear.project_add_norm: fp8 products are added up where they are wanted."""
    if not isinstance(weight, Fp8Matrix):
        return add_norm(x, linear_f32(inner, weight), norm, eps)
    change = partial_sums(inner, weight)
    if len(change) > _MOST_SPLITS:
        change = added_up(change, torch.float32)[None]
    return _add_norm(x, change, norm, eps)


def _add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.dim() == 2
    assert x.stride(1) == 1
    assert change.is_contiguous()
    total, out = x.new_empty(x.shape), x.new_empty(x.shape)
    if len(x):
        _norm(x, change, weight, total, out, eps)
    return total, out


def _norm(
    x: Tensor, change: Tensor | None, weight: Tensor, total: Tensor, out: Tensor, eps: float
) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](
        x,
        x if change is None else change,
        weight,
        total,
        out,
        eps,
        width,
        x.stride(0),
        rows,
        SPLITS=0 if change is None else len(change),
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        enable_fp_fusion=False,
    )


def rotate_at(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """As reference.device.rotate_at. x may be a part of wider heads. Returns a dense tensor."""
    rows, heads, width = x.shape
    assert x.stride(2) == 1
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    out = x.new_empty(rows, heads, width)
    if rows:
        _rotate[rows, heads](
            x,
            cos,
            sin,
            position,
            out,
            width // 2,
            x.stride(0),
            x.stride(1),
            BLOCK=triton.next_power_of_2(width // 2),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


def append_latents(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    held: Tensor,
    position: Tensor,
) -> None:
    """As reference.device.append_latents. Nobody checks that there is room at `position`.

    held is contiguous; of fp8, r is a multiple of 4 and dr of 4, that scales and bf16 lie where
    numbers of their size may.
    """
    rows, rank = kv.shape[0], weight.shape[0]
    pairs = (kv.shape[1] - rank) // 2
    assert kv.stride(1) == 1
    assert held.is_contiguous()
    fp8 = held.dtype == torch.uint8
    coded = scaled = plain = held
    plain_start, scaled_start = rank, 0
    if fp8:
        assert rank % 4 == 0
        assert held.shape[1] % 4 == 0
        scaled, plain = held.view(torch.float32), held.view(torch.bfloat16)
        groups = triton.cdiv(rank, FP8_GROUP)
        scaled_start, plain_start = rank // 4, rank // 2 + 2 * groups
    if rows:
        _append[(rows,)](
            kv,
            weight,
            cos,
            sin,
            position,
            coded,
            scaled,
            plain,
            eps,
            rank,
            pairs,
            kv.stride(0),
            coded.stride(0),
            scaled.stride(0),
            plain.stride(0),
            plain_start,
            scaled_start,
            FP8=fp8,
            GROUPS=triton.next_power_of_2(triton.cdiv(rank, FP8_GROUP)),
            GROUP=FP8_GROUP,
            PAIRS=triton.next_power_of_2(pairs),
            num_warps=4,
            enable_fp_fusion=False,
        )
