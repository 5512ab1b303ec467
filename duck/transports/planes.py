"""The data planes by name: what --transport offers beside the loopback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from duck.transports import shm
from duck.transports.control import Plane
from duck.transports.listen import DuckPlane
from duck.transports.multicast import MulticastDuckPlane, MulticastPlane
from duck.transports.shm import ShmDuckPlane, ShmPlane
from duck.transports.tcp import TcpDuckPlane, TcpPlane

HOST_PLANES: dict[str, Callable[[], Plane]] = {
    "shm": ShmPlane,
    "tcp": TcpPlane,
    "multicast": MulticastPlane,
}


def duck_planes() -> list[DuckPlane]:
    """The data planes that a duck on this machine can serve; a host chooses."""
    tcp = TcpDuckPlane()
    planes: list[DuckPlane] = [tcp]
    if shm.is_available():
        planes.append(ShmDuckPlane())
    if sys.platform == "linux":
        planes.append(MulticastDuckPlane(tcp))
    return planes
