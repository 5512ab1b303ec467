"""Whatever the sizes, every column lies on exactly one duck."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duck.errors import ConfigError
from duck.placement import TILE, equal_slices, weighted_slices


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_every_column_exactly_once_and_evenly(columns: int, ducks: int) -> None:
    if ducks > columns:
        with pytest.raises(ConfigError):
            equal_slices(columns, ducks)
        return
    slices = equal_slices(columns, ducks)
    assert len(slices) == ducks
    assert slices[0].start == 0
    assert slices[-1].stop == columns
    assert all(a.stop == b.start for a, b in itertools.pairwise(slices))
    sizes = [len(s) for s in slices]
    assert min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)
    tiles = columns % TILE == 0 and columns >= TILE * ducks
    if tiles:
        assert all(size % TILE == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= (TILE if tiles else 1)


@given(st.integers(1, 64), st.integers(1, 64))
def test_tiles_whenever_there_is_one_for_every_duck(tiles: int, ducks: int) -> None:
    if ducks <= tiles:
        slices = equal_slices(tiles * TILE, ducks)
        assert all(len(s) % TILE == 0 for s in slices)


@given(st.integers(1, 4096), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=70))
def test_weighted_slices_follow_the_weights(columns: int, weights: list[float]) -> None:
    ducks = len(weights)
    if ducks > columns:
        with pytest.raises(ConfigError):
            weighted_slices(columns, weights)
        return
    slices = weighted_slices(columns, weights)
    assert [column for s in slices for column in s] == list(range(columns))
    sizes = [len(s) for s in slices]
    unit = TILE if columns % TILE == 0 and columns >= TILE * ducks else 1
    assert all(size % unit == 0 and size for size in sizes)
    # A heavier duck never gets less.
    by_weight = sorted(zip(weights, sizes, strict=True))
    assert all(a[1] <= b[1] or a[0] == b[0] for a, b in itertools.pairwise(by_weight))
    # Within one unit of its share, unless one unit for everybody takes more than that.
    shares = [columns * weight / sum(weights) for weight in weights]
    if min(shares) >= unit:
        assert all(abs(n - share) < unit * 1.001 for n, share in zip(sizes, shares, strict=True))
