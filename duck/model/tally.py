"""What the host has loaded, counted by how it was stored and how it is held."""

from __future__ import annotations

from dataclasses import dataclass

_DTYPES = {"F8_E4M3": "fp8", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass
class Category:
    """Tensors of the host that were stored in one way and are held in one way."""

    name: str  # "linears, fp8 -> float32"
    tensors: int = 0
    source_bytes: int = 0
    resident_bytes: int = 0


class Tally:
    """Counts tensors into categories as they are loaded."""

    def __init__(self) -> None:
        self.categories: dict[str, Category] = {}

    def add(self, kind: str, stored: str, held: str, source_bytes: int, resident: int) -> None:
        """One tensor. stored, held: dtypes as safetensors and torch spell them."""
        stored = _DTYPES.get(stored, stored.lower())
        name = f"{kind}, {stored}" + (" kept" if stored == held else f" -> {held}")
        category = self.categories.setdefault(name, Category(name))
        category.tensors += 1
        category.source_bytes += source_bytes
        category.resident_bytes += resident
