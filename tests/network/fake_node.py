"""Duck processes that answer at once, each in its network namespace.

`python -m tests.network.fake_node NAMESPACE=HOST:PORT ...` forks one for each: that many processes
for the price of one start. Their partial sums are x * (number + 1) + layer. They end with stdin.

With `--echo` before the addresses they are those of `duck bench transport`, which cost next to
nothing, for many of them share a processor where real ones have one each. What is lost, noticed and
sent again is as ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import uvloop

from duck.kernels import library
from duck.placement import Plan
from duck.transports import bench_ducks
from duck.transports.base import Loading
from duck.transports.listen import ListeningDuck
from duck.transports.planes import duck_planes
from tests.network.pond import enter


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


async def _serve(listen: str, *, echo: bool) -> None:
    def ready(address: str) -> None:
        line = json.dumps({"event": "listening", "address": address})
        os.write(1, f"{line}\n".encode())  # in one piece: the others write there too

    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)  # readable when the test is gone
    end = ListeningDuck(listen, ready, bench_ducks._planes() if echo else duck_planes())
    serving = asyncio.create_task(end.serve(bench_ducks._Nothing() if echo else FakeNode()))
    await asyncio.wait([serving, asyncio.create_task(ended.wait())], return_when="FIRST_COMPLETED")
    serving.cancel()
    await asyncio.wait([serving])


def main() -> None:
    """Fork the ducks and wait for them."""
    words = sys.argv[1:]
    echo = words[0] == "--echo"
    library.native()  # once, and not in each of them
    if echo:
        bench_ducks.largest_message(bench_ducks.HIDDEN)
    for word in words[echo:]:
        namespace, _, listen = word.partition("=")
        if not os.fork():
            enter(namespace)
            uvloop.run(_serve(listen, echo=echo))
            os._exit(0)
    for _ in words[echo:]:
        os.wait()


if __name__ == "__main__":
    main()
