"""Compile every kernel for GPUs that are not there, at the real V3.2's shapes. Run by a test.

    python -m tests.kernels.compiled 90 dense        # H100, H200
    python -m tests.kernels.compiled 120 attention   # RTX 5090

The wrappers are called as they are, with memory that nobody touches; Triton compiles what they
would launch. Prints one JSON line a kernel: its name, and what it takes of a processor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from duck.kernels import (
    attention_triton,
    combine_triton,
    indexer_triton,
    linear_triton,
    norm_triton,
    router_triton,
)
from duck.kernels.matrix import Fp8Matrix
from duck.kernels.reference.router import Rule


class NoGpu:
    """The driver of a GPU that can only be compiled for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def fp8(rows: int, columns: int) -> Fp8Matrix:
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    return Fp8Matrix(codes, torch.empty(-(-rows // 128), -(-columns // 128)), (128, 128))


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def dense() -> Iterator[Any]:
    """Linears, norms, router and sums, for 2 rows and for a chunk of a prompt."""
    position = torch.zeros(1, dtype=torch.int32)
    turns = torch.empty(4096, 32), torch.empty(4096, 32)
    rule = Rule(8, groups=8, kept=4, scale=2.5)
    for rows in (2, 256):
        x = bf16(rows, 7168)
        yield linear_triton.linear(x, fp8(1536, 7168))
        yield linear_triton.linear(x, fp8(576, 7168))
        yield linear_triton.linear(bf16(rows, 1536), fp8(24576, 1536))
        yield linear_triton.linear_f32(bf16(rows, 16384), fp8(7168, 16384))
        yield linear_triton.swiglu_f32(x, [fp8(4096, 7168)], fp8(7168, 2048))
        yield norm_triton.rms_norm(x, torch.empty(7168), 1e-6)
        yield norm_triton.add_norm(x, torch.empty(rows, 7168), torch.empty(7168), 1e-6)
        projected = bf16(rows, 16384), fp8(7168, 16384)
        yield norm_triton.project_add_norm(x, *projected, torch.empty(7168), 1e-6)
        yield norm_triton.rotate_at(bf16(rows, 128, 192)[..., 128:], *turns, position)
        for held in (bf16(4096, 576), torch.empty(4096, 656, dtype=torch.uint8)):
            latent = bf16(rows, 576), torch.empty(512), 1e-6
            yield norm_triton.append_latents(*latent, *turns, held, position)
        yield router_triton.route(x, torch.empty(256, 7168), torch.empty(256), rule)
        yield combine_triton.combine(x, torch.empty(32, rows, 7168), torch.empty(rows, 7168))
        yield combine_triton.combine(x, bf16(32, rows, 7168), None)


def attention() -> Iterator[Any]:
    """Attention and the indexer, for 2 rows; and attention for a chunk."""
    rows, position = 2, torch.zeros(1, dtype=torch.int32)
    turns, x = (torch.empty(4096, 32), torch.empty(4096, 32)), bf16(rows, 7168)
    wk, wv = bf16(128, 128, 512), bf16(128, 128, 512)
    selected = torch.empty(rows, 2048, dtype=torch.int32)
    q, q_pe = bf16(rows, 128, 192)[..., :128], bf16(rows, 128, 64)
    fp8_rows = torch.empty(4096, 656, dtype=torch.uint8)
    for held, chosen in ((bf16(4096, 576), None), (fp8_rows, selected)):
        yield attention_triton.attend(q, q_pe, held, wk, wv, 0.1, position, chosen)
    folded, q_pe = bf16(9, 128, 512), bf16(9, 128, 64)
    yield attention_triton.attend_latents(folded, q_pe, fp8_rows, 0.1, position)
    norm, projected = (torch.empty(128), torch.empty(128)), bf16(rows, 64, 128)
    keys = torch.empty(4096, 132, dtype=torch.uint8)
    yield indexer_triton.append_keys(projected[:, 0], norm, 1e-6, *turns, position, keys)
    proj = torch.empty(64, 7168)
    asked = indexer_triton.queries(projected, x, proj, 0.1, *turns, position, fp8=True)
    yield indexer_triton.select(*asked, keys, position, 2048)


def main() -> None:
    capability, part = int(sys.argv[1]), sys.argv[2]
    driver.set_active(NoGpu(capability))
    compiled: dict[tuple[str, str], Any] = {}
    plain = JITFunction.run

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = plain(function, *args, grid=grid, warmup=True, **options)
        compiled[function.fn.__name__, kernel.hash] = kernel
        return kernel

    JITFunction.run = run
    for _ in {"dense": dense, "attention": attention}[part]():
        pass
    for (name, _), kernel in compiled.items():
        found = {
            "kernel": name,
            "shared_bytes": kernel.metadata.shared,
            "cubin_bytes": len(kernel.asm["cubin"]),
            "triton": triton.__version__,
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
