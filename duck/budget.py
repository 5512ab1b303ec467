"""Whether a host has room for a model and its longest session, decided before a byte is loaded."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from duck.errors import ConfigError
from duck.kernels.reference import SCORES, WRITTEN_OUT
from duck.model.config import ModelConfig
from duck.model.footprint import footprint
from duck.model.holding import Holding

_LEAST = 2048
"""Tokens: a host that has room for fewer is refused, unless it was told to do with them."""
_PROMPT_ROWS = 256  # of a prompt that go through a layer together


@dataclass(frozen=True)
class Budget:
    """What a host will hold, and what that leaves.

    kv_bytes: of one session of max_len tokens. free_bytes: what weights, session and scratch leave;
    None where the system does not say. context: tokens the model was made for. shortened: memory,
    and nobody's wish, is why a session may not be as long.
    """

    holding: Holding
    weights_bytes: int
    kv_bytes: int
    free_bytes: int | None
    context: int
    shortened: bool = False

    def needs(self) -> str:
        """In words: "weights 17,634 MiB, KV 2,442 MiB at 64,000 tokens"."""
        length = f"{self.holding.max_len:,} tokens"
        return f"weights {_mib(self.weights_bytes)}, KV {_mib(self.kv_bytes)} at {length}"

    def __str__(self) -> str:
        """The same, and what is left: one line for people."""
        text = self.needs()
        if self.free_bytes is not None:
            text += f", free {_mib(self.free_bytes)}"
        if self.shortened:
            text += f"; for the model's {self.context:,} tokens memory has no room"
        return text

    def to_json(self) -> dict[str, Any]:
        """Plain values, in bytes and tokens."""
        return {
            "max_len": self.holding.max_len,
            "kv": self.holding.kv,
            "indexer": self.holding.indexer,
            "weights_bytes": self.weights_bytes,
            "kv_bytes": self.kv_bytes,
            "free_bytes": self.free_bytes,
        }


def plan_memory(
    config: ModelConfig,
    *,
    device: str,
    free_bytes: int | None,
    dtype: str,
    kv: str = "auto",
    indexer: str = "auto",
    max_len: int | None = None,
    fp8_kept: bool = False,
) -> Budget:
    """Fit weights and one session into `free_bytes`; None means that nobody knows.

    The options are as Holding.choose has them. A session may be as long as the model's context;
    without max_len it is shortened to what fits.

    Raises:
        ConfigError: the weights, or a session of max_len tokens, do not fit; says what would.
    """

    def budget(length: int | None, kv: str = kv, dtype: str = dtype) -> Budget:
        holding = Holding.choose(
            config, dtype=dtype, kv=kv, indexer=indexer, max_len=length, fp8_kept=fp8_kept
        )
        weights = footprint(config, holding, device=device).resident_bytes
        session = holding.token_nbytes(config) * holding.max_len
        free = None
        if free_bytes is not None:
            free = free_bytes - weights - session - _scratch(config, holding)
        return Budget(holding, weights, session, free, config.max_position_embeddings)

    def longest(kv: str = kv) -> int:
        most = min(config.max_position_embeddings, 1 << 40)  # a damaged file may say anything
        lengths = range(1, most + 1)
        return bisect_left(
            lengths, True, key=lambda length: (budget(length, kv).free_bytes or 0) < 0
        )

    whole = budget(max_len)
    if whole.free_bytes is None or whole.free_bytes >= 0:
        return whole
    fits = longest()
    if max_len is None and fits >= min(_LEAST, config.max_position_embeddings):
        return replace(budget(fits), shortened=True)
    ways = [f"--max-len {fits}"] if fits else []
    if whole.holding.kv != "fp8" and (more := longest("fp8")) > fits:
        also = f" --max-len {more}" if more < whole.holding.max_len else ""
        ways.append(f"--kv fp8{also}")
    wanted = max_len or min(_LEAST, config.max_position_embeddings)
    if dtype == "float32" and (budget(wanted, "fp8", "bfloat16").free_bytes or 0) >= 0:
        enough = (budget(wanted, dtype="bfloat16").free_bytes or 0) >= 0
        ways.append("--dtype bfloat16" + ("" if enough else " --kv fp8"))
    ways.append("a machine with more")
    raise ConfigError(
        f"{whole.needs()}, {_mib(-whole.free_bytes)} more than {device} memory has free; what "
        f"helps: {', '.join(ways)}"
    )


def _scratch(config: ModelConfig, holding: Holding) -> int:
    """Bytes that a chunk of a prompt takes for a moment, at most; an estimate.

    The plain kernels bring what the rows see to float32, write heads' keys and values out, and hold
    a block of scores and what is made of it.
    """
    seen = holding.max_len
    if holding.indexer is not None:
        assert config.index_topk is not None
        seen = config.index_topk
    heads, length = config.num_attention_heads, holding.max_len
    head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    numbers = 2 * seen * (config.kv_lora_rank + config.qk_rope_head_dim)
    numbers += 2 * min(WRITTEN_OUT, seen * heads * head)
    numbers += 3 * min(SCORES, _PROMPT_ROWS * heads * length)
    if holding.indexer is not None:
        numbers += 2 * length * config.index_head_dim
    return 4 * numbers


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.0f} MiB"
