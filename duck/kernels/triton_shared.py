"""What several Triton kernels share: products, e4m3 codes, and what the interpreter gets wrong.

Under TRITON_INTERPRET=1 (set before this is imported) kernels run in numpy, which tests them
without a GPU. The interpreter holds bfloat16 as bare 16-bit numbers and multiplies those in tl.dot,
and reads the two NaN codes of e4m3 as +-480; `dot` and `decode` go round that, where the compiled
kernel has nothing more to do. Other arithmetic in bfloat16 is for nobody: widen first.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; bfloat16 operands' products are exact, float32 ones are not cut."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def decode(codes):
    """The float32 values of e4m3 codes (uint8)."""
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if INTERPRETED:
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), values)
    return values


@triton.jit
def encode(values):
    """e4m3 codes (uint8) of float32 values of at most 448 in size, nearest, ties to even.

    On the bits, which the interpreter's conversion does not round. What is not finite becomes NaN.
    """
    bits = values.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Round to 3 bits after the leading one and take 127 - 7 off the exponent.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 in steps of 2^-9, which is the last bit of numbers about 2^14.
    small = ((tl.abs(values) + 16384.0) - 16384.0) * 512.0
    code = tl.where(size < (121 << 23), small.to(tl.int32), normal)
    return (tl.where(size >= (255 << 23), 0x7F, code) | sign).to(tl.uint8)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 values in another dtype, nearest, ties to even: the interpreter cuts them off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, near, bits).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def group_scale(largest):
    """The power of two that brings a group's largest size to 448 or below: float32.

    As duck.kernels.reference.device.quantise_groups; a group of which one is NaN gets scale 0,
    which makes all of it NaN.
    """
    least = tl.div_rn(tl.where(largest < 1e-4, 1e-4, largest), 448.0)
    bits = (least.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    bits = tl.where(least == least, bits, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest_size(values, AXIS: tl.constexpr):
    """The largest |value| along an axis, NaN if one of them is."""
    spoiled = tl.max((values != values).to(tl.int32), axis=AXIS)
    return tl.where(spoiled > 0, float("nan"), tl.max(tl.abs(values), axis=AXIS))
