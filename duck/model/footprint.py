"""What a host will hold of a model, tensor by tensor, from its config alone: no file is read."""

from __future__ import annotations

from dataclasses import dataclass

from duck.model.config import ModelConfig
from duck.model.holding import ITEM_BYTES, Holding
from duck.model.tally import Category, Tally
from duck.model.tensors import Wanted, wanted


@dataclass(frozen=True)
class Footprint:
    """Bytes of a host's weights, by category."""

    categories: tuple[Category, ...]

    @property
    def resident_bytes(self) -> int:
        return sum(category.resident_bytes for category in self.categories)


def footprint(config: ModelConfig, holding: Holding, *, device: str) -> Footprint:
    """Everything but the routed experts, as DeepSeek publishes it and as `holding` holds it.

    device: cpu or cuda.
    """
    tally = Tally()
    for want in wanted(config, indexer=holding.indexer is not None, experts=False):
        is_fp8 = want.quantised and config.weight_block_size is not None
        source = want.size + want.scale_nbytes(config) if is_fp8 else 2 * want.size
        held = holding.dtype
        if want.kind == "vector":
            held = "float32"
        elif want.name == "lm_head.weight":
            held = head_dtype(holding, device)
        if holding.fp8_kept and is_fp8 and ".kv_b_proj." not in want.name:
            tally.add(want.kind, "fp8", "fp8", source, source)
        else:
            stored = "fp8" if is_fp8 else _plain(want)
            source *= 2 if stored == "float32" else 1
            tally.add(want.kind, stored, held, source, want.size * ITEM_BYTES[held])
    if config.tie_word_embeddings and head_dtype(holding, device) != holding.dtype:
        size = config.vocab_size * config.hidden_size
        tally.add("linear", holding.dtype, head_dtype(holding, device), 0, 4 * size)
    return Footprint(tuple(tally.categories.values()))


def head_dtype(holding: Holding, device: str) -> str:
    """Of lm_head. Logits are float32.

    A GPU gets them from bf16 weights; a CPU would round them to bf16, and rounded logits tie.
    """
    return "float32" if device == "cpu" else holding.dtype


def _plain(want: Wanted) -> str:
    """How a tensor that is no fp8 is published."""
    return "float32" if want.name.endswith("e_score_correction_bias") else "bfloat16"
