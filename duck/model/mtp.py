"""The MTP module: one more decoder layer that drafts the token after the next.

Position i pairs the main model's final hidden h_i (after model.norm) with the embedding of the
next token; its logits predict the token after that. Embedding and head are the main model's.
Source: DeepSeek-V3 report (arXiv 2412.19437), section 2.2, with the halves in the order of the
published weights: embedding first, where the report's equation 21 writes the hidden first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from duck.model.config import ModelConfig
from duck.model.layers import Loader, Norm

if TYPE_CHECKING:
    from duck.model.transformer import DecoderLayer


class MtpModule:
    """combine, then `layer` as any MoE layer, then final and Transformer.logits."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        layer: DecoderLayer,
        embed: Callable[[Sequence[int]], Tensor],
    ) -> None:
        name, eps = f"model.layers.{layer.index}", config.rms_norm_eps
        self.layer = layer
        self._embed = embed
        self._enorm = Norm(loader, f"{name}.enorm", eps)
        self._hnorm = Norm(loader, f"{name}.hnorm", eps)
        self._linear = loader.kernels.linear
        self._eh_proj = loader.matrix(f"{name}.eh_proj")
        self._norm = Norm(loader, f"{name}.shared_head.norm", eps)

    def combine(self, tokens: Sequence[int], h: Tensor) -> Tensor:
        """The layer's input (T, hidden), from final hiddens h and the tokens that follow them."""
        pair = torch.cat((self._enorm(self._embed(tokens)), self._hnorm(h)), dim=-1)
        return self._linear(pair, self._eh_proj)

    def final(self, x: Tensor) -> Tensor:
        """The module's own last norm; then Transformer.logits."""
        return self._norm(x)
