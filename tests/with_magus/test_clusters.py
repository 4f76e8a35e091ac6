"""Free energies by MAGUS's own calculators, and `magus search -m` with labels that MAGUS sends through LSF, SLURM and PBS, which small programs
play."""

import os
from pathlib import Path

import numpy as np
import pytest
import real_slurm
import yaml
from ase.io import read
from magus_run import LEARNING, check_labels_by_emt, magus, needs_magus, ours, write_input

from magus_anharmonic.io.files import read_jsonl

pytestmark = needs_magus

CLUSTER = {
    "calculator": "toy-cluster",
    "jobPrefix": "Toy",
    "queueName": "normal",
    "numCore": 1,
    "numParallel": 2,
    "waitTime": 1,
}


@pytest.fixture
def cluster_search(work, queue):
    """An input whose labels go through a queue system."""
    with (work.parent / "site/magus_anharmonic-0.dist-info/entry_points.txt").open("a") as file:
        file.write("toy-cluster = toy_cluster:register\n")
    (work / "inputFold/Toy").mkdir()
    learning = {**LEARNING, "labeler": {"calculator": "main"}}
    write_input(
        work,
        MainCalculator=CLUSTER,
        MLCalculator=ours("ML"),
        SelectDFTScf=True,
        learning=learning,
        numGen=1,
        sscha=None,
        Fitness=["Enthalpy"],
    )
    text = (work / "input.yaml").read_text().replace("sscha: null\n", "")
    (work / "input.yaml").write_text(text)
    return work


LJ = {"sigma": 2.3, "epsilon": 0.3, "rc": 6.0, "smooth": True}
EMT_BLOCK = {"calculator": "emt", "jobPrefix": "EMT", "maxForce": 100, "maxStep": 30}


@pytest.mark.parametrize(
    ("main", "evaluator", "model"),
    [
        (EMT_BLOCK, None, "emt-"),
        ({"calculator": "lj", "jobPrefix": "LJ", "maxStep": 30}, None, "lennardjones-"),
        ({"calculator": "toy-cluster", "jobPrefix": "Toy", "mode": "serial"}, None, "dft-"),
        (EMT_BLOCK, {"calculator": "lj", "arguments": LJ}, "lennardjones-"),
    ],
    ids=["emt", "lj", "single points", "named"],
)
def test_free_energies_rank_by_any_calculator_of_magus(cluster_search, main, evaluator, model):
    folder = cluster_search / "inputFold/LJ"
    folder.mkdir()
    (folder / "lj.yaml").write_text(yaml.safe_dump(LJ))
    sscha = {"supercell": [1, 1, 1], "n_configs": 10, "max_populations": 1, "max_candidates": 1}
    write_input(
        cluster_search,
        symbols=["Cu", "Al"],
        formula=[1, 1],
        MainCalculator=main,
        sscha={**sscha, "evaluator": evaluator},
    )
    result = magus(cluster_search, "search")
    assert result.returncode == 0, result.stdout[-3000:]
    good = read(cluster_search / "results/good.traj", ":")
    assert {atoms.info["model"].split("-")[0] + "-" for atoms in good} == {model}
    assert all(np.isfinite(atoms.info["enthalpy"]) for atoms in good)
    ranking = (cluster_search / "results/anharmonic/ranking.csv").read_text()
    assert model in ranking and "unconverged" in ranking, "every free energy is of that model"
    again = magus(cluster_search, "search", "-r")
    assert again.returncode == 0, again.stdout[-3000:]


@pytest.mark.parametrize(
    ("system", "commands"),
    [("LSF", {"bsub", "bwait"}), ("SLURM", {"sbatch", "salloc"}), ("PBS", {"qsub", "qstat"})],
)
def test_labels_come_back_through_the_queue_system(cluster_search, queue, system, commands):
    result = magus(cluster_search, "search", "-m", JOB_SYSTEM=system)
    assert result.returncode == 0, result.stdout[-3000:]
    assert {line.split()[0] for line in queue.read_text().splitlines()} == commands
    check_labels_by_emt(cluster_search)


@pytest.mark.real_slurm
@pytest.mark.skipif(bool(real_slurm.missing()), reason=f"skipped: {real_slurm.missing()}")
def test_labels_come_back_through_slurm_itself(cluster_search, queue, tmp_path, monkeypatch):
    played = queue.parent / "queue"
    real = [part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != played]
    monkeypatch.setenv("PATH", os.pathsep.join(real))
    (folder := tmp_path / "slurm").mkdir()
    with real_slurm.slurm(folder) as configuration:
        given = {"JOB_SYSTEM": "SLURM", "SLURM_CONF": str(configuration)}
        result = magus(cluster_search, "search", "-m", **given)
    assert result.returncode == 0, result.stdout[-3000:]
    assert not queue.exists(), "SLURM's own commands were called"
    check_labels_by_emt(cluster_search)


def test_a_repeated_round_sends_no_job_for_labels_that_it_has(cluster_search, queue):
    """MAGUS's restart repeats its last round; each label is hours of a cluster."""
    file = cluster_search / "input.yaml"
    file.write_text(file.read_text().replace("numGen: 1", "numGen: 2"))
    assert magus(cluster_search, "search", "-m", JOB_SYSTEM="LSF").returncode == 0
    sent = queue.read_text()
    again = magus(cluster_search, "search", "-m", "-r", JOB_SYSTEM="LSF")
    assert again.returncode == 0, again.stdout[-3000:]
    assert [line for line in queue.read_text().splitlines() if line.startswith("bsub")] == [
        line for line in sent.splitlines() if line.startswith("bsub")
    ]
    assert len(read_jsonl(cluster_search / "results/anharmonic/metrics.jsonl")) == 2


def test_a_failed_job_hands_back_stale_labels_and_they_are_not_taken(cluster_search):
    """The fault: `read_parallel_results` reads the optPop.traj of the batch before when a job ends
    without output."""
    assert magus(cluster_search, "search", "-m", JOB_SYSTEM="LSF").returncode == 0
    folder = cluster_search / "calcFold/Toy"
    stale = [atoms for file in sorted(folder.glob("0?/optPop.traj")) for atoms in read(file, ":")]
    assert len(stale) == 4
    (folder / "crash").touch()
    file = cluster_search / "input.yaml"
    file.write_text(file.read_text().replace("seed: 3", "seed: 4"))
    result = magus(cluster_search, "search", "-m", JOB_SYSTEM="LSF")
    back = [
        atoms.info["id"]
        for part in sorted(folder.glob("0?/optPop.traj"))
        for atoms in read(part, ":")
    ]
    assert back == [atoms.info["id"] for atoms in stale], "MAGUS does not remove it"
    asked = {
        atoms.info["id"]
        for part in sorted(folder.glob("0?/initPop.traj"))
        for atoms in read(part, ":")
    }
    assert asked.isdisjoint(back)
    assert not (cluster_search / "results/anharmonic/labels/gen001.xyz").exists(), result.stdout[
        -2000:
    ]
    failed = read_jsonl(cluster_search / "results/anharmonic/failures.jsonl")
    assert len(failed) == 4, result.stdout[-2000:]
