"""Logits, greedy tokens and MTP drafts of the Engine against transformers, for every variation.

Logits are compared at every position of a teacher-forced text: a random prompt and the 32 tokens
that our greedy decoding adds. Greedy decoding agrees iff transformers' argmax before each of
these tokens is that token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import duck
from tests.checkpoints import CONFIG, make_checkpoint
from tests.golden import reference

YARN = CONFIG["rope_scaling"]
NO_GROUPS = {"n_group": 1, "topk_group": 1}
V2 = {
    "model_type": "deepseek_v2",
    "num_nextn_predict_layers": 0,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_q_lora": {"q_lora_rank": None},
    "one_group": NO_GROUPS,
    "two_shared": {"n_shared_experts": 2},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "only_dense_layers": {"first_k_dense_replace": 3},
    "negative_scores": {"bias": (-1.0, 0.2)},
    "weights_not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "no_yarn": {"rope_scaling": None},
    "yarn_nested": {
        "rope_scaling": None,
        "rope_theta": None,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 50000.0},
    },
    "yarn_mscales_differ": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}},
    "yarn_no_mscales": {
        "rope_scaling": {k: v for k, v in YARN.items() if not k.startswith("mscale")}
    },
    "yarn_kimi": {
        "model_type": "kimi_k2",
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
        "rope_scaling": {**YARN, "factor": 32, "beta_fast": 1},
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.827,
        **NO_GROUPS,
    },
    "scale_bf16": {"scale_dtype": "BF16"},
    "scale_e8m0": {"scale_dtype": "F8_E8M0"},
    "scale_uint8": {"scale_dtype": "U8"},
    "scale_named_scale": {"scale_name": "scale"},
    "other_block": {"block": (48, 32)},
    "narrow": {"hidden_size": 72, "moe_intermediate_size": 40, "intermediate_size": 56},
    "aligned": {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 256},
    "sharded": {"shards": 3},
    "mtp_copies": {"mtp_copies": True},
    "two_mtp_modules": {"num_nextn_predict_layers": 2},  # the first is used
    "no_mtp": {"num_nextn_predict_layers": 0},
    "bf16": {"weights": "bf16"},
    "f32": {"weights": "f32"},
    "tied_embeddings": {"tie_word_embeddings": True},
    "deepseek_v32": {
        "model_type": "deepseek_v32",
        "index_topk": 96,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "scale_dtype": "F8_E8M0",
    },
    "deepseek_v2_lite": {**V2, "q_lora_rank": None, "topk_method": "greedy", "weights": "bf16"},
    "deepseek_v2": {**V2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
}
PROMPT, DECODED = 40, 32


@pytest.mark.parametrize("name", VARIATIONS)
async def test_equals_transformers(name: str, tmp_path: Path) -> None:
    seed = list(VARIATIONS).index(name)
    folder = make_checkpoint(tmp_path, seed=seed, tokenizer=False, **VARIATIONS[name])
    truth = reference.load(folder)
    prompt = torch.randint(288, (PROMPT,), generator=torch.Generator().manual_seed(seed)).tolist()
    greedy = duck.Sampling(max_tokens=DECODED, temperature=0, ignore_eos=True)
    ducks = f"local:{1 + seed % 3}"  # three slices of 192 columns start inside a block of 128
    drafts: list[list[int]] = []
    async with duck.Engine.open(folder, ducks=ducks, transport="loopback", draft="mtp") as engine:
        done = await engine.generate(prompt, greedy)
        ids = prompt + done.token_ids
        if truth.has_mtp:
            logits, mtp_logits = await engine.score(ids, mtp=True)
            drafts = done.stats["draft_tokens"]
        else:
            logits, mtp_logits = await engine.score(ids), None

    expected = truth.logits(ids)
    assert 0.5 < expected.std() < 8  # the checkpoint behaves like a model
    assert difference(name, logits, expected) < 1e-3
    assert expected[PROMPT - 1 : -1].argmax(dim=-1).tolist() == done.token_ids
    if mtp_logits is not None:
        expected = truth.mtp_logits(ids)
        assert difference(f"{name}, MTP", mtp_logits, expected) < 1e-3
        # The guess made after completion token i is of the token after it.
        guesses = expected[PROMPT - 1 :].argmax(dim=-1).tolist()
        assert len(drafts) > DECODED // 4
        assert drafts == [[index, guesses[index]] for index, _ in drafts]


async def test_a_prompt_of_several_chunks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=50, tokenizer=False)
    ids = torch.randint(288, (300,), generator=torch.Generator().manual_seed(50)).tolist()
    async with duck.Engine.open(folder, ducks="local:2", transport="loopback") as engine:
        logits = await engine.score(ids)
    assert difference("300 tokens", logits, reference.load(folder).logits(ids)) < 1e-3


async def test_beyond_index_topk_is_one_clear_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=51, tokenizer=False, **VARIATIONS["deepseek_v32"])
    async with duck.Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        with pytest.raises(duck.ConfigError, match="96"):
            await engine.score([5] * 97)


def difference(what: str, got: np.ndarray, expected: torch.Tensor) -> float:
    """The largest, printed for the record."""
    assert got.shape == expected.shape
    largest = float((torch.from_numpy(got) - expected).abs().max())
    print(f"{what}: largest logit difference {largest:.1e}")
    return largest
