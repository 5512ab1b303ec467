"""UDP sockets with trains and without, their buffers, and the interfaces of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from duck.errors import ConfigError, TransportError

if sys.platform != "linux":
    pytest.skip("Linux sockets", allow_module_level=True)

from duck.transports.datagrams import (
    Interface,
    UdpSocket,
    buffer_bytes,
    interface_named,
    interface_with,
    interfaces,
)
from duck.transports.multicast import Nic
from tests.flocks import WAIT_S

HERE = "127.0.0.1"
SO_NO_CHECK, UDP_GRO = 11, 104
TRAIN = bytes(range(256)) * 300  # more than the kernel takes at once
SIZE = 1000


@contextlib.contextmanager
def pair() -> Iterator[tuple[UdpSocket, UdpSocket]]:
    with (
        contextlib.closing(UdpSocket((HERE, 0), interface=HERE)) as one,
        contextlib.closing(UdpSocket((HERE, 0), interface=HERE)) as other,
    ):
        yield one, other


async def received(sock: UdpSocket, nbytes: int) -> tuple[list[bytes], set[tuple[str, int]]]:
    """The datagrams that come until so many bytes are there, and from whom."""
    come = asyncio.Event()
    sock.listen(come.set)
    datagrams: list[bytes] = []
    senders = set()
    async with asyncio.timeout(WAIT_S):
        while sum(map(len, datagrams)) < nbytes:
            come.clear()
            for train, size, sender in sock.drain():
                datagrams += [bytes(train[n : n + size]) for n in range(0, len(train), size)]
                senders.add(sender)
            if sum(map(len, datagrams)) < nbytes:
                await come.wait()
    return datagrams, senders


def cut() -> list[bytes]:
    return [TRAIN[n : n + SIZE] for n in range(0, len(TRAIN), SIZE)]


async def test_trains_go_out_and_come_in_whole() -> None:
    with pair() as (one, other):
        assert one.sends_trains
        assert other.receives_trains
        one.send(TRAIN, SIZE, other.address)
        assert one.send_calls == 2  # of at most 64 datagrams
        datagrams, senders = await received(other, len(TRAIN))
        assert datagrams == cut()
        assert senders == {one.address}
        assert (other.calls, other.datagrams) == (2, len(cut()))


async def test_a_kernel_that_joins_no_trains() -> None:
    with pair() as (one, other):
        other.socket.setsockopt(17, UDP_GRO, 0)
        one.send(TRAIN, SIZE, other.address)
        datagrams, _ = await received(other, len(TRAIN))
        assert datagrams == cut()
        assert other.calls == other.datagrams == len(cut())


async def test_a_kernel_that_cuts_no_trains() -> None:
    """As it says for a device that cannot: here because nobody may skip a train's checksums."""
    with pair() as (one, other):
        one.socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        one.send(TRAIN, SIZE, other.address)
        assert not one.sends_trains
        assert one.unsent == 0
        assert (await received(other, len(TRAIN)))[0] == cut()
        one.send(TRAIN, SIZE, other.address)  # singly from now on
        assert (await received(other, len(TRAIN)))[0] == cut()
        assert one.send_calls == 1 + 2 * len(cut())


async def test_what_the_system_does_not_take_is_counted() -> None:
    with pair() as (one, other):
        one.send(bytes(2 * SIZE), SIZE, (HERE, 0))
        assert one.unsent == 2
        one.send(b"x" * 70_000, 70_000, other.address)
        assert one.unsent == 3
        one.send(b"fits", 4, other.address)
        assert (await received(other, 4))[0] == [b"fits"]


async def test_a_port_that_nobody_listens_to_any_more() -> None:
    """The system tells of it by an error on the next call: no reason to stop."""
    with pair() as (one, other):
        gone = UdpSocket((HERE, 0), interface=HERE)
        gone.close()
        one.socket.connect(gone.address)
        one.send(b"lost", 4, gone.address)
        assert list(one.drain()) == []
        one.socket.connect(other.address)
        one.send(b"fits", 4, other.address)
        assert (await received(other, 4))[0] == [b"fits"]


async def test_members_of_a_group_each_get_all_and_others_nothing() -> None:
    with contextlib.ExitStack() as stack:

        def open_socket(group: str) -> UdpSocket:
            return stack.enter_context(
                contextlib.closing(UdpSocket((group, port), interface=HERE, group=group))
            )

        host = stack.enter_context(
            contextlib.closing(UdpSocket((HERE, 0), interface=HERE, loop=True))
        )
        port = host.address[1]
        members = [open_socket("239.255.77.1") for _ in range(3)]
        other = open_socket("239.255.77.2")
        host.send(TRAIN, SIZE, ("239.255.77.1", port))
        for member in members:
            assert (await received(member, len(TRAIN)))[0] == cut()
        assert list(other.drain()) == []


def test_room_for_datagrams() -> None:
    assert buffer_bytes(1, 1472) == 2304  # as measured
    assert buffer_bytes(10, 1472) == 23040
    with contextlib.closing(UdpSocket((HERE, 0), interface=HERE, receive_bytes=150_000)) as sock:
        assert sock.receive_bytes >= 150_000


@pytest.mark.parametrize("wanted", [1 << 33, 1 << 40])
def test_a_buffer_that_no_system_gives(wanted: int) -> None:
    with pytest.raises(TransportError, match=rf"sysctl -w net.core.rmem_max={wanted // 2}$"):
        Nic(interface_with(HERE), "", wanted)


def test_interfaces() -> None:
    found = interface_with(HERE)
    assert found in interfaces()
    assert found == interface_named(found.name)
    assert found.up
    assert found.multicast  # although it says that it has none
    assert found.mtu >= 1500
    with pytest.raises(
        ConfigError, match=rf"no interface 'pond7' here; .* there are .*{found.name}"
    ):
        interface_named("pond7")
    with pytest.raises(TransportError, match=r"no interface has the IPv4 address 192\.0\.2\.77"):
        interface_with("192.0.2.77")


def test_nics_draw_groups_of_the_local_scope() -> None:
    interface = Interface("lo", HERE, 65536, True, True)
    for wanted, group in (("", ""), ("239.1.2.3", "239.1.2.3"), ("239.1.2.3:5000", "239.1.2.3")):
        nic = Nic(interface, wanted, 1 << 16)
        nic.socket.close()
        assert nic.group[0] == group or nic.group[0].startswith("239.255.")
        assert nic.group[1] == (5000 if ":" in wanted else nic.socket.address[1])
