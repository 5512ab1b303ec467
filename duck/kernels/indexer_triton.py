"""The lightning indexer in Triton: queries and keys, scores, and the highest of them.

    key = turn(layer_norm(wk x))            into the cache             `append_keys`
    query = turn(wq_b q_latent), weights    rounded as keys are        `queries`
    score = sum of weight * relu(query . key) over heads               `scores`
    the index_topk highest, positions ascending                        `largest`

where turn rotates the first numbers and, for fp8, multiplies with Hadamard's matrix. Every launch
is fixed by shapes and reads the rows' position on the device, so a captured CUDA graph may be
replayed at any position of the cache; programs beyond what a row sees end at once, and rows that
see no more than index_topk tokens select them all without a score.

The highest are found by their bits, eight at a time: floats as unsigned numbers of the same order,
counted by digit in blocks, then again those that share the digit of the last one to be taken. Four
counts give that one's value exactly; of equal scores the lower positions are taken. Whole numbers
are counted, so the set depends on the scores alone, and is the reference's.

What bounds it: scores read the keys once for up to _ROWS rows (132 bytes a token as served, 8.6 MB
at 64k) and are bound by memory; the five launches of `largest` read 4 bytes a token each, and are
bound by their launches and the latency of one block of 4,096.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duck.kernels.common_triton import INTERPRETED, dot
from duck.kernels.fp8_triton import decode, encode, group_scale, largest_size
from duck.kernels.reference import SCORES

_ROWS = 8
"""Rows that share one reading of the keys."""

_BINS = tl.constexpr(256)
_LEVELS = 4  # digits of 8 bits
_CHUNK = tl.constexpr(16)  # blocks whose counts are read at once


def append_keys(
    projected: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    held: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """Write the index keys of T rows into the cache: layer norm, rotation, rounding; one launch.

    projected: (T, d), wk x, any float dtype, d a power of two. norm: weight and bias, (d,) float32.
    cos, sin: (positions, dr / 2) float32, of every position; row t takes that of position + t.
    position: (1,) int32 on the device. held: (capacity, width) of one layer, uint8 rows of
    Fp8Rows(d, 0) after Hadamard's matrix, or float32 rows as they are.
    interleaved: rotate neighbours (GLM) instead of halves.
    """
    rows, width = projected.shape
    fp8 = held.dtype == torch.uint8
    _append_keys[(rows,)](
        projected, norm[0], norm[1], eps, cos, sin, position, held,
        projected.stride(0), held.stride(0), cos.stride(0),
        WIDTH=width, LOG=width.bit_length() - 1, HALF=cos.shape[1],
        INTERLEAVED=interleaved, FP8=fp8, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def queries(
    projected: Tensor,
    x: Tensor,
    proj: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    *,
    fp8: bool,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The queries of T rows, rounded as keys are held, and the weights of their heads; one launch.

    projected: (T, heads, d), wq_b q_latent. x: (T, hidden), normed. proj: (heads, hidden) float32.
    scale: what weights are multiplied by. cos, sin, position, interleaved: as in append_keys.

    Returns (T, heads, d) and (T, heads) float32. fp8: the queries are e4m3 values as bfloat16
    without their scale, which is in the weights; else float32.
    """
    rows, heads, width = projected.shape
    query = torch.empty(
        projected.shape, dtype=torch.bfloat16 if fp8 else torch.float32, device=projected.device
    )
    weights = query.new_empty(rows, heads, dtype=torch.float32)
    _queries[(heads, rows)](
        projected, x, proj, scale, cos, sin, position, query, weights, heads, x.shape[1],
        projected.stride(0), projected.stride(1), x.stride(0), proj.stride(0), cos.stride(0),
        WIDTH=width, LOG=width.bit_length() - 1, HALF=cos.shape[1],
        INTERLEAVED=interleaved, FP8=fp8, CHUNK=1024, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return query, weights


def scores(
    query: Tensor,
    weights: Tensor,
    held: Tensor,
    position: Tensor,
    *,
    count: int = 0,
    first: int = 0,
) -> Tensor:
    """reference.index_scores of the cache as it lies, of T rows at position + first and after.

    query, weights: as `queries` gives them. held: (capacity, width) of one layer. Returns
    (T, capacity) float32: -inf for keys after the row's own; what is not a number is -inf, too, and
    infinities are the largest finite numbers, as reference.select_keys compares them. Nothing is
    written beyond the last key that any row sees, nor for rows that see at most `count` keys.
    """
    rows, heads, width = query.shape
    capacity = held.shape[0]
    out = weights.new_empty(rows, capacity)
    fp8 = held.dtype == torch.uint8
    # Interpreted, small tests are to have several blocks; float32 has no tensor cores.
    keys = 128 if fp8 and not INTERPRETED else 32
    _scores[(triton.cdiv(capacity, keys), triton.cdiv(rows, _ROWS))](
        query, weights, held, position, out, count, first, rows, heads, capacity, held.stride(0),
        WIDTH=width, FP8=fp8, ROWS=_ROWS, KEYS=keys,
        HEADS=max(16, triton.next_power_of_2(heads)), BLOCK_WIDTH=max(16, width),
        num_warps=4 if fp8 else 8, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def largest(values: Tensor, position: Tensor, count: int, *, first: int = 0) -> Tensor:
    """Positions of each row's `count` largest values, ascending; of equal ones the lower.

    values: (T, capacity) float32, contiguous, no NaN among the first position + first + t + 1 of
    row t, which are those it chooses from. Returns (T, count) int32, -1 after the last if they are
    fewer. Five launches.
    """
    rows, capacity = values.shape
    block = 64 if INTERPRETED else 4096  # small, so that small tests have several
    blocks = triton.cdiv(capacity, block)
    counts = torch.empty(_LEVELS, rows, blocks, 256, dtype=torch.int32, device=values.device)
    state = torch.empty(_LEVELS - 1, rows, 2, dtype=torch.int32, device=values.device)
    selected = torch.empty(rows, count, dtype=torch.int32, device=values.device)
    for level in range(_LEVELS):
        _count[(blocks, rows)](
            values, position, counts, state, first, rows, capacity, blocks,
            COUNT=count, LEVEL=level, BLOCK=block, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    _pick[(blocks, rows)](
        values, position, counts, state, selected, first, rows, capacity, blocks,
        COUNT=count, BLOCK=block, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return selected


def select(query: Tensor, weights: Tensor, held: Tensor, position: Tensor, count: int) -> Tensor:
    """reference.select_keys of the cache as it lies: (T, count) int32, -1 after the last.

    query, weights: as `queries` gives them; row t is at position + t. Scores are held for as many
    rows at once as reference.SCORES allows.
    """
    rows, capacity = len(query), held.shape[0]
    step = max(1, SCORES // capacity)
    parts = []
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = scores(query[part], weights[part], held, position, count=count, first=start)
        parts.append(largest(found, position, count, first=start))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@triton.jit
def _hadamard(x, WIDTH: tl.constexpr, LOG: tl.constexpr):
    """reference.hadamard of (WIDTH,): sums and differences of numbers 1, 2, 4, .. apart."""
    for level in tl.static_range(0, LOG):
        pairs = tl.reshape(x, [WIDTH >> (level + 1), 2, 1 << level])
        one, other = tl.split(tl.permute(pairs, [0, 2, 1]))
        pairs = tl.permute(tl.join(one + other, one - other), [0, 2, 1])
        x = tl.reshape(pairs, [WIDTH])
    return x


@triton.jit
def _partner(j, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other one of the pair that number j is turned with (itself: not turned)."""
    other = j ^ 1 if INTERLEAVED else tl.where(j < HALF, j + HALF, j - HALF)
    return tl.where(j < 2 * HALF, other, j)


@triton.jit
def _rotate(x, other, cos, sin, j, at, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Numbers x turned by the angles of row `at` of the tables; numbers from 2 HALF on stay."""
    if INTERLEAVED:
        pair, sign = j // 2, tl.where(j % 2 == 0, -1.0, 1.0)
    else:
        pair, sign = j % HALF, tl.where(j < HALF, -1.0, 1.0)
    turned = j < 2 * HALF
    c = tl.load(cos + at + pair, mask=turned, other=1.0)
    s = tl.load(sin + at + pair, mask=turned, other=0.0)
    return tl.where(turned, x * c + sign * other * s, x)


@triton.jit
def _append_keys(
    projected, weight, bias, eps, cos, sin, position, held, row_stride, held_stride, table_stride,
    WIDTH: tl.constexpr, LOG: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program: one row's key. Bound by its launch."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.load(position) + t
    j = tl.arange(0, WIDTH)
    k = _partner(j, HALF, INTERLEAVED)
    x = tl.load(projected + t * row_stride + j).to(tl.float32)
    other = tl.load(projected + t * row_stride + k).to(tl.float32)
    mean = tl.sum(x, axis=0) / WIDTH
    off = x - mean
    spread = tl.rsqrt(tl.sum(off * off, axis=0) / WIDTH + eps)
    x = off * spread * tl.load(weight + j) + tl.load(bias + j)
    other = (other - mean) * spread * tl.load(weight + k) + tl.load(bias + k)
    x = _rotate(x, other, cos, sin, j, at * table_stride, HALF, INTERLEAVED)
    if FP8:
        x = tl.div_rn(_hadamard(x, WIDTH, LOG), tl.sqrt_rn(WIDTH + 0.0))
        scale = group_scale(largest_size(x, 0))
        tl.store(held + at * held_stride + j, encode(tl.div_rn(x, scale)))
        place = (held + at * held_stride + WIDTH).to(tl.pointer_type(tl.float32))
        tl.store(place, scale)
    else:
        tl.store(held + at * held_stride + j, x)


@triton.jit
def _queries(
    projected, x, proj, scale, cos, sin, position, query, weights, heads, hidden,
    row_stride, head_stride, x_stride, proj_stride, table_stride,
    WIDTH: tl.constexpr, LOG: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, FP8: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row, its query and its weight proj[head] . x * scale.

    Reads proj once a row, 1.8 MB at full width: bound by memory and latency.
    """
    head, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sums = tl.zeros([CHUNK], tl.float32)
    for start in range(0, hidden, CHUNK):
        i = start + tl.arange(0, CHUNK)
        number = tl.load(x + t * x_stride + i, mask=i < hidden, other=0.0).to(tl.float32)
        sums += number * tl.load(proj + head * proj_stride + i, mask=i < hidden, other=0.0)
    weight = tl.sum(sums, axis=0) * scale

    at = tl.load(position) + t
    j = tl.arange(0, WIDTH)
    source = projected + t * row_stride + head * head_stride
    number = tl.load(source + j).to(tl.float32)
    other = tl.load(source + _partner(j, HALF, INTERLEAVED)).to(tl.float32)
    number = _rotate(number, other, cos, sin, j, at * table_stride, HALF, INTERLEAVED)
    if FP8:
        number = tl.div_rn(_hadamard(number, WIDTH, LOG), tl.sqrt_rn(WIDTH + 0.0))
        unit = group_scale(largest_size(number, 0))
        number = decode(encode(tl.div_rn(number, unit)))
        weight *= unit
    tl.store(weights + t * heads + head, weight)
    place = query + (t * heads + head) * WIDTH + j
    tl.store(place, number.to(query.dtype.element_ty))


@triton.jit(do_not_specialize=["count", "first", "rows"])
def _scores(
    query, weights, held, position, out, count, first, rows, heads, capacity, held_stride,
    WIDTH: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """KEYS keys for ROWS rows: sum over heads of weight * relu(query . key), times the key's scale.

    Each key is read once for all rows of the program: bound by memory.
    """
    row = tl.program_id(1) * ROWS
    end = tl.minimum(row + ROWS, rows)
    at = tl.load(position) + first
    if tl.program_id(0) * KEYS >= at + end:
        return
    if at + end <= count:
        return
    index = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    d, h = tl.arange(0, BLOCK_WIDTH), tl.arange(0, HEADS)
    there = index < capacity
    whole = there[:, None] & (d < WIDTH)[None, :]
    place = held + index.to(tl.int64)[:, None] * held_stride
    if FP8:
        key = decode(tl.load(place + d[None, :], mask=whole, other=0)).to(tl.bfloat16)
        unit = (held + index.to(tl.int64) * held_stride + WIDTH).to(tl.pointer_type(tl.float32))
        units = tl.load(unit, mask=there, other=0.0)
    else:
        key = tl.load(place + d[None, :], mask=whole, other=0.0)
        units = tl.full([KEYS], 1.0, tl.float32)
    key = tl.trans(key)
    for t in range(row, end):
        item = t * heads + h
        inside = (h < heads)[:, None] & (d < WIDTH)[None, :]
        q = tl.load(query + item[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
        dots = dot(q, key, tl.zeros([HEADS, KEYS], tl.float32))
        weight = tl.load(weights + item, mask=h < heads, other=0.0)
        # Not tl.maximum, which would make a NaN 0.
        care = tl.where(dots < 0.0, 0.0, dots) * weight[:, None]
        total = tl.sum(tl.where((h < heads)[:, None], care, 0.0), axis=0) * units
        seen = (index <= at + t) & (total == total)
        total = tl.minimum(tl.maximum(total, -3.4028234663852886e38), 3.4028234663852886e38)
        tl.store(out + t * capacity + index, tl.where(seen, total, float("-inf")), mask=there)


@triton.jit
def _ordered(values):
    """Floats as unsigned numbers of the same order; 0 and -0 are one."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _narrow(counts, blocks, prefix, need, SHIFT: tl.constexpr):
    """The digit of the need-th largest among what has `prefix`, and what is needed of its kind.

    counts: (blocks, 256), of digits, in blocks of values. Returns the prefix with the digit.
    """
    bins = tl.arange(0, _BINS)
    total = tl.zeros([_BINS], tl.int32)
    for start in range(0, blocks, _CHUNK):
        b = start + tl.arange(0, _CHUNK)
        at = counts + b[:, None] * _BINS + bins[None, :]
        total += tl.sum(tl.load(at, mask=(b < blocks)[:, None], other=0), axis=0)
    above = tl.sum(total, axis=0) - tl.cumsum(total, axis=0)
    digit = tl.sum((above + total >= need).to(tl.int32), axis=0) - 1
    need -= tl.sum(tl.where(bins == digit, above, 0), axis=0)
    return prefix | (digit.to(tl.uint32) << SHIFT), need


@triton.jit
def _after(counts, state, blocks_used, t, rows, blocks, need, LEVEL: tl.constexpr):
    """Prefix and need after counting LEVEL digits and narrowing by each; counts of all levels."""
    prefix = tl.zeros([], tl.uint32)
    if LEVEL > 1:
        before = state + ((LEVEL - 2) * rows + t) * 2
        prefix = tl.load(before).to(tl.uint32, bitcast=True)
        need = tl.load(before + 1)
    if LEVEL > 0:
        at = counts + ((LEVEL - 1) * rows + t) * blocks * _BINS
        prefix, need = _narrow(at, blocks_used, prefix, need, 32 - 8 * LEVEL)
    return prefix, need


@triton.jit(do_not_specialize=["first", "rows", "blocks"])
def _count(
    values, position, counts, state, first, rows, capacity, blocks,
    COUNT: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count digit LEVEL (0: the highest eight bits) of one block of what the digits before leave.

    counts: (4, rows, blocks, 256) int32. state: (3, rows, 2), prefix and need after each digit but
    the last, which the first block writes for the next launch.
    """
    block, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(position) + first + tl.program_id(1) + 1
    if length <= COUNT:
        return
    if block * BLOCK >= length:
        return
    used = tl.cdiv(length, BLOCK)
    prefix, need = _after(counts, state, used, t, rows, blocks, COUNT, LEVEL)
    if LEVEL > 0 and block == 0:
        after = state + ((LEVEL - 1) * rows + t) * 2
        tl.store(after, prefix.to(tl.int32, bitcast=True))
        tl.store(after + 1, need)
    n = block * BLOCK + tl.arange(0, BLOCK)
    bits = _ordered(tl.load(values + t * capacity + n, mask=n < length, other=0.0))
    left = n < length
    if LEVEL > 0:
        left = left & ((bits ^ prefix) >> (32 - 8 * LEVEL) == 0)
    digit = (bits >> (24 - 8 * LEVEL)) & 0xFF
    found = tl.histogram(digit.to(tl.int32), _BINS, mask=left)
    place = counts + ((LEVEL * rows + t) * blocks + block) * _BINS
    tl.store(place + tl.arange(0, _BINS), found)


@triton.jit(do_not_specialize=["first", "rows", "blocks"])
def _pick(
    values, position, counts, state, selected, first, rows, capacity, blocks,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the positions of one block's chosen values after those of the blocks before it."""
    block, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(position) + first + tl.program_id(1) + 1
    out = selected + t * COUNT
    if length <= COUNT:
        for start in range(block * BLOCK, COUNT, blocks * BLOCK):
            n = start + tl.arange(0, BLOCK)
            tl.store(out + n, tl.where(n < length, n, -1), mask=n < COUNT)
        return
    if block * BLOCK >= length:
        return
    used = tl.cdiv(length, BLOCK)
    last, room = _after(counts, state, used, t, rows, blocks, COUNT, 4)
    # What the blocks before hold: more than the last one, and equal to it.
    bins = tl.arange(0, _BINS)
    more = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    for level in tl.static_range(0, 4):
        digit = ((last >> (24 - 8 * level)) & 0xFF).to(tl.int32)
        for start in range(0, block, _CHUNK):
            b = start + tl.arange(0, _CHUNK)
            at = counts + ((level * rows + t) * blocks + b[:, None]) * _BINS + bins[None, :]
            found = tl.load(at, mask=(b < block)[:, None], other=0)
            more += tl.sum(tl.where((bins > digit)[None, :], found, 0))
            if level == 3:
                equal += tl.sum(tl.where((bins == digit)[None, :], found, 0))
    n = block * BLOCK + tl.arange(0, BLOCK)
    bits = _ordered(tl.load(values + t * capacity + n, mask=n < length, other=0.0))
    same = ((bits == last) & (n < length)).to(tl.int32)
    rank = equal + tl.cumsum(same, axis=0)  # among equals, from 1
    chosen = ((bits > last) & (n < length)) | ((same > 0) & (rank <= room))
    slot = more + tl.minimum(equal, room) + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(out + slot, n, mask=chosen)
