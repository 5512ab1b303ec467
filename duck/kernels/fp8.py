"""The number formats of DeepSeek's fp8 checkpoints, in numpy: e4m3 codes and their block scales.

A weight is stored as one e4m3 code per element and one scale per block of rows and columns
(config key `quantization_config.weight_block_size`, 128 x 128 in the official files):

    W[i, j] = decode(code[i, j]) * scale[i // rows, j // columns]

The last block of a ragged dimension is simply shorter. e4m3 here is the `fn` kind: bias 7, largest
448, no infinity, codes 0x7F and 0xFF are NaN, subnormal step 2**-9. No x86 CPU knows it, so
decoding is a table of 256 values. Imports no torch: ducks use this.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MAX = 448.0
"""The largest e4m3 value (code 0x7E)."""


def _table() -> Floats:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(
        exponent == 0,
        mantissa * 2.0**-9,
        (8 + mantissa) * 2.0 ** (exponent - 10.0),  # (1 + m/8) * 2^(e-7)
    )
    size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


E4M3 = _table()
"""The value of every e4m3 code: (256,) float32."""

_SHIFTED = np.int32(0x87F00000 - 2**32)  # the sign, and the 7 bits that end up below its 4 copies

E8M0 = np.append(2.0 ** np.arange(-127, 128), np.nan).astype(np.float32)
"""The value 2**(code - 127) of every e8m0 code, 255 being NaN: (256,) float32."""


def decode(codes: Codes) -> Floats:
    """The values of e4m3 codes, any shape; NaN codes become NaN."""
    values: Floats = E4M3[codes]
    return values


def has_nan(codes: Codes) -> bool:
    """Whether any code is one of the two NaN codes."""
    return codes.size > 0 and bool((codes & 0x7F).max() == 0x7F)


def encode(values: npt.NDArray[np.floating]) -> Codes:
    """The nearest e4m3 codes, ties to the even one; beyond 448 saturates. Values are finite."""
    size = np.minimum(np.abs(values), MAX).astype(np.float32)
    bits = size.view(np.uint32)
    # Round to 3 mantissa bits, ties to even, and move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    code = np.where(size < 2.0**-6, np.rint(size * 2.0**9), normal)
    codes: Codes = (code + np.where(np.signbit(values), 128, 0)).astype(np.uint8)
    return codes


def decode_e8m0(codes: Codes) -> Floats:
    """The values of e8m0 codes, any shape; 255 becomes NaN."""
    values: Floats = E8M0[codes]
    return values


def spread(scales: Floats, edge: int, first: int, count: int, axis: int) -> Floats:
    """One scale per element instead of one per block, along one axis.

    Returns the scales of elements `first` .. `first + count - 1`, whose blocks are `edge` long and
    start at element 0: a range may start inside a block.
    """
    return np.take(scales, np.arange(first, first + count) // edge, axis=axis)


def dequantise(
    codes: Codes, scales: Floats, block: tuple[int, int], *, row: int = 0, column: int = 0
) -> Floats:
    """The float32 weights of a part of a matrix.

    codes: (rows, columns), whose first element is element (row, column) of the whole matrix; none
    is NaN (`has_nan`).
    scales: of the whole matrix, (ceil(all rows / block[0]), ceil(all columns / block[1])).
    """
    rows, columns = codes.shape
    values = np.empty((rows, columns), np.float32)
    for start in range(-(row % block[0]), rows, block[0]):
        part = slice(max(start, 0), start + block[0])
        scale = spread(scales[(row + start) // block[0]], block[1], column, columns, axis=0)
        # Sign, exponent and mantissa shifted to their places in a float32 give the value times
        # 2**-120, subnormals too: as exact as the table and three times as fast.
        bits = codes[part].astype(np.int32)
        bits <<= 24
        bits >>= 4
        bits &= _SHIFTED
        np.multiply(bits.view(np.float32), np.float32(2.0**120), out=values[part])
        values[part] *= scale
    return values


def quantise(
    weights: Floats, block: tuple[int, int], *, ue8m0: bool = False
) -> tuple[Codes, Floats]:
    """Codes and scales of a matrix; each block's largest size maps to 448.

    ue8m0: round scales up to powers of two, as the V3.1 and V3.2 checkpoints have them. The scale
    of a block of zeros is 1.
    """
    rows, columns = weights.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    padded = np.zeros((high * block[0], wide * block[1]), np.float32)
    padded[:rows, :columns] = np.abs(weights)
    largest = padded.reshape(high, block[0], wide, block[1]).max(axis=(1, 3))
    scales = np.where(largest > 0, largest / np.float32(MAX), np.float32(1)).astype(np.float32)
    if ue8m0:
        fraction, exponent = np.frexp(scales)  # scale = fraction * 2^exponent, fraction in [.5, 1)
        scales = np.ldexp(np.float32(1), np.where(fraction == 0.5, exponent - 1, exponent))
    wide_scales = spread(spread(scales, block[0], 0, rows, 0), block[1], 0, columns, 1)
    return encode(weights / wide_scales), scales
