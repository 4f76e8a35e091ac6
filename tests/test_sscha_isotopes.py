"""Isotopes: other masses on the configurations of the first run where they overlap, else two new
populations from its state."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from crystal_models import Crystals, crystal
from sscha_models import AnharmonicCell, QuarticPair, evaluated
from test_sscha_free_energy import PAIR, exact_pair, quartic

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.labelers.sscha import FixedCentroids
from magus_anharmonic.ranking.matcher import Fingerprint, same
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.search.population import symmetrised
from magus_anharmonic.search.relaxation import Relaxer
from magus_anharmonic.settings import AseCalculatorSettings, parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.engines import Pool
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.isotopes import overlap
from magus_anharmonic.sscha.qe_files import state_from_dyn, write_dyn
from magus_anharmonic.sscha.result import final_ensemble
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import (
    formula,
    isotopes,
    primitive,
    space_group,
    structure_id,
    with_isotopes,
)

DEUTERIUM = {"H": 2.014}
ONE_PER_CENT = {"H": 1.01 * PAIR.get_masses()[0]}
CRYSTAL = crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0)
FEW, MANY = (2, 2, 2), (3, 3, 3)
"""21 and 78 modes of hydrogen: ESS/N of H -> D is 0.39 and 0.03."""


def heavier(state, factor):
    atoms = state.atoms.copy()
    atoms.set_masses(atoms.get_masses() * factor)
    return replace(state, atoms=atoms)


def lattice(directory=None, supercell=FEW, **options):
    given = dict(supercell=supercell, n_configs=100, reference_spacing=0.1, directory=directory)
    return free_energy(
        CRYSTAL.atoms, options.pop("evaluator", None) or Crystals([CRYSTAL]), **{**given, **options}
    )


class Refused:
    """Says that it is the model of `Crystals`, and evaluates nothing."""

    model_id = Crystals([CRYSTAL]).model_id

    def evaluate(self, structures):
        raise AssertionError(f"{len(structures)} structures were to be evaluated")


# ---------------------------------------------------------------------------- averages with weights


def test_weights_of_one_are_none():
    cell = AnharmonicCell()
    state = cell.start(0.0)
    ensemble, symmetry = evaluated(state, cell, 40), Symmetry(state.atoms, state.supercell_matrix)
    plain, weighted = (
        average(state, ensemble, symmetry),
        average(state, ensemble, symmetry, np.full(40, 3.0)),
    )
    for name, value in vars(plain).items():
        assert getattr(weighted, name) == pytest.approx(value, rel=1e-10, abs=1e-14), name


@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_the_free_energy_of_other_masses_is_the_exact_one_within_its_error_bar(temperature):
    """Over 60 ensembles of the lighter crystal: no bias, and the scatter is the error bar. F is
    known in closed form."""
    cell = AnharmonicCell()
    light = cell.start(temperature)
    heavy, symmetry = heavier(light, 1.4), Symmetry(light.atoms, light.supercell_matrix)
    exact, pulls = cell.free_energy(heavy), []
    for seed in range(60):
        ensemble = evaluated(light, cell, 200, seed=seed)
        pool = Pool([(light, ensemble)], target=heavy)
        found = average(heavy, ensemble, symmetry, pool.weights(pool.own))
        assert found.helmholtz == pytest.approx(pool.at(pool.own).helmholtz, abs=1e-10)
        pulls.append((found.helmholtz - exact) / found.helmholtz_error)
    assert abs(np.mean(pulls)) < 0.4 and 0.75 < np.std(pulls) < 1.3


@pytest.mark.parametrize(("factor", "n_modes"), [(2.0, 21), (1.1, 21)])
def test_the_effective_sample_falls_as_gaussians_say(factor, n_modes):
    """All masses times a factor: every variance falls by its root at 0 K, and N_eff/N is the closed
    form to the power of modes."""
    cell = AnharmonicCell(cubic=True)
    light = cell.start(0.0)
    pool = Pool([(light, evaluated(light, cell, 8_000))], target=heavier(light, factor))
    weights, s = pool.weights(pool.own), factor**-0.5
    found = weights.sum() ** 2 / np.square(weights).sum() / len(weights)
    assert overlap(light, heavier(light, factor)) == pytest.approx(
        (s * np.sqrt(2.0 / s - 1.0)) ** n_modes
    )
    assert found == pytest.approx(overlap(light, heavier(light, factor)), rel=0.1)


# --------------------------------------------------------------------------------------------- runs


def test_one_per_cent_more_mass_costs_no_evaluation(tmp_path, caplog):
    hydrogen = lattice(tmp_path / "H")
    with caplog.at_level(logging.INFO, logger="magus_anharmonic.sscha"):
        found = lattice(
            tmp_path / "D", evaluator=Refused(), start=tmp_path / "H", masses=ONE_PER_CENT
        )
    assert found.converged and found.n_evaluations == found.n_populations == 0
    assert (
        "reweighted from the ensemble of H" in found.reason
        and "no new configurations" in caplog.text
    )
    assert found.gibbs < hydrogen.gibbs and found.centroids.get_masses()[1] == ONE_PER_CENT["H"]
    again = lattice(tmp_path / "D", evaluator=Refused(), start=tmp_path / "H", masses=ONE_PER_CENT)
    assert again.gibbs == found.gibbs, "and is there when it is asked for again"


def test_a_shift_by_isotopes_is_far_more_precise_than_either_free_energy(tmp_path):
    """Both come from the same configurations, so that what chance adds to one it adds to the
    other."""
    hydrogen = quartic(tmp_path / "H", n_configs=400)
    found = quartic(start=tmp_path / "H", masses=ONE_PER_CENT, n_configs=400)
    exact = exact_pair(ONE_PER_CENT["H"]) - exact_pair(PAIR.get_masses()[0])
    assert found.n_evaluations == 0
    assert found.gibbs_raw - hydrogen.gibbs_raw == pytest.approx(
        exact, abs=0.05 * found.gibbs_error
    )


def test_deuterium_of_few_modes_is_reweighted_to_the_exact_value(tmp_path):
    """The state moves: one half of the configurations leads there, the other half, which it has not
    seen, averages."""
    quartic(tmp_path / "H", n_configs=1000)
    found = quartic(start=tmp_path / "H", masses=DEUTERIUM, n_configs=1000)
    assert found.n_evaluations == 0 and found.converged
    assert found.gibbs_raw == pytest.approx(exact_pair(2.014), abs=4.0 * found.gibbs_error)


def test_deuterium_of_many_modes_needs_at_most_two_new_populations(tmp_path, caplog):
    lattice(tmp_path / "H", supercell=MANY)
    with caplog.at_level(logging.INFO, logger="magus_anharmonic.sscha"):
        found = lattice(tmp_path / "D", supercell=MANY, start=tmp_path / "H", masses=DEUTERIUM)
    assert (
        "reweighting the ensemble" in caplog.text
        and "ESS/N = 0.0" in caplog.text
        and "new populations" in caplog.text
    )
    assert found.converged and 1 <= found.n_populations <= 2
    response = 12
    assert found.n_evaluations == 100 * found.n_populations + response, "no harmonic start"


def test_deuterium_of_many_modes_costs_no_evaluation_with_a_surrogate(tmp_path):
    """Some 14 of 260 configurations count: too few for V - V_0, enough for V less the polynomial."""
    lattice(tmp_path / "H", supercell=MANY, n_configs=300)
    keys = {"supercell": MANY, "n_configs": 300, "masses": DEUTERIUM}
    given = {"evaluator": Refused(), "start": tmp_path / "H", "surrogate": "polynomial"}
    found = lattice(tmp_path / "D", **keys, **given)
    assert found.n_evaluations == 0 < found.n_surrogate and "correct the surrogate" in found.reason
    own = lattice(**{**keys, "n_configs": 200}, seed=1)
    assert own.n_evaluations > 200 and found.converged and own.converged
    error = np.hypot(found.gibbs_error, own.gibbs_error)
    assert found.gibbs_raw == pytest.approx(own.gibbs_raw, abs=4.0 * error)
    assert found.stress == pytest.approx(own.stress, abs=4.0 * np.abs(own.stress_error).max())
    again = lattice(tmp_path / "D", **keys, **given)
    assert again.gibbs == found.gibbs, "and is there when it is asked for again"


def test_too_few_configurations_or_a_surrogate_of_something_else_lead_to_new_ones(tmp_path, caplog):
    """Not to another free energy."""
    caplog.set_level(logging.INFO, logger="magus_anharmonic.sscha")
    keys = {"supercell": MANY, "masses": DEUTERIUM, "start": tmp_path / "H", "max_populations": 1}
    lattice(tmp_path / "H", supercell=MANY, n_configs=100)
    assert lattice(**keys, surrogate="polynomial").n_evaluations > 0
    assert "of 60 configurations count, 10 are needed" in caplog.text
    lattice(tmp_path / "more", supercell=MANY, n_configs=300)
    keys["start"] = tmp_path / "more"
    another = Crystals([crystal((3.0,) * 3, 1.5, 0.2, -0.3, 1.0)], "stiffer")
    assert lattice(**keys, surrogate=another).n_evaluations > 0


def test_a_label_of_deuterium_comes_from_that_of_hydrogen_whose_run_is_kept(tmp_path):
    arguments = {"temperature": 0.0, "supercell": [2, 2, 1], "n_configs": 200, "seed": 0}
    light = FixedCentroids(Crystals([CRYSTAL]), arguments, tmp_path)
    light.calculate(CRYSTAL.atoms)
    heavy = FixedCentroids(Refused(), {**arguments, "masses": DEUTERIUM}, tmp_path)
    heavy.calculate(CRYSTAL.atoms)
    assert heavy.label_info["n_evaluations"] == 0 < light.label_info["n_evaluations"]
    assert heavy.results["energy"] < light.results["energy"]
    alone = FixedCentroids(Crystals([CRYSTAL]), {**arguments, "masses": DEUTERIUM})
    alone.calculate(CRYSTAL.atoms)
    error = np.hypot(*(one.label_info["label_energy_error"] for one in (heavy, alone)))
    assert heavy.results["energy"] == pytest.approx(alone.results["energy"], abs=4.0 * error)


def test_what_is_another_besides_the_masses_is_not_reweighted(tmp_path):
    """Model, temperature, supercell; and a run whose configurations are gone."""
    lattice(tmp_path / "H")
    few = {"start": tmp_path / "H", "masses": ONE_PER_CENT, "max_populations": 1}
    assert lattice(evaluator=Crystals([CRYSTAL], "another"), **few).n_populations == 1
    assert lattice(temperature=300.0, **few).n_populations == 1
    assert lattice(supercell=(1, 1, 1), **few).n_populations == 1
    assert lattice(pressure=20.0, **few).n_populations == 1, "the cell has to change"
    assert lattice(error_tolerance=1e-6, **few).n_populations == 1, (
        "more precise than the ensemble is"
    )
    for path in (tmp_path / "H").glob("population_*"):
        path.unlink()
    assert lattice(**few).n_populations == 1


def test_the_ensemble_that_is_reweighted_is_the_last_one(tmp_path):
    """The one that no minimisation has seen."""
    hydrogen = quartic(tmp_path / "H", n_configs=100)
    ensemble = final_ensemble(tmp_path / "H", hydrogen)
    state = hydrogen.state
    heavy = state.atoms.copy()
    heavy.set_masses([ONE_PER_CENT["H"], heavy.get_masses()[1]])
    target = replace(state, atoms=heavy)
    pool = Pool([(state, ensemble)], target=target)
    averages = average(target, ensemble, Symmetry(heavy, (1, 1, 1)), pool.weights(pool.own))
    expected = (averages.helmholtz - averages.predicted_decrease) / 2.0
    found = quartic(start=tmp_path / "H", masses=ONE_PER_CENT, n_configs=100)
    assert found.gibbs_raw == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- masses that the Atoms carry


def with_hydrogen(mass, atoms=PAIR):
    return with_isotopes(atoms, {"H": mass})


def test_masses_of_the_atoms_hold_and_settings_go_before_them(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="magus_anharmonic"):
        carried = quartic(atoms=with_hydrogen(2.014), n_configs=400)
    assert "2.014" in caplog.text, "it is said"
    assert carried.gibbs_raw == pytest.approx(exact_pair(2.014), abs=4.0 * carried.gibbs_error)
    assert carried.gibbs == quartic(masses=DEUTERIUM, n_configs=400).gibbs
    natural = {"H": float(PAIR.get_masses()[0])}
    assert quartic(atoms=with_hydrogen(2.014), masses=natural).gibbs == quartic().gibbs
    assert carried.centroids.get_masses()[0] == 2.014
    write(tmp_path / "d.xyz", with_hydrogen(2.014), format="extxyz")
    assert quartic(atoms=read(tmp_path / "d.xyz"), n_configs=400).gibbs == carried.gibbs


def test_a_start_of_other_masses_takes_those_of_the_structure(tmp_path):
    heavy = quartic(tmp_path / "D", masses=DEUTERIUM)
    assert quartic(start=heavy).centroids.get_masses()[0] == pytest.approx(1.008)
    assert quartic(start=heavy, atoms=with_hydrogen(2.014)).centroids.get_masses()[0] == 2.014
    with pytest.raises(InputError, match="another SSCHA run"):
        quartic(tmp_path / "D", atoms=with_hydrogen(3.016))


def mixed_hydride():
    """Four hydrogen sites that are one by symmetry, one of them deuterium."""
    atoms = Atoms(
        "PdH", positions=[[0, 0, 0], [2.0, 2.0, 2.0]], cell=2.0 * (1 - np.eye(3)), pbc=True
    ).repeat((2, 1, 1))
    atoms.set_masses([*atoms.get_masses()[:3], 2.014])
    return atoms


def test_isotopes_are_kinds_of_their_own():
    mixed, plain = mixed_hydride(), with_isotopes(mixed_hydride(), {"H": 1.008})
    assert structure_id(plain) == structure_id(
        Atoms(plain.numbers, positions=plain.positions, cell=plain.cell, pbc=True)
    )
    assert structure_id(mixed) != structure_id(plain)
    assert (len(primitive(plain)), len(primitive(mixed))) == (2, 4), (
        "a translation does not take H to D"
    )
    assert sorted(primitive(mixed).get_masses()) == pytest.approx(sorted(mixed.get_masses()))
    assert space_group(plain) == "Fm-3m (225)" and space_group(mixed) != "Fm-3m (225)"
    assert (formula(plain), formula(mixed), formula(with_isotopes(plain, {"H": 3.016}))) == (
        "Pd2H2",
        "Pd2HD",
        "Pd2T2",
    )
    assert not same(Fingerprint(mixed), Fingerprint(plain)) and same(
        Fingerprint(mixed), Fingerprint(mixed.repeat((1, 2, 1)))
    )
    assert isotopes(mixed) == {"H+2.014": 2.014} and isotopes(plain) == {}


def test_dynamical_matrices_keep_two_isotopes_of_one_element(tmp_path):
    mixed = mixed_hydride()
    rng = np.random.default_rng(0)
    compact = Symmetry(mixed, (1, 1, 1)).force_constants(
        rng.normal(size=(1, 4, 4, 3, 3)) + 9.0 * np.eye(12).reshape(4, 3, 4, 3).swapaxes(1, 2)
    )
    state = SschaState(mixed, (1, 1, 1), compact, 0.0)
    write_dyn(state, tmp_path / "dyn")
    back = state_from_dyn(tmp_path / "dyn")
    assert back.atoms.get_chemical_symbols() == mixed.get_chemical_symbols()
    assert back.atoms.get_masses() == pytest.approx(mixed.get_masses(), rel=1e-6)
    assert back.modes.hbar_omega == pytest.approx(state.modes.hbar_omega, rel=1e-5)


def test_a_ranking_has_deuterides_as_a_composition_of_their_own_and_mixes_no_other_isotopes(
    tmp_path,
):
    structures = [PAIR, with_hydrogen(2.014)]
    keys = parse_settings(
        {
            "pressure": 0.0,
            "Fitness": ["SSCHA"],
            "sscha": {"supercell": [1, 1, 1], "cell": "fixed", "n_configs": 100},
        }
    )
    found = rank_structures(structures, QuarticPair(), keys, tmp_path / "a", relax=False, workers=1)
    gibbs = {candidate.formula: candidate.gibbs for candidate in found}
    error = np.linalg.norm([candidate.gibbs_error for candidate in found])
    assert set(gibbs) == {"FH", "FD"}
    difference = exact_pair(2.014) - exact_pair(PAIR.get_masses()[0])
    assert (
        gibbs["FD"] - gibbs["FH"] == pytest.approx(difference, abs=3.5 * error)
        and difference < -0.001
    )
    assert gibbs["FD"] < gibbs["FH"]
    assert {candidate.rank_quantum for candidate in found} == {1}
    again = rank_structures(structures, QuarticPair(), keys, tmp_path / "a", relax=False, workers=1)
    assert {candidate.formula: candidate.gibbs for candidate in again} == gibbs, (
        "each has its own stored free energy"
    )
    with pytest.raises(InputError, match="isotopes"):
        rank_structures(
            [PAIR, with_isotopes(PAIR, {"F": 20.0})],
            QuarticPair(),
            keys,
            tmp_path / "b",
            relax=False,
            workers=1,
        )


def test_children_and_relaxed_structures_of_a_search_keep_the_isotopes():
    relaxer = Relaxer(
        evaluator=as_evaluator(QuarticPair()),
        settings=AseCalculatorSettings(calculator="emt", max_step=1, relax_lattice=False),
        pressure=0.0,
    )
    (relaxed,) = relaxer._relax_chunk([with_hydrogen(2.014)])
    assert relaxed.get_masses()[0] == 2.014
    assert symmetrised(with_hydrogen(2.014), 0.1).get_masses().max() == pytest.approx(
        18.998, abs=1e-3
    )
    assert isotopes(symmetrised(with_hydrogen(2.014), 0.1)) == {"H": 2.014}
