"""The errors a user can meet; their text is one clear line, and their class decides the exit code.

DuckError
├── ConfigError     bad flag, file or prompt: what was found, allowed, what to change      exit 2
├── OutOfMemory     a GPU's memory ran out: for what, what is taken, what helps            exit 2
├── WeightsError    missing, misshaped or damaged tensor: names the tensor and its file    exit 2
├── WireError       bytes that break our framing, or a peer of another version             exit 3
└── TransportError                                                                         exit 3
    ├── TransportClosed   this end was closed: normal at shutdown
    └── DuckLost          one duck is silent or gone: names it, the layer and the time waited
"""

from __future__ import annotations


class DuckError(Exception):
    """Base of everything duck raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(DuckError, ValueError):
    """A flag, file or prompt that cannot be used."""


class OutOfMemory(DuckError):
    """A GPU had no room for what was planned, or what came beside it."""


class WeightsError(DuckError):
    """A checkpoint whose tensors are missing, misshaped, truncated or not numbers."""


class WireError(DuckError):
    """Bytes from a peer that break the framing, the version or the plan."""

    exit_code = 3


class TransportError(DuckError):
    """The flock cannot answer."""

    exit_code = 3


class TransportClosed(TransportError):
    """This end of the transport was closed."""


class DuckLost(TransportError):
    """One duck did not answer.

    Args:
        duck: who, as the user knows it: "duck 1 (127.0.0.1:40001)".
        layer: the layer whose ask it left open, or None outside an ask.
        waited_ms: how long that ask had been waiting.
        reason: what was seen: "connection closed", "no sign of life for 3.5 s".
        index: its number in the flock.
    """

    def __init__(
        self, duck: str, layer: int | None, waited_ms: float, reason: str, *, index: int = 0
    ) -> None:
        self.duck, self.layer, self.waited_ms, self.reason = duck, layer, waited_ms, reason
        self.index = index
        where = "outside an ask" if layer is None else f"at layer {layer}"
        super().__init__(f"lost {duck} {where} after waiting {waited_ms:.0f} ms: {reason}")
