"""Which implementation of each of the device's operations runs where: the one table.

The references are in plain torch and run anywhere. On GPUs that know fp8, kernels in Triton stand
in for them, operation by operation; each equals its reference but for the order of sums. Triton is
imported when they are picked, so a host on a CPU does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from duck.kernels.matrix import Matrix
from duck.kernels.reference import cached
from duck.kernels.reference import device as plain
from duck.kernels.reference import linear as products
from duck.kernels.reference import router as routers
from duck.kernels.reference.router import Rule


@dataclass(frozen=True)
class Kernels:
    """The operations; what each takes and gives is said at its reference.

    fp8: whether linears are to stay fp8 on this device unless told otherwise.
    """

    name: str = "reference"
    fp8: bool = False
    linear: Callable[[Tensor, Matrix], Tensor] = products.linear
    linear_f32: Callable[[Tensor, Matrix], Tensor] = products.linear_f32
    swiglu_f32: Callable[[Tensor, Sequence[Matrix], Matrix], Tensor] = products.swiglu_f32
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = plain.rms_norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = plain.add_norm
    project_add_norm: Callable[[Tensor, Tensor, Matrix, Tensor, float], tuple[Tensor, Tensor]] = (
        products.project_add_norm
    )
    append_latents: Callable[[Tensor, Tensor, float, Tensor, Tensor, Tensor, Tensor], None] = (
        plain.append_latents
    )
    rotate_at: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = plain.rotate_at
    route: Callable[[Tensor, Tensor, Tensor | None, Rule], tuple[Tensor, Tensor]] = routers.route
    combine: Callable[[Tensor, Tensor, Tensor | None], Tensor] = plain.combine
    attend: Callable[..., Tensor] = cached.attend
    append_keys: Callable[..., None] = cached.append_keys
    index_queries: Callable[..., tuple[Tensor, Tensor]] = cached.index_queries
    select: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] = cached.select


REFERENCE = Kernels()


def pick(device: torch.device, want: str = "auto") -> Kernels:
    """The operations on a device. want: auto (Triton where it runs), reference or triton.

    Triton's are for CUDA, or for the CPU's memory in its interpreter (tests).
    """
    if want == "reference" or (want == "auto" and device.type != "cuda"):
        return REFERENCE
    from duck.kernels import common_triton

    if want == "auto" and not common_triton.is_supported(device):
        return REFERENCE
    from duck.kernels import (
        attention_triton,
        combine_triton,
        indexer_triton,
        linear_triton,
        norm_triton,
        router_triton,
    )

    return replace(
        REFERENCE,
        name="triton",
        fp8=True,
        linear=linear_triton.linear,
        linear_f32=linear_triton.linear_f32,
        swiglu_f32=linear_triton.swiglu_f32,
        rms_norm=norm_triton.rms_norm,
        add_norm=norm_triton.add_norm,
        project_add_norm=norm_triton.project_add_norm,
        append_latents=norm_triton.append_latents,
        rotate_at=norm_triton.rotate_at,
        route=router_triton.route,
        combine=combine_triton.combine,
        attend=attention_triton.attend,
        append_keys=indexer_triton.append_keys,
        index_queries=indexer_triton.queries,
        select=indexer_triton.select,
    )
