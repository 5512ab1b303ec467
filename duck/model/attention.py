"""Multi-head latent attention (MLA), dense or sparse (DSA).

A cached token is one row per layer: the normed latent c (kv_lora_rank numbers) and the rotated key
k_pe that all heads share (qk_rope_head_dim). Keys and values of heads exist only inside one call.
Source: DeepSeek-V2 report (arXiv 2405.04434), section 2.1. Of models with an indexer, rows that see
more than index_topk tokens attend to the index_topk that it selects for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duck.kernels.matrix import Matrix
from duck.kernels.reference import WRITTEN_OUT
from duck.kernels.reference.device import attend_naive
from duck.model.cache import KVCache
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.indexer import Indexer
from duck.model.layers import Beside, Loader, Norm
from duck.model.rope import RopeTable, position_on, softmax_scale

_LATENT_EPS = 1e-6  # of the two inner norms: fixed in DeepSeek's code, whatever rms_norm_eps says


class Attention:
    """MLA of one layer, without the norm before it and the residual after it."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        holding: Holding,
        layer: int,
        rope: RopeTable,
    ) -> None:
        name = f"model.layers.{layer}.self_attn"
        self._layer, self._rope, self._scale = layer, rope, softmax_scale(config)
        self._heads = config.num_attention_heads
        self._nope, self._rank = config.qk_nope_head_dim, config.kv_lora_rank
        self._q_norm: Norm | None = None
        q_a: list[Matrix] = []
        if config.q_lora_rank is None:
            self._q_proj = loader.matrix(f"{name}.q_proj")
        else:
            q_a = [loader.matrix(f"{name}.q_a_proj")]
            self._q_norm = Norm(loader, f"{name}.q_a_layernorm", _LATENT_EPS)
            self._q_proj = loader.matrix(f"{name}.q_b_proj")
        self._kernels = loader.kernels
        # Last, since its rows fill no whole number of blocks.
        self._down = Beside(loader, *q_a, loader.matrix(f"{name}.kv_a_proj_with_mqa"))
        self._kv_norm = Norm(loader, f"{name}.kv_a_layernorm", _LATENT_EPS)
        # Per head: first the rows that make its key, then the rows that make its value.
        per_head = loader.plain(f"{name}.kv_b_proj").view(self._heads, -1, self._rank)
        self._wk = per_head[:, : self._nope].contiguous()
        self._wv = per_head[:, self._nope :].contiguous()
        self.o_proj = loader.matrix(f"{name}.o_proj")
        # Multiplications per head and cached token: absorbed 2r + dr for every row; naive
        # dn + dr + dv for every row, and r(dn + dv) once to write the head's key and value out.
        r, dn, dv = self._rank, self._nope, config.v_head_dim
        saved = 2 * r - dn - dv
        self._few_rows = r * (dn + dv) // saved if saved > 0 else None
        # Per token that is written out.
        self._spread = self._heads * (dn + config.qk_rope_head_dim + dv)
        self._indexer: Indexer | None = None
        if holding.indexer is not None:
            self._indexer = Indexer(loader, config, holding, layer)

    def steadiness(self, position: int, rows: int, last: int) -> str | None:
        """Under which name the launches of a call are the same at every position.

        "dense" or "sparse"; None if they depend on where its rows are.
        """
        if self._few_rows is not None and last > self._few_rows:
            return None
        if self._indexer is None or position + rows <= self._indexer.topk:
            return "dense"
        return "sparse" if position + rows - last >= self._indexer.topk else None

    def __call__(
        self, x: Tensor, cache: KVCache, position: int, last: int, at: Tensor | None = None
    ) -> Tensor:
        """Write latents and index keys of all rows, attend with the last `last` of them.

        x: (T, hidden), normed, at position .. position + T - 1. at: `position` as kernels take it;
        with it, what is launched holds for other positions of the same `steadiness`, too. Returns
        (last, heads * v_head_dim), the input of o_proj.
        """
        rows = x.shape[0]
        at = position_on(x, position) if at is None else at
        # What the query and the cache are made of, at once if both are wanted of all rows.
        narrow = None if self._q_norm is None or last < rows else self._down(x)
        turns = self._rope.upto(position + rows)
        held = cache.latents.held(self._layer, position, rows)
        self._kernels.append_latents(
            self._down.one(-1, x) if narrow is None else narrow[1],
            self._kv_norm.weight,
            self._kv_norm.eps,
            *turns,
            held,
            at,
        )
        if self._indexer is not None:
            held_keys = cache.keys.held(self._layer, position, rows)
            self._indexer.append(x, held_keys, turns, at)

        if last == 0:
            return x.new_empty(0, self.o_proj.shape[1])
        first, at = position + rows - last, _after(at, rows - last)
        x = x[rows - last :]
        linear = self._kernels.linear
        q_latent = x
        if self._q_norm is not None:
            q_latent = self._q_norm(self._down.one(0, x) if narrow is None else narrow[0])
        q = linear(q_latent, self._q_proj).view(last, self._heads, -1)
        q_pe = self._kernels.rotate_at(q[..., self._nope :], *turns, at)
        q_nope = q[..., : self._nope]
        if self._indexer is None:
            return self._dense(q_nope, q_pe, cache, first, at).flatten(1)
        # The rows that see index_topk tokens at most see them all.
        dense = min(last, max(0, self._indexer.topk - first))
        parts = []
        if dense:
            parts.append(self._dense(q_nope[:dense], q_pe[:dense], cache, first, at))
        if dense < last:
            held_keys = cache.keys.held(self._layer, position, rows)
            at = _after(at, dense)
            selected = self._indexer.select(x[dense:], q_latent[dense:], held_keys, turns, at)
            weights = (self._wk, self._wv, self._scale)
            parts.append(
                self._kernels.attend(
                    q_nope[dense:],
                    q_pe[dense:],
                    held,
                    *weights,
                    at,
                    selected,
                )
            )
        return torch.cat(parts).flatten(1)

    def _dense(
        self, q_nope: Tensor, q_pe: Tensor, cache: KVCache, first: int, at: Tensor
    ) -> Tensor:
        """Attention of rows at `first` and after to every token up to their own."""
        rows = q_nope.shape[0]
        weights = (self._wk, self._wv, self._scale)
        few = self._few_rows is None or rows <= self._few_rows
        if few or (first + rows) * self._spread > WRITTEN_OUT:
            held = cache.latents.held(self._layer, first, rows)
            return self._kernels.attend(q_nope, q_pe, held, *weights, at)
        seen = cache.latents.read(self._layer, first + rows)
        return attend_naive(q_nope, q_pe, seen, *weights, first)


def _after(at: Tensor, rows: int) -> Tensor:
    """The position so many rows after `at`."""
    return at + rows if rows else at
