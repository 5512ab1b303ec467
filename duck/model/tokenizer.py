"""Text to token ids and back, and text that streams.

The `tokenizers` library splits text; this file fixes what is ours to fix: which tokens mark
structure and may never arise from a user's text, and how text comes out token by token without
breaking a character or running past a stop text. Only byte-level tokenizers are read: there every
token is a fixed string of bytes, so text streams exactly and at a constant cost per token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from duck.errors import ConfigError


class Tokenizer:
    """The tokenizer of one model folder.

    Attributes:
        vocab_size: number of tokens known here; the model may have spare ids above them.
        special_tokens: the strings that tokenizer_config.json names, by name: "bos_token", ...
        bos_token_id, eos_token_id: None where the config names none.
        control_tokens: id of each token that marks structure (turn, thought, tool, end), by text.
        chat_template: jinja source, or None.
    """

    def __init__(
        self, backend: Any, config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`; `load` makes one from a model folder.

        Args:
            backend: from now on owned by this object.
            config: what tokenizer_config.json says.
            chat_template: jinja source.

        Raises:
            ConfigError: not a byte-level tokenizer, or the config names tokens it does not have.
        """
        import tokenizers

        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise ConfigError(
                f"tokenizer.json has the decoder {type(backend.decoder).__name__}: "
                "only byte-level tokenizers are supported"
            )
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._add_bos = config.get("add_bos_token") is True
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = {
            name: text
            for name, value in config.items()
            if name.endswith("_token") and (text := _token_text(value)) is not None
        }
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")

        added = backend.get_added_tokens_decoder()
        # Single characters and blanks that were added later are text (DeepSeek's first tokenizers
        # have some); all else that was added marks structure, flagged as special or not.
        words = {
            id_: token
            for id_, token in added.items()
            if not token.special and (len(token.content) == 1 or token.content.isspace())
        }
        self.control_tokens: dict[str, int] = {
            token.content: id_ for id_, token in added.items() if id_ not in words
        }
        self._control_ids = frozenset(self.control_tokens.values())
        self._silent = frozenset(id_ for id_, token in added.items() if token.special)
        # The same model without control tokens: text that it encodes cannot turn into one.
        self._plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        self._plain.add_tokens(list(words.values()))
        self._plain_ids = {
            self._plain.token_to_id(token.content): id_ for id_, token in words.items()
        }
        self._bytes = {id_: token.content.encode() for id_, token in added.items()}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

        Raises:
            ConfigError: a file is missing or cannot be used.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        source = _read(path)
        try:
            backend = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"{path} is not a tokenizer: {error}") from error
        config_path = folder / "tokenizer_config.json"
        try:
            config = json.loads(_read(config_path))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{config_path} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{config_path} holds a {type(config).__name__}, not an object")
        template_path = folder / "chat_template.jinja"  # where present it wins, as in transformers
        if template_path.is_file():
            template: str | None = _read(template_path)
        else:
            template = _template(config.get("chat_template"), config_path)
        try:
            return cls(backend, config, template)
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from error

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        if text is None:
            return None
        id_: int | None = self._backend.token_to_id(text)
        if id_ is None:
            raise ConfigError(
                f"tokenizer_config.json's {name} is {text!r}, which tokenizer.json lacks"
            )
        return id_

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Ids of a raw prompt, in which the texts of control tokens do become those tokens.

        Args:
            text: as the user wrote it.
            add_bos: put BOS first; None does so if the config has add_bos_token. A text that starts
                with BOS gets no second one. Nothing else is ever added.

        Raises:
            ConfigError: the text is no valid Unicode, or BOS is asked for and there is none.
        """
        ids: list[int] = self._ids(self._backend, text)
        if not (self._add_bos if add_bos is None else add_bos):
            return ids
        if self.bos_token_id is None:
            raise ConfigError("tokenizer_config.json asks for BOS in front but names no bos_token")
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def encode_text(self, text: str) -> list[int]:
        """Ids of text that is only text: `<think>` in it stays seven characters. No BOS.

        Raises:
            ConfigError: the text is no valid Unicode.
        """
        ids = [self._plain_ids.get(id_, id_) for id_ in self._ids(self._plain, text)]
        if not self._control_ids.isdisjoint(ids):  # its vocabulary itself spells one
            raise ConfigError("the tokenizer turns plain text into a control token")
        return ids

    @staticmethod
    def _ids(backend: Any, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"the text is no valid Unicode: {error}") from error
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that form no character become U+FFFD, unknown ids nothing.

        With skip_special, tokens flagged as special (BOS, EOS; not `<think>`) leave no trace.
        """
        spelled = (self.token_bytes(id_, skip_special=skip_special) for id_ in ids)
        return b"".join(spelled).decode(errors="replace")

    def token_bytes(self, id_: int, *, skip_special: bool = True) -> bytes:
        """The bytes one token stands for: often a part of a character."""
        if skip_special and id_ in self._silent:
            return b""
        spelled = self._bytes.get(id_)
        if spelled is None:
            token: str | None = self._backend.id_to_token(id_)
            if token is None:
                return b""
            try:
                spelled = bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # not spelled in bytes: it stands for itself
                spelled = token.encode()
            self._bytes[id_] = spelled
        return spelled


class TextStream:
    """Text of tokens that arrive one at a time; the pieces joined equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that `token_id` completes; may be empty."""
        return self._utf8.decode(
            self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        )

    def finish(self) -> str:
        """What is left: U+FFFD if the text ends within a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopScanner:
    """Ends a stream of text before the first stop text, wherever the pieces are cut.

    The stop text that is complete first wins; of several complete at one character, the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Text that is now safe to show, and whether a stop text was met (feed no more then)."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(len(text) - self._open(text), 0)
        self._held = text[keep:]
        return text[:keep], False

    def _open(self, text: str) -> int:
        """Length of the longest end of `text` that may be the start of a stop text."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def finish(self) -> str:
        """The text still held back, when the stream ends without a stop text."""
        held, self._held = self._held, ""
        return held


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: character to byte."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(rest)
    }


_BYTE_OF = _byte_characters()


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"cannot read {path}: not a file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"no {path.name} in {path.parent}: text needs a tokenizer") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _token_text(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json: a string, or an object with `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template(value: Any, path: Path) -> str | None:
    """The chat template in tokenizer_config.json: absent, one, or a list of named ones."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{path}: chat_template is a {type(value).__name__}, not a text")
    return value
