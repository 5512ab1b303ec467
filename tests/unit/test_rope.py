"""Rotary positions: the published numbers of DeepSeek-V3, and the rotation's definition."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duck.kernels.reference.device import rotate
from duck.model.config import ModelConfig, Rope, Yarn
from duck.model.rope import RopeTable, inverse_frequencies, softmax_scale, table_gain
from tests.checkpoints import CONFIG

CPU = torch.device("cpu")
OFFICIAL = Yarn(40, 4096, 32, 1, 1.0, 1.0)


def config(rope: Rope, nope: int = 128, rotary: int = 64) -> ModelConfig:
    plain = ModelConfig.parse(CONFIG, {}, folder=Path("somewhere"))
    return replace(plain, rope=rope, qk_nope_head_dim=nope, qk_rope_head_dim=rotary)


def test_official_numbers() -> None:
    rope = Rope(10000.0, OFFICIAL)
    # m = 0.1 ln 40 + 1 = 1.368888; 192^-0.5 m^2
    assert softmax_scale(config(rope)) == pytest.approx(0.1352338, abs=5e-8)
    assert table_gain(rope) == 1
    plain = inverse_frequencies(Rope(10000.0, None), 64)
    assert plain == pytest.approx([10000 ** (-j / 32) for j in range(32)])
    stretched = inverse_frequencies(rope, 64)
    assert stretched[:11] == plain[:11]  # the ramp starts after pair 10 ...
    assert stretched[11] < plain[11]
    assert stretched[22] > plain[22] / 40
    assert stretched[23:] == pytest.approx([f / 40 for f in plain[23:]])  # ... and ends at 23


def test_gain_without_and_with_mscales() -> None:
    def gain(**keys: float) -> float:
        return table_gain(Rope(10000.0, Yarn(40, 4096, **keys)))

    g = 0.1 * math.log(40)
    assert gain() == pytest.approx(1 + g)
    assert gain(mscale=0.707) == pytest.approx(1 + g)  # one alone counts for nothing
    assert gain(mscale=0.707, mscale_all_dim=1.2) == pytest.approx((1 + 0.707 * g) / (1 + 1.2 * g))
    assert gain(mscale=0.707, mscale_all_dim=1.2, attention_factor=1.5) == 1.5
    only_all = Rope(10000.0, Yarn(40, 4096, mscale_all_dim=1.2))
    assert softmax_scale(config(only_all)) == pytest.approx(192**-0.5 * (1 + 1.2 * g) ** 2)
    no_all = Rope(10000.0, Yarn(40, 4096, mscale=0.7))
    assert softmax_scale(config(no_all)) == pytest.approx(192**-0.5)


def test_equal_ends_of_the_ramp_make_a_step() -> None:
    yarn = Yarn(32, 4096, 1, 1, 1.0, 1.0)  # Kimi K2: both betas are 1
    frequencies = inverse_frequencies(Rope(50000.0, yarn), 64)
    assert all(math.isfinite(f) and f > 0 for f in frequencies)
    step = Yarn(4, 4096, 1, 1, truncate=False)
    plain = inverse_frequencies(Rope(10000.0, None), 64)
    ratios = [
        a / b for a, b in zip(inverse_frequencies(Rope(10000.0, step), 64), plain, strict=True)
    ]
    assert all(r == pytest.approx(1) or r == pytest.approx(1 / 4) for r in ratios)


def test_table_grows_and_is_exact_far_out() -> None:
    table = RopeTable(Rope(10000.0, None), 8, CPU)
    early = table.at(3, 5)
    position = 163_839
    cos, sin = table.at(position, 1)
    angles = [position * 10000 ** (-j / 4) for j in range(4)]
    torch.testing.assert_close(cos[0], torch.tensor([math.cos(a) for a in angles]))
    torch.testing.assert_close(sin[0], torch.tensor([math.sin(a) for a in angles]))
    for before, after in zip(early, table.at(3, 5), strict=True):
        assert torch.equal(before, after)


def test_rotate_turns_neighbouring_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, generator=generator)
    cos, sin = RopeTable(Rope(100.0, None), 8, CPU).at(5, 3)
    turned = rotate(x, cos[:, None], sin[:, None])
    for row in range(3):
        for pair in range(4):
            angle = (5 + row) * 100 ** (-pair / 4)
            a, b = x[row, 1, 2 * pair : 2 * pair + 2].tolist()
            expected = complex(a, b) * cmath.exp(1j * angle)
            got = turned[row, 1, 2 * pair : 2 * pair + 2].tolist()
            assert got == pytest.approx([expected.real, expected.imag], abs=1e-5)


def test_rotate_keeps_bf16_but_computes_wider() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator).bfloat16()
    cos, sin = RopeTable(Rope(100.0, None), 8, CPU).at(1000, 4)
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
