"""How a kernel's result is compared with its reference's."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(got: Tensor, want: Tensor, *, rtol: float, atol: float) -> None:
    """Shapes, dtypes and places of what is no finite number first; then the size of the error."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places"
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite), "infinite in other places"
    assert torch.equal(got[infinite].sign(), want[infinite].sign()), "infinite the other way"
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, but for the bits of a NaN."""
    assert_near(got, want, rtol=0, atol=0)


def assert_alike(got: Tensor, want: Tensor, tolerance: float) -> None:
    """As assert_near, of results that add up many numbers, in any dtypes.

    tolerance: of the difference's norm beside that of what is wanted; single numbers may be off by
    8 times that beside the largest.
    """
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(want)), f"{kind.__name__} in other places"
    finite = want.isfinite()
    got, want = got[finite], want[finite]
    if want.numel():
        difference = got - want
        assert difference.norm() <= tolerance * want.norm(), difference.norm() / want.norm()
        assert difference.abs().max() <= 8 * tolerance * want.abs().max()
