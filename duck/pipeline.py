"""A lane's way through the layers, and the loops over lanes: prefill, decode, score.

Inside one lane every layer waits for the one before it. This file holds the plain loop, the
`serial`
schedule: the device attends and routes, the ducks answer, the device merges, and nothing overlaps.
Every
other schedule must give the same tokens.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from duck.device import Busy, Device
from duck.errors import DuckError
from duck.flock import Flock
from duck.model.transformer import DecoderLayer, KVCache, MtpModule, Transformer
from duck.sampling import Sampling, TokenLogprobs, choose, logprobs
from duck.session import Session

# Rows of one prefill lane. Long enough that ducks read each expert once for many rows, short
# enough that
# a row set of all ducks' answers stays small and a cancelled prompt ends soon.
PREFILL_ROWS = 256


@dataclass(eq=False)
class Lane:
    """Rows on their way through the layers.

    tokens: the rows' tokens; position: of the first row; cache: the KV they read and write.
    """

    tokens: Sequence[int]
    position: int
    cache: KVCache


@dataclass
class Meter:
    """What one generation did: the stages' seconds, the drafts, the steps."""

    device: Busy = field(default_factory=Busy)
    ask_s: float = 0.0  # waiting for answers
    duck_s: float = 0.0  # the slowest duck of each ask: queue and compute
    duck_busy_s: list[float] = field(default_factory=list)  # compute of each duck
    steps: int = 0
    accepted: int = 0  # of the drafts
    drafts: list[tuple[int, int]] = field(default_factory=list)  # (completion index, guess)
    shared_experts: int = 0  # experts common to the two rows of a step, and how many there could be
    possible_experts: int = 0

    def asked(self, seconds: float, ducks_us: Sequence[tuple[int, int]]) -> None:
        """Count one ask and what the ducks say they spent on it."""
        self.ask_s += seconds
        if not self.duck_busy_s:
            self.duck_busy_s = [0.0] * len(ducks_us)
        for duck, (_queue_us, compute_us) in enumerate(ducks_us):
            self.duck_busy_s[duck] += compute_us / 1e6
        slowest = max((queue + compute for queue, compute in ducks_us), default=0)
        self.duck_s += min(seconds, slowest / 1e6)

    def experts(self, ids: np.ndarray) -> None:
        """Count the experts that the two rows of a step have in common."""
        if len(ids) == 2:
            self.shared_experts += len(np.intersect1d(ids[0], ids[1]))
            self.possible_experts += ids.shape[1]


@dataclass(frozen=True)
class Settled:
    """One completion token, and its log probabilities when they were asked for."""

    token: int
    logprobs: TokenLogprobs | None


class Pipeline:
    """Runs lanes of one model over one device and one flock."""

    def __init__(self, model: Transformer, device: Device, flock: Flock, *, drafts: bool) -> None:
        self._model, self._device, self._flock = model, device, flock
        self._mtp = model.mtp if drafts else None
        self._wire_bits = flock.plan.shape.ask_dtype == "bfloat16"
        self._chunk = min(PREFILL_ROWS, flock.plan.shape.max_rows)

    # one lane

    async def forward(self, lane: Lane, meter: Meter) -> Tensor:
        """All layers and the last norm: (rows, hidden)."""
        model = self._model
        x = await self._device.run(lambda: model.embed(lane.tokens), meter.device)
        for layer in model.layers:
            x = await self.block(layer, x, lane, meter)
        return await self._device.run(lambda: model.final(x), meter.device)

    async def block(
        self, layer: DecoderLayer, x: Tensor, lane: Lane, meter: Meter, *, last: int | None = None
    ) -> Tensor:
        """One layer; with `last` only that many rows leave it, though all write their KV."""
        device = self._device
        if not layer.is_moe:
            return await device.run(
                lambda: layer.dense(layer.attend(x, lane.cache, lane.position, last=last)),
                meter.device,
            )

        def attend() -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray]:
            attended = layer.attend(x, lane.cache, lane.position, last=last)
            routed = layer.route(attended)
            ids, weights = routed.ids.cpu().numpy(), routed.weights.cpu().numpy()
            return attended, routed.h, self._to_wire(routed.h), ids, weights

        attended, h, rows, ids, weights = await device.run(attend, meter.device)
        meter.experts(ids)
        ask = await self._flock.ask(layer.index, rows, ids, weights)
        routed = await ask.sum()
        meter.asked(ask.seconds, ask.ducks_us)

        def merge() -> Tensor:
            answer = torch.from_numpy(routed).to(attended.device)
            return layer.merge(attended, layer.shared(h), answer)

        return await device.run(merge, meter.device)

    def _to_wire(self, h: Tensor) -> np.ndarray:
        """Rows as they travel: float32, or bfloat16 as its bits."""
        h = h.cpu()
        if self._wire_bits:
            return h.to(torch.bfloat16).view(torch.uint16).numpy()
        return h.to(torch.float32).numpy()

    # prefill

    async def prefill(self, session: Session, tokens: Sequence[int], meter: Meter) -> None:
        """Run `tokens` after what the session holds; leaves the last one's hidden row."""
        for start in range(0, len(tokens), self._chunk):
            chunk = tokens[start : start + self._chunk]
            lane = Lane(chunk, session.length, session.cache)
            h = await self.forward(lane, meter)
            session.tokens += chunk
            session.length += len(chunk)
            if self._mtp:
                # Pairs (hidden j, token j + 1): the row before this chunk goes with its first
                # token.
                rows = h[:-1] if session.hidden is None else torch.cat([session.hidden, h[:-1]])
                if len(rows):
                    await self._feed(self._mtp, session, chunk[-len(rows) :], rows, meter)
            session.hidden = h[-1:]

    async def _feed(
        self, mtp: MtpModule, session: Session, tokens: Sequence[int], h: Tensor, meter: Meter
    ) -> None:
        """Write the MTP layer's KV for pairs; the KV of a single layer needs no experts."""
        position = session.mtp_length
        await self._device.run(
            lambda: mtp.layer.attend(mtp.combine(tokens, h), session.cache, position, last=0),
            meter.device,
        )
        session.mtp_length += len(tokens)

    # decode

    async def _draft(self, mtp: MtpModule, session: Session, h: Tensor, meter: Meter) -> int:
        """Feed the MTP layer the newest pairs; guess the token after the last settled one.

        h: (k, hidden), the rows that the k newest tokens were chosen from. All k write KV, only
        the last
        one needs experts.
        """
        model, tokens = self._model, session.tokens[-len(h) :]
        lane = Lane(tokens, session.mtp_length, session.cache)
        z = await self._device.run(lambda: mtp.combine(tokens, h), meter.device)
        x = await self.block(mtp.layer, z, lane, meter, last=1)
        session.mtp_length += len(h)

        def guess() -> int:
            return int(torch.argmax(model.logits(mtp.final(x))[-1]))

        return await self._device.run(guess, meter.device)

    async def decode(
        self, session: Session, sampling: Sampling, limit: int, meter: Meter
    ) -> AsyncGenerator[Settled, None]:
        """Yield up to `limit` tokens after the session's; stop whenever the caller does.

        Every step runs the last settled token and, with drafts, the guess for the one after it.
        When the
        guess equals the token then settled, the second row counts too; else its KV is overwritten.
        """
        assert session.hidden is not None
        h, guess, index = session.hidden, None, 0
        while True:
            logits = await self._logits(h, meter)
            fresh = 0
            for row in range(len(h)):
                settled = self._settle(session, logits[row], sampling)
                fresh += 1
                right = row == 0 and settled.token == guess
                if right:
                    meter.accepted += 1
                    session.length += 1
                    session.hidden = h[1:2]
                yield settled
                index += 1
                if index == limit:
                    return
                if not right:
                    break
            guess = None
            # A guess is worth its row only if the step could settle two more tokens.
            if self._mtp and limit - index > 1:
                guess = await self._draft(self._mtp, session, h[:fresh], meter)
                meter.drafts.append((index - 1, guess))
            rows = session.tokens[-1:] if guess is None else [session.tokens[-1], guess]
            session.reserve(session.length + len(rows))
            h = await self.forward(Lane(rows, session.length, session.cache), meter)
            meter.steps += 1
            session.length += 1
            session.hidden = h[:1]

    def _settle(self, session: Session, logits: np.ndarray, sampling: Sampling) -> Settled:
        """Choose the token at the position after the session's last, and append it."""
        token = choose(logits, sampling, len(session.tokens))
        session.tokens.append(token)
        top = sampling.logprobs
        return Settled(token, None if top is None else logprobs(logits, token, top))

    async def _logits(self, h: Tensor, meter: Meter) -> np.ndarray:
        model = self._model
        return await self._device.run(lambda: model.logits(h).cpu().numpy(), meter.device)

    # score

    async def score(
        self, session: Session, tokens: Sequence[int], meter: Meter, *, mtp: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits of every position, (T, vocab) float32; with `mtp` also its (T - 1, vocab)."""
        model, size = self._model, self._chunk
        logits, hidden, guesses = [], [], []
        for start in range(0, len(tokens), size):
            lane = Lane(tokens[start : start + size], start, session.cache)
            h = await self.forward(lane, meter)
            logits.append(await self._logits(h, meter))
            hidden.append(h)
        if not mtp:
            return np.concatenate(logits), None
        module = model.mtp
        if module is None:
            raise DuckError("this model has no MTP layer to score")
        pairs = torch.cat(hidden)[:-1]
        for start in range(0, len(pairs), size):
            h, after = pairs[start : start + size], tokens[start + 1 : start + 1 + size]
            z = await self._device.run(partial(module.combine, after, h))
            x = await self.block(module.layer, z, Lane(after, start, session.cache), meter)
            final = await self._device.run(partial(module.final, x))
            guesses.append(await self._logits(final, meter))
        vocabulary = logits[0].shape[1]
        empty = np.zeros((0, vocabulary), np.float32)
        return np.concatenate(logits), np.concatenate([empty, *guesses])


def overlap_efficiency(stages: Sequence[float], wall: float) -> float:
    """(sum of stages - step) / (sum of stages - largest): 0 when nothing overlaps, 1 at best."""
    room = sum(stages) - max(stages, default=0.0)
    return 0.0 if room <= 0 else min(1.0, max(0.0, (sum(stages) - wall) / room))
