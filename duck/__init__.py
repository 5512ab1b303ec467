"""duck: run mixture-of-experts models far too large for one GPU on a flock of cheap machines.

Importing this package loads no torch: `Engine` and its friends are looked up on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from duck.errors import (
    ConfigError,
    DuckError,
    DuckLost,
    TransportClosed,
    TransportError,
    WeightsError,
    WireError,
)

if TYPE_CHECKING:
    from duck.engine import Completion, Engine, Piece
    from duck.sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ConfigError",
    "DuckError",
    "DuckLost",
    "Engine",
    "Piece",
    "Sampling",
    "TransportClosed",
    "TransportError",
    "WeightsError",
    "WireError",
]

_LAZY = {
    "Engine": "duck.engine",
    "Completion": "duck.engine",
    "Piece": "duck.engine",
    "Sampling": "duck.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'duck' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
