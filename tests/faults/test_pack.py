"""`duck pack`: killed at any moment it is completed by repeating it, with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from duck.cli import main
from duck.errors import ConfigError, WeightsError
from duck.pack import pack
from duck.store import Store
from tests.checkpoints import make_checkpoint

# Runs `duck pack` with its system calls counted; the chosen one kills the process instead.
KILLED = """
import os, signal, sys
from pathlib import Path
from duck import cli, store

left = int(sys.argv[1])
def count(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted

store.os.fsync = count(os.fsync)
store.Path.replace = count(Path.replace)
store.LayerWriter.write = count(store.LayerWriter.write)
store.json.dump = count(store.json.dump)
sys.exit(cli.main(sys.argv[2:]))
"""
CALLS = 158  # in one undisturbed run of two ducks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    pack(model, [1, 1], out)
    return contents(out)


def contents(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("seed", "kills"), [(0, 1), (1, 1), (2, 1), (3, 1), (4, 3)])
def test_killed_and_repeated(
    model: Path, whole: dict[str, bytes], tmp_path: Path, seed: int, kills: int
) -> None:
    rng = random.Random(seed)
    command = ["pack", str(model), "--ducks", "2", "--out", str(tmp_path)]
    before: set[str] = set()
    for _ in range(kills):
        calls = str(rng.randrange(1, CALLS // kills))
        process = subprocess.run(
            [sys.executable, "-c", KILLED, calls, *command], capture_output=True, check=False
        )
        assert process.returncode == -signal.SIGKILL, f"seed {seed}: {process.stderr!r}"
        held: set[str] = set()
        for folder in sorted(tmp_path.glob("duck-*")):
            for stored in Store(folder).whole().values():
                name = str(stored.path.relative_to(tmp_path))
                assert stored.path.read_bytes() == whole[name], f"seed {seed}: {name}"
                held.add(name)
        assert before <= held, f"seed {seed}: what was whole must stay"
        before = held
    assert main(command) == 0
    assert contents(tmp_path) == whole


def test_repeating_writes_nothing(model: Path, tmp_path: Path) -> None:
    first = pack(model, [1, 1, 1], tmp_path)
    inodes = {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}
    seen: list[tuple[int, int]] = []
    again = pack(model, [1, 1, 1], tmp_path, lambda done, total: seen.append((done, total)))
    assert [duck.sha256 for duck in again] == [duck.sha256 for duck in first]
    assert [duck.written_bytes for duck in again] == [0, 0, 0]
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")} == inodes
    assert not seen


def test_a_truncated_or_deleted_file_is_written_again(model: Path, tmp_path: Path) -> None:
    pack(model, [1], tmp_path)
    before = contents(tmp_path)
    os.truncate(tmp_path / "duck-000" / "layer-00001.safetensors", 1000)
    (tmp_path / "duck-000" / "layer-00003.safetensors").unlink()
    (packed,) = pack(model, [1], tmp_path)
    assert 0 < packed.written_bytes < packed.slice.nbytes
    assert contents(tmp_path) == before


def test_a_damaged_file_is_written_again(model: Path, tmp_path: Path) -> None:
    """Of the same size, so that only reading it tells; what is whole is said to be verified."""
    first = pack(model, [1, 1], tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "duck-001" / "layer-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    seen: list[tuple[int, int]] = []
    with capture_logs() as log:
        again = pack(
            model, [1, 1], tmp_path, verifying=lambda done, total: seen.append((done, total))
        )
    assert [event["file"] for event in log if event["event"] == "damaged"] == [str(path)]
    assert contents(tmp_path) == before
    assert [duck.sha256 for duck in again] == [duck.sha256 for duck in first]
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert again[1].written_bytes == len(content)
    assert again[0].verified_bytes + again[1].verified_bytes + len(content) == sum(sizes)
    assert seen[-1] == (sum(sizes), sum(sizes))


@pytest.mark.parametrize("change", ["time", "bytes", "name"])
def test_two_checkpoints_do_not_mix(tmp_path: Path, change: str) -> None:
    """Bytes that the model's digest does not cover: nothing else would tell."""
    model = make_checkpoint(tmp_path / "model", seed=0, shards=2)
    out = tmp_path / "out"
    pack(model, [1], out)
    (out / "duck-000" / "layer-00002.safetensors").unlink()
    path = model / "model-00002-of-00002.safetensors"
    found = path.stat()
    if change == "time":
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    if change == "bytes":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))
    if change == "name":
        index = model / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(path.name, "other.safetensors"))
        path = path.rename(model / "other.safetensors")
    before = contents(out)
    with pytest.raises(ConfigError, match=rf"packed from other files: .*{path.name}|model-00002"):
        pack(model, [1], out)
    assert contents(out) == before


def test_a_checkpoint_that_changes_while_it_is_packed(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", seed=0)
    path = model / "model.safetensors"

    def touch(done: int, total: int) -> None:
        os.utime(path, ns=(0, done))

    with pytest.raises(WeightsError, match=r"changed while they were read: remove .*out"):
        pack(model, [1], tmp_path / "out", touch)
    with pytest.raises(ConfigError, match="packed from other files"):
        pack(model, [1], tmp_path / "out")


def test_progress(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    packed = pack(model, [2, 1], tmp_path, lambda done, total: seen.append((done, total)))
    assert [seen[-1][0]] * 2 == [seen[-1][1], sum(duck.written_bytes for duck in packed)]
    assert seen == sorted(seen)
    assert [len(range(d.slice.start, d.slice.stop)) for d in packed] == [128, 64]


def test_another_slice_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    pack(model, [1, 1, 1], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"duck-000 holds columns 0:64 of 192 .*not columns 0:12"):
        pack(model, [1, 1], tmp_path)
    # The first duck's columns are the same, but a third duck is left over.
    with pytest.raises(ConfigError, match=r"duck-001 holds columns 64:128 of 192 .* not columns 6"):
        pack(model, [1, 2], tmp_path)
    assert contents(tmp_path) == before


def test_a_pack_for_more_ducks_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "duck-002").mkdir()
    with pytest.raises(ConfigError, match=r"holds duck-002, of a pack for more than 2 ducks"):
        pack(model, [1, 1], tmp_path)


def test_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    pack(model, [1], tmp_path / "out")
    other = make_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"holds columns 0:192 of 192 of model [0-9a-f]{12}, not"):
        pack(other, [1], tmp_path / "out")


def test_no_room(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("duck.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"need .* more on this disk, which has 1\.0 KiB free"):
        pack(model, [1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", ["bf16", "f32"])
def test_other_residents(tmp_path: Path, weights: str) -> None:
    model = make_checkpoint(tmp_path / "model", seed=0, weights=weights)
    (packed,) = pack(model, [1], tmp_path / "out")
    assert packed.slice.resident == weights
    assert packed.slice.scale_floats == 0
    assert set(packed.sha256) == {1, 2, 3}


# --- the command


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", str(model), "--weights", "2,1", "--out", str(tmp_path)]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "duck-000" in table
    assert "all" in table
    assert "fp8" in table
    assert max(map(len, table.splitlines())) <= 80
    assert "128:192" in table
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ducks"]
    assert [duck["columns"] for duck in found] == [[0, 128], [128, 192]]
    assert [duck["written_bytes"] for duck in found] == [0, 0]
    assert sum(duck["theory_bytes"] for duck in found) == found[0]["source_bytes"]
    assert set(found[0]["sha256"]) == {"1", "2", "3"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--ducks", "0"], "--ducks 0: want 1 or more"),
        (["--ducks", "193"], "193 ducks for 192 columns"),
        (["--weights", "1,x"], "--weights '1,x': want numbers"),
        (["--weights", "1,0"], "weight 0.0: want a number above 0"),
        (["--weights", "1,nan"], "weight nan"),
        (["--weights", "-1,2"], "weight -1.0: want a number above 0"),
        (["--weights", "1,1", "--ducks", "3"], "--weights has 2 numbers for --ducks 3"),
    ],
)
def test_bad_usage(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], found: str
) -> None:
    assert main(["pack", str(model), "--out", str(tmp_path / "out"), *options]) == 2
    assert found in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
