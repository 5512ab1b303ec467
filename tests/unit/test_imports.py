"""Who may import whom. The rules make parts testable alone, and ducks small: see docs/design.md.

- wire, reliable, gather, placement, schedule, plan and seal are pure: no sockets, no asyncio, no
  clock.
- Transports import no torch. The model and its kernels import no asyncio.
- A duck's process imports no torch, nor does `import duck`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import duck

ROOT = Path(duck.__file__).parent
PURE = (
    "duck.wire", "duck.reliable", "duck.gather", "duck.placement", "duck.schedule", "duck.seal",
    "duck.plan.closed", "duck.plan.simulate",
)  # fmt: skip
OUTSIDE = {
    "asyncio", "concurrent", "datetime", "multiprocessing", "select", "selectors", "signal",
    "socket", "subprocess", "threading", "time", "torch", "uvloop",
}  # fmt: skip
HEAVY = ("torch", "triton", "transformers", "tokenizers", "jinja2", "matplotlib")


def imports(source: str, module: str = "", *, at_import: bool = False) -> Iterator[str]:
    """Every module that a source names in an import; `at_import`: only what importing it runs."""
    package = module.split(".")
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


def _modules() -> dict[str, str]:
    """Name -> source of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


MODULES = _modules()


def _top(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def loaded_by(start: str, modules: Mapping[str, str]) -> set[str]:
    """All modules that importing `start` loads, of this package and of others by their top name."""
    seen: set[str] = set()
    pending = [start]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in modules:
            continue
        pending += [parent for parent in _parents(name) if parent in modules]
        for wanted in imports(modules[name], name, at_import=True):
            pending += [wanted] if wanted in modules else [wanted.split(".")[0]]
    return seen


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


@pytest.mark.parametrize("module", [name for name in MODULES if name in PURE])
def test_pure_modules_have_no_outside(module: str) -> None:
    assert not _top(imports(MODULES[module], module)) & OUTSIDE
    # Nor do they get it from a module of ours.
    assert not loaded_by(module, MODULES) & OUTSIDE


def _in(*packages: str) -> list[str]:
    return [name for name in MODULES if name.startswith(packages)]


@pytest.mark.parametrize("module", _in("duck.transports"))
def test_transports_know_no_torch_and_no_model(module: str) -> None:
    assert not _top(imports(MODULES[module], module)) & set(HEAVY)
    loaded = loaded_by(module, MODULES)
    assert "torch" not in loaded
    native = {
        "duck.kernels",
        *(f"duck.kernels.{name}" for name in ("build", "library")),
    }  # bytes, no experts
    assert not [name for name in loaded - native if name.startswith(("duck.model", "duck.kernels"))]


@pytest.mark.parametrize("module", _in("duck.model", "duck.kernels"))
def test_model_and_kernels_know_no_asyncio(module: str) -> None:
    assert "asyncio" not in _top(imports(MODULES[module], module))
    loaded = loaded_by(module, MODULES)
    assert not loaded & {"asyncio", "socket"}
    assert not [name for name in loaded if name.startswith(("duck.transports", "duck.flock"))]


@pytest.mark.parametrize(
    "module",
    ["duck", "duck.cli", "duck.node", "duck.local", "duck.flock", "duck.slices", "duck.synthetic"],
)
def test_what_a_duck_needs_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(module, MODULES) & set(HEAVY)


def test_what_a_duck_really_loads() -> None:
    """The same, asked of Python: also what other packages pull in counts."""
    code = (
        "import sys, duck, duck.cli, duck.node\n"
        "from duck.kernels.reference.experts import ReferenceExperts\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_engine_knows_both_model_and_transports() -> None:
    both = [
        name
        for name in MODULES
        if {"duck.transports.control", "duck.model.transformer"}
        <= set(imports(MODULES[name], name, at_import=True))
    ]
    assert both == ["duck.engine"]


def test_the_rules_can_fail() -> None:
    modules = {
        "duck": "",
        "duck.a": "from duck import b\ndef f():\n    import torch",
        "duck.b": "if True:\n    import asyncio.events\nif TYPE_CHECKING:\n    import socket",
        "duck.c": "from . import a",
    }
    assert loaded_by("duck.c", modules) & {*OUTSIDE, *HEAVY} == {"asyncio"}
    assert _top(imports(modules["duck.a"], "duck.a")) & {"torch"}
    assert set(imports("from ..x import y", "duck.p.q")) == {"duck.x", "duck.x.y"}
