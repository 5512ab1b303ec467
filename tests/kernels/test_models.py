"""Whole tiny models: linears that stay fp8, and every kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from duck.kernels.device import REFERENCE, pick
from duck.kernels.matrix import Fp8Matrix
from duck.model.config import ModelConfig
from duck.model.footprint import footprint
from duck.model.holding import Holding
from duck.model.transformer import Transformer
from duck.model.weights import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.kernels.comparing import assert_near
from tests.unit.local_model import LocalModel

CPU = torch.device("cpu")
IDS = torch.randint(288, (24,), generator=torch.Generator().manual_seed(2)).tolist()
SHAPES: dict[str, dict[str, Any]] = {
    "ragged blocks": {},
    "stacked": {"intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128},
    "small blocks": {"block": (48, 32)},
    "powers of two": {"scale_dtype": "F8_E8M0"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_kept_fp8_is_what_its_numbers_are(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, **SHAPES[name])
    plain, kept = LocalModel(folder), LocalModel(folder, fp8_kept=True)
    categories = kept.model.tally.categories
    assert categories["linears, fp8 kept"].tensors > 20
    assert categories["linears, fp8 -> float32"].tensors == 4  # kv_b_proj
    for got, want in (
        (kept.logits(IDS), plain.logits(IDS)),
        (kept.mtp_logits(IDS), plain.mtp_logits(IDS)),
    ):
        assert_near(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


SMALL = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}  # a dense layer and a sparse one


@pytest.mark.parametrize("name", ["ragged blocks", "stacked"])
def test_all_kernels_give_the_model_s_logits(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, **SMALL, **SHAPES[name])
    want = LocalModel(folder).logits(IDS[:20])
    local = LocalModel(folder, kernels="triton", fp8_kept=True)
    assert local.model.kernels.name == "triton"
    # A chunk, then one row and two: the rows that drafts make.
    cache, rows = local.model.new_cache(20), []
    for start, stop in ((0, 17), (17, 18), (18, 20)):
        rows.append(local.hidden(IDS[start:stop], cache, start))
    with torch.inference_mode():
        got = local.model.logits(torch.cat(rows))
    assert_near(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_all_kernels_with_the_fp8_cache_in_bf16(tmp_path: Path) -> None:
    """Roundings flip experts of a random tiny model: agreement is a rate."""
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, **SMALL)
    options: dict[str, Any] = {"dtype": "bfloat16", "kv": "fp8", "fp8_kept": True}
    want = LocalModel(folder, **options).logits(IDS[:10])
    got = LocalModel(folder, kernels="triton", **options).logits(IDS[:10])
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() >= 0.8
    assert (got - want).abs().mean() < 0.1


@torch.inference_mode()
def test_attending_and_routing_at_once_is_the_same(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, **SMALL)
    for kernels in ("reference", "triton"):
        model = LocalModel(folder, kernels=kernels, fp8_kept=True).model
        layer, x = model.layers[1], model.embed(IDS[:3])
        first, second = model.new_cache(3), model.new_cache(3)
        attended = layer.attend(x, first, 0, last=2)
        want = layer.route(attended)
        at_once, got = layer.attend_and_route(x, second, 0, last=2)
        assert_near(at_once, attended, rtol=1e-6, atol=1e-6)
        assert_near(got.h, want.h, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.ids, want.ids)
        assert torch.equal(first.latents.read(1, 3), second.latents.read(1, 3))


def test_what_is_planned_is_what_is_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, tokenizer=False)
    config = ModelConfig.load(folder)
    holding = Holding.choose(config, dtype="bfloat16", fp8_kept=True)
    planned = footprint(config, holding, device="cpu")
    model = Transformer.load(Checkpoint.open(folder), config, holding, device=CPU)
    kept = model.tally.categories["linears, fp8 kept"]
    assert kept in planned.categories
    loaded = sum(category.resident_bytes for category in model.tally.categories.values())
    assert loaded == planned.resident_bytes


def test_progress_counts_kept_matrices_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, tokenizer=False)
    config = ModelConfig.load(folder)
    seen: list[tuple[int, int]] = []
    Transformer.load(
        Checkpoint.open(folder),
        config,
        Holding.choose(config, dtype="bfloat16", fp8_kept=True),
        device=CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_blocks_that_no_kernel_knows_are_not_kept(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, tokenizer=False, block=(128, 24))
    config = ModelConfig.load(folder)
    assert not Holding.choose(config, dtype="bfloat16", fp8_kept=True).fp8_kept
    plain = make_checkpoint(tmp_path / "plain", seed=1, tokenizer=False, weights="bf16")
    config = ModelConfig.load(plain)
    assert not Holding.choose(config, dtype="bfloat16", fp8_kept=True).fp8_kept


def test_what_is_picked() -> None:
    assert pick(CPU) is REFERENCE
    assert pick(CPU, "reference") is REFERENCE
    assert pick(torch.device("cuda"), "reference") is REFERENCE
    triton = pick(CPU, "triton")
    assert (triton.name, triton.fp8) == ("triton", True)
    assert triton.linear is not REFERENCE.linear


def test_stacking_and_views_of_blocks() -> None:
    def matrix(rows: int, seed: int) -> Fp8Matrix:
        numbers = torch.randn(rows, 70, generator=torch.Generator().manual_seed(seed))
        return Fp8Matrix(numbers.to(torch.float8_e4m3fn), torch.rand(-(-rows // 32), 3), (32, 32))

    first, second = matrix(64, 1), matrix(40, 2)
    both = Fp8Matrix.stacked([first, second])
    assert both is not None
    assert both.shape == (104, 70)
    assert both.nbytes == first.nbytes + second.nbytes
    whole = both.dequantised()
    assert torch.equal(whole, torch.cat((first.dequantised(), second.dequantised())))
    assert torch.equal(both.rows(32, 104).dequantised(), whole[32:])
    assert Fp8Matrix.stacked([second, first]) is None  # a block would span both
    assert Fp8Matrix.stacked([first, torch.zeros(3, 70)]) is None
