"""SSCHA with a surrogate: the evaluator's own minimum with fewer of its evaluations, and a surrogate
that is wrong costs evaluations, never truth."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from exact_crystals import CASES, ExactCrystal, Scha
from scipy.stats import binom
from sscha_models import EV

from magus_anharmonic import free_energy
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.io.files import load_arrays, write_arrays
from magus_anharmonic.potential import Potential
from magus_anharmonic.ranking.evaluators import ranking_evaluator
from magus_anharmonic.ranking.store import sscha_hash
from magus_anharmonic.settings import SschaSettings, parse_settings
from magus_anharmonic.sscha.result import RunFolder, final_ensemble, read_population_file
from magus_anharmonic.sscha.run import SschaRun
from magus_anharmonic.sscha.surrogate import surrogate_of
from magus_anharmonic.sscha.task import Task


def perturbed(crystal, size=0.02):
    """The crystal with all its constants larger by about ``size`` or more: a surrogate that is
    good, but never right."""
    rng = np.random.default_rng(5)

    def off(value, times):
        return value * (1.0 + times * size * abs(rng.normal()))

    links = [
        replace(
            link,
            k2=off(link.k2, 1),
            k3=off(link.k3, 2.5),
            k4=off(link.k4, 2.5),
            depth=off(link.depth, 0.5),
        )
        for link in crystal.links
    ]
    return ExactCrystal("perturbed", crystal.atoms, links)


class Affine:
    """Learns: a + b times the energies of a perturbed crystal, by least squares."""

    model_id = "affine"

    def __init__(self, crystal, size=0.02):
        self.base, self.sizes = perturbed(crystal, size), []

    def fit(self, structures, found):
        self.sizes.append(len(structures))
        energy = self.base.evaluate(structures).energy
        slope, offset = np.polyfit(energy, found.energy, 1)
        return Changed(self.base, slope, offset)


class Changed:
    """Another evaluator's numbers times ``slope`` plus ``offset`` (eV), the stress with ``sign``,
    then ``spoil``ed."""

    def __init__(self, base, slope=1.0, offset=0.0, sign=1.0, spoil=None):
        self.base, self.slope, self.offset = base, slope, offset
        self.sign, self.spoil, self.model_id = sign, spoil, f"changed {slope:g} {offset:g}"

    def evaluate(self, structures):
        found = self.base.evaluate(structures)
        energy, forces = (
            self.slope * found.energy + self.offset,
            self.slope * np.array(found.forces),
        )
        changed = Evaluation(energy, list(forces), self.sign * self.slope * found.stress)
        return changed if self.spoil is None else self.spoil(changed)


def run(name, surrogate, seed=0, temperature=300.0, cell="variable", n_configs=200, **options):
    case = CASES[name]
    crystal = case.make()
    given = surrogate if isinstance(surrogate, str) else surrogate(crystal)
    result = case.run(crystal, temperature, cell, n_configs, surrogate=given, seed=seed, **options)
    assert result.n_evaluations == crystal.n_structures
    return result


def minimum(name, temperature=300.0, cell="variable"):
    return CASES[name].solve(temperature, cell)


def test_a_good_surrogate_takes_over_most_evaluations_and_leaves_the_minimum_where_it_is():
    exact = minimum("hcp")
    plain = run("hcp", "none", n_configs=1000)
    # the first leaves half of the deviations of V - V_0
    for surrogate, fewer in ((perturbed, 3.0), (Affine, 10.0)):
        result = run("hcp", surrogate, n_configs=1000)
        assert result.converged
        assert abs(result.gibbs_raw - exact.gibbs) < 4.0 * result.gibbs_error
        assert result.gibbs_error < 1.3 * plain.gibbs_error
        assert result.n_evaluations < plain.n_evaluations / fewer
        assert result.n_surrogate > 1000
        cell = exact.minimum.cell.lengths()
        assert result.centroids.cell.lengths() == pytest.approx(cell, rel=2e-3)
    alone = perturbed(CASES["hcp"].make())
    wrong = Scha(alone, CASES["hcp"].supercell_matrix, 300.0, 5.0, "variable").solve()
    assert abs(wrong.gibbs - exact.gibbs) > 20.0 * result.gibbs_error, "it is not the truth itself"


def test_a_tolerance_is_met_with_fewer_evaluations_of_the_truth_than_without():
    tolerance = 2e-4
    plain, ours = (
        run("triclinic", one, cell="fixed", error_tolerance=tolerance, n_configs=100)
        for one in ("none", perturbed)
    )
    assert ours.gibbs_error <= tolerance and plain.gibbs_error <= tolerance
    assert ours.n_evaluations < plain.n_evaluations / 3.0


def test_a_loose_tolerance_takes_as_few_of_the_surrogate_as_it_needs():
    exact = minimum("hcp").gibbs
    tight, loose = (run("hcp", Affine, n_configs=1000, error_tolerance=t) for t in (None, 2e-4))
    assert loose.converged and loose.gibbs_error <= 2e-4
    assert abs(loose.gibbs_raw - exact) < 4.0 * loose.gibbs_error
    assert loose.n_surrogate < tight.n_surrogate / 2.0
    assert loose.n_evaluations <= tight.n_evaluations
    assert loose.n_populations == tight.n_populations


def noise(found):
    rng = np.random.default_rng(int(1e6 * abs(found.energy[0])) % 2**32)
    forces = [force + rng.normal(0.0, 1.0, force.shape) for force in found.forces]
    return Evaluation(found.energy + rng.normal(0.0, 1.0, len(found.energy)), forces, found.stress)


def nan(found):
    return replace(found, energy=np.full_like(found.energy, np.nan))


def broken(found):
    raise ZeroDivisionError("of a surrogate")


def sabotaged(**changes):
    return lambda crystal: Changed(perturbed(crystal), **changes)


def does_not_fit(crystal):
    def fit(structures, found):
        raise ValueError("too few")

    return fit


SABOTAGED = {
    "a constant": (sabotaged(slope=0.0), False),
    "twice the energy": (sabotaged(slope=2.0), False),
    "noise": (sabotaged(spoil=noise), False),
    "no number": (sabotaged(spoil=nan), False),
    "an error": (sabotaged(spoil=broken), False),
    "no fit": (does_not_fit, False),
    "stress of the other sign": (sabotaged(sign=-1.0), True),
    "stress of nothing": (sabotaged(sign=np.nan), True),
    "learns another sign": (
        lambda crystal: lambda *_: Changed(perturbed(crystal), sign=-1.0),
        True,
    ),
}


@pytest.mark.parametrize("name", SABOTAGED)
def test_a_sabotaged_surrogate_costs_evaluations_but_no_truth(name, caplog):
    surrogate, used = SABOTAGED[name]
    with caplog.at_level(logging.INFO, logger="magus_anharmonic"):
        result = run("triclinic", surrogate, n_configs=200)
    assert result.converged
    assert abs(result.gibbs_raw - minimum("triclinic").gibbs) < 4.0 * result.gibbs_error
    left_out = [line for line in caplog.messages if "left out from here on" in line]
    assert len(left_out) == (0 if used else 1)
    assert (result.n_surrogate > 100) == used
    assert result.n_evaluations < 900


def poor(crystal):
    """One that is to learn before it is used, and never does."""
    return Affine(crystal, 0.04)


@pytest.mark.parametrize("surrogate", [perturbed, poor])
def test_a_run_that_was_stopped_after_every_population_gives_the_same_bits(surrogate, tmp_path):
    case = CASES["triclinic"]
    settings = SschaSettings(
        supercell=case.supercell_matrix, n_configs=200, reference_spacing=0.5, error_tolerance=3e-4
    )

    def began(folder):
        crystal = case.make()
        chosen = surrogate_of(surrogate(crystal), crystal.atoms)
        of = crystal.atoms, case.pressure, 300.0, settings, 3, None, None, crystal.model_id
        task = Task(*of, surrogate=chosen)
        return SschaRun(task, crystal, RunFolder(tmp_path / folder, task.identity()))

    whole = began("whole")
    while not (whole.converged and whole.precise):
        whole.advance()
    for _ in range(whole.n_populations):
        pieces = began("pieces")
        pieces.advance()
    assert pieces.progress.rows == whole.progress.rows
    assert pieces.progress.n_surrogate == whole.progress.n_surrogate > 0
    (tmp_path / "pieces" / "progress.json").unlink()
    again = began("pieces")
    while again.n_populations < whole.n_populations:
        again.advance()
    assert again.progress.rows == whole.progress.rows, "from the populations alone"
    results = [one.finish() for one in (whole, pieces, again)]
    told = [result.as_dict() | {"seconds": 0} for result in results]
    assert told[0] == told[1] == told[2]
    ensemble = final_ensemble(tmp_path / "whole", results[0])
    assert ensemble.two_level and ensemble.n_truth < len(ensemble.energies) / 3
    truth = read_population_file(sorted((tmp_path / "whole").glob("truth_*.npz"))[-1])[1]
    corrected = ensemble.part(ensemble.level > 0).displacements[-len(truth.energies) :]
    assert not truth.two_level and np.array_equal(corrected, truth.displacements)


def test_a_population_of_earlier_versions_is_of_one_level(tmp_path):
    run("hcp", "none", directory=tmp_path)
    path = tmp_path / "population_001.npz"
    arrays = load_arrays(path)
    del arrays["level"]
    write_arrays(path, **arrays)
    ensemble = read_population_file(path)[1]
    assert not ensemble.two_level and ensemble.n_truth == len(arrays["energies"])


def test_what_learns_has_not_seen_what_it_corrects():
    learns = []

    def surrogate(crystal):
        learns.append(Affine(crystal))
        return learns[0]

    result = run("triclinic", surrogate, n_configs=200)
    sizes = learns[0].sizes
    assert result.n_populations >= 2 and sizes == sorted(sizes)
    assert sizes[-1] < result.n_evaluations - 20, "those of the last population are left out"


def test_what_a_surrogate_may_be_is_said_where_it_is_none_of_it():
    crystal = CASES["hcp"].make()
    assert surrogate_of("none", crystal.atoms) is None
    assert surrogate_of("ase.calculators.emt.EMT", crystal.atoms).fixed is not None
    assert surrogate_of("test_surrogate.does_not_fit", crystal.atoms).fit is does_not_fit
    shipped = surrogate_of("h3s-gpaw-small", crystal.atoms)
    assert shipped.name == shipped.fixed.model_id
    assert surrogate_of("polynomial", crystal.atoms).fit.__module__.endswith("polynomial")
    for wrong in ("nowhere.at.all", "ase.calculators.emt.Nothing"):
        with pytest.raises(InputError, match=f"sscha.surrogate: {wrong}: cannot be imported"):
            surrogate_of(wrong, crystal.atoms)
    with pytest.raises(InputError, match="sscha.surrogate: int: int is no evaluator"):
        surrogate_of(3, crystal.atoms)
    settings = parse_settings({"symbols": ["Be"], "sscha": {"surrogate": "nowhere.at.all"}})
    with pytest.raises(InputError, match="sscha.surrogate: nowhere.at.all"):
        ranking_evaluator(settings)
    with pytest.raises(InputError, match="surrogate: engine: python-sscha minimises on one"):
        run("hcp", perturbed, engine="python-sscha")


def test_a_run_with_another_surrogate_is_another_run_and_one_without_is_what_it_was():
    crystal = CASES["hcp"].make()
    of = crystal.atoms, 0.0, 0.0, SschaSettings(), 0, None, None, crystal.model_id
    plain = Task(*of).identity()
    assert "surrogate" not in plain and "surrogate" not in plain["sscha"]
    chosen = surrogate_of(perturbed(crystal), crystal.atoms)
    assert Task(*of, surrogate=chosen).identity()["surrogate"] == "perturbed+0"


def test_a_polynomial_fitted_to_twenty_configurations_saves_most_evaluations_of_a_metal():
    """Copper in the effective-medium theory, whose many-body energy no sum over pairs and triples
    is."""
    options = dict(temperature=300.0, supercell=(2, 2, 2), n_configs=400, reference_spacing=0.5)
    plain, ours = (
        free_energy(bulk("Cu"), EV, surrogate=name, **options) for name in ("none", "polynomial")
    )
    assert plain.converged and ours.converged
    off = np.hypot(plain.gibbs_error, ours.gibbs_error)
    assert abs(plain.gibbs - ours.gibbs) < 4.0 * off
    assert ours.gibbs_error < 1.3 * plain.gibbs_error
    assert ours.n_evaluations < plain.n_evaluations / 4.0


@pytest.mark.full
@pytest.mark.parametrize("surrogate", [perturbed, Affine])
def test_error_bars_with_a_surrogate_cover_the_minima(surrogate):
    """Of four crystals whose cell relaxes, 16 seeds each, together: inside the 99 % bounds of a
    Gaussian's 68 and 95 %, and not off by itself."""
    z = []
    for name in ("hcp", "triclinic", "rock salt", "heavy and light"):
        exact = minimum(name).gibbs
        found = [run(name, surrogate, seed) for seed in range(16)]
        assert sum(not result.converged for result in found) <= 1
        z += [(result.gibbs_raw - exact) / result.gibbs_error for result in found]
    for sigmas, share in ((1.0, 0.683), (2.0, 0.954)):
        low, high = binom.interval(0.99, len(z), share)
        assert low <= np.sum(np.abs(z) < sigmas) <= high
    assert abs(np.mean(z)) < 0.4


class Suited(ExactCrystal):
    """A crystal for which `polynomial` is the best surrogate."""

    surrogate = "polynomial"


@pytest.fixture
def suited():
    made = CASES["hcp"].make()
    made.__class__ = Suited
    return made


SMALL = {"supercell": (2, 2, 1), "cell": "fixed", "n_configs": 120, "reference_spacing": 0.5}


def test_the_default_is_what_suits_the_evaluator_and_none_for_others(suited):
    atoms = Atoms("H")
    assert surrogate_of("auto", atoms, suited).name == "polynomial"
    assert surrogate_of("auto", atoms, CASES["hcp"].make()) is None
    suited.surrogate = "no-such-file.pth"
    assert surrogate_of("auto", atoms, suited) is None
    assert Potential.surrogate == "polynomial"


def test_a_run_that_was_begun_without_surrogate_goes_on_without(suited, tmp_path):
    """As all runs were before the default changed."""
    of = suited.atoms.copy(), suited, 0.0, 300.0
    first = free_energy(*of, directory=tmp_path, surrogate="none", **SMALL)
    again = free_energy(*of, directory=tmp_path, **SMALL)
    assert again.gibbs_raw == first.gibbs_raw and again.n_surrogate == 0
    assert free_energy(*of, **SMALL).n_surrogate > 0
    assert free_energy(*of, **SMALL | {"n_configs": 80}).n_surrogate == 0, "too few"
    assert free_energy(*of, surrogate=None, **SMALL).gibbs_raw == first.gibbs_raw


def test_a_run_with_a_start_learns_from_few_configurations_too(suited):
    of = suited.atoms.copy(), suited, 0.0
    begun = free_energy(*of, 300.0, **SMALL | {"n_configs": 400})
    found = free_energy(*of, 310.0, start=begun, **SMALL | {"n_configs": 400})
    assert found.converged and found.n_evaluations < 200


def test_few_true_configurations_are_not_reweighted_to_other_masses(suited, tmp_path):
    """A run of two levels has some twenty of them, of which one or none counts."""
    of = suited.atoms.copy(), suited, 0.0, 0.0
    keys = SMALL | {"n_configs": 400}
    light = free_energy(*of, directory=tmp_path / "light", **keys)
    masses = {atom.symbol: 3.0 * atom.mass for atom in suited.atoms}
    heavy = free_energy(*of, masses=masses, start=tmp_path / "light", **keys)
    assert light.n_surrogate > 0 and heavy.n_evaluations > 0
    assert "reweighted" not in heavy.reason


def test_a_ranking_with_and_one_without_surrogate_are_kept_apart(suited, tmp_path):
    """Their runs have folders of their own, so that neither is in the other's way."""
    settings = {name: SschaSettings(surrogate=name, n_configs=120) for name in ("auto", "none")}
    assert sscha_hash(settings["auto"]) != sscha_hash(settings["none"])
    few = [SschaSettings(surrogate=name, n_configs=80) for name in ("auto", "none")]
    assert sscha_hash(few[0]) == sscha_hash(few[1]), "the same run"
    of = suited.atoms.copy(), suited, 0.0, 300.0
    first = free_energy(*of, directory=tmp_path, **SMALL)
    again = free_energy(*of, directory=tmp_path, **SMALL)
    assert again.gibbs_raw == first.gibbs_raw and again.n_surrogate > 0
    with pytest.raises(InputError, match="holds another SSCHA run"):
        free_energy(*of, directory=tmp_path, surrogate="none", **SMALL)
