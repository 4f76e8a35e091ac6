"""The free energy of the electrons at the ensemble's structures: asked of the labeler, averaged,
and put into G of every phase or of none."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from harmonic_pair import crystal, pair
from records import a_candidate
from typer.testing import CliRunner

from magus_anharmonic.cli.common import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.generation import measured_terms
from magus_anharmonic.labelers import Label, at_electronic_temperature, get_labeler
from magus_anharmonic.paper import tables
from magus_anharmonic.paper.ensemble_errors import Source, add_to_tables, measure_errors
from magus_anharmonic.paper.ensemble_labels import sample_displacements
from magus_anharmonic.ranking.uncertainty import Electronic, ModelTerm, with_electronic
from magus_anharmonic.settings import LabelerSettings, parse

KELVIN = 8.617333262e-5
PSEUDO = Path("/usr/share/espresso/pseudo")


def warm(calculator, temperature=1000.0, **arguments):
    given = {"calculator": calculator, "arguments": arguments}
    return at_electronic_temperature(parse(LabelerSettings, given, "labeler"), temperature)


def test_every_code_gets_fermi_dirac_occupations_in_its_own_words_and_unit():
    width = KELVIN * 1000.0
    found = warm("vasp", encut=400, ISMEAR=1, sigma=0.2).arguments
    assert found == {"encut": 400, "ismear": -1, "sigma": pytest.approx(width)}
    found = warm("gpaw", xc="PBE", occupations={"name": "marzari-vanderbilt", "width": 0.2})
    assert found.arguments["occupations"] == {"name": "fermi-dirac", "width": pytest.approx(width)}
    flat = {"ecutwfc": 30, "occupations": "fixed", "conv_thr": 1e-9}
    found = warm("espresso", input_data=flat).arguments["input_data"]
    assert found["electrons"] == {"conv_thr": 1e-9} and found["system"] == {
        "ecutwfc": 30,
        "occupations": "smearing",
        "smearing": "fermi-dirac",
        "degauss": pytest.approx(width / 13.605693),
    }
    with pytest.raises(InputError, match="EMT: how to set an electronic temperature is not known"):
        warm("ase.calculators.emt.EMT")
    with pytest.raises(InputError, match="at 0 K"):
        warm("gpaw", 0.0)


@pytest.mark.real_espresso
@pytest.mark.skipif(
    shutil.which("pw.x") is None or not (PSEUDO / "Al.pz-vbc.UPF").is_file(),
    reason="skipped: no pw.x here (apt-get install quantum-espresso quantum-espresso-data)",
)
def test_the_electrons_of_aluminium_are_nearly_free(tmp_path):
    """Sommerfeld: F - E_0 = -(pi kT)^2 n / (4 E_F), with n = 3 and the Fermi energy of their
    density."""
    settings = warm(
        "espresso",
        2000.0,
        pseudopotentials={"Al": "Al.pz-vbc.UPF"},
        pseudo_dir=str(PSEUDO),
        input_data={"system": {"ecutwfc": 15, "ecutrho": 60}},
        kpts=(12, 12, 12),
    )
    atoms = bulk("Al", a=4.05)
    (label,) = get_labeler(settings, tmp_path).label([atoms])
    assert isinstance(label, Label), label
    density = 3 / atoms.get_volume()
    fermi = 3.80998 * (3 * np.pi**2 * density) ** (2 / 3)  # hbar^2 / 2m = 3.80998 eV A^2
    expected = -((np.pi * KELVIN * 2000.0) ** 2) * 3 / (4 * fermi)
    assert label.free_energy - label.energy == pytest.approx(expected, rel=0.15)


class Metal:
    """A labeler whose electrons have the free energy -0.02 eV times (1 + u^2) of the first atom."""

    settings_hash, description = "metal", "a metal"

    def __init__(self, reference, state, gives=True):
        self.reference, self.state, self.gives = reference, state, gives

    def electronic(self, atoms):
        u = atoms.positions[0] - self.state.supercell.positions[0]
        return -0.02 * (1.0 + u @ u)

    def label(self, structures, on_result):
        for index, atoms in enumerate(structures):
            found = self.reference.evaluate([atoms])
            energy = float(found.energy[0])
            free = energy + self.electronic(atoms) if self.gives else None
            of = energy, free, found.forces[0], np.zeros((3, 3)), self.settings_hash, 0.0
            on_result(index, Label(atoms, *of))


def measured(folder, electronic, gives=True):
    model, reference = pair(0.2)
    state = replace(crystal(), temperature=300.0)
    model = replace(model, state=state)
    source = Source(state, "P1", 50.0, "harmonic-crystal", -1.0, 0.001)
    labeler = Metal(reference, state, gives)
    report = measure_errors(source, model, labeler, folder, n_configs=12, electronic=electronic)
    return report, labeler, state


def test_the_mean_over_the_ensemble_is_in_the_corrected_g_and_in_the_table(tmp_path):
    without = measured(tmp_path / "cold", False)[0]
    report, labeler, state = measured(tmp_path / "warm", True)
    assert without.correction.electronic is None
    u = sample_displacements(state, 12, 0)
    each = -0.02 * (1.0 + (u[::2, 0] ** 2).sum(axis=1)) / len(state.supercell)
    found = report.correction
    assert found.electronic == pytest.approx(each.mean(), abs=1e-12)
    assert found.electronic_error == pytest.approx(each.std(ddof=1) / np.sqrt(6), rel=1e-9)
    assert found.first_order == pytest.approx(without.correction.first_order, abs=1e-12)
    assert report.corrected_gibbs[0] - without.corrected_gibbs[0] == pytest.approx(each.mean())
    add_to_tables(report, tmp_path)
    (row,) = tables.read(tables.GibbsCorrection, tmp_path / "gibbs_correction.csv")
    assert (row.electronic_temperature_K, row.electronic_eV_per_atom) == (
        300.0,
        pytest.approx(each.mean()),
    )
    term = measured_terms(tmp_path, 50.0)["P1"].electronic
    assert (term.energy, term.temperature) == (pytest.approx(each.mean()), 300.0)
    with pytest.raises(InputError, match="labels without a free energy"):
        measured(tmp_path / "none", True, gives=False)


def test_it_enters_g_of_every_phase_at_its_temperature_or_of_none():
    def phase(name, gibbs, group, temperature=300.0):
        numbers = {"status": "converged", "gibbs": gibbs, "gibbs_error": 3e-3, "space_group": group}
        return a_candidate(name, bulk("Al"), temperature=temperature, **numbers)

    phases = [phase("a", 0.0, "R3m (160)"), phase("b", 0.004, "Im-3m (229)")]
    terms = {
        "R3m": ModelTerm(0.0, 0.0, Electronic(-0.001, 4e-3, 300.0)),
        "Im-3m": ModelTerm(0.0, 0.0, Electronic(-0.008, 1e-4, 300.0)),
    }
    one, other = with_electronic(phases, terms)
    assert (one.gibbs, other.gibbs) == (pytest.approx(-0.001), pytest.approx(-0.004))
    assert other.free_energy.electronic == -0.008 and one.gibbs_error == pytest.approx(5e-3)
    for some in ({"R3m": terms["R3m"]}, {}, {**terms, "R3m": ModelTerm(0.1, 0.1)}):
        assert with_electronic(phases, some) == phases
    hot = [replace(one, temperature=600.0) for one in phases]
    assert with_electronic(hot, terms) == hot


def test_the_command_asks_for_a_temperature_before_any_run(tmp_path):
    (tmp_path / "emt.yaml").write_text("labeler: {calculator: ase.calculators.emt.EMT}\n")
    bulk("Al").write(tmp_path / "Al.vasp")
    given = ["errors", "Al.vasp", "--reference", "emt.yaml", "--calculator"]
    given += ["ase.calculators.emt.EMT", "--pressure", "0", "--electronic", "-n", "4"]
    paths = [str(tmp_path / one) if one.endswith((".vasp", "yaml")) else one for one in given]
    found = CliRunner().invoke(app, [*paths, "-o", str(tmp_path / "out")])
    assert found.exit_code != 0 and "--electronic: at 0 K" in found.output + str(found.exception)
    assert not (tmp_path / "out").exists()
