"""How a kernel's numbers are compared with its reference's."""

from __future__ import annotations

import torch
from torch import Tensor


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """What is not finite stands in the same places; the rest agrees as a whole and one by one.

    tolerance: of the difference's norm beside the reference's; single numbers may be off by 8 times
    that beside the largest.
    """
    assert got.shape == expected.shape
    got, expected = got.double(), expected.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(expected)), kind.__name__
    finite = torch.isfinite(expected)
    got, expected = got[finite], expected[finite]
    if not expected.numel():
        return
    difference = got - expected
    size = expected.norm()
    assert difference.norm() <= tolerance * size, float(difference.norm() / size)
    assert difference.abs().max() <= 8 * tolerance * expected.abs().max()
