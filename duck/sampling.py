"""How the next token is chosen from a row of logits.

The one idea: choosing is keyed, not drawn from a stream. The token at position p is
argmax(filtered logits / temperature + Gumbel noise), and the noise depends on (seed, p, token id)
alone. That argmax follows the filtered softmax exactly, and it gives the same token however often,
in whatever order and under whatever schedule it is computed: a draft is right if and only if it
equals that token.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duck.errors import ConfigError, DuckError

# Temperatures are clamped to what float32 division bears; in effect both are greedy and uniform.
_COLDEST, _HOTTEST = 1e-30, 1e30
# The seed and the position are one word each of Philox's key.
_WORD = 2**64


@dataclass(frozen=True)
class Sampling:
    """What to sample and when to stop. Every field is checked when the object is made.

    The filters mean what they mean in transformers, and work in its order, each on what the one
    before it left: temperature, top_k, top_p, min_p.

    Args:
        max_tokens: completion tokens at most, 1 or more.
        temperature: 0 takes the likeliest token, whatever the filters; else above 0 and finite.
        top_p: keep the smallest set of likeliest tokens whose probabilities, at this temperature,
            sum to at least top_p; 0 < top_p <= 1, 1 keeps all. Of equals at the edge the lower
            ids are kept.
        top_k: keep the k largest logits, and all that equal the k-th; 0 keeps all.
        min_p: drop tokens with less than min_p times the largest probability; 0 <= min_p <= 1.
        seed: 0 <= seed < 2**64. Sequences with the same seed share their noise: give each of
            several samples of one prompt its own.
        stop: texts that end the answer and are not part of it; a single str is one text.
        ignore_eos: go on after the model's end token.
        logprobs: None, or how many likeliest tokens to report beside the chosen one, 0 or more.

    Raises:
        ConfigError: a value outside its range or of another type.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()  # always a tuple once made
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, None)
        self._integer("top_k", 0, None)
        self._integer("seed", 0, _WORD - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, None)
        self._number("temperature", 0.0, math.inf, "a finite number, 0 or more")
        self._number("top_p", math.ulp(0.0), 1.0, "a number above 0, at most 1")
        self._number("min_p", 0.0, 1.0, "a number from 0 to 1")
        if not isinstance(self.ignore_eos, bool):
            raise ConfigError(f"ignore_eos={self.ignore_eos!r}: allowed are True and False")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (
            isinstance(stop, list | tuple) and all(isinstance(text, str) and text for text in stop)
        ):
            raise ConfigError(
                f"stop={self.stop!r}: allowed are a text or a list of texts, none of them empty"
            )
        object.__setattr__(self, "stop", tuple(stop))

    def _integer(self, name: str, low: int, high: int | None) -> None:
        value: Any = getattr(self, name)
        try:
            number = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = None
        if number is None or number < low or (high is not None and number > high):
            allowed = f"{low} or more" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name}={value!r}: allowed is a whole number, {allowed}")
        object.__setattr__(self, name, number)

    def _number(self, name: str, low: float, high: float, allowed: str) -> None:
        value: Any = getattr(self, name)
        try:
            number = math.nan if isinstance(value, bool | str) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (low <= number <= high and math.isfinite(number)):  # a NaN fails here too
            raise ConfigError(f"{name}={value!r}: allowed is {allowed}")
        object.__setattr__(self, name, number)


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logs of the model's own probabilities, before temperature and filters.

    `top` holds (token id, logprob), likeliest first, lower ids first among equals.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def choose(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The id of the token at `position`, from the logits of the position before it.

    Args:
        logits: (vocabulary,) float32; -inf forbids a token.
        sampling: temperature, filters and seed.
        position: of the token that is chosen, counted from the start of the prompt; 0 or more.

    Raises:
        DuckError: the logits hold a NaN or +inf, or forbid every token.
    """
    best = int(np.argmax(logits))  # stops at the first NaN; among equals the lowest id wins
    if not np.isfinite(logits[best]):
        found = f"the largest logit is {logits[best]} (token id {best})"
        raise DuckError(f"no token can be chosen at position {position}: {found}")
    if sampling.temperature == 0:
        return best
    weights = allowed_weights(logits, sampling)
    uniform = _uniform(sampling.seed, position, logits.size)
    # With Gumbel = -log E, E = -log(1 - u), argmax(log w + Gumbel) is argmax(w / E). As E > u, no
    # token with u > w * E(likeliest) can beat the likeliest, whose w is 1: few are left to take
    # logs of. The filters may have dropped `best`, if another weight rounded to 1 as well.
    likeliest = int(np.argmax(weights))
    bound = _exponential(uniform[likeliest]) * np.float32(1 + 1e-6)  # with room for rounding
    ids = np.flatnonzero(uniform <= weights * bound)
    return int(ids[np.argmax(weights[ids] / _exponential(uniform[ids]))])


def allowed_weights(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float32]:
    """Softmax at the temperature without its denominator: (vocabulary,) float32.

    1 for the likeliest, 0 where a filter drops the token. Needs a temperature above 0 and a finite
    largest logit, which `choose` has checked.
    """
    temperature = np.float32(min(max(sampling.temperature, _COLDEST), _HOTTEST))
    with np.errstate(over="ignore", under="ignore"):  # far below the maximum becomes exactly 0
        weights: NDArray[np.float32] = logits - logits.max()
        np.divide(weights, temperature, out=weights)
        np.exp(weights, out=weights)
    if 0 < sampling.top_k < weights.size:
        # By logits: two of them may round to the same weight and are still told apart.
        kth = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        weights *= logits >= kth
    if sampling.top_p < 1:
        _keep_nucleus(weights, sampling.top_p)
    if sampling.min_p > 0:
        weights *= weights >= sampling.min_p
    return weights


def _keep_nucleus(weights: NDArray[np.float32], top_p: float) -> None:
    """Zero what lies outside the smallest set that sums to top_p of the whole."""
    needed = top_p * float(weights.sum(dtype=np.float64))
    # Sorting a whole vocabulary takes a millisecond; nearly always the likeliest few suffice.
    likely = weights > 1e-3
    largest = weights[likely] if 8 * np.count_nonzero(likely) < weights.size else weights
    if largest.sum(dtype=np.float64) < needed:
        largest = weights
    largest = np.sort(largest)[::-1]
    # Running sums in two strides: over a whole vocabulary cumsum takes longer than the sort.
    starts = np.arange(0, largest.size, 512)
    sums = np.cumsum(np.add.reduceat(largest, starts, dtype=np.float64))
    block = min(int(np.searchsorted(sums, needed)), sums.size - 1)  # clipped: needed is rounded
    inside = largest[starts[block] :][:512].astype(np.float64)
    inside[0] += sums[block - 1] if block else 0.0
    last = int(starts[block]) + min(
        int(np.searchsorted(np.cumsum(inside), needed)), inside.size - 1
    )
    edge = largest[last]
    kept_ties = last + 1 - int(np.count_nonzero(largest > edge))
    dropped_ties = np.flatnonzero(weights == edge)[kept_ties:]
    weights *= weights >= edge
    weights[dropped_ties] = 0


def _uniform(seed: int, position: int, vocabulary: int) -> NDArray[np.float32]:
    """Uniform noise in (0, 1): (vocabulary,), a function of (seed, position, token id) alone."""
    philox = np.random.Philox(key=np.array([seed, position], dtype=np.uint64))
    # Raw words, not Generator's methods: only these does numpy promise never to change.
    words: NDArray[np.uint64] = philox.random_raw((vocabulary + 1) // 2)
    return _to_unit(words.view(np.uint32)[:vocabulary])


def _to_unit(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Words to (0, 1), finest near 0: there are the small exponentials, which decide."""
    unit = words.astype(np.float32)
    unit += np.float32(0.5)
    # Just below 2**-32: the largest word must not round to 1, whose exponential is infinite.
    unit *= np.float32(2**-32 * (1 - 2**-24))
    return unit


def _exponential(uniform: Any) -> Any:
    """Standard exponential noise, above 0 and finite, from uniform noise of any shape."""
    return -np.log1p(-uniform)


def logprobs(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprobs:
    """Log softmax of the unfiltered logits, for the chosen token and the `top` likeliest ones.

    Args:
        logits: (vocabulary,) float32.
        token: the chosen id.
        top: how many of the likeliest to report, 0 or more; no more than there are.
    """
    best = logits.max()
    with np.errstate(under="ignore"):
        log_total = float(best) + math.log(float(np.exp(logits - best).sum(dtype=np.float64)))
    top = min(top, logits.size)
    ids = np.empty(0, dtype=np.intp)
    if top:
        kth = np.partition(logits, -top)[-top]
        ids = np.flatnonzero(logits >= kth)
        ids = ids[np.argsort(-logits[ids], kind="stable")][:top]
    return TokenLogprobs(
        token=token,
        logprob=float(logits[token]) - log_total,
        top=tuple((int(id_), float(logits[id_]) - log_total) for id_ in ids),
    )
