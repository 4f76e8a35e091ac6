"""One sound crystal and one hard case in a ranking: the case is named with its reason and its
partial numbers, the other is ranked."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from crystal_models import Crystals, crystal
from crystals import NEON
from records import csv_rows
from sscha_models import LatticeSprings, evaluated

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.candidate import read_ranking
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.report.text import sentences
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.state import (
    CLOSE_PACKING,
    MELTED,
    THERMAL,
    SschaState,
    lindemann_ratios,
    melted,
    melting_warning,
    variance,
)
from magus_anharmonic.sscha.supercells import image_warning
from magus_anharmonic.units import HBAR, KELVIN

SOUND = crystal((3.0, 3.0, 3.1), 1.0, 0.2, -0.3, 1.0, depth=-8.0)
HARD = crystal((3.4,) * 3, 1.0, 0.2, -0.3, 1.0)
SOFT = crystal((3.4,) * 3, 0.02, 0.02, 0.0, 1e-4)
SETTINGS = {
    "n_configs": 20,
    "reference_spacing": 0.1,
    "hessian": 0,
    "allocation": "fixed",
    "supercell": [2, 2, 2],
    "max_populations": 12,
    "free_energy_tolerance": 2e-3,
}


class Spoilt(Crystals):
    """`Crystals`, but what belongs to the larger one and has more than two atoms is changed by
    ``spoil``."""

    def __init__(self, spoil, hard=HARD):
        super().__init__([SOUND, hard])
        self.spoil = spoil

    def evaluate(self, structures):
        found = super().evaluate(structures)
        first = structures[0]
        if self.spoil is not None and len(first) > 2 and first.get_volume() / len(first) > 17.0:
            self.spoil(structures, found)
        return found


def swollen(structures, found):
    found.stress[:] = -0.5 * np.eye(3)


def one_nan(structures, found):
    if len(structures) >= 20:
        found.forces[7][0, 0] = np.nan


def upside_down(structures, found):
    if len(structures) >= 20:
        for forces in found.forces:
            forces *= -1.0


def ranked(folder, structures, evaluator, **changes):
    """Rows of ``ranking.csv`` by the volume of the start: ``sound`` or ``hard``."""
    block = {**SETTINGS, **changes}
    keys = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": block})
    found = rank_structures(structures, evaluator, keys, folder, relax=False, workers=1)
    names = {c.id: "sound" if c.atoms.get_volume() / len(c.atoms) < 15.0 else "hard" for c in found}
    return {names[row["id"]]: row for row in csv_rows(folder / "ranking.csv")}


def check_that_the_search_goes_on(rows):
    assert rows["sound"]["status"] == "converged" and rows["sound"]["rank_quantum"] == "1"


CASES = {
    "dissociating": (swollen, HARD, {"max_populations": 30}, "dissociated: the volume is 2", True),
    "melting": (
        None,
        SOFT,
        {"temperature": 1500.0, "cell": "fixed"},
        "melted: atom 2 (H) strays by",
        True,
    ),
    "one NaN": (
        one_nan,
        HARD,
        {},
        "1 of 20 configurations have energies, forces or stresses that are not finite",
        False,
    ),
    "collapse of the sample": (
        upside_down,
        HARD,
        {},
        "the effective sample size collapses with every step",
        True,
    ),
}
"""Name -> what is done to the evaluations, crystal, settings, reason, whether a population was
finished before."""


@pytest.mark.parametrize("name", CASES)
def test_a_hard_case_is_named_and_leaves_the_ranking_to_the_others(name, tmp_path):
    spoil, hard, changes, reason, begun = CASES[name]
    rows = ranked(tmp_path, [SOUND.atoms, hard.atoms], Spoilt(spoil, hard), **changes)
    check_that_the_search_goes_on(rows)
    assert rows["hard"]["status"] == "failed" and reason in rows["hard"]["reason"]
    assert not rows["hard"]["rank_quantum"] and not rows["hard"]["p_lowest_sampling"]
    assert (
        "in the place of its estimate" in rows["hard"]["reason"]
        and rows["hard"]["gibbs_eV_per_atom"]
    )
    assert reason in read_jsonl(tmp_path / "failures.jsonl")[-1]["reason"]
    if begun:
        assert all(
            rows["hard"][column]
            for column in ("gibbs_raw_eV_per_atom", "gibbs_error_eV_per_atom", "volume_A3_per_atom")
        )
        assert int(rows["hard"]["n_evaluations"]) >= 20


def check_that_it_did_not_converge(row):
    assert (
        row["status"] == "unconverged"
        and "not converged after 5 populations: stress" in row["reason"]
    )
    assert (
        not row["rank_quantum"]
        and not row["p_lowest_sampling"]
        and not row["difference_eV_per_atom"]
    ), "it has no place"
    assert all(
        row[column]
        for column in (
            "gibbs_eV_per_atom",
            "gibbs_error_eV_per_atom",
            "volume_A3_per_atom",
            "spg_quantum",
        )
    )


def test_a_run_that_does_not_converge_keeps_its_numbers_says_what_is_open_and_is_not_ranked(
    tmp_path,
):
    rows = ranked(
        tmp_path, [SOUND.atoms, HARD.atoms], Spoilt(swollen), max_populations=5, allocation="fixed"
    )
    check_that_the_search_goes_on(rows)
    assert rows["sound"]["p_lowest_sampling"] == "1.000000", (
        "no other shares the probability with it"
    )
    check_that_it_did_not_converge(rows["hard"])
    assert read_jsonl(tmp_path / "failures.jsonl") == []


def test_a_run_that_does_not_converge_stops_early_where_it_is_far_above(tmp_path):
    both = [SOUND.atoms, HARD.atoms]
    keys = {"max_populations": 5, "allocation": "elimination"}
    rows = ranked(tmp_path, both, Spoilt(swollen), **keys)
    check_that_the_search_goes_on(rows)
    assert rows["hard"]["status"] == "eliminated"
    assert "more than 50 meV/atom above the lowest" in rows["hard"]["reason"]
    assert int(rows["hard"]["n_populations"]) < 5


def test_where_nothing_converges_nobody_wins_and_the_words_say_so(tmp_path):
    rows = ranked(tmp_path, [HARD.atoms], Spoilt(swollen), max_populations=5)
    check_that_it_did_not_converge(rows["hard"])
    said = sentences(read_ranking(tmp_path / "ranking.csv"))
    assert (
        "No free energy has converged; the order is that of the static" in said[0]
        and "Not converged within the budget" in said[1]
    )


def test_an_imaginary_start_is_made_positive_and_runs(tmp_path):
    double_well = crystal((3.4,) * 3, 1.0, 0.2, -0.3, 1.0, well=6.0, wall=6.0)
    rows = ranked(
        tmp_path, [SOUND.atoms, double_well.atoms], Spoilt(None, double_well), n_configs=60
    )
    check_that_the_search_goes_on(rows)
    assert rows["hard"]["status"] == "converged" and float(rows["hard"]["gibbs_eV_per_atom"]) > 0.0


def test_one_atom_in_one_cell_has_no_vibrations(tmp_path):
    structures = [bulk("Cu"), bulk("Cu", "fcc", a=3.7, cubic=True)]
    rattled = structures[1]
    rattled.positions[0] += [0.05, 0.1, 0.15]
    keys = parse_settings(
        {
            "pressure": 0.0,
            "Fitness": ["SSCHA"],
            "sscha": {**SETTINGS, "supercell": [1, 1, 1], "max_populations": 1},
        }
    )
    from ranking_fakes import Emt

    found = {
        len(c.atoms): c
        for c in rank_structures(structures, Emt(), keys, tmp_path, relax=False, workers=1)
    }
    assert (
        found[1].status == "failed"
        and "one atom has no vibrations; take a larger supercell" in found[1].reason
    )


def test_a_temperature_below_zero_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(InputError, match="temperature"):
        parse_settings(
            {"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": {**SETTINGS, "temperature": -1.0}}
        )
    with pytest.raises(InputError, match="temperature.*not below 0"):
        free_energy(SOUND.atoms, Spoilt(None), temperature=-1.0, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_supercell_smaller_than_the_cutoff_is_a_warning_and_no_exclusion(tmp_path):
    evaluator = Spoilt(None)
    evaluator.cutoff = 6.5
    rows = ranked(tmp_path, [SOUND.atoms, HARD.atoms], evaluator)
    check_that_the_search_goes_on(rows)
    assert "too small for the model: atoms feel their own images, 6.0" in rows["sound"]["reason"]
    assert rows["hard"]["reason"] == "" and rows["hard"]["rank_quantum"] == "2", "6.8 A are enough"


def test_the_shortest_vector_of_a_slanted_supercell_counts():
    slanted = np.array([[4.0, 0.0, 0.0], [8.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
    assert "3.00 A away" in image_warning(slanted, 3.5)
    assert image_warning(slanted, 3.0) == image_warning(slanted, None) == ""


# ------------------------------------------------------------------------------------------ melting


def pair(spring, temperature, mass=1.008):
    """Two atoms (of ``mass`` in amu) in one cell with one spring: three equal modes."""
    block = spring * np.eye(3)
    compact = np.stack([np.stack([block, -block]), np.stack([-block, block])])[None]
    atoms = Atoms(
        "H2", positions=[[0, 0, 0], [2.0, 2.0, 2.0]], cell=[4.0] * 3, masses=[mass] * 2, pbc=True
    )
    return SschaState(atoms, (1, 1, 1), compact, temperature)


@pytest.mark.parametrize("temperature", [0.0, 300.0])
def test_the_ratio_is_that_of_the_sampled_displacements(temperature):
    calculator, atoms = LatticeSprings(), NEON
    result = free_energy(
        atoms, calculator, 0.0, temperature, supercell=(2, 2, 2), cell="fixed", n_configs=20
    )
    ensemble = evaluated(result.state, as_evaluator(calculator), 500, seed=1)
    rms = np.sqrt((ensemble.displacements**2).sum(axis=2).mean())
    assert lindemann_ratios(result.state)[0] == pytest.approx(
        [rms / (CLOSE_PACKING * 3.0)], rel=0.03
    )


def test_the_thermal_part_is_what_is_above_zero_point_motion():
    state = pair(0.5, 800.0)
    mass = state.atoms.get_masses()[0] / 2.0
    hbar_omega = HBAR * np.sqrt(0.5 / mass)
    # each of the two atoms has half of the relative displacement
    warm, cold = (
        np.sqrt(3.0 * variance(np.array([hbar_omega]), t)[0] / mass) / 2.0 for t in (800.0, 0.0)
    )
    distance = CLOSE_PACKING * 32.0 ** (1 / 3)
    total, thermal = lindemann_ratios(state)
    assert total == pytest.approx([warm / distance] * 2) and thermal == pytest.approx(
        [np.sqrt(warm**2 - cold**2) / distance] * 2
    )
    assert lindemann_ratios(replace(state, temperature=0.0))[1] == pytest.approx([0.0, 0.0])


def test_a_liquid_is_named_and_a_quantum_crystal_is_not():
    """Classical equipartition: <u^2> of a heavy atom is 3 kT / (4 spring); both limits are crossed
    where that says."""
    distance = CLOSE_PACKING * 32.0 ** (1 / 3)
    warmest = {
        limit: 4.0 * 0.2 * (limit * distance) ** 2 / 3.0 / KELVIN for limit in (THERMAL, MELTED)
    }
    assert not melting_warning(pair(0.2, 0.9 * warmest[THERMAL], 100.0))
    superheated = pair(0.2, 1.1 * warmest[THERMAL], 100.0)
    assert "H strays by 0.1" in melting_warning(superheated) and not melted(superheated)
    assert melted(pair(0.2, 1.1 * warmest[MELTED], 100.0)).startswith("melted: atom ")
    hbar_omega = pair(0.01, 0.0)
    assert (
        THERMAL < lindemann_ratios(hbar_omega)[0][0] < MELTED
        and not melted(hbar_omega)
        and not melting_warning(hbar_omega)
    )


def test_a_superheated_crystal_is_ranked_with_the_warning(tmp_path):
    hot = replace(SOFT, bonds=6.0 * SOFT.bonds)
    rows = ranked(
        tmp_path, [SOUND.atoms, hot.atoms], Spoilt(None, hot), temperature=1500.0, cell="fixed"
    )
    check_that_the_search_goes_on(rows)
    assert rows["hard"]["status"] == "converged" and "may have melted" in rows["hard"]["reason"]
