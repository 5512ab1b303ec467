"""One conversation: its tokens, its KV cache, and how far both have come."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from torch import Tensor

from duck.errors import ConfigError
from duck.model.transformer import KVCache, Transformer
from duck.walk import Slots

_numbers = itertools.count(1)


class Session:
    """Tokens settled so far and the KV of those that went through the layers.

    The cache has no length of its own: positions below `length` (main layers) and `mtp_length`
    (pairs of the MTP layer) are valid, so a rewind is only a smaller number.

    Args:
        model: gives the cache.
        capacity: positions to make room for at first.
        pairs: the MTP layer's KV is kept too.
    """

    def __init__(self, model: Transformer, capacity: int, *, pairs: bool = False) -> None:
        self.number = next(_numbers)  # for traces
        self.tokens: list[int] = []
        self.cache: KVCache = model.new_cache(capacity)
        self.pairs = pairs
        self.length = 0
        self.mtp_length = 0
        # Rows after model.norm, (n, hidden) each, up to position length - 1: the last one, from
        # which the next token is chosen, and with `pairs` all that the MTP layer has not had.
        self.hidden: list[Tensor] = []
        self.lent: asyncio.Future[None] | None = None  # done when a step that works on it has ended
        self._answering = False
        self.slots: Slots | None = None  # where rows of decode steps lie on the device

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Held while an answer is made.

        Raises:
            ConfigError: another answer is being made in this session.
        """
        if self._answering:
            raise ConfigError("this session is answering already: use one session an answer")
        self._answering = True
        try:
            # A broken-off answer may have left others to end the step that it was part of.
            if self.lent is not None:
                await asyncio.wait([self.lent])
                self.lent = None
            yield
        finally:
            self._answering = False

    @property
    def unfed(self) -> int:
        """How many hidden rows are kept."""
        return sum(len(rows) for rows in self.hidden)

    def reserve(self, capacity: int, least: int = 0) -> None:
        """Make room for that many positions; see KVCache.grow."""
        self.cache.grow(capacity, least)

    def rewind_to(self, prompt: Sequence[int]) -> Sequence[int]:
        """Keep what `prompt` shares with the tokens so far; returns the rest of it, never empty.

        The last shared token is run again: its hidden row makes the MTP pair with the token after
        it.
        """
        common = 0
        for mine, theirs in zip(self.tokens[: self.length], prompt, strict=False):
            if mine != theirs:
                break
            common += 1
        keep = max(0, common - 1)
        if self.pairs:
            keep = min(keep, self.mtp_length)
        self.length = keep
        self.mtp_length = min(self.mtp_length, keep)
        self.hidden = []
        self.tokens = list(prompt[:keep])
        return prompt[keep:]
