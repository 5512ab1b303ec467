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

from torch import Tensor

from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.layers import Loader
from duck.model.rope import RopeTable, position_on

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
        self._rope, self._interleaved = rope, config.indexer_rope_interleave
        self._heads = config.index_n_heads
        self._scale = (config.index_n_heads * config.index_head_dim) ** -0.5
        self._kernels = loader.kernels
        self._query = loader.matrix(f"{name}.wq_b")
        self._key = loader.matrix(f"{name}.wk")
        self._norm = loader.vector(f"{name}.k_norm.weight"), loader.vector(f"{name}.k_norm.bias")
        self._weights = loader.vector(f"{name}.weights_proj.weight")
        # Queries are rounded as keys are held. A turn by Hadamard's matrix is for the rounding
        # alone: it changes no product.
        self._fp8 = holding.indexer == "fp8"

    def append(self, x: Tensor, held: Tensor, position: int) -> None:
        """Write the keys of rows x (T, hidden), normed, into their cache of this layer."""
        self._kernels.append_keys(
            self._kernels.linear(x, self._key),
            self._norm,
            _NORM_EPS,
            *self._rope.upto(position + len(x)),
            position_on(x, position),
            held,
            interleaved=self._interleaved,
        )

    def select(self, x: Tensor, q_latent: Tensor, held: Tensor, position: int) -> Tensor:
        """Positions of the tokens that each row attends to, ascending: (T, topk) int32.

        x: (T, hidden), normed, at `position` and after; q_latent: (T, q_lora_rank), normed: the
        main attention's. held: this layer's keys. -1 stands after the last of a row that sees fewer
        than topk tokens.
        """
        rows, at = len(x), position_on(x, position)
        query, weights = self._kernels.index_queries(
            self._kernels.linear(q_latent, self._query).view(rows, self._heads, -1),
            x,
            self._weights,
            self._scale,
            *self._rope.upto(position + rows),
            at,
            fp8=self._fp8,
            interleaved=self._interleaved,
        )
        return self._kernels.select(query, weights, held, at, self.topk)
