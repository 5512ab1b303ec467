"""Sampling's filters against a slow, plain reading of their definitions, on any logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duck.sampling import Sampling, allowed_weights, choose

# Few distinct values make equals common; -inf is a forbidden token.
values = st.one_of(
    st.integers(-4, 4).map(float),
    st.floats(-50, 50, width=32),
    st.just(-math.inf),
)
rows = st.lists(values, min_size=1, max_size=40).filter(lambda row: max(row) > -math.inf)
options_of = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-9, 0.2, 1.0, 5.0, 1e9]),
        "top_k": st.sampled_from([0, 1, 2, 5, 100]),
        "top_p": st.sampled_from([1e-12, 0.3, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.4, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
    }
)
positions = st.integers(0, 10**6)


def softmax32(row: list[float], temperature: float) -> list[float]:
    logits = np.array(row, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        return [
            float(weight) for weight in np.exp((logits - logits.max()) / np.float32(temperature))
        ]


def allowed(
    row: list[float], weights: list[float], slack: float, options: dict[str, Any]
) -> set[int]:
    """Token by token, top_p's edge moved by `slack`."""
    left = [id_ for id_, weight in enumerate(weights) if weight > 0]
    if options["top_k"]:
        kth = sorted(row, reverse=True)[: options["top_k"]][-1]
        left = [id_ for id_ in left if row[id_] >= kth]
    if options["top_p"] < 1:
        needed = options["top_p"] * (1 + slack) * sum(weights[id_] for id_ in left)
        kept: list[int] = []
        for id_ in sorted(left, key=lambda id_: (-weights[id_], id_)):
            if kept and sum(weights[other] for other in kept) >= needed:
                break
            kept.append(id_)
        left = kept
    return {id_ for id_ in left if weights[id_] >= np.float32(options["min_p"])}


@given(rows, options_of)
def test_the_allowed_tokens_are_those_of_the_definition(
    row: list[float], options: dict[str, Any]
) -> None:
    weights = allowed_weights(np.array(row, dtype=np.float32), Sampling(**options))
    found = {int(id_) for id_ in np.flatnonzero(weights)}
    plain = softmax32(row, options["temperature"])
    # A sum that meets top_p but for rounding may stop either way.
    assert allowed(row, plain, -1e-9, options) <= found <= allowed(row, plain, 1e-9, options)
    assert plain[max(found, key=lambda id_: plain[id_])] == max(plain)


@given(rows, options_of, positions)
def test_the_chosen_token_is_allowed_and_keyed(
    row: list[float], options: dict[str, Any], position: int
) -> None:
    logits = np.array(row, dtype=np.float32)
    sampling = Sampling(**options)
    token = choose(logits, sampling, position)
    assert allowed_weights(logits, sampling)[token] > 0
    assert choose(logits, sampling, position) == token


@given(rows, options_of, positions)
def test_forbidding_another_token_keeps_the_choice(
    row: list[float], options: dict[str, Any], position: int
) -> None:
    """The noise belongs to the token: who else is there does not matter, without filters."""
    sampling = Sampling(temperature=options["temperature"], seed=options["seed"])
    logits = np.array(row, dtype=np.float32)
    token = choose(logits, sampling, position)
    loser = next((id_ for id_ in range(len(row)) if id_ not in (token, logits.argmax())), None)
    if loser is not None:
        logits[loser] = -np.inf
        assert choose(logits, sampling, position) == token
