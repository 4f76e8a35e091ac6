"""The other commands of MAGUS with our calculator: generate, calculate, -p, -m -r, and their refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from magus_run import LEARNING, magus, needs_magus, ours, write_input

from magus_anharmonic.files import read_jsonl
from magus_anharmonic.units import gpa_to_ev_per_a3

pytestmark = needs_magus

STATIC = {"Fitness": ["Enthalpy"], "numGen": 1}


def static_input(folder: Path, **changes) -> None:
    write_input(folder, **{**STATIC, **changes})
    text = (folder / "input.yaml").read_text()
    lines, skipping = [], False
    for line in text.splitlines():
        skipping = line.startswith("sscha:") or (skipping and line.startswith(" "))
        if not skipping:
            lines.append(line)
    (folder / "input.yaml").write_text("\n".join(lines) + "\n")


def test_generated_structures_are_relaxed_and_evaluated_at_the_pressure(work: Path, tiny_checkpoint: Path) -> None:
    static_input(work, MainCalculator=ours(max_step=3))
    result = magus(work, "generate", "-n", "3", "-o", "gen.traj")
    assert result.returncode == 0, result.stdout[-2000:]
    assert len(read(work / "gen.traj", ":")) == 3
    for mode in ("relax", "scf"):
        result = magus(work, "calculate", "gen.traj", "-m", mode, "-p", "20", "-o", f"{mode}.traj")
        assert result.returncode == 0, result.stdout[-2000:]
    from magus_anharmonic.potential import load

    potential = load(tiny_checkpoint, device="cpu")
    for atoms in [*read(work / "scf.traj", ":"), *read(work / "relax.traj", ":")]:
        energy = potential.evaluate([atoms]).energy[0]
        assert atoms.info["energy"] == pytest.approx(energy, abs=1e-4)
        expected = (energy + gpa_to_ev_per_a3(20.0) * atoms.get_volume()) / len(atoms)
        assert atoms.info["enthalpy"] == pytest.approx(expected, abs=1e-4)
    assert len(read(work / "relax.traj", ":")) == 3


def test_parallel_mode_works_on_the_cpu_where_magus_s_own_calculators_cannot(work: Path) -> None:
    """The fault: every ASECalculator of MAGUS 2.0.1 holds a class made inside its constructor, which does not pickle."""
    static_input(work, MainCalculator={"calculator": "emt", "jobPrefix": "EMT"}, num_para_generator=2, num_para_calc=2)
    stock = magus(work, "search", "-p")
    assert stock.returncode != 0 and "MagusOptimizer" in stock.stdout, "if MAGUS has mended it, docs/magus.md can say so"
    static_input(work, MainCalculator=ours(device="cpu"), num_para_generator=2, num_para_calc=2)
    result = magus(work, "search", "-p")
    assert result.returncode == 0, result.stdout[-3000:]
    good = read(work / "results/good.traj", ":")
    assert good and np.isfinite([atoms.info["enthalpy"] for atoms in good]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MainCalculator": ours(device="cuda")}, "MainCalculator.device: cuda cannot be used by the forked workers"),
        ({"MainCalculator": ours(device="cpu"), "scheduler": "tcp://127.0.0.1:8786"}, "scheduler: tcp://127.0.0.1:8786 does not go with"),
    ],
)
def test_parallel_mode_is_refused_with_a_gpu_and_with_workers_elsewhere(work: Path, changes: dict, words: str) -> None:
    static_input(work, **changes)
    result = magus(work, "search", "-p")
    assert result.returncode == 2 and words in result.stdout and "Traceback" not in result.stdout, result.stdout[-2000:]
    assert not (work / "results").exists()


def test_a_restart_of_the_ml_mode_trains_nothing_again(work: Path) -> None:
    """The fault: MLMagus repeats its whole initial training on a restart unless ``init_times`` is 0, as ours is."""
    learning = {**LEARNING, "labeler": {"calculator": "main"}}
    main = {"calculator": "emt", "jobPrefix": "EMT"}
    static_input(work, MainCalculator=main, MLCalculator=ours("ML"), SelectDFTScf=True, learning=learning, numGen=2)
    first = magus(work, "search", "-m")
    assert first.returncode == 0, first.stdout[-3000:]
    labels = (work / "results/anharmonic/labels/gen001.xyz").read_bytes()
    metrics = read_jsonl(work / "results/anharmonic/metrics.jsonl")
    again = magus(work, "search", "-m", "-r")
    assert again.returncode == 0, again.stdout[-3000:]
    # MAGUS repeats its last round (2); nothing before it is done again.
    assert (work / "results/anharmonic/labels/gen001.xyz").read_bytes() == labels
    assert {path.name for path in (work / "results/anharmonic/labels").glob("gen*.xyz")} == {"gen001.xyz", "gen002.xyz"}
    assert read_jsonl(work / "results/anharmonic/metrics.jsonl")[0] == metrics[0]


def test_missing_free_energies_are_last_in_the_summary(work: Path) -> None:
    from ase.build import bulk
    from ase.io import write

    frames = [bulk("Al", a=a) for a in (4.0, 4.1, 4.2)]
    for atoms, value in zip(frames, (-1.0, None, -2.0), strict=True):
        atoms.info.update(enthalpy=0.0, free_energy_status="sscha" if value else "static")
        if value is not None:
            atoms.info["free_energy"] = value
    write(work / "some.traj", frames)
    result = magus(work, "summary", "some.traj", "-a", "free_energy", "-sb", "free_energy")
    shown = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])]
    assert shown[:2] == [-2.0, -1.0] and np.isnan(shown[2]), result.stdout


def test_a_log_line_with_magus_s_words_breaks_its_restart(work: Path) -> None:
    """The fault: a restart takes the last line of log.txt that holds a word. Ours never do (tests/test_architecture.py)."""
    static_input(work, MainCalculator=ours(max_step=1))
    assert magus(work, "search").returncode == 0
    with (work / "log.txt").open("a") as file:
        file.write("a plug-in: volRatio of the sample is fine\n")
    result = magus(work, "search", "-r")
    assert result.returncode != 0 and "could not convert string to float" in result.stdout
