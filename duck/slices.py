"""Filling a duck's memory with its slice of every expert, from a model folder on its own disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from duck.errors import ConfigError
from duck.model.config import ModelConfig
from duck.model.weights import Checkpoint, ExpertWeights, experts_digest
from duck.placement import Plan


class Experts(Protocol):
    """Resident slices and their arithmetic; see `kernels.reference.experts` for the meaning."""

    @property
    def nbytes(self) -> int: ...
    def load(self, layer: int, expert: int, weights: ExpertWeights) -> None: ...
    def forward(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, out: np.ndarray
    ) -> None: ...


class SliceSource:
    """A model folder that a duck can read its slices from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = ModelConfig.load(folder)
        self.checkpoint = Checkpoint.open(folder)
        self.checkpoint.check(self.config)
        self.digest = experts_digest(self.checkpoint, self.config)

    def check(self, plan: Plan) -> None:
        """Refuse a plan made from another model.

        Raises:
            ConfigError: the digests or the sizes differ.
        """
        if plan.model != self.digest:
            raise ConfigError(
                f"this duck holds another model: its folder {self.folder.name} has experts "
                f"{self.digest[:12]}, the host's model has {plan.model[:12]}; start both with the "
                "same files"
            )
        mine = (
            self.config.moe_layers, self.config.n_routed_experts,
            self.config.moe_intermediate_size, self.config.hidden_size,
        )  # fmt: skip
        theirs = (plan.layers, plan.experts, plan.columns, plan.shape.hidden)
        if mine != theirs:
            raise ConfigError(f"the host's plan has sizes {theirs}, this duck's model has {mine}")

    def load(
        self, plan: Plan, duck: int, experts: Experts, progress: Callable[[int, int], None]
    ) -> None:
        """Read one duck's columns of every expert; progress in bytes of the checkpoint."""
        columns = plan.slices[duck]
        per_expert = self.checkpoint.expert_nbytes(plan.layers[0], columns)
        total = per_expert * plan.experts * len(plan.layers)
        done = 0
        for layer in plan.layers:
            for expert in range(plan.experts):
                experts.load(layer, expert, self.checkpoint.expert(layer, expert, columns))
                done += per_expert
                progress(done, total)
