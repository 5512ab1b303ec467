"""fp8 linears in Triton's interpreter against float32, and their promise about rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duck.kernels import linear_triton as kernels
from duck.kernels.matrix import Fp8Matrix
from duck.kernels.reference import linear as reference
from tests.kernels.comparing import assert_near

# numpy warns of what is no number where a GPU goes on.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [  # out, in, block
    (140, 200, (128, 128)),  # ragged both ways
    (1, 16, (128, 128)),
    (70, 100, (48, 32)),  # a tile of rows has several scales
    (30, 77, (64, 48)),  # steps of 16
    (40, 700, (128, 128)),  # split along k
]


def matrix(out: int, width: int, block: tuple[int, int], seed: int = 1) -> Fp8Matrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(out, width, generator=generator).mul_(20).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-out // block[0]), -(-width // block[1]), generator=generator) + 0.01
    return Fp8Matrix(codes, scales, block)


def rows(count: int, width: int, dtype: torch.dtype, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_and_many_rows_equal_the_reference(
    shape: tuple[int, int, tuple[int, int]], dtype: torch.dtype
) -> None:
    weight = matrix(*shape)
    for count in (3, 17):
        x = rows(count, shape[1], dtype)
        want = reference.linear_f32(x, weight)
        largest = want.abs().max().item()
        assert_near(kernels.linear_f32(x, weight), want, rtol=1e-5, atol=2e-6 * largest)
        narrow = kernels.linear(x, weight)
        assert_near(narrow, want.to(dtype), rtol=1e-2, atol=2e-6 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=str)
def test_a_row_does_not_depend_on_those_beside_it(
    shape: tuple[int, int, tuple[int, int]], dtype: torch.dtype
) -> None:
    weight, x = matrix(*shape), rows(8, shape[1], dtype)
    whole = kernels.linear_f32(x, weight)
    for count in range(1, 8):
        assert torch.equal(kernels.linear_f32(x[:count], weight), whole[:count])
    assert torch.equal(kernels.linear_f32(x[6:7], weight), whole[6:7])


@pytest.mark.parametrize("count", [2, 20])
def test_what_is_no_number_stays_where_it_is(count: int) -> None:
    weight = matrix(70, 700, (128, 128))
    x = rows(count, 700, torch.bfloat16)
    x[1, 7] = float("nan")
    x[0, 699] = float("inf")
    got = kernels.linear_f32(x, weight)
    assert got[1].isnan().all()
    assert got[0].isinf().any()
    assert_near(got, reference.linear_f32(x, weight), rtol=1e-5, atol=1e-2)


def test_rows_may_be_parts_of_wider_ones_and_none_at_all() -> None:
    weight, wide = matrix(70, 100, (128, 128)), rows(5, 150, torch.bfloat16)
    part = wide[:, 20:120]
    assert torch.equal(kernels.linear(part, weight), kernels.linear(part.contiguous(), weight))
    assert kernels.linear(part[:0], weight).shape == (0, 70)
    assert kernels.swiglu_f32(part[:0], [weight], matrix(100, 35, (128, 128))).shape == (0, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 96])  # of 96 a block would span both: they stay two
def test_swiglu_equals_the_reference(width: int, dtype: torch.dtype) -> None:
    block = (128, 128)
    parts = [matrix(width, 150, block, seed) for seed in (3, 4)]
    stacked = Fp8Matrix.stacked(parts)
    assert (stacked is None) == (width == 96)
    held = parts if stacked is None else [stacked]
    down = matrix(70, width, block, 5)
    for count in (2, 19):
        x = rows(count, 150, dtype) / 100
        want = reference.swiglu_f32(x, parts, down)
        largest = want.abs().max().item()
        # In bf16 the inner row is rounded, and a last bit of a sum may move a number by a step.
        error = 1e-5 if dtype == torch.float32 else 2e-3
        assert_near(reference.swiglu_f32(x, held, down), want, rtol=1e-5, atol=1e-6 * largest)
        assert_near(kernels.swiglu_f32(x, held, down), want, rtol=1e-5, atol=error * largest)


def test_plain_matrices_are_left_to_torch() -> None:
    x, weight = rows(3, 40, torch.float32), rows(50, 40, torch.float32, 3)
    down = rows(40, 25, torch.float32, 4)
    assert torch.equal(kernels.linear(x, weight), reference.linear(x, weight))
    assert torch.equal(kernels.linear_f32(x, weight), reference.linear_f32(x, weight))
    parts = list(weight.chunk(2))
    want = reference.swiglu_f32(x, parts, down)
    assert torch.equal(kernels.swiglu_f32(x, parts, down), want)


def test_the_reference_dequantises_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix(300, 200, (48, 32)), rows(3, 200, torch.float32)
    want = x @ weight.dequantised().T
    monkeypatch.setattr(reference, "_AT_ONCE", 1)  # one row of blocks at a time
    assert_near(reference.linear_f32(x, weight), want, rtol=1e-5, atol=1e-3)
    by_hand = weight.codes[100, 70].float() * weight.scales[2, 2]
    assert weight.dequantised()[100, 70] == by_hand
