"""Ducks that keep their slice: filled by their host, cut off, warm, damaged, out of room."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from duck.engine import Engine
from duck.errors import ConfigError, DuckError, TransportError, WeightsError, WireError
from duck.model.weights import Checkpoint
from duck.node import Node
from duck.pack import pack, plan_for
from duck.placement import Plan, Slice
from duck.sampling import Sampling
from duck.slices import ModelSource, StoreSource, layer_stream, slice_of
from duck.store import LayerWriter, Store, file_bytes
from duck.transports import supply
from duck.transports.tcp import TcpTransport
from tests.checkpoints import make_checkpoint
from tests.faults.peers import Host, Peer, ScriptedDuck, hello
from tests.flocks import WAIT_S, listening

DUCKS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of a complete pack."""
    return [duck.folder for duck in pack(model, [1] * DUCKS, tmp_path_factory.mktemp("packed"))]


@pytest.fixture(scope="module")
def agreed(model: Path) -> tuple[Checkpoint, Plan]:
    return plan_for(model, [1] * DUCKS)


@pytest.fixture(autouse=True)
async def close_peers() -> AsyncIterator[None]:
    yield
    await Peer.close_all()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a layer of a tiny model takes as many as one of a real model."""
    monkeypatch.setattr(supply, "PIECE_BYTES", 1 << 13)
    monkeypatch.setattr(supply, "WINDOW_BYTES", 1 << 16)


class Cut:
    """A proxy before a duck that cuts its first connection after so many bytes from the host."""

    def __init__(self, address: str, after: int) -> None:
        self._address, self._left = address, after
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host, port = self._address.rsplit(":", 1)
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._copy(reader, far_writer, count=True))
                group.create_task(self._copy(far_reader, writer, count=False))
        except* ConnectionError:
            pass
        finally:
            writer.transport.abort()
            far_writer.transport.abort()

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool
    ) -> None:
        while data := await source.read(1 << 12):
            if count:
                data = data[: self._left]
                self._left -= len(data)
            sink.write(data)
            await sink.drain()
            if count and not self._left:
                break
        raise ConnectionError("cut")


async def attach(
    addresses: list[str], agreed: tuple[Checkpoint, Plan], **more: Any
) -> list[dict[str, Any]]:
    """Start and close a host that can send layers; what the ducks said."""
    checkpoint, plan = agreed

    def stream(duck: int, layer: int) -> Iterator[memoryview]:
        return layer_stream(checkpoint, slice_of(plan, duck), layer)

    host = TcpTransport(addresses, **{"supply": stream, **more})
    try:
        async with asyncio.timeout(WAIT_S):
            await host.start(plan)
        return [dict(facts) for facts in host.attached]
    finally:
        await host.close()


@contextlib.asynccontextmanager
async def ducks(*sources: StoreSource | ModelSource) -> AsyncIterator[list[str]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [(await stack.enter_async_context(listening(Node(source))))[0] for source in sources]


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "manifest.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert manifest(one) == manifest(other)


def manifest(folder: Path) -> dict[str, Any]:
    """But for the files it was cut from, which a host does not tell."""
    whole: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    whole.pop("sources", None)
    return whole


async def test_an_empty_store_is_filled_once(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    folders = [tmp_path / f"duck-{number}" for number in range(DUCKS)]
    whole = [slice_of(agreed[1], duck) for duck in range(DUCKS)]
    file_sizes = [3 * file_bytes(what) for what in whole]
    progress: list[tuple[int, int, int]] = []
    async with ducks(*map(StoreSource, folders)) as addresses:
        first = await attach(addresses, agreed, progress=lambda *told: progress.append(told))
        assert [facts["warm"] for facts in first] == [False, False]
        assert [facts["read_bytes"] for facts in first] == [0, 0]
        assert [facts["received_bytes"] for facts in first] == file_sizes
        for folder, other in zip(folders, packed, strict=True):
            same_files(folder, other)
        # The arena outlives its host: not a byte moves for the next one.
        for facts in await attach(addresses, agreed):
            assert facts["warm"] is True
            assert (facts["read_bytes"], facts["received_bytes"]) == (0, 0)
    async with ducks(*map(StoreSource, folders)) as addresses:  # new processes, filled stores
        for facts, size in zip(await attach(addresses, agreed), file_sizes, strict=True):
            assert facts["warm"] is False
            assert (facts["read_bytes"], facts["received_bytes"]) == (size, 0)
    assert all(0 <= done <= total for _, done, total in progress)


@pytest.mark.parametrize("part", [0.02, 0.4, 0.7])
async def test_a_cut_connection_goes_on(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path, part: float
) -> None:
    """From the bytes already there: whole layers, and the beginning of one."""
    what = slice_of(agreed[1], 0)
    all_bytes = 3 * file_bytes(what)
    source = StoreSource(tmp_path / "duck-0")
    async with ducks(source, StoreSource(packed[1])) as (address, other):
        async with Cut(address, int(part * all_bytes)).listening() as cut:
            with pytest.raises(TransportError, match=r"lost duck 0 .* before WELCOME"):
                await attach([cut, other], agreed)
        kept = sum(path.stat().st_size for path in source.store.folder.glob("layer-*"))
        (facts, _) = await attach([address, other], agreed)
        assert facts["warm"] is False
        # Layers that had come whole are still in memory; of the other one the rest was sent.
        assert facts["received_bytes"] <= all_bytes - kept
        assert facts["received_bytes"] >= (1 - part) * all_bytes
    same_files(tmp_path / "duck-0", packed[0])


async def test_a_killed_duck_goes_on(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    """Its memory is gone; its store has what had come."""
    what = slice_of(agreed[1], 0)
    folder = tmp_path / "duck-0"
    async with (
        ducks(StoreSource(folder), StoreSource(packed[1])) as (address, other),
        Cut(address, int(1.5 * file_bytes(what))).listening() as cut,
    ):
        with pytest.raises(TransportError):
            await attach([cut, other], agreed)
    assert set(Store(folder).whole()) == {1}
    async with ducks(StoreSource(folder), StoreSource(packed[1])) as addresses:
        facts = (await attach(addresses, agreed))[0]
        assert facts["read_bytes"] >= 1.3 * file_bytes(what)
        assert facts["read_bytes"] + facts["received_bytes"] == 3 * file_bytes(what)
    same_files(folder, packed[0])


async def test_a_damaged_part_is_sent_anew(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    """What an earlier try left was written by a machine that lost power, say."""
    folder = tmp_path / "duck-0"
    folder.mkdir()
    part = folder / "layer-00002.safetensors.part"
    part.write_bytes(bytes(50_000))
    async with ducks(StoreSource(folder), StoreSource(packed[1])) as addresses:
        facts = (await attach(addresses, agreed))[0]
    assert facts["received_bytes"] >= 3 * file_bytes(slice_of(agreed[1], 0))
    assert not part.exists()
    same_files(folder, packed[0])


async def test_a_host_with_nothing_to_send(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    async with ducks(StoreSource(tmp_path / "empty"), StoreSource(packed[1])) as addresses:
        with pytest.raises(TransportError, match=r"duck 0 .* lacks layer 1, and this host has no"):
            await attach(addresses, agreed, supply=None)


async def test_a_host_whose_own_model_is_damaged(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    def damaged(duck: int, layer: int) -> Iterator[memoryview]:
        stream = layer_stream(agreed[0], slice_of(agreed[1], duck), layer)
        for _ in range(5):
            yield next(stream)
        raise WeightsError("model.safetensors: tensor x is cut off")

    source = StoreSource(tmp_path / "empty")
    async with ducks(source, StoreSource(packed[1])) as addresses:
        with pytest.raises(WeightsError, match="tensor x is cut off"):
            await attach(addresses, agreed, supply=damaged)
        assert (await attach(addresses, agreed))[0]["received_bytes"] > 0
    same_files(tmp_path / "empty", packed[0])


# --- what a duck refuses


@pytest.mark.parametrize("place", [5, 5000, -1])
async def test_a_damaged_store_is_refused_by_file(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path, place: int
) -> None:
    copy(packed[0], tmp_path)
    path = tmp_path / "layer-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    async with ducks(StoreSource(tmp_path), StoreSource(packed[1])) as addresses:
        with pytest.raises(WireError, match=r"duck 0 .* refused: .*layer-00002.* is damaged: it"):
            await attach(addresses, agreed)
        path.unlink()  # as the message says
        facts = (await attach(addresses, agreed))[0]
        assert facts["received_bytes"] == file_bytes(slice_of(agreed[1], 0))
    same_files(tmp_path, packed[0])


def copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


async def test_a_store_of_another_slice_or_model(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    async with ducks(StoreSource(packed[1]), StoreSource(packed[1])) as addresses:
        with pytest.raises(
            WireError, match=r"duck 0 .* is duck 1's of this plan, .* as duck 0: change the order"
        ):
            await attach(addresses, agreed)
    other = pack(make_checkpoint(tmp_path / "model", seed=1), [1, 1], tmp_path / "packed")
    async with ducks(StoreSource(other[0].folder), StoreSource(packed[1])) as addresses:
        with pytest.raises(WireError, match=r"duck 0 .* of model [0-9a-f]{12}, not columns 0:128"):
            await attach(addresses, agreed)


async def test_no_room_in_memory(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    """Told before anything is read, or given back: the slice that is held stays."""
    checkpoint, plan = agreed
    free = [slice_of(plan, 0).nbytes + 1]

    def check_fits(needed: int, given_back: int) -> None:
        if needed > free[0] + given_back:
            raise ConfigError(f"needs {needed}, {free[0]} free")

    source = ModelSource(checkpoint.folder)
    node = Node(source, check_fits=check_fits)
    async with listening(node) as (address, end):
        async with Host.attached(address, plan, 0) as host:
            assert host.welcome["warm"] is False
        free[0] = -1
        await until(lambda: not end._sessions)
        peer = await Peer.connect(address)  # of a host that wants all columns
        peer.say("HELLO", **hello(plan_for(checkpoint.folder, [1])[1]))
        assert "needs" in (await peer.hear())["text"]
        async with Host.attached(address, plan, 0) as host:
            assert host.welcome["warm"] is True


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("when", ["before", "between"])
async def test_no_room_on_disk(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path, when: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if when == "before":
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("duck.store.shutil.disk_usage", lambda _: usage)
        found = r"need .* more on this disk, which has 1\.0 KiB free: make room"
    else:
        write, left = LayerWriter.write, [20]

        def full(self: LayerWriter, data: bytes) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise ConfigError("cannot write layer: No space left on device")
            write(self, data)

        monkeypatch.setattr(LayerWriter, "write", full)
        found = "No space left on device"
    async with ducks(StoreSource(tmp_path / "duck"), StoreSource(packed[1])) as addresses:
        with pytest.raises(WireError, match=f"duck 0 .* refused: .*{found}"):
            await attach(addresses, agreed)
        assert (tmp_path / "duck").exists() == (when == "between")  # refused: nothing is written
        monkeypatch.undo()
        assert (await attach(addresses, agreed))[0]["received_bytes"] > 0
    same_files(tmp_path / "duck", packed[0])


# --- hosts and ducks that lie


async def lacking(plan: Plan, address: str) -> Peer:
    """A host made by hand whose duck has just said what it lacks."""
    peer = await Peer.connect(address)
    peer.say("HELLO", **hello(plan))
    lack = await peer.hear()
    assert (lack["t"], lack["layer"], lack["offset"]) == ("LACK", 1, 0)
    return peer


PIECES = {
    "another layer": {"layer": 2},
    "another place": {"offset": 5},
    "too large": {"data": bytes((1 << 13) + 1)},
    "no bytes": {"data": "text"},
    "no sha256": {"data": b"", "sha256": 5},
}


@pytest.mark.parametrize("change", PIECES.values(), ids=PIECES)
async def test_pieces_that_are_none(
    agreed: tuple[Checkpoint, Plan], tmp_path: Path, change: dict[str, Any]
) -> None:
    async with listening(Node(StoreSource(tmp_path / "duck"))) as (address, end):
        peer = await lacking(agreed[1], address)
        peer.say("PIECE", **{"layer": 1, "offset": 0, "data": b"x", **change})
        assert (await peer.hear())["t"] == "ERR"
        assert await peer.ended()
        await until(lambda: not end._sessions)
        await lacking(agreed[1], address)  # the duck lives, and its folder is free


async def test_something_else_than_a_piece(agreed: tuple[Checkpoint, Plan], tmp_path: Path) -> None:
    async with listening(Node(StoreSource(tmp_path / "duck"))) as (address, _):
        peer = await lacking(agreed[1], address)
        peer.say("HELLO")
        assert "where a PIECE was due" in (await peer.hear())["text"]


async def test_a_layer_whose_bytes_are_not_what_the_host_says(
    agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    checkpoint, plan = agreed
    what = slice_of(plan, 0)
    content = b"".join(bytes(piece) for piece in layer_stream(checkpoint, what, 1))
    folder = tmp_path / "duck"
    async with listening(Node(StoreSource(folder))) as (address, _):
        peer = await lacking(plan, address)
        for start in range(0, len(content), 1 << 13):
            data = content[start : start + (1 << 13)]
            peer.say("PIECE", layer=1, offset=start, data=data)
            assert (await peer.hear())["offset"] == start + len(data)
        peer.say("PIECE", layer=1, offset=len(content), data=b"", sha256="0" * 64)
        assert "layer-00001.safetensors" in (await peer.hear())["text"]
    assert not list(folder.glob("layer*"))


async def test_a_host_that_goes_silent(
    agreed: tuple[Checkpoint, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supply, "PIECE_S", 0.05)
    async with listening(Node(StoreSource(tmp_path / "duck"))) as (address, end):
        peer = await lacking(agreed[1], address)
        assert await peer.ended()
        await until(lambda: not end._sessions)


LACKS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "no such layer": [("LACK", {"layer": 99, "offset": 0})],
    "before the start": [("LACK", {"layer": 1, "offset": -1})],
    "no number": [("LACK", {"layer": "1", "offset": 0})],
    "two at once": [("LACK", {"layer": 1, "offset": 0}), ("LACK", {"layer": 2, "offset": 0})],
    "got what was not sent": [("GOT", {"layer": 1, "offset": 5})],
    "got nothing": [("GOT", {})],
}


@pytest.mark.parametrize("said", LACKS.values(), ids=LACKS)
async def test_ducks_that_ask_for_nonsense(
    agreed: tuple[Checkpoint, Plan], said: list[tuple[str, dict[str, Any]]]
) -> None:
    async def script(peer: Peer, _: dict[str, Any]) -> None:
        for kind, fields in said:
            peer.say(kind, **fields)
        await peer.ended()

    async with ScriptedDuck(script=script).listening() as one:
        checkpoint, plan = agreed[0], plan_for(agreed[0].folder, [1])[1]
        with pytest.raises(WireError):
            await attach([one.address], (checkpoint, plan))


async def test_a_duck_that_asks_again_and_again(agreed: tuple[Checkpoint, Plan]) -> None:
    checkpoint, plan = agreed[0], plan_for(agreed[0].folder, [1])[1]
    size = file_bytes(slice_of(plan, 0))
    served = []

    async def script(peer: Peer, _: dict[str, Any]) -> None:
        while True:
            peer.say("LACK", layer=1, offset=size)
            piece = await peer.hear()
            assert piece["data"] == b""
            served.append(piece["sha256"])

    async with ScriptedDuck(script=script).listening() as one:
        with pytest.raises(WireError, match="makes no sense"):
            await attach([one.address], (checkpoint, plan))
    expected = hashlib.sha256(
        b"".join(bytes(piece) for piece in layer_stream(checkpoint, slice_of(plan, 0), 1))
    )
    assert served == [expected.hexdigest()] * supply.Sender.TRIES


async def test_a_duck_that_takes_nothing_is_sent_little(agreed: tuple[Checkpoint, Plan]) -> None:
    """The host keeps no more than its window on the way."""
    checkpoint, plan = agreed[0], plan_for(agreed[0].folder, [1])[1]
    received = 0

    async def script(peer: Peer, hello: dict[str, Any]) -> None:
        nonlocal received
        peer.say("LACK", layer=1, offset=0)
        while received <= supply.WINDOW_BYTES - supply.PIECE_BYTES:
            received += len((await peer.hear())["data"])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                received += len((await peer.hear())["data"])
        peer.say("ERR", text="enough")
        await peer.ended()

    async with ScriptedDuck(script=script).listening() as one:
        with pytest.raises(WireError, match="enough"):
            await attach([one.address], (checkpoint, plan))
    assert received <= supply.WINDOW_BYTES


# --- the handler alone


class Quiet:
    """A `Loading` without a host."""

    def __call__(self, done: int, total: int) -> None:
        pass

    async def fetch(self, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
        raise DuckError("no host here")


def forward(node: Node, plan: Plan, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, plan.shape.hidden), np.float32)
    ids = np.stack([rng.permutation(plan.experts)[:4] for _ in range(3)]).astype(np.int32)
    weights = rng.random((3, 4), np.float32)
    return np.stack([node.answer(layer, x, ids, weights) for layer in plan.layers])


@pytest.mark.parametrize("weights", ["fp8", "bf16", "f32"])
async def test_a_store_answers_as_its_model(tmp_path: Path, weights: str) -> None:
    model = make_checkpoint(tmp_path / "model", seed=2, weights=weights)
    folders = [duck.folder for duck in pack(model, [3, 2], tmp_path / "packed")]
    _, plan = plan_for(model, [3, 2])
    for duck, folder in enumerate(folders):
        nodes = [Node(StoreSource(folder)), Node(ModelSource(model))]
        for node in nodes:
            await node.attach(plan, duck, Quiet())
        np.testing.assert_array_equal(*[forward(node, plan) for node in nodes])


async def test_tokens_are_the_same_wherever_slices_come_from(
    model: Path, packed: list[Path], tmp_path: Path
) -> None:
    """Read from the model, from a store, sent by the host, and still there from the last one."""
    sampling = Sampling(max_tokens=16, ignore_eos=True, temperature=1.0, seed=3)

    async def tokens(**options: Any) -> list[int]:
        async with Engine.open(model, **options) as engine:
            warm.append([duck.warm for duck in engine.load.ducks])
            return (await engine.generate([5, 80, 33, 17], sampling)).token_ids

    warm: list[list[bool]] = []
    expected = await tokens(transport="loopback", ducks="local:2")
    empty = [StoreSource(tmp_path / str(number)) for number in range(DUCKS)]
    for sources in (map(StoreSource, packed), empty):
        async with ducks(*sources) as addresses:
            for _ in range(2):
                assert await tokens(ducks=",".join(addresses)) == expected
    assert warm[1:] == [[False, False], [True, True]] * 2


async def test_tokens_are_the_same_for_weighted_slices(model: Path, tmp_path: Path) -> None:
    """As `duck pack --weights` cut them, for a flock.toml with the same weights."""
    sampling = Sampling(max_tokens=16, ignore_eos=True)

    async def tokens(**options: Any) -> tuple[list[int], list[int]]:
        async with Engine.open(model, dtype="float32", **options) as engine:
            done = await engine.generate([5, 80, 33, 17], sampling)
            return done.token_ids, [len(part) for part in engine.plan.slices]

    expected, widths = await tokens(transport="loopback", ducks="local:2")
    assert widths == [128, 64]
    folders = [duck.folder for duck in pack(model, [1, 3], tmp_path / "packed")]
    async with ducks(*map(StoreSource, folders)) as addresses:
        flock = tmp_path / "flock.toml"
        flock.write_text(
            "".join(
                f'[[duck]]\naddress = "{address}"\nweight = {weight}\n'
                for address, weight in zip(addresses, (1, 3), strict=True)
            )
        )
        for placement in ("auto", "weighted"):
            found, widths = await tokens(ducks=str(flock), placement=placement)
            assert widths == [64, 128]
            assert found == expected
        # Both refuse, and whoever is first is told.
        told = "holds columns (0:64 .*, not columns 0:128|64:192 .*, not columns 128:192) "
        with pytest.raises(WireError, match=told):
            await tokens(ducks=str(flock), placement="equal")


@pytest.mark.parametrize(("huge", "events"), [(0, 1), (60 << 20, 0), (None, 0)])
async def test_small_pages_are_told(
    packed: list[Path],
    agreed: tuple[Checkpoint, Plan],
    monkeypatch: pytest.MonkeyPatch,
    huge: int | None,
    events: int,
) -> None:
    monkeypatch.setattr("duck.memory.huge_bytes", lambda: huge)
    monkeypatch.setattr("duck.node.SMALL_ARENA_BYTES", 1 << 20)
    node = Node(StoreSource(packed[0]))
    for _ in range(2):  # the second time nothing is loaded
        with capture_logs() as log:
            await node.attach(agreed[1], 0, Quiet())
        assert [event["event"] for event in log].count("few_huge_pages") == events
        events = 0


async def test_a_warm_duck_does_not_touch_its_disk(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    copy(packed[0], tmp_path)
    node = Node(StoreSource(tmp_path))
    assert (await node.attach(agreed[1], 0, Quiet()))["warm"] is False
    (tmp_path / "manifest.json").write_text("nonsense")
    assert (await node.attach(agreed[1], 0, Quiet()))["warm"] is True


async def test_bytes_of_an_earlier_try_are_not_needed_twice(
    agreed: tuple[Checkpoint, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = slice_of(agreed[1], 0)
    source = StoreSource(tmp_path)
    source.store.part(2).write_bytes(bytes(50_000))
    usage = type("Usage", (), {"free": 3 * file_bytes(what) - 50_000})
    monkeypatch.setattr("duck.store.shutil.disk_usage", lambda _: usage)
    with source.claim(what, what.layers):
        pass
    usage.free -= 1
    with pytest.raises(ConfigError, match="make room"), source.claim(what, what.layers):
        pass


async def test_a_number_that_is_none_in_a_store(
    model: Path, packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    """Its hash is right: the model it was packed from was damaged."""
    what = slice_of(agreed[1], 0)
    store = Store(tmp_path)
    content = bytearray((packed[0] / "layer-00002.safetensors").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    with store.claim(what), store.write(2) as writer:
        writer.write(content)
        writer.finish()
    node = Node(StoreSource(tmp_path))
    with pytest.raises(WeightsError, match=r"layer-00002\.safetensors: .* NaN .*remove this file"):
        await node.attach(agreed[1], 0, Quiet())


async def test_a_pipe_in_a_store_is_told_to_the_host(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    copy(packed[0], tmp_path)
    (tmp_path / "layer-00002.safetensors").unlink()
    os.mkfifo(tmp_path / "layer-00002.safetensors")
    async with ducks(StoreSource(tmp_path), StoreSource(packed[1])) as addresses:
        with pytest.raises(WireError, match=r"duck 0 .*layer-00002.*: it is a pipe, want a reg"):
            await attach(addresses, agreed)


def test_a_folder_with_many_stores(packed: list[Path], tmp_path: Path) -> None:
    out = packed[0].parent
    found = rf"holds duck-000, duck-001: name one of them, as --store {out}/duck-000"
    with pytest.raises(ConfigError, match=found):
        StoreSource(out)


async def test_what_was_loaded_before_an_error_stays(
    packed: list[Path], agreed: tuple[Checkpoint, Plan], tmp_path: Path
) -> None:
    copy(packed[0], tmp_path)
    (tmp_path / "layer-00002.safetensors").unlink()
    node = Node(StoreSource(tmp_path))
    with pytest.raises(DuckError, match="no host here"):
        await node.attach(agreed[1], 0, Quiet())
    copy(packed[0], tmp_path)  # by hand, or by duck pack
    facts = await node.attach(agreed[1], 0, Quiet())
    assert facts["read_bytes"] == file_bytes(slice_of(agreed[1], 0))


def test_slices_know_their_bytes(packed: list[Path], agreed: tuple[Checkpoint, Plan]) -> None:
    what: Slice = slice_of(agreed[1], 0)
    stored = Store(packed[0]).whole()
    assert sum(s.nbytes for s in stored.values()) == what.nbytes + 3 * 4096
