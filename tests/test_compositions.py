"""Variable composition: order and probabilities inside each composition, free energies above the hull of
all."""

import math

import numpy as np
import pytest
import ranking_fakes as fakes
from ase import Atoms
from ase.build import bulk
from ase.phasediagram import PhaseDiagram
from hypothesis import given, settings
from hypothesis import strategies as st
from records import a_candidate, csv_rows, standing
from scipy.stats import norm
from test_fitness import INFO

from magus_anharmonic.errors import InputError
from magus_anharmonic.learning.choose import lowest_distinct
from magus_anharmonic.ranking.candidate import by_composition, numbered, read_ranking
from magus_anharmonic.ranking.elimination import Rules, race
from magus_anharmonic.ranking.fitness import (
    fit_estimates,
    fitness_values,
    population_fitness,
    with_heights,
)
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.ranking.uncertainty import ModelTerm, with_probabilities
from magus_anharmonic.report.contents import gather
from magus_anharmonic.report.screen import show_ranking
from magus_anharmonic.report.text import hull_sentences
from magus_anharmonic.search import host
from magus_anharmonic.search.host import run
from magus_anharmonic.settings import parse_settings


def candidate(name, formula, gibbs, error=1e-3, **more):
    values = {
        "status": "converged",
        "gibbs": gibbs,
        "gibbs_error": error,
        "space_group": "Im-3m (229)",
        **more,
    }
    enthalpy = -1.0 if gibbs is None else gibbs - 0.2
    return a_candidate(
        name, Atoms(formula), pressure=150.0, enthalpy=enthalpy, model="model", **values
    )


ROWS = [
    candidate("h", "H2", -1.0),
    candidate("s", "S", -4.0),
    candidate("low", "H2S", -2.1, 2e-3),
    candidate("high", "S2H4", -2.05),
    candidate("mixed", "H3S", -1.80),
]
"""On the hull: H, S and H2S (0.1 eV/atom below their line, -2.0); the hull at H3S is 1/4 of the way
from H2S to H, at -1.825."""


def by_id(candidates):
    return {c.id: c for c in candidates}


def test_distances_above_the_hull_of_free_energies_are_those_worked_out_by_hand():
    found = by_id(with_heights(ROWS, None))
    heights = {"h": 0.0, "s": 0.0, "low": 0.0, "high": 0.05, "mixed": 0.025}
    assert {name: found[name].gibbs_above_hull for name in heights} == pytest.approx(
        heights, abs=1e-12
    )
    assert found["mixed"].enthalpy_above_hull == pytest.approx(0.025)
    assert [found[name].p_on_hull_sampling for name in ("h", "s", "low", "high", "mixed")] == [
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    assert found["low"].p_on_hull_total is None
    # 1/4 of the error of H, 3/4 of that of H2S, and its own
    assert found["mixed"].gibbs_above_hull_error == pytest.approx(
        1e-3 * math.hypot(1, 0.25, 0.75 * 2), rel=0.15
    )


def test_the_error_of_the_model_leaves_open_what_sampling_decides():
    found = by_id(with_heights(ROWS, 0.03))["mixed"]
    assert found.p_on_hull_sampling == 0.0
    error = math.hypot(0.03, 0.25 * 0.03, 0.75 * 0.03)
    assert found.p_on_hull_total == pytest.approx(norm.cdf(-0.025 / error), abs=0.08)


def test_estimates_stand_against_the_hull_but_do_not_make_it():
    guessed = candidate("guess", "H3S", -3.0, status="estimated")
    beyond = candidate("beyond", "O", -9.0, status="estimated")
    found = by_id(with_heights([*ROWS, guessed, beyond], None))
    assert found["mixed"].gibbs_above_hull == pytest.approx(0.025)
    assert found["guess"].gibbs_above_hull == pytest.approx(-3.0 + 1.825)
    assert found["beyond"].gibbs_above_hull is None and found["guess"].p_on_hull_sampling is None


def test_ranks_and_probabilities_are_those_inside_of_a_composition():
    found = with_probabilities(
        ROWS, 0.02, {"Im-3m": ModelTerm(0.5, 0.1), "low": ModelTerm(0.03, 0.001)}
    )
    table = numbered(with_heights(found, 0.02))
    assert [c.composition for c in table] == ["H", "H2S", "H2S", "S", "H3S"]
    assert [c.rank_quantum for c in table] == [1, 1, 2, 1, 1]
    places = by_id(table)
    assert places["h"].p_lowest_sampling == 1.0 and places["mixed"].difference == 0.0
    assert places["high"].difference == pytest.approx(0.05)
    # "Im-3m" names no phase where all have that symbol, whatever their compositions
    assert places["mixed"].model_correction is None and places["low"].model_correction == 0.03


def test_a_composition_without_results_is_estimated_from_the_largest_shift():
    known = [("H3S", -2.0, -1.8, 1e-3), ("S", -5.0, -4.98, 2e-3)]
    lines = fit_estimates(known, ["H3S", "S", "H2"])
    assert lines["S"](-5.0) == pytest.approx(-4.98 + 4e-3)
    assert lines["H2"](-1.0) == pytest.approx(-0.8 + 4e-3)
    assert fit_estimates([], ["H3S"]) == {}


def test_the_best_of_every_composition_run_to_their_ends():
    """H3S lies 3 eV/atom above S, which says nothing about H3S: its best one is not stopped, its
    worst one is."""
    truth = {"S one": -4.0, "S two": -3.0, "H3S one": -1.0, "H3S two": -0.5}

    def advance(wanted):
        rest = {name: 0.08 * 0.5**n for name, n in wanted.items()}
        return {
            name: standing(truth[name] + r, 1e-4, r, r, r < 2e-4, wanted[name], n_new=100)
            for name, r in rest.items()
        }

    stops = race(
        list(truth), advance, Rules(0.95, 1, 30), {}, {}, None, lambda name: name.split()[0]
    )
    assert {name for name, stop in stops.items() if stop.eliminated} == {"S two", "H3S two"}


# --- fitness --------------------------------------------------------------------------------------


def population(seed):
    rng = np.random.default_rng(seed)
    structures = []
    for formula in ("Cu", "Al", "Cu", "CuAl", "CuAl2", "Cu3Al", "Cu2Al2", "CuAl3"):
        atoms = Atoms(formula)
        atoms.info.update(enthalpy=float(rng.normal()), model="m")
        structures.append(atoms)
    return structures


def above(structures, energies):
    diagram = PhaseDiagram(
        [(a.get_chemical_formula(), e * len(a)) for a, e in zip(structures, energies, strict=True)],
        verbose=False,
    )
    return [
        e - diagram.decompose(a.get_chemical_formula())[0] / len(a)
        for a, e in zip(structures, energies, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_fitness_is_minus_the_distance_above_the_hull_of_g(seed):
    """Without free energies that of the enthalpies, as Ehull; with them the hull of ase over what
    was computed."""
    structures = population(seed)
    static = [atoms.info["enthalpy"] for atoms in structures]
    assert population_fitness(structures) == pytest.approx(
        [-h for h in above(structures, static)], abs=1e-9
    )
    gibbs = [h + 0.1 + 0.3 * np.sin(7 * k) for k, h in enumerate(static)]
    for atoms, g in zip(structures, gibbs, strict=True):
        atoms.info.update(gibbs=g, gibbs_error=1e-3, status="converged", gibbs_model="m")
    assert population_fitness(structures) == pytest.approx(
        [-h for h in above(structures, gibbs)], abs=1e-9
    )


def test_structures_without_energy_come_last_and_failures_at_their_estimate_among_all_compositions():
    structures = population(0)
    before = population_fitness(structures)
    structures[3].info.update(status="failed", gibbs_model="m")
    assert population_fitness(structures) == pytest.approx(before), (
        "nothing was computed, so the enthalpy is the estimate"
    )
    del structures[4].info["enthalpy"]
    values = population_fitness(structures)
    assert min(range(8), key=lambda i: values[i]) == 4 and np.isfinite(values).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(INFO, st.sampled_from(["H3S", "H2S", "S", "H", "LaH10", "LaS", "La", "LaH2S"])),
        max_size=8,
    )
)
def test_the_fitness_is_finite_whatever_the_infos_of_several_compositions_hold(pairs):
    values = fitness_values([info for info, _ in pairs], [name for _, name in pairs])
    assert len(values) == len(pairs) and all(
        type(value) is float and math.isfinite(value) for value in values
    )


# --- ranking and search ---------------------------------------------------------------------------


def mixing(atoms, evaluator, **options):
    """`fakes.shifted`, and 0.5 x (1 - x) eV/atom more at a fraction x of Al: the ions' motion takes
    compounds off the hull."""
    result = fakes.shifted(atoms, evaluator, **options)
    x = atoms.symbols.count("Al") / len(atoms)
    result.gibbs += 0.5 * x * (1.0 - x)
    return result


def intermetallics():
    ordered = Atoms(
        "CuAl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.95] * 3, pbc=True
    )
    return [bulk("Cu"), bulk("Cu", "bcc", a=2.87), bulk("Al"), ordered]


def ranked(structures, folder, keys):
    """By free energies that are `mixing`'s."""
    options = {"run_dir": folder, "free_energy": mixing, "workers": 1}
    return rank(structures, evaluator=fakes.Emt(), settings=keys, **options)


def test_a_ranking_of_several_compositions_says_who_is_on_the_hull(tmp_path, capsys):
    keys = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": {"hessian": 0}})
    structures = intermetallics()
    reevaluate(structures, fakes.Emt(), keys)
    enthalpies = [atoms.info["enthalpy"] for atoms in structures]
    heights = above(
        structures,
        [
            h + 0.2 + 0.125 * (len(set(a.symbols)) > 1)
            for h, a in zip(enthalpies, structures, strict=True)
        ],
    )
    found = ranked(structures, tmp_path, keys)
    assert {c.members[0]: c.gibbs_above_hull for c in found} == pytest.approx(
        dict(enumerate(heights)), abs=1e-9
    )
    assert [atoms.info["gibbs_above_hull"] for atoms in structures] == pytest.approx(
        heights, abs=1e-9
    )
    rows = csv_rows(tmp_path / "ranking.csv")
    assert [(row["formula"], row["rank_quantum"]) for row in rows[:3]] == [
        ("Al", "1"),
        ("Cu", "1"),
        ("Cu", "2"),
    ]

    read = read_ranking(tmp_path / "ranking.csv")
    assert [block[0].composition for block in by_composition(read)] == ["Al", "Cu", "AlCu"]
    on, over = hull_sentences(read)
    assert (
        "Al " in on
        and "Cu " in on
        and "AlCu" not in on
        and f"AlCu {1000 * heights[3]:.1f} ± " in over
    )
    contents = gather(tmp_path)
    assert [view.title for view in contents.rankings] == [
        "Al, 0 GPa, 0 K",
        "Cu, 0 GPa, 0 K",
        "AlCu, 0 GPa, 0 K",
    ]
    assert ("Hull at 0 GPa, 0 K", [on, over]) in contents.summary
    show_ranking(tmp_path)
    shown = capsys.readouterr().out
    assert all(
        f"{name}, 0 GPa, 0 K: ranking by free energy" in shown
        and (tmp_path / f"ranking-{name}.png").is_file()
        for name in ("Al", "Cu", "AlCu")
    )
    assert "On the hull of the free energies" in shown


def test_those_near_the_hull_get_their_free_energies_first(tmp_path):
    """Copper in the bcc lattice lies far lower per atom than aluminium, and is no candidate for
    anything."""
    keys = parse_settings(
        {"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": {"hessian": 0, "max_candidates": 2}}
    )
    structures = [bulk("Cu"), bulk("Cu", "bcc", a=2.87), bulk("Al")]
    reevaluate(structures, fakes.Emt(), keys)
    ranked(structures, tmp_path, keys)
    assert [atoms.info["status"] for atoms in structures] == ["converged", "estimated", "converged"]


SEARCH = {
    "formulaType": "var",
    "symbols": ["Cu", "Al"],
    "formula": [[1, 0], [0, 1]],
    "full_ele": False,
    "min_n_atoms": 1,
    "max_n_atoms": 4,
    "spacegroup": [123, 166, 194, 221, 225],
    "pPri": 0.5,
    "pressure": 10,
    "popSize": 6,
    "initSize": 8,
    "saveGood": 3,
    "numGen": 2,
    "randRatio": 0.4,
    "seed": 1,
    "Fitness": ["SSCHA"],
    "sscha": {"hessian": 0},
    "MainCalculator": {"calculator": "emt", "jobPrefix": "EMT", "maxStep": 20},
}


def test_a_search_of_variable_composition_ranks_by_the_hull_of_free_energies(tmp_path, monkeypatch):
    begin = host.start

    def start(*arguments, **options):
        state = begin(*arguments, **options)
        state.free_energy, state.workers = mixing, 1
        return state

    monkeypatch.setattr(host, "start", start)
    good = run(parse_settings(SEARCH), tmp_path).good
    assert len({atoms.get_chemical_formula(empirical=True) for atoms in good}) > 2
    assert {atoms.info["status"] for atoms in good} == {"converged"}
    heights = above(good, [atoms.info["gibbs"] for atoms in good])
    assert heights == pytest.approx(sorted(heights), abs=1e-9) and heights[0] == pytest.approx(
        0.0, abs=1e-9
    )
    assert [atoms.info["gibbs_above_hull"] for atoms in good] == pytest.approx(heights, abs=1e-9)
    rows = read_ranking(tmp_path / "results/anharmonic/ranking.csv")
    assert {atoms.info["candidate_id"] for atoms in good} <= {row.id for row in rows}


def test_the_lowest_to_be_labelled_are_those_near_the_hull():
    """Copper in the bcc lattice is lower per atom than aluminium, which is on the hull."""
    structures = [bulk("Cu"), bulk("Cu", "bcc", a=2.87), bulk("Al"), bulk("Al", "bcc", a=3.2)]
    for atoms, enthalpy in zip(structures, [-3.7, -3.6, -1.0, np.inf], strict=True):
        atoms.info["enthalpy"] = enthalpy
    assert lowest_distinct(structures, 2) == [0, 2] and lowest_distinct(structures, 4) == [
        0,
        2,
        1,
        3,
    ]


def test_labels_between_phases_of_one_composition_are_refused_for_several():
    learning = {"labeler": {"calculator": "gpaw"}, "select": "sscha"}
    with pytest.raises(InputError, match=r"learning\.select: sscha with formulaType: var"):
        parse_settings({**SEARCH, "learning": learning})
