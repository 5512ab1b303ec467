"""Duck processes that answer at once, each in its network namespace.

`python -m tests.network.fake_node NAMESPACE=HOST:PORT ...` forks one for each: that many processes
for the price of one start. Their partial sums are x * (number + 1) + layer. They end with stdin.

With `--echo` before the addresses they cost as little as Python can, for many of them share a
processor where real ones have one each: they answer without a worker's thread, always the same, and
over multicast they neither look at what is asked nor make an answer but its headers. What is lost,
noticed and sent again is as ever.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import uvloop

from duck import wire
from duck.kernels import library
from duck.placement import Plan
from duck.reliable import Cut, DuckHalf, Run
from duck.transports import bench_ducks
from duck.transports.base import Loading
from duck.transports.listen import DuckPlane, HostSession, ListeningDuck
from duck.transports.multicast import MulticastDuckPlane, MulticastFeed, Where
from duck.transports.planes import duck_planes
from tests.network.pond import enter

_TICKET, _CRC = struct.Struct("<IH"), struct.Struct("<I")


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


class _Train:
    """An answer's datagrams, for one ask after another."""

    def __init__(
        self, session: HostSession, message: bytes, cut: Cut, checksum: wire.Checksum
    ) -> None:
        kind, size = wire.Kind.ANSWER, cut.payload_bytes
        self._train = bytearray(
            wire.datagrams(kind, session.id, 0, 0, session.duck, message, size, checksum)
        )
        self._message, self._size, self._checksum = message, cut.datagram_bytes, checksum

    def of(self, ticket: int, layer: int) -> bytearray:
        train = self._train
        _TICKET.pack_into(train, 8, ticket, layer)
        crc = self._checksum(self._message, self._checksum(bytes(train[:28]), 0))
        for start in range(0, len(train), self._size):
            _TICKET.pack_into(train, start + 8, ticket, layer)
            _CRC.pack_into(train, start + 28, crc)
        return train


class _EchoPlane(MulticastDuckPlane):
    def open(self, session: HostSession, offer: Mapping[str, Any]) -> MulticastFeed:
        return _EchoFeed(session, self._tcp.open(session, offer), Where.of(session, offer))


class _EchoFeed(MulticastFeed):
    """Answers asks, without a key, by datagrams that were made before."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._trains: dict[int, _Train] = {}
        self._nbytes: dict[int, int] = {}

    def _ask(self, half: DuckHalf, run: Run, data: memoryview, size: int, now: float) -> None:
        head = run.header
        if half.ask(run, now) is None or half.take(head.ticket) is None:
            return
        half.took(head)
        train = self._trains.get(head.message_bytes)
        if train is None:
            shape = self._session.plan.shape
            rows = shape.rows_of_ask(head.message_bytes)
            message = bytes(wire.STAMP_BYTES + shape.answer_bytes(rows))
            train = _Train(self._session, message, self._cut, self.checksum)
            self._trains[head.message_bytes] = train
            self._nbytes[head.message_bytes] = len(message)
        answer = bytes(train.of(head.ticket, head.layer))  # it is kept: a copy
        self._answered(head.ticket, head.layer, answer, self._nbytes[head.message_bytes])


def _echo_planes() -> list[DuckPlane]:
    tcp = bench_ducks._EchoTcp()
    return [tcp, _EchoPlane(tcp)]


async def _serve(listen: str, *, echo: bool) -> None:
    def ready(address: str) -> None:
        line = json.dumps({"event": "listening", "address": address})
        os.write(1, f"{line}\n".encode())  # in one piece: the others write there too

    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, ended.set)  # readable when the test is gone
    end = ListeningDuck(listen, ready, _echo_planes() if echo else duck_planes())
    serving = asyncio.create_task(end.serve(bench_ducks._Nothing() if echo else FakeNode()))
    await asyncio.wait([serving, asyncio.create_task(ended.wait())], return_when="FIRST_COMPLETED")
    serving.cancel()
    await asyncio.wait([serving])


def main() -> None:
    """Fork the ducks and wait for them."""
    words = sys.argv[1:]
    echo = words[0] == "--echo"
    library.native()  # once, and not in each of them
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
