"""MLA in Triton, interpreted, against its reference over every kind of cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duck.kernels import attention_triton
from duck.kernels.attention_triton import Tiling, attend, attend_latents, heads_linear
from duck.kernels.reference.device import attend_absorbed, attend_selected
from duck.model.cache import Fp8Rows, LayerRows, PlainRows
from tests.kernels.comparing import assert_alike

CPU = torch.device("cpu")
HEADS, NOPE, ROPE, VALUE = 5, 6, 4, 5  # no multiple of 16 anywhere
SCALE = 0.3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def store_of(kind: str, rank: int, dtype: torch.dtype, capacity: int) -> LayerRows:
    if kind == "fp8":
        return LayerRows(1, Fp8Rows(rank, ROPE, dtype), capacity, device=CPU)
    held = {"float32": torch.float32, "bfloat16": torch.bfloat16}[kind]
    return LayerRows(1, PlainRows(rank + ROPE, held, dtype), capacity, device=CPU)


def operands(rows: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q_nope as a part of wider rows, q_pe, wk, wv."""
    q = random(rows, HEADS, NOPE + ROPE, seed=rows).to(dtype)
    wk = random(HEADS, NOPE, rank, seed=1).to(dtype)
    wv = random(HEADS, VALUE, rank, seed=2).to(dtype)
    return q[..., :NOPE], q[..., NOPE:].contiguous(), wk, wv


def position_of(number: int) -> Tensor:
    return torch.tensor([number], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "position", "rank"),
    [
        ("float32", torch.float32, 2, 70, 24),  # two steps of 16 keys in each of three parts
        ("fp8", torch.float32, 2, 70, 144),
        ("fp8", torch.float32, 9, 20, 24),  # so many rows are one part
        ("bfloat16", torch.bfloat16, 1, 0, 24),
        ("bfloat16", torch.bfloat16, 1, 70, 24),
        ("fp8", torch.bfloat16, 1, 37, 144),
        ("fp8", torch.bfloat16, 9, 20, 24),
    ],
)
def test_dense(kind: str, dtype: torch.dtype, rows: int, position: int, rank: int) -> None:
    q_nope, q_pe, wk, wv = operands(rows, rank, dtype)
    store = store_of(kind, rank, dtype, position + rows + 5)
    store.write(0, 0, random(store.capacity, rank + ROPE, seed=3).to(dtype))
    expected = attend_absorbed(
        q_nope, q_pe, store.read(0, position + rows), wk, wv, SCALE, position
    )
    got = attend(q_nope, q_pe, store.held(0, 0, 1), wk, wv, SCALE, position_of(position))
    assert got.dtype == dtype
    assert_alike(got, expected, 2e-6 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    ("kind", "rows", "count"), [("float32", 1, 5), ("fp8", 2, 71), ("bfloat16", 1, 48)]
)
def test_selected(kind: str, rows: int, count: int) -> None:
    dtype, position = torch.float32, 75
    q_nope, q_pe, wk, wv = operands(rows, 24, dtype)
    store = store_of(kind, 24, dtype, 90)
    store.write(0, 0, random(90, 24 + ROPE, seed=3))
    selected = torch.stack([torch.randperm(76)[:count].sort().values for _ in range(rows)])
    expected = attend_selected(
        q_nope, q_pe, lambda ids: store.read(0, 90)[ids], selected, wk, wv, SCALE
    )
    # Rows of a wider tensor, as a graph may have them.
    wide = torch.full((rows, count + 3), 89, dtype=torch.int32)
    wide[:, :count] = selected
    got = attend(
        q_nope, q_pe, store.held(0, 0, 1), wk, wv, SCALE, position_of(position), wide[:, :count]
    )
    assert_alike(got, expected, 2e-6)


def test_fewer_keys_than_are_selected() -> None:
    """Rows that see fewer than K tokens: the same bits as dense attention, whatever K."""
    folded, q_pe = random(2, HEADS, 24), random(2, HEADS, ROPE, seed=1)
    store = store_of("fp8", 24, torch.float32, 60)
    store.write(0, 0, random(60, 24 + ROPE, seed=3))
    held, position = store.held(0, 0, 60), position_of(38)
    dense = attend_latents(folded, q_pe, held, SCALE, position)
    for count in (40, 200):
        selected = torch.full((2, count), -1, dtype=torch.int32)
        for row in range(2):
            selected[row, : 39 + row] = torch.arange(39 + row)
        got = attend_latents(folded, q_pe, held, SCALE, position, selected)
        assert torch.equal(got, dense)


def test_a_row_s_bits_are_its_own() -> None:
    """Alone, among others, in a longer cache: the same bits; many rows are cut otherwise."""
    q_nope, q_pe, wk, wv = operands(3, 24, torch.float32)
    store = store_of("float32", 24, torch.float32, 100)
    store.write(0, 0, random(100, 24 + ROPE, seed=3))
    held = store.held(0, 0, 1)
    together = attend(q_nope, q_pe, held, wk, wv, SCALE, position_of(70))
    for row in (0, 2):
        part = slice(row, row + 1)
        alone = attend(
            q_nope[part], q_pe[part], held[: 71 + row], wk, wv, SCALE, position_of(70 + row)
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("heads", "tiles"), [(20, Tiling(16, 16, 2, 4, 1)), (40, Tiling(32, 32, 7, 4, 1))]
)
def test_other_tilings(heads: int, tiles: Tiling) -> None:
    """More heads than a program takes, and parts that no key is left for."""
    folded, q_pe = random(1, heads, 24), random(1, heads, ROPE, seed=1)
    store = store_of("fp8", 24, torch.float32, 90)
    store.write(0, 0, random(90, 24 + ROPE, seed=3))
    held = store.held(0, 0, 90)
    got = attend_latents(folded, q_pe, held, SCALE, position_of(80), None, tiles)
    ones = torch.eye(24).expand(heads, 24, 24)
    expected = attend_absorbed(folded, q_pe, store.read(0, 81), ones, ones, SCALE, 80)
    assert_alike(got, expected, 2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("float32", "query"),
        ("float32", "latent"),
        ("fp8", "latent"),
        ("fp8", "rotated"),
        ("bfloat16", "beyond"),
    ],
)
def test_what_is_not_finite_stands_where_the_reference_has_it(
    kind: str, value: float, place: str
) -> None:
    q_nope, q_pe, wk, wv = operands(2, 24, torch.float32)
    store = store_of(kind, 24, torch.float32, 90)
    rows = random(90, 24 + ROPE, seed=3)
    if place == "query":
        q_pe[1, 3, 2] = value
    elif place == "latent":
        rows[33, 7] = value
    elif place == "rotated":
        rows[33, 25] = value
    else:
        rows[72:] = value  # what an earlier, longer session left there
    store.write(0, 0, rows)
    expected = attend_absorbed(q_nope, q_pe, store.read(0, 72), wk, wv, SCALE, 70)
    assert place == "beyond" or not expected.isfinite().all()
    got = attend(q_nope, q_pe, store.held(0, 0, 1), wk, wv, SCALE, position_of(70))
    assert_alike(got, expected, 2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_part_without_a_finite_score_is_left_out() -> None:
    folded, q_pe = torch.ones(1, 1, 16), torch.ones(1, 1, 4)
    held = random(64, 20).abs()
    held[:32, 16] = float("-inf")  # scores of -inf: no weight
    got = attend_latents(folded, q_pe, held, SCALE, position_of(63))
    expected = attend_latents(folded, q_pe, held[32:], SCALE, position_of(31))
    assert_alike(got, expected, 2e-6)
    held[:, 16] = float("-inf")
    assert attend_latents(folded, q_pe, held, SCALE, position_of(63)).isnan().all()


@pytest.mark.parametrize(
    ("rows", "width", "size", "dtype"),
    [
        (1, 7, 24, torch.float32),
        (3, 300, 65, torch.bfloat16),
        (3, 300, 65, torch.float32),
        (9, 7, 24, torch.float32),
    ],
)
def test_heads_linear(rows: int, width: int, size: int, dtype: torch.dtype) -> None:
    x = random(rows, 3, width + 2).to(dtype)[..., :width]
    weight = random(3, size, width, seed=1).to(dtype)
    expected = torch.einsum("thk,hnk->thn", x.double(), weight.double())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert_alike(heads_linear(x, weight), expected, tolerance)
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert_alike(heads_linear(x, turned), expected, tolerance)
    if rows <= attention_triton.MOST_ROWS:
        assert torch.equal(heads_linear(x[:1], weight)[0], heads_linear(x, weight)[0])
