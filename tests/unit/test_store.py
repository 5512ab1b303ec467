"""The slice store: what is written comes back, what is damaged is named, what is cut goes on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from duck.errors import ConfigError, DuckError, WeightsError
from duck.placement import Slice
from duck.store import LayerImage, LayerWriter, Store, file_bytes, file_header

WHAT = Slice(
    hash="h" * 64, model="m" * 64, layout=1, resident="fp8", start=64, stop=128, columns=192,
    layers=(1, 2, 7), experts=5, hidden=160, record_bytes=192 * 160, scale_floats=14,
)  # fmt: skip


class Arena:
    """Memory for a slice, and what it should hold."""

    def __init__(self, what: Slice = WHAT, seed: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.what = what
        self.records, self.scales = {}, {}
        for layer in what.layers:
            self.records[layer] = np.zeros((what.experts, what.record_bytes), np.uint8)
            self.scales[layer] = np.zeros((what.experts, what.scale_floats), np.float32)
            if seed is not None:
                self.records[layer][:] = rng.integers(0, 256, self.records[layer].shape)
                self.scales[layer][:] = rng.random(self.scales[layer].shape)

    def image(self, layer: int) -> LayerImage:
        return LayerImage(self.what, self.records[layer], self.scales[layer])

    def images(self) -> dict[int, LayerImage]:
        return {layer: self.image(layer) for layer in self.what.layers}

    def file(self, layer: int) -> bytes:
        content = file_header(self.what)
        return content + self.records[layer].tobytes() + self.scales[layer].tobytes()

    def check(self, other: Arena) -> None:
        for layer in self.what.layers:
            np.testing.assert_array_equal(self.records[layer], other.records[layer])
            np.testing.assert_array_equal(self.scales[layer], other.scales[layer])


def fill(folder: Path, arena: Arena) -> Store:
    store = Store(folder)
    with store.claim(arena.what):
        for layer in arena.what.layers:
            content = arena.file(layer)
            with store.write(layer) as writer:
                for start in range(0, len(content), 10_000):
                    writer.write(content[start : start + 10_000])
                writer.finish()
    return store


@pytest.fixture
def arena() -> Arena:
    return Arena(seed=0)


def test_what_is_written_comes_back(tmp_path: Path, arena: Arena) -> None:
    fill(tmp_path / "new" / "duck-001", arena)
    store = Store(tmp_path / "new" / "duck-001")
    assert store.slice == WHAT
    assert set(store.whole()) == set(WHAT.layers)
    found, read = Arena(), []
    store.load(found.images(), read.append)
    found.check(arena)
    assert sum(read) == 3 * file_bytes(WHAT)


@pytest.mark.parametrize("scale_floats", [14, 0])
def test_files_are_safetensors(tmp_path: Path, scale_floats: int) -> None:
    arena = Arena(replace(WHAT, scale_floats=scale_floats), seed=1)
    store = fill(tmp_path, arena)
    tensors = load_file(store.path(2))
    np.testing.assert_array_equal(tensors["records"], arena.records[2])
    np.testing.assert_array_equal(tensors["scales"], arena.scales[2])
    found = Arena(arena.what)
    Store(tmp_path).load(found.images(), lambda _: None)
    found.check(arena)


def test_the_same_slice_gives_the_same_files(tmp_path: Path, arena: Arena) -> None:
    one, other = fill(tmp_path / "a", arena), fill(tmp_path / "b", arena)
    hashes = [[s.whole()[n].sha256 for n in WHAT.layers] for s in (one, other)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3


@pytest.mark.parametrize("place", [0, 100, 5000, -1], ids=["length", "header", "record", "scale"])
def test_one_flipped_bit(tmp_path: Path, arena: Arena, place: int) -> None:
    path = fill(tmp_path, arena).path(2)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"layer-00002\.safetensors is damaged: it has sha256"):
        Store(tmp_path).load(Arena().images(), lambda _: None)


@pytest.mark.parametrize("size", [0, 7, 5000, -1, 1])
def test_a_file_of_another_size(tmp_path: Path, arena: Arena, size: int) -> None:
    path = fill(tmp_path, arena).path(7)
    content = path.read_bytes()
    path.write_bytes(content + b"x" if size == 1 else content[:size])
    with pytest.raises(WeightsError, match=r"layer-00007\.safetensors is damaged: it has \d+ byt"):
        Store(tmp_path).load(Arena().images(), lambda _: None)


def test_a_file_whose_hash_is_right_but_whose_header_is_another(
    tmp_path: Path, arena: Arena
) -> None:
    store = Store(tmp_path)
    with store.claim(WHAT), store.write(1) as writer:
        writer.write(arena.file(1).replace(b"scales", b"scalez"))
        writer.finish()
    with pytest.raises(WeightsError, match="another header"):
        Store(tmp_path).load({1: Arena().image(1)}, lambda _: None)


def test_a_deleted_file_is_missing_not_damaged(tmp_path: Path, arena: Arena) -> None:
    fill(tmp_path, arena).path(2).unlink()
    assert set(Store(tmp_path).whole()) == {1, 7}


GARBAGE = {
    "empty": b"",
    "no JSON": b"\xff\xfe",
    "nested": b"[" * 100_000,
    "list": b"[]",
    "other": b'{"format": "something"}',
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_a_manifest_that_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(WeightsError, match=r"manifest\.json is no manifest of a slice"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["slice"], None),
        (["slice", "hash"], 5),
        (["slice", "experts"], -1),
        (["slice", "experts"], True),
        (["slice", "layers"], ["1"]),
        (["slice", "more"], 1),
        (["layers"], {}),
        (["layers", 0], 5),
        (["layers", 0, "layer"], 3),
        (["layers", 0, "layer"], [1]),
        (["layers", 0, "file"], "../../etc/passwd"),
        (["layers", 0, "file"], "layer-00002.safetensors"),
        (["layers", 0, "bytes"], "5"),
        (["layers", 0, "bytes"], None),
        (["layers", 0, "sha256"], "abc"),
        (["layers", 0, "bytes"], 5),
        (["sources"], {}),
        (["sources"], [{"name": "x"}]),
        (["sources"], [{"name": "x", "nbytes": "5", "mtime_ns": 1}]),
    ],
)
def test_a_manifest_with_a_wrong_field(
    tmp_path: Path, arena: Arena, path: list[str | int], value: object
) -> None:
    fill(tmp_path, arena)
    whole = json.loads((tmp_path / "manifest.json").read_text())
    place = whole
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    with pytest.raises(WeightsError, match=r"manifest\.json is no manifest of a slice"):
        Store(tmp_path)


def test_another_slice_is_refused_by_name(tmp_path: Path, arena: Arena) -> None:
    store = fill(tmp_path, arena)
    other = replace(WHAT, hash="x" * 64, start=0, stop=64)
    with pytest.raises(
        ConfigError, match=r"holds columns 64:128 of 192 of model mmm.*not col.* 0:"
    ):
        store.check(other)
    with pytest.raises(ConfigError, match=r"layout 1, fp8\), not .*layout 2, fp8"):
        store.check(replace(WHAT, layout=2))
    with pytest.raises(ConfigError, match="holds columns"), store.claim(other):
        pass
    store.check(WHAT)


def test_two_processes_do_not_fill_one_folder(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    with (
        first.claim(WHAT),
        pytest.raises(ConfigError, match="is being filled by another process"),
        second.claim(WHAT),
    ):
        pass
    with second.claim(WHAT):
        pass


def test_what_another_process_wrote_is_kept(tmp_path: Path, arena: Arena) -> None:
    """Ours was opened before; its manifest must not forget what came in between."""
    early = Store(tmp_path)
    fill(tmp_path, arena)
    with early.claim(WHAT):
        assert set(early.whole()) == set(WHAT.layers)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot read .*file/store/manifest\.json: Not a dir"):
        Store(tmp_path / "file" / "store")
    store = Store(tmp_path / "store")
    store.folder.touch()
    with pytest.raises(ConfigError, match=r"cannot write .*/store: File exists"), store.claim(WHAT):
        pass


def test_receiving_goes_on_where_it_was_cut(tmp_path: Path, arena: Arena) -> None:
    content = arena.file(2)
    sha256 = fill(tmp_path / "sent", arena).whole()[2].sha256
    for cut in (0, 100, 4096, 50_000, len(content) - 1, len(content)):
        store = Store(tmp_path / f"cut-{cut}")
        with store.claim(WHAT), store.receive(2, Arena().image(2)) as writer:
            writer.write(content[:cut])
        assert store.whole() == {}

        again = Store(tmp_path / f"cut-{cut}")
        found = Arena()  # the arena of a new process is empty
        with again.claim(WHAT), again.receive(2, found.image(2)) as writer:
            assert writer.nbytes == cut
            writer.write(content[cut:])
            writer.finish(sha256)
        np.testing.assert_array_equal(found.records[2], arena.records[2])
        np.testing.assert_array_equal(found.scales[2], arena.scales[2])
        assert again.path(2).read_bytes() == content
        assert set(Store(again.folder).whole()) == {2}


@pytest.mark.parametrize("damage", ["bit", "hash", "short", "header"])
def test_what_was_damaged_on_its_way_does_not_count(
    tmp_path: Path, arena: Arena, damage: str
) -> None:
    content = bytearray(arena.file(2))
    sha256 = fill(tmp_path / "sent", arena).whole()[2].sha256
    store = Store(tmp_path / "received")
    if damage == "bit":
        content[60_000] ^= 1
    if damage == "short":
        del content[-1]
    if damage == "header":
        content[4000] ^= 1
        sha256 = ""
    with store.claim(WHAT), store.receive(2, Arena().image(2)) as writer:
        writer.write(content)
        with pytest.raises(WeightsError, match=r"layer-00002\.safetensors: .* arrived, expected"):
            writer.finish("0" * 64 if damage == "hash" else sha256)
    assert not list(store.folder.glob("*.part"))  # the next try begins anew
    assert store.whole() == {}


def test_more_than_a_layer(tmp_path: Path, arena: Arena) -> None:
    store = Store(tmp_path)
    with store.claim(WHAT):
        for writer in (store.write(1), store.receive(2, Arena().image(2))):
            with writer:
                writer.write(arena.file(1))
                with pytest.raises(WeightsError, match="more than the"):
                    writer.write(b"x")


def test_a_load_ends_when_it_is_told_to(tmp_path: Path, arena: Arena) -> None:
    store = fill(tmp_path, arena)
    read: list[int] = []

    def check() -> None:
        if read:
            raise DuckError("enough")

    before = threading.active_count()
    with pytest.raises(DuckError, match="enough"):
        store.load(Arena().images(), read.append, check)
    assert threading.active_count() == before


def test_a_file_that_vanishes(tmp_path: Path, arena: Arena) -> None:
    store = fill(tmp_path, arena)
    store.path(7).unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*layer-00007"):
        store.load(Arena().images(), lambda _: None)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


STRANGE = pytest.mark.parametrize(("make", "kind"), [(pipe, "a pipe"), (folder, "a folder")])


@STRANGE
def test_what_is_no_file_is_not_waited_for(
    tmp_path: Path, arena: Arena, make: Callable[[Path], None], kind: str
) -> None:
    store = fill(tmp_path, arena)
    make(store.path(2))
    with pytest.raises(WeightsError, match=rf"layer-00002\.safetensors: it is {kind}, want a reg"):
        store.load(Arena().images(), lambda _: None)
    make(tmp_path / "manifest.json")
    with pytest.raises(ConfigError, match=rf"manifest\.json: it is {kind}, want a regular file"):
        Store(tmp_path)


@STRANGE
@pytest.mark.parametrize("name", [".lock", "manifest.json.part", "layer-00001.safetensors.part"])
def test_what_is_no_file_is_not_written_to(
    tmp_path: Path, arena: Arena, make: Callable[[Path], None], kind: str, name: str
) -> None:
    make(tmp_path / name)
    for image in (None, arena.image(1)):
        store = Store(tmp_path)
        with (
            pytest.raises(ConfigError, match=rf"cannot write .*/{name}: it is {kind}, want a reg"),
            store.claim(WHAT),
        ):
            LayerWriter(store, 1, image)
    (tmp_path / name).rename(tmp_path / "away")
    fill(tmp_path, arena)
