"""What is promised about installing and importing: light, complete, and documented by its own
code."""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import magus_anharmonic
from magus_anharmonic.io.tables import columns_of
from magus_anharmonic.phase_diagram.points import GibbsPoint
from magus_anharmonic.ranking.candidate import Candidate

ROOT = Path(__file__).parent.parent
PACKAGE = Path(magus_anharmonic.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def fresh_python(code):
    """What a new interpreter prints, without the measuring hooks of the test run."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    path = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**clean, "PYTHONPATH": path},
        check=True,
    )
    return run.stdout.strip()


def test_importing_the_package_takes_less_than_50_ms():
    code = (
        "import time; t = time.process_time(); import magus_anharmonic; print(time.process_time()"
        " - t)"
    )
    assert min(float(fresh_python(code)) for _ in range(5)) < 0.05


@pytest.mark.parametrize(
    "module",
    [
        "magus_anharmonic",
        "magus_anharmonic.settings",
        "magus_anharmonic.autoload",
        "ase.io",
        "magus_anharmonic.ranking.structures",  # by an ASE calculator: two seconds a process
    ],
)
def test_light_modules_load_neither_torch_nor_mattersim(module):
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'mattersim', 'sscha', 'magus'}} &"
        " set(sys.modules)))"
    )
    assert fresh_python(code) == "[]"


def test_the_public_names_are_loaded_on_first_use():
    assert {"MatterSim", "free_energy", "load"} < set(dir(magus_anharmonic))
    assert dir(magus_anharmonic) == sorted(magus_anharmonic.__all__)
    assert callable(magus_anharmonic.load) and callable(magus_anharmonic.free_energy)
    assert magus_anharmonic.MatterSim.__module__ == "magus_anharmonic.potential.calculator"
    with pytest.raises(AttributeError, match="matter_sim"):
        _ = magus_anharmonic.matter_sim


def test_ase_and_magus_are_told_where_to_look():
    points = PROJECT["project"]["entry-points"]
    assert points["ase.ioformats"] == {"magus-anharmonic": "magus_anharmonic.autoload:ase_format"}
    assert points["magus.plugins"] == {"magus-anharmonic": "magus_anharmonic.plugins:register"}
    assert PROJECT["project"]["scripts"] == {"magus-anharmonic": "magus_anharmonic.cli:main"}


def test_the_entry_points_lead_to_something():
    from magus_anharmonic import autoload, cli

    assert callable(cli.main) and callable(autoload.install)
    assert autoload.ase_format.desc


def test_every_distribution_that_the_code_imports_is_declared():
    declared = {
        re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in PROJECT["project"]["dependencies"]
    }
    extras = PROJECT["project"]["optional-dependencies"]
    declared |= {
        re.split(r"[^A-Za-z0-9_.-]", line)[0]
        for extra in ("gpaw", "cluster", "docs")
        for line in extras[extra]
    }
    names = {
        "yaml": "pyyaml",
        "sscha": "python-sscha",
        "ase_ga": "ase-ga",
        "dask_jobqueue": "dask-jobqueue",
    }
    brought = {
        "dask": "distributed",
        "torch_ema": "mattersim",
        "torch_geometric": "mattersim",
        "click": "typer",
    }
    for path in (ROOT / "magus_anharmonic").rglob("*.py"):
        for match in re.finditer(
            r"^\s*(?:import|from) ([A-Za-z_][A-Za-z0-9_]*)",
            path.read_text(encoding="utf-8"),
            re.MULTILINE,
        ):
            module = match.group(1)
            if (
                module in sys.stdlib_module_names
                or module in ("magus", "magus_anharmonic")
                or importlib.util.find_spec(module) is None
            ):
                continue
            name = brought.get(module, names.get(module, module)).lower()
            assert name in declared, (
                f"{path.name} imports {module}, which pyproject.toml does not declare"
            )


def test_the_constraints_satisfy_the_declared_versions():
    from packaging.requirements import Requirement

    lines = [
        line
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = {}
    for pin in map(Requirement, lines):
        (one,) = pin.specifier
        assert one.operator == "=="
        pins.setdefault(pin.name.lower().replace("_", "-"), []).append(one.version)
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["gpaw"], *extras["test"]]:
        requirement = Requirement(text)
        versions = pins[requirement.name.lower().replace("_", "-")]
        assert all(map(requirement.specifier.contains, versions)), text


@pytest.mark.parametrize("page", ["keys", "columns"])
def test_the_pages_of_keys_and_columns_are_up_to_date(page):
    file = ROOT / "docs" / f"make_{page}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / f"{page}.md").read_text() == module.render(), "run `make docs`"


def test_every_number_of_a_table_is_made_where_its_column_says():
    origins = {one.origin for record in (Candidate, GibbsPoint) for one in columns_of(record)}
    for origin in origins - {""}:
        module, found = f"magus_anharmonic.{origin}", []
        while not (PACKAGE / f"{module.split('.', 1)[1].replace('.', '/')}.py").is_file():
            module, _, name = module.rpartition(".")
            found.insert(0, name)
        assert functools.reduce(getattr, found, importlib.import_module(module)), origin


def test_links_in_the_documentation_lead_to_files():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name} links to {target}"
            )


def test_the_citation_names_the_method_and_the_parts():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == magus_anharmonic.__version__
    assert citation["preferred-citation"]["authors"][-1]["family-names"] == "Errea"
    titles = " ".join(item["title"] + item.get("notes", "") for item in citation["references"])
    assert all(
        name in titles for name in ("MAGUS", "MatterSim", "python-sscha", "ASE", "GPAW", "PyXtal")
    )


@pytest.mark.parametrize("script", ["setup", "system.sh", "demo", "run"])
def test_the_set_up_scripts_are_valid_shell(script):
    run = subprocess.run(["bash", "-n", str(ROOT / ".ci" / script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_set_up_names_what_is_missing_and_the_line_for_each_system():
    # A user who is not root, on a machine without any tool: only what bash itself has is left, so
    # paste and sed are played.
    code = f"""
        say() {{ echo "$*"; }}; fail() {{ printf '%s\\n' "$@"; exit 7; }}; id() {{ echo 1000; }}
        paste() {{ read -r first; echo "$first"; }}; sed() {{ read -r line; echo "$line"; }}
        PYTHON={sys.executable}; . {ROOT}/.ci/system.sh; PATH=/nowhere; check_system"""
    run = subprocess.run(["/bin/bash", "-c", code], capture_output=True, text=True)
    assert run.returncode == 7
    for word in ("gcc", "sudo apt-get install", "dnf install", "conda install", "libxc-dev"):
        assert word in run.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_data_and_the_marker_for_types(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / run.stdout.strip().splitlines()[-1]) as wheel:
        names = wheel.namelist()
    assert "magus_anharmonic/py.typed" in names
    data = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "magus_anharmonic" / "data").rglob("*")
        if path.is_file()
    ]
    assert data and set(data) <= set(names)
    scripts = [path.name for path in (ROOT / "inputs" / "h3s-paper").glob("*.py")]
    assert scripts and {f"magus_anharmonic/paper/{name}" for name in scripts} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if not name.startswith("magus_anharmonic-")} == {
        "magus_anharmonic"
    }
