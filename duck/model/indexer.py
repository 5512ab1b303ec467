"""The lightning indexer of sparse attention (DSA): which tokens a row attends to.

Beside the latents every layer caches one short key a token. A row's score of a token is a weighted
sum of relu(query . key) over a few heads; it attends to the index_topk tokens with the highest.

The choice is a step function: where two scores nearly tie, the last bits of their inputs decide,
and on a CPU those differ between a row alone and a row among others. Held exactly (float32) that is
as rare as a tie of two logits. Rounded to fp8 as the model is served, a last bit may move a number
to the next of 8 codes an octave, and near ties fall either way far more often.

Source: DeepSeek-V3.2-Exp report, section 2.1, and its inference code, whose first release turned
the pairs of the main attention here (interleaved) instead of halves; GLM's indexer does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from duck.kernels.reference.device import hadamard, layer_norm, rotate, rotate_halves, select_keys
from duck.model.cache import key_format
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.layers import Loader
from duck.model.rope import RopeTable

_NORM_EPS = 1e-6


class Indexer:
    """One layer's."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        holding: Holding,
        layer: int,
        rope: RopeTable,
    ) -> None:
        assert config.index_topk is not None
        name = f"model.layers.{layer}.self_attn.indexer"
        self.topk = config.index_topk
        self._rope, self._turned = rope, config.qk_rope_head_dim
        self._rotate = rotate if config.indexer_rope_interleave else rotate_halves
        self._heads = config.index_n_heads
        self._scale = (config.index_n_heads * config.index_head_dim) ** -0.5
        self._linear = loader.kernels.linear
        self._query = loader.matrix(f"{name}.wq_b")
        self._key = loader.matrix(f"{name}.wk")
        self._norm = loader.vector(f"{name}.k_norm.weight"), loader.vector(f"{name}.k_norm.bias")
        self._weights = loader.vector(f"{name}.weights_proj.weight")
        # Queries are rounded as keys are held. The turn by Hadamard's matrix is for the rounding
        # alone: it changes no product.
        self._form = key_format(config, holding)
        self._spread = holding.indexer == "fp8"

    def keys(self, x: Tensor, position: int) -> Tensor:
        """What the cache is to hold of rows x (T, hidden), normed: (T, index_head_dim) float32."""
        key = layer_norm(self._linear(x, self._key), *self._norm, _NORM_EPS)
        return self._turn(key, *self._rope.at(position, len(x)))

    def select(self, x: Tensor, q_latent: Tensor, keys: Tensor, position: int) -> Tensor:
        """Positions of the tokens that each row attends to, ascending: (T, topk) int64.

        x: (T, hidden), normed, at `position` and after, where more than topk tokens are seen.
        q_latent: (T, q_lora_rank), normed: the main attention's. keys: (position + T,
        index_head_dim) float32, as the cache holds them.
        """
        rows = len(x)
        query = self._linear(q_latent, self._query).float().view(rows, self._heads, -1)
        cos, sin = self._rope.at(position, rows)
        query = self._turn(query, cos[:, None], sin[:, None])
        query = self._form.unpack(self._form.pack(query))
        weights = F.linear(x.float(), self._weights) * self._scale
        return select_keys(query, weights, keys, position, self.topk)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first numbers of each head; the main attention rotates its last."""
        turned = self._rotate(x[..., : self._turned], cos, sin)
        x = torch.cat((turned, x[..., self._turned :]), dim=-1)
        return hadamard(x) if self._spread else x
