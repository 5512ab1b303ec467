"""The data planes by name: what --transport offers beside the loopback."""

from __future__ import annotations

import sys

from duck.config import Network
from duck.errors import ConfigError
from duck.transports import shm
from duck.transports.control import Plane
from duck.transports.listen import DuckPlane
from duck.transports.shm import ShmDuckPlane, ShmPlane
from duck.transports.tcp import TcpDuckPlane, TcpPlane


def host_plane(name: str, network: Network) -> Plane:
    """How asks and answers travel to ducks in other processes.

    Raises:
        ConfigError: this machine has no such network.
    """
    if name == "shm":
        return ShmPlane()
    if name != "multicast":
        return TcpPlane()
    if sys.platform != "linux":
        raise ConfigError("--transport multicast needs Linux on the host; use --transport tcp")
    from duck.transports.multicast import MulticastPlane

    return MulticastPlane(network)


def duck_planes() -> list[DuckPlane]:
    """The data planes that a duck on this machine can serve; a host chooses."""
    tcp = TcpDuckPlane()
    planes: list[DuckPlane] = [tcp]
    if shm.is_available():
        planes.append(ShmDuckPlane())
    if sys.platform == "linux":
        from duck.transports.multicast import MulticastDuckPlane

        planes.append(MulticastDuckPlane(tcp))
    return planes
