"""A duck's queue: what is dropped, what is computed together, and that nobody can tell.

The handler stops where the test wants it to, so the test decides what waits together.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from duck import wire
from duck.errors import DuckError
from duck.kernels.reference.experts import ReferenceExperts
from duck.model.weights import ExpertWeights
from duck.transports.worker import JOIN_ROWS, Waiting, Worker
from tests.flocks import WAIT_S

SHAPE = wire.Shape(8, 2, ask_dtype="float32", answer_dtype="float32", max_rows=64)
Answer = tuple[np.ndarray | DuckError, bytes]


class Handler:
    """Answers layer + x; the first ask stops until `go`; id 3 is more than it can take."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, int]] = []  # (layer, rows)
        self.begun, self.go = threading.Event(), threading.Event()

    async def attach(self, *_: object) -> dict[str, object]:
        raise NotImplementedError

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        self.passes.append((layer, len(x)))
        self.begun.set()
        assert self.go.wait(WAIT_S)
        if (ids == 3).any():
            raise DuckError("three is too many")
        return x + np.float32(layer)


class Flock:
    """A worker whose first ask has begun and waits; what is added now waits together."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handler = Handler()
        self.worker = Worker(self.handler, lambda: self.now)
        self.answers: dict[tuple[int, int], queue.Queue[Answer]] = {}
        self.x: dict[tuple[int, int], np.ndarray] = {}
        self.rng = np.random.default_rng(0)
        self.put(0, 0, layer=9)
        assert self.handler.begun.wait(WAIT_S)

    def put(self, owner: int, ticket: int, layer: int, rows: int = 1, expert: int = 1) -> None:
        x = self.rng.standard_normal((rows, SHAPE.hidden), np.float32)
        ids = np.full((rows, SHAPE.top_k), expert, np.int32)
        answered: queue.Queue[Answer] = queue.Queue()
        self.answers[owner, ticket], self.x[owner, ticket] = answered, x
        body = wire.AskBody(ids, np.ones(ids.shape, np.float32), x)
        ask = Waiting(layer, body, SHAPE, lambda *answer: answered.put(answer), nbytes=x.nbytes)
        ask.patience_s = 30.0
        self.worker.put(owner, ticket, ask)

    def answer(self, owner: int, ticket: int) -> Answer:
        return self.answers[owner, ticket].get(timeout=WAIT_S)

    def check(self, owner: int, ticket: int, layer: int) -> None:
        sums, _ = self.answer(owner, ticket)
        np.testing.assert_array_equal(sums, self.x[owner, ticket] + np.float32(layer))


@pytest.fixture
def flock() -> Iterator[Flock]:
    made = Flock()
    yield made
    made.handler.go.set()
    made.worker.end()


def test_in_order(flock: Flock) -> None:
    for ticket, layer in enumerate((5, 2, 7), 1):
        flock.put(0, ticket, layer)
    flock.handler.go.set()
    flock.check(0, 0, 9)
    for ticket, layer in enumerate((5, 2, 7), 1):
        flock.check(0, ticket, layer)
    assert flock.handler.passes == [(9, 1), (5, 1), (2, 1), (7, 1)]


def test_what_is_cancelled_is_not_computed(flock: Flock) -> None:
    for ticket in (1, 2, 3):
        flock.put(0, ticket, layer=ticket)
        flock.put(1, ticket, layer=ticket + 4)
    assert flock.worker.waiting(1) == (3, 3 * SHAPE.hidden * 4)
    flock.worker.drop(0, 2)
    flock.worker.drop(0, 0)  # begun: it is answered all the same
    flock.worker.drop_all(1)
    assert flock.worker.waiting(1) == (0, 0)
    flock.handler.go.set()
    for ticket, layer in ((0, 9), (1, 1), (3, 3)):
        flock.check(0, ticket, layer)
    assert flock.handler.passes == [(9, 1), (1, 1), (3, 1)]
    assert flock.answers[0, 2].empty()


def test_what_nobody_waits_for_any_more_is_not_computed(flock: Flock) -> None:
    flock.put(0, 1, layer=1)
    flock.now += 20.0
    flock.put(0, 2, layer=2)
    flock.now += 20.0  # the first has waited for 40 s, the second for 20 s of its 30 s
    flock.handler.go.set()
    flock.check(0, 2, 2)
    assert flock.handler.passes == [(9, 1), (2, 1)]
    assert flock.worker.expired == 1
    assert flock.answers[0, 1].empty()


def test_asks_for_one_layer_share_a_pass(flock: Flock) -> None:
    """Also of different hosts; each is answered by itself, and time is shared out by rows."""
    flock.put(0, 1, layer=4, rows=3)
    flock.put(0, 2, layer=5)
    flock.put(1, 1, layer=4)
    flock.put(2, 1, layer=4, rows=2)
    flock.now += 1.0
    flock.handler.go.set()
    for key, layer in (((0, 1), 4), ((1, 1), 4), ((2, 1), 4), ((0, 2), 5)):
        flock.check(*key, layer)
    assert flock.handler.passes == [(9, 1), (4, 6), (5, 1)]
    assert flock.worker.joined == 2


def test_stamps(flock: Flock) -> None:
    flock.now += 2.0
    flock.handler.go.set()
    assert wire.STAMPS.unpack(flock.answer(0, 0)[1]) == (0, 2_000_000)


def test_a_long_ask_does_not_hold_up_a_short_one(flock: Flock) -> None:
    flock.put(0, 1, layer=4)
    flock.put(1, 1, layer=4, rows=JOIN_ROWS + 1)
    flock.put(2, 1, layer=4, rows=JOIN_ROWS)
    flock.put(3, 1, layer=4)  # no room left: joins the next pass
    flock.handler.go.set()
    for owner in range(4):
        flock.check(owner, 1, 4)
    assert flock.handler.passes == [(9, 1), (4, JOIN_ROWS + 1), (4, JOIN_ROWS + 2)]


def test_one_bad_ask_spoils_no_other(flock: Flock) -> None:
    flock.put(0, 1, layer=4)
    flock.put(1, 1, layer=4, expert=3)
    flock.put(2, 1, layer=4)
    flock.handler.go.set()
    flock.check(0, 1, 4)
    flock.check(2, 1, 4)
    error, _ = flock.answer(1, 1)
    assert str(error) == "three is too many"


def test_nothing_is_computed_after_the_end(flock: Flock) -> None:
    flock.put(0, 1, layer=1)
    flock.worker.end()
    flock.handler.go.set()
    flock.check(0, 0, 9)
    assert flock.worker.waiting(0) == (0, 0)
    assert flock.answers[0, 1].empty()


@pytest.mark.parametrize("answer_dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_company(answer_dtype: str) -> None:
    rng = np.random.default_rng(1)
    hidden, columns, experts = 48, 24, 6
    shape = wire.Shape(hidden, 3, "bfloat16", answer_dtype, 64)
    held = ReferenceExperts([0], experts, hidden, columns)
    for expert in range(experts):
        gate, up, down = rng.standard_normal((3, columns, hidden), np.float32)
        weights = ExpertWeights(range(columns), None, gate, up, down.T.copy(), None, None, None)
        held.load(0, expert, weights)

    class Real(Handler):
        def answer(
            self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
        ) -> np.ndarray:
            super().answer(layer, x, ids, weights)
            out = np.empty_like(x)
            held.forward(0, x, ids, weights, out)
            return out

    def ask(rows: int) -> wire.AskBody:
        ids = np.stack([rng.permutation(3)[:3] for _ in range(rows)]).astype(np.int32) + 3
        ids[ids == 3] = 0
        weights = rng.random((rows, 3), np.float32)
        x = rng.standard_normal((rows, hidden), np.float32)
        return wire.AskBody(ids, weights, wire.to_wire(x, "bfloat16"))

    bodies = [ask(rows) for rows in (1, 3, 2, 1, 5)]

    def run(together: bool) -> tuple[list[np.ndarray], int]:
        handler = Real()
        worker = Worker(handler)
        answered: list[queue.Queue[np.ndarray]] = []
        sums = []
        worker.put(0, 99, Waiting(7, bodies[0], shape, lambda *_: None))
        assert handler.begun.wait(WAIT_S)
        if not together:
            handler.go.set()
        for ticket, body in enumerate(bodies):
            answers: queue.Queue[np.ndarray] = queue.Queue()
            answered.append(answers)
            worker.put(0, ticket, Waiting(0, body, shape, lambda a, _, q=answers: q.put(a)))
            if not together:
                sums.append(answers.get(timeout=WAIT_S))
        handler.go.set()
        sums = sums or [answers.get(timeout=WAIT_S) for answers in answered]
        worker.end()
        return sums, worker.joined

    alone, joined_alone = run(together=False)
    joined, count = run(together=True)
    assert (joined_alone, count) == (0, 4)
    for one, other in zip(alone, joined, strict=True):
        assert one.dtype == wire.wire_array(answer_dtype)
        np.testing.assert_array_equal(one, other)
