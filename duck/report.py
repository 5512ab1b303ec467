"""What was loaded, and where it lies: figures for machines, tables for people.

On the host by category, as stored (source) and as held (resident); on the ducks slice by slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from duck.budget import Budget
from duck.memory import readable
from duck.model.tally import Category


@dataclass(frozen=True)
class DuckLoad:
    """One duck's slice, and what its last attach took."""

    duck: str
    start: int  # columns
    stop: int
    modules: int  # layers with routed experts
    source_bytes: int  # of those layers' experts, whole
    theory_bytes: int
    resident_bytes: int
    warm: bool
    read_bytes: int  # from its own disk
    received_bytes: int  # from the host
    load_s: float

    @classmethod
    def of(
        cls, duck: str, part: range, columns: int, modules: int, source_bytes: int,
        facts: Mapping[str, Any],
    ) -> DuckLoad:  # fmt: skip
        """facts: as in WELCOME, which a duck of another make may have filled as it liked."""

        def number(name: str) -> float:
            value = facts.get(name)
            return value if isinstance(value, int | float) and 0 <= value < 1 << 62 else 0

        return cls(
            duck, part.start, part.stop, modules, source_bytes,
            source_bytes * len(part) // columns, int(number("resident_bytes")),
            facts.get("warm") is True, int(number("read_bytes")), int(number("received_bytes")),
            float(number("load_s")),
        )  # fmt: skip


@dataclass(frozen=True)
class LoadReport:
    """What an Engine's host and ducks hold."""

    host: Sequence[Category]
    kv_bytes_per_token: int
    memory: Budget
    ducks: Sequence[DuckLoad]

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes and seconds."""
        return {
            "host": [asdict(category) for category in self.host],
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "memory": self.memory.to_json(),
            "ducks": [asdict(duck) for duck in self.ducks],
        }

    def tables(self) -> tuple[Table, Table]:
        """The host's and the ducks'."""
        host = _table("host", "tensors", "source", "resident")
        for category in self.host:
            sizes = (readable(category.source_bytes), readable(category.resident_bytes))
            host.add_row(category.name, str(category.tensors), *sizes)
        per_token = f"{self.kv_bytes_per_token / 1024:.1f} KiB a token"
        host.add_row(f"KV cache, {self.memory.holding.kv}", "", "", per_token)
        return host, ducks_table(self.ducks)


def ducks_table(ducks: Sequence[DuckLoad]) -> Table:
    """One row a duck, and their sum; fits into 80 columns."""
    table = _table("", "columns", "layers", "theory", "resident", "read", "received", "in")
    table.caption = (
        f"routed experts, {readable(ducks[0].source_bytes)} in the checkpoint (source); theory: "
        "a duck's share of them; resident: what they take in its memory; read: from its own disk; "
        "received: from this host; warm: they were still there"
    )
    table.caption_justify = "left"
    for duck in ducks:
        held = readable(duck.theory_bytes), readable(duck.resident_bytes)
        moved = [readable(size) if size else "" for size in (duck.read_bytes, duck.received_bytes)]
        time = f"{duck.load_s * 1e3:.1f} ms, warm" if duck.warm else f"{duck.load_s:.1f} s"
        columns = f"{duck.start}:{duck.stop}"
        table.add_row(duck.duck, columns, str(duck.modules), *held, *moved, time)
    if len(ducks) > 1:
        theory = sum(duck.theory_bytes for duck in ducks)
        resident = sum(duck.resident_bytes for duck in ducks)
        table.add_row("all", "", "", readable(theory), readable(resident), "", "", "")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
