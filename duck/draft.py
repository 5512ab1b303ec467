"""Drafts: what a session bets in a step, and what of it was settled.

A guess is accepted if and only if it equals the token that is chosen at its position anyway, so
drafts never change a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from duck.meter import Meter
from duck.sampling import Sampling, TokenLogprobs, choose, logprobs
from duck.session import Session


@dataclass(frozen=True)
class Settled:
    """One completion token, and its log probabilities when they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, eq=False)
class Bet:
    """A session's part in a step: its newest token for sure, and a guess if two may be settled."""

    session: Session
    sampling: Sampling
    meter: Meter
    may_draft: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step gave a session.

    hidden: (n, hidden), the rows of the n tokens whose successors were settled; guess: what was
    bet on, if anything.
    """

    settled: Sequence[Settled]
    hidden: Tensor
    guess: int | None


def settle(
    logits: np.ndarray, sampling: Sampling, position: int, guess: int | None
) -> list[Settled]:
    """Choose the token at `position`, and if it is the guess, the one after it.

    logits: (1 or 2, vocabulary) float32, of the sure row and the guess's.
    """
    settled = [_choose(logits[0], sampling, position)]
    if settled[0].token == guess:
        settled.append(_choose(logits[1], sampling, position + 1))
    return settled


def _choose(logits: np.ndarray, sampling: Sampling, position: int) -> Settled:
    token, top = choose(logits, sampling, position), sampling.logprobs
    return Settled(token, None if top is None else logprobs(logits, token, top))
