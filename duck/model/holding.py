"""How a host holds a model: lengths and dtypes, chosen once, before anything is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from duck.errors import ConfigError
from duck.kernels.reference import FP8_GROUP, FP8_STEP
from duck.model.config import ModelConfig

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_KV = {"bf16": "bfloat16", "fp8": "fp8"}  # the option's word -> ours


@dataclass(frozen=True)
class Holding:
    """Use `choose`.

    max_len: tokens a session may hold.
    dtype: of activations, and of what is multiplied with them.
    kv: of cached latents: float32, bfloat16 or fp8.
    indexer: how its queries and keys are rounded: exact (not at all) or fp8. None: there is none,
        or max_len is within index_topk, where every row attends to all keys.
    fp8_kept: linears stay fp8, with their scales, but for kv_b_proj, whose halves are folded into
        query and output; else they become `dtype`.
    """

    max_len: int
    dtype: str
    kv: str
    indexer: str | None
    fp8_kept: bool = False

    @classmethod
    def choose(
        cls,
        config: ModelConfig,
        *,
        dtype: str,
        kv: str = "auto",
        indexer: str = "auto",
        max_len: int | None = None,
        fp8_kept: bool = False,
    ) -> Holding:
        """From the options as the command line has them.

        kv: auto (the model's dtype), bf16 or fp8. indexer: auto, exact or fp8. In float32 auto is
        exact: rounding to fp8 would turn the last bits in which a row alone and a row among others
        differ into other keys. In bfloat16 it is fp8, as the model is served. fp8_kept: if there
        are fp8 matrices, whose blocks are of a size that the kernels know.

        Raises:
            ConfigError: max_len is not within the model's context.
        """
        length = max_length(config, max_len)
        if indexer == "auto":
            indexer = "exact" if dtype == "float32" else "fp8"
        sparse = config.index_topk is not None and length > config.index_topk
        block = config.weight_block_size
        kept = fp8_kept and block is not None and math.gcd(block[1], 128) >= FP8_STEP
        return cls(length, dtype, _KV.get(kv, dtype), indexer if sparse else None, kept)

    def latent_nbytes(self, config: ModelConfig) -> int:
        """Bytes of a token in one layer's cache of latents."""
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        if self.kv == "fp8":
            return _fp8_nbytes(rank) + 2 * rope  # the rotated part stays bf16
        return ITEM_BYTES[self.kv] * (rank + rope)

    def key_nbytes(self, config: ModelConfig) -> int:
        """Bytes of a token in one layer's cache of the indexer's keys."""
        if self.indexer is None:
            return 0
        width = config.index_head_dim
        return _fp8_nbytes(width) if self.indexer == "fp8" else 4 * width

    def token_nbytes(self, config: ModelConfig) -> int:
        """Bytes of a token in the caches of all layers, the MTP layer's included."""
        layers = config.num_hidden_layers + config.mtp_layers
        return layers * (self.latent_nbytes(config) + self.key_nbytes(config))


def max_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens a session may hold: `asked`, or all that the model was made for.

    Raises:
        ConfigError: asked for none, or for more.
    """
    most = config.max_position_embeddings
    if asked is None:
        return most
    if not 1 <= asked <= most:
        raise ConfigError(
            f"--max-len {asked}: the model's context is {most} tokens, want 1..{most}"
        )
    return asked


def _fp8_nbytes(width: int) -> int:
    return width + 4 * -(-width // FP8_GROUP)
