"""The lossy residents: the maths they say they do, the same bits however it is done, and by how
much that is off the truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from duck.engine import Engine
from duck.errors import ConfigError, WeightsError, WireError
from duck.kernels import fp8, library
from duck.kernels.experts import LOSSY, NativeExperts, Sizes, pack
from duck.model.weights import ExpertWeights
from duck.node import Kernel, Node
from duck.pack import pack as pack_model
from duck.placement import RESIDENTS
from duck.sampling import Sampling
from duck.slices import ModelSource, Source, StoreSource
from duck.transports.listen import ListeningDuck
from duck.transports.planes import duck_planes
from tests import experts as shared
from tests.checkpoints import make_checkpoint
from tests.experts import (
    ISAS,
    LAYER,
    Case,
    error,
    forward,
    loaded,
    random_ask,
    random_expert,
    truth,
    truth_of_sizes,
)

# The same shapes as for exact residents; the largest with fewer experts, which take long to make.
CASES = [*shared.CASES[:-1], Case(7168, 64, 64, 3, 2, 2)]
# With AVX2 but without its dot products, as processors before 2021 are.
WAYS = [*ISAS, *(["avx2-no-vnni"] if library.native().duck_isa(b"avx2-no-vnni") else [])]
GROUP = {"int8": 128, "int4": 32}
F32 = np.float32

lossy = pytest.mark.parametrize("resident", LOSSY)


def gaussian_expert(rng: np.random.Generator, case: Case) -> ExpertWeights:
    """As trained weights are, about: normal, then quantised to fp8 by the checkpoint's rule."""
    stop = case.start + case.columns
    part = slice(case.start, stop)

    def matrix(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
        values = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        return fp8.quantise(values.astype(F32), (128, 128))

    (gate, gate_scale), (up, up_scale) = matrix(stop, case.hidden), matrix(stop, case.hidden)
    down, down_scale = matrix(case.hidden, stop)
    spread = case.start, case.columns
    return ExpertWeights(
        range(case.start, stop), (128, 128), gate[part], up[part], down[:, part],
        fp8.spread(gate_scale, 128, *spread, axis=0), fp8.spread(up_scale, 128, *spread, axis=0),
        fp8.spread(down_scale, 128, *spread, axis=1),
    )  # fmt: skip


# --- the maths in numpy, in float64 wherever the kernel's own float32 does not decide


def groups(matrix: np.ndarray, size: int) -> np.ndarray:
    """(rows, groups, size), with zeros after the last column."""
    rows, columns = matrix.shape
    padded = np.zeros((rows, -(-columns // size) * size), F32)
    padded[:, :columns] = matrix
    return padded.reshape(rows, -1, size)


def rounded_weights(matrix: np.ndarray, resident: str) -> np.ndarray:
    """(rows, groups, size) float64: whole steps times the step."""
    parts = groups(matrix.astype(F32), GROUP[resident])
    at = np.abs(parts).argmax(axis=2)[..., None]
    largest = np.take_along_axis(parts, at, axis=2)
    if resident == "int8":
        step, low, high = np.abs(largest) / F32(127), -127, 127
    else:
        halves = library.bf16_from_f32(largest / F32(-8))
        step, low, high = library.f32_from_bf16(halves).reshape(largest.shape), -8, 7
    steps = np.divide(parts, step, out=np.zeros_like(parts), where=step != 0)
    return np.clip(np.rint(steps), low, high).astype(np.float64) * step


def rounded_inputs(x: np.ndarray, resident: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows, groups, size) float64, and whether a row has a number close to the middle between two
    steps, where another order of additions may round to the other one: (rows,) bool.
    """
    parts = groups(x, GROUP[resident])
    largest = np.abs(parts).max(axis=2, keepdims=True)
    inverse = np.divide(F32(127), largest, out=np.zeros_like(largest), where=largest != 0)
    steps = parts * inverse
    close = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 2e-4
    return np.rint(steps).astype(np.float64) * (largest / F32(127)), close.any(axis=(1, 2))


def product(weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """(rows of inputs, rows of weights)."""
    return np.einsum("ogk,tgk->to", weights, inputs)


def expected(
    experts: Sequence[ExpertWeights],
    resident: str,
    x: np.ndarray,
    ids: np.ndarray,
    factors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums (T, hidden) float64, and which rows may differ by a step: (T,) bool."""
    out, unsure = np.zeros(x.shape), np.zeros(len(x), bool)
    inputs, _ = rounded_inputs(x, resident)  # the kernel has the same float32 numbers: no doubt
    for expert, weights in enumerate(experts):
        gate, up, down = (rounded_weights(m, resident) for m in weights.dequantise())
        for row, choice in np.argwhere(ids == expert):
            g, u = product(gate, inputs[[row]]), product(up, inputs[[row]])
            h = g / (1 + np.exp(-g)) * u * float(factors[row, choice])
            inner, close = rounded_inputs(h.astype(F32), resident)
            out[row] += product(down, inner)[0]
            unsure[row] |= close[0]
    return out, unsure


@lossy
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_maths_and_the_same_bits_everywhere(case: Case, resident: str) -> None:
    rng = np.random.default_rng(case.hidden)
    experts = [gaussian_expert(rng, case) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    true, unsure = expected(experts, resident, x, ids, weights)
    order = rng.permutation(case.rows)
    first = None
    for isa in WAYS:
        slow = isa == "scalar" and case.rows > 1
        for threads in (3,) if slow else (1, 2, 4):
            with loaded(experts, resident=resident, threads=threads, isa=isa) as native:
                all_rows = forward(native, x, ids, weights)
                shuffled = forward(native, x[order], ids[order], weights[order])
                some = range(0, case.rows, 9 if slow else 1)
                alone = [forward(native, x[[i]], ids[[i]], weights[[i]]) for i in some]
            if first is None:
                first = all_rows
                assert unsure.sum() <= case.rows // 2
                assert error(first[~unsure], true[~unsure]) <= 1e-6
            np.testing.assert_array_equal(all_rows, first)
            np.testing.assert_array_equal(shuffled, first[order])
            np.testing.assert_array_equal(np.concatenate(alone), first[some])


@lossy
@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 40])
def test_every_number_of_rows_for_one_expert(rows: int, resident: str) -> None:
    """Each has its own inner loop."""
    case = Case(384, 70, 60, 2, 2, 40)
    rng = np.random.default_rng(0)
    experts = [gaussian_expert(rng, case) for _ in range(2)]
    x, ids, weights = (part[:rows] for part in random_ask(rng, case))
    first = None
    for isa in WAYS:
        with loaded(experts, resident=resident, isa=isa) as native:
            out = forward(native, x, ids, weights)
            last = forward(native, x[-1:], ids[-1:], weights[-1:])
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)
        np.testing.assert_array_equal(last[0], first[-1])


@settings(max_examples=25)
@given(
    st.integers(1, 300), st.integers(1, 140), st.integers(0, 300), st.integers(1, 5),
    st.integers(1, 9), st.integers(1, 3), st.sampled_from(sorted(LOSSY)), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    hidden: int,
    columns: int,
    start: int,
    experts: int,
    rows: int,
    threads: int,
    resident: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    case = Case(hidden, columns, start, experts, int(rng.integers(1, experts + 1)), rows)
    weights = [random_expert(rng, case) for _ in range(experts)]
    x, ids, factors = random_ask(rng, case)
    ids[rng.random(ids.shape) < 0.2] = -1
    true, unsure = expected(weights, resident, x, ids, factors)
    first = None
    for isa in WAYS:
        with loaded(weights, resident=resident, threads=threads, isa=isa) as native:
            out = forward(native, x, ids, factors)
        first = out if first is None else first
        np.testing.assert_array_equal(out, first)
    # The sums of these may cancel, so measure against their terms.
    size = truth_of_sizes(weights, x, ids, factors)
    assert (np.abs(first - true) <= 2e-6 * size + 1e-30)[~unsure].all()


@pytest.mark.parametrize(
    ("resident", "low", "high"), [("int8", 0.015, 0.022), ("int4", 0.13, 0.17)]
)
def test_how_far_off_they_are(resident: str, low: float, high: float) -> None:
    """The error that the documentation gives, against the fp8 weights."""
    case = Case(2048, 256, 0, 4, 2, 8)
    rng = np.random.default_rng(6)
    experts = [gaussian_expert(rng, case) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    true = truth(experts, x, ids, weights)
    with loaded(experts, resident=resident) as native:
        off = forward(native, x, ids, weights) - true
    rms = float(np.sqrt((off**2).mean() / (true**2).mean()))
    assert low < rms < high
    assert rms == pytest.approx(LOSSY[resident], rel=0.2)


@lossy
@pytest.mark.parametrize("isa", WAYS)
def test_extremes_of_the_steps(isa: str, resident: str) -> None:
    """Every weight and every input at its largest: sums of bytes must not saturate anywhere."""
    codes = np.full((64, 256), 0x7E, np.uint8)  # 448
    codes[::2] |= 0x80
    scale = np.full((64, 2), 1e-4, F32)
    down = np.full((256, 64), 0xFE, np.uint8)
    weights = ExpertWeights(
        range(64), (128, 128), codes, codes, down, scale, scale, np.full((2, 64), 1e-4, F32)
    )
    x = np.stack([np.full(256, 3.0, F32), np.full(256, -3.0, F32)])
    ids, factors = np.zeros((2, 1), np.int32), np.ones((2, 1), F32)
    true = truth([weights], x, ids, factors)
    with loaded([weights], resident=resident, isa=isa) as native:
        out = forward(native, x, ids, factors)
    # All weights are whole numbers of steps; only int4's step itself is rounded, three times.
    assert error(out, true) < {"int8": 1e-5, "int4": 0.02}[resident]


@lossy
def test_nothing_but_zeros(resident: str) -> None:
    case = Case(200, 43, 0, 2, 2, 3)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case) for _ in range(2)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, resident=resident) as native:
        assert not forward(native, np.zeros_like(x), ids, weights).any()
    for each in experts:
        each.down[:] = 0
    with loaded(experts, resident=resident) as native:
        assert not forward(native, x, ids, weights).any()


@lossy
@pytest.mark.parametrize("isa", WAYS)
def test_what_is_not_finite_spoils_its_own_row_only(isa: str, resident: str) -> None:
    case = Case(256, 64, 0, 3, 2, 12)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case) for _ in range(3)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, resident=resident, isa=isa, threads=2) as native:
        clean = forward(native, x, ids, weights)
        assert np.isfinite(clean).all()
        for bad in (np.nan, np.inf, -np.inf, 3e38, -3e38):
            spoiled = x.copy()
            spoiled[4, 17] = bad
            out = forward(native, spoiled, ids, weights)
            assert np.isnan(out[4]).all()
            np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(clean, 4, 0))
        factors = weights.copy()
        factors[2, 0] = np.nan
        assert np.isnan(forward(native, x, ids, factors)[2]).all()


@lossy
@pytest.mark.parametrize("stored", ["bf16", "f32"])
def test_from_other_checkpoints(stored: str, resident: str) -> None:
    rng = np.random.default_rng(5)
    case = CASES[3]

    def matrix(*shape: int) -> np.ndarray:
        values = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(F32)
        return library.bf16_from_f32(values) if stored == "bf16" else values

    size = case.columns, case.hidden
    experts = [
        ExpertWeights(
            range(case.columns), None, matrix(*size), matrix(*size), matrix(*size[::-1]),
            None, None, None,
        )
        for _ in range(case.experts)
    ]  # fmt: skip
    x, ids, weights = random_ask(rng, case)
    true, unsure = expected(experts, resident, x, ids, weights)
    with loaded(experts, resident=resident) as native:
        out = forward(native, x, ids, weights)
    assert not unsure.all()
    assert error(out[~unsure], true[~unsure]) <= 1e-6


@lossy
def test_packed_elsewhere_adopted_and_damaged(resident: str) -> None:
    case = CASES[3]
    rng = np.random.default_rng(4)
    experts = [gaussian_expert(rng, case) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, resident=resident) as native:
        expected_bits = forward(native, x, ids, weights)
    sizes = Sizes.of(case.hidden, case.columns, resident)
    native = NativeExperts([LAYER], case.experts, case.hidden, case.columns, resident=resident)
    assert native.nbytes == case.experts * sizes.record_bytes
    for index, each in enumerate(experts):
        record = np.empty(sizes.record_bytes, np.uint8)
        pack(each, resident, record, np.empty(0, F32))
        native.records(LAYER)[index] = record
        native.adopt(LAYER, index, case.start)
    np.testing.assert_array_equal(forward(native, x, ids, weights), expected_bits)

    # Any byte may be a weight; a step must be a number: the first of the record, or one of the
    # last group of all.
    record = native.records(LAYER)[2]
    record[300:1100] = np.arange(800)  # weights of the first group
    native.adopt(LAYER, 2, case.start)
    assert np.isfinite(forward(native, x, ids, weights)).all()
    last = {"int8": (64 * 4 + 64 * 64), "int4": 64 * 2 + 32 * 32}[resident]
    for at in (0, -last):
        before = record.copy()
        record[at : at + 4 or None] = 0xFF
        with pytest.raises(WeightsError, match="layer 3 expert 2: a weight or scale is NaN"):
            native.adopt(LAYER, 2, case.start)
        record[:] = before
    experts[0].gate[3, 3] = 0x7F
    with pytest.raises(WeightsError, match="NaN or infinite"):
        native.load(LAYER, 0, experts[0])
    native.close()


def test_real_sizes() -> None:
    weights = 3 * 7168 * 64
    assert 8 * Sizes.of(7168, 64, "int8").record_bytes / weights == pytest.approx(8.33, abs=0.01)
    assert 8 * Sizes.of(7168, 64, "int4").record_bytes / weights == 4.5
    assert set(LOSSY) < set(RESIDENTS)


# --- chosen by the host


@lossy
async def test_the_demo_runs_on_them(resident: str) -> None:
    prompt = list(b"Once upon a time there was")
    sampling = Sampling(max_tokens=16, ignore_eos=True)
    logits = {}
    for experts in ("exact", resident):
        with capture_logs() as events:
            async with Engine.open("demo", transport="loopback", experts=experts) as engine:
                done = await engine.generate(prompt, sampling)
                logits[experts] = await engine.score(prompt)
        assert len(done.token_ids) == 16
        told = [event for event in events if event["event"] == "lossy_experts"]
        assert len(told) == (experts != "exact")
        assert all(event["experts"] == experts for event in told)
    off = logits[resident] - logits["exact"]
    rms = float(np.sqrt((off**2).mean() / logits["exact"].var()))
    assert 1e-4 < rms < 0.5


@lossy
async def test_one_answer_however_the_slices_get_there(resident: str, tmp_path: Path) -> None:
    """From the model, from a packed store, and into an empty one."""
    model = make_checkpoint(tmp_path / "model", seed=3)
    pack_model(model, [1, 1], tmp_path / "packed", experts=resident)
    sources = [
        StoreSource(tmp_path / "packed" / "duck-000"), StoreSource(tmp_path / "empty"),
        ModelSource(model), ModelSource(model),
    ]  # fmt: skip

    async def answer(**options: str) -> list[int]:
        async with Engine.open(model, experts=resident, **options) as engine:
            sampling = Sampling(max_tokens=12, ignore_eos=True)
            return (await engine.generate([5, 80, 33], sampling)).token_ids

    plain = await answer(transport="loopback")
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(serving(source)) for source in sources]
        for pair in (addresses[:2], addresses[2:]):
            assert await answer(ducks=",".join(pair)) == plain
        with pytest.raises(WireError, match=rf"holds .*{resident}\), not .*fp8\): use another"):
            async with Engine.open(model, ducks=",".join(addresses[:2])):
                pass
    layers = sorted((tmp_path / "packed" / "duck-001").glob("layer-*"))
    assert layers
    for packed in layers:
        assert (tmp_path / "empty" / packed.name).read_bytes() == packed.read_bytes()


@asynccontextmanager
async def serving(source: Source) -> AsyncIterator[str]:
    """A duck on a port of its own; gives its address."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    end = ListeningDuck("127.0.0.1:0", ready.set_result, duck_planes())
    task = asyncio.create_task(end.serve(Node(source, Kernel(threads=1))))
    try:
        yield await ready
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@lossy
def test_a_rounded_slice_is_another_slice(resident: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", seed=0)
    (exact,) = pack_model(model, [1], tmp_path / "exact")
    (rounded,) = pack_model(model, [1], tmp_path / "rounded", experts=resident)
    assert rounded.slice.hash != exact.slice.hash
    assert rounded.to_json()["resident"] == rounded.slice.resident == resident
    with pytest.raises(ConfigError, match=rf"holds .*{resident}\), not .*fp8\)"):
        pack_model(model, [1], tmp_path / "rounded")
