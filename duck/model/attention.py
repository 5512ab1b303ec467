"""Multi-head latent attention (MLA) and its cache of latents.

A cached token is one row per layer: the normed latent c (kv_lora_rank numbers) and the rotated key
k_pe that all heads share (qk_rope_head_dim). Keys and values of heads exist only inside one call.
Source: DeepSeek-V2 report (arXiv 2405.04434), section 2.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duck.kernels.reference.device import attend_absorbed, attend_naive, rotate
from duck.model.config import ModelConfig
from duck.model.layers import Loader, Norm
from duck.model.rope import RopeTable, softmax_scale

_LATENT_EPS = 1e-6  # of the two inner norms: fixed in DeepSeek's code, whatever rms_norm_eps says


class KVCache:
    """Latents of every layer, the MTP layer's last. It has no length: positions are the caller's.

    A rewind is writing at a smaller position; what lies beyond is never attended to.
    """

    def __init__(
        self, layers: int, width: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._layers = [
            # Zeros, because a NaN left in memory would survive being multiplied by a weight of 0.
            torch.zeros(capacity, width, device=device, dtype=dtype)
            for _ in range(layers)
        ]

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(layer.nbytes for layer in self._layers)

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` positions and keep what is there."""
        for index, old in enumerate(self._layers):
            if capacity > old.shape[0]:
                new = old.new_zeros(capacity, old.shape[1])
                new[: old.shape[0]] = old
                self._layers[index] = new  # one layer at a time: no second whole cache

    def write(self, layer: int, position: int, latent: Tensor) -> None:
        """Store rows (T, width) of one layer at position .. position + T - 1."""
        stop = position + latent.shape[0]
        assert 0 <= position <= stop <= self.capacity, f"{position}..{stop} of {self.capacity}"
        self._layers[layer][position:stop] = latent

    def read(self, layer: int, stop: int) -> Tensor:
        """Rows 0 .. stop - 1 of one layer: (stop, width), a view."""
        return self._layers[layer][:stop]


class Attention:
    """MLA of one layer, without the norm before it and the residual after it."""

    def __init__(self, loader: Loader, config: ModelConfig, layer: int, rope: RopeTable) -> None:
        name = f"model.layers.{layer}.self_attn"
        self._layer, self._rope, self._scale = layer, rope, softmax_scale(config)
        self._heads = config.num_attention_heads
        self._nope, self._rank = config.qk_nope_head_dim, config.kv_lora_rank
        self._q_norm: Norm | None = None
        if config.q_lora_rank is None:
            self._q_proj = loader.matrix(f"{name}.q_proj")
        else:
            self._q_a = loader.matrix(f"{name}.q_a_proj")
            self._q_norm = Norm(loader, f"{name}.q_a_layernorm", _LATENT_EPS)
            self._q_proj = loader.matrix(f"{name}.q_b_proj")
        self._kv_a = loader.matrix(f"{name}.kv_a_proj_with_mqa")
        self._kv_norm = Norm(loader, f"{name}.kv_a_layernorm", _LATENT_EPS)
        # Per head: first the rows that make its key, then the rows that make its value.
        per_head = loader.matrix(f"{name}.kv_b_proj").view(self._heads, -1, self._rank)
        self._wk = per_head[:, : self._nope].contiguous()
        self._wv = per_head[:, self._nope :].contiguous()
        self.o_proj = loader.matrix(f"{name}.o_proj")
        # Multiplications per head and cached token: absorbed 2r + dr for every row; naive
        # dn + dr + dv for every row, and r(dn + dv) once to write the head's key and value out.
        r, dn, dv = self._rank, self._nope, config.v_head_dim
        saved = 2 * r - dn - dv
        self._few_rows = r * (dn + dv) // saved if saved > 0 else None

    def __call__(self, x: Tensor, cache: KVCache, position: int, last: int) -> Tensor:
        """Write the latents of all rows, attend with the last `last` of them.

        x: (T, hidden), normed, at position .. position + T - 1. Returns (last, heads * v_head_dim),
        the input of o_proj.
        """
        rows = x.shape[0]
        latent = F.linear(x, self._kv_a)
        c = self._kv_norm(latent[:, : self._rank])
        k_pe = rotate(latent[:, self._rank :], *self._rope.at(position, rows))
        cache.write(self._layer, position, torch.cat((c, k_pe), dim=-1))

        if last == 0:
            return x.new_empty(0, self.o_proj.shape[1])
        first = position + rows - last
        q = x[rows - last :]
        if self._q_norm is not None:
            q = self._q_norm(F.linear(q, self._q_a))
        q = F.linear(q, self._q_proj).view(last, self._heads, -1)
        cos, sin = self._rope.at(first, last)
        q_pe = rotate(q[..., self._nope :], cos[:, None], sin[:, None])
        few = self._few_rows is None or last <= self._few_rows
        attend = attend_absorbed if few else attend_naive
        seen = cache.read(self._layer, position + rows)
        out = attend(q[..., : self._nope], q_pe, seen, self._wk, self._wv, self._scale, first)
        return out.flatten(1)
