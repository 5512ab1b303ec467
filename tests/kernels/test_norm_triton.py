"""Norms, rotation and the rows of the cache in Triton's interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duck.kernels import norm_triton as kernels
from duck.kernels.matrix import Fp8Matrix
from duck.kernels.reference import device as reference
from duck.kernels.reference import linear
from duck.model.cache import Fp8Rows
from tests.kernels.comparing import assert_near, assert_same

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide|All-NaN):RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
NEAR = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # a last bit, in bf16 of the rounding


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, 300])
def test_norms_equal_the_reference(width: int, dtype: torch.dtype) -> None:
    x, change = normal(4, width).to(dtype), normal(4, width, seed=2)
    weight = 1 + normal(width, seed=3) / 10
    x[1] = 0
    x[2, width // 2] = float("nan")
    x[3, width - 1] = float("-inf")
    near = {"rtol": NEAR[dtype], "atol": NEAR[dtype]}
    assert_near(kernels.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), **near)
    total, normed = kernels.add_norm(x, change, weight, EPS)
    want_total, want_normed = reference.add_norm(x, change, weight, EPS)
    assert_same(total, want_total)
    assert_near(normed, want_normed, **near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [300, 1700, 6000])  # 1, several and many splits of the product
def test_a_projection_its_residual_and_norm(inner: int, dtype: torch.dtype) -> None:
    codes = (20 * normal(40, inner)).to(torch.float8_e4m3fn)
    weight = Fp8Matrix(codes, normal(1, -(-inner // 128), seed=7).abs() / inner, (128, 128))
    x, y, norm = normal(2, 40).to(dtype), normal(2, inner, seed=2).to(dtype), normal(40, seed=3)
    got = kernels.project_add_norm(x, y, weight, norm, EPS)
    want = linear.project_add_norm(x, y, weight, norm, EPS)
    for mine, its in zip(got, want, strict=True):
        assert_near(mine, its, rtol=1e-5 + (dtype == torch.bfloat16) * 8e-3, atol=1e-5)
    plain = weight.dequantised(dtype)
    got = kernels.project_add_norm(x, y, plain, norm, EPS)
    for mine, its in zip(got, linear.project_add_norm(x, y, plain, norm, EPS), strict=True):
        assert_near(mine, its, rtol=NEAR[dtype], atol=1e-5)


def test_norms_of_parts_of_wider_rows_and_of_none() -> None:
    wide, weight = normal(3, 100).bfloat16(), torch.ones(40)
    part = wide[:, 30:70]
    want = reference.rms_norm(part, weight, EPS)
    assert_near(kernels.rms_norm(part, weight, EPS), want, rtol=8e-3, atol=0)
    assert kernels.rms_norm(part[:0], weight, EPS).shape == (0, 40)
    total, normed = kernels.add_norm(part[:0], torch.empty(0, 40), weight, EPS)
    assert total.shape == normed.shape == (0, 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_the_end_of_every_head(dtype: torch.dtype) -> None:
    q = normal(3, 5, 26).to(dtype)
    q[0, 1, 20], q[2, 4, 25] = float("inf"), float("nan")
    turns = normal(40, 5, seed=2), normal(40, 5, seed=3)
    at = torch.tensor([9], dtype=torch.int32)
    got = kernels.rotate_at(q[..., 16:], *turns, at)
    assert_near(got, reference.rotate_at(q[..., 16:], *turns, at), rtol=NEAR[dtype], atol=1e-6)
    assert got.is_contiguous()
    assert kernels.rotate_at(q[:0, :, 16:], *turns, at).shape == (0, 5, 10)


def append_both(kv: Tensor, rank: int, held: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The cache after the kernel and after the reference."""
    pairs = (kv.shape[1] - rank) // 2
    weight = 1 + normal(rank, seed=4) / 10
    turns = normal(64, pairs, seed=5), normal(64, pairs, seed=6)
    at = torch.tensor([position], dtype=torch.int32)
    got, want = held.clone(), held.clone()
    kernels.append_latents(kv, weight, EPS, *turns, got, at)
    reference.append_latents(kv, weight, EPS, *turns, want, at)
    return got, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "rope"), [(32, 8), (200, 12), (512, 64)])
def test_appended_rows_are_normed_rotated_and_where_they_belong(
    rank: int, rope: int, dtype: torch.dtype
) -> None:
    kv = normal(3, rank + rope + 5).to(dtype)[:, : rank + rope]
    held = torch.full((30, rank + rope), 7.0, dtype=torch.bfloat16)
    got, want = append_both(kv, rank, held, 20)
    assert_near(got, want, rtol=8e-3, atol=1e-6)
    untouched = [*range(20), *range(23, 30)]
    assert torch.equal(got[untouched], held[untouched])
    exact, want = append_both(kv, rank, held.float(), 0)
    assert_near(exact, want, rtol=NEAR[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "rope"), [(32, 8), (200, 12), (512, 64)])
def test_appended_fp8_rows_are_the_bytes_of_the_reference(
    rank: int, rope: int, dtype: torch.dtype
) -> None:
    """Of the very numbers that the kernel gives unrounded: those may differ in a last bit."""
    form = Fp8Rows(rank, rope, torch.float32)
    kv = normal(6, rank + rope).to(dtype)
    kv[1] *= 2.0 ** torch.linspace(-12, 12, rank + rope).to(dtype)  # subnormals and the largest
    kv[2] = 0
    kv[3, 3], kv[4, rank - 1], kv[5, rank] = float("nan"), float("inf"), float("inf")
    bytes_, _ = append_both(kv, rank, torch.full((9, form.width), 9, dtype=torch.uint8), 2)
    plain, reference_plain = append_both(kv, rank, torch.zeros(9, rank + rope, dtype=dtype), 2)
    assert_near(plain, reference_plain, rtol=NEAR[dtype], atol=1e-6)
    want = reference.pack_fp8(plain[2:8], rank)
    finite = [0, 1, 2, 5]
    assert torch.equal(bytes_[2:8][finite], want[finite])
    assert_same(form.unpack(bytes_[2:8]), form.unpack(want))
    assert (bytes_[[0, 1, 8]] == 9).all()


def test_every_e4m3_code_and_the_middles_between_them() -> None:
    """Numbers whose group has a scale of 1 are rounded as torch rounds them."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])))
    values = torch.cat((near, -near))
    values = torch.cat((values, values.new_zeros(-len(values) % 127))).view(-1, 127)
    rows = torch.cat((values, torch.full((len(values), 1), 448.0)), dim=-1)  # scale 1
    # A row of one norm: weights take the norm back, so that the numbers are met as they are.
    got = torch.zeros(len(rows), 132 + 4, dtype=torch.uint8)
    for at, row in enumerate(rows):
        kv = torch.cat((torch.ones(1, 128), torch.zeros(1, 2)), dim=-1)
        turns = torch.ones(64, 1), torch.zeros(64, 1)
        position = torch.tensor([at], dtype=torch.int32)
        kernels.append_latents(kv, row, 0.0, *turns, got, position)
    assert torch.equal(got[:, :132], reference.pack_fp8(rows, 128))


def test_no_rows_write_nothing() -> None:
    held = torch.full((4, 40), 3, dtype=torch.bfloat16)
    got, want = append_both(torch.empty(0, 40, dtype=torch.bfloat16), 32, held, 0)
    assert torch.equal(got, held)
    assert torch.equal(want, held)
