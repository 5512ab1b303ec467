"""One conversation: its tokens, its KV cache, and how far both have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from duck.errors import ConfigError
from duck.model.transformer import KVCache, Transformer


class Session:
    """Tokens settled so far and the KV of those that went through the layers.

    The cache has no length of its own: positions below `length` (main layers) and `mtp_length`
    (pairs of
    the MTP layer) are valid, so a rewind is only a smaller number.
    """

    def __init__(self, model: Transformer, capacity: int) -> None:
        self.tokens: list[int] = []
        self.cache: KVCache = model.new_cache(capacity)
        self.length = 0
        self.mtp_length = 0
        self.hidden: Tensor | None = None  # (1, hidden) of position length - 1, after model.norm
        self._answering = False

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Held while an answer is made.

        Raises:
            ConfigError: another answer is being made in this session.
        """
        if self._answering:
            raise ConfigError("this session is answering already: use one session an answer")
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def reserve(self, capacity: int) -> None:
        """Make room for that many positions."""
        self.cache.grow(capacity)

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
        if self.mtp_length:
            keep = min(keep, self.mtp_length)
        self.length = keep
        self.mtp_length = min(self.mtp_length, keep)
        self.hidden = None
        self.tokens = list(prompt[:keep])
        return prompt[keep:]
