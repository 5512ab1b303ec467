"""What a host will hold, from a config alone: against real loads, and the real V3.2's figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from duck.budget import Budget, plan_memory
from duck.errors import ConfigError
from duck.model.config import ModelConfig
from duck.model.footprint import Footprint, footprint
from duck.model.holding import Holding
from duck.model.transformer import Transformer
from duck.model.weights import Checkpoint
from tests.checkpoints import make_checkpoint

MIB = 1 << 20


@pytest.fixture(scope="module")
def v32() -> ModelConfig:
    """DeepSeek-V3.2 as published."""
    return ModelConfig.load(Path(__file__).parents[1] / "data" / "deepseek-v3.2")


def rows(found: Footprint) -> dict[str, tuple[int, float, float]]:
    """Category: tensors, source and resident MiB."""
    return {
        category.name: (
            category.tensors,
            category.source_bytes / MIB,
            category.resident_bytes / MIB,
        )
        for category in found.categories
    }


def test_v32_as_the_published_run_held_it(v32: ModelConfig) -> None:
    """Its load statistics at 2,048 tokens: no indexer, fp8 kept, kv_b_proj in bf16."""
    holding = Holding.choose(v32, dtype="bfloat16", kv="fp8", max_len=2048, fp8_kept=True)
    found = rows(footprint(v32, holding, device="cuda"))
    kept, folded = found["linears, fp8 kept"], found["linears, fp8 -> bfloat16"]
    plain = found["linears, bfloat16 kept"]
    assert (kept[0], folded[0], plain[0]) == (434, 62, 2)
    assert kept[1] == pytest.approx(13686.5, abs=1)
    assert folded[1:] == pytest.approx((992.2, 1984.0), abs=1)
    assert plain[1] == pytest.approx(1963.5, abs=1)
    linears = [row for name, row in found.items() if name.startswith("linears")]
    assert sum(row[0] for row in linears) == 498
    assert sum(row[2] for row in linears) == pytest.approx(17634.6, abs=1)
    main = 61 * 2048 * holding.latent_nbytes(v32)  # the MTP layer's KV was not counted there
    assert main / MIB == pytest.approx(78.2, abs=1)
    assert (holding.latent_nbytes(v32), holding.key_nbytes(v32)) == (656, 0)
    # Beside the linears: an embedding, and what is float32 in every mode.
    assert found["embedding, bfloat16 kept"] == (1, 1767.5, 1767.5)
    routers = 59 * 256 * 7168 * 4 / MIB
    assert found["norms and routers, bfloat16 -> float32"][2] == pytest.approx(routers, abs=6)
    assert found["norms and routers, float32 kept"][0] == 59


def test_v32_with_its_indexer(v32: ModelConfig) -> None:
    holding = Holding.choose(v32, dtype="bfloat16", kv="fp8", fp8_kept=True)
    assert (holding.max_len, holding.indexer) == (163840, "fp8")
    assert holding.key_nbytes(v32) == 132
    found = rows(footprint(v32, holding, device="cuda"))
    assert found["linears, fp8 kept"][0] == 434 + 2 * 62  # wq_b and wk
    # 8,192 x 1,536 and 128 x 7,168 a layer, and their scales.
    more = found["linears, fp8 kept"][2] - 13686.47
    assert more == pytest.approx(62 * (8192 * 1536 + 128 * 7168) / MIB, abs=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tie_word_embeddings": True},
        {"weights": "bf16", "q_lora_rank": None, "n_shared_experts": None},
        {"topk_method": "greedy", "num_nextn_predict_layers": 0, "block": (48, 32)},
        {
            "model_type": "deepseek_v32",
            "index_topk": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
    ],
    ids=lambda shape: next(iter(shape), "plain"),
)
def test_what_is_planned_is_what_is_loaded(
    shape: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, seed=1, tokenizer=False, **shape)
    config = ModelConfig.load(folder)
    holding = Holding.choose(config, dtype=dtype)
    planned = footprint(config, holding, device="cpu")
    checkpoint = Checkpoint.open(folder)
    model = Transformer.load(checkpoint, config, holding, device=torch.device("cpu"))

    def sums(categories: Any) -> dict[str, list[int]]:
        """By how it is held: a tiny file stores a bias or two in another dtype."""
        totals: dict[str, list[int]] = {}
        for category in categories:
            kind, _, change = category.name.partition(", ")
            held = change.removesuffix(" kept").rpartition(" ")[2]
            total = totals.setdefault(f"{kind} {held}", [0, 0])
            total[0] += category.tensors
            total[1] += category.resident_bytes
        return totals

    assert sums(planned.categories) == sums(model.tally.categories.values())
    assert model.new_cache(5).nbytes == 5 * holding.token_nbytes(config)


# the plan


def plan(config: ModelConfig, free_mib: int | None, **options: Any) -> Budget:
    free = None if free_mib is None else free_mib * MIB
    return plan_memory(config, device="cpu", free_bytes=free, **{"dtype": "bfloat16", **options})


def test_a_plan_in_words(v32: ModelConfig) -> None:
    roomy = plan(v32, 200_000, kv="fp8", max_len=64_000)
    assert roomy.holding.max_len == 64_000
    assert roomy.kv_bytes == 62 * 64_000 * (656 + 132)
    weights = footprint(v32, roomy.holding, device="cpu").resident_bytes
    assert roomy.weights_bytes == weights
    assert roomy.free_bytes is not None
    scratch = 200_000 * MIB - weights - roomy.kv_bytes - roomy.free_bytes
    assert 100 * MIB < scratch < 2000 * MIB
    assert str(roomy) == (
        f"weights {weights / MIB:,.0f} MiB, KV 2,982 MiB at 64,000 tokens, "
        f"free {roomy.free_bytes / MIB:,.0f} MiB"
    )
    unknown = plan(v32, None)
    assert str(unknown).endswith("KV 12,439 MiB at 163,840 tokens")
    assert unknown.to_json()["free_bytes"] is None


def test_without_a_length_it_is_what_fits(v32: ModelConfig) -> None:
    whole = plan(v32, 100_000)
    assert whole.holding.max_len == 163_840
    assert whole.free_bytes is not None
    less = 100_000 - int(whole.free_bytes / MIB) - 5_000
    cut = plan(v32, less)
    assert 90_000 < cut.holding.max_len < 110_000
    assert cut.free_bytes is not None
    assert 0 <= cut.free_bytes < MIB
    with pytest.raises(ConfigError, match=f"what helps: --max-len {cut.holding.max_len}, --kv fp8"):
        plan(v32, less, max_len=cut.holding.max_len + 1)
    assert replace(plan(v32, less, max_len=cut.holding.max_len), shortened=True) == cut
    assert str(cut).endswith("; for the model's 163,840 tokens memory has no room")
    assert "no room" not in str(whole)


def test_what_does_not_fit_is_refused(v32: ModelConfig) -> None:
    weights = plan(v32, None, max_len=2048).weights_bytes // MIB
    with pytest.raises(ConfigError) as caught:
        plan(v32, weights)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("weights ")
    assert "MiB more than cpu memory has free; what helps: a machine with more" in text
    assert "--max-len" not in text  # not even one token fits
    with pytest.raises(ConfigError, match="free; what helps: a machine with more"):
        plan(v32, weights, dtype="float32")  # nor would it in bfloat16
    with pytest.raises(ConfigError, match="what helps: --dtype bfloat16, a machine with more"):
        plan(v32, weights + 4_000, dtype="float32", max_len=2048)
    # Fewer tokens than anybody would want are not taken without being asked for.
    whole = plan(v32, 100_000, max_len=1000)
    assert whole.free_bytes is not None
    less = 100_000 - whole.free_bytes // MIB
    with pytest.raises(ConfigError, match=r"what helps: --max-len 10\d\d, --kv fp8 --max-len 1\d"):
        plan(v32, less)
    assert plan(v32, less, max_len=1000).holding.indexer is None


def test_a_context_beyond_all_memory(v32: ModelConfig) -> None:
    """A config may say anything; what fits is found all the same."""
    endless = replace(v32, max_position_embeddings=10**30)
    assert 10_000 < plan(endless, 100_000).holding.max_len < 1_000_000


def test_a_short_context_needs_no_more(v32: ModelConfig) -> None:
    short = replace(v32, max_position_embeddings=512)
    whole = plan(short, 100_000)
    assert whole.holding.max_len == 512
    assert whole.free_bytes is not None
    with pytest.raises(ConfigError, match="--max-len"):
        plan(short, 100_000 - whole.free_bytes // MIB - 1)
