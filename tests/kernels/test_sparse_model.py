"""A whole V3.2 whose attention and indexer run in Triton, interpreted: the reference's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from duck.kernels.device import REFERENCE, pick
from tests.checkpoints import make_checkpoint
from tests.unit.local_model import WatchedModel

TOPK = 12
IDS = torch.randint(288, (24,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("v32"), seed=5, tokenizer=False, model_type="deepseek_v32",
        num_hidden_layers=2, index_topk=TOPK, index_n_heads=5, index_head_dim=32,
    )  # fmt: skip


@pytest.mark.parametrize(("kv", "indexer"), [("auto", "exact"), ("fp8", "fp8")])
def test_logits_are_the_reference_s(
    folder: Path, kv: str, indexer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of which some rows see few tokens, then one row and two; the same keys selected."""
    triton = pick(torch.device("cpu"), "triton")
    kernels = replace(
        REFERENCE, name="triton", attend=triton.attend, append_keys=triton.append_keys,
        index_queries=triton.index_queries, select=triton.select,
    )  # fmt: skip
    logits, selected = [], []
    for chosen in (REFERENCE, kernels):
        with monkeypatch.context() as patch:
            model = WatchedModel(folder, patch, kernels=chosen, kv=kv, indexer=indexer)
            cache, at, parts = model.model.new_cache(24), 0, []
            for rows in (21, 1, 2):
                parts.append(model.hidden(IDS[at : at + rows], cache, at))
                at += rows
            with torch.inference_mode():
                logits.append(model.model.logits(torch.cat(parts)))
            selected.append(model.selected)
    assert selected[0] == selected[1]
    assert len(selected[0]) == 2 * (24 - TOPK)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
