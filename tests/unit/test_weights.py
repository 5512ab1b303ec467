"""Reading checkpoints: the same numbers as the safetensors library, and an error for any damage."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duck.errors import WeightsError
from duck.model.config import ModelConfig
from duck.model.weights import Checkpoint, experts_digest
from tests.checkpoints import CONFIG, Tensor, make_checkpoint, write_safetensors

SMALL: dict[str, Any] = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "tokenizer": False}
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"
NORM = "model.norm.weight"


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, for a test to change and write again."""
    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.items():
        tensors[name] = (info.dtype, np.array(checkpoint.raw(name)))
    return tensors


def check(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    checkpoint.check(ModelConfig.load(folder))
    return checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=5, **SMALL)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder of one's own to damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def dequantised(folder: Path, name: str) -> np.ndarray:
    """By the safetensors library and torch."""
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(file)
    values = stored[name].float()
    if f"{name}_scale_inv" in stored:
        scale = stored[f"{name}_scale_inv"]
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        values = values * wide[: values.shape[0], : values.shape[1]]
    return values.numpy()


@pytest.mark.parametrize("shards", [0, 3])
def test_f32_equals_the_safetensors_library(tmp_path: Path, shards: int) -> None:
    folder = make_checkpoint(tmp_path, seed=1, shards=shards, **SMALL)
    checkpoint = check(folder)
    for name in (GATE, DOWN, NORM, "model.layers.1.mlp.gate.e_score_correction_bias"):
        np.testing.assert_array_equal(checkpoint.f32(name), dequantised(folder, name))
    expected = dequantised(folder, DOWN)
    part = checkpoint.f32(DOWN, slice(100, 140), slice(120, 192))
    np.testing.assert_array_equal(part, expected[100:140, 120:192])


def test_sharded_scales_lie_apart(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, seed=1, shards=3, **SMALL))
    assert checkpoint.info(GATE).file != checkpoint.info(f"{GATE}_scale_inv").file


@pytest.mark.parametrize("columns", [range(192), range(64, 128), range(100, 150), range(191, 192)])
@pytest.mark.parametrize("weights", ["fp8", "bf16", "f32"])
def test_an_experts_slice_is_that_part_of_the_whole(
    tmp_path: Path, columns: range, weights: str
) -> None:
    folder = make_checkpoint(tmp_path, seed=2, weights=weights, **SMALL)
    checkpoint = Checkpoint.open(folder)
    part = slice(columns.start, columns.stop)
    stored = checkpoint.expert(1, 2, columns)
    gate, up, down = stored.dequantise()
    np.testing.assert_array_equal(gate, dequantised(folder, GATE)[part])
    np.testing.assert_array_equal(up, dequantised(folder, GATE.replace("gate", "up"))[part])
    np.testing.assert_array_equal(down, dequantised(folder, DOWN)[:, part])
    assert stored.gate.shape == (len(columns), 160)
    assert stored.down.shape == (160, len(columns))
    assert stored.gate.dtype == {"fp8": np.uint8, "bf16": np.uint16, "f32": np.float32}[weights]
    if weights == "fp8":
        assert stored.gate_scale is not None
        assert stored.down_scale is not None
        assert stored.gate_scale.shape == (len(columns), 2)
        assert stored.down_scale.shape == (2, len(columns))
    else:
        assert stored.gate_scale is None


def test_an_experts_slice_reads_only_its_bytes(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    stored = checkpoint.expert(1, 2, range(10, 20))
    codes = stored.gate.nbytes + stored.up.nbytes + stored.down.nbytes
    assert codes == checkpoint.expert_nbytes(1, range(10, 20)) == 3 * 10 * 160
    assert checkpoint.bytes_read == codes  # and the scales, 1 / 4096 of it, which are not counted


def test_columns_that_are_shared_are_the_same(folder: Path) -> None:
    alone, shared = Checkpoint.open(folder), Checkpoint.open(folder)
    shared.shares_columns = True
    for columns in (range(64), range(64, 192), range(5, 9)):
        for expert in range(2):
            one, other = (each.expert(1, expert, columns) for each in (alone, shared))
            for name in ("gate", "up", "down", "gate_scale", "up_scale", "down_scale"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_a_file_that_is_cut_while_in_use(copy: Path, part: str, shares: bool) -> None:
    """Of a mapping the system would end the process."""
    checkpoint = check(copy)
    checkpoint.shares_columns = shares
    checkpoint.expert(1, 1, range(64))
    info = checkpoint.info(f"model.layers.1.mlp.experts.2.{part}.weight")
    os.truncate(copy / "model.safetensors", info.offset + info.nbytes - 1)
    found = rf"model\.safetensors is truncated: {re.escape(info.name)} ends at byte \d+ of \d+"
    with pytest.raises(WeightsError, match=found):
        checkpoint.f32(info.name)
    with pytest.raises(WeightsError, match=found):
        checkpoint.raw(info.name)
    with pytest.raises(WeightsError, match=found):
        checkpoint.expert(1, 2, range(192))


def test_a_slice_beyond_the_width_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(GATE)):
        Checkpoint.open(folder).expert(1, 2, range(190, 193))


def test_raw_is_as_stored(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.raw(GATE).dtype == np.uint8
    assert checkpoint.raw(NORM).dtype == np.uint16


class TestDigest:
    def digest(self, folder: Path) -> str:
        return experts_digest(Checkpoint.open(folder), ModelConfig.load(folder))

    def test_ignores_shards_and_other_tensors(self, folder: Path, tmp_path: Path) -> None:
        sharded = make_checkpoint(tmp_path / "sharded", seed=5, shards=2, **SMALL)
        assert self.digest(sharded) == self.digest(folder)
        tensors = read(folder)
        tensors[NORM][1][:] += 1
        other = make_checkpoint(tmp_path / "other", seed=5, **SMALL)
        write_safetensors(other / "model.safetensors", tensors)
        assert self.digest(other) == self.digest(folder)

    @pytest.mark.parametrize("name", [DOWN, f"{GATE}_scale_inv", GATE.replace("s.1.", "s.3.")])
    def test_sees_a_change_of_one_expert(self, copy: Path, name: str) -> None:
        before = self.digest(copy)
        tensors = read(copy)
        values = tensors[name][1].reshape(-1).view(np.uint8)
        values[len(values) // 2] ^= 1
        write_safetensors(copy / "model.safetensors", tensors)
        assert self.digest(copy) != before


def damage(change: Callable[[dict[str, Tensor]], None], folder: Path) -> None:
    tensors = read(folder)
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, dtype: str, values: np.ndarray) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, (dtype, values))


SCALE = f"{GATE}_scale_inv"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (drop(NORM), f"has no tensor {NORM}, expected [160]"),
    "missing scale": (drop(SCALE), f"{GATE} in model.safetensors is fp8 but has no scale {SCALE}"),
    "missing MTP": (drop("model.layers.3.enorm.weight"), "num_nextn_predict_layers 0 would do"),
    "extra": (
        put("model.layers.0.self_attn.sinks", "F32", np.zeros(4, np.float32)),
        "unknown tensor model.layers.0.self_attn.sinks in model.safetensors (F32 [4])",
    ),
    "scale of a plain weight": (
        put("model.layers.1.mlp.gate.weight_scale_inv", "F32", np.ones((1, 2), np.float32)),
        "unknown tensor model.layers.1.mlp.gate.weight_scale_inv",
    ),
    "shape": (
        put(NORM, "BF16", np.zeros(161, np.uint16)),
        f"{NORM} in model.safetensors has shape [161], expected [160]",
    ),
    "dtype": (
        put(NORM, "U8", np.zeros(160, np.uint8)),
        f"{NORM} in model.safetensors has dtype U8, expected BF16 or F16 or F32",
    ),
    "scale shape": (
        put(SCALE, "F32", np.ones((2, 1), np.float32)),
        f"{SCALE} in model.safetensors has shape [2, 1], expected [2, 2]",
    ),
    "scale dtype": (
        put(SCALE, "I8", np.ones((2, 2), np.int8)),
        f"{SCALE} in model.safetensors has dtype I8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_check_names_tensor_file_and_expectation(name: str, copy: Path) -> None:
    change, message = BAD[name]
    # U8 and I8 are written as given; the reader's own view is not needed for them
    damage(change, copy)
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        check(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(copy: Path, code: int) -> None:
    damage(lambda tensors: tensors[GATE][1].__setitem__((150, 7), code), copy)
    checkpoint = check(copy)
    for attempt in (lambda: checkpoint.f32(GATE), lambda: checkpoint.expert(1, 2, range(140, 160))):
        with pytest.raises(WeightsError, match=re.escape(f"{GATE} in model.safetensors holds")):
            attempt()
    checkpoint.expert(1, 2, range(140))  # the rest is fine


@pytest.mark.parametrize("name", [SCALE, NORM, "model.layers.1.mlp.gate.e_score_correction_bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(copy: Path, name: str, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        dtype, values = tensors[name]
        bits = np.array(value, np.float32).view(np.uint32)
        values.reshape(-1)[1] = value if dtype == "F32" else bits >> 16

    damage(change, copy)
    target = GATE if name == SCALE else name
    with pytest.raises(WeightsError, match=re.escape(f"{name} in model.safetensors holds a value")):
        check(copy).f32(target)


def test_an_exponent_of_nan_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, seed=1, scale_dtype="F8_E8M0", **SMALL)
    damage(lambda tensors: tensors[SCALE][1].__setitem__((0, 0), 255), folder)
    with pytest.raises(WeightsError, match=re.escape(SCALE)):
        Checkpoint.open(folder).f32(GATE)


def test_fp8_without_a_block_size_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({**CONFIG, **SMALL, "tokenizer": None}))
    with pytest.raises(WeightsError, match=r"no quantization_config\.weight_block_size"):
        check(copy)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight",
    ],
)
def test_documented_extras_are_ignored(copy: Path, name: str) -> None:
    damage(put(name, "F32", np.zeros(4, np.float32)), copy)
    check(copy)


def test_an_mtp_module_the_config_leaves_out_is_ignored(copy: Path) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 0}))
    check(copy)
    damage(drop("model.layers.3.eh_proj.weight"), copy)  # now it is just an unknown layer
    with pytest.raises(WeightsError, match=r"unknown tensor model\.layers\.3\."):
        check(copy)


class TestFiles:
    """Damage below the level of tensors."""

    def refused(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightsError, match=message) as caught:
            Checkpoint.open(folder)
        assert "\n" not in str(caught.value)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        self.refused(copy, r"expected model\.safetensors or model\.safetensors\.index\.json")

    @pytest.mark.parametrize("keep", [0, 7, 8, 5000, -1])
    def test_truncated(self, copy: Path, keep: int) -> None:
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        self.refused(copy, r"model\.safetensors is truncated")

    def test_bytes_at_the_end(self, copy: Path) -> None:
        with (copy / "model.safetensors").open("ab") as file:
            file.write(b"x")
        self.refused(copy, "bytes that no tensor owns")

    def test_header_longer_than_the_file(self, copy: Path) -> None:
        file = copy / "model.safetensors"
        file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
        self.refused(copy, "a header of 4611686018427387904 bytes announced")

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "has 4 bytes, expected 8"),
            ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "starts at byte"),
            ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "bad shape"),
            ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "bad shape"),
            ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "data_offsets"),
            ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "data_offsets"),
            ({"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, "dtype 'F99'"),
            ({"shape": [1], "data_offsets": [0, 4]}, "dtype None"),
            ({"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}, "expected 147573"),
            ([], "no JSON object"),
        ],
    )
    def test_bad_entry(self, copy: Path, entry: Any, message: str) -> None:
        text = json.dumps({"x": entry}).encode()
        (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        self.refused(copy, message)

    def test_overlap(self, copy: Path) -> None:
        entries = {
            name: {"dtype": "F32", "shape": [2], "data_offsets": place}
            for name, place in (("a", [0, 8]), ("b", [4, 12]))
        }
        text = json.dumps(entries).encode()
        (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
        self.refused(copy, "b in model.safetensors starts at byte")

    @pytest.mark.parametrize("header", [b"{", b"[]", b"\xff", b"[" * 100_000, b""])
    def test_bad_header(self, copy: Path, header: bytes) -> None:
        (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        self.refused(copy, "the header is no")

    @given(data=st.binary(max_size=200), announced=st.integers(0, 2**64 - 1) | st.none())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    def test_garbage_raises_weights_error_only(
        self, copy: Path, data: bytes, announced: int | None
    ) -> None:
        length = len(data) if announced is None else announced
        (copy / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data)
        with pytest.raises(WeightsError):
            check(copy)

    @given(
        entries=st.dictionaries(
            st.sampled_from(["a", "b", NORM]),
            st.fixed_dictionaries(
                {},
                optional={
                    "dtype": st.sampled_from(["F32", "U8", "F4", "?", None]),
                    "shape": st.lists(st.integers(-1, 5), max_size=10) | st.none(),
                    "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3),
                },
            ),
        ),
        size=st.integers(0, 40),
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    def test_any_header_raises_weights_error_only(
        self, copy: Path, entries: dict[str, Any], size: int
    ) -> None:
        text = json.dumps(entries).encode()
        (copy / "model.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + bytes(size)
        )
        with pytest.raises(WeightsError):
            check(copy)

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, seed=1, shards=3, **SMALL)
        (folder / "model-00002-of-00003.safetensors").unlink()
        self.refused(folder, r"cannot read .*model-00002-of-00003\.safetensors: No such file")

    def test_a_shard_that_is_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, seed=1, shards=3, **SMALL)
        (folder / "model-00002-of-00003.safetensors").unlink()
        os.mkfifo(folder / "model-00002-of-00003.safetensors")
        self.refused(folder, r"cannot read .*model-00002-of-00003\.safetensors: it is a pipe")

    @pytest.mark.parametrize(
        ("weight_map", "message"),
        [
            ({NORM: "../model.safetensors"}, "expected a file name of this folder"),
            ({NORM: 3}, "expected a file name of this folder"),
            ({NORM: "model-00001-of-00003.safetensors\0"}, "expected a file name"),
            ({"x": "model-00001-of-00003.safetensors"}, "x is not in model-00001-of-00003"),
            ([], "weight_map is no object"),
            (None, "weight_map is no object"),
        ],
    )
    def test_bad_index(self, tmp_path: Path, weight_map: Any, message: str) -> None:
        folder = make_checkpoint(tmp_path, seed=1, shards=3, **SMALL)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        self.refused(folder, message)
        for content in ("{", "{}", "[]"):
            index.write_text(content)
            self.refused(folder, "is not a safetensors index")
