"""A duck with random experts of real widths, in a process of its own: for benchmarks without files.

It is a real duck but for where its weights come from: the same arena, kernel, queue and wire.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from duck import log
from duck.errors import TransportError
from duck.kernels import fp8
from duck.kernels.experts import BLOCK, pack
from duck.model.weights import ExpertWeights
from duck.node import Kernel, Node
from duck.placement import Slice
from duck.slices import Arena, Check, Progress
from duck.transports.listen import ListeningDuck
from duck.transports.planes import duck_planes
from duck.transports.tcp import TcpTransport

START_S = 60.0
# So many experts are made; the others are copies of them, elsewhere in memory and read as any.
_DIFFERENT = 8


class RandomSource:
    """A `slices.Source` of weights that nobody trained, small enough that sums stay numbers."""

    def __str__(self) -> str:
        return "random weights"

    def check(self, want: Slice) -> None:
        """Any slice will do."""

    def has(self, want: Slice) -> Collection[int]:
        return want.layers

    def load(
        self, want: Slice, layers: Sequence[int], arena: Arena, progress: Progress, check: Check
    ) -> None:
        """Fill the arena."""
        rng = np.random.default_rng(0)
        drawn = rng.standard_normal((1024, 1024)).astype(np.float32)
        codes, _ = fp8.quantise(drawn, BLOCK)
        made = []
        for number in range(_DIFFERENT):
            record = np.empty(want.record_bytes, np.uint8)
            scales = np.empty(want.scale_floats, np.float32)
            pack(_random_expert(np.roll(codes, number), rng, want), want.resident, record, scales)
            made.append((record, scales))
        for layer in layers:
            records, all_scales = arena.records(layer), arena.scales(layer)
            for expert in range(want.experts):
                check()
                record, scales = made[expert % _DIFFERENT]
                records[expert], all_scales[expert] = record, scales
                arena.adopt(layer, expert, want.start)
                progress(record.nbytes + scales.nbytes)


def _random_expert(codes: np.ndarray, rng: np.random.Generator, want: Slice) -> ExpertWeights:
    """Columns of an expert; what kernels are slow with, such as subnormals, is as rare as it is."""
    columns, hidden, blocks = want.stop - want.start, want.hidden, -(-want.hidden // BLOCK[0])

    def matrix(seed: int, *shape: int) -> np.ndarray:
        return np.resize(np.roll(codes, seed * 7919), shape)

    def scales(*shape: int) -> np.ndarray:
        # Codes of up to 448 become weights of some hundredths, as in checkpoints.
        return rng.uniform(1e-4, 2e-4, shape).astype(np.float32)

    return ExpertWeights(
        range(want.start, want.stop), BLOCK,
        matrix(0, columns, hidden), matrix(1, columns, hidden), matrix(2, hidden, columns),
        scales(columns, blocks), scales(columns, blocks), scales(blocks, columns),
    )  # fmt: skip


def transport_to(address: str) -> TcpTransport:
    """The host's end of a flock of that one duck; not started."""
    return TcpTransport([address])


@contextlib.contextmanager
def random_duck(threads: int) -> Iterator[str]:
    """Run a duck as long as this is held; gives the address it listens on.

    Raises:
        TransportError: it did not start.
    """
    # Not a fork: the host's threads and torch have no business in a duck.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, threads), daemon=True, name="duck")
    process.start()
    there.close()
    try:
        try:
            listening = here.recv() if here.poll(START_S) else None
        except EOFError:
            listening = None
        if listening is None:
            raise TransportError("the duck with random weights did not start")
        yield listening
    finally:
        here.close()  # which ends it
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _serve(connection: Connection, threads: int) -> None:
    """A duck's process: serves until the other end of the connection is closed."""
    log.configure("error")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host, which then ends us

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            connection.recv()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    node = Node(RandomSource(), Kernel(threads))
    asyncio.run(ListeningDuck("127.0.0.1:0", connection.send, duck_planes()).serve(node))
