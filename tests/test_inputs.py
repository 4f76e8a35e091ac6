"""Every input that is shipped passes the checks a run would make, and says what its folder
promises."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase.io import read
from sscha_models import averaged_anew

from magus_anharmonic.learning.dataset import read_labels
from magus_anharmonic.potential import load
from magus_anharmonic.settings import load_settings, parse
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.state import displaced

INPUTS = Path(__file__).parent.parent / "inputs"
SEARCHES = sorted(
    [
        *INPUTS.glob("*/input.yaml"),
        *INPUTS.glob("h3s-paper/*/input-*.yaml"),
        INPUTS / "h3s-paper" / "search-100GPa.yaml",
    ]
)
PAPER = sorted(INPUTS.glob("h3s-paper/*/input-*.yaml"))


def label(path):
    return str(path.relative_to(INPUTS))


@pytest.mark.parametrize("path", SEARCHES, ids=label)
def test_every_search_input_is_valid(path):
    settings = load_settings(path)
    assert settings.calculator is not None
    assert settings.num_gen and settings.symbols


@pytest.mark.parametrize("path", PAPER, ids=label)
def test_the_paper_inputs_hold_the_numbers_of_the_paper(path):
    settings = load_settings(path)
    assert settings.pressure == (75 if "75GPa" in path.name else 125)
    learning, sscha = settings.learning, settings.sscha
    assert learning is not None and sscha is not None and settings.calculator is not None
    assert (learning.n_sample, learning.n_perturb, learning.n_replay, learning.split) == (
        10,
        10,
        100,
        (8, 1, 1),
    )
    assert (
        learning.atom_displacement,
        learning.strain,
        learning.epochs,
        learning.learning_rate,
    ) == (0.05, 0.05, 50, 2e-4)
    assert (sscha.n_configs, sscha.max_populations, sscha.supercell, sscha.max_candidates) == (
        1000,
        30,
        (2, 2, 2),
        100,
    )
    assert (settings.host["popSize"], settings.num_gen, settings.host["randRatio"]) == (
        1000,
        10,
        0.9,
    )
    assert (settings.host["min_n_atoms"], settings.host["max_n_atoms"]) == (4, 32)
    assert settings.calculator.checkpoint == "mattersim-v1.0.0-1M"


def test_both_pressures_exist_for_both_ways_and_differ_in_nothing_else():
    assert len(PAPER) == 4
    for folder in ("one-gpu-job", "magus-jobs"):
        low, high = (
            yaml.safe_load((INPUTS / "h3s-paper" / folder / f"input-{p}GPa.yaml").read_text())
            for p in (75, 125)
        )
        assert {**low, "pressure": 125} == high


def test_vasp_labels_have_the_settings_of_the_paper_in_both_ways():
    settings = load_settings(INPUTS / "h3s-paper" / "one-gpu-job" / "input-75GPa.yaml")
    assert settings.learning is not None
    labeler = settings.learning.labeler
    assert (
        labeler.calculator,
        labeler.arguments["xc"],
        labeler.arguments["encut"],
        labeler.k_spacing,
    ) == ("vasp", "PBE", 500, 0.03)
    lines = (
        (INPUTS / "h3s-paper" / "magus-jobs" / "inputFold" / "VASP" / "INCAR")
        .read_text()
        .splitlines()
    )
    incar = {
        key.strip(): value.strip()
        for key, value in (line.split("=") for line in lines if "=" in line)
    }
    assert float(incar["ENCUT"]) == 500
    assert float(incar["KSPACING"]) == pytest.approx(2 * 3.14159265 * 0.03, abs=1e-4)
    same = {
        "PREC": "prec",
        "EDIFF": "ediff",
        "NELM": "nelm",
        "ISMEAR": "ismear",
        "SIGMA": "sigma",
        "NCORE": "ncore",
    }
    for tag, argument in same.items():
        given = labeler.arguments[argument]
        assert incar[tag] == given if isinstance(given, str) else float(incar[tag]) == given


def test_under_m_the_labels_are_magus_own_and_the_folders_differ():
    settings = load_settings(INPUTS / "h3s-paper" / "magus-jobs" / "input-75GPa.yaml")
    assert settings.learning is not None and settings.learning.labeler.calculator == "main"
    assert settings.host["SelectDFTScf"] is True and settings.host["poolSize"]
    assert settings.main_calculator["calculator"] == "vasp"
    assert settings.main_calculator["jobPrefix"] != settings.ml_calculator["jobPrefix"]


def test_the_final_model_is_trained_in_the_two_stages_of_the_paper():
    from magus_anharmonic.potential.train import TrainRecipe

    recipe = parse(TrainRecipe, yaml.safe_load((INPUTS / "h3s-paper" / "final.yaml").read_text()))
    assert [
        (s.epochs, s.learning_rate, s.force_loss_ratio, s.stress_loss_ratio) for s in recipe.stages
    ] == [(100, 1e-3, 1.0, 1.0), (100, 1e-3, 0.1, 0.1)]


@pytest.mark.parametrize("path", sorted(INPUTS.glob("**/job.*")), ids=label)
def test_the_job_scripts_are_shell_that_calls_stock_magus(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    text = path.read_text()
    assert (
        "magus search -m" in text if path.parent.name == "magus-jobs" else "magus search -i" in text
    )
    assert ("#SBATCH" in text) == (path.suffix == ".slurm") and ("#BSUB" in text) == (
        path.suffix == ".lsf"
    )


def test_the_oxide_example_is_marked_as_not_run():
    settings = load_settings(INPUTS / "batio3" / "input.yaml")
    assert settings.sscha is not None and settings.sscha.temperatures == (0, 100, 200, 300, 400)
    text = (INPUTS / "batio3" / "README.md").read_text()
    assert "not run here" in text and "LO-TO" in text


@pytest.mark.parametrize("path", sorted(INPUTS.glob("h3s-*/campaign.yaml")), ids=label)
def test_every_campaign_is_valid_and_has_the_steps_of_the_paper(path):
    from magus_anharmonic.campaign.run import WHAT
    from magus_anharmonic.campaign.steps import plan
    from magus_anharmonic.campaign.structures import phases_of
    from magus_anharmonic.settings.campaign import load_campaign

    settings = load_campaign(path)
    assert {"Im-3m": 229, "R3m": 160}.items() <= {
        phase.name: phase.number for phase in phases_of(settings.phases)
    }.items()
    kinds = {step.kind for step in plan(settings)}
    assert WHAT.keys() - {"errors"} <= kinds


def test_alh3_begins_with_nothing_and_is_labelled_alike_everywhere():
    """No foundation and no phase in its searches; one labeler; the phases of the literature are
    what their names say."""
    from magus_anharmonic.campaign.steps import plan
    from magus_anharmonic.campaign.structures import phases_of
    from magus_anharmonic.paper.ensemble_errors import load_labeler_settings
    from magus_anharmonic.settings.campaign import load_campaign
    from magus_anharmonic.settings.phase_diagram import load_phase_diagram

    folder = INPUTS / "alh3"
    settings = load_campaign(folder / "campaign.yaml")
    assert settings.from_scratch and settings.merge.dataset is None
    assert settings.labeler == load_labeler_settings(folder / "campaign.yaml"), "rank --truth"
    found = {phase.name: phase.number for phase in phases_of(settings.phases)}
    assert found == {"Pm-3n": 223, "R-3c": 167}
    kinds = {step.kind for step in plan(settings)}
    assert {"learn", "merge", "final", "produce", "relax", "sscha", "hessian"} <= kinds
    diagram = load_phase_diagram(folder / "phase-diagram.yaml")
    assert set(diagram.phases) == {*found, "P6_322"} and diagram.checkpoint.endswith(
        "final/final.pth"
    )


def test_the_campaign_of_the_paper_holds_the_numbers_of_the_paper():
    from magus_anharmonic.settings import parse_settings
    from magus_anharmonic.settings.campaign import load_campaign

    settings = load_campaign(INPUTS / "h3s-paper" / "campaign.yaml")
    assert (
        settings.learning
        and settings.produce
        and settings.relax
        and settings.sscha
        and settings.hessian
        and settings.dft
    )
    assert settings.learning.pressures == [75, 125]
    for pressure in settings.learning.pressures:
        one = load_settings(INPUTS / "h3s-paper" / "one-gpu-job" / f"input-{pressure:g}GPa.yaml")
        ours = parse_settings(settings.learning_search(pressure, "mattersim-v1.0.0-1M"))
        assert (
            ours.learning == one.learning
            and ours.host == one.host
            and ours.num_gen == one.num_gen == 10
        )
    stages = [
        (s.epochs, s.learning_rate, s.force_loss_ratio, s.stress_loss_ratio)
        for s in settings.final.stages
    ]
    assert stages == [(100, 1e-3, 1.0, 1.0), (100, 1e-3, 0.1, 0.1)]
    production = parse_settings(settings.production_search(100, "final.pth"))
    assert (
        settings.produce.pressures == [50, 100, 150]
        and production.host["popSize"] * (production.num_gen or 0) > 10_000
    )
    assert (settings.relax.pressures[0], settings.relax.pressures[-1]) == (50, 200)
    ranking = settings.ranking_settings(100, "final.pth").sscha
    assert ranking and settings.sscha.pressures == [100]
    assert (
        ranking.max_candidates,
        ranking.n_configs,
        ranking.max_populations,
        ranking.supercell,
    ) == (100, 1000, 30, (2, 2, 2))
    hessian = settings.hessian
    assert (hessian.supercell, hessian.n_configs, hessian.max_populations) == ((3, 3, 3), 1000, 20)
    assert (hessian.pressures[0], hessian.pressures[-1], hessian.dispersions) == (50, 250, [60])
    assert settings.dft.max_structures is None, "every candidate that changed"


def test_the_small_campaign_makes_sixty_labels():
    from magus_anharmonic.settings import LearningSettings
    from magus_anharmonic.settings.campaign import load_campaign

    settings = load_campaign(INPUTS / "h3s-small" / "campaign.yaml")
    assert (
        settings.learning
        and settings.labeler
        and settings.labeler.calculator == "gpaw"
        and settings.foundation == "h3s-gpaw-small"
    )
    learning = parse(LearningSettings, {**settings.learning.settings, "labeler": settings.labeler})
    rounds = len(settings.learning.pressures) * settings.search["numGen"]
    assert rounds * learning.n_sample * learning.n_perturb >= 60


def test_the_alh3_model_has_the_sscha_free_energy_and_modes_of_pw():
    """Pm-3n in its 8-atom cell at 110 GPa, by 40 labels of pw.x that no model was trained on."""
    folder = INPUTS / "alh3"
    pw, state, ensemble = averaged_anew(folder / "pw")
    assert pw.converged and pw.n_evaluations == 40

    model = load(folder / "alh3-pw-small.pth")
    cell = {"supercell": (1, 1, 1), "cell": "fixed", "n_configs": 400}
    mine = free_energy(read(folder / "pm-3n.vasp"), model, pw.target_pressure, **cell)
    assert abs(mine.gibbs - pw.gibbs) < 0.010, "eV/atom, the target of the model"
    modes = [one.state.modes.hbar_omega for one in (mine, pw)]
    assert np.abs(modes[0] - modes[1]).mean() < 0.004 and modes[0].min() > 0.045  # eV
    assert np.abs(modes[0] - modes[1]).max() < 0.010

    forces = np.array(model.evaluate(displaced(state, ensemble.displacements)).forces)
    error = np.sqrt(np.mean((forces.reshape(ensemble.forces.shape) - ensemble.forces) ** 2))
    assert error < 0.15 < 0.2 * np.sqrt(np.mean(ensemble.forces**2)), "eV/A"


def test_the_alh3_labels_are_of_one_setting_and_no_phase_is_on_two_sides():
    labels = read_labels(INPUTS / "alh3" / "labels.xyz")
    assert len(labels) <= 400
    assert {atoms.info["settings_hash"] for atoms in labels} == {"fe620b73f131"}
    assert sum(atoms.info["seconds"] for atoms in labels) < 6 * 3600.0
    sides = {(atoms.info["family"], atoms.info["side"]) for atoms in labels}
    assert len(sides) == len({family for family, _ in sides})
