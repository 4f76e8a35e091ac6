"""A search on a free energy: what SSCHA certifies, what the table says, and models that do not
belong to the input."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ranking_fakes import Emt, shifted

from magus_anharmonic.energy_surface import FreeEnergySurface
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.generation import SearchState, after_generation
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.ranking.evaluators import require_surface
from magus_anharmonic.ranking.store import FreeEnergyStore
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.structures import stripped

MOTION = 0.19
"""eV/atom that `shifted` adds to the enthalpy, without its finite-size term."""
KEYS = {
    "pressure": 10.0,
    "symbols": ["Al"],
    "sscha": {"evaluator": "ase.calculators.emt.EMT", "hessian": 0, "allocation": "fixed"},
}


class Model:
    """A free-energy model that errs by ``off`` (eV/atom, by volume of an atom) and expects
    ``error``."""

    model_id, device = "f1f1f1f1f1f1", "cpu"

    def __init__(self, off, error=1e-3):
        self.off, self.error = off, error
        self.surface = FreeEnergySurface(0.0, {"Al": 26.982}, [2, 2, 2], "emt")

    def evaluate(self, structures):
        found = Emt().evaluate(structures)
        sizes = np.array([len(atoms) for atoms in structures])
        volumes = [round(atoms.get_volume() / len(atoms)) for atoms in structures]
        off = np.array([self.off.get(volume, 0.0) for volume in volumes])
        error = None if self.error is None else np.full(len(structures), self.error)
        return Evaluation(found.energy + sizes * (MOTION + off), found.forces, found.stress, error)


def crystals():
    """Four of 14 to 17 A^3 per atom; their enthalpies grow with that, 40 meV/atom and more."""
    return [bulk("Al", "fcc", a=(4 * volume) ** (1 / 3)) for volume in (14, 15, 16, 17)]


def ranked(model, folder, n=4, **sscha):
    settings = parse_settings({**KEYS, "sscha": {**KEYS["sscha"], **sscha}})
    tools = {"certifier": Emt("emt"), "free_energy": shifted, "workers": 1}
    state = SearchState(settings, folder, model, 1, relaxation_steps=0, **tools)
    survivors = [stripped(atoms) for atoms in crystals()[:n]]
    after_generation(state, [], survivors, 1, last=True)
    assert {atoms.info["model"] for atoms in survivors} == {model.model_id}
    return read_ranking(folder / "ranking.csv")


def n_runs(folder):
    return len(read_jsonl(folder / "calls.jsonl", ("folder",)))


def test_the_table_has_g_by_the_model_and_by_sscha_where_it_was_certified(tmp_path):
    best, *others = ranked(Model({}), tmp_path)
    assert best.rank_quantum == 1 and best.status == "converged"
    for row in (best, *others):
        assert row.gibbs_predicted == pytest.approx(row.enthalpy + MOTION, abs=2e-6)
        assert row.gibbs_predicted_error == pytest.approx(1e-3)
        assert row.predicted_by == Model.model_id and row.model == "emt"
    assert best.free_energy.gibbs_raw == pytest.approx(best.gibbs_predicted, abs=2e-6)
    assert {row.status for row in others} == {"estimated"} and n_runs(tmp_path) == 1
    # as far above the best as the model says, and the finite-size term of the certified ones
    assert others[0].gibbs - best.gibbs == pytest.approx(
        others[0].gibbs_predicted - best.gibbs_predicted, abs=5e-4
    )


def test_what_may_be_lower_is_certified_until_the_best_is(tmp_path):
    """The model takes the third crystal (84 meV/atom above the first) for the lowest."""
    wrong = Model({16: -0.2}, error=0.01)
    first = ranked(wrong, tmp_path / "one")[0]
    assert n_runs(tmp_path / "one") == 2  # that one, then the lowest of the others
    assert first.enthalpy == min(row.enthalpy for row in read_ranking(tmp_path / "one/ranking.csv"))
    assert first.rank_quantum == 1 and first.free_energy.gibbs_raw is not None
    unsure = Model({}, error=0.025)
    ranked(unsure, tmp_path / "two")
    assert n_runs(tmp_path / "two") == 2  # the second is 41 meV/atom above: within 2 x 35
    ranked(Model({}, error=None), tmp_path / "three", max_candidates=3)
    assert n_runs(tmp_path / "three") == 3  # no estimate: as many as are allowed


def test_a_ranking_that_is_done_again_runs_nothing(tmp_path):
    before = ranked(Model({16: -0.2}, error=0.01), tmp_path)
    assert ranked(Model({16: -0.2}, error=0.01), tmp_path) == before and n_runs(tmp_path) == 2


def test_the_calibration_is_the_rms_of_difference_over_expected_error(tmp_path, caplog):
    off = {14: 2e-3, 15: -3e-3}
    with caplog.at_level(logging.INFO):
        ranked(Model(off, error=2e-3), tmp_path / "good", n=2)
    (run,) = FreeEnergyStore(tmp_path / "good" / "free_energies.db").runs()
    assert run.predicted - run.free_energy.gibbs_raw == pytest.approx(2e-3)
    ratio = 2e-3 / np.hypot(2e-3, 1e-4)
    assert f"{2.0:.2f} meV/atom (rms) from the model, {ratio:.2f} times" in caplog.text
    assert "not within" not in caplog.text
    with caplog.at_level(logging.INFO):
        ranked(Model(off, error=5e-4), tmp_path / "bad", n=2)
    assert "3.92 times what is expected: not within 0.7 to 1.4" in caplog.text


def test_a_run_that_goes_on_says_nothing_of_the_model(tmp_path):
    """Its earlier populations may be among the labels by then."""
    from magus_anharmonic.ranking.certify import calibration

    ranked(Model({}), tmp_path)
    (run,) = FreeEnergyStore(tmp_path / "free_energies.db").runs()
    assert calibration([run, run]).n == 1
    assert calibration([replace(run, predicted=None, predicted_error=None)]).n == 0
    assert calibration([run.updated(status="eliminated")]).ratio is None


BLOCK = {"calculator": "mattersim", "surface": "free-energy", "checkpoint": "h3s-gpaw-small"}
LABELER = {"calculator": "sscha", "evaluator": "h3s-gpaw-small", "supercell": [2, 2, 2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sscha": {}}, "sscha.evaluator: with surface: free-energy SSCHA certifies"),
        ({"sscha": {"evaluator": "a.pth", "temperature": [0, 300]}}, "one temperature"),
        ({"learning": {"labeler": {"calculator": "gpaw"}}}, "the labels are free energies"),
        ({"learning": {"labeler": LABELER, "select": "sscha"}, "sscha": {"evaluator": "a.pth"}},
         "take uncertain"),
        ({"MainCalculator": {**BLOCK, "surface": "static"}, "learning": {"labeler": LABELER}},
         "add surface: free-energy"),
        ({"MLCalculator": BLOCK}, "without -m"),
        ({"MainCalculator": {**BLOCK, "checkpoint": "scratch"}, "learning": {"labeler": LABELER}},
         "begins from its potential"),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_named(changes, words):
    with pytest.raises(InputError, match=words):
        parse_settings({"MainCalculator": BLOCK, **changes})


def test_labels_go_where_the_model_knows_least_unless_the_input_says_otherwise():
    for own, rule in (({}, "uncertain"), ({"select": "random"}, "random")):
        found = parse_settings({"MainCalculator": BLOCK, "learning": {"labeler": LABELER, **own}})
        assert found.learning.select == rule
    assert parse_settings({"learning": {"labeler": LABELER}}).learning.select == "random"


def h3s_model(**changes):
    model = Model({})
    known = {"temperature": 0.0, "masses": {"H": 1.008, "S": 32.06}, "supercell": [2, 2, 2]}
    model.surface = FreeEnergySurface(**{**known, "potential": "p0", **changes})
    return model


@pytest.mark.parametrize(
    ("model", "sscha", "words"),
    [
        ({"temperature": 300.0}, {}, "temperature 300 and 0 K"),
        ({}, {"temperature": 300}, "temperature 0 and 300 K"),
        ({"masses": {"H": 2.014, "S": 32.06}}, {}, "mass of H 2.014 and 1.008 amu"),
        ({}, {"supercell": [3, 2, 2]}, "sscha.supercell: "),
    ],
)
def test_a_model_of_other_conditions_than_the_input_s_is_refused_by_name(model, sscha, words):
    given = {"MainCalculator": BLOCK, "symbols": ["H", "S"]}
    settings = parse_settings({**given, "sscha": {"evaluator": "h3s-gpaw-small", **sscha}})
    with pytest.raises(InputError, match=words):
        require_surface(h3s_model(**model), settings)
    with pytest.raises(InputError, match="it knows no motion"):
        require_surface(Emt(), settings)
    require_surface(
        h3s_model(), parse_settings({**given, "sscha": {"evaluator": "h3s-gpaw-small"}})
    )


def test_structures_of_other_masses_than_the_model_s_are_refused():
    deuterium = FreeEnergySurface(0.0, {"H": 2.014, "S": 32.06}, [2, 2, 2], "p0")
    atoms = Atoms("SH", positions=[[0, 0, 0], [0, 0, 1.5]], cell=[3, 3, 3], pbc=True)
    with pytest.raises(InputError, match="mass of H 2.014 and 1.008 amu"):
        deuterium.require([atoms])
    atoms.set_masses([32.06, 2.014])
    deuterium.require([atoms])
