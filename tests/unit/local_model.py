"""The model driven by the plainest loop, experts whole and in torch: no flock, no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from duck.kernels.device import Kernels, pick
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.indexer import Indexer
from duck.model.transformer import DecoderLayer, KVCache, Transformer
from duck.model.weights import Checkpoint


class LocalModel:
    """`duck.model` with its experts in the same process."""

    def __init__(
        self,
        folder: Path,
        dtype: str = "float32",
        *,
        kernels: str | Kernels = "auto",
        **options: Any,
    ) -> None:
        """kernels: as kernels.device.pick has them. options: as Holding.choose has them."""
        self.folder = folder
        self.config = ModelConfig.load(folder)
        checkpoint = Checkpoint.open(folder)
        holding = Holding.choose(self.config, dtype=dtype, **options)
        cpu = torch.device("cpu")
        if isinstance(kernels, str):
            kernels = pick(cpu, kernels)
        self.model = Transformer.load(checkpoint, self.config, holding, device=cpu, kernels=kernels)
        columns = range(self.config.moe_intermediate_size)
        self.experts = {
            (layer, expert): [
                torch.from_numpy(part)
                for part in checkpoint.expert(layer, expert, columns).dequantise()
            ]
            for layer in self.config.moe_layers
            for expert in range(self.config.n_routed_experts)
        }

    @torch.inference_mode()
    def hidden(self, ids: list[int], cache: KVCache | None = None, position: int = 0) -> Tensor:
        """Final hiddens (T, hidden) of tokens at `position` and after."""
        cache = cache or self.model.new_cache(position + len(ids))
        x = self.model.embed(ids)
        for layer in self.model.layers:
            x = self.run(layer, x, cache, position)
        return self.model.final(x)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        return self.model.logits(self.hidden(ids))

    @torch.inference_mode()
    def mtp_logits(self, ids: list[int]) -> Tensor:
        """(T - 1, vocab): row i from (h_i, token i + 1)."""
        mtp = self.model.mtp
        assert mtp is not None
        cache = self.model.new_cache(len(ids))
        z = mtp.combine(ids[1:], self.hidden(ids)[:-1])
        return self.model.logits(mtp.final(self.run(mtp.layer, z, cache, 0)))

    def run(
        self, layer: DecoderLayer, x: Tensor, cache: KVCache, position: int, last: int | None = None
    ) -> Tensor:
        """One whole layer."""
        x = layer.attend(x, cache, position, last=last)
        if not layer.is_moe:
            return layer.dense(x)
        routed = layer.route(x)
        sums = torch.zeros(x.shape)
        for row, (ids, weights) in enumerate(zip(routed.ids, routed.weights, strict=True)):
            h = routed.h[row].float()
            for expert, weight in zip(ids.tolist(), weights, strict=True):
                gate, up, down = self.experts[layer.index, expert]
                sums[row] += weight * (down @ (F.silu(gate @ h) * (up @ h)))
        return layer.merge(x, layer.shared(routed.h), sums)


class WatchedModel(LocalModel):
    """Notes what every row of every layer selected: {(layer, position): positions}."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        super().__init__(folder, **options)
        self.selected: dict[tuple[int, int], frozenset[int]] = {}
        self._layer = 0
        plain = Indexer.select

        def select(
            indexer: Indexer, x: Tensor, q_latent: Tensor, held: Tensor, position: int
        ) -> Tensor:
            selected = plain(indexer, x, q_latent, held, position)
            for row, chosen in enumerate(selected.tolist()):
                self.selected[self._layer, position + row] = frozenset(chosen)
            return selected

        monkeypatch.setattr(Indexer, "select", select)

    def run(
        self, layer: DecoderLayer, x: Tensor, cache: KVCache, position: int, last: int | None = None
    ) -> Tensor:
        self._layer = layer.index
        return super().run(layer, x, cache, position, last)
