"""Products with a matrix that is held as a plain tensor or as fp8: plain torch.

A plain matrix is multiplied in the dtype it is stored in. An fp8 one is exact: its numbers, as
published, times the rows in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from duck.kernels.matrix import Fp8Matrix, Matrix
from duck.kernels.reference.device import add_norm

_AT_ONCE = 1 << 22
"""Numbers of an fp8 matrix written out at once (16 MiB of float32)."""


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """Return x @ weight.T, in x's dtype. x: (T, in); weight: (out, in)."""
    if isinstance(weight, Fp8Matrix):
        return linear_f32(x, weight).to(x.dtype)
    return F.linear(x, weight)


def linear_f32(x: Tensor, weight: Matrix) -> Tensor:
    """Return x @ weight.T as float32, on a GPU without a rounding to bf16 in between."""
    if isinstance(weight, Fp8Matrix):
        return _linear_fp8(x, weight)
    if weight.dtype == torch.float32:
        return F.linear(x.float(), weight)
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x, weight).float()


def _linear_fp8(x: Tensor, weight: Fp8Matrix) -> Tensor:
    """In float32, whole blocks of rows at a time."""
    rows, columns = weight.shape
    edge = weight.block[0]
    step = max(1, _AT_ONCE // (columns * edge)) * edge
    wide = x.float()
    out = wide.new_empty(len(x), rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[:, start:stop] = F.linear(wide, weight.rows(start, stop).dequantised())
    return out


def project_add_norm(
    x: Tensor, inner: Tensor, weight: Matrix, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_norm` of x (T, out) and inner @ weight.T. inner: (T, in); norm: (out,) float32."""
    return add_norm(x, linear_f32(inner, weight), norm, eps)


def swiglu_f32(x: Tensor, gate_up: Sequence[Matrix], down: Matrix) -> Tensor:
    """down(silu(gate x) * up x): (T, hidden) to (T, hidden) float32.

    gate_up: the two matrices, or one that holds the rows of both.
    """
    both = [linear_f32(x, part) for part in gate_up]
    gate, up = both if len(both) == 2 else both[0].chunk(2, dim=-1)
    return linear_f32((F.silu(gate) * up).to(x.dtype), down)
