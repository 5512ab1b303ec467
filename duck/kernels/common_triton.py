"""What kernels in Triton have in common.

Under TRITON_INTERPRET=1, read when the kernels' modules are imported, they run in Python on the
CPU's memory: that is how they are tested without a GPU. Two things that the interpreter gets wrong
(as of Triton 3.9) are helped here: it multiplies bf16 as if its bits were whole numbers, so there
the operands of tl.dot are widened to float32, which is exact (`dot_dtype`); and it cuts float32 off
to bf16 where GPUs round (`rounded`).

Kernels are launched with enable_fp_fusion=False: products are rounded before they are added, as in
the reference. Triton's default differs from version to version.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CUTS = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in a dtype: nearest, ties to even."""
    if _CUTS and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, near, bits).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def dot(a, b, total):
    """A total + a @ b, all of it float32 but for operands in bf16, whose products are exact."""
    if _CUTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def dot_dtype(x: Tensor) -> tl.dtype:
    """What both operands of tl.dot are brought to, for rows x: exact for e4m3 and for x."""
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16


def is_supported(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device: fp8 needs compute capability 8.9."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 9)
    return INTERPRETED and device.type == "cpu"
