"""What was done, and what its stages took: of one answer, and of a whole pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from duck.schedule import Average, Times


@dataclass
class Meter:
    """What one answer did."""

    steps: int = 0
    accepted: int = 0  # of the drafts
    drafts: list[tuple[int, int]] = field(default_factory=list)  # (completion index, guess)
    schedules: Counter[str] = field(default_factory=Counter)  # steps under each
    # Experts common to the two rows of a step, and how many there could be.
    shared_experts: int = 0
    possible_experts: int = 0

    def experts(self, sure: np.ndarray, guess: np.ndarray | None = None) -> None:
        """Count what the rows of a step have in common. sure, guess: (layers, top_k) ids."""
        if guess is not None:
            self.shared_experts += int((sure[:, :, None] == guess[:, None, :]).sum())
            self.possible_experts += sure.size


@dataclass(frozen=True)
class Totals:
    """Seconds of work since the pipeline was made."""

    device: float = 0.0
    ducks: float = 0.0  # the slowest duck's computing of each ask
    wire: float = 0.0  # the rest of each ask, without waiting in ducks' queues
    each_duck: tuple[float, ...] = ()  # computing

    def since(self, before: Totals) -> Totals:
        """The difference to an earlier moment."""
        earlier = before.each_duck or (0.0,) * len(self.each_duck)
        return Totals(
            self.device - before.device,
            self.ducks - before.ducks,
            self.wire - before.wire,
            tuple(now - then for now, then in zip(self.each_duck, earlier, strict=True)),
        )


class Stages:
    """What the stages of all answers took, in sums and as running means by number of rows."""

    def __init__(self, ducks: int) -> None:
        self._device_s = self._ducks_s = self._wire_s = 0.0
        self._each_duck_s = [0.0] * ducks
        self._device: dict[tuple[str, int], Average] = {}
        self._asks: dict[int, tuple[Average, Average]] = {}  # (duck, wire) of asks of n rows

    def worked(self, stage: str, rows: int, seconds: float) -> None:
        """The device did a piece of work."""
        self._device_s += seconds
        self._device.setdefault((stage, rows), Average()).add(seconds)

    def asked(self, rows: int, seconds: float, ducks_us: Sequence[tuple[int, int]]) -> None:
        """An ask was answered. ducks_us: (queue, compute) as the ducks say."""
        for duck, (_queue_us, compute_us) in enumerate(ducks_us):
            self._each_duck_s[duck] += compute_us / 1e6
        queue_us, compute_us = max(ducks_us, key=sum)
        # A duck may say what it likes; it cannot have taken longer than the ask.
        compute = min(seconds, compute_us / 1e6)
        wire = max(0.0, seconds - compute - queue_us / 1e6)
        self._ducks_s += compute
        self._wire_s += wire
        duck_mean, wire_mean = self._asks.setdefault(rows, (Average(), Average()))
        duck_mean.add(compute)
        wire_mean.add(wire)

    def totals(self) -> Totals:
        """The sums so far."""
        each = tuple(self._each_duck_s)
        return Totals(self._device_s, self._ducks_s, self._wire_s, each)

    def times(self, layers: int, dense_layers: int) -> Times:
        """The running means as the closed forms take them; 0 for what never ran.

        layers, dense_layers: of the model, with and without routed experts.
        """

        def device(stage: str, rows: int) -> float:
            mean = self._device.get((stage, rows))
            return mean.value if mean else 0.0

        none = Average(), Average()
        duck, wire = self._asks.get(1, none)
        duck2, wire2 = self._asks.get(2, none)
        return Times(
            layers=layers,
            dense_layers=dense_layers,
            attend=device("attend", 1),
            attend2=device("attend", 2),
            shared=device("shared", 1),
            shared2=device("shared", 2),
            duck=duck.value,
            duck2=duck2.value,
            wire=wire.value,
            wire2=wire2.value,
            dense=device("dense", 1),
            dense2=device("dense", 2),
            head=device("head", 2),
            combine=device("combine", 1),
            guess=device("guess", 1),
        )


def overlap_efficiency(stages: Sequence[float], wall: float) -> float:
    """(sum of stages - step) / (sum of stages - largest): 0 when nothing overlaps, 1 at best."""
    room = sum(stages) - max(stages, default=0.0)
    return 0.0 if room <= 0 else min(1.0, max(0.0, (sum(stages) - wall) / room))
