"""e4m3 codes and their scales, as kernels in Triton read and write them."""

from __future__ import annotations

import triton
import triton.language as tl

from duck.kernels import common_triton

_INTERPRETED = tl.constexpr(common_triton.INTERPRETED)


@triton.jit
def decode(codes):
    """The float32 values of e4m3 codes (uint8)."""
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if _INTERPRETED:  # it reads the two NaN codes as +-480 (as of Triton 3.9)
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
def group_scale(largest):
    """The power of two that brings a group's largest size to 448 or below: float32.

    As duck.kernels.reference.device.quantise_groups has it; NaN if that size is NaN.
    """
    least = tl.div_rn(tl.where(largest < 1e-4, 1e-4, largest), 448.0)
    bits = (least.to(tl.uint32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    bits = tl.where(least == least, bits, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def largest_size(values, AXIS: tl.constexpr):
    """The largest |value| along an axis, NaN if one of them is."""
    spoiled = tl.max((values != values).to(tl.int32), axis=AXIS)
    return tl.where(spoiled > 0, float("nan"), tl.max(tl.abs(values), axis=AXIS))
