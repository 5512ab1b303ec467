"""Sparse attention's parts, each against its definition; then the choice of whole models."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from duck.errors import WeightsError
from duck.kernels import fp8
from duck.kernels.reference import device
from duck.kernels.reference.device import (
    attend_absorbed,
    attend_selected,
    dequantise_groups,
    hadamard,
    index_scores,
    layer_norm,
    quantise_groups,
    rotate_halves,
    select_keys,
)
from duck.model.indexer import Indexer
from tests.checkpoints import make_checkpoint
from tests.unit.local_model import LocalModel, WatchedModel


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# the arithmetic


def test_hadamard_is_sylvester_s() -> None:
    exact = hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert exact.tolist() == [[5.0, -1.0, -2.0, 0.0]]  # (1 1 1 1), (1 -1 1 -1), ... / 2
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 128:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = random(3, 5, 128)
    expected = x.double() @ matrix / math.sqrt(128)
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-6, atol=1e-6)
    assert torch.equal(hadamard(x)[1, 2], hadamard(x[1, 2]))  # a row's bits are its own


def test_quantiser_on_exact_vectors() -> None:
    x = torch.tensor(
        [
            [448.0, 1.0, -1.0625, 0.0],  # scale 1; 1.0625 is halfway between 1 and 1.125
            [449.0, 1.0, 17.0, -34.0],  # scale 2: 224.5, 0.5, 8.5, -17 (halfway 16 and 18)
            [224.0, 0.0, 0.0, 0.0],  # scale 0.5
            [0.0, 0.0, 0.0, 0.0],  # counts as 1e-4: 2^-22
        ]
    )
    codes, scales = quantise_groups(x, 4)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.tolist() == [[1.0], [2.0], [0.5], [2.0**-22]]
    assert dequantise_groups(codes, scales, 4).tolist() == [
        [448.0, 1.0, -1.0, 0.0],
        [448.0, 1.0, 16.0, -32.0],
        [224.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert codes.view(torch.uint8)[0].tolist() == [0x7E, 0x38, 0xB8, 0x00]


def test_quantiser_agrees_with_the_weights_quantiser() -> None:
    """Over 60 octaves, and groups that are no whole number in a row."""
    x = random(64, 200) * torch.exp2(torch.arange(64.0) - 10)[:, None]
    codes, scales = quantise_groups(x, 128)
    expected, expected_scales = fp8.quantise(x.numpy(), (1, 128), ue8m0=True)
    assert (scales.numpy() == expected_scales).all()
    assert (codes.view(torch.uint8).numpy() == expected).all()


def test_scales_of_exact_powers_stay() -> None:
    """A logarithm may come out a little above a whole number, and double the scale."""
    largest = 448.0 * torch.exp2(torch.arange(-20.0, 60.0))
    scales = quantise_groups(largest[:, None], 1)[1][:, 0]
    assert torch.equal(scales, torch.exp2(torch.arange(-20.0, 60.0)))
    above = quantise_groups(torch.nextafter(largest, largest * 2)[:, None], 1)[1][:, 0]
    assert torch.equal(above, 2 * scales)


def test_halves_are_rotated() -> None:
    x, angles = random(5, 8), random(5, 4)
    turned = torch.view_as_real(
        torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones(5, 4), angles)
    )
    expected = torch.cat((turned[..., 0], turned[..., 1]), dim=-1)
    torch.testing.assert_close(rotate_halves(x, angles.cos(), angles.sin()), expected)


def test_layer_norm_takes_the_mean_off() -> None:
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    weight, bias = torch.tensor([1.0, 1.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    got = layer_norm(x, weight, bias, 0.0)
    expected = np.array([-3.0, -1.0, 2.0, 3.0]) / math.sqrt(5) + np.array([0, 1, 0, 0])
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=1e-6)


def test_scores_are_the_definition() -> None:
    q, weights, keys = random(4, 3, 8), random(4, 3, seed=1), random(6, 8, seed=2)
    got = index_scores(q, weights, keys)
    for t, s in itertools.product(range(4), range(6)):
        heads = [weights[t, h] * max(0.0, float(q[t, h] @ keys[s])) for h in range(3)]
        assert float(got[t, s]) == pytest.approx(float(sum(heads)), abs=1e-5)
    assert (got < 0).any()  # weights may be negative


def test_fp8_scores_are_those_of_the_codes() -> None:
    """As served: products of codes, then weight * q's scale, then the key's scale."""
    q, weights, keys = random(4, 3, 128), random(4, 3, seed=1), random(6, 128, seed=2)
    q8, q_scale = quantise_groups(q, 128)
    k8, k_scale = quantise_groups(keys, 128)
    dots = torch.einsum("thd,sd->ths", q8.float(), k8.float()).relu()
    served = torch.einsum("th,ths->ts", weights * q_scale[..., 0], dots) * k_scale[:, 0]
    ours = index_scores(
        dequantise_groups(q8, q_scale, 128), weights, dequantise_groups(k8, k_scale, 128)
    )
    torch.testing.assert_close(ours, served, rtol=1e-6, atol=1e-6)


def scores_as_asked(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands (q, weights, keys) whose index_scores are `scores` (T, S), all >= 0."""
    rows, keys = scores.shape
    return scores[:, None].clone(), torch.ones(rows, 1), torch.eye(keys)


@pytest.mark.parametrize("limit", [1 << 24, 30])  # 30: one to three rows at a time
@pytest.mark.parametrize(("rows", "position", "count"), [(1, 9, 4), (6, 4, 5), (3, 7, 8)])
def test_the_highest_scores_are_selected(
    rows: int, position: int, count: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "SCORES", limit)
    scores = torch.randint(
        0, 4, (rows, position + rows), generator=torch.Generator().manual_seed(rows)
    ).float()  # many ties
    got = select_keys(*scores_as_asked(scores), position, count)
    assert got.dtype == torch.int64
    for t, chosen in enumerate(got.tolist()):
        seen = range(position + t + 1)
        best = sorted(seen, key=lambda s, t=t: (-scores[t, s].item(), s))[:count]
        assert chosen == sorted(best)


def test_ties_go_to_the_lower_position() -> None:
    got = select_keys(*scores_as_asked(torch.zeros(2, 9)), 7, 3)
    assert got.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_what_is_not_a_number_is_selected_last() -> None:
    q, weights, keys = scores_as_asked(torch.tensor([[0.0, 2.0, 1.0, 0.5, 3.0]]))
    weights[0, 0] = math.nan
    assert select_keys(q, weights, keys, 4, 2).tolist() == [[0, 1]]
    weights[0, 0] = math.inf  # infinity times a relu of 0 is no number; the others tie
    assert select_keys(q, weights, keys, 4, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("limit", [1 << 24, 200])  # 200: one or two rows at a time
def test_attention_to_the_selected_is_dense_attention_to_them(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "SCORES", limit)
    heads, nope, rope, value, rank, rows, keys = 3, 6, 4, 5, 7, 5, 4
    q_nope, q_pe = random(rows, heads, nope), random(rows, heads, rope)
    latent, wk, wv = random(12, rank + rope), random(heads, nope, rank), random(heads, value, rank)
    selected = torch.stack([torch.randperm(12)[:keys].sort().values for _ in range(rows)])
    got = attend_selected(q_nope, q_pe, lambda ids: latent[ids], selected, wk, wv, 0.3)
    for t in range(rows):
        alone = attend_absorbed(
            q_nope[t : t + 1], q_pe[t : t + 1], latent[selected[t]], wk, wv, 0.3, keys - 1
        )
        torch.testing.assert_close(got[t], alone[0], rtol=1e-5, atol=1e-5)


# whole models

TOPK = 12
IDS = torch.randint(288, (48,), generator=torch.Generator().manual_seed(1)).tolist()
SPARSE = {
    "model_type": "deepseek_v32",
    "index_topk": TOPK,
    "index_n_heads": 16,
    "index_head_dim": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("v32"), seed=5, tokenizer=False, **SPARSE)


@pytest.fixture(params=["exact", "fp8"])
def model(
    request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> WatchedModel:
    return WatchedModel(folder, monkeypatch, indexer=request.param)


@pytest.mark.parametrize("cut", [(1,) * 48, (20, 1, 2, 1, 24), (5, 43), (11, 2, 35)])
def test_chunks_select_what_the_whole_does(model: WatchedModel, cut: tuple[int, ...]) -> None:
    """Rows that travel together differ in their last bits, and the checkpoint has no near ties."""
    whole = model.hidden(IDS)
    selected = dict(model.selected)
    assert set(selected) == set(itertools.product(range(3), range(TOPK, 48)))
    assert all(len(chosen) == TOPK for chosen in selected.values())
    assert all(max(chosen) <= at for (_, at), chosen in selected.items())
    assert any(at not in chosen for (_, at), chosen in selected.items())  # not always itself
    model.selected.clear()
    cache, at, parts = model.model.new_cache(48), 0, []
    for rows in cut:
        parts.append(model.hidden(IDS[at : at + rows], cache, at))
        at += rows
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
    assert model.selected == selected


def test_a_rewind_is_a_smaller_position(model: WatchedModel) -> None:
    """Keys beyond the position are not looked at, and are written anew."""
    cache = model.model.new_cache(48)
    model.hidden(IDS[:30], cache)
    model.hidden([5, 6, 7], cache, 30)  # a bet that is lost
    got = model.hidden(IDS[30:40], cache, 30)
    torch.testing.assert_close(got, model.hidden(IDS[:40])[30:], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_last_rows_only_still_writes_every_key(model: WatchedModel) -> None:
    layer = model.model.layers[1]
    x = model.model.embed(IDS)
    full = model.model.new_cache(48)
    expected = layer.attend(x, full, 0)
    for last in (0, 1, 40):
        part = model.model.new_cache(48)
        got = layer.attend(x, part, 0, last=last)
        assert got.shape == (last, 160)
        torch.testing.assert_close(got, expected[48 - last :], rtol=1e-5, atol=1e-5)
        assert torch.equal(full.keys.read(1, 48), part.keys.read(1, 48))
        assert torch.equal(full.latents.read(1, 48), part.latents.read(1, 48))


def test_within_topk_it_is_dense_attention(model: WatchedModel) -> None:
    """The same bits, and without its weights when a session can hold no more."""
    dense = LocalModel(model.folder, max_len=TOPK)
    assert dense.model.holding.indexer is None
    loaded = sum(category.tensors for category in dense.model.tally.categories.values())
    more = sum(category.tensors for category in model.model.tally.categories.values())
    assert more == loaded + 5 * 4  # five tensors a layer, the MTP layer's too
    assert torch.equal(dense.logits(IDS[:TOPK]), model.logits(IDS[:TOPK]))
    assert torch.equal(dense.mtp_logits(IDS[:TOPK]), model.mtp_logits(IDS[:TOPK]))
    assert not model.selected


def test_a_checkpoint_without_its_weights(folder: Path, tmp_path: Path) -> None:
    """Is of use for short sessions only, and the refusal says so."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    kept = {
        name: tensor
        for name, tensor in safetensors.torch.load_file(file).items()
        if ".indexer." not in name
    }
    safetensors.torch.save_file(kept, file)
    short = LocalModel(tmp_path, max_len=TOPK)
    assert torch.equal(
        short.logits(IDS[:TOPK]), LocalModel(folder, max_len=TOPK).logits(IDS[:TOPK])
    )
    with pytest.raises(WeightsError, match=r"indexer.wq_b.weight.*--max-len 12 would do without"):
        LocalModel(tmp_path)


def test_the_mtp_layer_selects_too(model: WatchedModel) -> None:
    model.mtp_logits(IDS)
    assert {layer for layer, _ in model.selected} == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", [5, 6])
def test_fp8_selects_nearly_what_exact_does(
    seed: int, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the same rows and keys, layer by layer; whole models drift apart by other experts."""
    folder = make_checkpoint(tmp_path_factory.mktemp("v32"), seed=seed, tokenizer=False, **SPARSE)
    exact, rounded = LocalModel(folder), LocalModel(folder, indexer="fp8")
    twins = iter([layer._attention._indexer for layer in rounded.model.layers])
    shares = []
    plain, plain_append = Indexer.select, Indexer.append
    inputs: list[Tensor] = []

    def append(self: Indexer, x: Tensor, held: Tensor, position: int) -> None:
        inputs.append(x)
        plain_append(self, x, held, position)

    def select(self: Indexer, x: Tensor, q_latent: Tensor, held: Tensor, position: int) -> Tensor:
        selected = plain(self, x, q_latent, held, position)
        twin = next(twins)
        assert twin is not None
        theirs = rounded.model.new_cache(48).keys.held(0, 0, 48)
        plain_append(twin, inputs[-1], theirs, 0)
        other = plain(twin, x, q_latent, theirs, position)
        shares.extend(
            len(set(a) & set(b)) / TOPK
            for a, b in zip(selected.tolist(), other.tolist(), strict=True)
        )
        return selected

    monkeypatch.setattr(Indexer, "append", append)
    monkeypatch.setattr(Indexer, "select", select)
    exact.hidden(IDS)
    assert len(shares) == 3 * (48 - TOPK)
    print(f"fp8 indexer: {np.mean(shares):.3f} of the keys, at least {min(shares):.2f}")
    assert np.mean(shares) >= 0.9
    assert np.mean(shares) < 1  # it does round
