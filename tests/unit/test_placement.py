"""Who holds what: the slices users meet, their refusals, and what the hashes depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from duck import placement, wire
from duck.errors import ConfigError, WireError
from duck.placement import Plan, equal_slices, weighted_slices

PLAN = Plan(
    model="digest",
    layers=(1, 2, 5),
    experts=16,
    columns=192,
    slices=equal_slices(192, 3),
    shape=wire.Shape(160, 4, ask_dtype="float32", answer_dtype="bfloat16", max_rows=256),
)


def test_the_real_model_on_32_ducks() -> None:
    assert [len(columns) for columns in equal_slices(2048, 32)] == [64] * 32


@pytest.mark.parametrize(
    ("columns", "ducks", "sizes"),
    [
        (192, 1, [192]),
        (192, 2, [128, 64]),
        (192, 3, [64, 64, 64]),
        (192, 5, [39, 39, 38, 38, 38]),  # fewer than 64 each: as even as possible
        (200, 3, [67, 67, 66]),  # no multiple of 64
        (3, 3, [1, 1, 1]),
    ],
)
def test_equal_slices(columns: int, ducks: int, sizes: list[int]) -> None:
    slices = equal_slices(columns, ducks)
    assert [len(s) for s in slices] == sizes
    assert [column for s in slices for column in s] == list(range(columns))


@pytest.mark.parametrize(
    ("columns", "weights", "sizes"),
    [
        (2048, [2, 1, 1], [1024, 512, 512]),
        (2048, [3, 2, 2], [896, 576, 576]),
        (192, [1000, 1, 1], [64, 64, 64]),  # a tile each, whatever the weights
        (256, [1000, 1, 1], [128, 64, 64]),
        (128, [3, 1, 1], [77, 26, 25]),  # fewer than 64 each: single columns
        (100, [0.5, 0.25, 0.25], [50, 25, 25]),
    ],
)
def test_weighted_slices(columns: int, weights: list[float], sizes: list[int]) -> None:
    slices = weighted_slices(columns, weights)
    assert [len(s) for s in slices] == sizes
    assert [column for s in slices for column in s] == list(range(columns))


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
def test_a_weight_that_is_none(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"weight .*above 0"):
        weighted_slices(192, [1, weight])


@pytest.mark.parametrize("ducks", [0, -1, 193])
def test_more_ducks_than_columns(ducks: int) -> None:
    with pytest.raises(ConfigError, match=r"192 columns.*1\.\.192 ducks"):
        equal_slices(192, ducks)


def test_plan_comes_back_from_the_wire() -> None:
    assert Plan.from_wire(PLAN.to_wire()) == PLAN
    assert Plan.from_wire(PLAN.to_wire()).hash() == PLAN.hash()


OTHER = {
    "model": replace(PLAN, model="other"),
    "layers": replace(PLAN, layers=(1, 2)),
    "experts": replace(PLAN, experts=17),
    "columns": replace(PLAN, columns=128, slices=equal_slices(128, 2)),
    "slices": replace(PLAN, slices=equal_slices(192, 2)),
    "hidden": replace(PLAN, shape=replace(PLAN.shape, hidden=161)),
    "top_k": replace(PLAN, shape=replace(PLAN.shape, top_k=5)),
    "ask_dtype": replace(PLAN, shape=replace(PLAN.shape, ask_dtype="bfloat16")),
    "answer_dtype": replace(PLAN, shape=replace(PLAN.shape, answer_dtype="float32")),
    "max_rows": replace(PLAN, shape=replace(PLAN.shape, max_rows=255)),
    "resident": replace(PLAN, resident="bf16"),
}


def test_every_field_is_part_of_the_plans_hash() -> None:
    assert set(OTHER) == set(PLAN.to_wire())
    hashes = {PLAN.hash(), *(other.hash() for other in OTHER.values())}
    assert len(hashes) == 1 + len(OTHER)


def test_hashes_are_the_same_in_every_process() -> None:
    """Compared between machines: nothing of Python's own hashing may enter."""
    assert PLAN.hash()[:16] == "183cb62455e4279d"
    assert PLAN.slice_hash(1)[:16] == "4c692c01e4d84452"


def test_slice_hash_is_of_the_bytes_a_duck_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    same = ["top_k", "ask_dtype", "answer_dtype", "max_rows"]
    assert {OTHER[name].slice_hash(0) for name in same} == {PLAN.slice_hash(0)}
    # (0, 64) of three ducks and (0, 128) of two; another model; other columns, residents, layouts
    hashes = {PLAN.slice_hash(duck) for duck in range(3)}
    hashes |= {OTHER[name].slice_hash(0) for name in ("model", "columns", "slices", "resident")}
    monkeypatch.setattr(placement, "LAYOUT", placement.LAYOUT + 1)
    hashes.add(PLAN.slice_hash(0))
    assert len(hashes) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("layers", []),
        ("layers", [2, 1]),
        ("layers", [1, 1]),
        ("layers", [-1, 1]),
        ("layers", [True]),
        ("layers", [1 << 14]),
        ("layers", "12"),
        ("experts", 0),
        ("experts", True),
        ("experts", 1.5),
        ("experts", (1 << 15) + 1),
        ("columns", 191),
        ("columns", 193),
        ("columns", 1 << 21),
        ("hidden", 1 << 21),
        ("top_k", 1 << 11),
        ("max_rows", 1 << 17),
        ("slices", []),
        ("slices", [[0, 64], [65, 192]]),
        ("slices", [[0, 64], [63, 192]]),
        ("slices", [[0, 192], [192, 192]]),
        ("slices", [[0, 192, 5]]),
        ("slices", [[0, 192.0]]),
        ("slices", [192]),
        ("slices", [[0, 193]]),
        ("ask_dtype", "float64"),
        ("answer_dtype", "x" * 100_000),
        ("answer_dtype", None),
        ("resident", "int3"),
    ],
)
def test_plan_that_no_host_may_send(field: str, value: object) -> None:
    with pytest.raises(WireError) as caught:
        Plan.from_wire({**PLAN.to_wire(), field: value})
    assert len(str(caught.value)) < 300


def test_plan_whose_asks_are_too_big() -> None:
    """Each number alone is allowed; a duck would reserve gigabytes for their product."""
    with pytest.raises(WireError, match="at most"):
        Plan.from_wire({**PLAN.to_wire(), "hidden": 1 << 20, "max_rows": 1 << 16})


def test_plan_with_a_missing_field() -> None:
    for name in PLAN.to_wire():
        with pytest.raises(WireError, match=name):
            Plan.from_wire({key: value for key, value in PLAN.to_wire().items() if key != name})
