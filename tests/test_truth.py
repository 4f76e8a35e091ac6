"""G of DFT from a few dozen labels: against SSCHA that is driven by the "DFT" itself."""

import json

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.io import write
from ase.stress import full_3x3_to_voigt_6_stress
from crystal_models import Crystals, crystal
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.generation import after_generation, start
from magus_anharmonic.learning.dataset import read_labels
from magus_anharmonic.paper.truth import labels_of
from magus_anharmonic.potential import load
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.runs.record import read_failures
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.structures import structure_id

MODEL = [
    crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0),
    crystal((2.8,) * 3, 1.1, 0.2, -0.2, 1.2, depth=-0.02),
]
DFT = [
    crystal((3.03,) * 3, 1.05, 0.21, -0.28, 1.05, depth=-0.03),
    crystal((2.77,) * 3, 1.05, 0.19, -0.22, 1.15),
]
"""Other stiffness, other volume, and the other order."""
SSCHA = {"n_configs": 1000, "reference_spacing": 0.5, "hessian": 0, "keep_best": 2}


class Reference(Calculator):
    """The crystals of `DFT` as an ASE calculator; ``refuse``: fails for the phase with this
    number."""

    implemented_properties = ["energy", "forces", "stress"]

    def __init__(self, refuse=None):
        super().__init__()
        self.refuse = refuse

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        model = Crystals(DFT)
        if self.refuse is not None and self.atoms.get_volume() / len(self.atoms) < 12.5:
            raise ValueError("the density does not converge")
        found = model.evaluate([self.atoms])
        self.results = {
            "energy": float(found.energy[0]),
            "forces": found.forces[0],
            "stress": full_3x3_to_voigt_6_stress(found.stress[0]),
        }


def with_truth(calculator, arguments=None, **keys):
    block = {"calculator": calculator, "arguments": arguments or {}, "n_workers": 1}
    sscha = {**SSCHA, "truth": block, **keys}
    return parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": sscha})


def ranked(folder, wanted=1e-3, **arguments):
    settings = with_truth("test_truth.Reference", arguments, truth_error=wanted)
    truth = labels_of(settings, folder)
    structures = [one.atoms for one in MODEL]
    return rank_structures(
        structures, Crystals(MODEL), settings, folder, relax=False, workers=1, truth=truth
    )


def test_the_ranking_is_that_of_the_dft_with_its_own_free_energies(tmp_path):
    """The model has the other order. Each G is that of SSCHA with the DFT itself, to 1 meV/atom
    and within its error, from at most 61 labels; the first order alone is too high."""
    table = ranked(tmp_path)
    assert [row.id for row in table] == [structure_id(one.atoms) for one in MODEL]
    assert [row.rank_static for row in table] == [2, 1] and table[0].p_lowest_total > 0.99
    options = {"n_configs": 4000, "reference_spacing": 0.5, "seed": 7}
    above = []
    for row, one in zip(table, DFT, strict=True):
        direct = free_energy(one.atoms, Crystals(DFT), **options)
        error = np.hypot(row.gibbs_error, row.model_correction_error)
        assert row.model_correction_error <= 1e-3
        error = np.hypot(error, direct.gibbs_error)
        assert row.gibbs == pytest.approx(direct.gibbs, abs=min(2.5 * error, 1.2e-3))
        folder = tmp_path / "truth" / row.sscha_folder
        assert 21 <= len(read_labels(folder / "labels.xyz")) <= 61
        found = json.loads((folder / "errors.json").read_text())["correction_eV_per_atom"]
        above.append(row.gibbs - found["second_order"] - direct.gibbs)
    assert min(above) > 5e-4 and np.mean(above) > 1e-3, "Gibbs-Bogoliubov: an upper bound"


def test_labels_that_fail_are_named_and_the_others_are_kept_for_the_next_call(tmp_path):
    few = ranked(tmp_path, wanted=1.0, refuse=True)
    reasons = [record["reason"] for record in read_failures(tmp_path) if record["stage"] == "truth"]
    assert len(reasons) == 1 and "the density does not converge" in reasons[0]
    labelled = [row for row in few if row.model_correction is not None]
    assert [row.id for row in labelled] == [structure_id(MODEL[0].atoms)]


@pytest.mark.parametrize(
    ("calculator", "words"),
    [
        ("nowhere.Dft", "sscha.truth.calculator.*nowhere"),
        ("sscha", "sscha.*truth: calculator: sscha labels free energies"),
        ("main", "sscha.*truth: calculator: main"),
    ],
)
def test_a_truth_that_cannot_be_is_refused_before_anything_is_ranked(tmp_path, calculator, words):
    with pytest.raises(InputError, match=words):
        labels_of(with_truth(calculator), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_ranking_never_forgets_the_truth_that_its_settings_ask_for(tmp_path):
    with pytest.raises(InputError, match="sscha.truth"):
        rank_structures([MODEL[0].atoms], Crystals(MODEL), with_truth("nowhere.Dft"), tmp_path)


def test_a_search_corrects_its_last_ranking_alone(tmp_path):
    """The crystals survive two rounds: none is labelled after the first, and after the second the
    order is that of the "DFT". The round done again makes no label."""
    settings = with_truth("test_truth.Reference").model_copy(update={"num_gen": 2})
    population = [one.atoms.copy() for one in MODEL]
    state = start(settings, tmp_path, Crystals(MODEL), seed=1)
    state.workers = 1
    after_generation(state, population, population, 1)
    assert not list(tmp_path.glob("truth/*/labels.xyz"))
    for _ in range(2):
        after_generation(state, population, population, 2)
        assert len(list(tmp_path.glob("truth/*/labels.xyz"))) == 2
    best = min(population, key=lambda atoms: atoms.info["gibbs"])
    (row, _) = read_ranking(tmp_path / "ranking.csv")
    assert row.id == structure_id(MODEL[0].atoms) and row.model_correction_error <= 1e-3
    assert best.info["gibbs"] == pytest.approx(row.gibbs, abs=1e-6)


def test_a_second_checkpoint_can_be_the_truth(tmp_path, tiny_checkpoint):
    """The potential corrected by itself has nothing to correct."""
    path = "magus_anharmonic.potential.calculator.MatterSim"
    model = {"checkpoint": str(tiny_checkpoint), "device": "cpu"}
    settings = with_truth(path, model, supercell=(1, 1, 1), n_configs=40, cell="fixed")
    found = rank_structures(
        [bulk("Si", cubic=True)],
        load(tiny_checkpoint, device="cpu"),
        settings,
        tmp_path,
        relax=False,
        workers=1,
        truth=labels_of(settings, tmp_path),
    )
    (row,) = found
    assert row.model_correction == pytest.approx(0.0, abs=1e-6)
    assert row.model_correction_error < 1e-6


def test_the_command_finds_nothing_to_correct_where_the_truth_is_the_model(tmp_path):
    """EMT ranked by EMT: the correction is zero, the labels are kept, and a second call makes
    none."""
    write(tmp_path / "cu.vasp", bulk("Cu"))
    (tmp_path / "dft.yaml").write_text(
        "labeler: {calculator: ase.calculators.emt.EMT, n_workers: 1}\n"
    )
    command = ["rank", str(tmp_path / "cu.vasp"), "--pressure", "0", "--calculator", "emt"]
    command += ["--truth", str(tmp_path / "dft.yaml"), "-o", str(tmp_path / "ranking")]
    command += ["--n-configs", "20", "--supercell", "2", "2", "2", "--hessian", "0"]
    for _ in range(2):
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
    (row,) = read_ranking(tmp_path / "ranking" / "ranking.csv")
    assert abs(row.model_correction) < 1e-9 and row.model_correction_error < 1e-9
    (file,) = (tmp_path / "ranking" / "truth").glob("*/labels.xyz")
    assert len(read_labels(file)) == 21
    command[command.index(str(tmp_path / "dft.yaml"))] = str(tmp_path / "nowhere.yaml")
    assert CliRunner().invoke(app, command).exit_code == 2
