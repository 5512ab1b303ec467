"""What layers are made of: parameters brought from checkpoint to device, the norm, the MLP."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from duck.kernels.reference.device import rms_norm, swiglu_f32
from duck.model.tally import Tally
from duck.model.tensors import Kind
from duck.model.weights import Checkpoint

_PART = 1 << 20
"""Numbers converted at once (4 MiB of float32): the largest tensors are 900 times as big."""


class Loader:
    """Brings tensors to the device in the dtype wanted, fp8 dequantised. Close it after use.

    progress: called with the bytes of every part read. `tally` counts what was loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.tally = Tally()
        self._checkpoint, self._progress = checkpoint, progress
        # Threads read ahead of each other and share the conversion; numpy lets go of the GIL.
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "load")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """`<name>.weight`, (out, in), in the model's dtype unless another is asked for."""
        return self._tensor("linear", f"{name}.weight", dtype or self.dtype)

    def embedding(self) -> Tensor:
        """model.embed_tokens, (vocab, hidden), in the model's dtype."""
        return self._tensor("embedding", "model.embed_tokens.weight", self.dtype)

    def vector(self, name: str) -> Tensor:
        """A tensor whose arithmetic is float32 in every mode: norm weights, router, bias."""
        return self._tensor("vector", name, torch.float32)

    def _tensor(self, kind: Kind, name: str, dtype: torch.dtype) -> Tensor:
        info = self._checkpoint.info(name)
        with torch.inference_mode(False):  # which is per thread, and other threads write
            tensor = torch.empty(info.shape, dtype=dtype, device=self.device)
        step = max(1, _PART // math.prod(info.shape[1:]))

        def fill(start: int) -> int:
            part = self._checkpoint.f32(name, slice(start, start + step))
            tensor[start : start + step] = torch.from_numpy(part)
            return len(part) * info.nbytes // info.shape[0]

        for nbytes in self._pool.map(fill, range(0, info.shape[0], step)):
            if self._progress is not None:
                self._progress(nbytes)
        held = str(dtype).removeprefix("torch.")
        source = info.nbytes + self._checkpoint.scale_nbytes(name)
        self.tally.add(kind, info.dtype, held, source, tensor.nbytes)
        return tensor


class Norm:
    """RMS norm with its own weight; the arithmetic is float32."""

    def __init__(self, loader: Loader, name: str, eps: float) -> None:
        self._weight, self._eps = loader.vector(f"{name}.weight"), eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._eps)


class Mlp:
    """down(silu(gate x) * up x): the dense layers' and the shared expert's network."""

    def __init__(self, loader: Loader, name: str) -> None:
        self._gate = loader.matrix(f"{name}.gate_proj")
        self._up = loader.matrix(f"{name}.up_proj")
        self._down = loader.matrix(f"{name}.down_proj")

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, hidden) to (rows, hidden) float32, for the caller to add and round once."""
        return swiglu_f32(x, self._gate, self._up, self._down)
