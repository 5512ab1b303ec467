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
from tests.unit.local_model import WatchedModel

YARN = CONFIG["rope_scaling"]
NO_GROUPS = {"n_group": 1, "topk_group": 1}
V2 = {
    "model_type": "deepseek_v2",
    "num_nextn_predict_layers": 0,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
SPARSE = {
    "model_type": "deepseek_v32",
    "index_topk": 24,
    "index_n_heads": 16,  # few heads leave many scores at exactly 0, and ties are left open there
    "index_head_dim": 32,
    "scale_dtype": "F8_E8M0",
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
    "deepseek_v32": SPARSE,
    "glm": {
        **SPARSE,
        **NO_GROUPS,
        "model_type": "glm_moe_dsa",
        "qk_nope_head_dim": 24,
        "v_head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 1e6,
    },
    "deepseek_v2_lite": {**V2, "q_lora_rank": None, "topk_method": "greedy", "weights": "bf16"},
    "deepseek_v2": {**V2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
}
PROMPT, DECODED = 40, 32


@pytest.mark.parametrize("name", VARIATIONS)
async def test_equals_transformers(name: str, tmp_path: Path) -> None:
    seed = list(VARIATIONS).index(name)
    folder = make_checkpoint(tmp_path, seed=seed, tokenizer=False, **VARIATIONS[name])
    # Three slices of 192 columns start inside a block of 128.
    await agree(name, folder, reference.load(folder), random_ids(PROMPT, seed), 1 + seed % 3)


async def agree(
    name: str, folder: Path, truth: reference.Reference, prompt: list[int], ducks: int
) -> None:
    """Greedy tokens, drafts, and all logits of prompt and answer."""
    start = len(prompt)
    greedy = duck.Sampling(max_tokens=DECODED, temperature=0, ignore_eos=True)
    drafts: list[list[int]] = []
    async with duck.Engine.open(
        folder, ducks=f"local:{ducks}", transport="loopback", draft="mtp"
    ) as engine:
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
    assert expected[start - 1 : -1].argmax(dim=-1).tolist() == done.token_ids
    if mtp_logits is not None:
        expected = truth.mtp_logits(ids)
        assert difference(f"{name}, MTP", mtp_logits, expected) < 1e-3
        # The guess made after completion token i is of the token after it.
        guesses = expected[start - 1 :].argmax(dim=-1).tolist()
        assert len(drafts) > DECODED // 4
        assert drafts == [[index, guesses[index]] for index, _ in drafts]


async def test_a_prompt_of_several_chunks(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=50, tokenizer=False)
    ids = random_ids(300, 50)
    async with duck.Engine.open(folder, ducks="local:2", transport="loopback") as engine:
        logits = await engine.score(ids)
    assert difference("300 tokens", logits, reference.load(folder).logits(ids)) < 1e-3


# sparse attention


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, reference.Reference]:
    folder = make_checkpoint(tmp_path_factory.mktemp("v32"), seed=52, tokenizer=False, **SPARSE)
    return folder, reference.load(folder)


@pytest.mark.parametrize("times", [1, 2, 3, 4])
async def test_prompts_beyond_index_topk(
    times: int, sparse: tuple[Path, reference.Reference]
) -> None:
    folder, truth = sparse
    prompt = random_ids(24 * times, times)
    await agree(f"{times} x index_topk", folder, truth, prompt, times)


async def test_a_sparse_prompt_of_several_chunks(tmp_path: Path) -> None:
    """The second chunk's rows all select; the first's from index_topk on."""
    shape = {**SPARSE, "index_topk": 96}
    folder = make_checkpoint(tmp_path, seed=53, tokenizer=False, **shape)
    await agree("384 tokens", folder, reference.load(folder), random_ids(384, 53), 2)


def test_selected_keys_equal_transformers(
    sparse: tuple[Path, reference.Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row's, of every layer and the MTP layer: whole, in chunks, and one row at a time."""
    folder, truth = sparse
    ids = random_ids(96, 1)
    truth.mtp_logits(ids)  # 95 rows, of the main layers too
    rows = {3: truth.selected[3]}
    truth.logits(ids)
    rows |= {layer: truth.selected[layer] for layer in range(3)}
    expected = {
        (layer, row): frozenset(chosen.tolist())
        for layer, selected in rows.items()
        for row, chosen in enumerate(selected)
        if row >= 24
    }
    model = WatchedModel(folder, monkeypatch)
    model.mtp_logits(ids)
    assert model.selected == expected
    main = {key: chosen for key, chosen in expected.items() if key[0] < 3}
    for cut in ((20, 40, 36), (1,) * 96):
        model.selected.clear()
        cache, at = model.model.new_cache(96), 0
        for count in cut:
            model.hidden(ids[at : at + count], cache, at)
            at += count
        assert model.selected == main


def random_ids(count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(
        288, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return ids


def difference(what: str, got: np.ndarray, expected: torch.Tensor) -> float:
    """The largest, printed for the record."""
    assert got.shape == expected.shape
    largest = float((torch.from_numpy(got) - expected).abs().max())
    print(f"{what}: largest logit difference {largest:.1e}")
    return largest
