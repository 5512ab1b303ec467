"""Real node processes with a key, and hosts that have it, none, or another: one clear line on both
sides, and the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import duck
from duck.errors import DuckError, WireError
from duck.keys import ClusterKey
from tests.checkpoints import make_checkpoint
from tests.faults.processes import Marked, Run, linux_only, marked, start

pytestmark = [linux_only, pytest.mark.timeout(600)]

PROMPT = [5, 6, 7]
ANSWER = duck.Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def processes() -> Iterator[Marked]:
    with marked() as found:
        yield found


@pytest.fixture
def key(tmp_path: Path) -> Path:
    ClusterKey.create(tmp_path / "pond.key")
    return tmp_path / "pond.key"


def _node(processes: Marked, out: Path, folder: Path, *words: str | Path) -> tuple[Run, str]:
    """A node that others may reach, and where this machine does."""
    node = start(
        processes, out, "node", "--listen", "0.0.0.0:0", "--model", folder, "--json", *words
    )
    told = json.loads(node.wait_for("\n", "stdout"))
    return node, f"127.0.0.1:{told['address'].rpartition(':')[2]}"


async def _tokens(folder: Path, **options: Any) -> list[int]:
    async with duck.Engine.open(folder, device="cpu", **options) as engine:
        return (await engine.generate(PROMPT, ANSWER)).token_ids


async def test_who_has_the_key_is_served(
    processes: Marked, folder: Path, tmp_path: Path, key: Path
) -> None:
    node, address = _node(processes, tmp_path / "node", folder, "--key-file", key)
    fingerprint = ClusterKey.read(key).fingerprint
    assert json.loads(node.said("stdout"))["key"] == fingerprint
    other = tmp_path / "other.key"
    ClusterKey.create(other)
    with pytest.raises(WireError, match=r"duck 0 .* this duck uses a key, the host does not"):
        await _tokens(folder, ducks=address)
    with pytest.raises(WireError, match=r"duck 0 .* the duck has another key than this host"):
        await _tokens(folder, ducks=address, key_file=other)

    flock = tmp_path / "flock.toml"
    flock.write_text(f'[host]\nkey_file = "pond.key"\n[[duck]]\naddress = "{address}"\n')
    expected = await _tokens(folder, ducks="local:1", transport="loopback")
    for transport in ("tcp", "shm", "multicast"):
        assert await _tokens(folder, ducks=str(flock), transport=transport) == expected

    said = node.said()
    assert said.count("refused") == 2
    assert "this duck uses a key, the host does not" in said
    assert f"than this duck, whose key is {fingerprint}" in said
    assert "Traceback" not in said


async def test_a_duck_without_the_key(
    processes: Marked, folder: Path, tmp_path: Path, key: Path
) -> None:
    node, address = _node(processes, tmp_path / "node", folder, "--insecure")
    with pytest.raises(DuckError, match=r"duck 0 .* the duck uses no key, this host does: give"):
        await _tokens(folder, ducks=address, key_file=key)
    assert "the host uses a key, this duck does not" in node.wait_for("refused")
    assert await _tokens(folder, ducks=address)
