"""What layers are made of: parameters brought from checkpoint to device, the norm, the MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from duck.kernels.reference.device import rms_norm, swiglu_f32
from duck.model.weights import Checkpoint


class Loader:
    """Brings tensors to the device in the dtype wanted, fp8 dequantised.

    progress: called after every tensor with the bytes it took.
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
        self._checkpoint, self._progress = checkpoint, progress

    def matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """`<name>.weight`, (out, in), in the model's dtype unless another is asked for."""
        return self._tensor(f"{name}.weight", dtype or self.dtype)

    def vector(self, name: str) -> Tensor:
        """A tensor whose arithmetic is float32 in every mode: norm weights, router, bias."""
        return self._tensor(name, torch.float32)

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        before = self._checkpoint.bytes_read
        tensor = torch.from_numpy(self._checkpoint.f32(name)).to(self.device, dtype)
        if self._progress is not None:
            self._progress(self._checkpoint.bytes_read - before)
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
