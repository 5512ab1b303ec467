"""Random experts and asks for tests of the kernels, and the truth in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from duck.kernels import fp8
from duck.kernels.experts import NativeExperts, available_isas
from duck.model.weights import ExpertWeights

ISAS = available_isas()
LAYER = 3


@dataclass(frozen=True)
class Case:
    hidden: int
    columns: int
    start: int  # of the slice: where scale blocks begin
    experts: int
    top_k: int
    rows: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.columns}@{self.start}-{self.rows}rows"


CASES = [
    Case(256, 64, 0, 4, 2, 1),
    Case(512, 128, 128, 6, 4, 6),
    Case(1024, 256, 0, 6, 3, 13),
    Case(200, 43, 43, 5, 3, 7),  # nothing is a multiple of anything
    Case(1100, 85, 85, 8, 4, 40),  # a tile and the k-loop of down cross a block
    Case(129, 1, 127, 3, 2, 5),
    Case(640, 64, 64, 3, 3, 32),  # many rows for each expert
    Case(7168, 64, 64, 10, 8, 2),
]


def random_codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """e4m3, every one of the 254 numbers as likely as any other."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] ^= 1
    return codes


def random_expert(rng: np.random.Generator, case: Case, subnormal: float = 1.0) -> ExpertWeights:
    """subnormal: the share of subnormal codes that is kept."""
    columns = range(case.start, case.start + case.columns)
    rows, edge = case.hidden, 128

    def codes(*shape: int) -> np.ndarray:
        made = random_codes(rng, *shape)
        return np.where(
            ((made & 0x78) == 0) & (rng.random(shape) >= subnormal), made | 0x38, made
        ).astype(np.uint8)

    def scales(*blocks: int) -> np.ndarray:
        return rng.uniform(1e-5, 2e-4, blocks).astype(np.float32)

    high, wide = -(-columns.stop // edge), -(-rows // edge)
    part = (columns.start, len(columns))
    return ExpertWeights(
        columns,
        (edge, edge),
        codes(len(columns), rows),
        codes(len(columns), rows),
        codes(rows, len(columns)),
        fp8.spread(scales(high, wide), edge, *part, axis=0),
        fp8.spread(scales(high, wide), edge, *part, axis=0),
        fp8.spread(scales(wide, high), edge, *part, axis=1),
    )


def random_ask(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = rng.standard_normal((case.rows, case.hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(case.experts)[: case.top_k] for _ in range(case.rows)])
    weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    return x, ids.astype(np.int32), weights


def wide_matrices(weights: ExpertWeights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gate, up and down in float64, without a rounding."""
    if weights.block is None:
        return tuple(matrix.astype(np.float64) for matrix in weights.dequantise())  # type: ignore[return-value]
    assert weights.gate_scale is not None
    assert weights.up_scale is not None
    assert weights.down_scale is not None
    along = np.arange(weights.gate.shape[1]) // weights.block[1]
    across = np.arange(weights.down.shape[0]) // weights.block[0]
    return (
        fp8.E4M3.astype(np.float64)[weights.gate] * weights.gate_scale[:, along],
        fp8.E4M3.astype(np.float64)[weights.up] * weights.up_scale[:, along],
        fp8.E4M3.astype(np.float64)[weights.down] * weights.down_scale[across],
    )


def truth(
    experts: Sequence[ExpertWeights], x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    out = np.zeros(x.shape)
    for expert, matrices in enumerate(experts):
        gate, up, down = wide_matrices(matrices)
        for row, choice in np.argwhere(ids == expert):
            g, u = gate @ x[row].astype(np.float64), up @ x[row].astype(np.float64)
            out[row] += down @ (g / (1 + np.exp(-g)) * u * float(weights[row, choice]))
    return out


def truth_of_sizes(
    experts: Sequence[ExpertWeights], x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What the sums would be if no term had a sign; silu is steeper than 1.1 nowhere."""
    out = np.zeros(x.shape)
    for expert, matrices in enumerate(experts):
        gate, up, down = (np.abs(matrix) for matrix in wide_matrices(matrices))
        for row, choice in np.argwhere(ids == expert):
            size = np.abs(x[row]).astype(np.float64)
            inner = 1.1 * (gate @ size) * (up @ size) * abs(float(weights[row, choice]))
            out[row] += down @ inner
    return out


@contextmanager
def loaded(
    experts: Sequence[ExpertWeights],
    *,
    resident: str = "fp8",
    threads: int = 1,
    isa: str = ISAS[0],
    spin_us: int = 200,
) -> Iterator[NativeExperts]:
    columns, hidden = experts[0].gate.shape
    native = NativeExperts(
        [LAYER], len(experts), hidden, columns,
        resident=resident, threads=threads, isa=isa, spin_us=spin_us,
    )  # fmt: skip
    for index, weights in enumerate(experts):
        native.load(LAYER, index, weights)
    yield native
    native.close()


def forward(
    native: NativeExperts, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    out = np.full(x.shape, np.nan, np.float32)
    native.forward(LAYER, x, ids, weights, out)
    return out


def error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.abs(found - true).max() / np.abs(true).max())
