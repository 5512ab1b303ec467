"""The arithmetic in its plainest form, which faster kernels are compared with.

Numbers that memory is planned with are here, without torch.
"""

SCORES = 1 << 24
"""Attention scores held at once (64 MiB of float32); longer prompts go in blocks of rows."""

WRITTEN_OUT = 1 << 27
"""Numbers of heads' keys and values written out at once (512 MiB of float32)."""

FP8_STEP = 16
"""Columns of an fp8 matrix that must share a scale, or it cannot be multiplied as it is."""

FP8_GROUP = 128
"""Numbers that share one scale in a cache, as DeepSeek serves it."""
