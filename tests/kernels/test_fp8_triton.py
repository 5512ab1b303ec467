"""e4m3 codes as kernels read and write them, every one, and numbers between any two."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from duck.kernels.fp8_triton import decode, encode, group_scale, largest_size
from duck.kernels.reference.device import quantise_groups


@triton.jit
def _decode(codes, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, decode(tl.load(codes + i)))


@triton.jit
def _encode(values, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, encode(tl.load(values + i)))


@triton.jit
def _quantise(values, codes, scales, N: tl.constexpr, GROUP: tl.constexpr):
    at = tl.arange(0, N)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(values + at)
    scale = group_scale(largest_size(x, 1))
    tl.store(codes + at, encode(tl.div_rn(x, scale[:, None])))
    tl.store(scales + tl.arange(0, N), scale)


def test_codes_are_torch_s() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    meant = codes.view(torch.float8_e4m3fn).float()
    got = torch.empty(256)
    _decode[(1,)](codes, got, 256)
    assert torch.equal(got.isnan(), meant.isnan())
    assert torch.equal(got.nan_to_num(), meant.nan_to_num())

    exact = meant[meant.isfinite()].unique()
    halfway = (exact[1:] + exact[:-1]) / 2
    far = torch.tensor(1e9)
    values = torch.cat(
        [exact, halfway, halfway.nextafter(far), halfway.nextafter(-far), torch.tensor([-0.0])]
    )
    values = torch.cat([values, torch.zeros(1024 - len(values))])
    written = torch.empty(1024, dtype=torch.uint8)
    _encode[(1,)](values, written, 1024)
    assert torch.equal(written, values.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is not finite
def test_groups_are_the_reference_s() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(torch.arange(64.0) - 40)[:, None]
    x[3], x[4, 0], x[5, 1], x[6, 2] = 0.0, float("inf"), float("nan"), float("-inf")
    codes, scales = torch.empty(64, 32, dtype=torch.uint8), torch.empty(64)
    _quantise[(1,)](x, codes, scales, 64, 32)
    expected, expected_scales = quantise_groups(x, 32)
    got, want = (
        part.view(torch.float8_e4m3fn).float() for part in (codes, expected.view(torch.uint8))
    )
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(scales.nan_to_num(-1.0), expected_scales[:, 0].nan_to_num(-1.0))
    assert want[5].isnan().all()
