"""A duck's queue: the thread that computes asks, in order, for all hosts.

An ask that nobody waits for any more (cancelled, its host gone, or older than its host waits) is
dropped before it is computed. Asks for the same layer that wait together are computed in one pass
over the weights they share; a row's bits do not depend on the rows beside it, so nobody can tell.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from duck import wire
from duck.errors import DuckError
from duck.kernels import library
from duck.transports.base import Handler

# So many rows may join an ask, whatever its own: it is answered hardly later for them. Two long
# asks share little, since each alone keeps a duck busy computing, not reading.
JOIN_ROWS = 16

# Called in the worker's thread, with the partial sums in the wire dtype and their stamps.
Reply = Callable[[np.ndarray | DuckError, bytes], None]

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Waiting:
    """An ask in a duck's queue."""

    layer: int
    body: wire.AskBody
    shape: wire.Shape
    reply: Reply
    nbytes: int = 0
    patience_s: float = math.inf  # how long its host waits for the answer
    since: float = field(default=0.0, init=False)

    @property
    def rows(self) -> int:
        return len(self.body.x)

    def may_join(self, first: Waiting) -> bool:
        """Whether one pass can serve both."""
        return self.layer == first.layer and self.shape.top_k == first.shape.top_k


class Worker:
    """Computes the asks of one duck. Each belongs to an owner (a host's session) and has a ticket.

    clock: seconds, for durations only.
    """

    def __init__(self, handler: Handler, clock: Callable[[], float] = time.perf_counter) -> None:
        self.joined = 0  # asks that were computed along with an earlier one
        self.expired = 0  # asks dropped because their host had stopped waiting
        self._handler, self._clock = handler, clock
        self._asks: dict[tuple[int, int], Waiting] = {}
        self._changed = threading.Condition()
        self._ended = False
        # A daemon: a process that was told to end does not finish its sums first.
        threading.Thread(target=self._run, name="experts", daemon=True).start()

    def put(self, owner: int, ticket: int, ask: Waiting) -> None:
        """Add an ask to the queue."""
        ask.since = self._clock()
        with self._changed:
            self._asks[owner, ticket] = ask
            self._changed.notify()

    def drop(self, owner: int, ticket: int) -> None:
        """Forget an ask unless it has begun."""
        with self._changed:
            self._asks.pop((owner, ticket), None)

    def drop_all(self, owner: int) -> None:
        """Forget an owner's asks."""
        with self._changed:
            self._asks = {key: ask for key, ask in self._asks.items() if key[0] != owner}

    def waiting(self, owner: int) -> tuple[int, int]:
        """How many asks of an owner have not begun, and their bytes."""
        with self._changed:
            sizes = [ask.nbytes for key, ask in self._asks.items() if key[0] == owner]
        return len(sizes), sum(sizes)

    def end(self) -> None:
        """Forget all asks; the thread ends after those it computes."""
        with self._changed:
            self._asks.clear()
            self._ended = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._asks and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                together = self._take(self._clock())
            if together:
                self._answer(together)
            del together  # and with it the asks' bytes, however long the next one takes to come

    def _take(self, now: float) -> list[Waiting]:
        """The first ask that is still waited for, and those that join it, out of the queue."""
        together: list[Waiting] = []
        room = JOIN_ROWS
        for key, ask in tuple(self._asks.items()):
            if now - ask.since > ask.patience_s:
                self.expired += 1
            elif not together:
                together.append(ask)
            elif ask.may_join(together[0]) and ask.rows <= room:
                together.append(ask)
                room -= ask.rows
                self.joined += 1
            else:
                continue
            del self._asks[key]
        return together

    def _answer(self, asks: Sequence[Waiting]) -> None:
        begun = self._clock()
        answers = self._compute(asks)
        took = self._clock() - begun
        if isinstance(answers, DuckError) and len(asks) > 1:
            for ask in asks:  # whose fault it is shows when each is alone
                self._answer([ask])
            return
        all_rows = sum(ask.rows for ask in asks)
        for number, ask in enumerate(asks):
            # The time of a common pass is shared out by rows; the rest of it is waiting.
            compute_s = took * ask.rows / all_rows
            stamps = wire.pack_stamps(begun - ask.since + took - compute_s, compute_s)
            ask.reply(answers if isinstance(answers, DuckError) else answers[number], stamps)

    def _compute(self, asks: Sequence[Waiting]) -> list[np.ndarray] | DuckError:
        """One pass over the rows of all asks; each ask's partial sums in its wire dtype."""
        layer, first = asks[0].layer, asks[0].body
        ids, weights, x = first.ids, first.weights, _from_wire(first.x)
        if len(asks) > 1:
            ids = np.concatenate([ask.body.ids for ask in asks])
            weights = np.concatenate([ask.body.weights for ask in asks])
            x = np.concatenate([_from_wire(ask.body.x) for ask in asks])
        try:
            sums = self._handler.answer(layer, x, ids, weights)
            parts = np.split(sums, np.cumsum([ask.rows for ask in asks])[:-1])
            pairs = zip(asks, parts, strict=True)
            return [_to_wire(part, ask.shape.answer_dtype) for ask, part in pairs]
        except DuckError as error:
            return error
        except Exception as error:  # the top of a thread: a host waits, and must hear of it
            _log.exception("answer_failed", layer=layer)
            return DuckError(f"internal error: {error!r}")


# As `wire` has them, but by the library that the kernel is in: numpy takes 40 us for a row of 7168
# numbers, a tenth of what its experts take, and 40 ms for a prompt's 256.


def _from_wire(x: np.ndarray) -> np.ndarray:
    return library.f32_from_bf16(x) if x.dtype == np.uint16 else wire.to_float32(x)


def _to_wire(sums: np.ndarray, dtype: str) -> np.ndarray:
    return library.bf16_from_f32(sums) if dtype == "bfloat16" else wire.to_wire(sums, dtype)
