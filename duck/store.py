"""A duck's slice on disk, in its resident form: loading it is reading and hashing.

    DIR/manifest.json                  which slice this is; file, bytes and sha256 of every layer;
                                       packed here: the checkpoint files that it was cut from
    DIR/layer-00003.safetensors        "records" U8 [experts, bytes], "scales" F32 [experts, floats]
    DIR/layer-00004.safetensors.part   a layer on its way here

A layer counts once the manifest names it, and the manifest is replaced, in one step, only after the
layer's file is whole and on disk: being killed at any moment loses at most one layer. A file that
the manifest names is trusted by its sha256, and by nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from duck.errors import ConfigError, WeightsError
from duck.files import open_regular
from duck.memory import readable
from duck.placement import Slice

Check = Callable[[], None]
Memory = memoryview | bytearray | bytes

_FORMAT = "duck slice store"
_VERSION = 1
_MANIFEST = "manifest.json"
_LOCK = ".lock"
_MANIFEST_LIMIT = 1 << 24  # bytes; one of 4,096 layers has less than 1 MiB
# Data begins on a page of its own, so that a file can be mapped or read past the page cache.
_DATA_AT = 4096
_CHUNK = 4 << 20  # bytes read at once; about what is still in a core's cache when it is hashed


def check_room(folder: Path, needed_bytes: int, begun_bytes: int = 0) -> None:
    """Refuse to write more than a disk has room for.

    folder: where; it, or one above it, is there. begun_bytes: of what is needed, there already.

    Raises:
        ConfigError: it has not.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, needed_bytes - begun_bytes
    if needed > free:
        raise ConfigError(
            f"{folder}: the slices need {readable(needed)} more on this disk, which has "
            f"{readable(free)} free: make room, or use a folder on another disk"
        )


def file_bytes(what: Slice) -> int:
    """Bytes of the file of one layer."""
    return _DATA_AT + what.layer_bytes


def file_header(what: Slice) -> bytes:
    """How every layer's file begins: safetensors' length and JSON, padded with spaces."""
    split = what.experts * what.record_bytes
    shapes = {
        "records": ("U8", [what.experts, what.record_bytes], [0, split]),
        "scales": ("F32", [what.experts, what.scale_floats], [split, what.layer_bytes]),
    }
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": place}
        for name, (dtype, shape, place) in shapes.items()
    }
    text = json.dumps(entries).encode().ljust(_DATA_AT - 8)
    return len(text).to_bytes(8, "little") + text


class LayerImage:
    """One layer's file laid over the memory it belongs in: header, records, scales.

    records: (experts, record_bytes) uint8; scales: (experts, scale_floats) float32; both contiguous
    and written to through this.
    """

    def __init__(self, what: Slice, records: np.ndarray, scales: np.ndarray) -> None:
        assert records.nbytes + scales.nbytes == what.layer_bytes
        self._expected = file_header(what)
        self._head = bytearray(_DATA_AT)
        self._parts = (
            memoryview(self._head),
            records.reshape(-1).view(np.uint8).data,
            scales.reshape(-1).view(np.uint8).data,
        )
        self.nbytes = file_bytes(what)

    def parts(self, start: int, stop: int) -> Iterator[memoryview]:
        """The memory behind the file's bytes `start` .. `stop - 1`, piece by piece."""
        begin = 0
        for part in self._parts:
            first, last = max(start - begin, 0), min(stop - begin, len(part))
            if first < last:
                yield part[first:last]
            begin += len(part)

    def put(self, start: int, data: Memory) -> None:
        """Write bytes of the file to where they belong."""
        view = memoryview(data)
        for part in self.parts(start, start + len(view)):
            part[:] = view[: len(part)]
            view = view[len(part) :]

    @property
    def header_is_right(self) -> bool:
        return self._head == self._expected


@dataclass(frozen=True)
class StoredLayer:
    """One line of the manifest."""

    path: Path
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A checkpoint's file as it was when a slice was cut from it."""

    name: str
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Raises WeightsError when it cannot be looked at."""
        try:
            found = path.stat()
        except OSError as problem:
            raise WeightsError(f"cannot read {path}: {problem.strerror}") from problem
        return cls(path.name, found.st_size, found.st_mtime_ns)


class Store:
    """One folder with one slice, or an empty one.

    Raises:
        WeightsError: the folder has a manifest that is none.
        ConfigError: the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slice: Slice | None = None
        self.sources: tuple[SourceFile, ...] = ()  # none where nobody knows
        self._layers: dict[int, StoredLayer] = {}
        text = _read(folder / _MANIFEST)
        if text is not None:
            self.slice, self._layers, self.sources = _parse(folder, text)

    def check(self, want: Slice) -> None:
        """Refuse to be taken for another slice.

        Raises:
            ConfigError: the folder holds one already, and it is not this one.
        """
        if self.slice is None or self.slice == want:
            return
        have, wanted = str(self.slice), str(want)
        if have == wanted:
            have += f" (layout {self.slice.layout}, {self.slice.resident})"
            wanted += f" (layout {want.layout}, {want.resident})"
        raise ConfigError(
            f"{self.folder} holds {have}, not {wanted}: use another folder, or remove this one"
        )

    def check_sources(self, sources: Sequence[SourceFile]) -> None:
        """Refuse to be completed from other files than it was begun with.

        Raises:
            ConfigError: they changed since, or are others.
        """
        if not self._layers or not self.sources or self.sources == tuple(sources):
            return
        changed = sorted({file.name for file in {*self.sources} ^ {*sources}})
        raise ConfigError(
            f"{self.folder} was packed from other files: {changed[0]} is not what it was then (its "
            "size or its time of change), and slices of two checkpoints must not mix: use another "
            "folder, or remove this one"
        )

    @contextlib.contextmanager
    def claim(self, want: Slice, sources: Sequence[SourceFile] = ()) -> Iterator[None]:
        """Hold the folder for writing this slice's layers; makes it if need be.

        sources: the checkpoint's files that the layers are cut from, if they are on this machine.

        Raises:
            ConfigError: it holds another slice, or layers cut from other files; another process
                fills it, or it cannot be written.
        """
        self.check(want)
        with contextlib.ExitStack() as stack:
            with _writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with _writing(self.folder / _LOCK):
                lock = stack.enter_context(open_regular(self.folder / _LOCK, "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.folder} is being filled by another process: wait for it, or stop it"
                    ) from None
            # Another process may have filled it between our reading and our lock.
            fresh = Store(self.folder)
            fresh.check(want)
            fresh.check_sources(sources or fresh.sources)
            self.slice, self._layers = want, fresh._layers
            # Of layers that a host sent, nobody knows the files.
            self.sources = fresh.sources if fresh._layers else tuple(sources)
            if fresh.slice is None or fresh.sources != self.sources:
                self._save()
            yield

    def whole(self) -> dict[int, StoredLayer]:
        """The layers that are here: named by the manifest, and their files exist."""
        return {layer: stored for layer, stored in self._layers.items() if stored.path.exists()}

    def parts(self, layers: Collection[int]) -> int:
        """Bytes that earlier tries left of these layers, and that a new one takes the place of."""
        sizes = 0
        for layer in layers:
            with contextlib.suppress(FileNotFoundError):
                sizes += self.part(layer).stat().st_size
        return sizes

    def part(self, layer: int) -> Path:
        """Where a layer lies while it is on its way."""
        return self.path(layer).with_suffix(".safetensors.part")

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.safetensors"

    def write(self, layer: int) -> LayerWriter:
        """Begin a layer anew."""
        return LayerWriter(self, layer, None)

    def receive(self, layer: int, image: LayerImage) -> LayerWriter:
        """Go on with a layer where it was cut off; what is written also goes into memory."""
        return LayerWriter(self, layer, image)

    def load(
        self,
        images: Mapping[int, LayerImage],
        progress: Callable[[int], None],
        check: Check = lambda: None,
        verified: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Read whole layers into memory and verify them.

        progress: called with the bytes of every stretch read; check: called as often, may raise;
        verified: called with each layer once it is, in one of several threads.

        Raises:
            WeightsError: a file is not what the manifest says; names it, what was expected, found.
        """
        files = {layer: _Reading(self._layers[layer], image) for layer, image in images.items()}

        def verify(layer: int) -> None:
            if files[layer].hash():
                verified(layer)

        # A core hashes and adopts about 1 GB/s; the reader mostly waits for the disk.
        hashers = max(1, min(4, os.cpu_count() or 1, len(files)))
        with ThreadPoolExecutor(hashers, thread_name_prefix="sha256") as pool:
            hashing = []
            try:
                for layer, file in files.items():
                    hashing.append(pool.submit(verify, layer))
                    file.read(progress, check)
                    for done in [future for future in hashing if future.done()]:
                        done.result()  # a damaged file ends the load as soon as it is known
                        hashing.remove(done)
            except BaseException:
                for file in files.values():
                    file.give_up()
                raise
            for future in hashing:
                future.result()

    def is_right(self, layer: int, progress: Callable[[int], None]) -> bool:
        """Whether a layer's file is what the manifest says; reads all of it.

        Raises:
            WeightsError: it cannot be read.
        """
        stored, sha = self._layers[layer], hashlib.sha256()
        try:
            with open_regular(stored.path) as file:
                if os.fstat(file.fileno()).st_size != stored.nbytes:
                    return False
                while data := file.read(_CHUNK):
                    sha.update(data)
                    progress(len(data))
        except OSError as problem:
            raise WeightsError(f"cannot read {stored.path}: {problem.strerror}") from problem
        return sha.hexdigest() == stored.sha256

    def _add(self, layer: int, stored: StoredLayer) -> None:
        self._layers[layer] = stored
        self._save()

    def _save(self) -> None:
        assert self.slice is not None
        facts = asdict(self.slice)
        layers = [
            {"layer": layer, "file": stored.path.name, "bytes": stored.nbytes,
             "sha256": stored.sha256}
            for layer, stored in sorted(self._layers.items())
        ]  # fmt: skip
        whole = {"format": _FORMAT, "version": _VERSION, "slice": facts, "layers": layers}
        if self.sources:
            whole["sources"] = [asdict(source) for source in self.sources]
        temporary = self.folder / f"{_MANIFEST}.part"
        with _writing(temporary):
            buffered = BufferedWriter(open_regular(temporary, "w"))
            with TextIOWrapper(buffered, encoding="utf-8") as file:
                json.dump(whole, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / _MANIFEST)
            _sync_folder(self.folder)


class LayerWriter:
    """A layer's file on its way; `finish` makes it count, else it is left for the next time.

    A context manager. image: also put everything there, and go on after the bytes that an earlier
    try left.
    """

    def __init__(self, store: Store, layer: int, image: LayerImage | None) -> None:
        assert store.slice is not None, "only inside claim()"
        self._store, self._layer, self._image = store, layer, image
        self._total = file_bytes(store.slice)
        self._part = store.part(layer)
        self._sha = hashlib.sha256()
        self.nbytes = 0  # so far
        with _writing(self._part):
            if image is None or not self._part.exists():
                self._file = open_regular(self._part, "w")
                return
            self._file = open_regular(self._part, "r+")
            for part in image.parts(0, self._total):
                count = _read_into(self._file, part)
                self._sha.update(part[:count])
                self.nbytes += count
            self._file.truncate(self.nbytes)

    def write(self, data: Memory) -> None:
        """Add the next bytes.

        Raises:
            WeightsError: more than the layer has.
            ConfigError: they cannot be written.
        """
        view = memoryview(data).cast("B")
        if self.nbytes + len(view) > self._total:
            raise WeightsError(f"{self._part.name}: more than the {self._total} bytes expected")
        if self._image is not None:
            self._image.put(self.nbytes, view)
        self._sha.update(view)
        self.nbytes += len(view)
        with _writing(self._part):
            while view:
                view = view[self._file.write(view) :]

    def finish(self, sha256: str | None = None) -> StoredLayer:
        """The layer is whole: put it in its place and into the manifest.

        sha256: what it must be, when another wrote it.

        Raises:
            WeightsError: it is not what it must be; what there was of it is gone.
            ConfigError: it cannot be written.
        """
        digest = self._sha.hexdigest()
        right = self._image is None or self._image.header_is_right
        if self.nbytes != self._total or not right or sha256 not in (None, digest):
            self._file.close()
            self._part.unlink(missing_ok=True)
            raise WeightsError(
                f"{self._store.path(self._layer).name}: {self.nbytes} bytes with sha256 "
                f"{digest[:12]} arrived, expected {self._total} bytes with {str(sha256)[:12]}"
            )
        path = self._store.path(self._layer)
        with _writing(path):
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(path)
            _sync_folder(path.parent)
        stored = StoredLayer(path, self.nbytes, digest)
        self._store._add(self._layer, stored)
        return stored

    def close(self) -> None:
        """Stop here; may be called twice, and after `finish`."""
        self._file.close()

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reading:
    """A file on its way into memory: one thread reads, another hashes behind it."""

    def __init__(self, stored: StoredLayer, image: LayerImage) -> None:
        self._stored, self._image = stored, image
        self._have = 0
        self._ended = False
        self._moved = threading.Condition()

    def read(self, progress: Callable[[int], None], check: Check) -> None:
        path = self._stored.path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != self._image.nbytes:
                    raise self._wrong(f"{size} bytes", f"{self._image.nbytes}")
                for start in range(0, size, _CHUNK):
                    check()
                    stop = min(start + _CHUNK, size)
                    for part in self._image.parts(start, stop):
                        if _read_into(file, part) < len(part):
                            raise self._wrong("an early end", f"{size} bytes")
                    with self._moved:
                        self._have = stop
                        self._moved.notify()
                    progress(stop - start)
        except OSError as problem:
            raise WeightsError(f"cannot read {path}: {problem.strerror}") from problem

    def hash(self) -> bool:
        """Whether all of it was read and is right; False when it was given up.

        Raises:
            WeightsError: it is not right.
        """
        sha, done = hashlib.sha256(), 0
        while done < self._image.nbytes:
            with self._moved:
                while self._have == done and not self._ended:
                    self._moved.wait()
                have = self._have
            if have == done:
                return False
            for part in self._image.parts(done, have):
                sha.update(part)
            done = have
        if sha.hexdigest() != self._stored.sha256:
            found, expected = sha.hexdigest()[:12], self._stored.sha256[:12]
            raise self._wrong(f"sha256 {found}", f"{expected} as {_MANIFEST} says")
        if not self._image.header_is_right:
            raise self._wrong("another header", "that of its slice")
        return True

    def give_up(self) -> None:
        """Nothing more will be read."""
        with self._moved:
            self._ended = True
            self._moved.notify()

    def _wrong(self, found: str, expected: str) -> WeightsError:
        return WeightsError(
            f"{self._stored.path} is damaged: it has {found}, expected {expected}; delete it, and "
            "it will be packed or sent again"
        )


def _read_into(file: Any, part: memoryview) -> int:
    """Fill a stretch of memory from a raw file; fewer bytes only where the file ends."""
    count = 0
    while count < len(part):
        got = file.readinto(part[count:])
        if not got:
            break
        count += got
    return count


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one line what the system says when something cannot be written."""
    try:
        yield
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror or problem}") from problem


def _sync_folder(folder: Path) -> None:
    """A renamed file is safe only once its folder is on disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> bytes | None:
    try:
        with open_regular(path) as file:
            return file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror}") from problem


def _parse(
    folder: Path, text: bytes
) -> tuple[Slice, dict[int, StoredLayer], tuple[SourceFile, ...]]:
    """The manifest's slice, its layers, and the files that they were cut from.

    Raises:
        WeightsError: it is not one that this version writes.
    """
    path = folder / _MANIFEST

    def wrong(what: str) -> WeightsError:
        return WeightsError(
            f"{path} is no manifest of a slice ({what}): remove {folder}, and fill it again"
        )

    try:
        if len(text) > _MANIFEST_LIMIT:
            raise wrong(f"more than {_MANIFEST_LIMIT} bytes")
        whole = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise wrong(f"not JSON: {problem}") from problem
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise wrong(f'no "format": "{_FORMAT}"')
    if whole.get("version") != _VERSION:
        raise wrong(f"version {whole.get('version')!r}, this duck reads {_VERSION}")
    facts, entries = whole.get("slice"), whole.get("layers")
    if not isinstance(facts, dict) or not isinstance(entries, list):
        raise wrong("no slice, or no layers")
    what = _slice(facts)
    if what is None:
        raise wrong("its slice is incomplete")
    layers: dict[int, StoredLayer] = {}
    for entry in entries:
        layer, name, size, digest = (
            (entry.get(key) for key in ("layer", "file", "bytes", "sha256"))
            if isinstance(entry, dict)
            else (None,) * 4
        )
        if layer not in what.layers or name != f"layer-{layer:05}.safetensors":
            raise wrong(f"layer {layer!r} in {name!r}")
        if type(size) is not int or not isinstance(digest, str) or len(digest) != 64:
            raise wrong(f"layer {layer} without its bytes or sha256")
        if size != file_bytes(what):
            raise wrong(f"layer {layer} of {size} bytes, its slice's have {file_bytes(what)}")
        layers[layer] = StoredLayer(folder / name, size, digest)
    sources = whole.get("sources", [])
    keys = {"name": str, "nbytes": int, "mtime_ns": int}
    if not isinstance(sources, list) or not all(
        isinstance(source, dict)
        and set(source) == set(keys)
        and all(type(source[key]) is kind for key, kind in keys.items())
        for source in sources
    ):
        raise wrong("sources that are no files")
    return what, layers, tuple(SourceFile(**source) for source in sources)


def _slice(facts: Mapping[str, Any]) -> Slice | None:
    texts = ("hash", "model", "resident")
    numbers = (
        "layout", "start", "stop", "columns", "experts", "hidden", "record_bytes", "scale_floats",
    )  # fmt: skip
    layers = facts.get("layers")
    if (
        set(facts) != {*texts, *numbers, "layers"}
        or not all(isinstance(facts[name], str) for name in texts)
        or not all(type(facts[name]) is int and facts[name] >= 0 for name in numbers)
        or not isinstance(layers, list)
        or not all(type(layer) is int for layer in layers)
    ):
        return None
    return Slice(**{**facts, "layers": tuple(layers)})
