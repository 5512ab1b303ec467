"""What a checkpoint's config.json says, checked once, so that nothing later has to ask.

Field names are the checkpoint's own key names. Everything a user can get wrong in the two files
(config.json and generation_config.json) ends here in one clear ConfigError. Imports no torch: a
duck reads this file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duck.errors import ConfigError

SUPPORTED = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2")
"""Values of `model_type` that this package runs; all are the same code with other flags."""


MOST_LAYERS = 4096  # far above any model: a damaged file must not cost hours and all memory


@dataclass(frozen=True)
class Yarn:
    """YaRN's keys (arXiv 2309.00071), from `rope_scaling` or `rope_parameters`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None  # overrides the factor on cos and sin
    truncate: bool = True  # round the ramp's two ends to whole pairs


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the base, and how it is stretched (None: not at all)."""

    theta: float
    scaling: Yarn | None


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. Use `load`; the fields keep the names of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # None: one q_proj instead of q_a_proj, q_a_layernorm, q_b_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int  # 0: none; n > 0: one MLP of width n * moe_intermediate_size
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    scoring_func: str  # "sigmoid" or "softmax"
    topk_method: str  # "noaux_tc", "greedy" or "group_limited_greedy"
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    index_topk: int | None  # keys a row attends to, which the indexer picks; None: all
    index_n_heads: int  # of the indexer; 0 without one
    index_head_dim: int
    indexer_rope_interleave: bool  # it turns pairs of neighbours, as the main attention does
    weight_block_size: tuple[int, int] | None  # (rows, columns) of one fp8 scale; None: not fp8
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json, and the stop tokens of generation_config.json if it exists.

        Raises:
            ConfigError: the folder or file is missing, is not JSON, names a model or a
                quantization this package does not run, or a field is missing, ill-typed or does
                not fit the others.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"no such folder: {folder}")
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"no config.json in {folder}: expected a Hugging Face model folder")
        generation = folder / "generation_config.json"
        return cls.parse(
            _read_json(path), _read_json(generation) if generation.is_file() else {}, folder=folder
        )

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any], *, folder: Path
    ) -> ModelConfig:
        """As `load`, from the parsed files; errors name them in `folder`."""
        source = str(folder / "config.json")
        keys = _Keys(raw, source)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError(f"{source}: no model_type; supported: {', '.join(SUPPORTED)}")
        if model_type not in SUPPORTED:
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not supported; "
                f"supported: {', '.join(SUPPORTED)}"
            )
        v2 = model_type == "deepseek_v2"
        layers = keys.integer("num_hidden_layers", least=1)
        if layers > MOST_LAYERS:
            raise keys.error("num_hidden_layers", f"{layers} is more than {MOST_LAYERS}")
        topk = keys.integer_or_none("index_topk", least=1)
        glm = model_type == "glm_moe_dsa"
        config = cls(
            model_type=model_type,
            vocab_size=keys.integer("vocab_size", least=1),
            hidden_size=keys.integer("hidden_size", least=1),
            intermediate_size=keys.integer("intermediate_size", least=1),
            moe_intermediate_size=keys.integer("moe_intermediate_size", least=1),
            num_hidden_layers=layers,
            # transformers 5 saves it under a name of its own.
            num_nextn_predict_layers=keys.integer(
                "num_nextn_predict_layers", "num_mtp_layers", least=0, default=0
            ),
            num_attention_heads=keys.integer("num_attention_heads", least=1),
            q_lora_rank=keys.integer_or_none("q_lora_rank", least=1),
            kv_lora_rank=keys.integer("kv_lora_rank", least=1),
            qk_nope_head_dim=keys.integer("qk_nope_head_dim", least=1),
            qk_rope_head_dim=keys.integer("qk_rope_head_dim", least=2),
            v_head_dim=keys.integer("v_head_dim", least=1),
            first_k_dense_replace=_dense_layers(keys, layers),
            n_routed_experts=keys.integer("n_routed_experts", least=1),
            n_shared_experts=keys.integer_or_none("n_shared_experts", least=0) or 0,
            num_experts_per_tok=keys.integer("num_experts_per_tok", least=1),
            n_group=keys.integer_or_none("n_group", least=1) or 1,
            topk_group=keys.integer_or_none("topk_group", least=1) or 1,
            norm_topk_prob=keys.boolean("norm_topk_prob", default=not v2),
            routed_scaling_factor=keys.number("routed_scaling_factor", default=1.0),
            scoring_func=keys.choice(
                "scoring_func", ("sigmoid", "softmax"), default="softmax" if v2 else "sigmoid"
            ),
            topk_method=keys.choice(
                "topk_method",
                ("noaux_tc", "greedy", "group_limited_greedy"),
                default="greedy" if v2 else "noaux_tc",
            ),
            rms_norm_eps=keys.number("rms_norm_eps", default=1e-6),
            rope=_rope(keys),
            max_position_embeddings=keys.integer("max_position_embeddings", least=1),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", default=False),
            index_topk=topk,
            index_n_heads=0 if topk is None else keys.integer("index_n_heads", least=1),
            index_head_dim=0 if topk is None else keys.integer("index_head_dim", least=1),
            indexer_rope_interleave=keys.boolean("indexer_rope_interleave", default=glm),
            weight_block_size=_block_size(keys),
            bos_token_id=keys.integer_or_none("bos_token_id", least=0),
            eos_token_ids=_eos(keys, _Keys(generation, str(folder / "generation_config.json"))),
        )
        config._check(keys)
        return config

    @property
    def mtp_layers(self) -> int:
        """MTP modules that are used: 0 or 1. A checkpoint with more serves its first."""
        return min(self.num_nextn_predict_layers, 1)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, the MTP layer (num_hidden_layers) included."""
        # first_k_dense_replace never reaches the MTP layer: it is at most num_hidden_layers.
        return tuple(range(self.first_k_dense_replace, self.num_hidden_layers + self.mtp_layers))

    def _check(self, keys: _Keys) -> None:
        """Refuse what is set to something this package does not compute, or contradicts itself."""
        raw = keys.raw
        fixed: dict[str, tuple[Any, ...]] = {
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "rope_interleave": (True,),
            "moe_layer_freq": (1,),
            "num_key_value_heads": (self.num_attention_heads,),
        }
        for key, allowed in fixed.items():
            if raw.get(key) is not None and raw[key] not in allowed:
                raise keys.error(key, f"{raw[key]!r} is not supported, only {allowed[0]!r}")
        if self.qk_rope_head_dim % 2:
            raise keys.error("qk_rope_head_dim", f"{self.qk_rope_head_dim} is odd")
        if self.model_type in ("deepseek_v32", "glm_moe_dsa") and self.index_topk is None:
            raise keys.error("index_topk", f"missing, but {self.model_type} needs it")
        if self.index_topk is not None:
            self._check_indexer(keys)
        if self.model_type == "deepseek_v2" and self.norm_topk_prob:
            # Its authors skip the scaling factor then, others apply both: no checkpoint has it.
            raise keys.error("norm_topk_prob", "true is not supported for deepseek_v2")
        groups, kept = self.n_group, self.topk_group
        if self.topk_method == "greedy":
            groups = kept = 1
        if self.n_routed_experts % groups:
            raise keys.error(
                "n_group", f"{groups} does not divide n_routed_experts {self.n_routed_experts}"
            )
        if kept > groups:
            raise keys.error("topk_group", f"{kept} is more than n_group {groups}")
        size = self.n_routed_experts // groups
        if groups > 1 and self.topk_method == "noaux_tc" and size < 2:
            raise keys.error("n_group", f"{groups} leaves {size} expert in a group, need 2")
        if self.num_experts_per_tok > kept * size:
            raise keys.error(
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} is more than the "
                f"{kept * size} experts the kept groups hold",
            )
        for key, ids in (
            ("bos_token_id", () if self.bos_token_id is None else (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_ids),
        ):
            for token in ids:
                if token >= self.vocab_size:
                    raise keys.error(key, f"{token} is not below vocab_size {self.vocab_size}")

    def _check_indexer(self, keys: _Keys) -> None:
        width = self.index_head_dim
        if self.q_lora_rank is None:
            raise keys.error("q_lora_rank", "null, but the indexer (index_topk) reads that latent")
        if width & (width - 1):
            raise keys.error("index_head_dim", f"{width} is no power of two")
        shared = "layers that share a choice of keys are not supported"
        for key in ("indexer_types", "index_topk_pattern"):
            kinds = keys.raw.get(key) or []
            if not isinstance(kinds, str | list) or any(
                kind not in ("F", "full") for kind in kinds
            ):
                raise keys.error(key, shared)
        if keys.integer("index_topk_freq", least=0, default=1) > 1:
            raise keys.error("index_topk_freq", shared)
        if width < self.qk_rope_head_dim:
            raise keys.error(
                "index_head_dim", f"{width} is below qk_rope_head_dim {self.qk_rope_head_dim}"
            )


class _Keys:
    """Typed look-ups in one JSON object; every failure names the file, the key and the value."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: {problem}")

    def integer(self, *names: str, least: int, default: int | None = None) -> int:
        """The first of `names` that is present; without a default one of them must be."""
        for name in names:
            value = self.integer_or_none(name, least=least)
            if value is not None:
                return value
        if default is None:
            raise self.error(names[0], f"missing, want a whole number of at least {least}")
        return default

    def integer_or_none(self, name: str, *, least: int) -> int | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(name, f"{value!r}, want a whole number of at least {least}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self.number_or_none(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing, want a number")
        if value <= 0:
            raise self.error(name, f"{value!r}, want a positive number")
        return value

    def number_or_none(self, name: str) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, f"{value!r}, want a number")
        if not -1e300 < value < 1e300:  # also not NaN
            raise self.error(name, "not a finite number")
        return float(value)

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r}, want true or false")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], *, default: str) -> str:
        value = self.raw.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise self.error(name, f"{value!r} is not supported; supported: {', '.join(allowed)}")
        return str(value)

    def table(self, name: str) -> _Keys | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"{value!r}, want an object")
        return _Keys(value, f"{self.source}: {name}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:  # not UTF-8, not JSON, or nested without end
        raise ConfigError(f"{path} is not JSON: {problem}") from problem
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return raw


def _dense_layers(keys: _Keys, layers: int) -> int:
    """first_k_dense_replace, also from the list `mlp_layer_types` that transformers 5 writes."""
    kinds = keys.raw.get("mlp_layer_types")
    if kinds is None:
        dense = keys.integer("first_k_dense_replace", least=0)
    else:
        dense = kinds.count("dense") if isinstance(kinds, list) else 0
        if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
            raise keys.error(
                "mlp_layer_types", f"want 'dense' then 'sparse' for {layers} layers, nothing else"
            )
    if dense > layers:
        raise keys.error(
            "first_k_dense_replace", f"{dense} is more than num_hidden_layers {layers}"
        )
    return dense


def _rope(keys: _Keys) -> Rope:
    """From `rope_theta` and `rope_scaling`, or both in `rope_parameters` (transformers 5)."""
    nested = keys.table("rope_parameters")
    scaling = nested or keys.table("rope_scaling")
    theta = (nested.number_or_none("rope_theta") if nested else None) or keys.number(
        "rope_theta", default=10000.0
    )
    if theta <= 1:
        raise keys.error("rope_theta", f"{theta} is not above 1")
    if scaling is None:
        return Rope(theta, None)
    kind = scaling.raw.get("rope_type", scaling.raw.get("type", "default"))
    if kind == "default":
        return Rope(theta, None)
    if kind != "yarn":
        raise scaling.error("rope_type", f"{kind!r} is not supported; supported: default, yarn")
    original = scaling.integer("original_max_position_embeddings", least=1)
    factor = scaling.number_or_none("factor")
    if factor is None:
        factor = keys.integer("max_position_embeddings", least=1) / original
    if factor < 1:
        raise scaling.error("factor", f"{factor} is below 1")
    return Rope(
        theta,
        Yarn(
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=scaling.number("beta_fast", default=32.0),
            beta_slow=scaling.number("beta_slow", default=1.0),
            mscale=scaling.number_or_none("mscale"),
            mscale_all_dim=scaling.number_or_none("mscale_all_dim"),
            attention_factor=scaling.number_or_none("attention_factor"),
            truncate=scaling.boolean("truncate", default=True),
        ),
    )


def _block_size(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.table("quantization_config")
    if quantization is None:
        return None
    method = quantization.raw.get("quant_method")
    if method != "fp8":
        raise quantization.error("quant_method", f"{method!r} is not supported; supported: fp8")
    if quantization.raw.get("fmt", "e4m3") != "e4m3":
        raise quantization.error(
            "fmt", f"{quantization.raw['fmt']!r} is not supported, only 'e4m3'"
        )
    block = quantization.raw.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(not isinstance(edge, int) or isinstance(edge, bool) or edge < 1 for edge in block)
    ):
        raise quantization.error("weight_block_size", f"{block!r}, want two whole numbers")
    return block[0], block[1]


def _eos(config: _Keys, generation: _Keys) -> tuple[int, ...]:
    """Every token that ends an answer, in either file: one id, a list of ids, or none."""
    found: list[int] = []
    for keys in (config, generation):
        value = keys.raw.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise keys.error("eos_token_id", f"{value!r}, want a token id or a list of them")
            if token not in found:
                found.append(token)
    return tuple(found)
