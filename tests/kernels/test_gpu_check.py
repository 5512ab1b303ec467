"""The check of GPU kernels, but for CUDA itself: arguments, tables, every check on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What a machine with only torch, triton and numpy does not have of our dependencies.
ABSENT = (
    "msgpack", "structlog", "safetensors", "uvloop", "cryptography", "rich", "tokenizers",
    "jinja2", "matplotlib", "transformers", "pytest",
)  # fmt: skip


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_check

    return gpu_check


def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script where torch, triton and numpy are all there is."""
    script = str(SCRIPTS / "gpu_check.py")
    code = (
        f"import runpy, sys\nfor name in {ABSENT!r}: sys.modules[name] = None\n"
        f"sys.path[0] = {str(SCRIPTS)!r}\n"  # as Python has it for a script
        f"sys.argv = {[script, *arguments]!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = run_bare()
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("gpu_check: torch finds no CUDA device here; --device cpu --tiny ")
    assert not done.stdout


def test_every_check_holds_on_tiny_shapes(tmp_path: Path) -> None:
    """With torch, triton and numpy alone; each check of the real shapes is among them."""
    file = tmp_path / "numbers.json"
    done = run_bare("--device", "cpu", "--tiny", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    result = json.loads(file.read_text())
    names = " ".join(check["name"] for check in result["checks"])
    for what in (
        "fp8 linear q_a, kv_a", "shared expert", "norm", "projection, residual and norm",
        "rotation", "append latents fp8", "router",
        "sum of ducks", "attention dense bf16, 2 rows at 20", "attention to 12 of 40, fp8",
        "attention with nan", "index keys, fp8", "index queries, exact", "index scores of 40, fp8",
        "selection of 12 of 40, exact", "among ties", "a layer, 2 rows",
        "a small model by graphs",
    ):  # fmt: skip
        assert what in names
    assert all(check["ok"] for check in result["checks"])
    assert f"correct: {len(result['checks'])} of {len(result['checks'])}" in done.stdout
    assert result["skipped"] == []


def test_a_wrong_kernel_is_seen(gpu_check: ModuleType) -> None:
    from gpu_correct import compared, same

    right = torch.tensor([1.0, float("inf"), -2.0])
    assert compared(right, right, 1e-6)["ok"]
    assert not compared(right * 1.1, right, 1e-6)["ok"]
    moved = torch.tensor([1.0, -2.0, float("inf")])
    found = compared(moved, right, 1e9)
    assert not found["ok"]
    assert "isposinf differs in 2 of 3" in found["why"]
    assert not same(torch.tensor([1, 2]), torch.tensor([1, 3]))["ok"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "0"], "--layers 0: want at least 1"),
        (["--device", "cpu"], "far too slowly but for --tiny: add it"),
        (["--only", "nothing"], "invalid choice"),
    ],
)
def test_bad_arguments(
    arguments: list[str], complaint: str, gpu_check: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_what_there_is_no_time_for_is_named(gpu_check: ModuleType) -> None:
    clock = gpu_check.Clock(seconds=-1)
    result: dict[str, list[object]] = {"kernels": [], "layers": [], "skipped": []}
    clock.run(result, "kernels", "a kernel", dict)
    clock.run_all(result, "layers", iter([("a layer", dict)]))
    assert result["skipped"] == ["kernels: a kernel", "layers: what would follow"]
    clock = gpu_check.Clock(seconds=1000)
    clock.run_all(result, "layers", iter([("a layer", lambda: {"us": 1})]))
    assert result["layers"] == [{"name": "a layer", "us": 1}]


def test_the_tables(gpu_check: ModuleType) -> None:
    result = {
        "device": "a GPU", "torch": "2.11", "triton": "3.6", "shape": "DeepSeek-V3.2",
        "copy_gbs": 4012.3, "seconds": 321.0, "skipped": ["layers: 2 of 62, which do not fit"],
        "checks": [
            {"name": "norm", "error": 1.5e-4, "tolerance": 2e-3, "ok": True},
            {"name": "router", "error": None, "tolerance": 1e-5, "ok": False, "why": "isnan"},
        ],
        "kernels": [
            {"name": "fp8 linear o, 1 rows", "us": 36.6, "mib": 112.0, "gbs": 3210.0,
             "share": 0.8, "met": True},
            {"name": "fold", "us": 9.9, "mib": 16.0, "gbs": 1700.0, "share": 0.42, "met": None},
        ],
        "layers": [
            {"name": "1 rows, 2048 tokens, dense", "rows": 1, "context": 2048, "sparse": False,
             "layers": 60, "eager_us": 900.5, "graph_us": 250.25, "bound_us": 70.0,
             "share": 0.28, "launches": 31, "met": False},
        ],
    }  # fmt: skip
    text = gpu_check.report(result)
    assert "correct: 1 of 2 checks at DeepSeek-V3.2's shapes" in text
    assert "1.5e-04 of 2e-03  ok" in text
    assert "- of 1e-05  WRONG isnan" in text
    assert "copying memory: 4012 GB/s" in text
    assert "36.6   3210   80% met (70 %)" in text
    assert "1700   42%\n" in text
    assert "us a layer, of 60 layers in order" in text
    assert "900.5    250.2    70.0    28%       31 MISSED (2 bounds + 2 us each)" in text
    assert "left out: layers: 2 of 62, which do not fit" in text
    assert max(map(len, text.splitlines())) <= 110


def test_what_was_not_checked_is_not_correct(
    gpu_check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left: dict[str, list[str]] = {"checks": [], "skipped": ["checks: linear"]}
    monkeypatch.setattr(gpu_check, "measure", lambda _: left)
    monkeypatch.setattr(gpu_check, "report", lambda _: "")
    words = ["--device", "cpu", "--tiny", "--only", "checks"]
    assert gpu_check.main(words) == 1
    left["skipped"] = ["layers: 2 of 62, which do not fit"]
    assert gpu_check.main(words) == 0
    assert gpu_check.main([*words, "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main([*words, "--seconds", "-1"])
    assert "--seconds -1: want at least 1" in capsys.readouterr().err
