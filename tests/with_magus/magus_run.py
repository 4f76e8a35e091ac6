"""How the tests run MAGUS: as its users do, in a process and a folder of its own. What was run is
listed at the end of the tests."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase.calculators.emt import EMT
from ase.io import read

from magus_anharmonic.autoload import is_magus

REPOSITORY = Path(__file__).resolve().parents[2]

needs_magus = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_magus(),
        reason="skipped: MAGUS is not installed (no package magus with magus.entrypoints)",
    ),
]
"""Marks of every test here."""

TIMEOUT = 900.0
"""Seconds for one command of MAGUS; on a free core it takes a few."""

RAN = []
"""Command lines of this session, with their exit codes."""

ENTRY_POINTS = """\
[ase.ioformats]
magus-anharmonic = magus_anharmonic.autoload:ase_format

[magus.plugins]
magus-anharmonic = magus_anharmonic.plugins:register
"""

SEARCH = {
    "formulaType": "fix",
    "structureType": "bulk",
    "symbols": ["Al"],
    "formula": [1],
    "min_n_atoms": 2,
    "max_n_atoms": 4,
    "pressure": 10,
    "popSize": 4,
    "numGen": 2,
    "saveGood": 2,
    "spacegroup": ["2-230"],
    "d_ratio": 0.5,
    "volume_ratio": 1.2,
    "randRatio": 0.4,
    "dE": 0.001,
    "seed": 3,
    "Fitness": ["SSCHA"],
    "sscha": {"supercell": [2, 1, 1], "n_configs": 10, "max_populations": 1, "max_candidates": 1},
}
LEARNING = {"n_sample": 2, "n_perturb": 2, "epochs": 1}


def ours(prefix="MatterSim", **more):
    return {
        "calculator": "mattersim",
        "jobPrefix": prefix,
        "checkpoint": "model.pth",
        "max_step": 5,
        **more,
    }


def command(folder, *arguments):
    paths = [
        str(folder.parent / "site"),
        str(Path(__file__).parent),
        str(REPOSITORY),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "ignore", "-m", "magus.entrypoints.main", *arguments]
    return call, {
        "cwd": folder,
        "env": environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }


def magus(folder, *arguments, **environment):
    """``magus ARGUMENTS`` in ``folder``, with further variables of the environment."""
    call, options = command(folder, *arguments)
    options["env"] = {**options["env"], **environment}
    result = subprocess.run(call, timeout=TIMEOUT, stdin=subprocess.DEVNULL, **options)
    RAN.append(f"magus {' '.join(arguments)} -> {result.returncode}")
    return result


def campaign(file):
    """``magus-anharmonic campaign FILE`` in a process that finds MAGUS and the plug-ins as those of
    `magus` do."""
    _, options = command(file.parent.parent, "search")
    call = [sys.executable, "-W", "ignore", "-m", "magus_anharmonic", "campaign", str(file)]
    result = subprocess.run(call, timeout=900, stdin=subprocess.DEVNULL, **options)
    RAN.append(f"magus-anharmonic campaign (host: magus) -> {result.returncode}")
    return result


def write_input(folder, **changes):
    (folder / "input.yaml").write_text(yaml.safe_dump({**SEARCH, **changes}))


def check_labels_by_emt(work):
    """Four labels of the first round, each with the numbers of EMT for its own structure."""
    labels = read(work / "results/anharmonic/labels/gen001.xyz", ":")
    assert len(labels) == 4
    for atoms in labels:
        copy = atoms.copy()
        copy.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(copy.get_potential_energy(), abs=1e-5)
        assert np.allclose(atoms.get_forces(), copy.get_forces(), atol=1e-5), (
            "forces belong to the structure they are stored with"
        )
