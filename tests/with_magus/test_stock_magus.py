"""The plug-ins in the real MAGUS, run as its users run it; skipped where MAGUS is not installed."""

import os
import signal
import subprocess
import time

import numpy as np
from ase.io import read
from magus_run import LEARNING, check_labels_by_emt, command, magus, needs_magus, ours, write_input

from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.runs.status import status

pytestmark = needs_magus


def check_results(folder):
    """Every survivor has numbers of one model, a finite or missing free energy, and its status."""
    good = read(folder / "results/good.traj", ":")
    newest = read_jsonl(folder / "results/anharmonic/metrics.jsonl")[-1]["new_model"]
    assert {frame.info["model"] for frame in good} == {newest}
    assert np.isfinite([frame.info["enthalpy"] for frame in good]).all()
    assert all(frame.info["status"] for frame in good)
    assert all("status" in frame.info for frame in read(folder / "results/gen2.traj", ":"))
    for name in ("run.json", "ranking.csv", "checkpoints/gen2.pth", "labels/gen001.xyz"):
        assert (folder / "results/anharmonic" / name).is_file(), name


def test_checkpack_lists_the_calculator(work):
    result = magus(work, "checkpack", "calculators")
    assert any(line.split(":")[0].strip() == "mattersim" for line in result.stdout.splitlines()), (
        result.stdout
    )


def test_a_wrong_key_ends_the_search_with_code_2_and_without_traceback(work):
    write_input(
        work,
        MainCalculator=ours(),
        learning={**LEARNING, "labeler": {"calculator": "gpaw"}, "n_sampel": 1},
    )
    result = magus(work, "search")
    assert result.returncode == 2
    assert "did you mean n_sample?" in result.stdout and "Traceback" not in result.stdout
    assert not (work / "results").exists()


def test_a_plain_search_learns_ranks_and_can_be_summarised(work):
    labeler = {"calculator": "ase.calculators.emt.EMT", "n_workers": 1}
    write_input(work, MainCalculator=ours(), learning={**LEARNING, "labeler": labeler})
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    check_results(work)
    found = status(work)
    assert (found.state, found.where) == ("finished", "all 2 generations are done"), found.lines()
    assert any("per generation (last 2)" in rate for rate in found.rates)
    summary = magus(work, "summary", "results/good.traj", "-a", "gibbs", "status", "-sb", "gibbs")
    assert "status" in summary.stdout
    relaxed = magus(work, "calculate", "results/good.traj", "-m", "scf", "-o", "scf.traj")
    assert relaxed.returncode == 0 and len(read(work / "scf.traj", ":")) == len(
        read(work / "results/good.traj", ":")
    )


def test_the_ml_mode_learns_from_magus_s_own_calculator(work):
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
    check_labels_by_emt(work)


def test_a_search_on_the_free_energy_makes_its_labels_and_certifies_its_best(work):
    """As in the embedded host (test_free_energy_search.py): a potential is what it begins on."""
    potential = "h3s-gpaw-small"
    small = {"evaluator": potential, "supercell": [1, 1, 1]}
    write_input(
        work,
        symbols=["S", "H"],
        formula=[1, 3],
        min_n_atoms=4,
        max_n_atoms=4,
        pressure=150,
        volume_ratio=2.7,
        spacegroup=[160],
        pPri=1.0,
        saveGood=1,
        Fitness=["Enthalpy"],
        MainCalculator=ours(checkpoint=potential, surface="free-energy", eps=0.1, max_step=100),
        learning={**LEARNING, "labeler": {"calculator": "sscha", "n_configs": 20, **small}},
        sscha={**small, "n_configs": 40, "max_candidates": 2, "hessian": 0},
    )
    result = magus(work, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    folder = work / "results/anharmonic"
    newest = read_jsonl(folder / "metrics.jsonl")[-1]["new_model"]
    table = read_ranking(folder / "ranking.csv")
    best = min(
        (row for row in table if row.gibbs_predicted is not None), key=lambda r: r.rank_static
    )
    assert {row.predicted_by for row in table if row.gibbs_predicted is not None} == {newest}
    assert best.free_energy.gibbs_raw is not None, "what is lowest has been certified"
    good = read(work / "results/good.traj", ":")
    assert {frame.info["model"] for frame in good} == {newest}


def test_a_killed_search_goes_on_with_its_labels_and_its_seed(work):
    labeler = {"calculator": "ase.calculators.emt.EMT", "n_workers": 1}
    write_input(work, MainCalculator=ours(), learning={**LEARNING, "labeler": labeler})
    call, options = command(work, "search")
    options |= {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    with subprocess.Popen(call, **options) as process:
        deadline = time.monotonic() + 200
        while (
            not (work / "results/anharmonic/checkpoints/gen2.pth").exists()
            and time.monotonic() < deadline
            and process.poll() is None
        ):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    before = (work / "results/anharmonic/labels/gen001.xyz").read_bytes()
    found = status(work)
    assert (
        found.state == "dead"
        and found.where.startswith("generation 2 of 2: ")
        and found.lines()[-1] == "to go on: magus search -r"
    )
    result = magus(work, "search", "-r")
    assert result.returncode == 0, result.stdout[-3000:]
    check_results(work)
    assert (work / "results/anharmonic/labels/gen001.xyz").read_bytes() == before
    assert [
        record["generation"] for record in read_jsonl(work / "results/anharmonic/metrics.jsonl")
    ] == [1, 2]
