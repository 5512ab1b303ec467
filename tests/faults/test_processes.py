"""Real processes that are killed, frozen or interrupted: clear errors in time, and no orphans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import duck
from duck.errors import DuckLost, TransportError
from duck.local import LocalDucks
from duck.placement import Plan, equal_slices
from duck.recording import read
from duck.slices import ModelSource
from duck.transports.tcp import TcpTransport
from tests.checkpoints import CONFIG, make_checkpoint
from tests.faults.peers import Host, Peer
from tests.faults.processes import (
    MARK,
    Marked,
    Run,
    linux_only,
    marked,
    start,
    start_warm,
    wait_until,
    warm_up,
)
from tests.flocks import WAIT_S, plan_for

# Every run of the command starts processes; on a busy machine that takes its time.
pytestmark = [linux_only, pytest.mark.timeout(600)]

PROMPT = [5, 6, 7]
ANSWER = duck.Sampling(max_tokens=12, ignore_eos=True)
GENERATE = ("--prompt-ids", "5,6,7", "--ignore-eos")
CONTEXT = 200_000  # tokens: minutes, however fast the machine is
ENDLESS = (*GENERATE, "--max-tokens", str(CONTEXT - 10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, seed=0, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    warm_up()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, _warm: None) -> Iterator[Marked]:
    with marked() as processes:
        # Ducks that an Engine in this process starts are ours too.
        monkeypatch.setenv(MARK, processes.environment[MARK])
        yield processes


# --- a duck is lost


@pytest.mark.parametrize(
    ("how", "start", "reason"),
    [
        (signal.SIGKILL, start, "connection .*killed by SIGKILL"),
        (signal.SIGSTOP, start_warm, "no sign of life for .*"),
    ],
)
def test_a_duck_is_lost_in_the_middle_of_an_answer(
    processes: Marked, folder: Path, tmp_path: Path, how: signal.Signals, start: Any, reason: str
) -> None:
    host = start(processes, tmp_path, "generate", folder, *ENDLESS)
    host.wait_for_text()
    victim = processes.ducks()[1]
    os.kill(victim, how)
    line = host.wait_for("\n")
    assert host.wait() == 3
    found = re.fullmatch(
        r"duck: lost duck \d \(127\.0\.0\.1:\d+, pid (\d+)\) at layer (\d) "
        rf"after waiting \d+ ms: {reason}\n",
        line,
    )
    assert found, line
    assert int(found[1]) == victim
    assert int(found[2]) in (1, 2, 3)
    assert host.said() == line
    processes.wait_until_none()


async def test_the_engine_names_the_lost_duck(processes: Marked, folder: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(duck.Engine.open(folder, ducks="local:2"))
        answer = engine.stream(PROMPT, duck.Sampling(max_tokens=10_000, ignore_eos=True))
        victim = processes.ducks()[1]
        with pytest.raises(DuckLost) as caught:
            await _kill_after(3, answer, victim)
        lost = caught.value
        assert lost.duck.startswith(f"duck {lost.index} (127.0.0.1:")
        assert lost.duck.endswith(f", pid {victim})")
        assert lost.layer in (1, 2, 3)
        assert "killed by SIGKILL" in lost.reason
        with pytest.raises(DuckLost):  # it stays lost
            await engine.generate(PROMPT, ANSWER)
    assert not processes.pids()


async def _kill_after(pieces: int, answer: AsyncIterator[duck.Piece], pid: int) -> None:
    count = 0
    async for _ in answer:
        count += 1
        if count == pieces:
            os.kill(pid, signal.SIGKILL)


async def test_a_duck_that_dies_while_it_loads(
    processes: Marked, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("duck.transports.control.CONNECT_S", WAIT_S)  # it is killed before
    ducks = LocalDucks.launch(2, folder)
    try:
        await ducks.listening()
        os.kill(ducks.pids[1], signal.SIGSTOP)  # the system still accepts connections for it
        transport = TcpTransport(ducks.addresses, ducks.labels)
        starting = asyncio.create_task(transport.start(_plan(folder)))
        async with asyncio.timeout(WAIT_S):
            while len(transport._links) < 3:  # noqa: ASYNC110 (two of duck 0, one of duck 1)
                await asyncio.sleep(0.001)
            os.kill(ducks.pids[1], signal.SIGKILL)
            with pytest.raises(DuckLost, match=rf"duck 1 .*pid {ducks.pids[1]}\).*before WELCOME"):
                await starting
        assert await ducks.obituary(1) == "its process was killed by SIGKILL"
        assert await ducks.obituary(0) == ""
    finally:
        ducks.kill()
        ducks.kill()
    assert not processes.pids()


async def test_ducks_that_cannot_start(processes: Marked, tmp_path: Path) -> None:
    ducks = LocalDucks.launch(2, tmp_path / "nothing here")
    try:
        with pytest.raises(TransportError, match=r"local duck 0 ended before.*exit code 2"):
            await ducks.listening()
    finally:
        ducks.kill()
    assert not processes.pids()


async def test_waiting_for_ducks_can_be_cancelled(processes: Marked, folder: Path) -> None:
    ducks = LocalDucks.launch(2, folder)
    waiting = asyncio.create_task(ducks.listening())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not processes.pids()


def _plan(folder: Path, ducks: int = 2) -> Plan:
    source = ModelSource(folder)
    config = source.config
    columns = config.moe_intermediate_size
    return Plan(
        source.digest, config.moe_layers, config.n_routed_experts, columns,
        equal_slices(columns, ducks), plan_for(1, hidden=config.hidden_size).shape,
    )  # fmt: skip


# --- the host is gone


@pytest.mark.parametrize("when", ["loading", "answering"])
def test_ducks_end_when_their_host_is_killed(
    processes: Marked, folder: Path, tmp_path: Path, when: str
) -> None:
    """Also the one that is stopped and can do nothing for itself."""
    host = start_warm(processes, tmp_path, "generate", folder, *ENDLESS)
    ducks = processes.wait_for_ducks(2)
    if when == "answering":
        host.wait_for_text()
        os.kill(ducks[0], signal.SIGSTOP)
    host.signal(signal.SIGKILL)
    assert host.wait() == -signal.SIGKILL
    processes.wait_until_none()


# --- Ctrl-C


def test_ctrl_c_at_any_moment(processes: Marked, folder: Path, tmp_path: Path) -> None:
    """Starting, loading, reading the prompt, answering: seeded moments of an endless run."""
    command = ("generate", folder, *ENDLESS, "--ducks", "local:1")
    begun = time.monotonic()
    host = start_warm(processes, tmp_path, *command)
    host.wait_for_text()
    first_text = time.monotonic() - begun
    _interrupt(processes, host, f"{first_text:.3f} s, with the first text")
    moments = random.Random(20)
    for number in range(7):
        moment = moments.uniform(0.02, 1.3) * first_text
        host = start_warm(processes, tmp_path / str(number), *command)
        assert host.wait(moment) is None, host.said()
        _interrupt(processes, host, f"{moment:.3f} s; the first text came at {first_text:.3f} s")


def _interrupt(processes: Marked, host: Run, when: str) -> None:
    host.signal(signal.SIGINT)
    assert host.wait() == 130, f"at {when}: {host.said()}"
    assert host.said() == "", f"at {when}"
    processes.wait_until_none()


def test_ctrl_c_when_all_is_said(processes: Marked, folder: Path, tmp_path: Path) -> None:
    """While the ducks are ended: the answer is whole, so that either exit code is right."""
    moments = random.Random(21)
    for number in range(3):
        host = start_warm(
            processes,
            tmp_path / str(number),
            "generate",
            folder,
            *GENERATE,
            "--max-tokens",
            "2",
            "--ducks",
            "local:1",
        )
        host.wait_for("ended by length")
        host.wait(moments.uniform(0, 0.05))
        host.signal(signal.SIGINT)
        assert host.wait() in (0, 130), host.said()
        assert "Traceback" not in host.said()
        assert "Exception" not in host.said()
        processes.wait_until_none()


def test_ctrl_c_while_python_itself_ends() -> None:
    code = """
import atexit, os, signal
from duck import __main__, cli

def command():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as who ran an event loop leaves it
    return 0

cli.main = command
atexit.register(os.kill, os.getpid(), signal.SIGINT)
raise SystemExit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 130)
    assert done.stderr == ""


def test_ctrl_c_before_the_command_line_is_imported(
    processes: Marked, folder: Path, tmp_path: Path
) -> None:
    host = start(
        processes, tmp_path, "generate", folder, *ENDLESS, PYTHONPROFILEIMPORTTIME="1"
    )  # fmt: skip
    host.wait_for(" structlog")
    host.signal(signal.SIGINT)
    assert host.wait() == 130
    assert "Traceback" not in host.said()


def test_ctrl_c_while_modules_are_imported(processes: Marked, folder: Path, tmp_path: Path) -> None:
    host = start(processes, tmp_path, "generate", folder, *ENDLESS)
    maps = Path(f"/proc/{host.pid}/maps")
    wait_until(lambda: b"libtorch" in maps.read_bytes())
    host.signal(signal.SIGINT)
    assert host.wait() == 130
    assert host.said() == ""
    processes.wait_until_none()


def test_ctrl_c_leaves_a_whole_trace(processes: Marked, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    host = start(processes, tmp_path, "generate", folder, *ENDLESS, "--trace", str(path))
    host.wait_for_text()
    host.signal(signal.SIGINT)
    assert host.wait() == 130
    assert host.said() == ""
    recording = read(path)
    # A prompt, and at least one answer of each duck.
    assert recording.on("loop", "prefill")
    assert set(recording.asks[0].answers) == {0, 1}


# --- an answer that is broken off


@pytest.mark.parametrize("ducks", ["loopback", "tcp"])
async def test_breaking_off_frees_everything(processes: Marked, folder: Path, ducks: str) -> None:
    options = {"ducks": "local:2", "transport": ducks}
    async with duck.Engine.open(folder, **options) as engine:
        transport = engine._pipeline._flock._transport
        free = transport.stats()["rows_free"]
        whole = await engine.generate(PROMPT, ANSWER)
        moments = random.Random(3)
        for _ in range(8):  # anywhere: the prompt, a draft, a step
            answer = asyncio.create_task(engine.generate(PROMPT, ANSWER))
            for _ in range(moments.randrange(1, 150)):
                await asyncio.sleep(0)
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer
            assert transport.stats()["rows_free"] == free
        stream = engine.stream(PROMPT, ANSWER)
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break
        assert transport.stats()["rows_free"] == free
        again = await engine.generate(PROMPT, ANSWER)
        assert again.token_ids == whole.token_ids
        assert transport.stats()["rows_free"] == free


# --- a duck started by hand


@pytest.fixture
def node(processes: Marked, folder: Path, tmp_path: Path) -> tuple[Run, str]:
    """A node that was started by hand, and its address."""
    run = start(processes, tmp_path, "node", "--listen", "127.0.0.1:0", "--model", folder, "--json")
    line = json.loads(run.wait_for("\n", "stdout"))
    assert (line["event"], line["pid"]) == ("listening", run.pid)
    return run, line["address"]


async def test_a_node_keeps_its_slice_for_the_next_host(
    processes: Marked, folder: Path, tmp_path: Path, node: tuple[Run, str]
) -> None:
    run, address = node
    async with duck.Engine.open(folder, ducks="local:1", transport="loopback") as engine:
        want = (await engine.generate(PROMPT, ANSWER)).token_ids
    async with duck.Engine.open(folder, ducks=address) as engine:
        assert (await engine.generate(PROMPT, ANSWER)).token_ids == want
        plan = engine.plan
        # A second host at once, and a third when both are gone.
        async with duck.Engine.open(folder, ducks=address) as other:
            both = await asyncio.gather(
                engine.generate(PROMPT, ANSWER), other.generate(PROMPT, ANSWER)
            )
            assert [done.token_ids for done in both] == [want, want]
    async with Host.attached(address, plan) as host:
        assert host.welcome["warm"] is True
        assert host.welcome["pid"] == run.pid
    await Peer.close_all()
    # A host that is killed in the middle of an answer is forgotten.
    dying = start_warm(
        processes, tmp_path / "dying", "generate", folder, *ENDLESS, "--ducks", address
    )
    dying.wait_for_text()
    dying.signal(signal.SIGKILL)
    dying.wait()
    async with duck.Engine.open(folder, ducks=address) as engine:
        assert (await engine.generate(PROMPT, ANSWER)).token_ids == want
    assert run.alive()
    assert run.said() == ""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_node_ends_when_told(node: tuple[Run, str], how: signal.Signals, code: int) -> None:
    run, _ = node
    run.signal(how)
    assert run.wait() == code
    assert run.said() == ""


def test_a_port_in_use(
    processes: Marked, folder: Path, tmp_path: Path, node: tuple[Run, str]
) -> None:
    _, address = node
    second = start(processes, tmp_path / "second", "node", "--listen", address, "--model", folder)
    assert second.wait() == 2
    assert second.said("stdout") == ""
    assert re.fullmatch(
        rf"duck: cannot listen on {address}: .*in use.*; choose another port.*\n", second.said()
    )


def test_a_node_whose_parent_is_not_who_it_says(
    processes: Marked, folder: Path, tmp_path: Path
) -> None:
    """Its host may have died while it started; then it must not stay."""
    run = start(
        processes, tmp_path, "node", "--listen", "127.0.0.1:0", "--model", folder, "--parent", "1"
    )
    assert run.wait() == 2
    assert "--parent 1 is not the process that started this node" in run.said()


async def test_a_node_ends_when_its_input_does(
    processes: Marked, folder: Path, tmp_path: Path
) -> None:
    """What ends it where the system cannot kill a child with its parent."""
    run = start(
        processes, tmp_path, "node", "--listen", "127.0.0.1:0", "--model", folder, "--json",
        "--parent", str(os.getpid()), stdin=subprocess.PIPE,
    )  # fmt: skip
    address = json.loads(run.wait_for("\n", "stdout"))["address"]
    async with Host.attached(address, _plan(folder, 1)) as host:
        run.close_input()
        assert await host.control.ended()
        assert await host.data.ended()
    await Peer.close_all()
    assert run.wait() == 0
    assert run.said() == ""


def test_sums_are_the_same_whoever_computes(folder: Path) -> None:
    """What a duck answers does not depend on which rows travel together."""
    from duck.node import Node

    node, plan = Node(ModelSource(folder)), _plan(folder, 1)
    asyncio.run(node.attach(plan, 0, lambda _done, _total: None))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, CONFIG["hidden_size"]), np.float32)
    ids = rng.integers(0, 16, (5, 4), np.int32)
    weights = rng.random((5, 4), np.float32)
    together = node.answer(1, x, ids, weights)
    for row in range(5):
        part = slice(row, row + 1)
        alone = node.answer(1, x[part], ids[part], weights[part])
        np.testing.assert_array_equal(alone[0], together[row])
