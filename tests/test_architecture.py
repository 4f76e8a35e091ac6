"""The arrows of docs/architecture.md and the rules of the house, read from the source: one test a
rule, over all modules."""

import ast
import functools
import re
import sys
from pathlib import Path

import magus_anharmonic
from magus_anharmonic.cli import COMMANDS

PACKAGE = Path(magus_anharmonic.__file__).parent
SCRIPTS = sorted((PACKAGE.parent / "inputs" / "h3s-paper").glob("*.py"))
"""Of the paper; a wheel has them in ``magus_anharmonic/paper``."""
MODULES = [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]
LONGEST = 500
"""Lines of a module."""
BASE = {
    "settings",
    "errors",
    "units",
    "io",
    "runs",
    "structures",
    "processes",
    "gate",
    "evaluator",
    "calculator_check",
    "energy_surface",
    "third_party",
    "testing",
    "hull",
    "notebook",
    "__init__",
}

ALLOWED = {
    **{name: BASE for name in BASE},
    "__init__": BASE | {"potential", "sscha", "ranking"},  # the lazy public names
    "scheduler": BASE,
    "potential": BASE | {"scheduler"},
    "sscha": BASE,
    "labelers": BASE | {"scheduler", "potential", "sscha"},
    "learning": BASE | {"potential", "labelers"},
    "ranking": BASE | {"potential", "sscha", "labelers", "scheduler"},
    "report": BASE | {"ranking", "paper", "sscha"},
    "phase_diagram": BASE | {"potential", "sscha"},
    "paper": BASE | {"potential", "sscha", "labelers", "learning", "phase_diagram", "ranking"},
    "generation": BASE | {"potential", "learning", "labelers", "ranking", "sscha", "paper"},
    "search": BASE | {"potential", "ranking", "generation", "report", "scheduler"},
    "campaign": BASE
    | {
        "potential",
        "learning",
        "labelers",
        "ranking",
        "sscha",
        "search",
        "doctor",
        "paper",
        "report",
    },
    "starter": BASE | {"labelers", "search"},
    "doctor": BASE | {"potential", "labelers", "scheduler"},
    "plugins": BASE
    | {
        "potential",
        "learning",
        "labelers",
        "ranking",
        "sscha",
        "generation",
        "report",
        "search",
        "autoload",
        "scheduler",
    },
    "autoload": set(),
}
"""Part of the package -> parts that it may import; ``cli`` may import everything."""

HEAVY = {
    "torch",
    "vesin",
    "mattersim",
    "gpaw",
    "sscha",
    "cellconstructor",
    "pyxtal",
    "ase_ga",
    "distributed",
    "dask",
    "dask_jobqueue",
}

LOGS = {"debug", "info", "warning", "error", "exception", "critical"}

KNOWN_CIRCLES = []
"""Circles that are still to be cut; none may be added."""


def inside(path):
    """Where a module is in the package."""
    return Path("paper", path.name) if path in SCRIPTS else path.relative_to(PACKAGE)


def part(path):
    """``potential/m3gnet.py`` -> ``potential``; ``settings.py`` -> ``settings``; ``python -m`` is ``cli``."""
    first = inside(path).parts[0]
    return "cli" if first == "__main__.py" else first.removesuffix(".py")


def label(path):
    return str(inside(path))


def module_name(path):
    parts = ["magus_anharmonic", *inside(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in MODULES}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path, *, at_import_only=False):
    """Absolute names of the modules that a file imports, wherever in the file, or outside functions
    only."""
    found = set()
    package = ["magus_anharmonic", *inside(path).parent.parts]
    for node in walk(tree(path), at_import_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]).strip(".")
                if node.level
                else node.module or ""
            )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def walk(tree, at_import_only):
    nodes = []
    for node in ast.iter_child_nodes(tree):
        skipped = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if not (at_import_only and skipped):
            nodes += [node, *walk(node, at_import_only)]
    return nodes


def own(path, *, at_import_only=False):
    """Modules of this package that a file imports; of ``from package import module`` the module,
    not the package as well."""
    names = {name for name in imported(path, at_import_only=at_import_only) if name in PATHS}
    return {
        PATHS[name] for name in names if not any(other.startswith(f"{name}.") for other in names)
    } - {path}


def calls(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def holds(wrong):
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_part_of_the_package_has_its_arrows_and_keeps_to_them():
    assert {part(path) for path in MODULES} - {"cli"} == set(ALLOWED), (
        "name the parts and their arrows in ALLOWED and docs/architecture.md"
    )
    wrong = []
    for path in MODULES:
        if part(path) != "cli":
            others = {
                part(PATHS[name])
                for name in imported(path)
                if name in PATHS and name != "magus_anharmonic"
            }
            wrong += [
                f"{label(path)} imports {other}"
                for other in sorted(others - ALLOWED[part(path)] - {part(path)})
            ]
    holds(wrong)


def test_the_page_on_the_architecture_shows_these_arrows():
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    table = page.read_text(encoding="utf-8").partition("## Who may import whom")[2]
    rows = [line.split("|")[1:3] for line in table.partition("\n\nNothing")[0].splitlines()]
    cells = [[set(re.findall(r"`(\w+)`", cell)) for cell in row] for row in rows if row]
    base, *others = [(names, arrows) for names, arrows in cells if names]
    assert base == (BASE - {"__init__"}, set())
    shown = {name: arrows for names, arrows in others for name in names}
    kept = {name: arrows - BASE for name, arrows in ALLOWED.items() if name not in BASE}
    assert shown == {**kept, "cli": set()}


def test_magus_is_imported_in_plugins_alone_and_plugins_by_the_commands_alone():
    wrong = []
    for path in MODULES:
        roots = {".".join(name.split(".")[:2]) for name in imported(path)}
        if part(path) != "plugins":
            wrong += [
                f"{label(path)} imports {name}"
                for name in sorted(roots)
                if name.split(".")[0] == "magus"
            ]
        if part(path) not in ("cli", "plugins") and "magus_anharmonic.plugins" in roots:
            wrong.append(f"{label(path)} imports plugins")
    holds(wrong)


def circles(arrows):
    """Sets of names that reach each other along the arrows."""
    reach = {name: set(others) for name, others in arrows.items()}
    for middle in arrows:
        for name in arrows:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    found = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in arrows
        if name in reach[name]
    }
    return sorted((set(one) for one in found), key=sorted)


def test_no_modules_import_each_other_in_a_circle():
    """Also not inside functions or for type checkers alone: where two modules need each other, one
    is too much or something is missing."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    found = circles({label(path): {label(other) for other in own(path)} for path in MODULES})
    holds(
        [
            f"import each other: {', '.join(sorted(one))}"
            for one in found
            if not any(one <= known for known in KNOWN_CIRCLES)
        ]
    )
    holds(
        [
            f"no circle any more, take it off KNOWN_CIRCLES: {', '.join(sorted(one))}"
            for one in KNOWN_CIRCLES
            if one not in found
        ]
    )


def test_no_module_is_longer_than_somebody_reads():
    lengths = {label(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    holds(
        [
            f"{name} has {lines} lines, more than {LONGEST}: split it by subject"
            for name, lines in lengths.items()
            if lines > LONGEST
        ]
    )


def test_what_everybody_imports_loads_nothing_heavy():
    wrong = []
    for entry, without in {
        "magus_anharmonic": HEAVY,
        "magus_anharmonic.autoload": HEAVY,
        "magus_anharmonic.settings": HEAVY,
        "magus_anharmonic.cli": HEAVY,
        "magus_anharmonic.search.keys": HEAVY,
        "magus_anharmonic.report.contents": HEAVY,
        **{f"magus_anharmonic.cli.{name}": HEAVY | {"ase", "numpy"} for name in COMMANDS},
    }.items():
        loaded, queue = set(), [PATHS[entry]]
        while queue:
            path = queue.pop()
            if path not in loaded:
                loaded.add(path)
                queue += [
                    PATHS[name] for name in imported(path, at_import_only=True) if name in PATHS
                ]
        for path in sorted(loaded):
            heavy = {name.split(".")[0] for name in imported(path, at_import_only=True)} & without
            wrong += [f"{label(path)}, loaded by {entry}, imports {name}" for name in sorted(heavy)]
    holds(wrong)


def test_the_autoload_needs_the_standard_library_alone():
    outside = {
        name.split(".")[0] for name in imported(PACKAGE / "autoload.py", at_import_only=True)
    }
    assert outside <= sys.stdlib_module_names


def test_files_are_read_and_written_and_digests_made_in_io_alone():
    """One reader and one writer of each format: JSON, CSV, arrays, whole files."""
    wrong = []
    for path in MODULES:
        if part(path) == "io":
            continue
        wrong += [
            f"{label(path)} imports {name}" for name in sorted(imported(path) & {"csv", "json"})
        ]
        wrong += [
            f"{label(path)}:{call.lineno} calls {ast.unparse(call.func)}"
            for call in calls(path)
            if ast.unparse(call.func) in {"np.savez", "np.savez_compressed", "hashlib.sha256"}
            and label(path) != "report/page.py"  # base64 of it, as a page's policy wants
        ]
    holds(wrong)


def test_library_code_does_not_print():
    prints = [(path, call) for path in MODULES if part(path) != "cli" for call in calls(path)]
    prints = [
        (path, call)
        for path, call in prints
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    holds([f"{label(path)}:{call.lineno} prints; use logging" for path, call in prints])


def test_log_lines_do_not_hold_the_words_that_magus_searches_its_log_for():
    """MAGUS restarts from the last line of its log with ``Generation`` and the last with
    ``volRatio``."""
    wrong = []
    for path in MODULES:
        for call in calls(path):
            if isinstance(call.func, ast.Attribute) and call.func.attr in LOGS:
                text = ast.unparse(call)
                wrong += [
                    f"{label(path)}:{call.lineno} logs {word}"
                    for word in ("Generation", "volRatio")
                    if word in text
                ]
    holds(wrong)


def test_units_are_converted_in_one_module():
    """No factor of eV/A^3 to GPa, and no thousand that makes meV of an energy, elsewhere."""
    no_units = {"hull.py", "settings/campaign.py", "structures.py"}  # thousands that are no units
    wrong = []
    for path in MODULES:
        if label(path) == "units.py" or not path.is_relative_to(PACKAGE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name | ast.alias) and (
                getattr(node, "id", "") or getattr(node, "name", "")
            ) in ("EV_PER_A3_IN_GPA", "GPa_in_eV"):
                wrong.append(f"{label(path)}: a factor instead of a function of units.py")
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
                for side in (node.left, node.right):
                    thousand = isinstance(side, ast.Constant) and side.value in (1000, 1e-3)
                    if thousand and label(path) not in no_units:
                        wrong.append(f"{label(path)}: line {node.lineno}: {ast.unparse(node)}")
    holds(wrong)
