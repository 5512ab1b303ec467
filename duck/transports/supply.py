"""A duck's missing layers on their way from the host, over the control connection; both ends.

    LACK   duck   layer, offset: send this layer's file from this byte on
    PIECE  host   layer, offset, data of at most 256 KiB; the last one is empty and has the sha256
    GOT    duck   layer, offset: everything before it is on the duck's disk

The host keeps no more than a few MiB ahead of GOT, and cuts a layer expert by expert while it
sends: neither end ever holds a whole layer for the other. After a cut the duck asks for the rest.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog

from duck import wire
from duck.errors import DuckError, TransportError, WireError
from duck.transports.link import Link

PIECE_BYTES = 1 << 18
WINDOW_BYTES = 16 * PIECE_BYTES
# The host reads an expert of a model that may lie on a slow disk between two pieces.
PIECE_S = 60.0
_REFUSED_S = 5.0

_log = structlog.get_logger(__name__)


class Sender:
    """The host's end, for one duck.

    stream: gives the bytes of a layer's file from its start, piece by piece, each good until the
    next is asked for; it is run in a thread.
    """

    TRIES = 3  # to send one layer: whole, the rest after a cut, and anew if that rest did not fit

    def __init__(
        self, link: Link, layers: tuple[int, ...], stream: Callable[[int], Iterator[memoryview]]
    ) -> None:
        self._link, self._stream = link, stream
        self._tries = dict.fromkeys(layers, self.TRIES)
        self._busy = False
        self._sent = self._got = 0  # of the layer that is on its way
        self._moved = asyncio.Event()

    async def send(self, lack: Mapping[str, Any]) -> None:
        """Answer one LACK.

        Raises:
            WireError: it asks for what it cannot.
            WeightsError: the host's own checkpoint is damaged.
        """
        layer, offset = wire.field(lack, "layer", int), wire.field(lack, "offset", int)
        if self._busy or offset < 0 or not self._tries.get(layer):
            raise WireError(f"LACK of layer {layer} from {offset} makes no sense")
        self._tries[layer] -= 1
        self._busy, self._sent, self._got = True, offset, offset
        sha256, at, stream = hashlib.sha256(), 0, self._stream(layer)

        def cut() -> memoryview | None:
            piece = next(stream, None)
            if piece is not None:
                sha256.update(piece)
            return piece

        while (piece := await asyncio.to_thread(cut)) is not None:
            for start in range(max(0, offset - at), len(piece), PIECE_BYTES):
                data = bytes(piece[start : start + PIECE_BYTES])
                while self._sent + len(data) - self._got > WINDOW_BYTES:
                    self._moved.clear()
                    await self._moved.wait()
                self._send(layer, at + start, data)
            at += len(piece)
        self._busy = False
        self._send(layer, at, b"", sha256=sha256.hexdigest())

    def _send(self, layer: int, offset: int, data: bytes, **more: str) -> None:
        self._link.send({"t": "PIECE", "layer": layer, "offset": offset, "data": data, **more})
        self._sent = offset + len(data)

    def got(self, message: Mapping[str, Any]) -> None:
        """Note a GOT."""
        offset = wire.field(message, "offset", int)
        if not self._got <= offset <= self._sent:
            raise WireError(f"GOT up to byte {offset}, which was not sent")
        self._got = offset
        self._moved.set()


async def fetch(link: Link, layer: int, offset: int, take: Callable[[bytes], None]) -> str:
    """The duck's end; see `transports.base.Loading`."""
    link.send({"t": "LACK", "layer": layer, "offset": offset})
    loop = asyncio.get_running_loop()
    while True:
        try:
            message = await link.receive(PIECE_S)
        except TimeoutError:
            raise TransportError(
                f"the host sent nothing of layer {layer} for {PIECE_S:.0f} s"
            ) from None
        if message["t"] != "PIECE":
            raise WireError(f"{message['t'][:40]!r} where a PIECE was due")
        data = wire.field(message, "data", bytes)
        place = (wire.field(message, "layer", int), wire.field(message, "offset", int))
        if place != (layer, offset) or len(data) > PIECE_BYTES:
            raise WireError(f"PIECE: {len(data)} bytes at {place}, want {(layer, offset)}")
        if "sha256" in message:
            return str(wire.field(message, "sha256", str))
        taking = loop.run_in_executor(None, take, data)
        try:
            await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait([taking])  # nobody closes the file under a thread's hands
            taking.exception()  # nobody waits for it any more: what went wrong is of no interest
            raise
        except DuckError as error:
            # Pieces are still coming: closing now would make the system drop our last word.
            _log.warning("refused", reason=str(error))
            link.send({"t": "ERR", "text": str(error)})
            await asyncio.wait([link.closed], timeout=_REFUSED_S)
            raise
        offset += len(data)
        link.send({"t": "GOT", "layer": layer, "offset": offset})
