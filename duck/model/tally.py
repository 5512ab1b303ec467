"""What the host holds, counted by how it was stored and how it is held."""

from __future__ import annotations

from dataclasses import dataclass

from duck.model.tensors import Kind

_DTYPES = {"F8_E4M3": "fp8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NAMES: dict[Kind, str] = {
    "linear": "linears",
    "embedding": "embedding",
    "expert": "experts",
    "vector": "norms and routers",
}


@dataclass
class Category:
    """Tensors of the host that were stored in one way and are held in one way."""

    name: str  # "linears, fp8 -> float32"
    tensors: int = 0
    source_bytes: int = 0  # scales included
    resident_bytes: int = 0


class Tally:
    """Counts tensors into categories."""

    def __init__(self) -> None:
        self.categories: dict[str, Category] = {}

    @property
    def resident_bytes(self) -> int:
        return sum(category.resident_bytes for category in self.categories.values())

    def add(self, kind: Kind, stored: str, held: str, source_bytes: int, resident: int) -> None:
        """One tensor. stored: its dtype as safetensors or torch spells it; held: as torch does."""
        stored = _DTYPES.get(stored, stored.lower())
        name = f"{_NAMES[kind]}, {stored}" + (" kept" if stored == held else f" -> {held}")
        category = self.categories.setdefault(name, Category(name))
        category.tensors += 1
        category.source_bytes += source_bytes
        category.resident_bytes += resident
