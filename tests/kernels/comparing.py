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
