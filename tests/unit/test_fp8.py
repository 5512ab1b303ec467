"""The number formats against torch's own float8 types, and the blocks against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duck.kernels import fp8

ALL = np.arange(256, dtype=np.uint8)


def test_e4m3_table_is_torchs() -> None:
    expected = torch.from_numpy(ALL).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(fp8.decode(ALL), expected)
    assert np.isnan(fp8.E4M3[[0x7F, 0xFF]]).all()
    assert fp8.E4M3[0x7E] == fp8.MAX == 448


def test_e8m0_is_torchs() -> None:
    expected = torch.from_numpy(ALL).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(fp8.decode_e8m0(ALL), expected)


def test_encode_rounds_to_nearest_and_ties_to_even_as_torch() -> None:
    rng = np.random.default_rng(0)
    finite = fp8.E4M3[:127]
    middles = (finite[1:] + finite[:-1]) / 2
    values = np.concatenate(
        (
            fp8.E4M3[~np.isnan(fp8.E4M3)],
            middles,
            np.nextafter(middles, 0),
            np.nextafter(middles, 1000),
            np.clip(
                rng.standard_normal(20_000) * np.exp(4 * rng.standard_normal(20_000)), -448, 448
            ),
        )
    ).astype(np.float32)
    values = np.concatenate((values, -values))
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8.encode(values), expected)


def test_encode_saturates() -> None:
    beyond = np.array([449, 1e30, -1e30], np.float32)
    np.testing.assert_array_equal(fp8.decode(fp8.encode(beyond)), [448, 448, -448])


def test_has_nan() -> None:
    assert not fp8.has_nan(ALL[(ALL & 0x7F) != 0x7F])
    assert fp8.has_nan(np.array([0, 0x7F], np.uint8))
    assert fp8.has_nan(np.array([0, 0xFF], np.uint8))


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    data=st.data(),
)
def test_any_part_of_a_matrix_is_dequantised_alike(
    rows: int, columns: int, block: tuple[int, int], data: st.DataObject
) -> None:
    rng = np.random.default_rng(rows * 31 + columns)
    codes = rng.integers(0, 0x7F, (rows, columns)).astype(np.uint8)
    scales = rng.random((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    expected = np.array(
        [
            [fp8.E4M3[codes[i, j]] * scales[i // block[0], j // block[1]] for j in range(columns)]
            for i in range(rows)
        ]
    )
    top, left = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    bottom, right = data.draw(st.integers(top, rows)), data.draw(st.integers(left, columns))
    part = fp8.dequantise(codes[top:bottom, left:right], scales, block, row=top, column=left)
    np.testing.assert_array_equal(part, expected[top:bottom, left:right])


@pytest.mark.parametrize("ue8m0", [False, True])
def test_quantise_is_close_and_uses_the_whole_range(ue8m0: bool) -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((200, 70), np.float32)
    weights[:64, :32] = 0
    codes, scales = fp8.quantise(weights, (64, 32), ue8m0=ue8m0)
    assert scales.shape == (4, 3)
    assert scales[0, 0] == 1  # of zeros
    if ue8m0:
        assert (np.frexp(scales)[0] == 0.5).all()  # powers of two
    else:
        assert np.abs(fp8.decode(codes[64:128, :32])).max() == 448
    back = fp8.dequantise(codes, scales, (64, 32))
    half_a_step = np.maximum(np.abs(weights) * 2**-4, scales.max() * 2**-10)
    assert (np.abs(back - weights) <= half_a_step).all()
