"""The Engine end to end on tiny random models: its contract, and one answer however it is run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import duck
from duck.engine import Engine, Piece
from duck.prompts import Prompts
from duck.sampling import Sampling
from tests.checkpoints import make_checkpoint

PROMPT = [5, 80, 33, 17, 200, 101]
GREEDY = Sampling(max_tokens=24, ignore_eos=True)
SEEDED = Sampling(max_tokens=24, ignore_eos=True, temperature=1.0, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(scope="module")
def agreeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose drafts are often right: chance agreement is 1 in 4 with so few tokens."""
    folder = tmp_path_factory.mktemp("agreeing")
    return make_checkpoint(folder, seed=5, vocab_size=4, bos_token_id=0, eos_token_id=1)


async def both(folder: Path, **options: str) -> tuple[list[int], list[int]]:
    async with Engine.open(folder, **options) as engine:
        greedy = await engine.generate(PROMPT, GREEDY)
        seeded = await engine.generate(PROMPT, SEEDED)
    return greedy.token_ids, seeded.token_ids


@pytest.mark.parametrize("ducks", ["local:2", "local:3"])
@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp", "multicast"])
@pytest.mark.parametrize("draft", ["mtp", "off"])
async def test_same_tokens_however_it_is_run(
    folder: Path, ducks: str, transport: str, draft: str
) -> None:
    plain = await both(folder, ducks="local:1", transport="loopback", draft="off")
    assert plain[0] != plain[1]
    assert await both(folder, ducks=ducks, transport=transport, draft=draft) == plain


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
async def test_accepted_drafts_change_no_token(agreeing: Path, sampling: Sampling) -> None:
    prompt = [2, 3, 0, 2]
    async with Engine.open(agreeing, transport="loopback", draft="off") as engine:
        plain = await engine.generate(prompt, sampling)
    async with Engine.open(agreeing, transport="loopback") as engine:
        drafted = await engine.generate(prompt, sampling)
    assert drafted.token_ids == plain.token_ids
    stats = drafted.stats
    assert 0 < stats["drafts_accepted"] < stats["drafts_proposed"]
    assert plain.stats["drafts_proposed"] == 0
    # The prefill gives the first token; a step settles one, and one more if its draft was right.
    assert stats["steps"] + stats["drafts_accepted"] == stats["completion_tokens"] - 1
    assert plain.stats["steps"] == plain.stats["completion_tokens"] - 1
    hits = sum(drafted.token_ids[index + 1] == guess for index, guess in stats["draft_tokens"])
    assert hits == stats["drafts_accepted"]


async def test_bfloat16_agrees_over_transports(folder: Path) -> None:
    loopback = await both(folder, transport="loopback", dtype="bfloat16", draft="off")
    for transport in ("shm", "tcp"):
        assert await both(folder, transport=transport, dtype="bfloat16", draft="off") == loopback
    float32_answers = await both(folder, transport="tcp", dtype="bfloat16", answers="f32")
    assert len(float32_answers[0]) == GREEDY.max_tokens


async def test_long_prompts_are_chunked(folder: Path) -> None:
    """Prefill in chunks of at most 256 rows equals one token at a time, in tokens and logits."""
    rng = np.random.default_rng(0)
    prompt = [int(id_) for id_ in rng.integers(2, 288, 600)]
    async with Engine.open(folder, transport="loopback") as engine:
        logits = await engine.score(prompt)
        assert logits.shape == (600, 288)
        first = await engine.generate(prompt, Sampling(max_tokens=4, ignore_eos=True))
        assert first.token_ids[0] == int(np.argmax(logits[-1]))
        short = await engine.score(prompt[:300])
        np.testing.assert_allclose(short, logits[:300], atol=2e-5)


async def test_stream_equals_generate(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        whole = await engine.generate(PROMPT, GREEDY)
        pieces = [piece async for piece in engine.stream(PROMPT, GREEDY)]
    assert [t for piece in pieces for t in piece.token_ids] == whole.token_ids
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == whole.finish_reason == "length"


async def test_stats_hold_what_the_contract_names(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        stats = (await engine.generate(PROMPT, GREEDY)).stats
    assert set(stats) == {
        "prompt_tokens", "completion_tokens", "ttft_s", "tpot_s", "prefill_tok_s", "decode_tok_s",
        "steps", "drafts_proposed", "drafts_accepted", "draft_tokens", "schedule", "transport",
        "ducks", "device_busy", "ducks_busy", "overlap_efficiency", "expert_overlap",
    }  # fmt: skip
    assert stats["prompt_tokens"] == len(PROMPT)
    assert stats["completion_tokens"] == GREEDY.max_tokens
    assert 0 < stats["device_busy"] <= 1
    assert 0 < stats["ducks_busy"] <= 1
    assert 0 < stats["expert_overlap"] < 1


async def test_what_goes_on_can_be_seen_while_it_does(folder: Path) -> None:
    busy = ("device_busy", "ducks_busy", "overlap_efficiency", "expert_overlap")
    async with Engine.open(folder, transport="loopback", schedule="wave") as engine:
        idle = engine.stats()
        assert [idle[name] for name in (*busy, "sessions")] == [0] * 5
        async with aclosing(engine.stream(PROMPT, GREEDY)) as pieces:
            async for _ in pieces:
                live = engine.stats()
        assert live["schedule"] == "wave"
        assert (live["transport"], live["ducks"]) == ("loopback", 2)
        assert all(0 < live[name] <= 1 for name in ("device_busy", "ducks_busy"))
        assert all(0 <= live[name] <= 1 for name in busy)


async def test_stop_texts_and_eos(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        whole = await engine.generate("duck", Sampling(max_tokens=40, ignore_eos=True, seed=1))
        stop = whole.text[6:9]
        cut = await engine.generate(
            "duck", Sampling(max_tokens=40, ignore_eos=True, seed=1, stop=(stop,))
        )
        assert cut.finish_reason == "stop"
        assert cut.text == whole.text[: whole.text.index(stop)]
        # An end token that the model does emit: bend the config to name one.
        token = whole.token_ids[3]
        object.__setattr__(engine.config, "eos_token_ids", (token,))
        ended = await engine.generate("duck", Sampling(max_tokens=40, seed=1))
        first = whole.token_ids.index(token)
        assert ended.finish_reason == "stop"
        assert ended.token_ids == whole.token_ids[: first + 1]


async def test_a_session_goes_on_where_the_prompts_agree(agreeing: Path) -> None:
    """Turn after turn in one session gives what a fresh session gives, with drafts and rewinds."""
    async with Engine.open(agreeing, transport="loopback", draft="mtp") as engine:
        session = engine.session()
        prompt = [2, 3, 0, 2]
        for turn in range(4):
            sampling = Sampling(max_tokens=9 + turn, ignore_eos=True, temperature=0.8, seed=turn)
            kept = await engine.generate(prompt, sampling, session=session)
            fresh = await engine.generate(prompt, sampling)
            assert kept.token_ids == fresh.token_ids
            assert kept.stats["draft_tokens"] == fresh.stats["draft_tokens"]
            prompt = [*prompt, *kept.token_ids[: 5 + turn], 3, 2]
        # A prompt that departs from the middle of what the session holds.
        other = [*prompt[:7], 0, 0, 3]
        kept = await engine.generate(other, GREEDY, session=session)
        assert kept.token_ids == (await engine.generate(other, GREEDY)).token_ids


async def test_sessions_run_side_by_side(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        prompts = [[5, 6, 7], [9, 8, 7, 6], [100, 3]]
        alone = [(await engine.generate(p, GREEDY)).token_ids for p in prompts]
        together = await asyncio.gather(*(engine.generate(p, GREEDY) for p in prompts))
    assert [done.token_ids for done in together] == alone


async def test_score_with_mtp(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        alone = await engine.score(PROMPT)
        logits, mtp_logits = await engine.score(PROMPT, mtp=True)
    np.testing.assert_array_equal(alone, logits)
    assert mtp_logits.shape == (len(PROMPT) - 1, 288)
    assert mtp_logits.dtype == logits.dtype == np.float32


async def test_logprobs(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        done = await engine.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True, logprobs=3))
        logits = await engine.score([*PROMPT, *done.token_ids])
    for index, chances in enumerate(done.logprobs):
        row = logits[len(PROMPT) - 1 + index].astype(np.float64)
        expected = row[chances.token] - np.log(np.exp(row).sum())
        assert chances.logprob == pytest.approx(expected, abs=1e-4)
        assert len(chances.top) == 3


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1, 288], "prompt id 288: the vocabulary has ids 0..287"),
        ([1, -1], "prompt id -1"),
        ([1, True], "prompt id True"),
        ([1, "2"], "prompt id '2'"),
        (5, "prompt 5: want a text, token ids or messages"),
        (None, "prompt None"),
        ([7] * 2560, "the prompt has 2560 tokens; the model's context is 2560 tokens"),
    ],
    ids=["text", "ids", "high", "low", "bool", "str", "number", "none", "long"],
)
async def test_bad_prompts(folder: Path, prompt: Any, found: str) -> None:
    async with Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        with pytest.raises(duck.ConfigError, match=found):
            await engine.generate(prompt, GREEDY)


async def test_the_context_ends_an_answer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, max_position_embeddings=16)
    async with Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        done = await engine.generate([5] * 10, Sampling(max_tokens=50, ignore_eos=True))
        assert done.finish_reason == "length"
        assert len(done.token_ids) == 6
        assert len(await engine.score([5] * 16)) == 16  # no room for an answer is needed
        with pytest.raises(duck.ConfigError, match="17 tokens"):
            await engine.score([5] * 17)


async def test_no_tokenizer(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, tokenizer=False)
    async with Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        done = await engine.generate(PROMPT, Sampling(max_tokens=3, ignore_eos=True))
        assert (len(done.token_ids), done.text) == (3, "")
        with pytest.raises(duck.ConfigError, match=r"no tokenizer\.json"):
            await engine.generate("hello", GREEDY)


async def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1)
    small = json.loads((folder / "config.json").read_text()) | {"vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(small))
    prompts = Prompts(folder)
    assert prompts.encode([5, 99]) == [5, 99]
    with pytest.raises(duck.ConfigError, match=r"0\.\.99: tokenizer\.json is of another model"):
        prompts.encode("duck")


async def test_more_ducks_than_columns(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, moe_intermediate_size=3)
    with pytest.raises(duck.ConfigError, match=r"4 ducks for 3 columns.*use 1\.\.3"):
        async with Engine.open(folder, ducks="local:4", transport="loopback"):
            pass
    plain = await both(folder, ducks="local:1", transport="loopback")
    assert await both(folder, ducks="local:3", transport="loopback") == plain


async def test_unknown_option(folder: Path) -> None:
    with pytest.raises(duck.ConfigError, match="duckz"):
        async with Engine.open(folder, duckz="local:2"):
            pass


async def test_a_session_gives_one_answer_at_a_time(folder: Path) -> None:
    async with Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        session = engine.session()
        first = engine.stream(PROMPT, GREEDY, session=session)
        await anext(first)
        with pytest.raises(duck.ConfigError, match="answering already"):
            await engine.generate(PROMPT, GREEDY, session=session)
        await first.aclose()
        again = await engine.generate(PROMPT, GREEDY, session=session)
        assert again.token_ids == (await engine.generate(PROMPT, GREEDY)).token_ids


@pytest.mark.parametrize("transport", ["loopback", "tcp"])
async def test_answers_are_told_that_the_engine_is_closed(folder: Path, transport: str) -> None:
    """Wherever each is just then; none is cancelled, which nobody would hear of."""
    for pieces in range(4):
        async with Engine.open(folder, ducks="local:2", transport=transport) as engine:
            streams = [engine.stream(PROMPT, Sampling(max_tokens=400)) for _ in range(2)]
            for _ in range(pieces):
                await anext(streams[0])
            tasks = [asyncio.create_task(_all(stream)) for stream in streams]
            tasks.append(asyncio.create_task(engine.score(PROMPT * 20)))
            for _ in range(3 * pieces):
                await asyncio.sleep(0)
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            assert type(error) is duck.DuckError
            assert str(error).startswith("the engine is closed: ")


async def _all(stream: AsyncGenerator[Piece, None]) -> None:
    async for _ in stream:
        pass


async def test_a_trace_says_what_ended_the_run(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(duck.DuckLost):
        async with Engine.open(folder, ducks="local:1", transport="loopback", trace=str(path)):
            raise duck.DuckLost("duck 0", 3, 12.0, "gone")
    ended = "lost duck 0 at layer 3 after waiting 12 ms: gone"
    assert json.loads(path.read_text())["otherData"]["ended"] == ended
    async with Engine.open(folder, ducks="local:1", transport="loopback", trace=str(path)):
        pass
    assert "ended" not in json.loads(path.read_text())["otherData"]
