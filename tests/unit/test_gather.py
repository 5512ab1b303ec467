"""Counting the answers of one ask: every duck and every fragment once."""

from __future__ import annotations

import itertools

import pytest

from duck.errors import WireError
from duck.gather import Gather


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_complete_when_all_have_answered_in_any_order(order: tuple[int, ...]) -> None:
    gather = Gather(3, 1)
    for count, duck in enumerate(order):
        assert not gather.complete
        assert set(gather.missing) == set(order[count:])
        assert not gather.has(duck)
        assert gather.note(duck, 0, 1)
        assert gather.has(duck)
    assert gather.complete
    assert gather.missing == ()


def test_a_duplicate_counts_once() -> None:
    gather = Gather(2, 1)
    assert gather.note(0, 0, 1)
    assert not gather.note(0, 0, 1)
    assert not gather.complete
    assert gather.missing == (1,)


def test_fragments_in_any_order() -> None:
    gather = Gather(2, 3)
    for duck, fragment in [(1, 2), (0, 0), (1, 0), (0, 2), (0, 1)]:
        assert not gather.seen(duck, fragment)
        assert gather.note(duck, fragment, 3)
        assert gather.seen(duck, fragment)
    assert gather.has(0)
    assert not gather.has(1)
    assert not gather.note(1, 0, 3)
    assert gather.note(1, 1, 3)
    assert gather.complete


@pytest.mark.parametrize(
    ("duck", "fragment", "fragments"), [(2, 0, 2), (-1, 0, 2), (0, 2, 2), (0, -1, 2), (0, 0, 1)]
)
def test_what_does_not_belong(duck: int, fragment: int, fragments: int) -> None:
    gather = Gather(2, 2)
    with pytest.raises(WireError):
        gather.note(duck, fragment, fragments)
    assert gather.missing == (0, 1)


def test_whole_answers_at_once() -> None:
    gather = Gather(3, 2)
    gather.note(1, 0, 2)
    gather.note_whole(1)
    gather.note_whole(1)
    assert gather.missing == (0, 2)
    assert [gather.seen(duck, 1) for duck in range(3)] == [False, True, False]
    assert not gather.note(1, 1, 2)
    assert not gather.complete
    gather.note_all()
    assert gather.complete
    assert gather.missing == ()
    assert gather.has(0)
