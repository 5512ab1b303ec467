"""How fast the shipped model starts and decodes on this machine: `scripts/bench_demo.py [--json]`.

Two local ducks over TCP, with and without drafts, beside the same ducks inside the process (the
baseline: no wire, no other processes). Repeats alternate between the ways, so that a machine whose
speed drifts treats all alike; the figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import duck

QUESTIONS = ("Is 391 prime?", "Is 977 prime?", "What is 47 * 6?")
WAYS = {
    "loopback, no drafts": {"transport": "loopback", "draft": "off"},
    "tcp, no drafts": {"transport": "tcp", "draft": "off"},
    "loopback, drafts": {"transport": "loopback", "draft": "mtp"},
    "tcp, drafts": {"transport": "tcp", "draft": "mtp"},
}


def start_seconds() -> float:
    """A whole process: start, load, two ducks, one token, end."""
    command = [sys.executable, "-m", "duck", "generate", "demo", "--prompt", "Q:"]
    begun = time.perf_counter()
    subprocess.run([*command, "--max-tokens", "1"], check=True, capture_output=True)
    return time.perf_counter() - begun


async def decode_tok_s(options: dict[str, Any]) -> float:
    """Tokens a second over all questions, prefill not counted."""
    tokens = seconds = 0.0
    async with duck.Engine.open("demo", ducks="local:2", **options) as engine:
        for question in QUESTIONS:
            done = await engine.generate(question, duck.Sampling(max_tokens=300), chat=True)
            settled = done.stats["completion_tokens"] - 1
            tokens += settled
            seconds += settled * done.stats["tpot_s"]
    return tokens / seconds


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--json", action="store_true")
arguments = parser.parse_args()

starts: list[float] = []
speeds: dict[str, list[float]] = {way: [] for way in WAYS}
for _ in range(arguments.repeats):
    starts.append(start_seconds())
    for way, options in WAYS.items():
        speeds[way].append(asyncio.run(decode_tok_s(options)))

start_s = statistics.median(starts)
medians = {way: statistics.median(values) for way, values in speeds.items()}
if arguments.json:
    print(json.dumps({"start_s": start_s, "decode_tok_s": medians}))
else:
    base = medians["loopback, no drafts"]
    print(f"start to first token and end: {start_s:.2f} s")
    for way, speed in medians.items():
        print(f"{way:22} {speed:7.1f} tok/s   {speed / base:5.2f} x loopback without drafts")
