"""Which tensors a model's config calls for: names, shapes, and how DeepSeek publishes them.

The one list behind checking a checkpoint, loading it, and planning memory without any file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from duck.model.config import ModelConfig

Kind = Literal["linear", "embedding", "expert", "vector"]
"""vector: what is float32 in every mode (norms, routers, biases), matrices among them."""


@dataclass(frozen=True)
class Wanted:
    """One tensor; its scale, where it has one, is not listed."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    quantised: bool = False  # fp8 in the published fp8 checkpoints
    quantisable: bool = False  # fp8 in some checkpoint; always where `quantised`

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def scale_nbytes(self, config: ModelConfig) -> int:
        """Bytes of the float32 scales beside it, one for each block, where it is fp8."""
        assert config.weight_block_size is not None
        edges = zip(self.shape, config.weight_block_size, strict=True)
        return 4 * math.prod(-(-size // edge) for size, edge in edges)


def wanted(config: ModelConfig, *, indexer: bool = False, experts: bool = True) -> Iterator[Wanted]:
    """Every tensor of a checkpoint but scales.

    indexer: its tensors too. experts: the routed experts' too, which are nearly all of them.
    """
    hidden, mtp = config.hidden_size, config.num_hidden_layers
    yield Wanted("model.embed_tokens.weight", (config.vocab_size, hidden), "embedding")
    for layer in range(config.num_hidden_layers + config.mtp_layers):
        yield from _layer(config, layer, indexer=indexer, experts=experts)
    yield _vector("model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield Wanted("lm_head.weight", (config.vocab_size, hidden), "linear")
    if config.mtp_layers:
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield _vector(f"model.layers.{mtp}.{norm}.weight", hidden)
        name = f"model.layers.{mtp}.eh_proj.weight"
        yield Wanted(name, (hidden, 2 * hidden), "linear", quantisable=True)


def _layer(config: ModelConfig, layer: int, *, indexer: bool, experts: bool) -> Iterator[Wanted]:
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    yield _vector(f"{prefix}.input_layernorm.weight", hidden)
    yield _vector(f"{prefix}.post_attention_layernorm.weight", hidden)
    yield from _attention(config, f"{prefix}.self_attn")
    if indexer:
        yield from _indexer(config, f"{prefix}.self_attn.indexer")
    if layer < config.first_k_dense_replace:
        yield from _mlp(config, f"{prefix}.mlp", config.intermediate_size, "linear")
        return
    yield _vector(f"{prefix}.mlp.gate.weight", config.n_routed_experts, hidden)
    if config.topk_method == "noaux_tc":
        yield _vector(f"{prefix}.mlp.gate.e_score_correction_bias", config.n_routed_experts)
    width = config.moe_intermediate_size
    for expert in range(config.n_routed_experts if experts else 0):
        yield from _mlp(config, f"{prefix}.mlp.experts.{expert}", width, "expert")
    if config.n_shared_experts:
        width *= config.n_shared_experts
        yield from _mlp(config, f"{prefix}.mlp.shared_experts", width, "linear")


def _attention(config: ModelConfig, name: str) -> Iterator[Wanted]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    q_width = heads * (config.qk_nope_head_dim + rope)
    if rank is None:
        yield _linear(f"{name}.q_proj", q_width, hidden)
    else:
        yield _linear(f"{name}.q_a_proj", rank, hidden)
        yield _vector(f"{name}.q_a_layernorm.weight", rank)
        yield _linear(f"{name}.q_b_proj", q_width, rank)
    yield _linear(f"{name}.kv_a_proj_with_mqa", latent + rope, hidden)
    yield _vector(f"{name}.kv_a_layernorm.weight", latent)
    yield _linear(
        f"{name}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent
    )
    yield _linear(f"{name}.o_proj", hidden, heads * config.v_head_dim)


def _indexer(config: ModelConfig, name: str) -> Iterator[Wanted]:
    assert config.q_lora_rank is not None  # the config has been checked
    heads, width = config.index_n_heads, config.index_head_dim
    yield _linear(f"{name}.wq_b", heads * width, config.q_lora_rank)
    yield _linear(f"{name}.wk", width, config.hidden_size)
    yield _vector(f"{name}.k_norm.weight", width)
    yield _vector(f"{name}.k_norm.bias", width)
    yield _vector(f"{name}.weights_proj.weight", heads, config.hidden_size)


def _mlp(config: ModelConfig, name: str, width: int, kind: Kind) -> Iterator[Wanted]:
    yield _linear(f"{name}.gate_proj", width, config.hidden_size, kind)
    yield _linear(f"{name}.up_proj", width, config.hidden_size, kind)
    yield _linear(f"{name}.down_proj", config.hidden_size, width, kind)


def _linear(name: str, rows: int, columns: int, kind: Kind = "linear") -> Wanted:
    return Wanted(f"{name}.weight", (rows, columns), kind, quantised=True, quantisable=True)


def _vector(name: str, *shape: int) -> Wanted:
    return Wanted(name, shape, "vector")
