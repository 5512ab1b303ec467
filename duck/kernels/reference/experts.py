"""One duck's experts in plain numpy float32: slow, simple, and the truth for faster kernels.

Every row is computed alone and its experts are added in ascending order of their ids, so a row's
bits do
not depend on the rows that travel with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from duck.model.weights import ExpertWeights


def silu(x: np.ndarray) -> np.ndarray:
    """X * sigmoid(x), float32; written so that exp never overflows."""
    e = np.exp(-np.abs(x))
    y: np.ndarray = np.where(x >= 0, x / (1 + e), x * e / (1 + e))
    return y.astype(np.float32)


class ReferenceExperts:
    """The slices of all experts of some layers, held dequantised to float32.

    Args:
        layers: the layers that have experts.
        experts: experts in each layer.
        hidden: the model's hidden size.
        columns: columns of the intermediate dimension held here.
    """

    def __init__(self, layers: Sequence[int], experts: int, hidden: int, columns: int) -> None:
        self._columns = columns
        # gate above up, so that one product gives both
        self._gate_up = {n: np.zeros((experts, 2 * columns, hidden), np.float32) for n in layers}
        self._down = {n: np.zeros((experts, hidden, columns), np.float32) for n in layers}

    def load(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Take over one expert's slice."""
        gate, up, down = weights.dequantise()
        self._gate_up[layer][expert, : self._columns] = gate
        self._gate_up[layer][expert, self._columns :] = up
        self._down[layer][expert] = down

    @property
    def nbytes(self) -> int:
        """Resident bytes of weights."""
        arrays = [*self._gate_up.values(), *self._down.values()]
        return sum(array.nbytes for array in arrays)

    def forward(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, out: np.ndarray
    ) -> None:
        """Partial sums of the chosen experts over this slice.

        x: (T, hidden) float32; ids: (T, K) int32; weights: (T, K) float32; out: (T, hidden)
        float32.
        y = sum_k weights_k * down_k (silu(gate_k x) * (up_k x))   (DeepSeek-V3 report, 2.1.2)
        """
        gate_up, down = self._gate_up[layer], self._down[layer]
        out[:] = 0
        for row in range(len(x)):
            order = np.argsort(ids[row], kind="stable")
            for choice in order:
                expert = ids[row, choice]
                both = gate_up[expert] @ x[row]
                inner = silu(both[: self._columns]) * both[self._columns :]
                out[row] += down[expert] @ (inner * weights[row, choice])
