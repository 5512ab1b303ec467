"""The multicast transport over networks of namespaces: other packet sizes, losses, pulled cables.

Needs root, iproute2 and nftables; `--full` has 32 ducks and longer texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

import duck
from duck import wire
from duck.config import Network
from duck.errors import ConfigError, DuckLost, TransportError
from duck.placement import Plan
from duck.transports import control
from duck.transports.multicast import MulticastPlane, MulticastTransport
from tests.flocks import WAIT_S, plan_for
from tests.network.fake_node import partial_sums
from tests.network.pond import Pond, why_not

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "runs"),
    pytest.mark.timeout(400),
]
AWAY_S = 2.0


@pytest.fixture(scope="module")
def pond(request: pytest.FixtureRequest) -> Iterator[Pond]:
    """Ducks that answer at once."""
    pond = Pond(32 if request.config.getoption("--full") else 8)
    try:
        pond.start_fake_ducks()
        yield pond
    finally:
        pond.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ducks share this machine: one may be slow to say WELCOME, or PONG; smaller packets are
    for those that hear none.
    """
    monkeypatch.setattr(control, "CONNECT_S", WAIT_S)
    monkeypatch.setattr("duck.transports.multicast._TRY_S", 3.0)


class Rounds:
    """Asks of one or two rows, one after the other; every answer is compared."""

    def __init__(self, transport: MulticastTransport, plan: Plan) -> None:
        self.transport, self.plan = transport, plan
        self._rng = np.random.default_rng(0)
        self._turn = 0

    async def run(self, count: int, rows: int = 0) -> None:
        """So many asks; rows: of each, or one and two in turn."""
        for _ in range(count):
            self._turn += 1
            await self.one(rows or self._turn % 2 + 1, self._turn % 10)

    async def one(self, rows: int, layer: int) -> None:
        shape = self.plan.shape
        x = wire.to_wire(self._rng.standard_normal((rows, shape.hidden), np.float32), "bfloat16")
        ids = np.zeros((rows, shape.top_k), np.int32)
        weights = np.ones((rows, shape.top_k), np.float32)
        place = await self.transport.acquire(rows)
        deadline = asyncio.get_running_loop().time() + 2 * WAIT_S
        ask = self.transport.ask(layer, x, ids, weights, place, deadline=deadline)
        landed = (await ask).partials(rows)
        values = wire.to_float32(x)
        for number in range(self.plan.ducks):
            want = wire.to_wire(partial_sums(number, layer, values), "bfloat16")
            np.testing.assert_array_equal(landed[number], want)
        ask.release()

    def count(self, name: str) -> float:
        return self.transport.stats()[name]


@contextlib.asynccontextmanager
async def attached(pond: Pond, network: Network | None = None) -> AsyncIterator[Rounds]:
    """A host with the widths of a large model; its warm-up is over."""
    plan = plan_for(
        pond.ducks, hidden=7168, max_rows=64, ask_dtype="bfloat16", answer_dtype="bfloat16"
    )
    transport = MulticastTransport(pond.addresses(), plane=MulticastPlane(network))
    try:
        await transport.start(plan)
        rounds = Rounds(transport, plan)
        await rounds.run(20)
        yield rounds
    finally:
        await transport.close()


@pytest.mark.parametrize(("mtu", "payload"), [(1500, 1440), (9000, 8928)])
def test_packets_of_both_sizes_with_and_without_loss(pond: Pond, mtu: int, payload: int) -> None:
    async def main() -> None:
        async with attached(pond) as rounds:
            assert rounds.count("payload_bytes") == payload
            # Nothing is lost: hardly anything is asked for again. Of a machine that is busy a duck
            # may be stopped for a while in the middle of an answer.
            before = rounds.count("nacks")
            await rounds.run(200)
            assert rounds.count("nacks") - before <= 200 * pond.ducks / 20
            assert rounds.count("corrupt") == rounds.count("malformed") == 0
            await rounds.one(64, 1)  # by TCP
            for percent in (0.1, 1.0, 5.0):
                pond.lose(percent)
                again = rounds.count("nacks") + rounds.count("rnacks") + rounds.count("probes")
                await rounds.run(100)
                asked = rounds.count("nacks") + rounds.count("rnacks") + rounds.count("probes")
                assert asked > again or percent < 1
            assert rounds.count("strangers") == 0

    pond.set_mtu(mtu)
    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.filter()


def test_a_cable_is_pulled_for_two_seconds(pond: Pond, monkeypatch: pytest.MonkeyPatch) -> None:
    """While asks are on their way, and while there are none: nobody is lost."""
    assert AWAY_S < control.SILENT_TICKS * 0.25
    # It takes the kernel up to a second more to notice that a cable is back, and a busy machine
    # longer.
    monkeypatch.setattr(control, "SILENT_TICKS", 10 * control.SILENT_TICKS)

    async def away(duck: int) -> None:
        pond.plug(duck, "down")
        await asyncio.sleep(AWAY_S)  # this is what is tested, not a wait for something
        pond.plug(duck, "up")

    async def main() -> None:
        async with attached(pond) as rounds:
            pulled = asyncio.create_task(away(3))
            done = 0
            while not pulled.done():
                await rounds.run(1)
                done += 1
            await pulled
            await rounds.run(20)
            await away(5)
            await rounds.run(20)
            assert not rounds.transport.asks.lost

    pond.set_mtu(1500)
    with pond.on_host():
        asyncio.run(main())


def test_a_cable_that_is_away_for_too_long(pond: Pond) -> None:
    """The duck is lost, and once its cable is back a new session begins."""

    async def main() -> None:
        async with attached(pond) as rounds:
            before = rounds.transport.session
            pond.plug(3, "down")
            with pytest.raises(DuckLost, match=r"lost duck 3 .* no sign of life") as caught:
                await rounds.run(10**9)
            assert caught.value.index == 3
            with pytest.raises(DuckLost, match=r"no sign of life .*; reconnecting"):
                await rounds.run(1)
            pond.plug(3, "up")
            async with asyncio.timeout(WAIT_S):
                while rounds.transport.asks.lost:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await rounds.run(20)
            assert rounds.transport.session != before

    pond.set_mtu(1500)
    with pond.on_host():
        asyncio.run(main())


@pytest.mark.parametrize(("mtu", "payload"), [(1500, 1440), (1400, 1216)])
def test_one_duck_behind_smaller_packets_decides_for_all(
    pond: Pond, mtu: int, payload: int
) -> None:
    async def main() -> None:
        async with attached(pond) as rounds:
            assert rounds.count("payload_bytes") == payload
            await rounds.run(10)

    pond.set_mtu(9000)
    pond.set_mtu(mtu, [2])
    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.set_mtu(1500)


def test_a_duck_that_hears_no_datagrams_is_refused_by_name(pond: Pond) -> None:
    async def main() -> None:
        with pytest.raises(
            TransportError, match=r"duck 1 \(.*answers on TCP, but no UDP packet of 1500 or"
        ):
            async with attached(pond):
                pass

    pond.filter(f"ether type ip ip saddr {pond.address(2)} ip protocol udp drop")
    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.filter()


@pytest.mark.full
def test_a_duck_whose_datagrams_end_while_its_connections_live(pond: Pond) -> None:
    """Lost after ten seconds, by name and with the reason."""

    async def main() -> None:
        async with attached(pond) as rounds:
            pond.filter(f"ether type ip ip saddr {pond.address(2)} ip protocol udp drop")
            with pytest.raises(DuckLost, match=r"duck 1 .* is UDP blocked on the way\?") as caught:
                await rounds.run(1)
            assert caught.value.index == 1

    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.filter()


def test_a_switch_that_forgets_the_group(pond: Pond) -> None:
    """As one that snoops IGMP does when nobody asks for members: asks still come, one by one."""

    async def main() -> None:
        async with attached(pond) as rounds:
            pond.filter("ether type ip ip daddr 224.0.0.0/4 drop")
            with capture_logs() as logs:
                async with asyncio.timeout(WAIT_S):
                    # Fifty asks in a row, or more where half of an ask that was sent again was read
                    # before the rest had come.
                    while len(rounds.transport.plane._warned) < pond.ducks:
                        await rounds.run(10)
            told = [entry for entry in logs if entry["event"] == "multicasts_do_not_arrive"]
            assert {entry["duck"] for entry in told} == set(rounds.transport.labels)
            assert len(told) == pond.ducks

    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.filter()


def test_two_hosts_at_once_do_not_hear_each_other(pond: Pond) -> None:
    async def main() -> None:
        async with attached(pond) as one, attached(pond) as other:
            pond.lose(1)
            await asyncio.gather(one.run(50), other.run(50))
            for rounds in (one, other):
                assert rounds.count("strangers") == rounds.count("malformed") == 0

    try:
        with pond.on_host():
            asyncio.run(main())
    finally:
        pond.filter()


def test_interfaces_that_will_not_do(pond: Pond) -> None:
    async def main(network: Network | None, error: type[Exception], told: str) -> None:
        with pytest.raises(error, match=told):
            async with attached(pond, network):
                pass

    def set_link(state: str) -> None:
        pond.run("m0", ["ip", "link", "set", "e0", *state.split()])

    with pond.on_host():
        lo, e0 = Network(("lo",)), Network(("e0",))
        asyncio.run(main(lo, TransportError, r"reached through 10\.77\.0\.1, which is not on lo"))
        set_link("multicast off")
        asyncio.run(main(None, TransportError, r"e0 \(10\.77\.0\.1\) has no multicast"))
        asyncio.run(main(e0, ConfigError, "interface e0 has no multicast"))
        set_link("multicast on")
        set_link("down")
        asyncio.run(main(e0, ConfigError, "interface e0 is down; run: ip link set e0 up"))
        set_link("up")
        pond.run("m0", ["ip", "link", "add", "e7", "type", "veth", "peer", "name", "e8"])
        e7 = Network(("e7",))
        asyncio.run(main(e7, ConfigError, "e7 is down and has no IPv4 address; run: ip address a"))
        pond.run("m0", ["ip", "link", "set", "e7", "up"])
        asyncio.run(main(e7, ConfigError, "interface e7 has no IPv4 address; run: ip address add"))
        pond.run("m0", ["ip", "link", "del", "e7"])


def test_packets_that_do_not_fit(pond: Pond) -> None:
    """What was tried, and what to set; and that it helps."""

    async def main(network: Network | None, told: str = "") -> None:
        if not told:
            async with attached(pond, network) as rounds:
                await rounds.run(10)
            return
        with pytest.raises(TransportError, match=told):
            async with attached(pond, network):
                pass

    pond.set_mtu(1500)
    with pond.on_host():
        try:
            large = r"mtu 9000 is more than the 1500 bytes that interface e0 sends: .* mtu 9000$"
            asyncio.run(main(Network(mtu=9000), large))
            pond.set_mtu(1000, [2])
            told = r"duck 2 .*no UDP packet of 1500 or 1280 bytes .* set mtu \(576 or more\) under"
            asyncio.run(main(None, told))
            asyncio.run(main(Network(mtu=1000)))
            pond.set_mtu(500)
            asyncio.run(main(None, r"e0 sends packets of 500 bytes at most, want 576; run: ip li"))
        finally:
            pond.set_mtu(1500)


def test_two_interfaces_two_groups() -> None:
    pond = Pond(4, nics=2)
    try:
        pond.start_fake_ducks()

        async def main(network: Network | None) -> None:
            async with attached(pond, network) as rounds:
                pond.lose(1)
                await rounds.run(50)
                pond.filter()

        with pond.on_host():
            asyncio.run(main(None))
            asyncio.run(main(Network(("e0", "e1"), ("239.7.7.1", "239.7.7.2:7777"))))
    finally:
        pond.close()


def test_the_same_tokens_at_any_loss(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokens = 500 if request.config.getoption("--full") else 40
    wanted = duck.Sampling(max_tokens=tokens, ignore_eos=True)
    told: list[list[int]] = []

    async def answer(*percents: float, **options: str) -> None:
        async with duck.Engine.open("demo", dtype="float32", device="cpu", **options) as engine:
            for percent in percents:
                pond.lose(percent)
                told.append((await engine.generate("A duckling", wanted)).token_ids)

    pond = Pond(2)
    try:
        pond.start_ducks("-m", "duck", "node", "--insecure", "--model", "duck/demo", "--json")
        flock = tmp_path / "flock.toml"
        lines = ["[host]", 'interface = "e0"', 'groups = ["239.7.7.7"]']
        lines += [f'[[duck]]\naddress = "{address}"' for address in pond.addresses()]
        flock.write_text("\n".join(lines))
        asyncio.run(answer(0, transport="loopback"))
        with pond.on_host():
            asyncio.run(answer(0, 1, 5, transport="multicast", ducks=str(flock)))
    finally:
        pond.close()
    assert len(told[0]) == tokens
    assert told == [told[0]] * 4


def test_namespaces_are_gone_after_a_failure() -> None:
    with contextlib.suppress(ZeroDivisionError), contextlib.closing(Pond(1)) as pond:
        process = pond.start(1, "-c", "input()")
        raise ZeroDivisionError
    assert process.returncode is not None
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert not re.search(rf"^{pond._prefix}-", listed.stdout, re.MULTILINE)
