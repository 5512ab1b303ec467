"""The indexer in Triton, interpreted, against its reference: keys, queries, scores, the choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from duck.kernels import indexer_triton
from duck.kernels.reference.device import (
    hadamard,
    index_scores,
    layer_norm,
    rotate,
    rotate_halves,
    select_keys,
)
from duck.model.cache import Fp8Rows, LayerRows, PlainRows
from tests.kernels.comparing import assert_alike

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def position_of(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


def store_of(fp8: bool, width: int, capacity: int) -> LayerRows:
    float32 = torch.float32
    form = Fp8Rows(width, 0, float32) if fp8 else PlainRows(width, float32, float32)
    return LayerRows(1, form, capacity, device=CPU)


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, fp8: bool, interleaved: bool) -> Tensor:
    """The indexer's own way, of (T, ..., d): cos and sin of the rows."""
    head = 2 * cos.shape[-1]
    first = (rotate if interleaved else rotate_halves)(x[..., :head], cos, sin)
    x = torch.cat((first, x[..., head:]), dim=-1)
    return hadamard(x) if fp8 else x


def tables(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angles = random(positions, half, seed=9)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(
    ("width", "half", "interleaved"), [(32, 5, False), (128, 32, False), (16, 8, True)]
)
def test_keys(fp8: bool, width: int, half: int, interleaved: bool) -> None:
    rows, position = 3, 6
    projected = random(rows, width + 2)[:, :width]
    weight, bias = 1 + random(width, seed=1) / 8, random(width, seed=2)
    cos, sin = tables(12, half)
    expected = store_of(fp8, width, 12)
    key = layer_norm(projected, weight, bias, 1e-6)
    part = slice(position, position + rows)
    expected.write(0, position, turned(key, cos[part], sin[part], fp8=fp8, interleaved=interleaved))
    store = store_of(fp8, width, 12)
    indexer_triton.append_keys(
        projected, (weight, bias), 1e-6, cos, sin, position_of(position), store.held(0, 0, 1),
        interleaved=interleaved,
    )  # fmt: skip
    got, want = store.read(0, 12), expected.read(0, 12)
    assert (got[:position] == 0).all()
    assert (got[position + rows :] == 0).all()
    # A last bit of the norm may move a number to the next code, seldom.
    if fp8:
        assert (store.held(0, 0, 1) != expected.held(0, 0, 1)).sum() <= 2
        assert ((got - want).abs() <= want.abs() / 7).all()
    else:
        assert_alike(got, want, 1e-6)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("heads", "width", "interleaved"), [(5, 32, False), (3, 128, True)])
def test_queries(fp8: bool, heads: int, width: int, interleaved: bool) -> None:
    rows, position, hidden = 2, 7, 1100
    projected = random(rows, heads, width).bfloat16()
    x, proj = random(rows, hidden, seed=1).bfloat16(), random(heads, hidden, seed=2)
    cos, sin = tables(9, 4)
    query, weights = indexer_triton.queries(
        projected, x, proj, 0.25, cos, sin, position_of(position), fp8=fp8, interleaved=interleaved
    )
    part = slice(position, position + rows)
    plain = turned(
        projected.float(), cos[part, None], sin[part, None], fp8=fp8, interleaved=interleaved
    )
    care = x.float() @ proj.T * 0.25
    if fp8:
        form = Fp8Rows(width, 0, torch.float32)
        plain = form.unpack(form.pack(plain))
        assert query.dtype == torch.bfloat16
        # Unit and weight are one number: compare what comes of both.
        assert_alike(query.float() * weights[..., None], plain * care[..., None], 2e-6)
    else:
        assert_alike(query, plain, 1e-6)
        assert_alike(weights, care, 2e-6)


def held_keys(fp8: bool, keys: Tensor, capacity: int) -> LayerRows:
    store = store_of(fp8, keys.shape[1], capacity)
    store.write(0, 0, keys)
    return store


def codes_of(query: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(query as bfloat16 codes, weights with the unit, the query that both stand for)."""
    held = Fp8Rows(query.shape[-1], 0, torch.float32).pack(query)
    width = query.shape[-1]
    units = held[..., width:].clone().view(torch.float32)
    codes = held[..., :width].view(torch.float8_e4m3fn).float()
    return codes.bfloat16(), weights * units[..., 0], codes * units


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("rows", "heads", "width"), [(3, 20, 32), (9, 2, 8)])
def test_scores(fp8: bool, rows: int, heads: int, width: int) -> None:
    position, capacity = 50, 77
    query, weights = random(rows, heads, width), random(rows, heads, seed=1)
    store = held_keys(fp8, random(capacity, width, seed=2), capacity)
    meant = query
    if fp8:
        query, weights_given, meant = codes_of(query, weights)
    else:
        weights_given = weights
    got = indexer_triton.scores(query, weights_given, store.held(0, 0, 1), position_of(position))
    expected = index_scores(meant, weights, store.read(0, capacity))
    for t in range(rows):
        seen = position + t + 1
        assert_alike(got[t, :seen], expected[t, :seen], 2e-6)
        assert (got[t, seen : position + rows] == float("-inf")).all()
        if t > 1:
            continue
        alone = indexer_triton.scores(
            query[t : t + 1],
            weights_given[t : t + 1],
            store.held(0, 0, 1),
            position_of(position + t),
        )
        assert torch.equal(alone[0, :seen], got[t, :seen])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_scores_of_what_is_not_finite(fp8: bool, value: float) -> None:
    """As select_keys compares them; keys that nobody sees may hold anything."""
    query, weights = random(2, 3, 16).abs(), random(2, 3, seed=1).abs()
    keys = random(40, 16, seed=2)
    keys[7, 3] = value
    keys[33:] = value
    store = held_keys(fp8, keys, 40)
    meant, given = query, weights
    if fp8:
        query, given, meant = codes_of(query, weights)
    got = indexer_triton.scores(query, given, store.held(0, 0, 1), position_of(31))
    expected = index_scores(meant, weights, store.read(0, 33)).nan_to_num(nan=-math.inf)
    expected[0, 32] = -math.inf
    assert torch.equal(got[:, 7], expected[:, 7])
    assert abs(float(got[0, 7])) >= 3e38 or not math.isfinite(value)
    assert_alike(got[:, :7], expected[:, :7], 2e-6)
    assert_alike(got[:, 8:33], expected[:, 8:], 2e-6)


def by_sorting(values: Tensor, position: int, count: int) -> list[list[int]]:
    chosen = []
    for t, row in enumerate(values.tolist()):
        seen = range(position + t + 1)
        best = sorted(seen, key=lambda s, row=row: (-row[s], s))[:count]
        chosen.append(sorted(best) + [-1] * (count - len(best)))
    return chosen


@pytest.mark.parametrize(("position", "capacity"), [(200, 210), (63, 300)])
@pytest.mark.parametrize("count", [1, 40])
def test_largest(position: int, capacity: int, count: int) -> None:
    values = random(2, capacity, seed=position) * torch.exp2(random(2, capacity, seed=1) * 9)
    values[:, position + 2 :] = math.inf  # nobody sees them
    got = indexer_triton.largest(values, position_of(position), count)
    assert got.dtype == torch.int32
    assert got.tolist() == by_sorting(values, position, count)


def test_largest_of_many_ties() -> None:
    values = torch.randint(-2, 3, (3, 200), generator=torch.Generator().manual_seed(1)).float()
    values[values == 0] *= torch.tensor(-1.0)  # -0 is 0
    values[:, ::7] = 0.0
    values[1] = -math.inf
    for count in (30, 130):
        got = indexer_triton.largest(values, position_of(190), count)
        assert got.tolist() == by_sorting(values, 190, count)


@pytest.mark.parametrize("position", [0, 5, 38])
def test_who_sees_few_takes_all(position: int) -> None:
    values = torch.full((2, 50), math.nan)  # not looked at
    got = indexer_triton.largest(values, position_of(position), 40)
    for row in range(2):
        seen = position + row + 1
        assert got[row].tolist() == [*range(seen)] + [-1] * (40 - seen)
    more = indexer_triton.largest(values, position_of(position), 200)
    assert (more[:, :40] == got).all()
    assert (more[:, 40:] == -1).all()


@pytest.mark.parametrize("limit", [1 << 24, 200])  # 200: two rows at a time
def test_selection_is_the_reference_s(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_triton, "SCORES", limit)
    rows, position, count = 5, 60, 20
    query, weights = random(rows, 3, 16), random(rows, 3, seed=1)
    store = held_keys(True, random(90, 16, seed=2), 90)
    codes, given, meant = codes_of(query, weights)
    got = indexer_triton.select(codes, given, store.held(0, 0, 1), position_of(position), count)
    expected = select_keys(meant, weights, store.read(0, 65), position, count)
    assert got.tolist() == expected.tolist()
