"""Who steps together: sessions come, go, fail and are broken off, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from duck.errors import DuckError
from duck.schedule import Chooser, Way
from duck.steps import Steps
from tests.virtual import run


@dataclass
class Talker:
    """A session of sorts, and what it wishes for."""

    name: str
    lent: asyncio.Future[None] | None = None

    @property
    def session(self) -> Talker:
        return self


@dataclass
class Runs:
    """Makes steps that take a second, and remembers who was in them; `bad` ones cannot be made."""

    bad: str = ""
    groups: list[str] = field(default_factory=list)
    at_once: int = 0
    most: int = 0

    async def __call__(self, talkers: Sequence[Talker], way: Way) -> list[str]:
        names = "".join(talker.name for talker in talkers)
        self.groups.append(names)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(1)
            for talker in talkers:
                if talker.name in self.bad:
                    raise DuckError(f"{talker.name} is bad")
        finally:
            self.at_once -= 1
        return [talker.name.upper() for talker in talkers]


def steps(schedule: str, runs: Runs) -> Steps[Talker, str]:
    return Steps(runs, Chooser(schedule, "mtp", "off", can_draft=True))


async def talk(steps: Steps[Talker, str], name: str, times: int) -> list[str]:
    return [await steps.step(Talker(name)) for _ in range(times)]


@pytest.mark.parametrize(
    ("schedule", "want", "most"),
    [
        ("serial", ["a", "b", "c", "a", "b", "c"], 1),
        ("batch", ["ab", "ca", "bc"], 1),
        ("wave", ["a", "b", "c", "a", "b", "c"], 3),
        ("pingpong", ["ab", "c", "ac", "b"], 2),  # both end at once, and form anew
    ],
)
def test_who_steps_together(schedule: str, want: list[str], most: int) -> None:
    runs = Runs()

    async def main() -> list[list[str]]:
        together = steps(schedule, runs)
        return await asyncio.gather(*(talk(together, name, 2) for name in "abc"))

    assert run(main()) == [["A"] * 2, ["B"] * 2, ["C"] * 2]
    assert runs.groups == want
    assert runs.most == most


def test_one_that_fails_fails_alone() -> None:
    """The step of a group fails; each goes alone, and whoever is to blame hears of it."""
    for bad in "ab":
        runs = Runs(bad=bad)

        async def main(runs: Runs = runs) -> list[Any]:
            together = steps("batch", runs)
            talks = (talk(together, name, 2) for name in "ab")
            return await asyncio.gather(*talks, return_exceptions=True)

        told = dict(zip("ab", run(main()), strict=True))
        assert isinstance(told.pop(bad), DuckError)
        [good] = told
        assert told[good] == [good.upper()] * 2
        assert sorted(runs.groups[1:3]) == ["a", "b"]


def test_whoever_leads_may_leave() -> None:
    runs = Runs()

    async def main() -> list[str]:
        together = steps("batch", runs)
        first = asyncio.create_task(talk(together, "a", 2))
        second = asyncio.create_task(talk(together, "b", 2))
        await asyncio.sleep(0.5)
        assert runs.groups == ["ab"]
        first.cancel()
        said = await second
        assert first.cancelled()
        return said

    assert run(main()) == ["B", "B"]
    assert runs.groups == ["ab", "b", "b"]


def test_what_a_step_works_on_is_lent_until_it_ends() -> None:
    runs = Runs()

    async def main() -> None:
        together = steps("batch", runs)
        leader, follower = Talker("a"), Talker("b")
        first = asyncio.create_task(together.step(leader))
        second = asyncio.create_task(together.step(follower))
        await asyncio.sleep(0.5)
        second.cancel()
        await asyncio.sleep(0)
        # It may leave at once, but the step goes on with what is its.
        assert second.cancelled()
        assert follower.lent is not None
        assert not follower.lent.done()
        assert await first == "A"
        assert follower.lent.done()

    run(main())
    assert runs.groups == ["ab"]


def test_a_place_in_the_queue_may_be_left() -> None:
    runs = Runs()

    async def main() -> list[Any]:
        together = steps("serial", runs)
        tasks = [asyncio.create_task(talk(together, name, 1)) for name in "abc"]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, third = run(main())
    assert (first, third) == (["A"], ["C"])
    assert isinstance(second, asyncio.CancelledError)
    assert runs.groups == ["a", "c"]
