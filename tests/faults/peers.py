"""Peers that speak the tcp transport's bytes by hand, so that they can say anything."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import numpy as np

from duck import wire
from duck.placement import Plan
from duck.transports.control import NONCE_BYTES, PROTOCOL
from duck.transports.tcp import CHECKSUMS, TcpTransport
from duck.transports.tls import Credentials
from tests.flocks import WAIT_S

NONCE = bytes(NONCE_BYTES)
TOKEN = b"0123456789abcdef"


class Peer:
    """One connection; every wait has a deadline. `made` has all that were not closed."""

    made: ClassVar[set[Peer]] = set()

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._decoder = wire.ControlDecoder()
        self._messages: list[dict[str, Any]] = []
        self.made.add(self)

    @classmethod
    async def connect(cls, address: str, credentials: Credentials | None = None) -> Peer:
        """Credentials: what to show inside TLS, which is then asyncio's own, not ours."""
        host, port = address.rsplit(":", 1)
        more: dict[str, Any] = {"limit": 1 << 24}
        if credentials:
            more |= {"ssl": credentials.context, "server_hostname": ""}
        return cls(*await asyncio.open_connection(host, int(port), **more))

    def say(self, kind: str, **fields: Any) -> None:
        self.writer.write(wire.encode_control({"t": kind, **fields}))

    async def hear(self) -> dict[str, Any]:
        """The next control message but LOADING and PING."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for message in self._messages:
                    if message["t"] not in ("LOADING", "PING"):
                        self._messages.remove(message)
                        return message
                self._messages.clear()
                data = await self.reader.read(1 << 16)
                if not data:
                    raise EOFError("the other end closed")
                self._messages += self._decoder.feed(data)

    async def frame(self) -> tuple[wire.Header, bytes]:
        """The next data frame."""
        async with asyncio.timeout(WAIT_S):
            head = await self.reader.readexactly(wire.HEADER_BYTES)
            header = wire.unpack_header(head)
            size = min(wire.FRAME_LIMIT, header.message_bytes - header.offset)
            return header, await self.reader.readexactly(size)

    async def ended(self) -> bool:
        """Wait until the other end has closed the connection."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(1 << 16):
                    pass
        return True

    def close(self) -> None:
        self.made.discard(self)
        self.writer.transport.abort()

    @classmethod
    async def close_all(cls) -> None:
        for peer in tuple(cls.made):
            peer.close()
        await asyncio.sleep(0)  # in the next turn the sockets are closed


def hello(plan: Plan, duck: int = 0, **changes: Any) -> dict[str, Any]:
    """What a host says first."""
    return {
        "v": list(PROTOCOL),
        "software": "duck 0.0.0 (test)",
        "session": secrets.randbits(32),
        "nonce": NONCE,
        "plan": plan.to_wire(),
        "plan_hash": plan.hash(),
        "duck": duck,
        "slice_hash": plan.slice_hash(duck),
        "patience": [30.0, 0.5],
        "data": "tcp",
        "plane": {},
        **changes,
    }


class Host:
    """A host made by hand: a control and a data connection to one duck."""

    def __init__(
        self, plan: Plan, control: Peer, data: Peer, session: int, welcome: dict[str, Any]
    ) -> None:
        self.plan, self.control, self.data, self.welcome = plan, control, data, welcome
        self.session = session

    @classmethod
    @contextlib.asynccontextmanager
    async def attached(cls, address: str, plan: Plan, duck: int = 0) -> AsyncIterator[Host]:
        control = await Peer.connect(address)
        data: Peer | None = None
        try:
            said = hello(plan, duck)
            control.say("HELLO", **said)
            welcome = await control.hear()
            assert welcome["t"] == "WELCOME", welcome
            data = await Peer.connect(address)
            data.say("DATA", token=welcome["plane"]["token"])
            assert (await data.hear())["t"] == "OK"
            yield cls(plan, control, data, said["session"], welcome)
        finally:
            control.close()
            if data:
                data.close()

    def ask(
        self, rows: int = 1, *, expert: int = 0, body: bytes | None = None, **head: Any
    ) -> bytes:
        """The frames of an ask; `head` replaces fields of its header."""
        if body is None:
            shape = self.plan.shape
            body = wire.pack_ask(
                np.full((rows, shape.top_k), expert),
                np.ones((rows, shape.top_k)),
                wire.to_wire(np.ones((rows, shape.hidden), np.float32), shape.ask_dtype),
            )
        out = []
        for fragment, fragments, offset, size in wire.answer_frames(len(body)):
            fields = {
                "kind": wire.Kind.ASK, "session": self.session, "ticket": 1,
                "layer": 1, "source": wire.HOST, "fragment": fragment, "fragments": fragments,
                "message_bytes": len(body), "offset": offset, **head,
            }  # fmt: skip
            payload = body[offset : offset + size]
            out += [wire.pack_header(**fields, payload=payload), payload]
        return b"".join(out)

    def cancel(self, ticket: int) -> bytes:
        return self.ask(body=b"", kind=wire.Kind.CANCEL, ticket=ticket)


class ScriptedDuck:
    """A duck made by hand: says WELCOME and OK, then its test decides.

    Args:
        welcome: fields of WELCOME that differ from an honest one.
        script: called instead of WELCOME, with the connection and HELLO.
    """

    checksum = ""  # what the last host wants its frames covered by

    def __init__(
        self,
        welcome: dict[str, Any] | None = None,
        script: Callable[[Peer, dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        self.address = ""
        self.control: asyncio.Queue[Peer] = asyncio.Queue()
        self.data: asyncio.Queue[Peer] = asyncio.Queue()
        self.answers_pings = True
        self._welcome, self._script = welcome or {}, script

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[ScriptedDuck]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            yield self
        finally:
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = Peer(reader, writer)
        try:
            message = await peer.hear()
            if message["t"] == "DATA":
                assert message["token"] == TOKEN
                peer.say("OK")
                self.data.put_nowait(peer)
                await asyncio.get_running_loop().create_future()
                return
            ScriptedDuck.checksum = message.get("plane", {}).get("checksum", "crc32")
            if self._script:
                await self._script(peer, message)
            else:
                peer.say(
                    "WELCOME",
                    **{
                        "v": PROTOCOL[1], "software": "a script", "nonce": NONCE,
                        "plane": {"token": TOKEN},
                        "plan_hash": message["plan_hash"], "slice_hash": message["slice_hash"],
                        **self._welcome,
                    },
                )  # fmt: skip
                self.control.put_nowait(peer)
                await self._pong(peer)
        except (EOFError, ConnectionError, asyncio.CancelledError):
            pass  # the host closed, or the test is over
        finally:
            peer.close()

    async def _pong(self, peer: Peer) -> None:
        while await peer.reader.read(1 << 16):
            if self.answers_pings:
                peer.say("PONG")


def answer(
    plan: Plan,
    header: wire.Header,
    values: np.ndarray,
    *,
    stamps: bytes = bytes(16),
    **head: Any,
) -> bytes:
    """The frames of an answer to an ask; `head` replaces fields of its header."""
    body = stamps + wire.to_wire(values, plan.shape.answer_dtype).tobytes()
    out = []
    for fragment, fragments, offset, size in wire.answer_frames(len(body)):
        fields = {
            "kind": wire.Kind.ANSWER, "session": header.session, "ticket": header.ticket,
            "layer": header.layer, "source": 0, "fragment": fragment, "fragments": fragments,
            "message_bytes": len(body), "offset": offset, **head,
        }  # fmt: skip
        payload = body[offset : offset + size]
        out += [
            wire.pack_header(**fields, payload=payload, checksum=CHECKSUMS[ScriptedDuck.checksum]),
            payload,
        ]
    return b"".join(out)


@contextlib.asynccontextmanager
async def host_of(duck: ScriptedDuck, plan: Plan) -> AsyncIterator[tuple[TcpTransport, Peer]]:
    """A started transport whose only duck is scripted, and that duck's data connection."""
    async with duck.listening():
        transport = TcpTransport([duck.address])
        try:
            await transport.start(plan)
            yield transport, await duck.data.get()
        finally:
            await transport.close()
