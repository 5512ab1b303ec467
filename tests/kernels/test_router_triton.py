"""The router in Triton's interpreter: the reference's choice, its ties and what is no number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from duck.kernels import router_triton as kernels
from duck.kernels.reference import router as reference
from duck.kernels.reference.router import Rule
from tests.kernels.comparing import assert_near

pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide|All-NaN):RuntimeWarning")

RULES = {  # experts, rule
    "v3": (256, Rule(8, groups=8, kept=4, scale=2.5)),
    "tiny": (16, Rule(4, groups=4, kept=2)),
    "odd groups": (21, Rule(5, groups=3, kept=2)),
    "no groups": (11, Rule(3, normalise=False)),
    "v2": (12, Rule(4, groups=4, kept=2, sigmoid=False, pairs=False, normalise=False)),
    "v2 lite": (20, Rule(6, sigmoid=False)),
    "one": (1, Rule(1)),
}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_chosen(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rtol: float = 1e-6
) -> None:
    assert torch.equal(got[0], want[0])
    assert got[0].dtype == torch.int32
    assert_near(got[1], want[1], rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_the_choice_is_the_reference_s(name: str, biased: bool) -> None:
    experts, rule = RULES[name]
    logits = normal(9, experts)
    logits[1] = 0  # all tie
    logits[2] = logits[2].round()  # many tie
    logits[3] = -200  # scores of 0
    logits[4, experts // 2] = float("inf")
    logits[5, experts // 3] = float("-inf")
    logits[6, experts - 1] = float("nan")
    logits[7] = float("nan")
    bias = normal(experts, seed=2).round() / 4 - 0.5 if biased else None  # negative ones too
    assert_chosen(kernels.choose(logits, bias, rule), reference.choose(logits, bias, rule))


def test_minus_zero_ties_with_zero() -> None:
    logits = torch.full((1, 8), -200.0)
    bias = torch.tensor([-0.0, 0.0, -0.0, 0.0, -1, -1, -1, -1])
    rule = Rule(4, normalise=False)
    ids, _ = kernels.choose(logits, bias, rule)
    assert ids.tolist() == reference.choose(logits, bias, rule)[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [160, 700])
def test_the_whole_router(width: int, dtype: torch.dtype) -> None:
    experts, rule = RULES["odd groups"]
    gate, bias = normal(experts, width, seed=3) / width**0.5, normal(experts, seed=4) / 10
    for count in (3, 17):
        h = normal(count, width).to(dtype)
        got = kernels.route(h, gate, bias, rule)
        assert_chosen(got, reference.route(h, gate, bias, rule), rtol=1e-5)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    experts, rule = RULES["tiny"]
    h, gate, bias = normal(5, 700), normal(experts, 700, seed=3) / 26, normal(experts, seed=4)
    ids, weights = kernels.route(h, gate, bias, rule)
    for part in (slice(0, 1), slice(0, 2), slice(4, 5)):
        alone = kernels.route(h[part], gate, bias, rule)
        assert torch.equal(alone[0], ids[part])
        assert torch.equal(alone[1], weights[part])


def test_no_rows() -> None:
    ids, weights = kernels.route(normal(0, 40), normal(16, 40), None, RULES["tiny"][1])
    assert ids.shape == weights.shape == (0, 4)
