"""What layers are made of: parameters brought from checkpoint to device, the norm, the MLP."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from torch import Tensor

from duck.kernels.device import REFERENCE, Kernels
from duck.kernels.matrix import Fp8Matrix, Matrix
from duck.model.tally import Tally
from duck.model.tensors import Kind
from duck.model.weights import Checkpoint

_PART = 1 << 20
"""Numbers converted at once (4 MiB of float32): the largest tensors are 900 times as big."""


class Loader:
    """Brings tensors to the device in the dtype wanted. Close it after use.

    kernels: what computes with them. fp8_kept: fp8 linears stay so; else they are dequantised.
    progress: called with the bytes of every part read. `tally` counts what was loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels = REFERENCE,
        fp8_kept: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.device, self.dtype, self.kernels = device, dtype, kernels
        self.tally = Tally()
        self._checkpoint, self._progress, self._fp8_kept = checkpoint, progress, fp8_kept
        # Threads read ahead of each other and share the conversion; numpy lets go of the GIL.
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "load")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def matrix(self, name: str) -> Matrix:
        """`<name>.weight`, (out, in): fp8 if it is and stays so, else in the model's dtype."""
        name = f"{name}.weight"
        if self._fp8_kept and self._checkpoint.info(name).dtype == "F8_E4M3":
            return self._fp8(name)
        return self._tensor("linear", name, self.dtype)

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The same as a plain tensor, in the model's dtype unless another is asked for."""
        return self._tensor("linear", f"{name}.weight", dtype or self.dtype)

    def embedding(self) -> Tensor:
        """model.embed_tokens, (vocab, hidden), in the model's dtype."""
        return self._tensor("embedding", "model.embed_tokens.weight", self.dtype)

    def vector(self, name: str) -> Tensor:
        """A tensor whose arithmetic is float32 in every mode: norm weights, router, bias."""
        return self._tensor("vector", name, torch.float32)

    def _tensor(self, kind: Kind, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._filled(name, dtype, self._checkpoint.f32)
        self._count(kind, name, str(dtype).removeprefix("torch."), tensor.nbytes)
        return tensor

    def _fp8(self, name: str) -> Fp8Matrix:
        block = self._checkpoint.block
        assert block is not None
        codes = self._filled(name, torch.uint8, self._checkpoint.codes)
        with torch.inference_mode(False):
            scales = torch.from_numpy(self._checkpoint.scale(name)).to(self.device)
        matrix = Fp8Matrix(codes.view(torch.float8_e4m3fn), scales, block)
        self._count("linear", name, "fp8", matrix.nbytes)
        return matrix

    def _filled(
        self, name: str, dtype: torch.dtype, read: Callable[[str, slice], np.ndarray]
    ) -> Tensor:
        """A tensor on the device, from parts that several threads read."""
        info = self._checkpoint.info(name)
        with torch.inference_mode(False):  # which is per thread, and other threads write
            tensor = torch.empty(info.shape, dtype=dtype, device=self.device)
        step = max(1, _PART // math.prod(info.shape[1:]))

        def fill(start: int) -> int:
            part = read(name, slice(start, start + step))
            tensor[start : start + step] = torch.from_numpy(part)
            return len(part) * info.nbytes // info.shape[0]

        for nbytes in self._pool.map(fill, range(0, info.shape[0], step)):
            if self._progress is not None:
                self._progress(nbytes)
        return tensor

    def _count(self, kind: Kind, name: str, held: str, resident_bytes: int) -> None:
        info = self._checkpoint.info(name)
        source = info.nbytes + self._checkpoint.scale_nbytes(name)
        self.tally.add(kind, info.dtype, held, source, resident_bytes)


class Beside:
    """Matrices that take the same rows: multiplied in one pass if they are fp8, else one by one."""

    def __init__(self, loader: Loader, *parts: Matrix) -> None:
        self._linear, self._parts = loader.kernels.linear, parts
        self._sizes = [part.shape[0] for part in parts]
        self._whole = Fp8Matrix.stacked(parts)
        if self._whole is not None:  # and the parts' own memory is let go
            ends = list(itertools.accumulate(self._sizes, initial=0))
            self._parts = tuple(self._whole.rows(*pair) for pair in itertools.pairwise(ends))

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Each part's product, (T, out) in x's dtype; rows may lie apart."""
        if self._whole is None:
            return [self.one(number, x) for number in range(len(self._parts))]
        return torch.split(self._linear(x, self._whole), self._sizes, dim=-1)

    def one(self, number: int, x: Tensor) -> Tensor:
        """The product of one part alone."""
        return self._linear(x, self._parts[number])


class Norm:
    """RMS norm with its own weight; the arithmetic is float32."""

    def __init__(self, loader: Loader, name: str, eps: float) -> None:
        self.weight, self.eps = loader.vector(f"{name}.weight"), eps
        self._norm = loader.kernels.rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.eps)


class Mlp:
    """down(silu(gate x) * up x): the dense layers' and the shared expert's network."""

    def __init__(self, loader: Loader, name: str) -> None:
        self._gate_up: Sequence[Matrix]
        self._gate_up = loader.matrix(f"{name}.gate_proj"), loader.matrix(f"{name}.up_proj")
        both = Fp8Matrix.stacked(self._gate_up)
        if both is not None:
            self._gate_up = (both,)
        self._down = loader.matrix(f"{name}.down_proj")
        self._swiglu = loader.kernels.swiglu_f32

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, hidden) to (rows, hidden) float32, for the caller to add and round once."""
        return self._swiglu(x, self._gate_up, self._down)
