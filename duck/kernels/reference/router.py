"""Which experts a row goes to, and with what weights: float32, ties to the lower index.

Source: DeepSeek-V3 report (arXiv 2412.19437), section 2.1.2; V2's two older rules are flags.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How experts are chosen.

    sigmoid: scores are that of the logits, else softmax. groups: of experts, of which the `kept`
    strongest stay; 1 keeps all. pairs: a group is as strong as its best two, else as its best one.
    count: experts a row goes to. normalise: weights add up to 1 before `scale`.
    """

    count: int
    groups: int = 1
    kept: int = 1
    sigmoid: bool = True
    pairs: bool = True
    normalise: bool = True
    scale: float = 1.0


def route(h: Tensor, gate: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """`choose` by h @ gate.T. h: (T, hidden); gate: (experts, hidden) float32."""
    return choose(F.linear(h.float(), gate), bias, rule)


def choose(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """The top experts of each row of logits (T, experts) float32, best first.

    The bias (experts,) steers the choice only; weights come from the unbiased scores. Returns ids
    (T, count) int32 and weights (T, count) float32. What is not a number counts as the largest.
    """
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if rule.groups > 1:
        choice = _keep_best_groups(choice, rule)
    ids = _best(choice, rule.count)
    weights = scores.gather(1, ids)
    if rule.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids.int(), weights * rule.scale


def _keep_best_groups(choice: Tensor, rule: Rule) -> Tensor:
    """Set the scores outside each row's best groups to -inf."""
    grouped = choice.view(len(choice), rule.groups, -1)
    strength = grouped.topk(2 if rule.pairs else 1, dim=-1).values.sum(dim=-1)
    dropped = strength.new_ones(strength.shape).bool()
    dropped.scatter_(1, _best(strength, rule.kept), False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices (T, count) of the largest values, best first; topk would leave ties open."""
    order: Tensor = values.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count]
