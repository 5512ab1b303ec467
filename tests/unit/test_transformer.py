"""The transformer as its users see it: loading, dtypes, steps, the MTP module's inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from duck.errors import WeightsError
from duck.model import layers
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.transformer import Transformer
from duck.model.weights import Checkpoint
from tests.checkpoints import make_checkpoint
from tests.unit.local_model import LocalModel

CPU = torch.device("cpu")
IDS = torch.randint(288, (64,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=4, tokenizer=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> LocalModel:
    return LocalModel(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_progress_ends_at_the_total_and_leaves_experts_out(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, tie_word_embeddings=tied)
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.load(folder)
    seen: list[tuple[int, int]] = []
    Transformer.load(
        checkpoint,
        config,
        Holding.choose(config, dtype="float32"),
        device=CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    wanted = sum(
        info.nbytes
        for name, info in checkpoint.tensors.items()
        if ".mlp.experts." not in name and not name.endswith("_scale_inv")
    )
    assert seen == sorted(seen)
    assert seen[-1] == (wanted, wanted)


def test_a_tensor_read_in_parts_is_the_same(
    folder: Path, model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_PART", 3000)  # 18 rows of 160
    assert torch.equal(LocalModel(folder).logits(IDS[:8]), model.logits(IDS[:8]))


def test_load_checks_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path, seed=4, tokenizer=False, first_k_dense_replace=2)
    config = ModelConfig.load(other)
    holding = Holding.choose(config, dtype="float32")
    with pytest.raises(WeightsError):
        Transformer.load(Checkpoint.open(folder), config, holding, device=CPU)


@torch.inference_mode()
def test_types_and_shapes_of_every_step(model: LocalModel) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        holding = Holding.choose(model.config, dtype=str(dtype).removeprefix("torch."))
        whole = Transformer.load(
            Checkpoint.open(Path(model.folder)), model.config, holding, device=CPU
        )
        x = whole.embed([5, 6, 7])
        assert (x.shape, x.dtype) == ((3, 160), dtype)
        cache = whole.new_cache(3)
        dense, moe = whole.layers[0], whole.layers[1]
        assert (dense.is_moe, moe.is_moe, moe.index) == (False, True, 1)
        x = dense.dense(dense.attend(x, cache, 0))
        assert (x.shape, x.dtype) == ((3, 160), dtype)
        routed = moe.route(x)
        assert (routed.h.dtype, routed.ids.shape) == (dtype, (3, 4))
        shared = moe.shared(routed.h)
        assert (shared.shape, shared.dtype) == ((3, 160), torch.float32)
        merged = moe.merge(x, shared, torch.ones(3, 160))
        assert merged.dtype == dtype
        assert torch.equal(merged, (x.float() + (1 + shared)).to(dtype))
        logits = whole.logits(whole.final(merged))
        assert (logits.shape, logits.dtype) == ((3, 288), torch.float32)
        assert whole.mtp is not None
        assert whole.mtp.layer.is_moe
        assert whole.mtp.layer.index == 3
        assert whole.mtp.combine([6, 7], x[:2]).shape == (2, 160)


def test_no_shared_expert_adds_zeros(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, n_shared_experts=None)
    model = LocalModel(folder)
    h = torch.ones(2, 160)
    assert torch.equal(model.model.layers[1].shared(h), torch.zeros(2, 160))
    assert model.logits(IDS[:4]).isfinite().all()


def test_dense_prefix_may_cover_all_layers_but_the_mtp_layer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=4, tokenizer=False, first_k_dense_replace=3)
    model = LocalModel(folder).model
    assert [layer.is_moe for layer in model.layers] == [False, False, False]
    assert model.mtp is not None
    assert model.mtp.layer.is_moe


def test_bf16_mostly_agrees_with_float32(folder: Path, model: LocalModel) -> None:
    """A random tiny model flips experts under any rounding: agreement is a rate, not a bound."""
    narrow = LocalModel(folder, "bfloat16").logits(IDS)
    wide = model.logits(IDS)
    assert narrow.dtype == torch.float32
    agree = (narrow.argmax(-1) == wide.argmax(-1)).float().mean().item()
    error = (narrow - wide).abs().mean().item()
    print(f"bf16: {agree:.0%} of argmaxes agree, mean logit difference {error:.3f}")
    assert agree >= 0.8
    assert error < 0.2


def test_router_norms_and_head_are_float32_in_bf16(folder: Path) -> None:
    """bf16 logits would tie, and a bf16 router would pick other experts."""
    model = LocalModel(folder, "bfloat16")
    logits = model.logits(IDS)
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9
    layer = model.model.layers[1]
    with torch.inference_mode():
        weights = layer.route(model.model.embed(IDS)).weights
    torch.testing.assert_close(weights.sum(-1), torch.full((64,), 2.5), rtol=1e-6, atol=1e-6)
