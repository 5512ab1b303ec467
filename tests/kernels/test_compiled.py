"""Every kernel compiles for the GPUs it is meant for, though none is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What a block may take of a processor's shared memory, less what the system keeps.
SHARED_KIB = {90: 227, 120: 99}  # H100 and H200, RTX 5090
NAMES = {
    "dense": {"_multiply", "_append", "_choose", "_combine", "_rms_norm", "_rotate"},
    "attention": {"_attend_part", "_heads_linear", "_queries", "_scores", "_count", "_pick"},
}
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("capability", "part"),
    [
        (90, "dense"),
        (120, "dense"),
        (90, "attention"),
        pytest.param(120, "attention", marks=pytest.mark.full),
    ],
)
def test_kernels_compile_and_fit(capability: int, part: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.compiled", str(capability), part],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=880,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in found}
    assert NAMES[part] <= names
    for kernel in found:
        assert kernel["cubin_bytes"] > 0
        assert kernel["shared_bytes"] <= SHARED_KIB[capability] * 1024, kernel
