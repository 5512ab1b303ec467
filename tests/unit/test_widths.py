"""duck bench generate: a real duck with random experts, and the whole model made of its stages."""

from __future__ import annotations

import json
import math
import multiprocessing
import operator
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from duck.cli import main
from duck.errors import TransportError
from duck.model.config import ModelConfig
from duck.plan import widths
from duck.plan.simulate import simulate
from duck.synthetic import random_duck


def narrow(layers: int) -> ModelConfig:
    """The same kind of model, small enough for a test."""
    return replace(
        _REAL(layers), hidden_size=256, moe_intermediate_size=256, n_routed_experts=16, n_group=4,
        topk_group=2, num_experts_per_tok=4, num_attention_heads=4, q_lora_rank=64,
        kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip


_REAL = widths.v32


def test_the_real_widths_are_the_published_ones() -> None:
    config = widths.v32(8)
    assert config.moe_layers == tuple(range(8))
    shapes = widths.shapes_without_experts(config)
    # Attention of one layer and its shared expert, as published: 170.3 and 44.0 million numbers.
    attention = sum(
        math.prod(shape) for name, shape in shapes.items()
        if name.startswith("model.layers.0.self_attn") and "kv_b" not in name and len(shape) == 2
    )  # fmt: skip
    assert attention == pytest.approx(170.3e6, rel=1e-3)
    shared = [shape for name, shape in shapes.items() if "layers.0.mlp.shared" in name]
    assert sum(map(math.prod, shared)) == pytest.approx(44.0e6, rel=1e-3)


@pytest.mark.parametrize("attend_ms", [None, 0.5])
def test_measures_each_stage_and_predicts_the_whole(
    attend_ms: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widths, "v32", narrow)
    report = widths.bench_generate(
        layers=3, of_ducks=2, attend_ms=attend_ms, shared_ms=0.1, steps=3, threads=1
    )
    assert set(report.measured) == {"serial", "batch", "wave"}
    # 3 layers of 16 experts, half of each: a byte a weight and a little for scales.
    assert report.resident_bytes == pytest.approx(3 * 16 * 3 * 256 * 128, rel=0.1)
    for schedule, summary in report.measured.items():
        assert summary.schedule == schedule
        assert summary.steps == 3
        parts = {part.name: part for part in summary.parts}
        # Two layers and the drafting one; wave attends twice in the former.
        assert parts["attend"].count == 3 * (5 if schedule == "wave" else 3)
        [duck] = summary.ducks
        assert duck.compute_ms > 0
        assert duck.gb_s is not None
        if attend_ms is not None:
            assert parts["attend"].median_ms >= attend_ms
            assert parts["shared"].median_ms >= 0.1
    times = report.times
    assert (times.moe_layers, times.dense_layers) == (58, 3)
    if attend_ms is not None:
        assert (times.attend, times.shared) == (0.5, 0.1)
    assert report.predicted_ms["wave"] == simulate(times, "wave").step_ms
    json.dumps(report.to_json())


def test_random_experts_give_numbers() -> None:
    """What the ducks answer is finite, and not nothing: the kernel had real work."""
    from duck.kernels.experts import NativeExperts
    from duck.placement import Plan
    from duck.slices import slice_of
    from duck.synthetic import RandomSource
    from duck.wire import Shape

    shape = Shape(256, 4, "bfloat16", "bfloat16", 4)
    want = slice_of(Plan("random", (0, 1), 16, 64, (range(64),), shape), 0)
    arena = NativeExperts(want.layers, 16, 256, 64, threads=1)
    told: list[int] = []
    RandomSource().load(want, want.layers, arena, told.append, lambda: None)
    assert sum(told) == want.nbytes
    out = np.empty((2, 256), np.float32)
    x = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
    ids = np.array([[0, 5, 9, 15], [1, 2, 3, 4]], np.int32)
    arena.forward(1, x, ids, np.full((2, 4), 0.25, np.float32), out)
    arena.close()
    assert np.isfinite(out).all()
    assert 1e-3 < np.abs(out).mean() < 10


def test_routers_differ_by_layer_and_large_matrices_are_shared() -> None:
    loader = widths.RandomLoader(narrow(3), virtual=False)
    gates = [loader.vector(f"model.layers.{n}.mlp.gate.weight") for n in (0, 1)]
    assert not torch.equal(*gates)
    large = [loader.matrix(f"model.layers.{n}.self_attn.o_proj") for n in (0, 1)]
    assert large[0].data_ptr() == large[1].data_ptr()


def test_the_duck_ends_with_whoever_holds_it() -> None:
    with random_duck(1) as address:
        assert address.startswith("127.0.0.1:")
        [child] = multiprocessing.active_children()
        pid = child.pid
        assert pid is not None
    assert not multiprocessing.active_children()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_duck_that_dies_before_it_listens_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duck.synthetic._serve", operator.is_)  # returns at once
    with pytest.raises(TransportError, match="did not start"), random_duck(1):
        pass


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--layers", "1"), "--layers 1: want 2 to 62"),
        (("--ducks", "2of32"), "--ducks '2of32': want 1ofN"),
        (("--ducks", "1of5"), "want 1ofN with N of"),
        (("--attend-ms", "-1"), "--attend-ms -1.0"),
        (("--steps", "0"), "--steps 0"),
        (("--layers", "62", "--ducks", "1of1"), "free"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "generate", *words]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert said in err
    assert err.count("\n") == 1
