#!/usr/bin/env python3
"""Check and time the GPU kernels on the machine at hand: correct at the real shapes, and how fast.

    python3 scripts/gpu_check.py                      # all of it, in less than nine minutes
    python3 scripts/gpu_check.py --layers 30          # a GPU with less than 32 GB
    python3 scripts/gpu_check.py --json numbers.json

Needs torch, triton and numpy, nothing else: no network, no checkpoint, no installation. Weights are
random. Every kernel is compared with its reference in float32 or float64 at the widths of
DeepSeek-V3.2; then come times, by CUDA events, in replayed CUDA graphs, with more weights than the
L2 cache holds, beside what copying memory reaches on the same GPU. Last, the attention side of the
whole model: every layer with attention, indexer, router, shared expert and the sum of 16 ducks'
answers, as if those were there at once. Among the checks is a small model as a host runs it, by
captured graphs and without: its threads, slots, pinned memory and lanes.

Exit code: 0 if every kernel is correct, 1 if not, 2 without a GPU that can run them.
`--device cpu --tiny` runs all but the times anywhere, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
    problem = obstacle(args.device)
    if problem is not None:
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    if args.json is not None:
        try:
            args.json.touch()
        except OSError as error:
            print(f"gpu_check: --json {args.json}: {error.strerror}", file=sys.stderr)
            return 2
    result = measure(args)
    print(report(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    unchecked = any(name.startswith("checks: ") for name in result["skipped"])
    return 0 if all(check["ok"] for check in result["checks"]) and not unchecked else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check and time the GPU kernels at DeepSeek-V3.2's shapes.",
        epilog="Exit code: 0 correct, 1 a kernel is wrong or was not checked in time, 2 no GPU "
        "that can run them, or a mistake in the options.",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--layers", type=int, default=62, help="of the whole model (default 62)")
    parser.add_argument("--only", choices=("checks", "kernels", "layers"), help="one part of it")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after (500)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    args = parser.parse_args(argv)
    if not args.seconds >= 1:
        parser.error(f"--seconds {args.seconds:g}: want at least 1")
    if args.layers < 1:
        parser.error(f"--layers {args.layers}: want at least 1")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu interprets the kernels, far too slowly but for --tiny: add it")
    return args


def obstacle(device: str) -> str | None:
    """Why nothing can be run, in one line."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as missing:
        return f"{missing}: this needs torch, triton and numpy"
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here; --device cpu --tiny checks the kernels without one"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 9):
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, fp8 needs 8.9"
    return None


def measure(args: argparse.Namespace) -> Result:
    """All of it, as a dict that is JSON."""
    import numpy
    import torch
    import triton

    # Only now: Triton reads its variables, and whoever has no torch has been told.
    from gpu_correct import checks
    from gpu_parts import REAL, TINY
    from gpu_times import copy_rate, timings, whole_model

    from duck.kernels.device import pick

    device = torch.device(args.device)
    cuda = device.type == "cuda"
    shape = TINY if args.tiny else REAL
    clock = Clock(args.seconds)
    kernels = pick(device, "triton")
    result: Result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": "tiny" if args.tiny else "DeepSeek-V3.2",
        "checks": [], "kernels": [], "layers": [], "skipped": [],
    }  # fmt: skip

    def wanted(part: str) -> bool:
        return args.only in (None, part)

    with torch.inference_mode():
        if wanted("checks"):
            with numpy.errstate(all="ignore"):  # in which the interpreter computes inf - inf
                for name, check in checks(shape, device, kernels):
                    clock.run(result, "checks", name, check)
        if cuda and (wanted("kernels") or wanted("layers")):
            result["copy_gbs"] = copy_rate(device)
        if cuda and wanted("kernels"):
            for name, time_it in timings(shape, device, kernels, result["copy_gbs"]):
                clock.run(result, "kernels", name, time_it)
        if cuda and wanted("layers"):
            clock.run_all(
                result, "layers", whole_model(shape, device, kernels, args.layers, result)
            )
    result["seconds"] = round(clock.spent(), 1)
    return result


class Clock:
    """Runs what there is time for; notes what there is not."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    def spent(self) -> float:
        return time.monotonic() - self._start

    def run(self, result: Result, part: str, name: str, work: Callable[[], Result]) -> None:
        if self.spent() > self._seconds:
            result["skipped"].append(f"{part}: {name}")
        else:
            result[part].append({"name": name, **work()})

    def run_all(
        self, result: Result, part: str, works: Iterator[tuple[str, Callable[[], Result]]]
    ) -> None:
        """As `run`, of works that take time to make."""
        while True:
            if self.spent() > self._seconds:
                result["skipped"].append(f"{part}: what would follow")
                return
            following = next(works, None)
            if following is None:
                return
            self.run(result, part, *following)


def report(result: Result) -> str:
    """The tables, as text."""
    lines = [f"{result['device']}, torch {result['torch']}, triton {result['triton']}"]
    if result["checks"]:
        wrong = [check for check in result["checks"] if not check["ok"]]
        right = len(result["checks"]) - len(wrong)
        lines += [
            "",
            f"correct: {right} of {len(result['checks'])} checks at {result['shape']}'s shapes",
        ]
        for check in result["checks"]:
            error = "-" if check["error"] is None else f"{check['error']:.1e}"
            mark = "ok" if check["ok"] else f"WRONG {check.get('why', '')}".rstrip()
            lines.append(f"  {check['name']:<48} {error:>8} of {check['tolerance']:.0e}  {mark}")
    if "copy_gbs" in result:
        lines += ["", f"copying memory: {result['copy_gbs']:.0f} GB/s, read and written"]
    if result["kernels"]:
        lines += ["", f"  {'kernel':<48} {'MiB':>7} {'us':>8} {'GB/s':>6}  share of the copy"]
        for row in result["kernels"]:
            lines.append(
                f"  {row['name']:<48} {row['mib']:>7.1f} {row['us']:>8.1f} {row['gbs']:>6.0f} "
                f"{row['share']:>5.0%}{_met(row['met'], ' (70 %)')}"
            )
    if result["layers"]:
        count = result["layers"][0]["layers"]
        lines += [
            "",
            f"us a layer, of {count} layers in order",
            f"  {'rows, context':<34} {'eager':>8} {'graphs':>8} {'bound':>7}  share launches",
        ]
        for row in result["layers"]:
            lines.append(
                f"  {row['name']:<34} {row['eager_us']:>8.1f} {row['graph_us']:>8.1f} "
                f"{row['bound_us']:>7.1f} {row['share']:>6.0%} {row['launches']:>8}"
                f"{_met(row['met'], ' (2 bounds + 2 us each)')}"
            )
    lines += [f"left out: {name}" for name in result["skipped"]]
    if "seconds" in result:
        lines += ["", f"{result['seconds']} s"]
    return "\n".join(lines)


def _met(met: bool | None, target: str) -> str:
    """How a number stands to what is wanted of it."""
    return "" if met is None else (" met" if met else " MISSED") + target


if __name__ == "__main__":
    sys.exit(main())
