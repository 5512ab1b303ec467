"""Matrices as the device holds them: plain tensors, or the fp8 bytes of the checkpoint.

Half the bytes of bf16 to hold and to read, and nothing is rounded: a product uses the published
codes and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fp8Matrix:
    """W[i, j] = codes[i, j] * scales[i // block[0], j // block[1]].

    codes: (out, in) float8_e4m3fn, contiguous, none of them NaN. scales: float32,
    (ceil(out / block[0]), ceil(in / block[1])). block: rows and columns that share a scale.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def rows(self, start: int, stop: int) -> Fp8Matrix:
        """Rows start .. stop - 1 as a view; both are multiples of block[0], or the end."""
        edge = self.block[0]
        assert start % edge == 0
        assert stop % edge == 0 or stop == self.shape[0]
        scales = self.scales[start // edge : -(-stop // edge)]
        return Fp8Matrix(self.codes[start:stop], scales, self.block)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers: exact in float32, and in bf16 where scales are powers of two."""
        spread = self.scales.repeat_interleave(self.block[0], 0)[: self.shape[0]]
        spread = spread.repeat_interleave(self.block[1], 1)[:, : self.shape[1]]
        return (self.codes.float() * spread).to(dtype)

    @classmethod
    def stacked(cls, parts: Sequence[Matrix]) -> Fp8Matrix | None:
        """All parts' rows in one matrix; None if one is no fp8, or a block would span two."""
        fp8 = [part for part in parts if isinstance(part, Fp8Matrix)]
        if len(fp8) < len(parts) or any(part.shape[0] % part.block[0] for part in fp8[:-1]):
            return None
        codes = torch.cat([part.codes.view(torch.uint8) for part in fp8])
        scales = torch.cat([part.scales for part in fp8])
        return cls(codes.view(torch.float8_e4m3fn), scales, fp8[0].block)


Matrix: TypeAlias = Tensor | Fp8Matrix
