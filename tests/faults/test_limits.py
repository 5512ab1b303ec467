"""Processes that may open few files: more are allowed where that can be, else one line says what to
do.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.faults.processes import linux_only

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ulimit is of Unix")


def _run(limit: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command under `ulimit LIMIT`."""
    shell = f'ulimit {limit}; exec "$@"'
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "duck", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=0)


@pytest.mark.parametrize("files", [9, 12, 40])
@pytest.mark.parametrize("command", ["generate", "node"])
def test_too_few_files(folder: Path, command: str, files: int) -> None:
    words: tuple[str | Path, ...] = ("node", "--listen", "127.0.0.1:0", "--model", folder)
    if command == "generate":
        words = ("generate", folder, "--prompt-ids", "5,6", "--ducks", "local:2")
    done = _run(f"-n {files}", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        rf"duck: this process may have {files} files open \(ulimit -n\), and its hard limit is "
        rf"{files} \(ulimit -Hn\): have 2048 allowed, by nofile in /etc/security/limits\.conf, or "
        r"LimitNOFILE of its systemd unit; "
        r"\d+ of them are free, want 48\n",
        done.stderr,
    )


def test_a_limit_that_may_be_raised_is(folder: Path) -> None:
    words = ("--prompt-ids", "5,6", "--max-tokens", "2", "--json", "--ignore-eos")
    done = _run("-S -n 12", "generate", folder, *words)
    assert (done.returncode, done.stderr) == (0, "")


def test_files_that_run_out_in_between(folder: Path) -> None:
    done = _run("-n 64", "generate", folder, "--prompt-ids", "5,6", "--ducks", "local:64")
    assert done.returncode == 2
    told = "this process may have 64 files open (ulimit -n), and its hard limit is 64 (ulimit -Hn)"
    assert done.stderr.startswith(f"duck: cannot go on: {told}: have 2048 allowed, ")
    assert done.stderr.count("\n") == 1


@linux_only
def test_files_that_run_out_while_ducks_are_connected() -> None:
    words = ("--transport", "tcp", "--ducks", "32", "--rows", "1", "--seconds", "0.1")
    done = _run("-n 64", "bench", "transport", *words)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(
        r"duck: (cannot reach duck \d+ \(\S+\): Too many open files; "
        r"|the system refuses to receive: )"  # whichever of us wants the one too many
        r"this process may have 64 files open \(ulimit -n\), and its hard limit is 64 .*\n",
        done.stderr,
    )
