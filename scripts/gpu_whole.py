"""Whether a small model gives the same from captured CUDA graphs as from its kernels one by one.

The model is random, at a real one's widths: its layers, slots, the device's two threads and pinned
memory are those of a host. Only the ducks are not there: what they would answer is random. With
graphs the device adds the answers up as they lie in pinned memory; without, the host does. Lanes
are as a step has them: a sure row and its guess beside each other, both in one, the drafting layer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts import Random, Shape
from torch import Tensor

from duck.device import Device, Later, Stage, now
from duck.kernels.device import REFERENCE, Kernels
from duck.kernels.matrix import Matrix
from duck.model.cache import KVCache
from duck.model.config import ModelConfig
from duck.model.holding import Holding
from duck.model.layers import Loader
from duck.model.tally import Tally
from duck.model.tensors import wanted
from duck.model.transformer import DecoderLayer, Transformer
from duck.walk import Capture, Slots, Walk, Walks, fetch

Result = dict[str, Any]

_VOCABULARY = 64
_SET_ROWS = 4  # that a row set has room for


def whole_check(shape: Shape, device: torch.device, kernels: Kernels) -> Result:
    """Steps around index_topk, where attention turns sparse, twice: with graphs and without.

    On a CPU, where nothing is captured, with the references: interpreted kernels take minutes.
    """
    config = config_of(shape)
    holding = Holding.choose(
        config, dtype="bfloat16", kv="fp8", max_len=shape.topk + 64, fp8_kept=True
    )
    cuda = device.type == "cuda"
    kernels = kernels if cuda else REFERENCE
    model = Transformer(RandomWeights(config, holding, device, kernels), config, holding)
    around = 9 if cuda else 5  # odd: one step has rows on either side
    positions = range(shape.topk - around, shape.topk + around, 2)
    capture: Capture | None = None
    answers = Answers(shape, partial(np.zeros, dtype=np.uint8))
    if cuda:
        from duck import cuda as calls

        capture, answers = calls.Capturer(), Answers(shape, calls.pinned)
    worker = Device(device.type, "bfloat16")
    try:
        got: list[Tensor] = []
        for _ in range(2):  # the second session captures anew, when the first one's graphs are gone
            replayed = Walks(slots=True, capture=capture, watched=True)
            got += asyncio.run(_steps(shape, model, worker, replayed, answers.pinned, positions))
        # The same kernels; on a CPU without slots, since that is all there is to compare.
        plain = Walks(slots=cuda, watched=True)
        expected = asyncio.run(_steps(shape, model, worker, plain, answers.summed, positions))
    finally:
        worker.close()
    expected += expected
    different = sum(not torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(bool(torch.isfinite(part.float()).all()) for part in expected)
    return {
        "error": different / len(expected), "tolerance": 0.0, "ok": different == 0,
        "why": f"{different} of {len(expected)} outputs differ",
    }  # fmt: skip


def config_of(shape: Shape) -> ModelConfig:
    """A model of one dense layer, two with experts and one that drafts."""
    raw = {
        "model_type": "deepseek_v32", "vocab_size": _VOCABULARY, "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.shared, "moe_intermediate_size": shape.shared,
        "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1,
        "num_attention_heads": shape.heads, "q_lora_rank": shape.q_rank,
        "kv_lora_rank": shape.rank, "qk_nope_head_dim": shape.nope,
        "qk_rope_head_dim": shape.rope, "v_head_dim": shape.value,
        "n_routed_experts": shape.experts, "n_shared_experts": 1,
        "num_experts_per_tok": shape.chosen, "n_group": shape.groups, "topk_group": shape.kept,
        "routed_scaling_factor": 2.5, "rope_theta": 10_000.0, "eos_token_id": 1,
        "max_position_embeddings": shape.topk + 64, "index_topk": shape.topk,
        "index_n_heads": shape.index_heads, "index_head_dim": shape.index_width,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
        },
    }  # fmt: skip
    return ModelConfig.parse(raw, {}, folder=Path("random"))


class RandomWeights(Loader):
    """Gives parameters that were never trained, in the dtypes of a checkpoint."""

    def __init__(
        self, config: ModelConfig, holding: Holding, device: torch.device, kernels: Kernels
    ) -> None:
        self.device, self.dtype, self.kernels = device, torch.bfloat16, kernels
        self.tally = Tally()
        self._make = Random(device, 11)
        indexer = holding.indexer is not None
        self._shapes = {
            want.name: want.shape for want in wanted(config, indexer=indexer, experts=False)
        }

    def matrix(self, name: str) -> Matrix:
        if name.endswith("eh_proj"):
            return self.plain(name)
        return self._make.fp8(*self._shapes[f"{name}.weight"])

    def plain(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        size = self._shapes[f"{name}.weight"]
        made: Tensor = self._make.numbers(*size) * size[-1] ** -0.5
        return made.to(dtype or self.dtype)

    def embedding(self) -> Tensor:
        return self._make.rows(*self._shapes["model.embed_tokens.weight"])

    def vector(self, name: str) -> Tensor:
        size = self._shapes[name]
        made = self._make.numbers(*size)
        if len(size) == 2:
            made *= 1.5 * size[-1] ** -0.5
            return made
        return 1 + made / 8 if "norm.weight" in name else made / 10


class Answers:
    """What the ducks say at any layer: their rows as they lie in a row set, and their sum."""

    def __init__(self, shape: Shape, memory: Callable[[int], np.ndarray]) -> None:
        stride = _SET_ROWS * shape.hidden + 32  # as row sets have them, there is more between
        lain = torch.from_numpy(memory(2 * shape.ducks * stride))
        rows = lain.view(torch.bfloat16).view(shape.ducks, stride)
        rows = rows[:, : _SET_ROWS * shape.hidden]
        self._rows: Tensor = rows.view(shape.ducks, _SET_ROWS, shape.hidden)
        self._rows.copy_(Random(torch.device("cpu"), 12).rows(*self._rows.shape) / 10)

    def pinned(self, walk: Walk) -> Tensor:
        """Partial sums where they lie, (ducks, T, hidden)."""
        rows: Tensor = self._rows[:, : len(walk.x)]
        return rows

    def summed(self, walk: Walk) -> Tensor:
        """Their sum in duck order, on the device."""
        total: Tensor = self._rows[0].float()
        for rows in self._rows[1:]:
            total = total + rows
        return total[: len(walk.x)].to(walk.x.device)


class Holder:
    """A session, as far as walks know it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: Slots | None = None


async def _steps(
    shape: Shape,
    model: Transformer,
    device: Device,
    walks: Walks,
    answers: Callable[[Walk], Tensor],
    positions: Sequence[int],
) -> list[Tensor]:
    """All that layers send, and final rows, of steps at these positions; in the host's memory."""
    holder = Holder(model.new_cache(positions[-1] + 8))
    make = Random(model.device, 13)
    capacity = holder.cache.capacity
    for layer in range(len(model.layers) + 1):
        kept = make.latents(shape, capacity, "fp8")
        holder.cache.latents.held(layer, 0, 0).copy_(kept)
        holder.cache.keys.held(layer, 0, 0).copy_(make.index_keys(shape, capacity))
    seen: list[Tensor] = []
    assert model.mtp is not None
    for number, at in enumerate(positions):
        first = model.embed([(7 * number + row) % _VOCABULARY for row in range(2)])
        lanes = [(first[:1], at), (first[1:], at + 1)] if number % 2 else [(first, at)]
        begun = [(walks.begin(holder, len(x), place, None, decode=True), x) for x, place in lanes]
        seen += await _through(model, model.layers, device, begun, answers)
        draft = walks.begin(holder, 2, at, 1, decode=True)
        seen += await _through(model, [model.mtp.layer], device, [(draft, first)], answers)
    return seen


async def _through(
    model: Transformer,
    layers: Sequence[DecoderLayer],
    device: Device,
    begun: Sequence[tuple[Walk, Tensor]],
    answers: Callable[[Walk], Tensor],
) -> list[Tensor]:
    """Walks beside each other through layers: all attend before any of them is merged."""
    seen: list[Tensor] = []
    walks = [walk for walk, _ in begun]

    def enter(walk: Walk) -> Later[None]:
        walk.enter(dict(begun)[walk])
        return now(None)

    def attend(walk: Walk, layer: DecoderLayer) -> Later[list[Tensor]]:
        walk.attend(layer)
        if not layer.is_moe:
            return now([])
        sent = walk.sent()

        def made() -> list[Tensor]:
            rows, ids, weights, finite = sent()
            assert finite
            return [rows.clone(), ids.clone(), weights.clone()]

        return Later(made)

    def share(walk: Walk, layer: DecoderLayer) -> Later[None]:
        walk.share(layer)
        return now(None)

    def merge(walk: Walk, layer: DecoderLayer) -> Later[None]:
        walk.merge(layer, answers(walk))
        return now(None)

    def final(walk: Walk) -> Later[list[Tensor]]:
        rows = fetch(model.final(walk.x))
        return Later(lambda: [rows()[0].clone()])

    async def all_do(name: str, work: Any, *more: Any) -> list[Any]:
        each = (device.run(Stage(name, 1), partial(work, walk, *more)) for walk in walks)
        return [ran.result for ran in await asyncio.gather(*each)]

    await all_do("combine", enter)
    for layer in layers:
        for parts in await all_do("attend", attend, layer):
            seen += parts
        if layer.is_moe:
            await all_do("shared", share, layer)
            await all_do("combine", merge, layer)
    for parts in await all_do("final", final):
        seen += parts
    for walk in walks:
        walk.close()
    return seen
