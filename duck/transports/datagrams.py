"""UDP sockets as the multicast transport needs them, and the network interfaces they belong to.

A message goes out as one train of equal datagrams in one call where the kernel cuts trains
(UDP_SEGMENT, Linux 4.18), and comes in as one where it joins them (UDP_GRO, Linux 5.0): per-packet
calls would cost more than everything else together. Where it cannot, one call a datagram does the
same. Nothing here knows what is in a datagram.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import struct
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from duck.errors import ConfigError, TransportError
from duck.transports import receive

Address = tuple[str, int]

# Not in Python's socket module; from linux/udp.h, linux/in.h and asm-generic/socket.h.
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE, _IP_MULTICAST_ALL = 10, 3, 49
_SO_RCVBUFFORCE = 33
_TRAIN_DATAGRAMS, _TRAIN_BYTES = 64, 65_507  # the kernel's limits for one train
_TRUNCATED = int(socket.MSG_TRUNC)  # an enum is slow to calculate with
# One wake-up takes in at most so many: whoever floods us does not stop the event loop.
_DRAIN = 512
# What a wake-up receives lies here until it is dealt with; a train takes at most the second.
_BUFFER_BYTES, _LARGEST = 1 << 19, 1 << 16
# How the kernel says that it cannot cut this train here, and the datagrams may go one by one.
_NO_TRAINS = {errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOPROTOOPT}


def buffer_bytes(datagrams: int, size: int) -> int:
    """What the kernel charges a receive buffer for so many datagrams of `size` bytes.

    Measured: 2,304 for 1,472 bytes. Memory comes in powers of two, plus its own notes.
    """
    return datagrams * ((1 << (size + 400 - 1).bit_length()) + 256)


class UdpSocket:
    """A non-blocking IPv4 UDP socket.

    Args:
        address: to bind to; port 0 lets the system choose.
        interface: the address of the interface that sends multicast, and joins `group`.
        group: the multicast group to listen to, on the bound port.
        loop: whether this machine hears what is sent to a group.
        receive_bytes: wanted for the receive buffer, see `buffer_bytes`.

    Raises:
        OSError: the system refuses.
    """

    def __init__(
        self, address: Address, *, interface: str, group: str = "", loop: bool = False,
        receive_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.calls = 0  # receptions
        self.datagrams = 0  # that came with them
        self.send_calls = 0
        self.unsent = 0  # datagrams that the system refused: as good as lost
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._loop: asyncio.AbstractEventLoop | None = None
        self.socket = sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            here = socket.inet_aton(interface)
            if group:
                # Several ducks of one machine listen to the same group.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, here)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, int(loop))
            # Nothing is ever cut by IP: a datagram that does not fit is an error, or lost.
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE)
            if group:
                sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
                member = socket.inet_aton(group) + here
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            self.receive_bytes = _grow(sock, receive_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
            self.sends_trains = _has(sock, _UDP_SEGMENT, 0)
            self.receives_trains = _has(sock, _UDP_GRO, 1)
        except OSError:
            sock.close()
            raise
        self.address: Address = sock.getsockname()

    def listen(self, reader: Callable[[], None]) -> None:
        """Have the running event loop call `reader` when something has come; it should `drain`."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket, reader)

    def send(self, train: bytes | memoryview, size: int, to: Address) -> None:
        """Send datagrams that lie one behind the other, each `size` bytes long but the last.

        What the system does not take counts as lost: whoever waits for it asks again.
        """
        view = memoryview(train)
        if self.sends_trains and len(view) > size:
            most = min(_TRAIN_DATAGRAMS, _TRAIN_BYTES // size) * size
            control = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
            while view:
                part, view = view[:most], view[most:]
                self.send_calls += 1
                try:
                    self.socket.sendmsg([part], control if len(part) > size else (), 0, to)
                except OSError as error:
                    if error.errno not in _NO_TRAINS:
                        self.unsent += -(-len(part) // size)
                        continue
                    self.sends_trains = False
                    self._send_singly(part, size, to)
                    self._send_singly(view, size, to)
                    return
        else:
            self._send_singly(view, size, to)

    def _send_singly(self, view: memoryview, size: int, to: Address) -> None:
        for start in range(0, len(view), size):
            self.send_calls += 1
            try:
                self.socket.sendto(view[start : start + size], to)
            except OSError:
                self.unsent += 1

    def drain(self) -> Iterator[tuple[memoryview, int, Address]]:
        """What has arrived: (datagrams one behind the other, the size of each but the last, from).

        Datagrams that the kernel did not join are joined here, sender by sender, so that whoever
        takes them looks at a message and not at every packet. The bytes are good until the reader
        is called again; it is, at once, when more has come than one wake-up may take.
        """
        receive, buffer, at = self.socket.recvmsg_into, self._buffer, 0
        singles: dict[Address, list[memoryview]] = {}
        for _ in range(_DRAIN):
            if at > _BUFFER_BYTES - _LARGEST:
                yield from _joined(singles)
                singles.clear()
                at = 0
            try:
                count, control, flags, sender = receive([buffer[at:]], 64)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                continue  # an ICMP message about something sent before: it was lost, no more
            size = train_size(control, count)
            self.calls += 1
            if not count or flags & _TRUNCATED:
                self.datagrams += 1
                continue
            came = buffer[at : at + count]
            at += count
            if size < count:
                self.datagrams += -(-count // size)
                yield came, size, sender
            else:
                self.datagrams += 1
                if sender in singles:
                    singles[sender].append(came)
                else:
                    singles[sender] = [came]
        yield from _joined(singles)

    @property
    def collects(self) -> bool:
        """Whether a `receive.Receiver` may do what `drain` does."""
        return receive.is_available()

    def deafen(self) -> None:
        """Listen no more: another receives."""
        if self._loop:
            self._loop.remove_reader(self.socket)
            self._loop = None

    def close(self) -> None:
        """Listen no more, and give the socket back."""
        self.deafen()
        self.socket.close()


def train_size(control: Sequence[tuple[int, int, bytes]], count: int) -> int:
    """Of the datagrams in `count` bytes that came at once; `control`: what came beside them."""
    for level, kind, value in control:
        if level == _SOL_UDP and kind == _UDP_GRO and len(value) >= 4:
            return int.from_bytes(value[:4], "little")
    return count


def _joined(
    singles: Mapping[Address, list[memoryview]],
) -> Iterator[tuple[memoryview, int, Address]]:
    """Trains of single datagrams: those of one size together, with a shorter one at the end."""
    for sender, datagrams in singles.items():
        begin = 0
        while begin < len(datagrams):
            size = len(datagrams[begin])
            end = begin + 1
            while end < len(datagrams) and len(datagrams[end]) == size:
                end += 1
            if end < len(datagrams) and len(datagrams[end]) < size:
                end += 1
            train = datagrams[begin]
            if end - begin > 1:
                train = memoryview(bytearray().join(datagrams[begin:end]))
            yield train, size, sender
            begin = end


def _has(sock: socket.socket, option: int, value: int) -> bool:
    try:
        sock.setsockopt(_SOL_UDP, option, value)
    except OSError:
        return False
    return True


def _grow(sock: socket.socket, wanted: int) -> int:
    """Make the receive buffer as large as wanted, or as the system allows; what it is then."""
    half = min(-(-wanted // 2), 1 << 30)  # the kernel doubles what it is told, in 32 bits
    for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):  # the first is for root
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= wanted:
            break
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, half)
        except OSError:
            continue
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def too_small(found: int, needed: int) -> str:
    """The words for a receive buffer that is too small, with the cure."""
    return (
        f"the system gives UDP sockets a receive buffer of {found} bytes, and {needed} are needed; "
        f"run: sysctl -w net.core.rmem_max={-(-needed // 2)}"
    )


# --- interfaces

_SIOCGIFCONF, _SIOCGIFFLAGS, _SIOCGIFMTU = 0x8912, 0x8913, 0x8921
_IFF_UP, _IFF_LOOPBACK, _IFF_MULTICAST = 0x1, 0x8, 0x1000
_IFREQ = struct.Struct("16s24x")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface of this machine and one of its IPv4 addresses."""

    name: str
    address: str
    mtu: int
    up: bool
    multicast: bool  # loopback carries it too, whatever its flags say


def interfaces() -> list[Interface]:
    """All interfaces with their IPv4 addresses; one that has several comes several times."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        room = array("B", bytes(256 * _IFREQ.size))
        request = bytearray(struct.pack("iP", len(room), room.buffer_info()[0]))
        fcntl.ioctl(sock, _SIOCGIFCONF, request)
        used = struct.unpack_from("i", request)[0]
        for start in range(0, used, _IFREQ.size):
            name = room[start : start + 16].tobytes()
            mtu = struct.unpack_from("i", _ioctl(sock, _SIOCGIFMTU, name), 16)[0]
            flags = struct.unpack_from("H", _ioctl(sock, _SIOCGIFFLAGS, name), 16)[0]
            found.append(
                Interface(
                    name.split(b"\0", 1)[0].decode(),
                    socket.inet_ntoa(room[start + 20 : start + 24].tobytes()),
                    mtu,
                    bool(flags & _IFF_UP),
                    bool(flags & (_IFF_MULTICAST | _IFF_LOOPBACK)),
                )
            )
    return found


def _ioctl(sock: socket.socket, what: int, name: bytes) -> bytes:
    return fcntl.ioctl(sock, what, _IFREQ.pack(name.split(b"\0", 1)[0]))


def interface_named(name: str) -> Interface:
    """The interface that a user chose, fit for multicast.

    Raises:
        ConfigError: there is none of that name, or it cannot be used.
    """
    known = interfaces()
    for found in known:
        if found.name == name:
            if not found.up:
                raise ConfigError(f"interface {name} is down; run: ip link set {name} up")
            if not found.multicast:
                raise ConfigError(
                    f"interface {name} has no multicast; choose another, or --transport tcp"
                )
            return found
    if name in (other for _, other in socket.if_nameindex()):
        raise ConfigError(_without_address(name))
    names = ", ".join(dict.fromkeys(other.name for other in known))
    raise ConfigError(f"no interface {name[:40]!r} here; with an IPv4 address there are {names}")


def _without_address(name: str) -> str:
    """Why an interface that has no IPv4 address cannot be used, and what to run."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = struct.unpack_from("H", _ioctl(sock, _SIOCGIFFLAGS, name.encode()), 16)[0]
    run = f"ip address add ADDRESS/24 dev {name}"
    if flags & _IFF_UP:
        return f"interface {name} has no IPv4 address; run: {run}"
    return f"interface {name} is down and has no IPv4 address; run: {run}; ip link set {name} up"


def interface_with(address: str) -> Interface:
    """The interface that has this address.

    Raises:
        TransportError: none has, or it cannot be used.
    """
    for found in interfaces():
        if found.address == address:
            if not found.multicast:
                raise TransportError(
                    f"interface {found.name} ({address}) has no multicast; use --transport tcp"
                )
            return found
    raise TransportError(f"no interface has the IPv4 address {address}; use --transport tcp")
