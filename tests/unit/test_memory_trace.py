"""What memory is taken when, and the one line when there is not enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from duck.engine import Engine
from duck.errors import ConfigError, OutOfMemory
from duck.model.transformer import DecoderLayer
from duck.sampling import Sampling
from tests.checkpoints import make_checkpoint

TOLD = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.36 GiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=1)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_every_stage_has_a_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.jsonl"
    async with Engine.open(
        folder, transport="loopback", graphs="on", memory_trace=str(file)
    ) as engine:
        resident = sum(category.resident_bytes for category in engine.load.host)
        await engine.generate([2, 3, 4], Sampling(max_tokens=12, ignore_eos=True))
        told = lines(file)  # whatever ends us now, they are there
    assert lines(file) == told
    stages = ["opened", "planned", "weights", "ducks", "session", "prompt", "answer"]
    assert [line["what"] for line in told] == stages
    by_name = {line["what"]: line for line in told}
    assert by_name["planned"]["weights_bytes"] == resident
    assert by_name["weights"]["resident_bytes"] == resident
    assert by_name["session"]["kv_bytes"] > 0
    assert (by_name["session"]["segments"], by_name["answer"]["tokens"]) == (0, 12)
    assert by_name["answer"]["segments"] > 0
    seconds = [line["s"] for line in told]
    assert seconds == sorted(seconds)
    for line in told:
        assert line["host_bytes"] > 1 << 20
        assert line["allocated_bytes"] is None  # there is no GPU to ask


async def test_without_a_file_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--memory-trace .*no such folder"):
        async with Engine.open(folder, memory_trace=str(tmp_path / "none" / "memory.jsonl")):
            pass


@pytest.mark.parametrize("traced", [True, False])
async def test_out_of_memory_is_one_line(
    folder: Path, tmp_path: Path, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "memory.jsonl"
    options = {"memory_trace": str(file)} if traced else {}
    async with Engine.open(folder, transport="loopback", **options) as engine:
        shared = DecoderLayer.shared

        def full(layer: DecoderLayer, h: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError(TOLD)

        monkeypatch.setattr(DecoderLayer, "shared", full)
        with pytest.raises(OutOfMemory) as raised:
            await engine.generate([2, 3, 4], Sampling(max_tokens=2))
        text = str(raised.value)
        assert text.startswith(
            "GPU memory ran out at shared of layer 1, 3 rows (CUDA out of memory. Tried to "
            "allocate 2.00 GiB): planned were weights "
        )
        assert " MiB, KV " in text
        assert "use a smaller --max-len, --kv fp8" in text
        assert "\n" not in text
        monkeypatch.setattr(DecoderLayer, "shared", shared)
        done = await engine.generate([2, 3, 4], Sampling(max_tokens=2, ignore_eos=True))
        assert len(done.token_ids) == 2
    if traced:
        [line] = [line for line in lines(file) if line["what"] == "out of memory"]
        assert line["stage"] == "shared of layer 1, 3 rows"
        assert line["error"] == TOLD


async def test_out_of_memory_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(TOLD)

    monkeypatch.setattr("duck.engine.Transformer.load", full)
    with pytest.raises(OutOfMemory, match="GPU memory ran out at loading weights"):
        async with Engine.open(folder, transport="loopback"):
            pass
