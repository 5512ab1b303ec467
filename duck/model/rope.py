"""Rotary positions with YaRN: one table of cosines and sines for all layers, and the softmax scale.

Formulas: YaRN (arXiv 2309.00071) as DeepSeek's code has it. Positions reach 163,840, so angles are
computed in float64 and stored in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from duck.model.config import ModelConfig, Rope


def inverse_frequencies(rope: Rope, width: int) -> list[float]:
    """Radians per position of each of the width / 2 pairs."""
    plain = [rope.theta ** (-2 * pair / width) for pair in range(width // 2)]
    yarn = rope.scaling
    if yarn is None:
        return plain

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns so often within the original context."""
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # no division by zero; the ramp becomes a step
    stretched = []
    for pair, frequency in enumerate(plain):
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        stretched.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return stretched


def _gain(factor: float, mscale: float) -> float:
    """YaRN's attention factor for a stretch of `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0


def table_gain(rope: Rope) -> float:
    """What cosines and sines are multiplied by: 1 for DeepSeek's files, whose two mscales agree."""
    yarn = rope.scaling
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _gain(yarn.factor, yarn.mscale) / _gain(yarn.factor, yarn.mscale_all_dim)
    return _gain(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: 1 / sqrt(head width), times m^2 under YaRN.

    m comes from mscale_all_dim alone; the cosines carry the ratio of the two mscales. The official
    files give 0.1352338.
    """
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    yarn = config.rope.scaling
    if yarn is not None and yarn.mscale_all_dim:
        gain = _gain(yarn.factor, yarn.mscale_all_dim)
        scale *= gain * gain
    return scale


class RopeTable:
    """Cosines and sines of every position asked for so far; grows by doubling."""

    def __init__(self, rope: Rope, width: int, device: torch.device) -> None:
        self._frequencies = torch.tensor(inverse_frequencies(rope, width), dtype=torch.float64)
        self._gain = table_gain(rope)
        self._device = device
        self._cos, self._sin = self._rows(256)

    def at(self, position: int, rows: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `rows` positions from `position`: each (rows, width / 2) float32."""
        stop = position + rows
        if stop > len(self._cos):
            self._cos, self._sin = self._rows(max(stop, 2 * len(self._cos)))
        return self._cos[position:stop], self._sin[position:stop]

    def upto(self, stop: int) -> tuple[Tensor, Tensor]:
        """The same of all positions from 0 to `stop` - 1, and perhaps more."""
        self.at(0, stop)
        return self._cos, self._sin

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * self._frequencies
        cos, sin = angles.cos() * self._gain, angles.sin() * self._gain
        return cos.float().to(self._device), sin.float().to(self._device)


def position_on(x: Tensor, position: int) -> Tensor:
    """A position as kernels take it, where x is: (1,) int32."""
    return torch.full((1,), position, dtype=torch.int32, device=x.device)
