"""The device's arithmetic in plain torch: the truth that faster kernels are compared with.

Precision follows DeepSeek's own code where it decides results: norms, rotations, softmax and sums
run in float32 whatever the dtype of the model; matrices are multiplied in the dtype they are stored
in. Rows are tokens; weights are (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from duck.kernels.reference import FP8_GROUP, SCORES

_E4M3_MAX = 448.0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum x + change, and its rms_norm: both in x's dtype.

    x: (T, hidden). change: (T, hidden) float32; the sum is float32, rounded once.
    """
    x = (x.float() + change).to(x.dtype)
    return x, rms_norm(x, weight, eps)


def combine(x: Tensor, partials: Tensor, shared: Tensor | None = None) -> Tensor:
    """Return x + (partials[0] + partials[1] + ... + shared), in this order, in x's dtype.

    x: (T, hidden). partials: (ducks, T, hidden) float32 or bfloat16. shared: (T, hidden) float32.
    All sums are float32, rounded once.
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial
    if shared is not None:
        total = total + shared
    return (x.float() + total).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The mean taken off, scaled to a variance of 1, then weight and bias: float32."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2j], x[2j+1]) of the last axis by their angles, in float32.

    cos, sin: (..., width / 2), broadcast against x. Returns x's dtype.
    """
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def rotate_at(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """`rotate` rows of heads x (T, heads, width), the first row at `position` (1,) int32.

    cos, sin: (positions, width / 2) float32, of all positions from 0 on.
    """
    first = int(position)
    last = first + x.shape[0]
    return rotate(x, cos[first:last, None], sin[first:last, None])


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate`, of the pairs (x[j], x[j + width / 2]): the indexer's way."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """The last axis, a power of two wide, times the Sylvester-Hadamard matrix / sqrt(width).

    It spreads single large numbers over the row before that is rounded to fp8; products of two rows
    stay what they were. Additions only, in an order of its own: a row's bits depend on the row.
    """
    width = x.shape[-1]
    wide, step = x.float(), 1
    while step < width:
        first, second = wide.reshape(*x.shape[:-1], -1, 2, step).unbind(-2)
        wide = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        step *= 2
    return wide / math.sqrt(width)


def quantise_groups(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """e4m3 codes of the last axis, and one scale for each `group` numbers of it.

    A scale is the smallest power of two that brings the group's largest size to 448 or below; sizes
    below 1e-4 count as that; one NaN makes all of its group NaN. Source: act_quant of
    DeepSeek-V3.2-Exp's inference code, with ue8m0.

    Returns (..., width) float8_e4m3fn and (..., ceil(width / group)) float32.
    """
    width = x.shape[-1]
    padded = F.pad(x.float(), (0, -width % group))
    grouped = padded.reshape(*x.shape[:-1], -1, group)
    least = grouped.abs().amax(dim=-1).clamp_min(1e-4) / _E4M3_MAX
    # Up to the next power of two on the bits; the logarithm of an exact one may come out above.
    bits = (least.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scales = torch.where(least.isnan(), least, bits.view(torch.float32))
    codes = (grouped / scales[..., None]).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :width].contiguous(), scales


def dequantise_groups(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """The numbers behind `quantise_groups`: float32, exact."""
    spread = scales.repeat_interleave(group, dim=-1)
    return codes.float() * spread[..., : codes.shape[-1]]


def pack_fp8(rows: Tensor, coded: int) -> Tensor:
    """Rows of numbers as the fp8 cache holds them: bytes.

    The first `coded` numbers in e4m3, then a float32 scale for each 128 of them, then the rest of
    the row in bf16. With 512 and 64 these are the 656 bytes that FlashMLA reads.
    """
    codes, scales = quantise_groups(rows[..., :coded], FP8_GROUP)
    parts = [codes.view(torch.uint8), scales.view(torch.uint8)]
    if coded < rows.shape[-1]:
        parts.append(rows[..., coded:].bfloat16().contiguous().view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_fp8(held: Tensor, coded: int, dtype: torch.dtype) -> Tensor:
    """The reverse of `pack_fp8`: (..., bytes) to (..., numbers)."""
    end = coded + 4 * -(-coded // FP8_GROUP)
    codes = held[..., :coded].view(torch.float8_e4m3fn)
    scales = _aligned(held[..., coded:end]).view(torch.float32)
    values = dequantise_groups(codes, scales, FP8_GROUP).to(dtype)
    if held.shape[-1] == end:
        return values
    plain = _aligned(held[..., end:]).view(torch.bfloat16)
    return torch.cat((values, plain.to(dtype)), dim=-1)


def _aligned(part: Tensor) -> Tensor:
    """A copy that begins where wider numbers may begin; a part of a row need not."""
    return part.clone(memory_format=torch.contiguous_format)


def append_latents(
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    held: Tensor,
    position: Tensor,
) -> None:
    """Norm, rotate and round rows of kv_a_proj_with_mqa and write them to a layer's cache.

    kv: (T, r + dr), of which the first r are normed (`weight`: (r,) float32) and the last dr
    rotated, and both rounded to kv's dtype. cos, sin: (positions, dr / 2) float32. held: (capacity,
    r + dr) in a float dtype, or (capacity, bytes) uint8 as `pack_fp8` has it. position: (1,) int32,
    where the first row goes; the rest follow it.
    """
    rank, first = weight.shape[0], int(position)
    last = first + kv.shape[0]
    c = rms_norm(kv[:, :rank], weight, eps)
    k_pe = rotate(kv[:, rank:], cos[first:last], sin[first:last])
    rows = torch.cat((c, k_pe), dim=-1)
    held[first:last] = pack_fp8(rows, rank) if held.dtype == torch.uint8 else rows


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """How much each row cares for each key: sum over heads of weight * relu(q . key).

    q: (T, heads, d); weights: (T, heads), negative ones too; keys: (S, d), all float32. Returns
    (T, S). Rounded to fp8, q and keys are e4m3 times a power of two, and so this is the arithmetic
    as served. Source: DeepSeek-V3.2-Exp report, equation 1.
    """
    dots = torch.einsum("thd,sd->ths", q, keys).relu_()
    return torch.einsum("th,ths->ts", weights, dots)


def select_keys(q: Tensor, weights: Tensor, keys: Tensor, position: int, count: int) -> Tensor:
    """The `count` keys with the highest index_scores of each row, positions ascending.

    Row t is at `position` + t, sees the keys up to its own, and has at least `count` of them; keys:
    (S, d) with S = position + T. Of equal scores the lower position wins. Returns (T, count) int64.
    """
    rows, heads = weights.shape
    chosen = torch.empty(rows, count, dtype=torch.int64, device=q.device)
    for start, stop in _row_blocks(rows, heads * len(keys)):
        seen = keys[: position + stop]
        scores = index_scores(q[start:stop], weights[start:stop], seen)
        # What is not a number must not break the count of those chosen below.
        scores = scores.nan_to_num(nan=float("-inf"))
        scores.masked_fill_(_later(scores, position + start), float("-inf"))
        chosen[start:stop] = _largest(scores, count)
    return chosen


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices (T, count), ascending, of the largest values; of equal ones the first. No NaN."""
    least = values.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, equal = values > least, values == least
    room = count - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    return chosen.nonzero()[:, 1].view(len(values), count)


def attend_absorbed(
    q_nope: Tensor,
    q_pe: Tensor,
    latent: Tensor,
    wk: Tensor,
    wv: Tensor,
    scale: float,
    position: int,
) -> Tensor:
    """MLA with the key and value projections moved to the query's side; for few rows.

    A cached token costs r + dr numbers instead of heads * (dn + dv). Source: DeepSeek-V2 report
    (arXiv 2405.04434), 2.1.2.

    q_nope: (T, heads, dn) and q_pe: (T, heads, dr), rotated; row t is at `position` + t.
    latent: (S, r + dr), normed c and rotated k_pe of positions 0..S-1, S = position + T.
    wk: (heads, dn, r); wv: (heads, dv, r). Returns (T, heads, dv) in q_nope's dtype.
    """
    rank = wk.shape[2]
    folded = torch.einsum("thd,hdr->thr", q_nope, wk)
    query = torch.cat((folded, q_pe), dim=-1).float()
    keys = latent.float()
    out = torch.empty_like(folded)
    for start, stop in _row_blocks(query.shape[0], query.shape[1] * keys.shape[0]):
        seen = keys[: position + stop]
        scores = torch.einsum("thr,sr->hts", query[start:stop], seen) * scale
        weights = _causal_softmax(scores, position + start)
        out[start:stop] = torch.einsum("hts,sr->thr", weights, seen[:, :rank]).to(out.dtype)
    return torch.einsum("thr,hdr->thd", out, wv)


def attend_selected(
    q_nope: Tensor,
    q_pe: Tensor,
    gather: Callable[[Tensor], Tensor],
    selected: Tensor,
    wk: Tensor,
    wv: Tensor,
    scale: float,
) -> Tensor:
    """`attend_absorbed` of every row to keys of its own: sparse attention.

    selected: (T, K) positions, each row's own or before; -1 stands for none. gather: brings their
    latents, from (rows, K) positions (rows, K, r + dr).
    """
    rank, heads, keys = wk.shape[2], wk.shape[0], selected.shape[1]
    folded = torch.einsum("thd,hdr->thr", q_nope, wk)
    query = torch.cat((folded, q_pe), dim=-1).float()
    out = torch.empty_like(folded)
    per_row = keys * max(heads, query.shape[-1])  # its scores, or the latents brought for it
    for start, stop in _row_blocks(query.shape[0], per_row):
        ids = selected[start:stop]
        seen = gather(ids.clamp_min(0)).float()
        scores = torch.einsum("thr,tsr->ths", query[start:stop], seen) * scale
        scores.masked_fill_((ids < 0)[:, None], float("-inf"))
        weights = scores.softmax(dim=-1)
        out[start:stop] = torch.einsum("ths,tsr->thr", weights, seen[..., :rank]).to(out.dtype)
    return torch.einsum("thr,hdr->thd", out, wv)


def attend_naive(
    q_nope: Tensor,
    q_pe: Tensor,
    latent: Tensor,
    wk: Tensor,
    wv: Tensor,
    scale: float,
    position: int,
) -> Tensor:
    """MLA with keys and values written out per head, for many rows; else as `attend_absorbed`."""
    rank = wk.shape[2]
    c, k_pe = latent[:, :rank], latent[:, rank:]
    k_nope = torch.einsum("sr,hdr->hsd", c, wk).float()
    value = torch.einsum("sr,hdr->hsd", c, wv).float()
    key = torch.cat((k_nope, k_pe.float().expand(k_nope.shape[0], -1, -1)), dim=-1)
    query = torch.cat((q_nope, q_pe), dim=-1).float().transpose(0, 1)
    out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], wv.shape[1])
    for start, stop in _row_blocks(query.shape[1], query.shape[0] * key.shape[1]):
        end = position + stop
        scores = query[:, start:stop] @ key[:, :end].transpose(1, 2) * scale
        weights = _causal_softmax(scores, position + start)
        out[start:stop] = (weights @ value[:, :end]).transpose(0, 1).to(out.dtype)
    return out


def _row_blocks(rows: int, scores_per_row: int) -> list[tuple[int, int]]:
    step = max(1, SCORES // scores_per_row)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _causal_softmax(scores: Tensor, position: int) -> Tensor:
    """Softmax over keys. scores: (heads, T, S) float32; row t sees keys 0..position + t."""
    if scores.shape[1] > 1:
        scores = scores.masked_fill(_later(scores, position), float("-inf"))
    return scores.softmax(dim=-1)


def _later(scores: Tensor, position: int) -> Tensor:
    """(T, S) of scores (..., T, S): whether key s comes after row t, which is at position + t."""
    rows, keys = scores.shape[-2:]
    own = torch.arange(position, position + rows, device=scores.device)
    return torch.arange(keys, device=scores.device) > own[:, None]
