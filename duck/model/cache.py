"""A session's KV cache: one row a token and layer, in the dtype it is held in.

It has no length: positions are the caller's. A rewind is writing at a smaller position; what lies
beyond is never attended to.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from duck.kernels.reference import FP8_GROUP
from duck.kernels.reference.device import pack_fp8, unpack_fp8
from duck.model.config import ModelConfig
from duck.model.holding import Holding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RowFormat(Protocol):
    """How a row of numbers is held."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what it is held in."""

    @property
    def width(self) -> int:
        """Elements of `dtype` that a row takes."""

    def pack(self, rows: Tensor) -> Tensor:
        """Rows of numbers (..., numbers) as they are held: (..., width)."""

    def unpack(self, held: Tensor) -> Tensor:
        """The reverse, in the dtype that is computed in."""


class PlainRows:
    """Rows held in one dtype and computed in another or the same."""

    def __init__(self, width: int, dtype: torch.dtype, computed: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._computed = computed

    def pack(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def unpack(self, held: Tensor) -> Tensor:
        return held.to(self._computed)


class Fp8Rows:
    """The first `coded` numbers of a row in e4m3, the `plain` ones after them in bf16.

    A row is bytes: the codes, one float32 scale for each group of 128 codes, the bf16 numbers.
    Scales are powers of two. With 512 and 64 these are the 656 bytes of a latent that FlashMLA
    reads, with 128 and 0 the 132 of an indexer key.
    """

    dtype = torch.uint8

    def __init__(self, coded: int, plain: int, computed: torch.dtype) -> None:
        self._coded, self._computed = coded, computed
        self.width = coded + 4 * -(-coded // FP8_GROUP) + 2 * plain

    def pack(self, rows: Tensor) -> Tensor:
        return pack_fp8(rows, self._coded)

    def unpack(self, held: Tensor) -> Tensor:
        return unpack_fp8(held, self._coded, self._computed)


class LayerRows:
    """Rows of one kind, of every layer."""

    def __init__(
        self, layers: int, form: RowFormat, capacity: int, *, device: torch.device
    ) -> None:
        self._form = form
        self._layers = [
            # Zeros, because a NaN left in memory would survive being multiplied by a weight of 0.
            torch.zeros(capacity, form.width, device=device, dtype=form.dtype)
            for _ in range(layers)
        ]

    @property
    def capacity(self) -> int:
        return self._layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions and keep what is there."""
        for index, old in enumerate(self._layers):
            new = old.new_zeros(capacity, old.shape[1])
            new[: old.shape[0]] = old
            self._layers[index] = new  # one layer at a time: no second whole cache

    def write(self, layer: int, position: int, rows: Tensor) -> None:
        """Store rows (T, numbers) of one layer at position .. position + T - 1."""
        stop = position + rows.shape[0]
        assert 0 <= position <= stop <= self.capacity, f"{position}..{stop} of {self.capacity}"
        self._layers[layer][position:stop] = self._form.pack(rows)

    def held(self, layer: int, position: int, rows: int) -> Tensor:
        """One layer's rows as they are held, with room for `rows` more at `position`."""
        stop = position + rows
        assert 0 <= position <= stop <= self.capacity, f"{position}..{stop} of {self.capacity}"
        return self._layers[layer]

    def read(self, layer: int, stop: int) -> Tensor:
        """Rows 0 .. stop - 1 of one layer, (stop, numbers): rounded as they are held."""
        return self._form.unpack(self._layers[layer][:stop])


class KVCache:
    """Latents of every layer, the MTP layer's last, and the indexer's keys where it runs.

    A latent is the normed c (kv_lora_rank numbers) and the rotated key that all heads share
    (qk_rope_head_dim).
    """

    def __init__(
        self,
        layers: int,
        latent: RowFormat,
        capacity: int,
        *,
        device: torch.device,
        key: RowFormat | None = None,
        limit: int | None = None,
    ) -> None:
        self.latents = LayerRows(layers, latent, capacity, device=device)
        self._keys = None if key is None else LayerRows(layers, key, capacity, device=device)
        self._limit = limit  # what a session may hold

    @classmethod
    def of(
        cls, config: ModelConfig, holding: Holding, capacity: int, *, device: torch.device
    ) -> KVCache:
        """An empty cache for `capacity` positions of all of a model's layers."""
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        computed = DTYPES[holding.dtype]
        latent: RowFormat
        if holding.kv == "fp8":
            latent = Fp8Rows(rank, rope, computed)
        else:
            latent = PlainRows(rank + rope, DTYPES[holding.kv], computed)
        return cls(
            config.num_hidden_layers + config.mtp_layers,
            latent,
            capacity,
            device=device,
            key=None if holding.indexer is None else key_format(config, holding),
            limit=holding.max_len,
        )

    @property
    def keys(self) -> LayerRows:
        """The indexer's keys, of a model that runs it."""
        assert self._keys is not None
        return self._keys

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.latents.capacity

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return self.latents.nbytes + (self._keys.nbytes if self._keys else 0)

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` positions and keep what is there.

        Grows by half as much again, so that a long answer is not copied at every token, but not
        beyond what a session may hold unless asked to.
        """
        if capacity <= self.capacity:
            return
        more = self.capacity * 3 // 2
        capacity = max(capacity, more if self._limit is None else min(more, self._limit))
        self.latents.grow(capacity)
        if self._keys is not None:
            self._keys.grow(capacity)


def key_format(config: ModelConfig, holding: Holding) -> RowFormat:
    """How the indexer's keys are held; its queries are rounded alike. Numbers come as float32."""
    width = config.index_head_dim
    if holding.indexer == "fp8":
        return Fp8Rows(width, 0, torch.float32)
    return PlainRows(width, torch.float32, torch.float32)
