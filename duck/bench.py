"""The command `duck bench`: one subcommand a benchmark, each with a yardstick in the same run.

This file holds their options and their output; what is measured lies with what it measures.
Figures need a machine that does nothing else; the ratios stand noise better than the figures do.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from duck import memory
from duck.config import CHOICES
from duck.errors import ConfigError

if TYPE_CHECKING:
    from duck.kernels.bench import Shape

PLANNED = ("transport", "pipeline", "generate")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `bench` to the command line's subcommands; `common`: options that all commands have."""
    bench = commands.add_parser("bench", help="measure kernels, each beside its own yardstick")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    _kernel_parser(kinds, common)
    for name in PLANNED:
        planned = kinds.add_parser(name, help="(planned)")
        planned.set_defaults(command=_planned, planned=name, log_level="warning", json=False)


def _planned(arguments: argparse.Namespace) -> int:
    raise ConfigError(f"bench {arguments.planned} is not built yet; see duck bench --help")


# --- duck bench kernel


def _kernel_parser(kinds: Any, common: argparse.ArgumentParser) -> None:
    kernel = kinds.add_parser(
        "kernel", parents=[common], help="the expert kernel beside memory reads and torch",
        description="GB/s of expert weights read from memory beside the fastest plain read, and "
        "GFLOP/s beside torch's float32 matrix product; the ratios are medians of paired "
        "measurements. Takes the memory and all processors for minutes: nothing else should run.",
    )  # fmt: skip
    kernel.add_argument(
        "--isa", metavar="A,B", help="avx512, avx2, scalar (default: the vector sets found here)"
    )
    kernel.add_argument(
        "--threads", metavar="1,2", help="thread counts (default: one, and all processors)"
    )
    kernel.add_argument(
        "--rows", metavar="1,2,4", default="1,2,4,16,64,328",
        help="rows that ask at once (default: %(default)s)",
    )  # fmt: skip
    kernel.add_argument(
        "--experts", metavar="A,B", default="exact",
        help="how they are held: exact (fp8), int8, int4 (default: %(default)s)",
    )  # fmt: skip
    kernel.add_argument(
        "--shape", default="all", choices=("slice", "whole", "all"),
        help="slice: 64 columns of 256 experts; whole: 2048 of 32 (default: %(default)s)",
    )  # fmt: skip
    kernel.add_argument(
        "--memory-gib", type=float, default=3.0, metavar="G",
        help="weights to walk through, far more than the caches hold (default: %(default)s)",
    )  # fmt: skip
    kernel.add_argument(
        "--repeats", type=int, default=20, metavar="N",
        help="pairs of measurements (default: %(default)s)",
    )  # fmt: skip
    kernel.set_defaults(command=_kernel)


def _kernel(arguments: argparse.Namespace) -> int:
    from duck.bars import working
    from duck.cli import write_json
    from duck.kernels.bench import SLICE, WHOLE, bench_kernel, tables

    for name in ("memory_gib", "repeats"):
        if not getattr(arguments, name) > 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(arguments, name)}: want more than 0")
    free = memory.free_bytes()
    if free is not None and arguments.memory_gib * 2**30 + memory.OVERHEAD_BYTES > free:
        raise ConfigError(
            f"--memory-gib {arguments.memory_gib:g}: {memory.readable(free)} free, want less"
        )
    shapes: dict[str, tuple[Shape, ...]] = {
        "slice": (SLICE,), "whole": (WHOLE,), "all": (SLICE, WHOLE),
    }  # fmt: skip
    with working() as note:
        report = bench_kernel(
            isas=arguments.isa.split(",") if arguments.isa else (),
            threads=numbers("--threads", arguments.threads) if arguments.threads else (),
            residents=[_resident(name) for name in arguments.experts.split(",")],
            shapes=shapes[arguments.shape],
            rows=numbers("--rows", arguments.rows),
            memory_gib=arguments.memory_gib,
            repeats=arguments.repeats,
            note=note,
        )
    if arguments.json:
        write_json(report)
    else:
        sys.stdout.write(tables(report) + "\n")
    return 0


def _resident(experts: str) -> str:
    known = CHOICES["experts"][0]
    if experts not in known:
        raise ConfigError(f"--experts {experts[:60]!r}: want {', '.join(known)}, or several")
    return "fp8" if experts == "exact" else experts


def numbers(flag: str, text: str) -> list[int]:
    """Whole numbers from 1 up, as 1,2,3.

    Raises:
        ConfigError: something else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"{flag} {text[:60]!r}: want numbers from 1 up, as 1,2,4")
    return found
