"""Compiles the native expert library from `native/`: C++17, no dependency but the compiler.

The file's name holds a digest of the sources and flags, so a library is used only with the sources
it was built from. Installing the package builds it (setup.py); a checkout builds it on first use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from duck.errors import ConfigError

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "native"
COMPILERS = ("g++", "clang++", "c++")  # in this order, unless CXX is set
# No contraction: an fma must be where the source has one, or results differ between machines.
FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-pthread",
)  # fmt: skip


def file_name() -> str:
    """The file name of the library that belongs to the sources as they are."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"_native-{digest.hexdigest()[:16]}.so"


def find_library() -> Path:
    """The library, compiled now if nobody has yet.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    name = file_name()
    folders = [PACKAGE, _cache()]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    folder = next((folder for folder in folders if _writable(folder)), Path(tempfile.gettempdir()))
    with _locked(folder):
        if not (folder / name).is_file():  # nobody did while we waited
            _announce()
            compile_library(folder / name)
    return folder / name


def _announce() -> None:
    """Say on stderr why nothing happens for a minute."""
    with contextlib.suppress(OSError, AttributeError):  # nobody reads it, or there is none
        # A terminal may show how far something is: that line is drawn again.
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{clear}duck: building the native library (once)\n")
        sys.stderr.flush()


def compile_library(target: Path) -> None:
    """Compile every source at once and link them; `target` appears in one step or not at all.

    Raises:
        ConfigError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:

        def compile_one(source: Path) -> str:
            made = str(Path(scratch, f"{source.stem}.o"))
            _run(compiler, *FLAGS, "-c", str(source), "-o", made)
            return made

        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cpp"))))
        linked = Path(scratch, "library")
        _run(compiler, "-shared", "-pthread", "-o", str(linked), *objects)
        part = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy(linked, part)
        part.replace(target)
    for old in target.parent.glob("_native-*.so"):
        if old != target:
            old.unlink(missing_ok=True)


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(
        f"the expert kernel has to be compiled, and there is no {' or '.join(names)}: install one "
        "(Debian: apt install g++), or set CXX"
    )


def _run(*command: str) -> None:
    done = subprocess.run(
        command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        lines = [" ".join(command) + " failed:", *done.stdout.splitlines()[:20]]
        raise ConfigError("\n".join(lines))


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "duck")


def _writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: a flock of local ducks starts together."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
