"""A duck process that answers at once: `python -m tests.network.fake_node --listen HOST:PORT`.

Its partial sums are x * (number + 1) + layer. It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from duck.node import _loop_factory
from duck.placement import Plan
from duck.transports.base import Loading
from duck.transports.listen import ListeningDuck
from duck.transports.multicast import MulticastDuckPlane
from duck.transports.tcp import TcpDuckPlane


class FakeNode:
    """A `Handler` that holds nothing."""

    number = 0

    async def attach(self, plan: Plan, duck: int, loading: Loading) -> Mapping[str, Any]:
        self.number = duck
        return {"warm": True, "resident_bytes": 0}

    def answer(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return partial_sums(self.number, layer, x)


def partial_sums(number: int, layer: int, x: np.ndarray) -> np.ndarray:
    """What a fake duck answers: (rows, hidden) float32."""
    return x * np.float32(number + 1) + np.float32(layer)


async def _serve(listen: str) -> None:
    def ready(address: str) -> None:
        print(json.dumps({"event": "listening", "address": address}), flush=True)

    tcp = TcpDuckPlane()
    serving = asyncio.create_task(
        ListeningDuck(listen, ready, [tcp, MulticastDuckPlane(tcp)]).serve(FakeNode())
    )
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, serving.cancel)
    await asyncio.wait([serving])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen", required=True)
    listen = parser.parse_args().listen
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(listen))


if __name__ == "__main__":
    main()
