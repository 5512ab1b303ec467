"""The router: which experts a token goes to, and with what weights.

Everything is float32: a router in bfloat16 picks other experts. Ties go to the lower index, so that
the choice never depends on the device or the number of rows.
Source: DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2; V2's two older rules are flags.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

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
        self._config = config
        self._gate = loader.vector(f"{name}.weight")
        self._bias: Tensor | None = None
        if config.topk_method == "noaux_tc":
            self._bias = loader.vector(f"{name}.e_score_correction_bias")

    def __call__(self, h: Tensor) -> Routed:
        """h: (T, hidden), normed."""
        return choose(F.linear(h.float(), self._gate), self._bias, h, self._config)


def choose(logits: Tensor, bias: Tensor | None, h: Tensor, config: ModelConfig) -> Routed:
    """The top experts of each row of logits (T, experts) float32.

    The bias (experts,) steers the choice only; weights come from the unbiased scores.
    """
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if config.n_group > 1 and config.topk_method != "greedy":
        choice = _keep_best_groups(choice, config)
    ids = _best(choice, config.num_experts_per_tok)
    weights = scores.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routed(h, ids.int(), weights * config.routed_scaling_factor)


def _keep_best_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """Set the scores outside each row's topk_group best groups to -inf."""
    grouped = choice.view(len(choice), config.n_group, -1)
    if config.topk_method == "noaux_tc":
        strength = grouped.topk(2, dim=-1).values.sum(dim=-1)
    else:  # group_limited_greedy, of V2
        strength = grouped.amax(dim=-1)
    dropped = strength.new_ones(strength.shape).bool()
    dropped.scatter_(1, _best(strength, config.topk_group), False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices (T, count) of the largest values, best first; topk would leave ties open."""
    order: Tensor = values.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count]
