"""MLA over the latent cache in Triton: few rows of many heads, dense or over selected keys.

    folded = q_nope wk            per head            `_heads_linear`
    partial softmax sums          per part of keys    `_attend_part`
    their combination             per head            `_combine`
    out = attended wv             per head            `_heads_linear`

Every launch is fixed by shapes; how many keys a row sees is read from `position` on the device, so
a captured CUDA graph may be replayed at any position of the cache. What a row's keys are cut into
depends on that row's own position alone, and parts are added in one order: a row's bits depend
neither on the rows beside it nor on the cache's capacity, nor on when it is computed.

What bounds it: at 128 heads and a bf16 cache a key of 1,152 bytes costs 128 * 2 * (576 + 512)
floating-point operations, 242 a byte: about where an H200's tensor cores and memory meet. Of fp8 it
is 425 a byte, and arithmetic is what takes time. At the 2,048 keys of sparse attention both are a
few microseconds, and `_heads_linear`, which reads 16.8 MB of wk or wv, takes as long.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from duck.kernels.common_triton import INTERPRETED, dot, rounded
from duck.kernels.fp8_triton import decode

MOST_ROWS = 8
"""Up to so many rows wk and wv are read once for all; more are a matrix product's business."""

_LOG2_E = 1.4426950408889634
_GROUP = tl.constexpr(128)


@dataclass(frozen=True)
class Tiling:
    """How `_attend_part` is cut up: heads and keys a step, parts a row, warps and stages."""

    heads: int
    keys: int
    parts: int
    warps: int
    stages: int


def tiling(rows: int, dtype: torch.dtype, held: torch.dtype) -> Tiling:
    """What suits the GPU, the dtype of the arithmetic and that of the cache.

    Sums of 64 heads and 512 numbers fill half the registers of a multiprocessor, and their queries
    72 KiB of shared memory, which a consumer GPU (99 KiB) does not have beside the latents. fp8
    rows pass through registers on their way: 32 heads, or they spill.
    """
    parts = 32 if rows <= MOST_ROWS else 1  # many rows fill the device by themselves
    if INTERPRETED:  # small, so that small tests have many steps
        return Tiling(16, 16, min(parts, 4), 4, 1)
    if dtype == torch.float32:  # for tests
        return Tiling(16, 16, parts, 8, 1)
    if held == torch.uint8:
        return Tiling(32, 32, parts, 8, 2)
    if driver.active.get_current_target().arch in (90, 100, 103):  # data centres'
        return Tiling(64, 32, parts, 8, 2)
    return Tiling(32, 16, parts, 8, 2)


def attend(
    q_nope: Tensor,
    q_pe: Tensor,
    held: Tensor,
    wk: Tensor,
    wv: Tensor,
    scale: float,
    position: Tensor,
    selected: Tensor | None = None,
) -> Tensor:
    """MLA of T rows: reference.attend_absorbed, or attend_selected, of the cache as it lies.

    q_nope: (T, heads, dn) and q_pe: (T, heads, dr), rotated, float32 or bfloat16; row t is at
    position + t. held: (capacity, width) of one layer, float32 or bfloat16 rows of r + dr numbers,
    or uint8 rows of Fp8Rows(r, dr). wk: (heads, dn, r); wv: (heads, dv, r), in q_nope's dtype.
    position: (1,) int32 on the device, with position + T <= capacity.
    selected: (T, K) int32, keys of each row, those that count before any -1; row t attends to the
    first min(K, position + t + 1) of them. None: row t attends to keys 0 .. position + t.

    Returns (T, heads, dv) in q_nope's dtype. Launches 4 kernels (up to MOST_ROWS rows).
    """
    folded = heads_linear(q_nope, wk.transpose(1, 2))
    return heads_linear(attend_latents(folded, q_pe, held, scale, position, selected), wv)


def attend_latents(
    folded: Tensor,
    q_pe: Tensor,
    held: Tensor,
    scale: float,
    position: Tensor,
    selected: Tensor | None = None,
    tiles: Tiling | None = None,
) -> Tensor:
    """The middle of `attend`: from queries folded into the latent to attended latents.

    folded: (T, heads, r), contiguous. Returns (T, heads, r) in its dtype.
    """
    rows, heads, rank = folded.shape
    rope = q_pe.shape[2]
    tiles = tiles or tiling(rows, folded.dtype, held.dtype)
    out = torch.empty_like(folded)
    parts = tiles.parts
    sums = folded.new_empty((rows, heads, parts, rank) if parts > 1 else 0, dtype=torch.float32)
    tops = folded.new_empty(2, rows, heads, parts, dtype=torch.float32)
    fp8 = held.dtype == torch.uint8
    assert held.stride(1) == 1
    assert not fp8 or (rank % 4 == 0 and held.shape[1] % 4 == 0)  # float32 scales lie aligned
    assert folded.is_contiguous()
    assert q_pe.stride(2) == 1
    if selected is not None:
        assert selected.dtype == torch.int32
        assert selected.stride(1) == 1
    count = 0 if selected is None else selected.shape[1]
    block_rank = triton.next_power_of_2(rank)
    _attend_part[(triton.cdiv(heads, tiles.heads), parts, rows)](
        folded, q_pe, held, held if selected is None else selected, position,
        out, sums, tops,
        scale * _LOG2_E, heads, rows,
        q_pe.stride(0), q_pe.stride(1), held.stride(0),
        0 if selected is None else selected.stride(0),
        COUNT=count, RANK=rank, ROPE=rope, FP8=fp8, PARTS=parts,
        HEADS=tiles.heads, KEYS=tiles.keys,
        BLOCK_RANK=max(16, block_rank), BLOCK_ROPE=max(16, triton.next_power_of_2(rope)),
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        width = min(128, block_rank)
        _combine[(triton.cdiv(rank, width), heads, rows)](
            sums, tops, position, out, heads, rows,
            COUNT=count, RANK=rank, PARTS=parts, KEYS=tiles.keys,
            BLOCK_PARTS=triton.next_power_of_2(parts), WIDTH=width,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def heads_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Every head's own matrix: out[t, h] = weight[h] @ x[t, h], float32 sums, in x's dtype.

    x: (T, heads, k); weight: (heads, n, k), either of whose last two axes is contiguous. Returns
    (T, heads, n). Up to MOST_ROWS rows the weights are read once, and that bounds it; a row's bits
    do not depend on the others.
    """
    rows, heads, width = x.shape
    if rows > MOST_ROWS:
        return torch.einsum("thk,hnk->thn", x, weight).contiguous()
    size = weight.shape[1]
    out = x.new_empty(rows, heads, size)
    block = triton.next_power_of_2(width)
    outs = min(max(1, 8192 // block), triton.next_power_of_2(size))
    _heads_linear[(triton.cdiv(size, outs), heads)](
        x, weight, out, rows, size, width,
        x.stride(0), x.stride(1), x.stride(2),
        weight.stride(0), weight.stride(1), weight.stride(2),
        out.stride(0), out.stride(1),
        OUTS=outs, WIDTH=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _heads_linear(
    x, weight, out, rows, size, width,
    x_row, x_head, x_item, w_head, w_out, w_item, out_row, out_head,
    OUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t, h, n] = sum over k of weight[h, n, k] x[t, h, k]; one program: OUTS n of one head.

    Reads each weight once and keeps it for all rows: bound by memory.
    """
    n = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    head = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = (n < size)[:, None] & (k < width)[None, :]
    at = weight + head * w_head + n[:, None] * w_out + k[None, :] * w_item
    tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for t in range(rows):
        row = tl.load(x + t * x_row + head * x_head + k * x_item, mask=k < width, other=0.0)
        total = tl.sum(tile * row.to(tl.float32)[None, :], axis=1)
        place = out + t * out_row + head * out_head + n
        tl.store(place, rounded(total, out.dtype.element_ty), mask=n < size)


@triton.jit
def _steps(position, t, COUNT: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr):
    """Keys that row t attends to, steps of KEYS that makes, and how many of them are a part."""
    limit = tl.load(position) + t + 1
    if COUNT > 0:
        limit = tl.minimum(limit, COUNT)
    steps = tl.cdiv(limit, KEYS)
    return limit, steps, tl.cdiv(steps, PARTS)


@triton.jit
def _read(
    held, index, seen, stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Latents (keys, BLOCK_RANK) and rotated keys (keys, BLOCK_ROPE) at `index`, zero where unseen.

    fp8: a row is RANK codes, one float32 scale for each 128 of them, ROPE bfloat16 numbers.
    """
    row = held + index.to(tl.int64) * stride
    p = tl.arange(0, BLOCK_ROPE)
    there = seen[:, None] & (p < ROPE)[None, :]
    if FP8:
        WIDTH: tl.constexpr = _GROUP if BLOCK_RANK > _GROUP else BLOCK_RANK
        GROUPS: tl.constexpr = BLOCK_RANK // WIDTH
        SCALES: tl.constexpr = (RANK + _GROUP - 1) // _GROUP
        g, r = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
        place = g[:, None] * WIDTH + r[None, :]
        inside = seen[:, None, None] & (place < RANK)[None, :, :]
        codes = tl.load(row[:, None, None] + place[None, :, :], mask=inside, other=0)
        at = (row + RANK).to(tl.pointer_type(tl.float32))[:, None] + g[None, :]
        scales = tl.load(at, mask=seen[:, None] & (g < SCALES)[None, :], other=0.0)
        latent = tl.reshape(decode(codes) * scales[:, :, None], [index.shape[0], BLOCK_RANK])
        rotated = (row + RANK + 4 * SCALES).to(tl.pointer_type(tl.bfloat16))
        shared = tl.load(rotated[:, None] + p[None, :], mask=there, other=0.0)
    else:
        r = tl.arange(0, BLOCK_RANK)
        inside = seen[:, None] & (r < RANK)[None, :]
        latent = tl.load(row[:, None] + r[None, :], mask=inside, other=0.0)
        shared = tl.load(row[:, None] + RANK + p[None, :], mask=there, other=0.0)
    return rounded(latent.to(tl.float32), dtype), rounded(shared.to(tl.float32), dtype)


@triton.jit(do_not_specialize=["rows"])
def _attend_part(
    folded, q_pe, held, selected, position, out, sums, tops,
    scale, heads, rows, pe_row, pe_head, held_row, selected_row,
    COUNT: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    """One part of one row's keys, for HEADS heads: sum of 2^(score - top) * latent, and top.

    score = (folded . c + q_pe . k_pe) * scale, scale with log2(e) in it. A latent is read once and
    is key and value. Parts beyond the row's keys end at once and write nothing; with one part in
    all the result is divided and written to out (T, heads, RANK). sums: (T, heads, PARTS, RANK);
    tops: (2, T, heads, PARTS), the tops and the sums of 2^(score - top).
    """
    part, t = tl.program_id(1), tl.program_id(2)
    limit, steps, per_part = _steps(position, t, COUNT, PARTS, KEYS)
    first = part * per_part
    last = tl.minimum(first + per_part, steps)
    if first >= last:
        return
    dtype: tl.constexpr = folded.dtype.element_ty
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    r, p = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    row = (t * heads + h).to(tl.int64)
    here, inside = h < heads, r < RANK
    query = tl.load(
        folded + row[:, None] * RANK + r[None, :], mask=here[:, None] & inside[None, :], other=0.0
    )
    query_pe = tl.load(
        q_pe + t.to(tl.int64) * pe_row + h[:, None] * pe_head + p[None, :],
        mask=here[:, None] & (p < ROPE)[None, :],
        other=0.0,
    )
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_RANK], tl.float32)
    for step in range(first, last):
        index = step * KEYS + tl.arange(0, KEYS)
        seen = index < limit
        if COUNT > 0:
            at = selected + t.to(tl.int64) * selected_row + index
            index = tl.load(at, mask=seen, other=-1)
            seen = index >= 0
        latent, shared = _read(
            held, index, seen, held_row, RANK, ROPE, FP8, BLOCK_RANK, BLOCK_ROPE, dtype
        )
        scores = tl.zeros([HEADS, KEYS], tl.float32)
        scores = dot(query, tl.trans(latent), scores)
        scores = dot(query_pe, tl.trans(shared), scores) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # Where all scores so far are -inf, -inf - -inf must not become a NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = dot(rounded(weights, dtype), latent, acc * shrink[:, None])
        top = higher
    whole = here[:, None] & inside[None, :]
    if PARTS == 1:
        result = rounded(acc / total[:, None], dtype)
        tl.store(out + row[:, None] * RANK + r[None, :], result, mask=whole)
    else:
        at = row * PARTS + part
        tl.store(sums + at[:, None] * RANK + r[None, :], acc, mask=whole)
        tl.store(tops + at, top, mask=here)
        tl.store(tops + rows * heads * PARTS + at, total, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _combine(
    sums, tops, position, out, heads, rows,
    COUNT: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum of parts * 2^(top - highest) / the same of their totals, in a fixed order.

    One program: WIDTH numbers of one head of one row. All parts are loaded at once.
    """
    head, t = tl.program_id(1), tl.program_id(2)
    _, steps, per_part = _steps(position, t, COUNT, PARTS, KEYS)
    used = tl.cdiv(steps, per_part)
    r = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, BLOCK_PARTS)
    row = t.to(tl.int64) * heads + head
    at = row * PARTS + part
    written = part < used
    top = tl.load(tops + at, mask=written, other=float("-inf"))
    total = tl.load(tops + rows * heads * PARTS + at, mask=written, other=0.0)
    highest = tl.max(top, axis=0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(top - safe)
    whole = written[:, None] & (r < RANK)[None, :]
    part_sums = tl.load(sums + at[:, None] * RANK + r[None, :], mask=whole, other=0.0)
    result = tl.sum(part_sums * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out + row * RANK + r, rounded(result, out.dtype.element_ty), mask=r < RANK)
