"""The router in Triton: float32 logits, then the choice of experts.

The gate (256 x 7168 float32 in V3, 7 MiB) is read once a row, from the L2 cache after the first, by
some hundreds of programs: each multiplies a few experts' rows by a part of the row and leaves a
partial sum. A second kernel, a program a row, adds those up and chooses. It is bound by the
time a kernel takes to start.

Choices are made on whole numbers, whose maximum over a warp is one instruction. Of equal ones the
lower index wins, and what is not a number counts as the largest: as in the reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duck.kernels.reference.router import Rule

FEW = 16
"""Rows that are multiplied here; with more, torch's product is faster."""

_BLOCK_E = 8
_BLOCK_K = 256
_PER_SPLIT = 4  # blocks of k


@triton.jit(do_not_specialize=["rows"])
def _logits(
    h,
    gate,
    out,
    rows,
    experts,
    k,
    h_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SPLIT: tl.constexpr,
):
    """Partial sums of h @ gate.T. Grid: (tiles of experts, splits, rows).

    h: (rows, k); gate: (experts, k) float32; out: (splits, rows, experts) float32.
    """
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    split, row = tl.program_id(1), tl.program_id(2)
    sums = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
    for block in tl.static_range(PER_SPLIT):
        at = (split * PER_SPLIT + block) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(h + row * h_stride + at, mask=at < k, other=0.0).to(tl.float32)
        inside = (expert < experts)[:, None] & (at < k)[None, :]
        w = tl.load(gate + expert[:, None] * k + at[None, :], mask=inside, other=0.0)
        sums += w * x[None, :]
    place = out + (split * rows + row) * experts + expert
    tl.store(place, tl.sum(sums, axis=1), mask=expert < experts)


@triton.jit
def _sortable(values):
    """int32 numbers in the order of float32 values, all above LEAST; NaN is the largest."""
    values = tl.where(values == 0, 0.0, values)  # -0 is 0
    bits = values.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(values == values, ordered, 0x7FFFFFFF)


@triton.jit
def _first_largest(keys, index, AXIS: tl.constexpr):
    """The index of the largest key along an axis (None: of all); of equal ones the lowest."""
    top = tl.max(keys, axis=AXIS, keep_dims=True)
    return tl.min(tl.where(keys == top, index, 0x7FFFFFFF), axis=AXIS, keep_dims=True)


@triton.jit(do_not_specialize=["splits", "rows"])
def _choose(
    partials,
    bias,
    ids,
    weights,
    splits,
    rows,
    experts,
    size,
    scale,
    COUNT: tl.constexpr,
    KEPT: tl.constexpr,
    SIGMOID: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The top COUNT experts of a row and their weights. Grid: (rows).

    partials: (splits, rows, experts). ids, weights: (rows, COUNT). Experts stand in a table of
    groups, `size` in each; GROUPS, SIZE and SLOTS are powers of two that hold groups, size, COUNT.
    """
    LEAST: tl.constexpr = -(2**31)
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    index = group * size + place
    inside = (place < size) & (index < experts)

    # All at once: a loop would wait for the memory at every turn.
    split = tl.arange(0, SPLITS)[:, None, None]
    at = partials + (split * rows + row) * experts + index[None, :, :]
    logits = tl.sum(tl.load(at, mask=(split < splits) & inside[None, :, :], other=0.0), axis=0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        shown = tl.where(inside, logits, float("-inf"))
        # With a NaN all scores are NaN: it must not be lost in the maximum.
        sick = tl.max(tl.where(shown == shown, 0, 1))
        powers = tl.exp(shown - tl.max(shown))
        scores = powers / tl.sum(powers)
        scores = tl.where(sick == 1, float("nan"), scores)
    choice = scores
    if BIAS:
        choice += tl.load(bias + index, mask=inside, other=0.0)

    keys = tl.where(inside, _sortable(choice), LEAST)
    if GROUPED:
        best = index == _first_largest(keys, index, 1)
        strength = tl.sum(tl.where(best, choice, 0.0), axis=1, keep_dims=True)
        if PAIRS:
            rest = tl.where(best, LEAST, keys)
            second = index == _first_largest(rest, index, 1)
            strength += tl.sum(tl.where(second, choice, 0.0), axis=1, keep_dims=True)
        standing = tl.where(group * size < experts, _sortable(strength), LEAST)
        dropped = tl.where(inside, _sortable(tl.where(inside, float("-inf"), 0.0)), LEAST)
        kept = dropped
        for _ in tl.static_range(KEPT):
            top = group == _first_largest(standing, group, 0)
            kept = tl.where(top, keys, kept)
            standing = tl.where(top, LEAST, standing)
        keys = kept

    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    sizes = tl.zeros((SLOTS,), tl.int32)
    # Scores are not negative, so their bits sort as they do.
    bits = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    for number in tl.static_range(COUNT):
        top = tl.max(keys)
        expert = tl.min(tl.where(keys == top, index, 0x7FFFFFFF))
        here = index == expert
        chosen = tl.where(slot == number, expert, chosen)
        sizes = tl.where(slot == number, tl.max(tl.where(here & inside, bits, 0)), sizes)
        keys = tl.where(here, LEAST, keys)
    weight = sizes.to(tl.float32, bitcast=True)
    if NORMALISE:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    inside = slot < COUNT
    tl.store(ids + row * COUNT + slot, chosen, mask=inside)
    tl.store(weights + row * COUNT + slot, weight * scale, mask=inside)


def route(h: Tensor, gate: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """As reference.router.route. h: (T, hidden), rows contiguous in themselves."""
    return _chosen(_partials(h, gate), bias, rule)


def choose(logits: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    """As reference.router.choose."""
    return _chosen(logits.contiguous()[None], bias, rule)


def _partials(h: Tensor, gate: Tensor) -> Tensor:
    """(splits, T, experts) float32, to be added up."""
    rows, k = h.shape
    if rows > FEW:
        return F.linear(h.float(), gate)[None]
    assert h.stride(1) == 1
    experts = gate.shape[0]
    splits = triton.cdiv(k, _BLOCK_K * _PER_SPLIT)
    out = gate.new_empty(splits, rows, experts)
    if rows:
        _logits[triton.cdiv(experts, _BLOCK_E), splits, rows](
            h,
            gate,
            out,
            rows,
            experts,
            k,
            h.stride(0),
            BLOCK_E=_BLOCK_E,
            BLOCK_K=_BLOCK_K,
            PER_SPLIT=_PER_SPLIT,
            enable_fp_fusion=False,
        )
    return out


def _chosen(partials: Tensor, bias: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    splits, rows, experts = partials.shape
    ids = partials.new_empty(rows, rule.count, dtype=torch.int32)
    weights = partials.new_empty(rows, rule.count)
    size = experts // rule.groups
    if rows:
        _choose[(rows,)](
            partials,
            partials if bias is None else bias,
            ids,
            weights,
            splits,
            rows,
            experts,
            size,
            rule.scale,
            COUNT=rule.count,
            KEPT=rule.kept,
            SIGMOID=rule.sigmoid,
            PAIRS=rule.pairs,
            NORMALISE=rule.normalise,
            BIAS=bias is not None,
            GROUPED=rule.groups > 1,
            GROUPS=triton.next_power_of_2(rule.groups),
            SIZE=triton.next_power_of_2(size),
            SLOTS=triton.next_power_of_2(rule.count),
            SPLITS=triton.next_power_of_2(splits),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return ids, weights
