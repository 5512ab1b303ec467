"""Sessions longer than index_topk, lengths and caches: the Engine as its users see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import duck
from duck import Engine, Sampling, memory
from duck.budget import Budget
from tests.checkpoints import make_checkpoint

TOPK = 24
GREEDY = Sampling(max_tokens=24, ignore_eos=True)
LONG = [int(id_) for id_ in np.random.default_rng(3).integers(2, 288, 60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("v32"), seed=8, tokenizer=False, model_type="deepseek_v32",
        index_topk=TOPK, index_n_heads=16, index_head_dim=32,
    )  # fmt: skip


async def tokens(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    async with Engine.open(folder, transport="loopback", **options) as engine:
        return (await engine.generate(prompt, GREEDY)).token_ids


@pytest.mark.parametrize("prompt", [LONG[:10], LONG], ids=["crossing", "beyond"])
@pytest.mark.parametrize("options", [{}, {"kv": "fp8", "indexer": "fp8"}], ids=["exact", "fp8"])
async def test_drafts_schedules_and_ducks_change_no_token(
    folder: Path, prompt: list[int], options: dict[str, str]
) -> None:
    plain = await tokens(folder, prompt, draft="off", schedule="serial", **options)
    for schedule, ducks in (("serial", 1), ("batch", 2), ("wave", 3)):
        found = await tokens(
            folder, prompt, ducks=f"local:{ducks}", schedule=schedule, draft="mtp", **options
        )
        assert found == plain
    other = {} if options else {"kv": "fp8", "indexer": "fp8"}
    assert await tokens(folder, prompt, ducks="local:1", draft="off", **other) != plain


async def test_a_session_goes_on_and_back(folder: Path) -> None:
    """What is kept of latents and index keys is what a fresh session would compute."""
    async with Engine.open(
        folder, ducks="local:1", transport="loopback", draft="mtp", schedule="wave"
    ) as engine:
        session = engine.session()
        first = await engine.generate(LONG[:30], GREEDY, session=session)
        longer = [*LONG[:30], *first.token_ids, *LONG[30:50]]
        for prompt in (longer, longer[:40] + LONG[:5], LONG[:12]):
            kept = await engine.generate(prompt, GREEDY, session=session)
            fresh = await engine.generate(prompt, GREEDY)
            assert kept.token_ids == fresh.token_ids
            assert kept.stats["draft_tokens"] == fresh.stats["draft_tokens"]


async def test_a_session_ends_at_max_len(folder: Path) -> None:
    seen: list[Budget] = []
    options: dict[str, Any] = {"ducks": "local:1", "transport": "loopback"}
    long = await tokens(folder, LONG[:20], ducks="local:1")
    async with Engine.open(folder, max_len=32, planned=seen.append, **options) as engine:
        assert [budget.holding.max_len for budget in seen] == [32]
        assert seen[0].holding.indexer == "exact"
        done = await engine.generate(LONG[:20], GREEDY)
        assert (done.token_ids, done.finish_reason) == (long[:12], "length")
        assert len(await engine.score(LONG[:32])) == 32
        with pytest.raises(duck.ConfigError, match=r"33 tokens; a session holds 32 .*--max-len"):
            await engine.score(LONG[:33])
        with pytest.raises(duck.ConfigError, match=r"32 tokens; .* an answer needs one"):
            await engine.generate(LONG[:32], GREEDY)


async def test_within_index_topk_nothing_is_indexed(folder: Path) -> None:
    async with Engine.open(folder, ducks="local:1", transport="loopback", max_len=TOPK) as engine:
        load = engine.load.to_json()
        assert load["memory"]["indexer"] is None
        assert load["kv_bytes_per_token"] == 4 * 40 * 4
        short = await engine.generate(LONG[:10], Sampling(max_tokens=14, ignore_eos=True))
    assert short.token_ids == (await tokens(folder, LONG[:10], ducks="local:1"))[:14]


async def test_memory_bounds_a_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is asked once; ducks on this machine have taken theirs from it."""
    options: dict[str, Any] = {"ducks": "local:2", "transport": "loopback", "max_len": 2560}
    seen: list[Budget] = []
    plenty = 8 << 30
    monkeypatch.setattr(memory, "free_bytes", lambda *_: plenty)
    async with Engine.open(folder, planned=seen.append, **options) as engine:
        ducks = sum(part.resident_bytes for part in engine.load.ducks)
    left = seen[0].free_bytes
    assert left is not None
    taken = plenty - left - ducks - 2 * memory.OVERHEAD_BYTES
    assert taken > seen[0].weights_bytes + seen[0].kv_bytes
    monkeypatch.setattr(memory, "free_bytes", lambda *_: plenty - left - 1)
    with pytest.raises(duck.ConfigError, match=r"at 2,560 tokens, 0 MiB more than cpu memory"):
        async with Engine.open(folder, **options):
            pass
    options["max_len"] = None
    async with Engine.open(folder, planned=seen.append, **options) as engine:
        assert seen[1].holding.max_len == engine.prompts.max_len == 2559


@pytest.mark.parametrize("seed", [1, 2])
async def test_fp8_kv_agrees_with_bf16_on_random_models(seed: int, tmp_path: Path) -> None:
    """With gentle attention and every expert chosen.

    Rounded latents are 2.6 % off. Sharp random attention makes 10 % of that in the logits, and a
    random router other experts: then a third of the argmaxes move, as it would under any such
    noise. A trained model is decided: see the demo below.
    """
    folder = make_checkpoint(
        tmp_path, seed=seed, tokenizer=False, attention=0.5, n_routed_experts=4, n_group=1,
        topk_group=1,
    )  # fmt: skip
    ids = [int(id_) for id_ in np.random.default_rng(seed).integers(2, 288, 250)]
    assert await agreement(folder, ids) >= 0.97


async def test_fp8_kv_agrees_with_bf16_on_the_demo() -> None:
    async with Engine.open("demo", ducks="local:1", transport="loopback") as engine:
        asked = "Is 391 prime?"
        sampling = Sampling(max_tokens=150, temperature=0.8, seed=1, ignore_eos=True)
        ids = engine.prompts.encode(asked)
        ids += (await engine.generate(ids, sampling)).token_ids
    assert await agreement("demo", ids) >= 0.97


async def agreement(model: Path | str, ids: list[int]) -> float:
    """The share of positions where both caches lead to the same likeliest token."""
    logits = []
    for kv in ("bf16", "fp8"):
        async with Engine.open(model, ducks="local:1", transport="loopback", kv=kv) as engine:
            logits.append(await engine.score(ids))
    assert not np.array_equal(*logits)
    share = float((logits[0].argmax(-1) == logits[1].argmax(-1)).mean())
    print(f"fp8 KV: {share:.3f} of {len(ids)} argmaxes as with bf16")
    return share
