"""The sum of the ducks' rows in Triton's interpreter: bit for bit what the host adds up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from duck.kernels import combine_triton as kernels
from duck.kernels.reference import device as reference
from duck.transports.base import add_up
from tests.kernels.comparing import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16]


def wild(*shape: int, seed: int) -> Tensor:
    """Numbers of many sizes, whose sums depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(-9, 10, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**size


@pytest.mark.parametrize("ducks", [1, 2, 5, 32])
@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_host(dtype: torch.dtype, wire: torch.dtype, ducks: int) -> None:
    for rows in (1, 3):
        x, shared = wild(rows, 300, seed=1).to(dtype), wild(rows, 300, seed=2)
        partials = wild(ducks, rows, 300, seed=3).to(wire)
        stored = partials.view(torch.uint16) if wire == torch.bfloat16 else partials
        total = torch.from_numpy(add_up(stored.numpy())[0])
        want = (x.float() + (total + shared)).to(dtype)
        assert_same(kernels.combine(x, partials, shared), want)
        assert_same(reference.combine(x, partials, shared), want)
        bare = (x.float() + total).to(dtype)
        assert_same(kernels.combine(x, partials, None), bare)
        assert_same(reference.combine(x, partials, None), bare)


def test_the_order_counts() -> None:
    """Or the test above would show nothing."""
    partials = wild(32, 1, 300, seed=3)
    backwards = np.ascontiguousarray(partials.numpy()[::-1])
    assert not np.array_equal(add_up(partials.numpy())[0], add_up(backwards)[0])


def test_what_is_no_number_stays_where_it_is() -> None:
    x, partials = wild(2, 40, seed=1).bfloat16(), wild(3, 2, 40, seed=2)
    partials[1, 0, 3], partials[0, 1, 5] = float("nan"), float("inf")
    partials[0, 0, 7], partials[2, 0, 7] = float("inf"), float("-inf")
    x[1, 39] = float("-inf")
    assert_same(kernels.combine(x, partials, None), reference.combine(x, partials, None))


def test_no_rows() -> None:
    assert kernels.combine(torch.empty(0, 8), torch.empty(2, 0, 8), None).shape == (0, 8)
