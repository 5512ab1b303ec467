"""One answer under every schedule: the same tokens, and for a wave the same bits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from duck.config import CHOICES
from duck.engine import Engine
from duck.local import LocalDucks
from duck.meter import Meter
from duck.sampling import Sampling
from tests.checkpoints import make_checkpoint

SCHEDULES = CHOICES["schedule"][0]
TRANSPORTS = tuple(name for name in CHOICES["transport"][0] if name != "auto")
DRAFTS = ("mtp", "off")
PROMPTS = ([2, 3, 0, 2], [3, 3, 2], [0, 2, 2, 2, 3, 0], [2])
# Answers of several lengths: sessions join and leave while others run.
GREEDY = [Sampling(max_tokens=14 + 5 * n, ignore_eos=True) for n in range(4)]
SEEDED = [
    Sampling(max_tokens=24 - 4 * n, ignore_eos=True, temperature=1.0, seed=n) for n in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose drafts are often right: chance agreement is 1 in 4 with so few tokens."""
    folder = tmp_path_factory.mktemp("agreeing")
    return make_checkpoint(folder, seed=5, vocab_size=4, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def ducks(folder: Path) -> Iterator[str]:
    """Two processes that keep their slices: many hosts attach to them, one after the other."""
    ducks = LocalDucks.launch(2, folder)
    try:
        asyncio.run(ducks.listening())
        yield ",".join(ducks.addresses)
    finally:
        ducks.kill()


async def together(engine: Engine, sessions: int, samplings: list[Sampling]) -> list[list[int]]:
    done = await asyncio.gather(
        *(engine.generate(PROMPTS[n], samplings[n]) for n in range(sessions))
    )
    return [answer.token_ids for answer in done]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[list[list[int]]]:
    """The greedy and the seeded answers of the plain loop, one after the other, without drafts."""

    async def answers() -> list[list[list[int]]]:
        options = {"schedule": "serial", "draft": "off", "transport": "loopback"}
        async with Engine.open(folder, ducks="local:1", **options) as engine:
            return [
                [
                    (await engine.generate(p, s)).token_ids
                    for p, s in zip(PROMPTS, kind, strict=True)
                ]
                for kind in (GREEDY, SEEDED)
            ]

    return asyncio.run(answers())


def pairwise(*factors: Iterable[str]) -> list[tuple[str, ...]]:
    """Few combinations in which every two values of different factors meet."""
    every = list(itertools.product(*factors))

    def pairs(row: tuple[str, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    open_pairs = set().union(*map(pairs, every))
    chosen = []
    while open_pairs:
        best = max(every, key=lambda row: len(pairs(row) & open_pairs))
        chosen.append(best)
        open_pairs -= pairs(best)
    return chosen


FACTORS = (SCHEDULES, DRAFTS, TRANSPORTS, ("1", "2", "3", "4"), ("off", "on"))
SUBSET = pairwise(*FACTORS)


@pytest.mark.parametrize(
    ("schedule", "draft", "transport", "sessions", "graphs"),
    [
        pytest.param(*row, marks=() if row in SUBSET else pytest.mark.full)
        for row in itertools.product(*FACTORS)
    ],
)
async def test_the_same_tokens(
    folder: Path,
    ducks: str,
    plain: list[list[list[int]]],
    schedule: str,
    draft: str,
    transport: str,
    sessions: str,
    graphs: str,
) -> None:
    options = {"schedule": schedule, "draft": draft, "transport": transport, "graphs": graphs}
    if transport != "loopback":
        options["ducks"] = ducks
    async with Engine.open(folder, **options) as engine:
        for samplings, want in zip((GREEDY, SEEDED), plain, strict=True):
            assert await together(engine, int(sessions), samplings) == want[: int(sessions)]


def test_every_two_values_meet() -> None:
    assert len(SUBSET) < len(list(itertools.product(*FACTORS)))
    for (i, first), (j, second) in itertools.combinations(enumerate(FACTORS), 2):
        for a, b in itertools.product(first, second):
            assert any(row[i] == a and row[j] == b for row in SUBSET)


async def rows(folder: Path, prompt: list[int], tokens: int, **options: str) -> list[torch.Tensor]:
    """The hidden rows that a greedy answer was chosen from, by position, and its tokens' count."""
    found: dict[int, torch.Tensor] = {}
    async with Engine.open(folder, transport="loopback", **options) as engine:
        session, pipeline = engine.session(), engine._pipeline
        session.reserve(600)
        await pipeline.prefill(session, session.rewind_to(prompt))
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        async for _ in pipeline.decode(session, sampling, tokens, Meter()):
            kept = torch.cat(session.hidden)
            for number, row in enumerate(kept):
                found[session.length - len(kept) + number] = row
    return [found[at] for at in range(len(prompt) - 1, len(prompt) - 1 + tokens - 1)]


@pytest.mark.parametrize("early", ["off", "on"])
async def test_a_waves_rows_are_the_plain_loops_bits(folder: Path, early: str) -> None:
    prompt = [2, 3, 0, 2] * 75  # two chunks, which a wave runs as two lanes
    want = await rows(folder, prompt, 30, schedule="serial", draft="off")
    wave = await rows(folder, prompt, 30, schedule="wave", draft="mtp", early=early)
    for mine, theirs in zip(wave, want, strict=True):
        assert torch.equal(mine, theirs)
    # Two rows at once are computed by other kernels: the comparison can see a difference.
    batch = await rows(folder, prompt, 30, schedule="batch", draft="mtp")
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(batch, want, strict=True))
    for mine, theirs in zip(batch, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


async def test_every_schedule_counts_the_same(folder: Path) -> None:
    """Drafts, and the experts that a step's rows have in common, whatever the grouping."""
    counted = []
    for schedule in ("serial", "batch", "wave", "pingpong"):
        options = {"schedule": schedule, "draft": "mtp", "transport": "loopback"}
        async with Engine.open(folder, **options) as engine:
            stats = (await engine.generate(PROMPTS[0], SEEDED[0])).stats
            assert stats["schedule"] == schedule
            assert 0 < stats["device_busy"] <= 1
            assert 0 < stats["ducks_busy"] <= 1
            assert 0 <= stats["overlap_efficiency"] <= 1
        names = "steps", "drafts_proposed", "drafts_accepted", "draft_tokens", "expert_overlap"
        counted.append({name: stats[name] for name in names})
    assert counted[0]["drafts_accepted"] > 0
    assert 0 < counted[0]["expert_overlap"] < 1
    assert all(other == counted[0] for other in counted[1:])


async def test_prompts_in_chunks_overlap_under_every_schedule(folder: Path) -> None:
    prompt = [2, 3, 0, 2, 2, 0] * 110
    answers = set()
    for schedule in SCHEDULES:
        async with Engine.open(folder, schedule=schedule, transport="loopback") as engine:
            first, second = await asyncio.gather(
                engine.generate(prompt, GREEDY[0]), engine.generate(prompt[5:], GREEDY[0])
            )
            answers.add((tuple(first.token_ids), tuple(second.token_ids)))
    assert len(answers) == 1


async def test_auto_says_what_it_runs(folder: Path) -> None:
    async with Engine.open(folder, transport="loopback") as engine:
        long = Sampling(max_tokens=80, ignore_eos=True)
        stats = (await engine.generate(PROMPTS[0], long)).stats
        assert stats["schedule"] in ("serial", "wave", "batch")
        both = await asyncio.gather(*(engine.generate(p, long) for p in PROMPTS[:2]))
        assert {done.stats["schedule"] for done in both} == {"pingpong"}


async def test_a_session_that_nobody_reads_holds_nobody_up(folder: Path) -> None:
    options = {"schedule": "batch", "draft": "mtp", "transport": "loopback"}
    async with Engine.open(folder, **options) as engine:
        want = (await engine.generate(PROMPTS[1], GREEDY[1])).token_ids
        slow = engine.stream(PROMPTS[0], GREEDY[0])
        await anext(slow)
        assert (await engine.generate(PROMPTS[1], GREEDY[1])).token_ids == want
        await slow.aclose()
