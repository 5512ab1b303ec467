"""The keyed choice of a token: its law, its keys, its filters and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import duck.sampling
from duck.errors import ConfigError, DuckError
from duck.sampling import Sampling, allowed_weights, choose, logprobs


def normal(seed: int, size: int, spread: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by transformers' filters, in float64."""
    scores = torch.tensor(logits, dtype=torch.float64)[None] / sampling.temperature
    ids = torch.zeros(1, 1, dtype=torch.long)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square test at a level of one in 100,000; rare tokens are pooled."""
    assert counts[probabilities == 0].sum() == 0
    total = counts.sum()
    rare = probabilities * total < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(probabilities[~rare], probabilities[rare].sum()) * total
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi2 = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    # Wilson and Hilferty's approximation of the quantile; 4.26 is the normal one.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.26 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi2 < limit, f"chi-square {chi2:.1f} with {degrees} degrees of freedom"


# --- Sampling ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("max_tokens", bad) for bad in (0, -1, 1.5, "8", True, None)],
        *[("temperature", bad) for bad in (-0.1, math.nan, math.inf, "1", None, True, 10**400, 1j)],
        *[("top_p", bad) for bad in (0, -0.1, 1.01, math.nan, "x")],
        *[("top_k", bad) for bad in (-1, 2.0, True)],
        *[("min_p", bad) for bad in (-0.01, 1.5, math.nan)],
        *[("seed", bad) for bad in (-1, 2**64, 0.5)],
        *[("stop", bad) for bad in ("", [""], ["a", 1], 5, None)],
        *[("ignore_eos", bad) for bad in (1, "yes", None)],
        *[("logprobs", bad) for bad in (-1, True, 1.0)],
    ],
)
def test_a_value_out_of_range_is_one_clear_line(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(f"{field}={value!r}: allowed ")
    assert "\n" not in text


def test_values_at_the_edges_are_taken() -> None:
    sampling = Sampling(
        max_tokens=1, temperature=0, top_p=1, top_k=0, min_p=1, seed=2**64 - 1, logprobs=0
    )
    assert sampling.temperature == 0.0
    assert Sampling(top_k=np.int64(5), temperature=np.float32(0.5)).top_k == 5  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_stop_becomes_a_tuple(stop: str | list[str]) -> None:
    assert Sampling(stop=stop).stop == ("end",)
    assert Sampling(stop=stop) == Sampling(stop="end")
    hash(Sampling(stop=stop))


# --- greedy ---


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([-np.inf, 2, 7, 7, 1], dtype=np.float32)
    assert choose(logits, Sampling(), 0) == 2
    assert choose(-np.zeros(3, dtype=np.float32), Sampling(top_k=1, min_p=0.5), 9) == 0


def test_greedy_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duck.sampling, "_uniform", None)
    assert choose(normal(0, 100), Sampling(temperature=0), 3) == int(normal(0, 100).argmax())


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [[1, math.nan, 2], [math.nan] * 3, [1, math.inf, 2], [-math.inf] * 3, [math.inf, math.nan]],
)
def test_logits_that_are_no_numbers_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(DuckError, match="position 17"):
        choose(np.array(logits, dtype=np.float32), Sampling(temperature=temperature), 17)


# --- the law ---

LAWS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=3.0),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.5, min_p=0.1),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("sampling", LAWS, ids=str)
def test_tokens_follow_the_filtered_softmax(sampling: Sampling) -> None:
    logits = normal(1, 60)
    counts = np.zeros(60)
    for seed in range(4):
        keyed = Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
        )
        for position in range(1500):
            counts[choose(logits, keyed, position)] += 1
    assert_follows(counts, expected(logits, sampling))


def test_a_low_temperature_is_not_greedy() -> None:
    logits = np.array([0.0, 0.02, 0.05], dtype=np.float32)
    counts = np.zeros(3)
    sampling = Sampling(temperature=0.05)
    for position in range(2000):
        counts[choose(logits, sampling, position)] += 1
    assert_follows(counts, expected(logits, sampling))


def test_seeds_at_one_position_follow_it_too() -> None:
    logits = normal(2, 20)
    counts = np.zeros(20)
    for seed in range(4000):
        counts[choose(logits, Sampling(temperature=1.0, seed=seed), 5)] += 1
    assert_follows(counts, expected(logits, Sampling(temperature=1.0)))


@pytest.mark.parametrize(("step_seed", "step_position"), [(0, 1), (1, 0), (1, 1)])
def test_neighbouring_keys_are_independent(step_seed: int, step_position: int) -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    pairs = np.zeros((4, 4))
    for key in range(4000):
        seed, position = key % 50, 2 * (key // 50)
        first = choose(logits, Sampling(temperature=1.0, seed=seed), position)
        second = choose(
            logits, Sampling(temperature=1.0, seed=seed + step_seed), position + step_position
        )
        pairs[first, second] += 1
    law = np.exp(logits.astype(np.float64))
    assert_follows(pairs.ravel(), np.outer(law, law).ravel())


def test_a_key_gives_the_same_token_again_and_in_any_order() -> None:
    logits = normal(3, 1000)
    sampling = Sampling(temperature=1.0, seed=7)
    forward = [choose(logits, sampling, position) for position in range(40)]
    backward = [choose(logits.copy(), sampling, position) for position in reversed(range(40))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 20
    other = [choose(logits, Sampling(temperature=1.0, seed=8), position) for position in range(40)]
    assert forward != other


def test_the_noise_is_pinned() -> None:
    """A seed must give the same text next year: these numbers may not change."""
    flat = np.zeros(1001, dtype=np.float32)
    tokens = [
        choose(flat, Sampling(temperature=1.0, seed=seed), position)
        for seed in (0, 1, 2**64 - 1)
        for position in (0, 1, 10**6)
    ]
    assert tokens == [298, 677, 487, 809, 819, 401, 561, 763, 194]


def test_filters_do_not_shift_the_noise() -> None:
    logits = normal(4, 500)
    agreed = 0
    for position in range(200):
        free = choose(logits, Sampling(temperature=1.0), position)
        filtered = Sampling(temperature=1.0, top_k=200)
        if allowed_weights(logits, filtered)[free]:
            assert choose(logits, filtered, position) == free
            agreed += 1
    assert agreed > 100


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
def test_the_choice_is_the_argmax_over_all_tokens(spread: float) -> None:
    """Written out as the design says it, with nothing left out early."""
    logits = normal(12, 3000, spread)
    for position in range(50):
        sampling = Sampling(temperature=0.8, top_p=0.97 if position % 2 else 1.0, seed=position)
        uniform = duck.sampling._uniform(position, position, 3000).astype(np.float64)
        with np.errstate(divide="ignore"):
            scores = np.log(allowed_weights(logits, sampling)) - np.log(-np.log1p(-uniform))
        assert choose(logits, sampling, position) == int(scores.argmax())


def test_noise_is_positive_and_finite_at_both_ends() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    noise = duck.sampling._exponential(duck.sampling._to_unit(words))
    assert np.isfinite(noise).all()
    assert (noise > 0).all()
    assert (np.diff(noise) >= 0).all()
    np.testing.assert_allclose(noise[:3], [2**-33, 1.5 * 2**-32, math.log(2)], rtol=1e-6)


# --- filters ---

FILTERS = [
    *[Sampling(temperature=1.0, top_k=k) for k in (1, 2, 50, 999, 1000, 5000)],
    *[
        Sampling(temperature=t, top_p=p)
        for t in (0.3, 1.0, 8.0)
        for p in (1e-9, 0.1, 0.5, 0.95, 0.9999)
    ],
    *[Sampling(temperature=1.0, min_p=p) for p in (1e-6, 0.01, 0.5, 1.0)],
    Sampling(temperature=0.6, top_k=100, top_p=0.95),
    Sampling(temperature=2.0, top_k=300, top_p=0.9, min_p=0.02),
    Sampling(temperature=2.0, top_p=0.99, min_p=0.002),
]


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_filters_agree_with_transformers(sampling: Sampling, spread: float) -> None:
    logits = normal(5, 1000, spread)
    weights = allowed_weights(logits, sampling).astype(np.float64)
    wanted = expected(logits, sampling)
    assert ((weights > 0) == (wanted > 0)).all()
    np.testing.assert_allclose(weights / weights.sum(), wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(("spread", "least"), [(0.01, 140_000), (0.5, 100_000), (2.2, 20_000)])
def test_a_large_vocabulary_is_filtered_exactly(spread: float, least: int) -> None:
    logits = normal(6, 163_840, spread)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    kept, wanted = allowed_weights(logits, sampling) > 0, expected(logits, sampling) > 0
    assert kept.sum() > least
    assert (
        abs(int(kept.sum()) - int(wanted.sum())) <= 2
    )  # float32 weights, float64 in the reference


def test_equals_at_the_edge() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.2, 0.2, 0.3], dtype=np.float32))
    assert np.flatnonzero(allowed_weights(logits, Sampling(temperature=1.0, top_k=2))).tolist() == [
        1,
        2,
        3,
        4,
    ]
    for top_p, kept in [(0.29, [4]), (0.45, [1, 4]), (0.65, [1, 2, 4]), (0.85, [1, 2, 3, 4])]:
        weights = allowed_weights(logits, Sampling(temperature=1.0, top_p=top_p))
        assert np.flatnonzero(weights).tolist() == kept
    flat = np.zeros(10_000, dtype=np.float32)
    weights = allowed_weights(flat, Sampling(temperature=1.0, top_p=0.25))
    assert np.flatnonzero(weights).tolist() == list(range(2500))
    assert (allowed_weights(flat, Sampling(temperature=1.0, min_p=1.0)) == 1).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_extreme_cold_is_greedy(temperature: float) -> None:
    logits = normal(8, 300)
    logits[5] = -np.inf
    for position in range(20):
        assert choose(logits, Sampling(temperature=temperature, top_p=0.9), position) == int(
            logits.argmax()
        )


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_extreme_heat_is_uniform_over_what_is_possible(temperature: float) -> None:
    logits = normal(9, 8)
    logits[[2, 5]] = -np.inf
    counts = np.zeros(8)
    for position in range(3000):
        counts[choose(logits, Sampling(temperature=temperature), position)] += 1
    assert_follows(counts, np.isfinite(logits) / 6)


def test_weights_that_round_to_equals_are_equals() -> None:
    """So hot that the largest logit's weight is a tie: top_p then keeps the lower id."""
    logits = np.array([0, 1], dtype=np.float32)
    sampling = Sampling(temperature=1e9, top_p=1e-12)
    assert {choose(logits, sampling, position) for position in range(50)} == {0}


def test_huge_logits_and_a_single_possible_token() -> None:
    huge = np.array([3e38, -3e38, 3e38, -np.inf], dtype=np.float32)
    chosen = {choose(huge, Sampling(temperature=0.5), position) for position in range(40)}
    assert chosen == {0, 2}
    single = np.full(9, -np.inf, dtype=np.float32)
    single[6] = -50
    for filters in ({}, {"top_k": 3}, {"top_p": 0.01}, {"min_p": 1.0}):
        sampling = Sampling(temperature=1.0, **filters)  # type: ignore[arg-type]
        assert {choose(single, sampling, position) for position in range(20)} == {6}


def test_the_logits_are_left_alone() -> None:
    logits = normal(10, 100)
    before = logits.copy()
    logits.flags.writeable = False
    choose(logits, Sampling(temperature=0.5, top_k=9, top_p=0.5, min_p=0.1), 0)
    logprobs(logits, 3, 5)
    assert (logits == before).all()


# --- logprobs ---


def test_logprobs_are_the_log_softmax() -> None:
    logits = normal(11, 5000, 3.0)
    logits[7] = -np.inf
    wanted = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    found = logprobs(logits, 12, 20)
    values, ids = wanted.topk(20)
    assert [id_ for id_, _ in found.top] == ids.tolist()
    np.testing.assert_allclose([value for _, value in found.top], values, atol=1e-5)
    assert (found.token, found.logprob) == (12, pytest.approx(float(wanted[12]), abs=1e-5))
    assert logprobs(logits, 7, 0) == duck.sampling.TokenLogprobs(7, -math.inf, ())


def test_logprobs_of_equals_and_of_all() -> None:
    logits = np.array([1, 3, 3, 0, 3], dtype=np.float32)
    assert [id_ for id_, _ in logprobs(logits, 0, 2).top] == [1, 2]
    assert [id_ for id_, _ in logprobs(logits, 0, 99).top] == [1, 2, 4, 0, 3]
    many = logprobs(np.arange(5000, dtype=np.float32) % 3, 0, 300).top
    assert [id_ for id_, _ in many] == list(range(2, 900, 3))
    total = sum(math.exp(value) for _, value in logprobs(logits, 0, 5).top)
    assert total == pytest.approx(1)
