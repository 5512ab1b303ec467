"""The KV cache: rows as they lie in memory, and positions that are the caller's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from duck.errors import ConfigError
from duck.kernels import fp8
from duck.model.cache import DTYPES, Fp8Rows, KVCache, LayerRows, PlainRows
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """3 layers and the MTP layer; latents of 32 + 8 numbers, index keys of 16."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("model"), seed=3, tokenizer=False, model_type="deepseek_v32",
        index_topk=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    return ModelConfig.load(folder)


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_rows_are_as_flash_mla_reads_them() -> None:
    """656 bytes: 512 codes, 4 float32 scales, 64 bf16; each part by code that is not ours."""
    values = rows(3, 576) * torch.tensor([[1.0], [300.0], [1e-3]])
    held = Fp8Rows(512, 64, torch.float32).pack(values).numpy()
    assert held.shape == (3, 656)
    coded = values[:, :512].numpy()
    codes, scales = fp8.quantise(coded, (1, 128), ue8m0=True)
    assert (held[:, :512] == codes).all()
    assert (held[:, 512:528].copy().view(np.float32) == scales).all()
    assert (held[:, 528:].copy().view(np.uint16) == _bf16(values[:, 512:])).all()


def _bf16(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().view(torch.uint16).numpy()


@pytest.mark.parametrize(("coded", "plain", "width"), [(512, 64, 656), (128, 0, 132), (30, 3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rows_come_back_rounded(coded: int, plain: int, width: int, dtype: torch.dtype) -> None:
    form = Fp8Rows(coded, plain, dtype)
    assert form.width == width
    values = rows(5, coded + plain).to(dtype)
    held = form.pack(values)
    back = form.unpack(held)
    assert back.dtype == dtype
    error = (back.double() - values.double()).abs()
    # Half a step of 3 bits after the leading one; next to zero, of 2^-9 of the scale.
    assert (error[:, :coded] <= values[:, :coded].double().abs() / 16 + 1e-3).all()
    assert torch.equal(back[:, coded:], values[:, coded:].bfloat16().to(dtype))
    assert torch.equal(form.pack(back), held)  # rounding again changes nothing
    # One row alone, many axes, every second row: the same numbers.
    assert torch.equal(form.unpack(held[3:4]), back[3:4])
    assert torch.equal(form.unpack(held[None, ::2]), back[None, ::2])
    assert (form.unpack(torch.zeros_like(held)) == 0).all()


def test_plain_rows() -> None:
    form = PlainRows(4, torch.bfloat16, torch.float32)
    values = rows(2, 4)
    assert form.pack(values).dtype == torch.bfloat16
    assert torch.equal(form.unpack(form.pack(values)), values.bfloat16().float())


def test_write_and_read() -> None:
    store = LayerRows(2, PlainRows(4, torch.float32, torch.float32), 6, device=CPU)
    values = rows(6, 4)
    store.write(1, 0, values[:4])
    store.write(1, 4, values[4:])
    assert torch.equal(store.read(1, 5), values[:5])
    assert (store.read(0, 6) == 0).all()
    assert torch.equal(store.held(1, 4, 2), values)
    store.write(1, 2, values[:1])  # a rewind
    assert torch.equal(store.read(1, 3)[2], values[0])


def test_writing_beyond_the_capacity_fails() -> None:
    store = LayerRows(1, PlainRows(4, torch.float32, torch.float32), 3, device=CPU)
    store.write(0, 2, torch.ones(1, 4))
    with pytest.raises(AssertionError, match=r"2\.\.4 of 3"):
        store.write(0, 2, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv", ["auto", "bf16", "fp8"])
@pytest.mark.parametrize("indexer", ["exact", "fp8"])
def test_a_cache_takes_what_was_planned(
    config: ModelConfig, dtype: str, kv: str, indexer: str
) -> None:
    for max_len in (4, 5):  # index_topk is 4
        holding = Holding.choose(config, dtype=dtype, kv=kv, indexer=indexer, max_len=max_len)
        cache = KVCache.of(config, holding, 7, device=CPU)
        assert cache.nbytes == 7 * holding.token_nbytes(config)
        assert cache.latents.read(3, 7).dtype == DTYPES[dtype]
    assert cache.keys.read(3, 7).shape == (7, 16)


def test_bytes_of_a_token(config: ModelConfig) -> None:
    """The MTP layer's included: 4 layers of 32 + 8 numbers, and of 16."""
    sizes = {}
    for kv in ("auto", "bf16", "fp8"):
        for indexer in ("exact", "fp8"):
            holding = Holding.choose(config, dtype="float32", kv=kv, indexer=indexer)
            sizes[kv, indexer] = holding.token_nbytes(config) // 4
    assert sizes == {
        ("auto", "exact"): 160 + 64,
        ("bf16", "exact"): 80 + 64,
        ("fp8", "exact"): 32 + 4 + 16 + 64,
        ("auto", "fp8"): 160 + 20,
        ("bf16", "fp8"): 80 + 20,
        ("fp8", "fp8"): 32 + 4 + 16 + 20,
    }


def test_growing_keeps_what_is_there_and_heeds_the_limit(config: ModelConfig) -> None:
    holding = replace(Holding.choose(config, dtype="float32"), max_len=14)
    cache = KVCache.of(config, holding, 6, device=CPU)
    latents, keys = rows(6, 40), rows(6, 16)
    cache.latents.write(2, 0, latents)
    cache.keys.write(2, 0, keys)
    capacities = []
    for wanted in (3, 6, 7, 10, 14, 30):
        cache.grow(wanted)
        capacities.append(cache.capacity)
    # Half as much again, up to what a session may hold, unless more is asked for.
    assert capacities == [6, 6, 9, 13, 14, 30]
    assert torch.equal(cache.latents.read(2, 6), latents)
    assert torch.equal(cache.keys.read(2, 6), keys)
    assert cache.nbytes == 30 * holding.token_nbytes(config)


def test_what_auto_means(config: ModelConfig) -> None:
    assert Holding.choose(config, dtype="float32") == Holding(2560, "float32", "float32", "exact")
    assert Holding.choose(config, dtype="bfloat16") == Holding(2560, "bfloat16", "bfloat16", "fp8")
    # Within index_topk every row attends to all keys: no indexer, whatever was asked for.
    short = Holding.choose(config, dtype="bfloat16", kv="fp8", indexer="fp8", max_len=4)
    assert short == Holding(4, "bfloat16", "fp8", None)
    assert Holding.choose(config, dtype="bfloat16", max_len=5).indexer == "fp8"
    dense = replace(config, index_topk=None)
    assert Holding.choose(dense, dtype="float32", indexer="exact").indexer is None


@pytest.mark.parametrize("asked", [0, -1, 2561])
def test_a_length_beyond_the_context(config: ModelConfig, asked: int) -> None:
    with pytest.raises(ConfigError, match=f"--max-len {asked}: the model's context is 2560"):
        Holding.choose(config, dtype="float32", max_len=asked)
