"""The arrows of docs/architecture.md, read from the import statements: who may know whom."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import magus_anharmonic

PACKAGE = Path(magus_anharmonic.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
BASE = {
    "settings",
    "errors",
    "units",
    "files",
    "failures",
    "lock",
    "structures",
    "gate",
    "evaluator",
    "calculator_check",
    "calculator_id",
    "hull",
    "__init__",
}

ALLOWED: dict[str, set[str]] = {
    **{name: BASE for name in BASE},
    "__init__": BASE | {"potential", "sscha"},  # the lazy public names
    "scheduler": BASE,
    "potential": BASE | {"scheduler"},
    "sscha": BASE,
    "labelers": BASE | {"scheduler"},
    "learning": BASE | {"potential", "labelers"},
    "ranking": BASE | {"potential", "sscha", "labelers", "run_record", "scheduler"},
    "report": BASE | {"ranking", "analysis"},
    "analysis": BASE | {"potential", "sscha", "labelers", "learning", "run_record"},
    "run_record": BASE,
    "host_keys": BASE,
    "generation": BASE | {"potential", "learning", "labelers", "ranking", "sscha", "run_record", "analysis"},
    "search": BASE
    | {"potential", "learning", "labelers", "ranking", "sscha", "generation", "host_keys", "run_record", "report", "scheduler"},
    "campaign": BASE
    | {"potential", "learning", "labelers", "ranking", "sscha", "search", "doctor", "run_record", "analysis", "report", "status"},
    "status": BASE,
    "doctor": BASE | {"potential", "labelers", "sscha", "scheduler"},
    "plugins": BASE
    | {"potential", "learning", "labelers", "ranking", "sscha", "generation", "run_record", "report", "host_keys", "autoload", "scheduler"},
    "autoload": set(),
}
"""Part of the package -> parts that it may import; ``cli`` may import everything."""

HEAVY = {"torch", "mattersim", "gpaw", "sscha", "cellconstructor", "pyxtal", "ase_ga", "distributed", "dask", "dask_jobqueue"}


def part(path: Path) -> str:
    """``potential/model.py`` -> ``potential``; ``settings.py`` -> ``settings``."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path, *, at_import_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file, or outside functions only."""
    found: set[str] = set()
    package = ["magus_anharmonic", *path.relative_to(PACKAGE).parent.parts]
    for node in walk(ast.parse(path.read_text(encoding="utf-8")), at_import_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".") if node.level else node.module or ""
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def walk(tree: ast.AST, at_import_only: bool) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        skipped = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_import_only and skipped):
            nodes += [node, *walk(node, at_import_only)]
    return nodes


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def own_parts(names: set[str]) -> set[str]:
    """Parts of this package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("magus_anharmonic.")}


def test_the_parts_of_the_package_are_the_ones_the_rules_name() -> None:
    assert {part(path) for path in MODULES} - {"cli"} <= set(ALLOWED), (
        "name the new part and its arrows in ALLOWED and in docs/architecture.md"
    )


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_only_plugins_import_magus(path: Path) -> None:
    magus = {name for name in imported(path) if name.split(".")[0] == "magus"}
    assert part(path) == "plugins" or not magus


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) not in ("cli", "plugins")], ids=label)
def test_nothing_imports_plugins(path: Path) -> None:
    assert "plugins" not in own_parts(imported(path))


@pytest.mark.parametrize("path", [path for path in MODULES if part(path) != "cli"], ids=label)
def test_arrows_point_one_way(path: Path) -> None:
    known = {part(other) for other in MODULES}
    wrong = (own_parts(imported(path)) & known) - ALLOWED[part(path)] - {part(path)}
    assert not wrong, f"{label(path)} imports {sorted(wrong)}"


def loaded_with(names: set[str]) -> set[Path]:
    """Files of the package that are executed when ``names`` are imported, following imports outside functions."""
    done: set[Path] = set()
    queue = [path for path in MODULES if module_name(path) in names]
    while queue:
        path = queue.pop()
        if path not in done:
            done.add(path)
            wanted = imported(path, at_import_only=True)
            queue += [other for other in MODULES if module_name(other) in wanted]
    return done


def module_name(path: Path) -> str:
    parts = ["magus_anharmonic", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("entry", ["magus_anharmonic", "magus_anharmonic.autoload", "magus_anharmonic.settings", "magus_anharmonic.cli"])
def test_what_everybody_imports_loads_nothing_heavy(entry: str) -> None:
    for path in loaded_with({entry}):
        heavy = {name.split(".")[0] for name in imported(path, at_import_only=True)} & HEAVY
        assert not heavy, f"{label(path)}, loaded by {entry}, imports {sorted(heavy)}"


def test_the_autoload_needs_the_standard_library_alone() -> None:
    outside = {name.split(".")[0] for name in imported(PACKAGE / "autoload.py", at_import_only=True)}
    assert outside <= sys.stdlib_module_names


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_library_code_does_not_print(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert part(path) == "cli" or not prints, f"{label(path)} prints in lines {prints}"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_log_lines_do_not_hold_the_words_that_magus_searches_its_log_for(path: Path) -> None:
    """MAGUS restarts from the last line of its log with ``Generation`` and the last with ``volRatio``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        logs = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if logs and node.func.attr in ("debug", "info", "warning", "error", "exception", "critical"):  # type: ignore[attr-defined]
            text = ast.unparse(node)
            assert "Generation" not in text and "volRatio" not in text, f"{label(path)} line {node.lineno}"  # type: ignore[attr-defined]
