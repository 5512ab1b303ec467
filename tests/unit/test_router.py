"""The router against a plain transcription of its definition, ties and negative scores included."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from duck.kernels.reference.router import choose as choose_by
from duck.model.config import ModelConfig
from duck.model.router import rule
from tests.checkpoints import CONFIG

PLAIN = ModelConfig.parse(CONFIG, {}, folder=Path("somewhere"))


def choose(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    return choose_by(logits, bias, rule(config))


def expected(
    logits: list[float], bias: list[float], config: ModelConfig
) -> list[tuple[int, float]]:
    """(expert, weight), best first, by Python lists and loops."""
    if config.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    allowed = list(range(len(choice)))
    if config.n_group > 1 and config.topk_method != "greedy":
        size = len(choice) // config.n_group
        counted = 2 if config.topk_method == "noaux_tc" else 1
        groups = [choice[g * size : (g + 1) * size] for g in range(config.n_group)]
        strength = [sum(sorted(group)[-counted:]) for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: (-strength[g], g))[: config.topk_group]
        allowed = [expert for expert in allowed if expert // size in kept]
    best = sorted(allowed, key=lambda e: (-choice[e], e))[: config.num_experts_per_tok]
    total = sum(scores[e] for e in best) if config.norm_topk_prob else 1.0
    return [(e, config.routed_scaling_factor * scores[e] / total) for e in best]


CONFIGS = {
    "v3": PLAIN,
    "no groups": replace(PLAIN, n_group=1, topk_group=1),
    "not normalised": replace(PLAIN, norm_topk_prob=False),
    "v2": replace(
        PLAIN, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
    ),
    "v2 lite": replace(PLAIN, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False),
}


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 0.2, 2.0]))
@settings(max_examples=40)
def test_router_is_its_definition(name: str, seed: int, spread: float) -> None:
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 16, generator=generator)
    bias = torch.zeros(16)
    if config.topk_method == "noaux_tc":
        bias = spread * torch.randn(16, generator=generator) - spread  # at 2.0 mostly negative
    ids, weights = choose(logits, bias, config)
    for row in range(3):
        want = expected(logits[row].tolist(), bias.tolist(), config)
        assert ids[row].tolist() == [expert for expert, _ in want]
        assert weights[row].tolist() == pytest.approx([w for _, w in want], rel=1e-5)


def test_bias_steers_the_choice_and_not_the_weight() -> None:
    logits = torch.zeros(1, 16)
    bias = torch.zeros(16)
    bias[[3, 9]] = 1.0
    config = replace(PLAIN, num_experts_per_tok=2, routed_scaling_factor=1.0)
    ids, weights = choose(logits, bias, config)
    assert ids.tolist() == [[3, 9]]
    assert weights.tolist() == [[0.5, 0.5]]


def test_ties_go_to_the_lower_index() -> None:
    for rows in (1, 7):
        ids, _ = choose(torch.zeros(rows, 16), None, PLAIN)
        assert ids.tolist() == [[0, 1, 2, 3]] * rows
    strong = torch.zeros(1, 16)
    strong[0, [7, 12]] = 1.0
    assert choose(strong, None, PLAIN)[0].tolist() == [[7, 12, 4, 5]]


def test_types() -> None:
    ids, weights = choose(torch.randn(2, 16), torch.zeros(16), PLAIN)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)


def test_group_strength_is_the_sum_of_its_two_best() -> None:
    logits: Tensor = torch.full((1, 16), -4.0)
    logits[0, 0] = 3.0  # group 0: one very good expert
    logits[0, [4, 5, 8, 9]] = 1.5  # groups 1 and 2: two good ones each
    assert choose(logits, None, PLAIN)[0].tolist() == [[4, 5, 8, 9]]
    v2 = replace(PLAIN, topk_method="group_limited_greedy")
    assert choose(logits, None, v2)[0].tolist() == [[0, 4, 5, 1]]
