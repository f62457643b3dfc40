"""Guards design section 9: imports point one way, and format, codec and crypto do no I/O."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "native/core/src"
PACKAGE = ROOT / "agent/ebbtide"

# What each Rust module may use. types, constants and device are vocabulary: everyone may.
VOCABULARY = {"types", "constants", "device"}
RUST_MAY_USE = {
    "types": set(),
    "constants": set(),
    "device": set(),
    "format": set(),
    "crypto": set(),
    "storage": set(),
    "codec": {"format", "crypto"},
    "log": {"format", "storage"},
    "index": {"format", "storage", "log"},
    "view": {"format", "storage", "log", "index", "codec", "crypto"},
    "tap": {"format", "storage", "log", "index", "codec", "crypto"},
    "nbd": set(),
    "fuse": set(),
    "server": {"crypto", "format", "fuse", "index", "log", "nbd", "storage", "tap", "view"},
}
NO_IO = re.compile(r"std::(fs|net|os|process|thread|io)\b|\brustix::|\blibc::")

# What each part of the Python package may import of the others.
BASE = {"errors", "times", "units", "_native"}
PYTHON_MAY_USE = {
    "errors": set(),
    "times": {"errors"},
    "units": set(),
    "security": BASE | {"config"},
    "config": BASE,
    "rpc": BASE | {"config", "security"},
    "source": BASE | {"config", "security", "rpc", "control"},
    "target": BASE | {"config", "security", "rpc", "control"},
    "cli": {"*"},
}


def production(path: Path) -> str:
    """The text of a Rust file without its tests, comments and doc comments."""
    text = path.read_text().split("#[cfg(test)]")[0]
    return re.sub(r"//.*", "", text)


def rust_files(module: str) -> list[Path]:
    single = CORE / f"{module}.rs"
    files = [single] if single.exists() else sorted((CORE / module).rglob("*.rs"))
    return [path for path in files if "test" not in str(path.relative_to(CORE))]


def test_every_rust_module_has_its_rule() -> None:
    declared = set(re.findall(r"pub mod (\w+);", (CORE / "lib.rs").read_text()))
    assert declared == set(RUST_MAY_USE)


@pytest.mark.parametrize("module", sorted(RUST_MAY_USE))
def test_rust_imports_point_one_way(module: str) -> None:
    allowed = RUST_MAY_USE[module] | VOCABULARY | {module}
    for path in rust_files(module):
        for used in re.findall(r"\bcrate::(\w+)", production(path)):
            if used in RUST_MAY_USE:
                assert used in allowed, f"{path.relative_to(ROOT)} uses crate::{used}"


@pytest.mark.parametrize("module", ["format", "codec", "crypto"])
def test_pure_modules_do_no_io(module: str) -> None:
    for path in rust_files(module):
        found = NO_IO.search(production(path))
        assert found is None, f"{path.relative_to(ROOT)}: {found}"


def python_imports(path: Path) -> set[str]:
    """Names of the parts of `ebbtide` that a file imports."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        used |= {name.split(".")[1] for name in names if name.startswith("ebbtide.")}
    return used


@pytest.mark.parametrize("part", sorted(PYTHON_MAY_USE))
def test_python_imports_point_one_way(part: str) -> None:
    allowed = PYTHON_MAY_USE[part] | {part}
    single = PACKAGE / f"{part}.py"
    for path in [single] if single.exists() else sorted((PACKAGE / part).rglob("*.py")):
        if "_pb2" in path.name:
            continue
        beyond = python_imports(path) - allowed
        assert "*" in allowed or not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_core_knows_no_python() -> None:
    assert "pyo3" not in (ROOT / "native/core/Cargo.toml").read_text()
