"""The sum of the ducks' rows, the shared expert and the residual, in Triton.

    out = round(x + (partials[0] + partials[1] + ... + shared))

Additions only, each rounded to float32, in this order: the bits are those of the reference, and of
adding the partial sums on the host. Bound by reading the partial sums, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duck.kernels.common_triton import rounded

_BLOCK = 256
"""Numbers of a program: few, since one row of a wide model makes no more than 28 programs."""


@triton.jit
def _combine(
    x,
    partials,
    shared,
    out,
    count,
    stride,
    DUCKS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tiles of count). x, shared, out: (count,). partials: (DUCKS, count), rows
    `stride` apart.

    The loop is unrolled, so that all its loads are under way at once.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    place = partials + at
    total = tl.load(place, mask=inside).to(tl.float32)
    for _ in tl.static_range(1, DUCKS):
        place += stride
        total += tl.load(place, mask=inside).to(tl.float32)
    if SHARED:
        total += tl.load(shared + at, mask=inside)
    total += tl.load(x + at, mask=inside).to(tl.float32)
    tl.store(out + at, rounded(total, out.dtype.element_ty), mask=inside)


def combine(x: Tensor, partials: Tensor, shared: Tensor | None = None) -> Tensor:
    """As reference.device.combine. Each duck's partial sums are contiguous, and so is the rest.

    The partial sums may lie in the host's memory, if it is pinned: they are read once, through the
    bus.
    """
    assert x.is_contiguous()
    assert partials[0].is_contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    if count:
        _combine[(triton.cdiv(count, _BLOCK),)](
            x,
            partials,
            x if shared is None else shared.contiguous(),
            out,
            count,
            partials.stride(0),
            DUCKS=partials.shape[0],
            SHARED=shared is not None,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,
        )
    return out
