"""The plug-ins in the real MAGUS, run as its users run it; skipped where MAGUS is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase.io import read

from magus_anharmonic.autoload import is_magus
from magus_anharmonic.files import read_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_magus(), reason="skipped: MAGUS is not installed (no package magus with magus.entrypoints)"),
]

ENTRY_POINTS = """\
[ase.ioformats]
magus-anharmonic = magus_anharmonic.autoload:ase_format

[magus.plugins]
magus-anharmonic = magus_anharmonic.plugins:register
"""

SEARCH: dict[str, Any] = {
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


@pytest.fixture
def work(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A folder with the inputs that every search here needs."""
    info = tmp_path / "site" / "magus_anharmonic-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: magus-anharmonic\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    folder = tmp_path / "work"
    (folder / "inputFold/EMT").mkdir(parents=True)
    (folder / "inputFold/EMT/emt.yaml").write_text("eps: 0.05\n")
    (folder / "model.pth").write_bytes(Path(tiny_checkpoint).read_bytes())
    return folder


def ours(prefix: str = "MatterSim", **more: Any) -> dict[str, Any]:
    return {"calculator": "mattersim", "jobPrefix": prefix, "checkpoint": "model.pth", "max_step": 5, **more}


def command(folder: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    paths = [str(folder.parent / "site"), str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "ignore", "-m", "magus.entrypoints.main", *arguments]
    return call, {"cwd": folder, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def magus(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    call, options = command(folder, *arguments)
    return subprocess.run(call, timeout=300, **options)


def write_input(folder: Path, **changes: Any) -> None:
    (folder / "input.yaml").write_text(yaml.safe_dump({**SEARCH, **changes}))


def check_results(folder: Path) -> None:
    """Every survivor has numbers of one model, a finite or missing free energy, and its status."""
    good = read(folder / "results/good.traj", ":")
    newest = read_jsonl(folder / "results/anharmonic/metrics.jsonl")[-1]["new_model"]
    assert {frame.info["model"] for frame in good} == {newest}
    assert np.isfinite([frame.info["enthalpy"] for frame in good]).all()
    assert all(frame.info["free_energy_status"] for frame in good)
    assert all("free_energy_status" in frame.info for frame in read(folder / "results/gen2.traj", ":"))
    for name in ("run.json", "ranking.csv", "checkpoints/gen2.pth", "labels/gen001.xyz"):
        assert (folder / "results/anharmonic" / name).is_file(), name


def test_checkpack_lists_the_calculator(work: Path) -> None:
    result = magus(work, "checkpack", "calculators")
    assert any(line.split(":")[0].strip() == "mattersim" for line in result.stdout.splitlines()), result.stdout


def test_a_wrong_key_ends_the_search_with_code_2_and_without_traceback(work: Path) -> None:
    write_input(work, MainCalculator=ours(), learning={**LEARNING, "labeler": {"calculator": "gpaw"}, "n_sampel": 1})
    result = magus(work, "search")
    assert result.returncode == 2
    assert "did you mean n_sample?" in result.stdout and "Traceback" not in result.stdout
    assert not (work / "results").exists()


def test_a_plain_search_learns_ranks_and_can_be_summarised(work: Path) -> None:
    labeler = {"calculator": "ase.calculators.emt.EMT", "n_workers": 1}
    write_input(work, MainCalculator=ours(), learning={**LEARNING, "labeler": labeler})
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    check_results(work)
    summary = magus(work, "summary", "results/good.traj", "-a", "free_energy", "free_energy_status", "-sb", "free_energy")
    assert "free_energy_status" in summary.stdout
    relaxed = magus(work, "calculate", "results/good.traj", "-m", "scf", "-o", "scf.traj")
    assert relaxed.returncode == 0 and len(read(work / "scf.traj", ":")) == len(read(work / "results/good.traj", ":"))


def test_the_ml_mode_learns_from_magus_s_own_calculator(work: Path) -> None:
    write_input(
        work,
        MainCalculator={"calculator": "emt", "jobPrefix": "EMT"},
        MLCalculator=ours("ML"),
        SelectDFTScf=True,
        learning={**LEARNING, "labeler": {"calculator": "main"}},
    )
    result = magus(work, "search", "-m")
    assert result.returncode == 0, result.stdout[-3000:]
    check_results(work)
    labels = read(work / "results/anharmonic/labels/gen001.xyz", ":")
    assert len(labels) == 4
    from ase.calculators.emt import EMT

    for atoms in labels:
        copy = atoms.copy()
        copy.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(copy.get_potential_energy(), abs=1e-5)
        assert np.allclose(atoms.get_forces(), copy.get_forces(), atol=1e-5), "forces belong to the structure they are stored with"


def test_a_killed_search_goes_on_with_its_labels_and_its_seed(work: Path) -> None:
    labeler = {"calculator": "ase.calculators.emt.EMT", "n_workers": 1}
    write_input(work, MainCalculator=ours(), learning={**LEARNING, "labeler": labeler})
    call, options = command(work, "search")
    options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(call, **options) as process:
        deadline = time.monotonic() + 200
        while not (work / "results/anharmonic/checkpoints/gen2.pth").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    before = (work / "results/anharmonic/labels/gen001.xyz").read_bytes()
    result = magus(work, "search", "-r")
    assert result.returncode == 0, result.stdout[-3000:]
    check_results(work)
    assert (work / "results/anharmonic/labels/gen001.xyz").read_bytes() == before
    assert [record["generation"] for record in read_jsonl(work / "results/anharmonic/metrics.jsonl")] == [1, 2]
