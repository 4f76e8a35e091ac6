"""The fast tests on the lowest and the newest versions of what pyproject.toml asks for.

python tests/benchmarks/versions.py lowest [newest ...] [--folder DIR] [-- pytest arguments]

Each environment is a layer of its own over the one that runs this script: the packages of the layer
come first, everything else (torch, mattersim and what is compiled) is shared, so that a layer costs
seconds and not gigabytes. torch and mattersim are therefore not part of the matrix; nor are
packages that need a compiler (cellconstructor, python-sscha, gpaw: .ci/setup builds those).
"""

import argparse
import os
import re
import site
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = {"torch", "mattersim", "cellconstructor", "python-sscha", "six"}
WITH_DEPENDENCIES = {"pydantic"}
"""Each version of it fits one version of pydantic_core alone."""
ALONGSIDE = {"numpy": "pandas==2.2.2"}
"""What a lowest version needs beside it: pandas, which pyxtal imports, is built for one NumPy."""
TESTS = (
    "tests/test_search.py",
    "tests/test_learning.py",
    "tests/test_labelers.py",
    "tests/test_labelers_files.py",
    "tests/test_cli.py",
    "tests/test_run_record.py",
    "tests/test_report.py",
    "tests/test_faults.py",
    "tests/test_status.py",
    "tests/test_lock.py",
    "tests/test_potential.py",
    "tests/test_relax.py",
    "tests/test_sscha_state.py",
    "tests/test_sscha_native.py",
    "tests/test_sscha_files.py",
    "tests/test_host_keys.py",
    "tests/test_inputs.py",
    "tests/test_autoload.py",
    "tests/test_plugins.py",
)


def requirements(which):
    """``name==lowest`` or ``name`` (the newest that pip finds) for each direct dependency of the
    matrix."""
    found = []
    for line in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]:
        match = re.match(r"([A-Za-z0-9_.-]+)(?:>=([0-9.]+))?", line)
        if match is None or match[1] in SHARED:
            continue
        name, lowest = match[1], match[2]
        if which == "newest" or lowest is None:
            found.append(name)
        else:
            found.append(f"{name}=={lowest}")
            found += [ALONGSIDE[name]] if name in ALONGSIDE else []
    return found


def make(which, folder):
    """A virtual environment in ``folder`` and its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # Our own dependencies alone: what they need in turn is in the layer below, and no resolver may
    # undo the choice.
    install = [str(python), "-m", "pip", "install", "-q", "--only-binary=:all:"]
    wanted = requirements(which)
    subprocess.run([*install, "--no-deps", *wanted], check=True)
    subprocess.run(
        [*install, *(line for line in wanted if line.split("==")[0] in WITH_DEPENDENCIES)],
        check=True,
    )
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    below = [
        path
        for path in (*site.getsitepackages(), sysconfig.get_path("purelib"))
        if Path(path) != own
    ]
    (own / "layer_below.pth").write_text("\n".join(dict.fromkeys(below)) + "\n")
    return python


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", nargs="+", choices=["lowest", "newest"])
    parser.add_argument(
        "--folder", type=Path, help="where the environments are kept; left out: a temporary folder"
    )
    parser.add_argument("--tests", nargs="*", default=list(TESTS))
    given = parser.parse_args()
    codes = []
    with tempfile.TemporaryDirectory() as temporary:
        for which in given.environments:
            python = make(which, (given.folder or Path(temporary)) / which)
            names = [re.split("==", requirement)[0] for requirement in requirements(which)]
            ask = (
                "import sys; from importlib.metadata import version as v; print(', '.join(f'{n}"
                " {v(n)}' for n in sys.argv[1:]))"
            )
            shown = subprocess.run(
                [str(python), "-c", ask, *names], check=True, capture_output=True, text=True
            )
            print(f"{which}: {shown.stdout.strip()}", flush=True)
            command = [
                str(python),
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                "-q",
                "-m",
                "not slow and not full",
                *given.tests,
            ]
            paths = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
            environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            codes.append(subprocess.run(command, cwd=REPOSITORY, env=environment).returncode)
            print(f"{which}: {'passed' if codes[-1] == 0 else 'FAILED'}", flush=True)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
