"""The model without its routed experts: layers in order, as steps that a pipeline puts together.

No loop over layers lives here: between `route` and `merge` the routed experts are computed
elsewhere, and when is the pipeline's business. All calls are synchronous, allocate on `device`, and
are meant to run under torch.inference_mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duck.kernels.device import Kernels, pick
from duck.model.attention import Attention
from duck.model.cache import DTYPES, KVCache
from duck.model.config import ModelConfig
from duck.model.footprint import head_dtype
from duck.model.holding import Holding
from duck.model.layers import Loader, Mlp, Norm
from duck.model.mtp import MtpModule
from duck.model.rope import RopeTable
from duck.model.router import Routed, Router
from duck.model.weights import Checkpoint

__all__ = ["DecoderLayer", "KVCache", "MtpModule", "Routed", "Transformer"]


class DecoderLayer:
    """Attend, then dense, or route, shared and merge. Rows x: (T, hidden) in the model's dtype."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        holding: Holding,
        index: int,
        rope: RopeTable,
    ) -> None:
        name, eps = f"model.layers.{index}", config.rms_norm_eps
        self.index, self._kernels = index, loader.kernels
        self.is_moe = index in config.moe_layers
        self._input_norm = Norm(loader, f"{name}.input_layernorm", eps)
        self._attention = Attention(loader, config, holding, index, rope)
        self._post_norm = Norm(loader, f"{name}.post_attention_layernorm", eps)
        self._mlp: Mlp | None = None  # the dense layer's MLP, or the shared expert
        if self.is_moe:
            self._router = Router(loader, config, index)
            if config.n_shared_experts:
                self._mlp = Mlp(loader, f"{name}.mlp.shared_experts")
        else:
            self._mlp = Mlp(loader, f"{name}.mlp")

    def steadiness(self, position: int, rows: int, last: int) -> str | None:
        """As Attention.steadiness, of `attend`."""
        return self._attention.steadiness(position, rows, last)

    def attend(
        self,
        x: Tensor,
        cache: KVCache,
        position: int,
        *,
        last: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Add attention to the last `last` rows (None: all); the KV of every row is written.

        Row t is at position + t and attends to 0 .. position + t, which must have been written.
        With last=0 the result has no rows: the layer's KV is all that was wanted. at: as
        Attention has it.
        """
        count = x.shape[0] if last is None else last
        out = self._attention(self._input_norm(x), cache, position, count, at)
        change = self._kernels.linear_f32(out, self._attention.o_proj)
        return self._add(x[x.shape[0] - count :], change)

    def attend_and_route(
        self,
        x: Tensor,
        cache: KVCache,
        position: int,
        *,
        last: int | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Routed]:
        """`attend` and `route` of what it gives, with a kernel or two less between them."""
        count = x.shape[0] if last is None else last
        inner = self._attention(self._input_norm(x), cache, position, count, at)
        x, h = self._kernels.project_add_norm(
            x[x.shape[0] - count :],
            inner,
            self._attention.o_proj,
            self._post_norm.weight,
            self._post_norm.eps,
        )
        return x, self._router(h)

    def dense(self, x: Tensor) -> Tensor:
        """Return x + MLP(norm(x)), of a layer without routed experts."""
        assert self._mlp is not None
        assert not self.is_moe
        return self._add(x, self._mlp(self._post_norm(x)))

    def route(self, x: Tensor) -> Routed:
        """The normed rows and the experts they go to."""
        return self._router(self._post_norm(x))

    def shared(self, h: Tensor) -> Tensor:
        """The shared expert of the normed rows, (T, hidden) float32; zeros where there is none."""
        if self._mlp is None:
            return torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        return self._mlp(h)

    def merge(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        """Return x + (routed + shared), summed in float32 and rounded once.

        routed: (T, hidden), the sum of the ducks' answers, or (ducks, T, hidden), to be summed.
        """
        return self._kernels.combine(x, routed if routed.dim() == 3 else routed[None], shared)

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        """The residual sum: float32, rounded once to x's dtype."""
        return self._kernels.combine(x, change[None], None)


class Transformer:
    """Embedding, layers, last norm, head, and the MTP module if the checkpoint has one."""

    def __init__(self, loader: Loader, config: ModelConfig, holding: Holding) -> None:
        self.config, self.holding = config, holding
        self.device, self.dtype, self.kernels = loader.device, loader.dtype, loader.kernels
        self.tally = loader.tally  # what was loaded
        self.rope = rope = RopeTable(config.rope, config.qk_rope_head_dim, loader.device)
        if loader.device.type == "cuda":
            rope.upto(holding.max_len)  # now: captured graphs rely on it to stay where it is
        self._embedding = loader.embedding()
        self.layers: Sequence[DecoderLayer] = [
            DecoderLayer(loader, config, holding, index, rope)
            for index in range(config.num_hidden_layers)
        ]
        self._norm = Norm(loader, "model.norm", config.rms_norm_eps)
        head = head_dtype(holding, loader.device.type)
        if not config.tie_word_embeddings:
            self._head = loader.plain("lm_head", DTYPES[head])
        elif head == holding.dtype:
            self._head = self._embedding
        else:
            self._head = self._embedding.to(DTYPES[head])
            self.tally.add("linear", holding.dtype, head, 0, self._head.nbytes)
        self.mtp: MtpModule | None = None
        if config.mtp_layers:
            layer = DecoderLayer(loader, config, holding, config.num_hidden_layers, rope)
            self.mtp = MtpModule(loader, config, layer, self.embed)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        holding: Holding,
        *,
        device: torch.device,
        kernels: Kernels | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Transformer:
        """Everything but the routed experts, after `checkpoint.check`.

        kernels: None picks the device's. progress: called with (bytes read so far, bytes in all),
        scales left out.

        Raises:
            WeightsError: a tensor is missing, misshaped or not numbers.
        """
        indexer = holding.indexer is not None
        checkpoint.check(config, indexer=indexer)
        total = checkpoint.nbytes_without_experts(config, indexer=indexer)
        done = 0

        def step(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        with Loader(
            checkpoint,
            device=device,
            dtype=DTYPES[holding.dtype],
            kernels=pick(device) if kernels is None else kernels,
            fp8_kept=holding.fp8_kept,
            progress=step,
        ) as loader:
            return cls(loader, config, holding)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions of all layers, the MTP layer's included."""
        return KVCache.of(self.config, self.holding, capacity, device=self.device)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, hidden). Tokens are below vocab_size: the caller has checked them."""
        # From pinned memory a GPU fetches them itself; else the host would wait for it to be idle.
        ids = torch.tensor(tokens, pin_memory=self.device.type == "cuda")
        return self._embedding[ids.to(self.device, non_blocking=True)]

    def final(self, x: Tensor) -> Tensor:
        """model.norm: the hidden that the head and the MTP module take."""
        return self._norm(x)

    def logits(self, h: Tensor) -> Tensor:
        """(T, vocab) float32, of rows after `final`."""
        return self.kernels.linear_f32(h, self._head)
