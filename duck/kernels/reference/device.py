"""The device's arithmetic in plain torch: the truth that faster kernels are compared with.

Precision follows DeepSeek's own code where it decides results: norms, rotations, softmax and sums
run in float32 whatever the dtype of the model; matrices are multiplied in the dtype they are stored
in. Rows are tokens; weights are (out, in).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 1 << 24
"""Attention scores held at once (64 MiB of float32); longer prompts go in blocks of rows."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last axis, in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * (wide * scale)).to(x.dtype)


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T as float32, on a GPU without a rounding to bf16 in between."""
    if weight.dtype == torch.float32:
        return F.linear(x.float(), weight)
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x, weight).float()


def swiglu_f32(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x). x: (rows, hidden). Returns (rows, hidden) float32."""
    inner = F.silu(linear_f32(x, gate)) * linear_f32(x, up)
    return linear_f32(inner.to(x.dtype), down)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[2j], x[2j+1]) of the last axis by their angles, in float32.

    cos, sin: (..., width / 2), broadcast against x. Returns x's dtype.
    """
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


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
    step = max(1, _SCORES // scores_per_row)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _causal_softmax(scores: Tensor, position: int) -> Tensor:
    """Softmax over keys. scores: (heads, T, S) float32; row t sees keys 0..position + t."""
    rows, keys = scores.shape[1:]
    if rows > 1:
        own = torch.arange(position, position + rows, device=scores.device)
        later = torch.arange(keys, device=scores.device) > own[:, None]
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(dim=-1)
