"""The arithmetic in its plainest form, which faster kernels are compared with.

Its two limits on what it holds for a moment are here, without torch, because memory is planned
with them.
"""

SCORES = 1 << 24
"""Attention scores held at once (64 MiB of float32); longer prompts go in blocks of rows."""

WRITTEN_OUT = 1 << 27
"""Numbers of heads' keys and values written out at once (512 MiB of float32)."""
