"""What a user gives to a model, as token ids that fit it; needs the folder's small files only.

Checked before anything large is loaded, so that a bad prompt costs seconds, not minutes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duck.errors import ConfigError
from duck.model.chat import encode_chat
from duck.model.config import ModelConfig
from duck.model.holding import max_length
from duck.model.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


class Prompts:
    """Turns prompts for one model into token ids.

    Args:
        folder: the model's.
        max_len: tokens a session may hold, if fewer than the model's context.

    Raises:
        ConfigError: the folder, its config.json or its tokenizer cannot be used, or max_len.
    """

    def __init__(self, folder: Path, max_len: int | None = None) -> None:
        self.config = ModelConfig.load(folder)
        self.max_len = max_length(self.config, max_len)
        has_text = (folder / "tokenizer.json").is_file()
        self.tokenizer = Tokenizer.load(folder) if has_text else None

    def encode(self, prompt: Prompt, *, chat: bool = False, answer: bool = True) -> list[int]:
        """Token ids of a text (with BOS if the tokenizer says so), of messages, or as given.

        answer: the context must have room for a token after them.

        Raises:
            ConfigError: empty, out of the vocabulary, longer than the context, or text without a
                tokenizer.
        """
        empty = ConfigError("the prompt is empty: give at least one character or token")
        if isinstance(prompt, str):
            if not prompt:
                raise empty
            ids = self._chat([{"role": "user", "content": prompt}]) if chat else self._text(prompt)
        elif not hasattr(prompt, "__getitem__") or not hasattr(prompt, "__len__"):
            raise ConfigError(f"prompt {prompt!r}: want a text, token ids or messages")
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self._chat(prompt)
        elif chat:
            raise ConfigError("the chat format needs text or messages, not token ids")
        else:
            ids = [self._checked(id_) for id_ in prompt]
        if not ids:
            raise empty
        if max(ids) >= self.config.vocab_size:
            raise ConfigError(
                f"the tokenizer gives id {max(ids)}, the model's vocabulary has ids "
                f"0..{self.config.vocab_size - 1}: tokenizer.json is of another model"
            )
        if len(ids) + answer > self.max_len:
            wants = ", and an answer needs one" if answer else ""
            raise ConfigError(f"the prompt has {len(ids)} tokens; {self.context()}{wants}")
        return ids

    def limit(self, prompt_tokens: int, max_tokens: int) -> int:
        """How many tokens may be answered: at most max_tokens, and what the length leaves."""
        return min(max_tokens, self.max_len - prompt_tokens)

    def context(self) -> str:
        """The longest sequence, in words."""
        if self.max_len < self.config.max_position_embeddings:
            return f"a session holds {self.max_len} tokens (--max-len)"
        return f"the model's context is {self.max_len} tokens"

    def _checked(self, id_: Any) -> int:
        vocabulary = self.config.vocab_size
        try:
            number = -1 if isinstance(id_, bool) else operator.index(id_)  # numpy's integers too
        except TypeError:
            number = -1
        if not 0 <= number < vocabulary:
            raise ConfigError(f"prompt id {id_!r}: the vocabulary has ids 0..{vocabulary - 1}")
        return number

    def _text(self, text: str) -> list[int]:
        return self._tokenizer().encode(text)

    def _chat(self, messages: Any) -> list[int]:
        return encode_chat(messages, self._tokenizer(), self.config.model_type)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                "this model folder has no tokenizer.json: give the prompt as token ids"
            )
        return self.tokenizer
