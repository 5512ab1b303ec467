"""How long a decode step takes under each schedule, as formulas over a few measured times.

Pure. `auto` chooses by these, and `duck.plan.simulate`, which plays a step out event by event, is
compared with them. L MoE layers, G attention of one row, G2 of two, S shared expert, D a duck's
time for one row, N the wire there and back, ov the share of experts that neighbouring rows have in
common:

    serial    L (G2 + S + N2 + D (2 - ov)) + C
    batch     L (G2 + max(S, N2 + D (2 - ov))) + C
    wave      L max(2 (G + S), 2 D, G + N1 + D) + C' + G
    pingpong  L max(l, m p) + C + (m - 1) (c - max(p, l / m))    m groups that alternate

C is what a step does once: dense layers, head and choice for the tokens and for the draft, the MTP
layer; C' runs the dense layers of both rows one after the other. In pingpong l is a layer of a lone
batch, p = max(G2 + S, D (2 - ov)) what a group takes of the busier of device and ducks, and c the
device's part of C: groups that started a layer's part apart also end so, and wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a decode step is made of: milliseconds, unless a comment says otherwise."""

    attend: float  # one row of one layer: norms, attention, router, and merging the answers
    shared: float  # the shared expert, one row or two
    expert: float  # the slowest duck, one row of one layer
    second_row: float = 0.05  # share: how much each further row of a batch adds to `attend`
    common: float = 0.20  # share of a row's experts that the row before it also asked for
    out_fixed: float = 0.025  # an ask on its way, however long
    out_row: float = 0.048  # and for each row
    back_fixed: float = 0.040  # an answer on its way
    back_row: float = 0.048
    moe_layers: int = 58  # a count
    dense_layers: int = 3  # a count
    dense: float = 0.28  # the MLP of a dense layer, one row or two
    head: float = 1.2  # the last norm and the head, one row or two
    combine: float = 0.13  # the MTP layer's input, before its attention
    host: float = 0.15  # choosing a token from logits, beside the head
    accept: float = 0.871  # share of drafts that are accepted

    def attend_rows(self, rows: int) -> float:
        """Attention of a batch of rows."""
        return self.attend * (1 + self.second_row * (rows - 1))

    def expert_rows(self, rows: int) -> float:
        """The slowest duck for an ask of rows: common experts are read once."""
        return self.expert * (rows - self.common * (rows - 1))

    def out(self, rows: int) -> float:
        """An ask's way to the ducks."""
        return self.out_fixed + self.out_row * rows

    def back(self, rows: int) -> float:
        """The answers' way back."""
        return self.back_fixed + self.back_row * rows

    def flight(self, rows: int) -> float:
        """From an ask's sending to its answers, on idle ducks."""
        return self.out(rows) + self.expert_rows(rows) + self.back(rows)

    def tokens(self, *, draft: bool) -> float:
        """How many tokens a step settles, on average."""
        return 1 + self.accept if draft else 1.0


# 32 ducks at 22 GB/s behind 2.5 GbE: with the device times that explain the published 15.3 tokens a
# second of the original, and with attention tuned to the memory's speed.
ORIGINAL = Times(attend=0.651, shared=0.05, expert=0.58)
TUNED = Times(attend=0.20, shared=0.035, expert=0.58)


def serial(times: Times, *, draft: bool) -> float:
    """Nothing overlaps: milliseconds a step of one row, or of two with a draft."""
    rows = 1 + draft
    layer = times.attend_rows(rows) + times.shared + times.flight(rows)
    return times.moe_layers * layer + _once(times, rows) + draft * _mtp(times, overlapped=False)


def batch(times: Times, *, draft: bool) -> float:
    """All rows in one ask, the shared expert while it flies."""
    rows = 1 + draft
    layer = times.attend_rows(rows) + max(times.shared, times.flight(rows))
    return times.moe_layers * layer + _once(times, rows) + draft * _mtp(times, overlapped=True)


def wave(times: Times) -> float:
    """The sure row and the guess as two lanes, half a layer apart; needs drafts."""
    # The bound that is met: the device, the ducks, or the sure lane's own way.
    layer = max(
        2 * (times.attend + times.shared),
        2 * times.expert,
        times.attend + times.flight(1),
    )
    dense = times.dense_layers * (times.attend + times.dense)
    once = _once(times, 1) + dense + _mtp(times, overlapped=True)
    return times.moe_layers * layer + once + times.attend


def pingpong(times: Times, groups: int, *, draft: bool) -> float:
    """Groups alternate, each a batch: milliseconds in which every group makes one step."""
    rows = 1 + draft
    attend = times.attend_rows(rows)
    lone = attend + max(times.shared, times.flight(rows))
    part = max(attend + times.shared, times.expert_rows(rows))
    once = device = _once(times, rows)
    if draft:
        once += _mtp(times, overlapped=True)
        device += times.combine + times.attend_rows(2) + times.shared + times.head + times.host
    waits = (groups - 1) * max(0.0, device - max(part, lone / groups))
    return times.moe_layers * max(lone, groups * part) + once + waits


def bound(times: Times, *, rows: int, together: bool) -> float:
    """No order of work is faster: the busiest of device and ducks, milliseconds a step.

    rows: 2 with a draft; together: the rows share an ask, and so the experts they have in common.
    """
    asks = 1 if together else rows
    each = rows if together else 1
    device = times.moe_layers * asks * (times.attend_rows(each) + times.shared)
    device += times.dense_layers * asks * (times.attend_rows(each) + times.dense)
    device += times.head + times.host
    ducks = times.moe_layers * asks * times.expert_rows(each)
    if rows > 1:
        device += times.combine + times.attend_rows(rows) + times.shared + times.head + times.host
        ducks += times.expert
    return max(device, ducks)


def _once(times: Times, rows: int) -> float:
    dense = times.dense_layers * (times.attend_rows(rows) + times.dense)
    return dense + times.head + times.host


def _mtp(times: Times, *, overlapped: bool) -> float:
    """The draft: both rows write KV, the last one alone asks for experts; then head and choice."""
    shared, flight = times.shared, times.flight(1)
    experts = max(shared, flight) if overlapped else shared + flight
    return times.combine + times.attend_rows(2) + experts + times.head + times.host
