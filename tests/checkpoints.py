"""Tiny random checkpoints in the published format, for tests of every part.

    make_checkpoint(tmp_path, seed=0)                       # deepseek_v3, fp8, one MTP layer
    make_checkpoint(tmp_path, seed=0, n_group=1, shards=3)  # any key of config.json, any layout

Weights are scaled so that the model behaves like one: logits have a standard deviation of about 2,
attention and experts both matter, and routing is spread over all experts. The writer shares no code
with the reader in duck/model/weights.py. Takes well under a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duck.kernels import fp8

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 288,
    "hidden_size": 160,  # one whole block of 128 and a ragged one
    "intermediate_size": 224,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 2560,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""config.json unless overridden: V3 made small, every width a number of its own."""

Tensor = tuple[str, np.ndarray]  # the dtype as safetensors names it, and the bytes' array


def make_checkpoint(
    folder: Path,
    *,
    seed: int,
    weights: str = "fp8",
    block: tuple[int, int] = (128, 128),
    scale_dtype: str = "F32",
    scale_name: str = "weight_scale_inv",
    shards: int = 0,
    mtp_copies: bool = False,
    bias: tuple[float, float] = (0.0, 0.1),
    attention: float = 2.0,
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Write config.json, weights and tokenizer into `folder` (made if need be) and return it.

    weights: "fp8", "bf16" or "f32"; the last two have no quantization_config.
    scale_dtype: F32, BF16, F8_E8M0 or U8 (both hold powers of two as exponent bytes).
    scale_name: "weight_scale_inv" as DeepSeek publishes, or "scale".
    shards: 0 writes one model.safetensors; n writes n files and an index, no scale by its weight.
    mtp_copies: also write the MTP layer's copies of embedding and head.
    bias: mean and standard deviation of e_score_correction_bias; a mean of -1 makes the biased
        scores negative.
    attention: how far from flat it is, and what it weighs beside the rest.
    config: keys of config.json that differ from CONFIG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = {**CONFIG, **config}
    if weights == "fp8":
        shape["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        }
    (folder / "config.json").write_text(json.dumps(shape, indent=1))

    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, size, std, kind in _parameters(shape, bias, attention):
        values = rng.standard_normal(size, dtype=np.float32) * np.float32(std)
        if kind == "norm":
            values = 1 + values
        if kind == "bias":
            values += np.float32(bias[0])
        if kind == "linear" and weights == "fp8":
            scale, codes = _quantise(values, block, scale_dtype)
            tensors[name] = ("F8_E4M3", codes)
            tensors[f"{name.removesuffix('.weight')}.{scale_name}"] = scale
        elif kind in ("f32", "bias") or weights == "f32":
            tensors[name] = ("F32", values)
        else:
            tensors[name] = ("BF16", to_bf16(values))
    for copy, original in _mtp_copies(shape) if mtp_copies else ():
        tensors[copy] = tensors[original]

    if not shards:
        write_safetensors(folder / "model.safetensors", tensors)
    else:
        _write_shards(folder, tensors, shards)
    if tokenizer and shape["vocab_size"] >= CONFIG["vocab_size"]:
        _write_tokenizer(folder)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, values) in tensors.items():
        end = at + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 (as uint16), nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _quantise(
    values: np.ndarray, block: tuple[int, int], scale_dtype: str
) -> tuple[Tensor, np.ndarray]:
    """((scale dtype, stored scales), codes); the codes are taken with the scales as stored."""
    powers = scale_dtype in ("F8_E8M0", "U8")
    _, scales = fp8.quantise(values, block, ue8m0=powers)
    if powers:
        stored = (np.log2(scales) + 127).astype(np.uint8)
    elif scale_dtype == "BF16":
        stored = to_bf16(scales)
        scales = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = scales
    rows, columns = values.shape
    wide = np.repeat(np.repeat(scales, block[0], 0)[:rows], block[1], 1)[:, :columns]
    return (scale_dtype, stored), fp8.encode(values / wide)


def _parameters(
    shape: Mapping[str, Any], bias: tuple[float, float], attention: float
) -> Iterator[tuple[str, tuple[int, ...], float, str]]:
    """(name, shape, standard deviation, kind): "linear" (fp8), "bf16", "norm", "f32" or "bias"."""
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]
    layers, mtp = shape["num_hidden_layers"], shape["num_nextn_predict_layers"]
    head = 2 * hidden**-0.5  # for logits with a standard deviation of 2
    tied = shape["tie_word_embeddings"]
    yield "model.embed_tokens.weight", (vocab, hidden), head if tied else 1.0, "bf16"
    for layer in range(layers + mtp):
        yield from _layer(shape, layer, bias, attention)
    yield "model.norm.weight", (hidden,), 0.1, "norm"
    if not tied:
        yield "lm_head.weight", (vocab, hidden), head, "bf16"
    for layer in range(layers, layers + mtp):
        name = f"model.layers.{layer}"
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{name}.{norm}.weight", (hidden,), 0.1, "norm"
        yield f"{name}.eh_proj.weight", (hidden, 2 * hidden), (2 * hidden) ** -0.5, "bf16"


def _layer(
    shape: Mapping[str, Any], layer: int, bias: tuple[float, float], attention: float
) -> Iterator[tuple[str, tuple[int, ...], float, str]]:
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    nope, rotary, value = (shape[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rank, q_rank = shape["kv_lora_rank"], shape["q_lora_rank"]
    name = f"model.layers.{layer}"

    def linear(part: str, rows: int, columns: int, gain: float = 1.0) -> Any:
        return f"{name}.{part}.weight", (rows, columns), gain * columns**-0.5, "linear"

    def mlp(part: str, width: int) -> Any:
        yield linear(f"{part}.gate_proj", width, hidden)
        yield linear(f"{part}.up_proj", width, hidden)
        yield linear(f"{part}.down_proj", hidden, width, gain=1.5)

    yield f"{name}.input_layernorm.weight", (hidden,), 0.1, "norm"
    yield f"{name}.post_attention_layernorm.weight", (hidden,), 0.1, "norm"
    q_width = heads * (nope + rotary)
    if q_rank is None:
        yield linear("self_attn.q_proj", q_width, hidden, gain=attention)
    else:
        yield linear("self_attn.q_a_proj", q_rank, hidden)
        yield f"{name}.self_attn.q_a_layernorm.weight", (q_rank,), 0.1, "norm"
        yield linear("self_attn.q_b_proj", q_width, q_rank, gain=attention)
    yield linear("self_attn.kv_a_proj_with_mqa", rank + rotary, hidden)
    yield f"{name}.self_attn.kv_a_layernorm.weight", (rank,), 0.1, "norm"
    yield linear("self_attn.kv_b_proj", heads * (nope + value), rank)
    yield linear("self_attn.o_proj", hidden, heads * value, gain=attention)
    if "index_topk" in shape:
        index_heads, width = shape["index_n_heads"], shape["index_head_dim"]
        yield linear("self_attn.indexer.wq_b", index_heads * width, q_rank)
        yield linear("self_attn.indexer.wk", width, hidden)
        yield f"{name}.self_attn.indexer.k_norm.weight", (width,), 0.1, "norm"
        yield f"{name}.self_attn.indexer.k_norm.bias", (width,), 0.1, "f32"
        yield f"{name}.self_attn.indexer.weights_proj.weight", (index_heads, hidden), 0.1, "bf16"
    if layer < shape["first_k_dense_replace"]:
        yield from mlp("mlp", shape["intermediate_size"])
        return
    experts, width = shape["n_routed_experts"], shape["moe_intermediate_size"]
    yield f"{name}.mlp.gate.weight", (experts, hidden), 1.5 * hidden**-0.5, "bf16"
    if shape["topk_method"] == "noaux_tc":
        yield f"{name}.mlp.gate.e_score_correction_bias", (experts,), bias[1], "bias"
    for expert in range(experts):
        yield from mlp(f"mlp.experts.{expert}", width)
    if shape["n_shared_experts"]:
        yield from mlp("mlp.shared_experts", width * shape["n_shared_experts"])


def _mtp_copies(shape: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = f"model.layers.{shape['num_hidden_layers']}"
    yield f"{name}.embed_tokens.weight", "model.embed_tokens.weight"
    yield f"{name}.shared_head.head.weight", "lm_head.weight"


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        write_safetensors(
            folder / file, {name: t for name, t in tensors.items() if weight_map[name] == file}
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SPECIAL_TOKENS = (  # ids 0.. in this order
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)
_MERGES = (
    "t h, h e, th e, i n, a n, e r, o n, r e, a t, e n, o r, i s, i t, e s, a l, o u, "
    "Ġ t, Ġt he, Ġ a, Ġ s, Ġ i, Ġ w, Ġ o, in g, an d, s t"
)


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 288 tokens: DeepSeek's special tokens, all bytes, a few merges."""
    merges = _MERGES.split(", ")
    # GPT-2's byte alphabet: printable bytes stand for themselves, the rest for U+0100 and up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    alphabet = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    assert len(tokens) == CONFIG["vocab_size"]
    added = [
        {
            "id": index,
            "content": token,
            "special": token not in ("<think>", "</think>"),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "add_bos_token": True,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
