"""`duck bench transport` and its ducks: what their figures cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from duck import wire
from duck.config import Network
from duck.kernels import library
from duck.placement import Plan, equal_slices
from duck.transports import bench, bench_ducks
from duck.transports.control import FlockTransport
from duck.transports.listen import ListeningDuck
from duck.transports.planes import host_plane
from duck.transports.tls import Credentials, Role
from tests.faults.processes import linux_only
from tests.flocks import KEY, WAIT_S

SHAPE = wire.Shape(64, 2, bench_ducks.DTYPE, bench_ducks.DTYPE, 1)
PLAN = Plan("bench", tuple(range(4)), 4, 64, equal_slices(64, 1), SHAPE)


@linux_only
@pytest.mark.parametrize("transport", ["tcp", "multicast"])
async def test_they_are_heard_while_they_seal(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 of them on one core take seconds for it; whoever says nothing meanwhile is lost."""
    library.native()
    turns = threading.Event()
    seal = bench_ducks._Echo.seal

    def slowly(echo: bench_ducks._Echo, *arguments: object) -> None:
        assert turns.wait(5), "the event loop does not go on"
        seal(echo, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_ducks._Echo, "seal", slowly)
    ready: asyncio.Queue[str] = asyncio.Queue()
    credentials = Credentials(KEY, Role.DUCK)
    end = ListeningDuck("127.0.0.1:0", ready.put_nowait, bench_ducks._planes(), credentials)
    serving = asyncio.create_task(end.serve(bench_ducks._Nothing()))
    flock = FlockTransport(
        [await ready.get()],
        host_plane(transport, Network()),
        credentials=Credentials(KEY, Role.HOST),
    )
    x, ids = np.zeros((1, 64), np.uint16), np.zeros((1, 2), np.int32)
    try:
        await flock.start(PLAN)
        asyncio.get_running_loop().call_soon(turns.set)
        for layer in range(4):
            deadline = asyncio.get_running_loop().time() + WAIT_S
            rows = await flock.acquire(1)
            ask = flock.ask(layer, x, ids, ids.astype(np.float32), rows, deadline=deadline)
            assert (await ask).partials(1).any()
            ask.release()
    finally:
        turns.set()
        await flock.close()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


@linux_only
def test_rounds_whose_answers_were_sealed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ticket's answer is for one layer, however many rounds a turn has."""
    monkeypatch.setattr(bench, "TURN", 3)
    report = bench.bench_transport(
        transports=("tcp", "multicast"), ducks=(2,), rows=(1,), keyed=True, seconds=0.01
    )
    assert [(row["transport"], row["keyed"]) for row in report["rows"]] == [
        ("tcp", False), ("tcp", True), ("multicast", False), ("multicast", True),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["rounds"] >= 9
        assert (row["to_plain"] is not None) == row["keyed"]


@linux_only
@pytest.mark.parametrize("early", [True, False], ids=["before they are there", "in a session"])
async def test_they_end_without_a_word_when_their_host_does(early: bool) -> None:
    """It was interrupted, and what it says itself is all that a user wants to read."""
    library.native()
    told = json.dumps({"count": 2, "processors": [], "key": bytes(32).hex()})
    ducks = subprocess.Popen(  # noqa: ASYNC220 (a moment)
        [sys.executable, "-m", "duck.transports.bench_ducks", told],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert ducks.stdin
    assert ducks.stdout
    assert ducks.stderr
    with ducks:
        if early:
            ducks.stdout.close()
            ducks.stdin.close()
        else:
            facts = [json.loads(await asyncio.to_thread(ducks.stdout.readline)) for _ in range(2)]
            facts.sort(key=lambda fact: fact["duck"])
            plan = Plan("bench", tuple(range(4)), 4, 128, equal_slices(128, 2), SHAPE)
            flock = FlockTransport(
                [fact["addresses"][0] for fact in facts], host_plane("tcp", Network())
            )
            await flock.start(plan)
            ducks.stdout.close()
            for link in flock._links:
                link.transport.abort()
            await flock.close()
            ducks.stdin.close()
        async with asyncio.timeout(WAIT_S):
            assert await asyncio.to_thread(ducks.stderr.read) == b""
            assert await asyncio.to_thread(ducks.wait) == 0


@linux_only
def test_an_interrupted_bench_shows_the_cursor_again() -> None:
    """The line that tells what is measured hides it."""
    ours, theirs = os.openpty()
    words = ("bench", "transport", "--transport", "tcp", "--ducks", "1", "--rows", "1")
    bench = subprocess.Popen(
        [sys.executable, "-m", "duck", *words], stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    with bench, contextlib.suppress(OSError):  # EIO: the other side is closed
        while more := os.read(ours, 4096):
            if b"1 ducks" in more and b"1 ducks" not in said:
                bench.send_signal(signal.SIGINT)
            said += more
    os.close(ours)
    assert bench.returncode == 130
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")
