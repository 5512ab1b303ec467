"""Text to ids and back, streamed text and stop texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from duck.errors import ConfigError
from duck.model.tokenizer import StopScanner, TextStream, Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = [BOS, EOS, "<｜▁pad▁｜>"]
CONTROL = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"]
WORDS = ["ø", "  "]
CONFIG: dict[str, Any] = {
    "bos_token": {"content": BOS, "special": True},
    "eos_token": EOS,
    "pad_token": None,
    "add_bos_token": True,
}
TEXT = "Is 391 prime? 391 = 17 · 23. Ente, Straße, 鸭子, 🦆🦆 naïve café; <b>x</b> && y｜z "


def backend() -> tokenizers.Tokenizer:
    """Trained on a line, so that it has tokens of parts of characters, and the usual extras."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.add_tokens([AddedToken(text, special=False) for text in CONTROL + WORDS])
    return made


BACKEND = backend()
TOKENIZER = Tokenizer(backend(), CONFIG)
tokens_text = st.sampled_from([*SPECIAL, *CONTROL, *WORDS, "<think", "｜", "<", ">", "/"])
texts = st.lists(tokens_text | st.text() | st.sampled_from(TEXT.split(" "))).map("".join)
id_lists = st.lists(st.integers(0, TOKENIZER.vocab_size + 5))


def folder(path: Path, config: Any = CONFIG, source: str | None = None) -> Path:
    (path / "tokenizer.json").write_text(source or BACKEND.to_str(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


# --- loading ---


def test_a_folder_is_read(tmp_path: Path) -> None:
    found = Tokenizer.load(folder(tmp_path))
    assert found.vocab_size == BACKEND.get_vocab_size()
    assert (found.bos_token_id, found.eos_token_id) == (0, 1)
    assert found.special_tokens == {"bos_token": BOS, "eos_token": EOS}
    assert set(found.control_tokens) == {*SPECIAL, *CONTROL}
    assert found.chat_template is None
    assert found.encode(TEXT) == TOKENIZER.encode(TEXT)


def test_the_template_of_its_own_file_wins(tmp_path: Path) -> None:
    folder(tmp_path, CONFIG | {"chat_template": "old"})
    assert Tokenizer.load(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("neü", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "neü"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert Tokenizer.load(folder(tmp_path, CONFIG | {"chat_template": named})).chat_template == "d"


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    assert "no tokenizer.json in" in refused(tmp_path)
    (folder(tmp_path) / "tokenizer_config.json").unlink()
    assert "no tokenizer_config.json in" in refused(tmp_path)


@pytest.mark.parametrize("source", ["{", "{}", "[]", '{"model": {"type": "Duck"}}', "\x00"])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, source: str) -> None:
    assert "tokenizer.json" in refused(folder(tmp_path, source=source))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([1], "holds a list"),
        (CONFIG | {"bos_token": "<s>"}, "bos_token is '<s>'"),
        (CONFIG | {"chat_template": 5}, "chat_template is a int"),
    ],
)
def test_a_broken_config_is_one_line(tmp_path: Path, config: Any, said: str) -> None:
    assert said in refused(folder(tmp_path, config))


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    assert "tokenizer_config.json is not JSON" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "cannot read" in refused(tmp_path)


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    other = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert "byte-level" in refused(folder(tmp_path, {}, other.to_str()))


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    made = backend()
    made.enable_truncation(4)
    made.enable_padding(length=50)
    found = Tokenizer.load(folder(tmp_path, source=made.to_str()))
    assert found.encode(TEXT) == TOKENIZER.encode(TEXT)


# --- encoding ---


def test_bos_comes_when_the_config_or_the_caller_says_so() -> None:
    without = Tokenizer(backend(), CONFIG | {"add_bos_token": False})
    unnamed = Tokenizer(backend(), {})
    plain = unnamed.encode("Is 391")
    assert unnamed.eos_token_id is None
    assert without.encode("Is 391") == without.encode("Is 391", add_bos=False) == plain
    assert without.encode("Is 391", add_bos=True) == TOKENIZER.encode("Is 391") == [0, *plain]
    assert TOKENIZER.encode("Is 391", add_bos=False) == plain
    assert TOKENIZER.encode("") == [0]
    with pytest.raises(ConfigError, match="bos_token"):
        unnamed.encode("a", add_bos=True)


def test_bos_is_never_doubled() -> None:
    assert TOKENIZER.encode(BOS + "x") == TOKENIZER.encode("x")
    assert TOKENIZER.encode(BOS + "x", add_bos=True).count(0) == 1


def test_a_raw_prompt_may_hold_control_tokens() -> None:
    ids = TOKENIZER.encode("<｜User｜>hi<｜Assistant｜><think>")
    assert [ids[1], *ids[-2:]] == [TOKENIZER.control_tokens[text] for text in CONTROL[:3]]


@given(texts)
def test_raw_prompts_encode_as_the_library_does(text: str) -> None:
    wanted = BACKEND.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text, add_bos=False) == wanted


@given(texts)
def test_plain_text_never_becomes_a_control_token(text: str) -> None:
    ids = TOKENIZER.encode_text(text)
    assert not set(ids) & set(TOKENIZER.control_tokens.values())
    assert TOKENIZER.decode(ids, skip_special=False) == text


@given(st.text().filter(lambda text: not any(token in text for token in [*SPECIAL, *CONTROL])))
def test_plain_text_without_control_tokens_encodes_the_same(text: str) -> None:
    assert TOKENIZER.encode_text(text) == TOKENIZER.encode(text, add_bos=False)


def test_added_words_stay_words() -> None:
    id_ = BACKEND.token_to_id("ø")
    assert TOKENIZER.encode_text("Is ø")[-1] == TOKENIZER.encode("Is ø")[-1] == id_
    assert TOKENIZER.decode([id_]) == "ø"


@pytest.mark.parametrize("encode", [TOKENIZER.encode, TOKENIZER.encode_text])
def test_broken_unicode_is_refused(encode: Any) -> None:
    with pytest.raises(ConfigError, match="Unicode"):
        encode("a\udc80b")


# --- decoding ---


@given(id_lists, st.booleans())
def test_decoding_is_the_librarys(ids: list[int], skip: bool) -> None:
    odd = BACKEND.token_to_id("ø")  # the library takes its letter for a byte's spelling
    ids = [id_ for id_ in ids if id_ != odd]
    wanted = BACKEND.decode(ids, skip_special_tokens=skip)
    assert TOKENIZER.decode(ids, skip_special=skip) == wanted


def test_special_tokens_are_silent_and_thoughts_are_not() -> None:
    ids = TOKENIZER.encode("<think>Is</think>391" + EOS)
    assert TOKENIZER.decode(ids) == "<think>Is</think>391"
    assert TOKENIZER.decode(ids, skip_special=False) == f"{BOS}<think>Is</think>391{EOS}"


@given(id_lists, st.booleans())
def test_streamed_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    stream = TextStream(TOKENIZER, skip_special=skip)
    pieces = [stream.feed(id_) for id_ in ids]
    assert "".join([*pieces, stream.finish()]) == TOKENIZER.decode(ids, skip_special=skip)


@given(texts)
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    stream = TextStream(TOKENIZER, skip_special=False)
    shown = ""
    for byte_id in TOKENIZER.encode_text(text):
        shown += stream.feed(byte_id)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_a_character_in_four_tokens_comes_out_once() -> None:
    ids = [BACKEND.token_to_id(letter) for letter in "ðŁ¦Ĩ"]  # the bytes of a duck
    stream = TextStream(TOKENIZER)
    assert [stream.feed(id_) for id_ in ids] == ["", "", "", "🦆"]
    for id_ in ids[:2]:
        assert stream.feed(id_) == ""
    assert stream.finish() == "\ufffd"


def test_streaming_never_decodes_the_text_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = TOKENIZER.encode(TEXT) * 3
    asked: list[int] = []
    spell = Tokenizer.token_bytes

    def spy(self: Tokenizer, id_: int, *, skip_special: bool = True) -> bytes:
        asked.append(id_)
        return spell(self, id_, skip_special=skip_special)

    monkeypatch.setattr(Tokenizer, "token_bytes", spy)
    monkeypatch.setattr(Tokenizer, "decode", None)
    stream = TextStream(TOKENIZER)
    for id_ in ids:
        stream.feed(id_)
    assert asked == ids


# --- stop texts ---


def plain_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """Character by character: the first end wins, and there the longest."""
    for end in range(len(text) + 1):
        met = [word for word in stop if text[:end].endswith(word)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400)
@given(st.lists(st.text("ab", max_size=3)), stops)
def test_a_stop_text_ends_the_stream_however_it_is_cut(pieces: list[str], stop: list[str]) -> None:
    scanner = StopScanner(stop)
    shown, stopped = "", False
    fed = ""
    for piece in pieces:
        fed += piece
        safe, stopped = scanner.feed(piece)
        shown += safe
        if stopped:
            break
        held = fed[len(shown) :]
        assert fed.startswith(shown)
        assert not held or any(word.startswith(held) and word != held for word in stop)
    if not stopped:
        shown += scanner.finish()
        assert scanner.finish() == ""
    assert (shown, stopped) == plain_stop("".join(pieces), stop)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    scanner = StopScanner(["</answer>", "\n\n"])
    fed = [scanner.feed(piece) for piece in ["a < b", " </ans", "wers>", "\n", "x\n", "\nrest"]]
    shown = [("a < b", False), (" ", False), ("</answers>", False), ("", False), ("\nx", False)]
    assert fed == [*shown, ("", True)]


def test_without_stop_texts_nothing_is_held() -> None:
    scanner = StopScanner(())
    assert scanner.feed("abc") == ("abc", False)
    assert scanner.finish() == ""
