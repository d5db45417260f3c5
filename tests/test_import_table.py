"""The doors between the packages hold: no file imports what the table below does not give it.

The table is that of `architecture.md`, section 2. To open a door, change the table first.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("polyformer", "he_backend", "training", "compiler", "benchmarks")
MAX_LINES = 500


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the files of some paths may import beside the standard library; a name stands for all below it too."""

    paths: tuple[str, ...]  # glob patterns below the repository's root
    may: tuple[str, ...]
    never: tuple[str, ...] = ()  # takes precedence over `may`


EVERYTHING = ("*",)
COMMAND_LINE = ("polyformer.cli", "polyformer.commands", "polyformer.__main__")
COMPILER_SEES = tuple(
    f"he_backend.{name}"
    for name in (
        "base",
        "circuit",
        "circuit_check",
        "container",
        "kernels",
        "liveness",
        "params",
        "refresh",
        "scales",
        "security",
        "simulator",
        "trace",
    )
)

# The first rule one of whose patterns matches a file is the file's rule.
TABLE = (
    Rule(
        paths=("polyformer/cli.py", "polyformer/cli/**", "polyformer/commands/**", "polyformer/__main__.py"),
        may=EVERYTHING,
    ),
    Rule(
        paths=("polyformer/export.py", "polyformer/export_graph.py", "polyformer/export_step.py"),
        may=("polyformer", "torch", "numpy", "onnx"),
        never=COMMAND_LINE,
    ),
    Rule(paths=("polyformer/mixers/mamba.py",), may=("polyformer", "torch", "numpy", "mamba_ssm"), never=COMMAND_LINE),
    Rule(paths=("polyformer/**",), may=("polyformer", "torch", "numpy"), never=COMMAND_LINE),
    Rule(
        paths=("training/harness.py",),
        may=("training", "polyformer", "torch", "tokenizers", "lm_eval"),
        never=COMMAND_LINE,
    ),
    Rule(paths=("training/trackers.py",), may=("training", "torch", "wandb"), never=COMMAND_LINE),
    Rule(
        paths=("training/**",),
        may=("training", "polyformer", "torch", "numpy", "safetensors", "tokenizers"),
        never=COMMAND_LINE,
    ),
    Rule(paths=("he_backend/openfhe_backend.py", "he_backend/openfhe_ring.py"), may=("he_backend", "numpy", "openfhe")),
    Rule(paths=("he_backend/tenseal_backend.py",), may=("he_backend", "numpy", "tenseal")),
    Rule(paths=("he_backend/server.py",), may=("he_backend", "numpy", "fastapi", "pydantic", "starlette", "uvicorn")),
    Rule(paths=("he_backend/client.py",), may=("he_backend", "numpy", "httpx")),
    Rule(paths=("he_backend/**",), may=("he_backend", "numpy")),
    Rule(
        paths=("compiler/onnx_import.py", "compiler/step_import.py"),
        may=("compiler", "numpy", "scipy", "onnx", *COMPILER_SEES),
    ),
    Rule(paths=("compiler/**",), may=("compiler", "numpy", "scipy", *COMPILER_SEES)),
    Rule(paths=("benchmarks/**",), may=EVERYTHING),
)

# What an entry point must not load before it is needed.
HEAVY = ("torch", "onnx", "onnxruntime", "openfhe", "tenseal", "fastapi", "matplotlib")
ENTRY_POINTS = ("polyformer", "polyformer.cli", "he_backend", "compiler")


def rule_for(path: str) -> Rule:
    """The rule of a file, given as a path below the root such as `compiler/lower.py`."""
    for rule in TABLE:
        if any(matches(path, pattern) for pattern in rule.paths):
            return rule
    raise LookupError(f"no rule for {path}: give its package a row in TABLE")


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern, which is a file or a folder followed by `/**`, covers a path."""
    folder = pattern.removesuffix("**")
    return path == pattern or (folder != pattern and path.startswith(folder))


def imported_names(source: str, path: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import: at the top, in a function, for types only, by `import_module`."""
    for node in ast.walk(ast.parse(source, path)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                origin = ".".join(filter(None, [parent_package(path, level), module]))
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def parent_package(path: str, level: int) -> str:
    """The package that `level` leading dots mean in the file at `path`; empty for an absolute import."""
    parts = path.split("/")[:-1]
    return ".".join(parts[: len(parts) - level + 1]) if level else ""


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "*" or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(source: str, path: str) -> list[str]:
    """One line for each import that the table does not give to this file."""
    rule = rule_for(path)
    allowed = (*rule.may, *sys.stdlib_module_names)
    return [
        f"{path}:{line} imports {name}; it may import {', '.join(rule.may)}"
        for line, name in imported_names(source, path)
        if not is_within(name, allowed) or is_within(name, rule.never)
    ]


def python_files(*folders: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", python_files(*PACKAGES))
def test_imports_only_what_the_table_gives(path: str) -> None:
    assert violations((ROOT / path).read_text(), path) == []


@pytest.mark.parametrize("path", python_files(*PACKAGES, "tests"))
def test_file_is_not_too_long(path: str) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines of {MAX_LINES}: which two ideas live in it?"


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_import_loads_nothing_heavy(module: str) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} does not exist yet")
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"`import {module}` loads more than it needs"


# --- The test of the test ---------------------------------------------------------------------------------------------

REFUSED = {
    "compiler sees torch": ("compiler/lower.py", "import torch"),
    "compiler sees a submodule of torch": ("compiler/lower.py", "import torch.nn as nn"),
    "compiler sees the model": ("compiler/lower.py", "from polyformer.model import Transformer"),
    "compiler sees a concrete backend": ("compiler/lower.py", "from he_backend.openfhe_backend import OpenFHE"),
    "compiler sees all of he_backend": ("compiler/lower.py", "import he_backend"),
    "compiler takes a backend out of he_backend": ("compiler/lower.py", "from he_backend import openfhe_backend"),
    "onnx outside the importer": ("compiler/passes/fuse.py", "import onnx"),
    "onnx outside export": ("polyformer/model.py", "from onnx import helper"),
    "model sees the compiler, inside a function": ("polyformer/model.py", "def f():\n    import compiler.lower"),
    "model sees the command line": ("polyformer/__init__.py", "from polyformer.cli import main"),
    "model sees the command line by a relative import": ("polyformer/mixers/rwkv.py", "from ..cli import main"),
    "training sees the backend, for types only": (
        "training/loop.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from he_backend.base import Backend",
    ),
    "openfhe outside its file": ("he_backend/execute.py", "import openfhe"),
    "openfhe by name": ("he_backend/execute.py", "import importlib\nimportlib.import_module('openfhe')"),
    "tenseal in OpenFHE's file": ("he_backend/openfhe_backend.py", "import tenseal"),
    "runtime sees the compiler": ("he_backend/circuit.py", "from compiler import ir"),
    "runtime sees torch": ("he_backend/server.py", "import torch"),
    "lm_eval outside its file": ("training/loop.py", "import lm_eval"),
    "http client in the server": ("he_backend/server.py", "import httpx"),
    "a prefix that is no package": ("he_backend/base.py", "import numpy_financial"),
}
ACCEPTED = {
    "standard library": ("he_backend/base.py", "import os.path\nfrom collections import abc"),
    "one's own package, relative": (
        "compiler/passes/fuse.py",
        "from .. import ir\nfrom . import keys\nfrom ..ops.gemm import Gemm",
    ),
    "a module of another package": ("compiler/cost.py", "from he_backend import circuit, kernels"),
    "a name from a module of another package": ("compiler/cost.py", "from he_backend.base import LevelError"),
    "onnx in the importer": ("compiler/onnx_import.py", "import onnx.helper"),
    "onnx in export": ("polyformer/export.py", "import onnx, torch"),
    "openfhe in its file": ("he_backend/openfhe_backend.py", "def open():\n    import openfhe"),
    "lm_eval in its file": ("training/harness.py", "from lm_eval.api.model import LM"),
    "everything in the command line": ("polyformer/cli.py", "import torch, typer, he_backend.client, compiler"),
    "everything in a command": ("polyformer/commands/train.py", "import training.loop, rich"),
    "everything in benchmarks": ("benchmarks/ops.py", "import openfhe, compiler, polyformer.cli"),
}


@pytest.mark.parametrize(("path", "source"), REFUSED.values(), ids=REFUSED.keys())
def test_table_refuses(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(("path", "source"), ACCEPTED.values(), ids=ACCEPTED.keys())
def test_table_accepts(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_violation_names_file_line_and_what_is_allowed() -> None:
    assert violations("import os\nimport torch", "he_backend/base.py") == [
        "he_backend/base.py:2 imports torch; it may import he_backend, numpy"
    ]


def test_a_new_package_needs_a_row() -> None:
    with pytest.raises(LookupError, match=r"no rule for newcomer/model\.py"):
        rule_for("newcomer/model.py")
