"""config.json: what is read, and one clear line for everything that cannot be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from duck.errors import ConfigError
from duck.model.config import SUPPORTED, ModelConfig, Yarn
from tests.checkpoints import CONFIG

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
INDEXER = {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 16}
V32 = {"model_type": "deepseek_v32", **INDEXER}


def load(tmp_path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """CONFIG with changes; a change to `...` drops the key."""
    raw = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.load(tmp_path)


def test_plain(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.hidden_size, config.q_lora_rank, config.n_shared_experts) == (160, 48, 1)
    assert config.moe_layers == (1, 2, 3)  # the MTP layer is number 3
    assert config.mtp_layers == 1
    assert config.max_position_embeddings == 2560
    assert (config.index_topk, config.index_n_heads, config.index_head_dim) == (None, 0, 0)
    assert config.weight_block_size is None
    assert config.eos_token_ids == (1,)
    assert config.rope.theta == 10000
    assert config.rope.scaling == Yarn(40, 64, 32, 1, 1.0, 1.0)


def test_nulls_and_missing_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        q_lora_rank=None,
        n_shared_experts=None,
        n_group=None,
        topk_group=None,
        num_nextn_predict_layers=...,
        rope_scaling=None,
        rope_theta=...,
        bos_token_id=...,
        eos_token_id=None,
        topk_method=...,
        scoring_func=...,
        num_key_value_heads=None,
        torch_dtype="bfloat16",
    )
    assert config.q_lora_rank is None
    assert config.n_shared_experts == 0
    assert (config.n_group, config.topk_group) == (1, 1)
    assert config.mtp_layers == 0
    assert config.moe_layers == (1, 2)
    assert config.rope.scaling is None
    assert config.bos_token_id is None
    assert config.eos_token_ids == ()
    assert (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")


def test_rope_parameters_win_over_rope_scaling(tmp_path: Path) -> None:
    nested = {**CONFIG["rope_scaling"], "rope_type": "yarn", "rope_theta": 5e4, "factor": 8}
    config = load(tmp_path, rope_parameters=nested, rope_theta=...)
    assert config.rope.theta == 5e4
    assert config.rope.scaling is not None
    assert config.rope.scaling.factor == 8
    plain = {"rope_type": "default", "rope_theta": 77.0}
    config = load(tmp_path, rope_parameters=plain, rope_scaling=...)
    assert (config.rope.theta, config.rope.scaling) == (77.0, None)


def test_yarn_without_factor_takes_the_ratio_of_lengths(tmp_path: Path) -> None:
    config = load(
        tmp_path, rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 64}
    )
    assert config.rope.scaling is not None
    assert config.rope.scaling.factor == 40


def test_mlp_layer_types(tmp_path: Path) -> None:
    kinds = ["dense", "dense", "sparse"]
    assert load(tmp_path, mlp_layer_types=kinds, first_k_dense_replace=...).moe_layers == (2, 3)


def test_stop_tokens_of_both_files(tmp_path: Path) -> None:
    config = load(tmp_path, {"eos_token_id": [1, 7], "temperature": 0.6}, eos_token_id=5)
    assert config.eos_token_ids == (5, 1, 7)


def test_block_size(tmp_path: Path) -> None:
    assert load(tmp_path, quantization_config=FP8).weight_block_size == (128, 128)


def test_indexer(tmp_path: Path) -> None:
    config = load(tmp_path, **V32)
    assert (config.index_topk, config.index_n_heads, config.index_head_dim) == (64, 4, 16)
    assert not config.indexer_rope_interleave
    assert load(tmp_path, **INDEXER).index_topk == 64  # the keys alone signal it
    glm = {**INDEXER, "model_type": "glm_moe_dsa", "indexer_types": ["full"] * 3}
    assert load(tmp_path, **glm).indexer_rope_interleave


@pytest.mark.parametrize("layers", [1, 2])
def test_more_mtp_modules_than_one_use_the_first(tmp_path: Path, layers: int) -> None:
    assert load(tmp_path, num_nextn_predict_layers=layers).moe_layers == (1, 2, 3)


def test_v2_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path, model_type="deepseek_v2", topk_method=..., scoring_func=..., norm_topk_prob=...
    )
    assert config.topk_method == "greedy"
    assert config.scoring_func == "softmax"
    assert not config.norm_topk_prob


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"model_type": ...}, "no model_type; supported: " + ", ".join(SUPPORTED)),
    "other model": ({"model_type": "llama"}, "'llama' is not supported; supported: deepseek_v2"),
    "missing": ({"hidden_size": ...}, "hidden_size: missing, want a whole number of at least 1"),
    "text": ({"hidden_size": "160"}, "hidden_size: '160', want a whole number"),
    "float": ({"kv_lora_rank": 32.0}, "kv_lora_rank: 32.0, want a whole number"),
    "bool": ({"vocab_size": True}, "vocab_size: True, want a whole number"),
    "negative": ({"first_k_dense_replace": -1}, "first_k_dense_replace: -1"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    "not a number": ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small', want a number"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta: not a finite number"),
    "too large": ({"rope_theta": 10**400}, "rope_theta: not a finite number"),
    "not positive": ({"routed_scaling_factor": 0}, "routed_scaling_factor: 0.0, want a positive"),
    "not boolean": ({"norm_topk_prob": 1}, "norm_topk_prob: 1, want true or false"),
    "too many dense": ({"first_k_dense_replace": 4}, "4 is more than num_hidden_layers 3"),
    "odd rope": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: 7 is odd"),
    "groups": ({"n_group": 3}, "n_group: 3 does not divide n_routed_experts 16"),
    "kept groups": ({"topk_group": 5}, "topk_group: 5 is more than n_group 4"),
    "tiny groups": ({"n_group": 16, "topk_group": 8}, "leaves 1 expert in a group, need 2"),
    "experts": ({"num_experts_per_tok": 9}, "9 is more than the 8 experts the kept groups hold"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
    "bias": ({"attention_bias": True}, "attention_bias: True is not supported"),
    "kv heads": ({"num_key_value_heads": 2}, "num_key_value_heads: 2 is not supported, only 4"),
    "method": ({"topk_method": "best"}, "topk_method: 'best' is not supported"),
    "scoring": ({"scoring_func": "relu"}, "scoring_func: 'relu' is not supported"),
    "rope kind": ({"rope_scaling": {"type": "llama3"}}, "rope_type: 'llama3' is not supported"),
    "rope list": ({"rope_scaling": [1]}, "rope_scaling: [1], want an object"),
    "yarn length": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position"),
    "theta": ({"rope_theta": 1}, "rope_theta: 1.0 is not above 1"),
    "quantization": ({"quantization_config": {"quant_method": "awq"}}, "'awq' is not supported"),
    "fp8 kind": ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt: 'e5m2'"),
    "block": ({"quantization_config": {**FP8, "weight_block_size": [128]}}, "want two whole"),
    "no block": ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size: None"),
    "bos": ({"bos_token_id": 288}, "bos_token_id: 288 is not below vocab_size 288"),
    "eos": ({"eos_token_id": [1, 999]}, "eos_token_id: 999 is not below vocab_size 288"),
    "eos kind": ({"eos_token_id": "</s>"}, "eos_token_id: '</s>', want a token id or a list"),
    "layer types": ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types: want"),
    "v3.2 topk": ({"model_type": "deepseek_v32"}, "index_topk: missing"),
    "index heads": ({**V32, "index_n_heads": ...}, "index_n_heads: missing"),
    "index width": ({**V32, "index_head_dim": 24}, "index_head_dim: 24 is no power of two"),
    "index rope": ({**V32, "index_head_dim": 4}, "4 is below qk_rope_head_dim 8"),
    "index latent": ({**V32, "q_lora_rank": None}, "q_lora_rank: null, but the indexer"),
    "index shared": ({**V32, "indexer_types": ["full", "shared", "full"]}, "share a choice"),
    "index freq": ({**V32, "index_topk_freq": 4}, "index_topk_freq: layers that share a choice"),
    "index kinds": ({**V32, "indexer_types": 7}, "indexer_types: layers that share"),
    "index mix": ({**V32, "indexer_types": ["full", {}]}, "indexer_types: layers that share"),
    "index pattern": ({**V32, "index_topk_pattern": "FSF"}, "index_topk_pattern: layers that"),
    "glm topk": ({"model_type": "glm_moe_dsa"}, "index_topk: missing, but glm_moe_dsa needs it"),
    "v2 norm": ({"model_type": "deepseek_v2"}, "norm_topk_prob: true is not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_one_clear_line(name: str, tmp_path: Path) -> None:
    changes, message = BAD[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        ModelConfig.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config.json in"):
        ModelConfig.load(tmp_path)
    for content in (b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json") as caught:
            ModelConfig.load(tmp_path)
        assert "\n" not in str(caught.value)
    load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": -2}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id: -2"):
        ModelConfig.load(tmp_path)
