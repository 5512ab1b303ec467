"""Attention and the indexer on one layer's cache as it lies in memory: what the model calls.

Rows are at `position`, a (1,) int32 tensor, and after. A cache is `held`: (capacity, width), rows
of numbers in a float dtype, or of bytes as `pack_fp8` has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duck.kernels.reference.device import (
    attend_absorbed,
    attend_selected,
    hadamard,
    layer_norm,
    pack_fp8,
    rotate,
    rotate_halves,
    select_keys,
    unpack_fp8,
)


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
    """MLA of rows to every token up to their own, or to those selected for each.

    q_nope: (T, heads, dn) and q_pe: (T, heads, dr), rotated. held: of latents, r + dr numbers.
    wk: (heads, dn, r); wv: (heads, dv, r). selected: (T, K) int32, -1 after the last of a row.
    Returns (T, heads, dv) in q_nope's dtype, in which the cache's numbers are computed with, too.
    """
    rank, first = wk.shape[2], int(position)

    def numbers(rows: Tensor) -> Tensor:
        if held.dtype == torch.uint8:
            return unpack_fp8(rows, rank, q_nope.dtype)
        return rows.to(q_nope.dtype)

    if selected is None:
        seen = numbers(held[: first + len(q_nope)])
        return attend_absorbed(q_nope, q_pe, seen, wk, wv, scale, first)
    return attend_selected(
        q_nope, q_pe, lambda ids: numbers(held[ids]), selected.long(), wk, wv, scale
    )


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
    """Norm, rotate and round the indexer's keys of T rows and write them into their cache.

    projected: (T, d), in any float dtype. norm: weight and bias of a layer norm, (d,) float32.
    cos, sin: (positions, dr / 2) float32, of all positions from 0 on. held: of keys, d numbers;
    before they are rounded to fp8 they are turned by Hadamard's matrix.
    interleaved: whether neighbours are rotated (GLM) or halves.
    """
    first = int(position)
    last = first + len(projected)
    key = layer_norm(projected, *norm, eps)
    fp8 = held.dtype == torch.uint8
    key = _turn(key, cos[first:last], sin[first:last], fp8=fp8, interleaved=interleaved)
    held[first:last] = pack_fp8(key, key.shape[1]) if fp8 else key


def index_queries(
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
    """The indexer's queries of T rows, rounded as keys are held, and the weights of their heads.

    projected: (T, heads, d). x: (T, hidden), normed. proj: (heads, hidden) float32; scale: what
    weights are multiplied by. cos, sin, interleaved: as `append_keys` has them. Returns what
    `select` of the same implementation takes: here (T, heads, d) and (T, heads), float32.
    """
    first, width = int(position), projected.shape[2]
    last = first + len(projected)
    turns = cos[first:last, None], sin[first:last, None]
    query = _turn(projected.float(), *turns, fp8=fp8, interleaved=interleaved)
    if fp8:
        query = unpack_fp8(pack_fp8(query, width), width, torch.float32)
    return query, torch.nn.functional.linear(x.float(), proj) * scale


def select(query: Tensor, weights: Tensor, held: Tensor, position: Tensor, count: int) -> Tensor:
    """The `count` tokens with the highest scores of each row: (T, count) int32, ascending.

    query, weights: of `index_queries`. held: of keys. Of equal scores the lower position wins. Rows
    that see fewer tokens take all; -1 stands after the last.
    """
    rows, width, first = len(query), query.shape[2], int(position)
    keys = held[: first + rows]
    if held.dtype == torch.uint8:
        keys = unpack_fp8(keys, width, torch.float32)
    chosen = torch.full((rows, count), -1, dtype=torch.int32, device=held.device)
    few = min(rows, max(0, count - 1 - first))
    for row in range(few):
        chosen[row, : first + row + 1] = torch.arange(first + row + 1, device=held.device)
    if few < rows:
        chosen[few:] = select_keys(query[few:], weights[few:], keys, first + few, count)
    return chosen


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, fp8: bool, interleaved: bool) -> Tensor:
    """Rotate the first numbers of each head; the main attention rotates its last."""
    turned = 2 * cos.shape[-1]
    first = (rotate if interleaved else rotate_halves)(x[..., :turned], cos, sin)
    x = torch.cat((first, x[..., turned:]), dim=-1)
    return hadamard(x) if fp8 else x
