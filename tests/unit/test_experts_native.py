"""The native expert kernel: exact against float64, and the same bits however the work is cut."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duck import wire
from duck.errors import ConfigError, WeightsError
from duck.kernels import bench, build, library
from duck.kernels.experts import NativeExperts, Sizes, pack, resident_for
from duck.model.weights import ExpertWeights
from tests.experts import (
    CASES,
    ISAS,
    LAYER,
    Case,
    error,
    forward,
    loaded,
    random_ask,
    random_codes,
    random_expert,
    truth,
    truth_of_sizes,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_and_the_same_bits_everywhere(case: Case) -> None:
    rng = np.random.default_rng(case.hidden)
    experts = [random_expert(rng, case) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    true = truth(experts, x, ids, weights)
    order = rng.permutation(case.rows)
    first = None
    for isa in ISAS:
        slow = isa == "scalar" and case.rows > 1
        for threads in (3,) if slow else (1, 2, 3, 4):
            with loaded(experts, threads=threads, isa=isa) as native:
                all_rows = forward(native, x, ids, weights)
                shuffled = forward(native, x[order], ids[order], weights[order])
                some = range(0, case.rows, 9 if slow else 1)
                alone = [forward(native, x[[i]], ids[[i]], weights[[i]]) for i in some]
            if first is None:
                first = all_rows
                assert error(first, true) <= 1e-6
            np.testing.assert_array_equal(all_rows, first)
            np.testing.assert_array_equal(shuffled, first[order])
            np.testing.assert_array_equal(np.concatenate(alone), first[some])


@pytest.mark.parametrize("rows", [*range(1, 14), 17, 24, 25, 40])
def test_every_number_of_rows_for_one_expert(rows: int) -> None:
    """Each has its own inner loop."""
    case = Case(384, 70, 60, 2, 2, 40)
    rng = np.random.default_rng(0)
    experts = [random_expert(rng, case) for _ in range(2)]
    x, ids, weights = random_ask(rng, case)
    true = truth(experts, x, ids, weights)
    for isa in ISAS:
        with loaded(experts, isa=isa) as native:
            out = forward(native, x[:rows], ids[:rows], weights[:rows])
            assert error(out, true[:rows]) <= 1e-6
            last = forward(
                native, x[rows - 1 : rows], ids[rows - 1 : rows], weights[rows - 1 : rows]
            )
            np.testing.assert_array_equal(last[0], out[-1])


@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[7]], ids=str)
def test_rare_subnormals_count_in_full(case: Case) -> None:
    """Where they are rare they are kept apart from the tiles: see native/resident.h."""
    rng = np.random.default_rng(7)
    experts = [random_expert(rng, case, subnormal=0.02) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    without = [
        replace(
            each,
            gate=np.where((each.gate & 0x78) == 0, 0, each.gate),
            up=np.where((each.up & 0x78) == 0, 0, each.up),
            down=np.where((each.down & 0x78) == 0, 0, each.down),
        )
        for each in experts
    ]
    true = truth(experts, x, ids, weights)
    assert error(truth(without, x, ids, weights), true) > 5e-6, "they must matter"
    first = None
    for isa in ISAS:
        for threads in (1, 3):
            with loaded(experts, threads=threads, isa=isa) as native:
                out = forward(native, x, ids, weights)
                one = forward(native, x[-1:], ids[-1:], weights[-1:])
            first = out if first is None else first
            assert error(out, true) <= 1e-6
            np.testing.assert_array_equal(out, first)
            np.testing.assert_array_equal(one, first[-1:])


@pytest.mark.parametrize("resident", ["bf16", "f32"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[6]], ids=str)
def test_other_residents(case: Case, resident: str) -> None:
    rng = np.random.default_rng(5)

    def matrix(*shape: int) -> np.ndarray:
        values = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        return library.bf16_from_f32(values) if resident == "bf16" else values

    columns = range(case.start, case.start + case.columns)
    size = case.columns, case.hidden
    experts = [
        ExpertWeights(columns, None, matrix(*size), matrix(*size), matrix(*size[::-1]), *[None] * 3)
        for _ in range(case.experts)
    ]
    x, ids, weights = random_ask(rng, case)
    true = truth(experts, x, ids, weights)
    first = None
    for isa in ISAS:
        for threads in (1, 2):
            with loaded(experts, resident=resident, threads=threads, isa=isa) as native:
                out = forward(native, x, ids, weights)
                one = forward(native, x[-1:], ids[-1:], weights[-1:])
            first = out if first is None else first
            assert error(out, true) <= 1e-6
            np.testing.assert_array_equal(out, first)
            np.testing.assert_array_equal(one, first[-1:])


def test_other_blocks_are_held_dequantised() -> None:
    rng = np.random.default_rng(2)
    case = Case(96, 20, 30, 2, 2, 3)
    block = (48, 32)
    columns = range(30, 50)
    experts = []
    for _ in range(2):
        parts = [random_codes(rng, *shape) for shape in ((20, 96), (20, 96), (96, 20))]
        scales = [
            rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
            for shape in ((20, 3), (20, 3), (2, 20))
        ]
        experts.append(ExpertWeights(columns, block, *parts, *scales))
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, resident=resident_for("F8_E4M3", block)) as native:
        assert native.resident == "f32"
        assert error(forward(native, x, ids, weights), truth(experts, x, ids, weights)) <= 1e-6
    experts[0].up[7, 8] = 0xFF
    with pytest.raises(WeightsError, match="expert 0: a weight or scale is NaN"):
        NativeExperts([0], 1, 96, 20, resident="f32").load(0, 0, experts[0])
    with pytest.raises(WeightsError, match=r"fp8 cannot hold weights of uint8 in blocks of \(48"):
        NativeExperts([0], 1, 96, 20).load(0, 0, experts[0])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 140), st.integers(0, 300), st.integers(1, 5),
    st.integers(1, 9), st.integers(1, 3), st.sampled_from(ISAS), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    hidden: int,
    columns: int,
    start: int,
    experts: int,
    rows: int,
    threads: int,
    isa: str,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    case = Case(hidden, columns, start, experts, int(rng.integers(1, experts + 1)), rows)
    weights = [random_expert(rng, case, subnormal=0.1) for _ in range(experts)]
    x, ids, factors = random_ask(rng, case)
    ids[rng.random(ids.shape) < 0.2] = -1
    true = truth(weights, x, ids, factors)
    # The sums of these may cancel, so measure against their terms.
    size = truth_of_sizes(weights, x, ids, factors)
    with loaded(weights, threads=threads, isa=isa) as native:
        out = forward(native, x, ids, factors)
    assert (np.abs(out - true) <= 2e-6 * size + 1e-30).all()


def test_silu() -> None:
    """Through the whole kernel: one column, whose gate is v and whose up is 1."""
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.uniform(-100, 100, 3000), rng.uniform(-1, 1, 3000), np.geomspace(1e-30, 1, 200), [0.0]]
    ).astype(np.float32)
    x = np.zeros((len(values), 2), np.float32)
    x[:, 0], x[:, 1] = values, 1
    one, none = np.float32(1), np.float32(0)
    weights = ExpertWeights(
        range(1), None, np.array([[one, none]]), np.array([[none, one]]), np.array([[one], [none]]),
        None, None, None,
    )  # fmt: skip
    ids, factors = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), np.float32)
    wide = values.astype(np.float64)
    true = wide / (1 + np.exp(-wide))
    outs = []
    for isa in ISAS:
        with loaded([weights], resident="f32", isa=isa) as native:
            outs.append(forward(native, x, ids, factors)[:, 0])
    # exp is clamped at e^88: below that silu is less than 1e-36 and of no account.
    np.testing.assert_allclose(outs[0], true, rtol=3e-7, atol=1e-36)
    for out in outs:
        np.testing.assert_array_equal(out, outs[0])


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_spoils_its_own_row_only(isa: str) -> None:
    case = Case(256, 64, 0, 3, 2, 12)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case) for _ in range(3)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, isa=isa, threads=2) as native:
        clean = forward(native, x, ids, weights)
        for bad in (np.nan, np.inf, -np.inf, 3e38, -3e38):
            spoiled = x.copy()
            spoiled[4, 17] = bad
            out = forward(native, spoiled, ids, weights)
            assert np.isnan(out[4]).all()
            np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(clean, 4, 0))
        factors = weights.copy()
        factors[2, 0] = np.nan
        assert np.isnan(forward(native, x, ids, factors)[2]).all()


@pytest.mark.parametrize("subnormal", [1.0, 0.02])
@pytest.mark.parametrize("isa", ISAS)
def test_the_callers_float_mode_does_not_matter(isa: str, subnormal: float) -> None:
    torch = pytest.importorskip("torch")
    case = Case(256, 64, 0, 3, 2, 3)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case, subnormal) for _ in range(3)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, isa=isa) as native:
        expected = forward(native, x, ids, weights)
        assert torch.set_flush_denormal(True)
        try:
            found = forward(native, x, ids, weights)
            tiny = torch.tensor([1e-40]) * 1
            assert tiny.item() == 0, "the mode must be back"
        finally:
            torch.set_flush_denormal(False)
    np.testing.assert_array_equal(found, expected)


def test_rows_without_experts_are_zero() -> None:
    case = Case(300, 64, 0, 3, 2, 4)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case) for _ in range(3)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts) as native:
        full = forward(native, x, ids, weights)
        assert forward(native, x[:0], ids[:0], weights[:0]).shape == (0, 300)
        nobody = np.full_like(ids, -1)
        assert not forward(native, x, nobody, weights).any()
        assert not forward(native, x, ids[:, :0].copy(), weights[:, :0].copy()).any()
        ids[2] = -1
        out = forward(native, x, ids, weights)
        assert not out[2].any()
        np.testing.assert_array_equal(np.delete(out, 2, 0), np.delete(full, 2, 0))


def test_bad_ids_are_refused_and_nothing_is_written() -> None:
    case = Case(128, 64, 0, 4, 2, 3)
    rng = np.random.default_rng(1)
    experts = [random_expert(rng, case) for _ in range(3)]
    native = NativeExperts([LAYER], 4, 128, 64)
    for index, weights in enumerate(experts):
        native.load(LAYER, index, weights)
    x = np.ones((2, 128), np.float32)
    factors = np.ones((2, 2), np.float32)
    out = np.full((2, 128), 7, np.float32)
    for row, why in (
        ([0, 4], r"row 1 with experts \[0, 4\]: an id is no expert"),
        ([0, -2], "no expert"),
        ([2**31 - 1, 0], "no expert"),
        ([-(2**31), 0], "no expert"),
        ([1, 1], "stands there twice"),
        ([0, 3], "never loaded"),
    ):
        with pytest.raises(ValueError, match=why):
            native.forward(LAYER, x, np.array([[0, 1], row], np.int32), factors, out)
        assert (out == 7).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    native = NativeExperts([LAYER], 2, 128, 64)
    x = np.ones((2, 128), np.float32)
    ids = np.zeros((2, 1), np.int32)
    factors = np.ones((2, 1), np.float32)
    out = np.empty((2, 128), np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for arguments, why in (
        ((x.astype(np.float64), ids, factors, out), "x is float64"),
        ((x[:1], ids, factors, out), r"x is float32 \(1, 128\); want float32 \(2, 128\)"),
        ((x[:, :64], ids, factors, out), "x is"),
        ((np.asfortranarray(x), ids, factors, out), "not contiguous"),
        ((x, ids.astype(np.int64), factors, out), "ids is int64"),
        ((x, ids[0], factors, out), "ids is|x is"),
        ((x, ids, factors[:, :0], out), "weights is"),
        ((x, ids, factors, out[:, ::2]), "out is"),
        ((x, ids, factors, frozen), "read-only"),
        ((x, np.zeros((2, 3), np.int32), np.ones((2, 3), np.float32), out), "cannot be"),
    ):
        with pytest.raises(ValueError, match=why):
            native.forward(LAYER, *arguments)
    with pytest.raises(ValueError, match=r"no layer 9 here, only \[3\]"):
        native.forward(9, x, ids, factors, out)
    native.close()
    native.close()
    with pytest.raises(ValueError, match="closed"):
        native.forward(LAYER, x, ids, factors, out)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden": 0}, "hidden is 0"),
        ({"columns": -1}, "columns is -1"),
        ({"hidden": 1 << 40}, "hidden is"),
        ({"experts": 0}, "cannot be"),
        (
            {"experts": 1 << 21, "hidden": 1 << 20, "columns": 1 << 20},
            r"the system refuses the [\d.]+ GiB of memory",
        ),
        ({"resident": "int3"}, "resident 'int3': want one of fp8"),
        ({"isa": "mmx"}, "isa 'mmx': this processor has"),
        ({"threads": -1}, "threads -1"),
        ({"spin_us": -5}, "spin_us -5"),
        ({"layers": []}, "cannot be"),
    ],
)
def test_sizes_that_cannot_be(change: dict[str, object], why: str) -> None:
    arguments: dict[str, object] = {"layers": [0], "experts": 2, "hidden": 128, "columns": 64}
    with pytest.raises(ConfigError, match=why):
        NativeExperts(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused_by_name(name: str, code: int) -> None:
    case = Case(200, 43, 43, 1, 1, 1)
    weights = random_expert(np.random.default_rng(0), case)
    native = NativeExperts([LAYER], 2, 200, 43)
    native.load(LAYER, 1, weights)
    getattr(weights, name)[-1, -1] = code
    with pytest.raises(WeightsError, match="layer 3 expert 1: a weight or scale is NaN"):
        native.load(LAYER, 1, weights)
    out = np.empty((1, 200), np.float32)
    ids, factors = np.ones((1, 1), np.int32), np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match="never loaded"):
        native.forward(LAYER, np.ones((1, 200), np.float32), ids, factors, out)


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e38])
def test_scales_that_are_no_numbers_are_refused(scale: float) -> None:
    case = Case(200, 43, 100, 1, 1, 1)
    weights = random_expert(np.random.default_rng(0), case)
    assert weights.down_scale is not None
    weights.down_scale[1, -1] = scale
    weights.down_scale[1, 28] = scale
    with pytest.raises(WeightsError, match="NaN or infinite"):
        NativeExperts([LAYER], 1, 200, 43).load(LAYER, 0, weights)


def test_slices_of_other_sizes_are_refused() -> None:
    weights = random_expert(np.random.default_rng(0), Case(200, 43, 0, 1, 1, 1))
    with pytest.raises(ValueError, match=r"gate is \(43, 200\), want \(44, 200\)"):
        NativeExperts([LAYER], 1, 200, 44).load(LAYER, 0, weights)
    with pytest.raises(WeightsError, match="bf16 cannot hold weights of uint8"):
        NativeExperts([LAYER], 1, 200, 43, resident="bf16").load(LAYER, 0, weights)


@pytest.mark.parametrize("resident", ["fp8", "f32"])
def test_packed_elsewhere_and_adopted(resident: str) -> None:
    case = CASES[3]
    rng = np.random.default_rng(4)
    experts = [random_expert(rng, case, subnormal=0.02) for _ in range(case.experts)]
    x, ids, weights = random_ask(rng, case)
    with loaded(experts, resident=resident) as native:
        expected = forward(native, x, ids, weights)
    sizes = Sizes.of(case.hidden, case.columns, resident)
    native = NativeExperts([8, LAYER], case.experts, case.hidden, case.columns, resident=resident)
    assert native.nbytes == 2 * case.experts * (sizes.record_bytes + 4 * sizes.scale_floats)
    for index, each in enumerate(experts):
        record = np.empty(sizes.record_bytes, np.uint8)
        scales = np.empty(sizes.scale_floats, np.float32)
        pack(each, resident, record, scales)
        native.records(LAYER)[index] = record
        native.scales(LAYER)[index] = scales
        native.adopt(LAYER, index, case.start)
    np.testing.assert_array_equal(forward(native, x, ids, weights), expected)
    if resident == "fp8":
        native.records(LAYER)[2, 77] = 0xFF
    else:
        native.records(LAYER)[2, :4] = 0xFF
    with pytest.raises(WeightsError, match="expert 2"):
        native.adopt(LAYER, 2, case.start)
    native.close()


def test_real_sizes() -> None:
    assert Sizes.of(7168, 64, "fp8").record_bytes == 3 * 7168 * 64
    assert Sizes.of(7168, 64, "bf16") == Sizes(2 * 3 * 7168 * 64, 0)
    assert Sizes.of(7168, 2048, "fp8").record_bytes == 3 * 7168 * 2048
    # rows of gate and up are padded to 64, inputs of down are not
    assert Sizes.of(7168, 43, "fp8").record_bytes == (2 * 64 + 43) * 7168


@pytest.mark.parametrize("spin_us", [0, 50, 2000])
def test_pool_under_stress(spin_us: int) -> None:
    """Callers that come at the same time, threads that fall asleep between, a pool that ends."""
    case = Case(256, 64, 0, 8, 4, 3)
    rng = np.random.default_rng(9)
    experts = [random_expert(rng, case) for _ in range(8)]
    asks = [random_ask(rng, case) for _ in range(8)]
    with loaded(experts, threads=1) as native:
        expected = [forward(native, *ask) for ask in asks]
    for threads in (2, 5):
        wrong: list[int] = []
        with loaded(experts, threads=threads, spin_us=spin_us) as native:

            def call(start: int, native: NativeExperts = native, wrong: list[int] = wrong) -> None:
                for i in range(start, start + 150):
                    same = np.array_equal(forward(native, *asks[i % 8]), expected[i % 8])
                    wrong.extend([] if same else [i])

            callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
        assert not wrong
    for _ in range(50):  # a pool that ends at once, or just after its first work
        with loaded(experts, threads=3, spin_us=spin_us) as native:
            forward(native, *asks[0])


def test_crc32c() -> None:
    assert library.crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4
    assert library.crc32c(bytes(32)) == 0x8A9136AA
    assert library.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert library.crc32c(b"") == 0
    data = np.random.default_rng(0).bytes(1000)
    for cut in (0, 1, 7, 8, 9, 500, 1000):
        assert library.crc32c(data[cut:], library.crc32c(data[:cut])) == library.crc32c(data)


def test_crc32c_of_any_length_at_any_place() -> None:
    """Short ones by instruction or table, long ones by folding: the remainder of a division."""

    def remainder(data: bytes, crc: int) -> int:
        crc ^= 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc ^ 0xFFFFFFFF

    data = np.random.default_rng(1).bytes(5000)
    for size in (3, 127, 128, 129, 511, 512, 513, 639, 640, 641, 3072, 4000, 4999):
        for start, before in ((0, 0), (1, 0xDEADBEEF)):
            part = data[start : start + size]
            assert library.crc32c(part, before) == remainder(part, before), (size, start)


def test_bf16_rows() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint32)
    special = [
        0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0x7F7FFFFF,
        0x3F808000, 0x3F818000,
    ]  # fmt: skip
    values = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    codes = library.bf16_from_f32(values)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    found = torch.from_numpy(codes).view(torch.bfloat16)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan], expected[~nan])
    back = library.f32_from_bf16(codes)
    np.testing.assert_array_equal(back.view(np.uint32), codes.astype(np.uint32) << 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 2048), (5, 3, 1031), (4, 9, 4096)])
def test_sum_of_rows_in_their_order(dtype: str, shape: tuple[int, int, int]) -> None:
    """The same bits as adding one after the other; rows lie apart."""
    ducks, rows, hidden = shape
    values = np.random.default_rng(ducks).standard_normal((ducks, rows * hidden + 8), np.float32)
    values *= 10.0 ** np.random.default_rng(rows).integers(-6, 6, values.shape)
    apart = wire.to_wire(values, dtype)
    partials = np.lib.stride_tricks.as_strided(
        apart, shape, (apart.strides[0], hidden * apart.itemsize, apart.itemsize)
    )
    want = wire.to_float32(partials[0]).copy()
    for partial in partials[1:]:
        want += wire.to_float32(partial)
    total, finite = library.sum_rows(partials)
    assert finite
    assert total.shape == (rows, hidden)
    np.testing.assert_array_equal(total.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("place", [0, 1, 2047, 2048, 4999])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_that_is_not_finite(dtype: str, bad: float, place: int) -> None:
    values = np.zeros((3, 1, 5000), np.float32)
    values[2, 0, place] = bad
    total, finite = library.sum_rows(wire.to_wire(values, dtype))
    assert not finite
    assert np.flatnonzero(~np.isfinite(total[0])).tolist() == [place]


def test_a_sum_that_overflows() -> None:
    total, finite = library.sum_rows(np.full((3, 1, 4), 2e38, np.float32))
    assert not finite
    assert np.isposinf(total).all()


def test_atomic_add() -> None:
    counter = np.zeros(2, np.uint32)

    def count() -> None:
        for _ in range(2000):
            library.atomic_add_u32(counter.ctypes.data + 4, 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.tolist() == [0, 8000]
    assert library.atomic_add_u32(counter.ctypes.data + 4, 2**32 - 1) == 8000
    assert counter[1] == 7999


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler"):
        build.compile_library(tmp_path / "library.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ConfigError, match="failed:"):
        build.compile_library(tmp_path / "library.so")
    assert not list(tmp_path.iterdir())


def test_an_existing_library_is_found(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_library().name == build.file_name()
    assert capfd.readouterr().err == ""


def test_who_waits_for_the_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"  # writes its output, and is quick about it
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    for told in ("duck: building the native library (once)\n", ""):
        assert build.find_library().read_text() == "made\n"
        assert capfd.readouterr().err == told


def test_bench() -> None:
    small = bench.Shape("small", 256, 64, 8, 2)
    said: list[str] = []
    report = bench.bench_kernel(
        isas=ISAS[:1],
        threads=[1],
        residents=["fp8", "int4"],
        shapes=[small],
        rows=(1, 3),
        memory_gib=0.002,
        repeats=1,  # then medians are the one measurement
        note=said.append,
    )
    found = [(row["resident"], row["rows"]) for row in report["rows"]]
    assert found == [("fp8", 1), ("fp8", 3), ("int4", 1), ("int4", 3)]
    for row in report["rows"]:
        assert row["ratio"] > 0
        assert row["gb_s"] == pytest.approx(row["ratio"] * row["stream_gb_s"], rel=1e-6)
    assert report["rows"][0]["hot_gw_s"] > 0
    assert report["stream"][0]["threads"] == 1
    text = bench.tables(report)
    assert f"small            fp8  {ISAS[0]}" in text
    for row in report["rows"][:]:
        report["rows"].append({**row, "rows": 328, "torch_gflop_s": 1e4, "torch_ratio": 0.5})
    text = bench.tables(report)
    for name in ("/read", "hot", "/torch", "/same"):
        assert text.count(f"{name}:") + text.count(f"{name},") == 1  # each is explained
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert any("rows 3" in line for line in said)
    with pytest.raises(ConfigError, match=r"small takes .* allowed are 0\.0001"):
        bench.bench_kernel(shapes=[small], memory_gib=0.0001)
