"""The command `duck bench`: one subcommand a benchmark, each with a yardstick in the same run.

This file holds their options and their output; what is measured lies with what it measures.
Figures need a machine that does nothing else; the ratios stand noise better than the figures do.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duck import files, memory
from duck.config import CHOICES, MAX_LOCAL_DUCKS, picture_file
from duck.errors import ConfigError

if TYPE_CHECKING:
    from duck.kernels.bench import Shape

# Below this --scale the lateness of threads is no longer small beside the emulated stages.
COARSE = 10.0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add `bench` to the command line's subcommands; `common`: options that all commands have."""
    bench = commands.add_parser("bench", help="measure kernels, each beside its own yardstick")
    kinds = bench.add_subparsers(metavar="WHAT", required=True)
    _kernel_parser(kinds, common)
    _pipeline_parser(kinds, common)
    _generate_parser(kinds, common)
    _transport_parser(kinds, common)


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
    from duck.kernels.bench import MAX_ROWS, SLICE, WHOLE, bench_kernel, tables
    from duck.kernels.experts import MAX_THREADS

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
            threads=(
                numbers("--threads", arguments.threads, MAX_THREADS) if arguments.threads else ()
            ),
            residents=[_resident(name) for name in arguments.experts.split(",")],
            shapes=shapes[arguments.shape],
            rows=numbers("--rows", arguments.rows, MAX_ROWS),
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


# --- duck bench transport


def _transport_parser(kinds: Any, common: argparse.ArgumentParser) -> None:
    transport = kinds.add_parser(
        "transport", parents=[common], help="a round of asks and answers beside plain sockets",
        description="Latency and the host's processor time of a round, with ducks on this machine "
        "that answer at once, beside a loop over epoll that moves the same bytes; the ratio is the "
        "median of turns measured one after the other. Nothing else should run.",
    )  # fmt: skip
    transport.add_argument(
        "--transport", metavar="A,B", default="shm,tcp,multicast",
        help="which ones (default: %(default)s)",
    )  # fmt: skip
    transport.add_argument(
        "--ducks", metavar="1,2", default="1,2,8,32", help="how many (default: %(default)s)"
    )
    transport.add_argument(
        "--rows", metavar="1,2", default="1,2,328", help="rows of an ask (default: %(default)s)"
    )
    transport.add_argument(
        "--loss", metavar="0.1%,1%", default="",
        help="drop this share of multicast's datagrams as well, with asks of at most 4 rows "
        "(others go by TCP); numbers are percent, with or without the sign",
    )  # fmt: skip
    transport.add_argument(
        "--faults", metavar="reorder=20%,seed=7", default="",
        help="a bad network as well: shares for drop, duplicate, reorder and corrupt, delay in "
        "milliseconds (up to), seed; drop and corrupt are for multicast, since the others would "
        "lose a duck",
    )  # fmt: skip
    transport.add_argument(
        "--key", action="store_true",
        help="with a cluster key as well (one made for this run), tcp and multicast, asks of at "
        "most 4 rows; the last column compares with the same without",
    )  # fmt: skip
    transport.add_argument(
        "--seconds", type=float, default=3.0, metavar="S",
        help="for each figure (default: %(default)g)",
    )  # fmt: skip
    transport.add_argument("--plot", metavar="F.png", help="latency over loss, as a picture")
    transport.set_defaults(command=_transport)


def _transport(arguments: argparse.Namespace) -> int:
    from duck.bars import working
    from duck.cli import write_json
    from duck.transports.base import SMALL_ROWS
    from duck.transports.bench import HARMFUL, LOSSY, SEALED, bench_transport, tables
    from duck.transports.bench_ducks import MOST_ROWS

    chosen = arguments.transport.split(",")
    allowed = [name for name in CHOICES["transport"][0] if name not in ("auto", "loopback")]
    if not set(chosen) <= set(allowed):
        raise ConfigError(
            f"--transport {arguments.transport[:60]!r}: want some of {', '.join(allowed)}"
        )
    if sys.platform != "linux":
        raise ConfigError("duck bench transport needs Linux: its yardstick is epoll")
    if not 0 < arguments.seconds <= 3600:
        raise ConfigError(f"--seconds {arguments.seconds}: want more than 0, up to 3600")
    counts = numbers("--ducks", arguments.ducks, MAX_LOCAL_DUCKS)
    rows = numbers("--rows", arguments.rows, MOST_ROWS)
    losses = _shares("--loss", arguments.loss)
    if losses and not set(chosen) & set(LOSSY):
        raise ConfigError(
            f"--loss {arguments.loss[:60]}: only multicast has datagrams of ours to drop: use "
            "--transport multicast or leave it out"
        )
    faults = _faults(arguments.faults)
    if arguments.key and not (set(chosen) & set(SEALED) and min(rows) <= SMALL_ROWS):
        raise ConfigError(
            "--key: tcp and multicast are measured with a key, and asks of at most "
            f"{SMALL_ROWS} rows: choose them too, or leave it out"
        )
    if losses and min(rows) > SMALL_ROWS:
        raise ConfigError(
            f"--loss: asks of more than {SMALL_ROWS} rows go by TCP: give --rows 1 as well, or "
            "leave it out"
        )
    harmful = ", ".join(name for name in HARMFUL if name in faults)
    if harmful and set(chosen) - set(LOSSY):
        raise ConfigError(
            f"--faults {harmful}: only multicast stands it: use --transport multicast or leave it "
            "out"
        )
    picture = None if arguments.plot is None else picture_file("plot", arguments.plot)
    if picture and not (losses and "multicast" in chosen):
        raise ConfigError("--plot draws latency over loss: give --loss and --transport multicast")
    with working() as note:
        report = bench_transport(
            transports=chosen, ducks=counts, rows=rows, losses=losses, faults=faults,
            keyed=arguments.key, seconds=arguments.seconds, note=note,
        )  # fmt: skip
    if picture:
        _plot(report, picture)
    if arguments.json:
        write_json(report)
    else:
        sys.stdout.write(tables(report) + "\n")
    return 0


def _plot(report: dict[str, Any], path: Path) -> None:
    """Latency over loss, p50 and p99, a line for every transport and size; a PNG.

    Raises:
        ConfigError: there is no matplotlib, nothing with losses to draw, or no room for the file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install duck-llm[host]") from None
    curves: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if not row["keyed"]:
            curves.setdefault((row["transport"], row["ducks"], row["rows"]), []).append(row)
    curves = {key: rows for key, rows in curves.items() if len(rows) > 1}
    if not curves:
        raise ConfigError("--plot draws latency over loss: give --loss and --transport multicast")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, ((transport, ducks, size), rows) in enumerate(curves.items()):
        losses = [row["loss"] * 100 for row in rows]
        label = f"{transport}, {ducks} ducks, {size} rows"
        for name, style in (("p50", "-o"), ("p99", "--^")):
            times = [row[f"{name}_us"] / 1e3 for row in rows]
            axes.plot(losses, times, style, color=f"C{number}", label=f"{label}, {name}")
    axes.set_xlabel("datagrams lost, %")
    axes.set_ylabel("a round, ms")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    try:
        with files.whole(path) as beside:
            figure.savefig(beside, format="png", dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror or error}") from error


def _faults(text: str) -> dict[str, float]:
    """Arguments of `faulty.Faults` out of drop=1%,delay=0.5,seed=7."""
    found: dict[str, float] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        try:
            number = float(value.removesuffix("%"))
        except ValueError:
            number = -1.0
        if name == "seed" and 0 <= number < 2**32:
            found["seed"] = number
        elif name == "delay" and 0 < number <= 1000:
            found["delay_s"] = number / 1e3
        elif name in ("drop", "duplicate", "reorder", "corrupt") and 0 < number <= 50:
            found[name] = number / 100
        else:
            raise ConfigError(
                f"--faults {part[:60]!r}: want drop, duplicate, reorder or corrupt up to 50%, "
                "delay up to 1000 (ms), seed, as reorder=20%,seed=7"
            )
    return found


def _shares(flag: str, text: str) -> list[float]:
    """Shares as 0.1%,1%."""
    if not text:
        return []
    try:
        found = [float(part.removesuffix("%")) / 100 for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share <= 0.5 for share in found):
        raise ConfigError(f"{flag} {text[:60]!r}: want shares up to 50%, as 0.1%,1%")
    return found


# --- duck bench pipeline


def _pipeline_parser(kinds: Any, common: argparse.ArgumentParser) -> None:
    pipeline = kinds.add_parser(
        "pipeline", parents=[common], help="the schedules beside their simulation",
        description="The real pipeline, flock and event loop over a device and ducks that take "
        "given times: a step's milliseconds beside the simulated step and beside what no order of "
        "the same work can beat. Takes a minute or two, and little of the processor.",
    )  # fmt: skip
    pipeline.add_argument(
        "--times", default="tuned", choices=("tuned", "original"),
        help="of 32 small machines and a GPU: with attention as fast as its memory, or as slow as "
        "the first such system had it (default: %(default)s)",
    )  # fmt: skip
    pipeline.add_argument(
        "--schedule", metavar="A,B", default="serial,batch,wave,pingpong",
        help="which ones; pingpong has two sessions (default: %(default)s)",
    )  # fmt: skip
    pipeline.add_argument(
        "--scale", type=float, default=30.0, metavar="X",
        help="everything takes so many times as long: threads wake up late by fixed amounts "
        "of some 0.1 ms, which below 10 are much of every stage (default: %(default)g)",
    )  # fmt: skip
    pipeline.add_argument(
        "--steps", type=int, default=4, metavar="N", help="of each session (default: %(default)s)"
    )
    pipeline.add_argument("--ducks", type=int, default=32, metavar="N", help="default: 32")
    pipeline.add_argument(
        "--layers", type=int, metavar="N", help="layers with routed experts (default: 58)"
    )
    pipeline.add_argument(
        "--traces", metavar="DIR", help="write the traces there, one for each schedule"
    )
    pipeline.set_defaults(command=_pipeline)


def _pipeline(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from duck.bars import working
    from duck.cli import write_json
    from duck.plan import overlap

    limits = {"scale": (0.1, 1000.0), "steps": (1, 100), "ducks": (1, 255), "layers": (1, 1000)}
    for name, (least, most) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(f"--{name} {value}: want {least:g} to {most:g}")
    schedules = arguments.schedule.split(",")
    if not set(schedules) <= set(overlap.SESSIONS):
        allowed = ", ".join(overlap.SESSIONS)
        raise ConfigError(f"--schedule {arguments.schedule[:60]!r}: want some of {allowed}")
    folder = None if arguments.traces is None else _folder("--traces", arguments.traces)
    times = overlap.TIMES[arguments.times]
    if arguments.layers is not None:
        times = replace(times, moe_layers=arguments.layers)
    with working() as note:
        rows = overlap.bench_pipeline(
            times, schedules=schedules, ducks=arguments.ducks, steps=arguments.steps,
            scale=arguments.scale, folder=folder, note=note,
        )  # fmt: skip
    if arguments.json:
        report = {"times": asdict(times), "scale": arguments.scale, "ducks": arguments.ducks}
        write_json({**report, "rows": [asdict(row) for row in rows]})
    else:
        for table in overlap.tables(rows):
            Console().print(table)
        if arguments.scale < COARSE:
            sys.stdout.write(
                f"--scale {arguments.scale:g}: threads wake up late by as much as stages take; "
                f"ratios mean something from {COARSE:g} up\n"
            )
    return 0


def _folder(flag: str, name: str) -> Path:
    """A folder to write to.

    Raises:
        ConfigError: there is none of that name.
    """
    if not name:
        raise ConfigError(f"{flag} is empty: give the path of a folder")
    if not os.path.isdir(name):  # of a name that is too long it is false, where Path's raises
        raise ConfigError(f"{flag} {name[:200]}: no such folder")
    return Path(name)


# --- duck bench generate


def _generate_parser(kinds: Any, common: argparse.ArgumentParser) -> None:
    generate = kinds.add_parser(
        "generate", parents=[common], help="one duck's share of a real model, end to end",
        description="Steps with drafts through a few layers of a model's true widths, with random "
        "weights: router, wire, a duck in a process of its own with its kernel. Each stage's "
        "milliseconds, and the step that they make of the whole model. Nothing else should run.",
    )  # fmt: skip
    generate.add_argument(
        "--synthetic", default="v3.2", choices=("v3.2",),
        help="hidden 7168, 256 experts of 2048 columns, 8 a token (default: %(default)s)",
    )  # fmt: skip
    generate.add_argument(
        "--layers", type=int, default=8, metavar="N",
        help="with routed experts, the drafting one included (default: %(default)s)",
    )  # fmt: skip
    generate.add_argument(
        "--ducks", default="1of32", metavar="1ofN",
        help="the duck holds 1/N of every expert (default: %(default)s: 2.8 GB for 8 layers)",
    )  # fmt: skip
    generate.add_argument(
        "--attend-ms", type=float, metavar="X",
        help="attention takes so long, as on some GPU (default: it is computed here)",
    )  # fmt: skip
    generate.add_argument(
        "--shared-ms", type=float, default=0.05, metavar="X",
        help="with --attend-ms: the shared expert (default: %(default)s)",
    )  # fmt: skip
    generate.add_argument("--steps", type=int, default=20, metavar="N", help="default: 20")
    generate.add_argument(
        "--threads", type=int, default=0, metavar="N",
        help="of the duck's kernel (default: one for each processor)",
    )  # fmt: skip
    generate.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from duck.bars import working
    from duck.cli import write_json
    from duck.plan import widths

    limits = {
        "layers": (2, 62), "attend_ms": (0.0, 1000.0), "shared_ms": (0.0, 1000.0),
        "steps": (1, 1000), "threads": (0, 1024),
    }  # fmt: skip
    for name, (least, most) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {value}: want {least:g} to {most:g}")
    one, _, of = arguments.ducks.partition("of")
    if one != "1" or of not in ("1", "2", "4", "8", "16", "32"):
        raise ConfigError(f"--ducks {arguments.ducks[:60]!r}: want 1ofN with N of 1, 2, 4 .. 32")
    with working() as note:
        report = widths.bench_generate(
            layers=arguments.layers, of_ducks=int(of), attend_ms=arguments.attend_ms,
            shared_ms=arguments.shared_ms, steps=arguments.steps, threads=arguments.threads,
            note=note,
        )  # fmt: skip
    if arguments.json:
        write_json(report.to_json())
    else:
        for table in widths.tables(report):
            Console().print(table)
    return 0


def numbers(flag: str, text: str, most: int) -> list[int]:
    """Whole numbers of 1 to `most`, as 1,2,3.

    Raises:
        ConfigError: something else.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= number <= most for number in found):
        raise ConfigError(f"{flag} {text[:60]!r}: want numbers of 1 to {most}, as 1,2,4")
    return found
