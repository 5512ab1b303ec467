"""The router: which experts a token goes to, and with what weights.

Everything is float32: a router in bfloat16 picks other experts. Ties go to the lower index, so that
the choice never depends on the device or the number of rows. The arithmetic is in duck.kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from duck.kernels.reference.router import Rule
from duck.model.config import ModelConfig
from duck.model.layers import Loader


@dataclass(frozen=True)
class Routed:
    """What the ducks need: the experts' input and who takes it.

    h: (T, hidden), the normed input. ids: (T, K) int32. weights: (T, K) float32,
    routed_scaling_factor included.
    """

    h: Tensor
    ids: Tensor
    weights: Tensor


class Router:
    """One layer's gate."""

    def __init__(self, loader: Loader, config: ModelConfig, layer: int) -> None:
        name = f"model.layers.{layer}.mlp.gate"
        self._route, self._rule = loader.kernels.route, rule(config)
        self._gate = loader.vector(f"{name}.weight")
        self._bias: Tensor | None = None
        if config.topk_method == "noaux_tc":
            self._bias = loader.vector(f"{name}.e_score_correction_bias")

    def __call__(self, h: Tensor) -> Routed:
        """h: (T, hidden), normed."""
        return Routed(h, *self._route(h, self._gate, self._bias, self._rule))


def rule(config: ModelConfig) -> Rule:
    """How a model's experts are chosen."""
    grouped = config.n_group > 1 and config.topk_method != "greedy"
    return Rule(
        count=config.num_experts_per_tok,
        groups=config.n_group if grouped else 1,
        kept=config.topk_group if grouped else 1,
        sigmoid=config.scoring_func == "sigmoid",
        pairs=config.topk_method == "noaux_tc",  # the other is group_limited_greedy, of V2
        normalise=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )
