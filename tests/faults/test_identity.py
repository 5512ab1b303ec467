"""The shipped model says the same 500 tokens over every transport, with a key and without, over
networks that lose datagrams or bring them in another order.

Real duck processes; what is lost is lost at the host's socket, on its way out and on its way in.
`--full` has all combinations, and tests/network the same over switches that lose packets.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import duck
from duck.config import Network
from duck.keys import ClusterKey
from duck.transports import receive
from duck.transports.faulty import Datagram, Faults, FaultyUdpSocket
from duck.transports.multicast import MulticastPlane
from tests.faults.processes import linux_only

pytestmark = [linux_only, pytest.mark.timeout(600)]

TOKENS = 500
PROMPT = "A duckling walks into a bar and asks"
ANSWER = duck.Sampling(max_tokens=TOKENS, ignore_eos=True, temperature=0.0)
NETWORKS: dict[str, dict[str, float]] = {
    "whole": {},
    "1 % lost": {"drop": 0.01},
    "5 % lost": {"drop": 0.05},
    "20 % reordered": {"reorder": 0.2},
}
OFTEN = {
    ("tcp", "keyed", "whole"), ("multicast", "keyed", "5 % lost"),
    ("multicast", "plain", "20 % reordered"),
}  # fmt: skip
COMBINATIONS = [
    pytest.param(*which, marks=() if which in OFTEN else pytest.mark.full)
    for transport in ("shm", "tcp", "multicast")
    for key in ("plain", "keyed")
    for network in NETWORKS
    for which in [(transport, key, network)]
    if transport == "multicast" or network == "whole"
]


async def _tokens(**options: Any) -> list[int]:
    async with duck.Engine.open("demo", dtype="float32", device="cpu", **options) as engine:
        return (await engine.generate(PROMPT, ANSWER)).token_ids


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """What two ducks inside the host's process say."""
    tokens = asyncio.run(_tokens(transport="loopback"))
    assert len(tokens) == TOKENS
    assert len(set(tokens)) >= 40  # it does not stammer: a wrong sum would show
    return tokens


@pytest.mark.parametrize(("transport", "key", "network"), COMBINATIONS)
async def test_the_same_500_tokens(
    expected: list[int],
    transport: str,
    key: str,
    network: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {"transport": transport, "ducks": "local:2"}
    if key == "keyed":
        ClusterKey.create(tmp_path / "pond.key")
        monkeypatch.setattr(receive, "THREAD_FROM", 1)  # answers are received as of many ducks
        options["key_file"] = tmp_path / "pond.key"
    faults = [Faults[Datagram](seed, **NETWORKS[network]) for seed in (1, 2)]
    if transport == "multicast":
        make_socket = partial(FaultyUdpSocket, out=faults[0], back=faults[1])
        # The demo's messages are small: so they come in several datagrams all the same.
        plane = MulticastPlane(Network(mtu=576), make_socket)
        monkeypatch.setattr(duck.engine, "host_plane", lambda _name, _network: plane)
    assert await _tokens(**options) == expected
    if transport == "multicast":
        met = {"drop": "dropped", "reorder": "reordered"}
        for way in faults:
            assert way.counts["messages"] > 2000
            for kind, share in NETWORKS[network].items():
                assert way.counts[met[kind]] > share / 2 * way.counts["messages"]
