"""Rows of one session on the device, on their way through the layers of a lane.

A `Walk` launches the kernels of every layer anew. That costs the host more than the device needs to
run them, as long as rows are few. So rows of a decode step walk in a `Slot`: their inputs, outputs
and position lie in buffers that stay where they are, and what a layer does between two of them is a
segment, recorded once as a CUDA graph and replayed from then on. On a CPU a segment is just called
again, over the same buffers, with all that was known when it was made: so tests there find what a
graph would get wrong.

A segment belongs to one slot and one session, since both its buffers' and its cache's addresses are
in it. A slot serves one lane at a time: so no lane's rows are overwritten by another's before they
were used. That makes for some 120 graphs a slot of a whole model; a session that drafts has two
slots or three, and there is a bound for all sessions. Beyond it, and for more rows than MOST_ROWS,
one walks without. Groups of sessions need no more rows: spans are computed one by one, so that a
row's bits do not depend on who travels with it. When a cache grows it moves, and its graphs go.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from duck.model.cache import KVCache
from duck.model.router import Routed

MOST_ROWS = 2
"""Of a session in a step: its newest token, and the guess."""
MOST_SEGMENTS = 1024
"""Of all sessions: with so many, no further one gets slots. A graph takes memory of device and host
for each of its some 20 kernels."""
LEAST_TOKENS = 4096
IDLE_TAKES = 256
"""A session whose slots were not taken while others' were so often gives its segments up."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]


class Layer(Protocol):
    """A decoder layer; see `model.transformer.DecoderLayer`."""

    @property
    def index(self) -> int: ...
    @property
    def is_moe(self) -> bool: ...
    def attend(
        self, x: Tensor, cache: KVCache, position: int, *, last: int | None = None
    ) -> Tensor: ...
    def dense(self, x: Tensor) -> Tensor: ...
    def route(self, x: Tensor) -> Routed: ...
    def shared(self, h: Tensor) -> Tensor: ...
    def merge(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor: ...


class SteadyLayer(Layer, Protocol):
    """One whose launches may be the same wherever its rows are."""

    def steadiness(self, position: int, rows: int, last: int) -> str | None: ...
    def attend(
        self,
        x: Tensor,
        cache: KVCache,
        position: int,
        *,
        last: int | None = None,
        at: Tensor | None = None,
    ) -> Tensor: ...
    def attend_and_route(
        self,
        x: Tensor,
        cache: KVCache,
        position: int,
        *,
        last: int | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Routed]: ...


class Sent(NamedTuple):
    """What a layer sends its ducks, in the host's memory, until the walk's next layer.

    rows: (T, hidden) in the model's dtype; ids, weights: (T, top_k). finite: whether the rows that
    entered the layer were numbers.
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor
    finite: bool


class Fetch(Protocol):
    """Brings tensors to the host: what it gives may be called once the device has come so far."""

    def __call__(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]: ...


def fetch(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Launch copies to the host; see `Fetch`."""
    if not tensors[0].is_cuda:
        return lambda: tensors
    from duck import cuda

    hosts = tuple(map(cuda.pinned_like, tensors))
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    return lambda: hosts


class Walk:
    """Rows that are computed wherever memory is free. Calls are for the device's worker.

    watched: whether somebody wants to know if rows are numbers after a merge.
    """

    def __init__(self, cache: KVCache, position: int, last: int | None, *, watched: bool) -> None:
        self._cache, self._position, self._last = cache, position, last
        self._watched = watched
        self._x: Tensor | None = None
        self._routed: Routed | None = None
        self._shared: Tensor | None = None
        self._finite: Callable[[], bool] = _yes

    @property
    def x(self) -> Tensor:
        """The rows as they enter the next layer, (T, hidden)."""
        assert self._x is not None
        return self._x

    def enter(self, x: Tensor) -> None:
        """Begin with these rows."""
        self._x = x

    def attend(self, layer: Layer) -> None:
        """Attention, and the MLP of a dense layer, or the router."""
        self._finite = self.finite()
        x = layer.attend(self.x, self._cache, self._position, last=self._last)
        if layer.is_moe:
            self._routed = layer.route(x)
        else:
            x = layer.dense(x)
        self._x = x

    def sent(self) -> Callable[[], Sent]:
        """What goes to the ducks, once the device has computed it."""
        routed, finite = self._routed, self._finite
        assert routed is not None
        arrays = fetch(routed.h, routed.ids, routed.weights)

        def made() -> Sent:
            rows, ids, weights = arrays()
            return Sent(rows, ids, weights, finite())

        return made

    def share(self, layer: Layer) -> None:
        """The shared expert."""
        assert self._routed is not None
        self._shared = layer.shared(self._routed.h)

    def merge(self, layer: Layer, routed: Tensor) -> None:
        """Add the experts. routed: the ducks' sum, or their partial sums, as layer.merge has it."""
        assert self._shared is not None
        self._x = layer.merge(self.x, self._shared, routed)

    def finite(self) -> Callable[[], bool]:
        """Whether the rows are numbers, once the device has computed them."""
        if not self._watched:
            return _yes
        ends = fetch(_ends(self.x))
        return lambda: bool(torch.isfinite(ends()[0]).all())

    def close(self) -> None:
        """Nobody walks here any more. In the event loop."""


class Slot:
    """Buffers of `rows` rows, of which `last` leave a layer, and the segments between them.

    Made in the event loop; it has memory from its first use on, by the device's worker.
    """

    def __init__(self, rows: int, last: int, capture: Capture | None) -> None:
        self.rows, self.last = rows, last
        self.taken = False
        self._capture = capture
        self._segments: dict[tuple[str, int], Callable[[], None]] = {}
        self._x: Tensor | None = None

    def __len__(self) -> int:
        return len(self._segments)

    def begin(self, x: Tensor, position: int) -> None:
        """Bring rows and their position where segments look for them."""
        if self._x is None:
            self._x = torch.empty_like(x)
            self.position = torch.zeros(1, dtype=torch.int32, device=x.device)
            self.shared = torch.zeros(self.last, x.shape[1], device=x.device)
            self._out: Tensor | None = None
        self._x.copy_(x)
        self.position.fill_(position)

    @property
    def x(self) -> Tensor:
        """The rows."""
        assert self._x is not None
        return self._x

    def attend(self, layer: SteadyLayer, cache: KVCache, position: int) -> None:
        """As Walk.attend, from buffers to buffers."""
        kind = layer.steadiness(position, self.rows, self.last)

        def work() -> None:
            self._attend(layer, cache, position)

        if kind is None:
            work()
        else:
            self._run((kind, layer.index), work)

    def _attend(self, layer: SteadyLayer, cache: KVCache, position: int) -> None:
        ends = _ends(self.x)
        last, at = self.last, self.position
        if layer.is_moe:
            x, routed = layer.attend_and_route(self.x, cache, position, last=last, at=at)
            if self._out is None:
                self._make(routed)
            for buffer, part in zip(self.parts, (*_fields(routed), ends), strict=True):
                buffer.copy_(part)
        else:
            x = layer.dense(layer.attend(self.x, cache, position, last=last, at=at))
        self.x[:last].copy_(x)

    def _make(self, routed: Routed) -> None:
        """Room for what goes to the host, in one piece: one copy brings it there."""
        parts = (*_fields(routed), torch.empty(2, device=routed.h.device))
        starts = np.cumsum([0, *(-(-part.nbytes // 16) * 16 for part in parts)]).tolist()
        self._out = torch.zeros(starts[-1], dtype=torch.uint8, device=routed.h.device)
        if self._out.is_cuda:
            from duck import cuda

            self._host = cuda.pinned_like(self._out)
        else:
            self._host = torch.empty_like(self._out)

        def views(memory: Tensor) -> list[Tensor]:
            pairs = zip(parts, starts, strict=False)
            return [
                memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
                for part, start in pairs
            ]

        self.parts, self._host_parts = views(self._out), views(self._host)

    def sent(self) -> Callable[[], Sent]:
        """As Walk.sent."""
        assert self._out is not None
        self._host.copy_(self._out, non_blocking=True)
        rows, ids, weights, ends = self._host_parts
        return lambda: Sent(rows, ids, weights, bool(torch.isfinite(ends).all()))

    def share(self, layer: Layer) -> None:
        """As Walk.share."""
        self._run(("shared", layer.index), lambda: self.shared.copy_(layer.shared(self.parts[0])))

    def merge(self, layer: Layer, routed: Tensor) -> None:
        """As Walk.merge; eager, since an ask's answers lie in another place each time."""
        x = self.x[: self.last]
        x.copy_(layer.merge(x, self.shared, routed))

    def _run(self, name: tuple[str, int], work: Callable[[], object]) -> None:
        """Do it, and keep it to be done again."""
        segment = self._segments.get(name)
        if segment is not None:
            segment()
            return

        def again() -> None:
            work()

        if self._capture is None:
            again()
        else:
            again = self._capture(again)
        self._segments[name] = again


class SlotWalk(Walk):
    """Rows in a slot, which is its own until it is closed."""

    def __init__(self, slot: Slot, cache: KVCache, position: int, *, watched: bool) -> None:
        super().__init__(cache, position, slot.last, watched=watched)
        assert position + slot.rows <= cache.capacity
        self._slot, self._left = slot, slot.rows

    @property
    def x(self) -> Tensor:
        return self._slot.x[: self._left]

    def enter(self, x: Tensor) -> None:
        self._slot.begin(x, self._position)

    def attend(self, layer: Layer) -> None:
        # Whoever wants slots has such layers.
        self._slot.attend(cast(SteadyLayer, layer), self._cache, self._position)
        self._left = self._slot.last

    def sent(self) -> Callable[[], Sent]:
        return self._slot.sent()

    def share(self, layer: Layer) -> None:
        self._slot.share(layer)

    def merge(self, layer: Layer, routed: Tensor) -> None:
        self._slot.merge(layer, routed)

    def close(self) -> None:
        self._slot.taken = False


class Slots:
    """A session's, as long as its cache stays where it is."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.used = 0  # by the count of all takes

    def __len__(self) -> int:
        return sum(map(len, self.slots))


class Holder(Protocol):
    """Whose rows walk; see `session.Session`."""

    @property
    def cache(self) -> KVCache: ...

    slots: Slots | None


class Walks:
    """Where walks begin, and which of them have a slot.

    Args:
        slots: whether there are any; a model's layers must be SteadyLayers then.
        capture: makes a graph of a segment; None calls it anew each time.
        watched: see Walk.
    """

    def __init__(
        self, *, slots: bool = False, capture: Capture | None = None, watched: bool = False
    ) -> None:
        self._slots, self._capture, self._watched = slots, capture, watched
        # Positions that a cache is to have room for from the first on: when it grows, it moves.
        self.least = LEAST_TOKENS if capture is not None else 0
        self._all: weakref.WeakSet[Slots] = weakref.WeakSet()
        self._takes = 0

    @property
    def segments(self) -> int:
        """How many are kept."""
        return sum(map(len, self._all))

    def begin(
        self, session: Holder, rows: int, position: int, last: int | None, *, decode: bool
    ) -> Walk:
        """A walk of so many rows; in a slot if they are of a decode step. Close it.

        In the event loop: nothing of the device is touched.
        """
        if decode and self._slots and rows <= MOST_ROWS and last != 0:
            slot = self._take(session, rows, rows if last is None else last)
            if slot is not None:
                return SlotWalk(slot, session.cache, position, watched=self._watched)
        return Walk(session.cache, position, last, watched=self._watched)

    def _take(self, session: Holder, rows: int, last: int) -> Slot | None:
        self._takes += 1
        mine = session.slots
        if mine is None or mine.capacity != session.cache.capacity:
            if self.segments >= MOST_SEGMENTS and not self._make_room():
                return None
            mine = session.slots = Slots(session.cache.capacity)
            self._all.add(mine)
        mine.used = self._takes
        for slot in mine.slots:
            if not slot.taken and (slot.rows, slot.last) == (rows, last):
                break
        else:
            slot = Slot(rows, last, self._capture)
            mine.slots.append(slot)
        slot.taken = True
        return slot

    def _make_room(self) -> bool:
        """Take the segments of the session that was idle for longest, if it was for long."""
        oldest = min(self._all, key=lambda slots: slots.used)
        if self._takes - oldest.used < IDLE_TAKES or any(slot.taken for slot in oldest.slots):
            return False
        self._all.discard(oldest)
        oldest.capacity = -1  # its session has to ask again
        oldest.slots.clear()
        return True


def _fields(routed: Routed) -> tuple[Tensor, Tensor, Tensor]:
    return routed.h, routed.ids, routed.weights


def _ends(x: Tensor) -> Tensor:
    """The least and the largest number of rows, float32: NaN if there is one among them."""
    return torch.stack(torch.aminmax(x)).float()


def _yes() -> bool:
    return True
