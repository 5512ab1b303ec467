"""MLA: both forms agree with the definition, in any chunks; the cache knows positions only."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from duck.kernels.reference import device
from duck.kernels.reference.device import attend_absorbed, attend_naive
from tests.checkpoints import make_checkpoint
from tests.unit.local_model import LocalModel

HEADS, NOPE, ROPE, VALUE, RANK = 3, 6, 4, 5, 7


def operands(rows: int, position: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 100 + position)
    shapes = (
        (rows, HEADS, NOPE),
        (rows, HEADS, ROPE),
        (position + rows, RANK + ROPE),
        (HEADS, NOPE, RANK),
        (HEADS, VALUE, RANK),
    )
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def by_definition(
    q_nope: Tensor, q_pe: Tensor, latent: Tensor, wk: Tensor, wv: Tensor, position: int
) -> Tensor:
    """One score at a time, float64. Scale 0.3."""
    q_nope, q_pe, latent, wk, wv = (t.double() for t in (q_nope, q_pe, latent, wk, wv))
    out = torch.zeros(len(q_nope), HEADS, VALUE, dtype=torch.float64)
    for t in range(len(q_nope)):
        for h in range(HEADS):
            exps, values = [], []
            for s in range(position + t + 1):
                c, k_pe = latent[s, :RANK], latent[s, RANK:]
                score = q_nope[t, h] @ (wk[h] @ c) + q_pe[t, h] @ k_pe
                exps.append(math.exp(0.3 * score))
                values.append(wv[h] @ c)
            out[t, h] = sum(e * v for e, v in zip(exps, values, strict=True)) / sum(exps)
    return out


@pytest.mark.parametrize("attend", [attend_absorbed, attend_naive])
@pytest.mark.parametrize(("rows", "position"), [(1, 0), (1, 9), (2, 8), (7, 0), (5, 4)])
@pytest.mark.parametrize("scores", [1 << 24, 60])  # 60: one to three rows at a time
def test_both_forms_are_the_definition(
    attend: type(attend_naive),
    rows: int,
    position: int,
    scores: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "SCORES", scores)
    q_nope, q_pe, latent, wk, wv = operands(rows, position)
    got = attend(q_nope, q_pe, latent, wk, wv, 0.3, position)
    expected = by_definition(q_nope, q_pe, latent, wk, wv, position)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attend", [attend_absorbed, attend_naive])
def test_bf16_is_close(attend: type(attend_naive)) -> None:
    q_nope, q_pe, latent, wk, wv = operands(5, 4, torch.bfloat16)
    got = attend(q_nope, q_pe, latent, wk, wv, 0.3, 4)
    assert got.dtype == torch.bfloat16
    expected = by_definition(q_nope, q_pe, latent, wk, wv, 4)
    torch.testing.assert_close(got.double(), expected, rtol=0.03, atol=0.03)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), seed=3, tokenizer=False)
    return LocalModel(folder)


IDS = torch.randint(288, (24,), generator=torch.Generator().manual_seed(1)).tolist()


def test_chunks_equal_the_whole(model: LocalModel) -> None:
    whole = model.hidden(IDS)
    for cut in ((24,), (1,) * 24, (20, 1, 2, 1), (3, 18, 3)):
        cache, at, parts = model.model.new_cache(24), 0, []
        for rows in cut:
            parts.append(model.hidden(IDS[at : at + rows], cache, at))
            at += rows
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


def test_the_model_uses_both_forms(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()
    for module, name in (
        ("kernels.reference.cached", "attend_absorbed"),
        ("model.attention", "attend_naive"),
    ):
        original = getattr(device, name)

        def spy(*args: object, name: str = name, original: object = original) -> Tensor:
            used.add(name)
            return original(*args)  # type: ignore[operator]

        monkeypatch.setattr(f"duck.{module}.{name}", spy)
    model.hidden(IDS[:1])
    assert used == {"attend_absorbed"}
    used.clear()
    model.hidden(IDS * 3)  # 72 rows: more than the 32 * (16 + 16) / (2 * 32 - 16 - 16) = 32
    assert used == {"attend_naive"}


@torch.inference_mode()
@pytest.mark.parametrize("last", [0, 1, 3, 24])
def test_last_rows_only_still_writes_every_latent(model: LocalModel, last: int) -> None:
    layer = model.model.layers[1]
    x = model.model.embed(IDS)
    full, part = model.model.new_cache(24), model.model.new_cache(24)
    expected = layer.attend(x, full, 0)[24 - last :]
    got = layer.attend(x, part, 0, last=last)
    assert got.shape == (last, 160)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(full.latents.read(1, 24), part.latents.read(1, 24))


def test_a_rewind_is_a_smaller_position(model: LocalModel) -> None:
    cache = model.model.new_cache(24)
    model.hidden(IDS[:10], cache)
    model.hidden([5, 6, 7], cache, 10)  # a bet that is lost
    got = model.hidden(IDS[10:12], cache, 10)
    torch.testing.assert_close(got, model.hidden(IDS[:12])[10:], rtol=1e-4, atol=1e-4)


def test_growing_keeps_what_is_there(model: LocalModel) -> None:
    cache = model.model.new_cache(10)
    model.hidden(IDS[:10], cache)
    before = cache.nbytes
    cache.grow(24)
    assert cache.capacity == 24
    assert cache.nbytes == before * 24 // 10
    cache.grow(5)
    assert cache.capacity == 24
    got = model.hidden(IDS[10:], cache, 10)
    torch.testing.assert_close(got, model.hidden(IDS)[10:], rtol=1e-4, atol=1e-4)
