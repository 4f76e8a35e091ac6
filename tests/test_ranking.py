"""Ranking by free energy: who is distinct, who gets SSCHA, what is never done twice, and what the
table says."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranking_fakes as fakes
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.io import read, write
from hypothesis import given, settings
from hypothesis import strategies as st
from records import a_candidate, csv_rows, stored_run
from waiting import wait_for

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.candidate import numbered
from magus_anharmonic.ranking.matcher import (
    Fingerprint,
    distinct,
    largest_difference,
    same,
    same_phase,
)
from magus_anharmonic.ranking.rank import SEED_KEY, rank
from magus_anharmonic.ranking.runs import chosen_groups, sscha_is_due
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.ranking.structures import rank_file, rank_structures, reevaluate
from magus_anharmonic.runs.record import read_run_record
from magus_anharmonic.settings import SschaSettings, parse_settings
from magus_anharmonic.structures import from_pymatgen, primitive, space_group, structure_id

DESIGN_COLUMNS = (
    "id, formula, natoms, pressure_GPa, temperature_K, spg_static, spg_quantum,"
    " enthalpy_eV_per_atom, gibbs_eV_per_atom, gibbs_error_eV_per_atom, n_evaluations, model,"
    " status, reason"
).split(", ")


def search_settings(pressure=0.0, learning=None, **sscha):
    keys = {"pressure": pressure, "Fitness": ["SSCHA"], "sscha": sscha, "numGen": 3}
    return parse_settings({**keys, "learning": learning} if learning else keys)


def metals(*symbols, scale=1.0):
    structures = [bulk(symbol) for symbol in symbols]
    for atoms in structures:
        atoms.set_cell(atoms.cell * scale, scale_atoms=True)
    return structures


def copper(n, largest=1.14):
    """``n`` candidates of one composition: fcc copper ever more stretched, up to ``largest``
    times."""
    return [metals("Cu", scale=scale)[0] for scale in np.linspace(1.0, largest, n)]


def ranked(structures, folder, keys, evaluator=None, fake=fakes.shifted, **options):
    evaluator = evaluator or fakes.Emt()
    reevaluate(structures, evaluator, keys)
    return rank(
        structures,
        evaluator=evaluator,
        settings=keys,
        run_dir=folder,
        free_energy=fake,
        **{"workers": 1, **options},
    )


def calls(folder):
    return read_jsonl(folder / "calls.jsonl")


def table_of(folder, name="ranking.csv"):
    return csv_rows(folder / name)


# ---------------------------------------------------------------------------------- who is distinct


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_structure_in_another_cell_orientation_and_order_is_the_same(seed):
    rng = np.random.default_rng(seed)
    atoms = fakes.h3s(shift=0.12)
    matrix = np.eye(3, dtype=int)
    while True:
        matrix = rng.integers(-1, 3, (3, 3))
        if 1 <= np.linalg.det(matrix) < 3.5:
            break
    other = make_supercell(atoms, matrix)
    other.rotate(rng.uniform(0, 360), rng.normal(size=3), rotate_cell=True)
    other.positions += rng.normal(size=3)
    other = other[rng.permutation(len(other))]
    other.wrap()
    assert same(Fingerprint(atoms), Fingerprint(other))


def test_near_degenerate_phases_survive():
    """R3m and Im-3m H3S within 0.1 meV/atom: MAGUS's 10 meV/atom would merge them."""
    structures = [fakes.h3s(), fakes.h3s(shift=0.08), fakes.h3s(shift=0.16)]
    assert distinct(structures, [-1.0, -1.0001, -1.00005]) == [[1], [2], [0]]


def test_the_same_phase_at_other_volume_or_enthalpy_or_composition_is_distinct():
    a, larger = fakes.h3s(), fakes.h3s(lattice=3.1 * 1.004)
    assert len(distinct([a, larger], [-1.0, -1.0])) == 2
    assert len(distinct([a, a.copy()], [-1.0, -1.0011])) == 2
    assert len(distinct([a, a.copy()], [-1.0, -1.0009])) == 1
    deuterated = a.copy()
    deuterated.numbers[0] = 34
    assert len(distinct([a, deuterated], [-1.0, -1.0])) == 2


def test_small_steps_do_not_chain_two_ends_together():
    steps = [fakes.h3s() for _ in range(4)]
    assert distinct(steps, [0.0, 0.0006, 0.0012, 0.0018]) == [[0, 1], [2, 3]]


def test_mirror_images_are_one():
    atoms = bulk("Te", "hcp", a=4.4, c=5.9)
    left = Atoms(
        "Te3",
        scaled_positions=[(0.27, 0, 0), (0, 0.27, 1 / 3), (0.73, 0.73, 2 / 3)],
        cell=atoms.cell.array,
        pbc=True,
    )
    right = Atoms(
        "Te3",
        scaled_positions=[(0.27, 0, 0), (0, 0.27, 2 / 3), (0.73, 0.73, 1 / 3)],
        cell=atoms.cell.array,
        pbc=True,
    )
    assert largest_difference(Fingerprint(left), Fingerprint(right)) < 1e-6


def test_a_centroid_and_its_compressed_copy_are_one_phase_but_r3m_is_another():
    assert same_phase(Fingerprint(fakes.h3s(3.1)), Fingerprint(fakes.h3s(3.04)))
    assert not same_phase(Fingerprint(fakes.h3s(3.1)), Fingerprint(fakes.h3s(3.04, shift=0.15)))


# ------------------------------------------------------------------------- who gets SSCHA, and when


def test_the_window_is_never_below_three_times_the_error_of_the_model():
    groups, enthalpies = [[0], [1], [2], [3]], [0.0, 0.02, 0.05, 0.2]
    assert chosen_groups(groups, enthalpies, SschaSettings(), None) == [0, 1, 2, 3]
    assert chosen_groups(groups, enthalpies, SschaSettings(window=0.03), None) == [0, 1]
    assert chosen_groups(groups, enthalpies, SschaSettings(window=0.03), 0.02) == [0, 1, 2]
    assert chosen_groups(
        groups, enthalpies, SschaSettings(window=0.03, max_candidates=1), 0.02
    ) == [0]
    assert chosen_groups([], [], SschaSettings(), 0.02) == []


def test_sscha_waits_for_a_converged_model_or_the_last_round():
    learning = {"labeler": {"calculator": "gpaw"}, "target_rmse": 0.01}
    keys = search_settings(learning=learning)
    assert not sscha_is_due(keys, 1, 3, 0.02)
    assert not sscha_is_due(keys, 1, 3, None)
    assert sscha_is_due(keys, 1, 3, 0.009)
    assert sscha_is_due(keys, 3, 3, 0.02)
    assert sscha_is_due(search_settings(learning=learning, when="every_generation"), 1, 3, None)
    assert sscha_is_due(search_settings(), 1, 3, None)
    assert not sscha_is_due(parse_settings({"pressure": 1.0}), 3, 3, None)


def test_before_its_time_nothing_runs_and_everything_is_static(tmp_path):
    keys = search_settings(learning={"labeler": {"calculator": "gpaw"}})
    found = ranked(metals("Cu", "Al"), tmp_path, keys, generation=1, n_generations=3)
    assert [c.status for c in found] == ["static", "static"]
    assert not calls(tmp_path)


# ------------------------------------------------------------------------------- the ranking itself


def test_the_table_holds_the_columns_of_the_design_and_the_numbers_of_sscha(tmp_path):
    structures = [fakes.h3s(), fakes.h3s(shift=0.1)]
    keys = search_settings(pressure=150.0)
    found = ranked(structures, tmp_path, keys, evaluator=fakes.Flat())
    rows = table_of(tmp_path)
    assert set(DESIGN_COLUMNS) <= set(rows[0])
    assert [row["id"] for row in rows] == [c.id for c in found]
    best = rows[0]
    enthalpy = -1.0 + 150.0 / 160.21766 * structures[0].get_volume() / 4
    assert float(best["enthalpy_eV_per_atom"]) == pytest.approx(enthalpy, abs=1e-5)
    assert float(best["gibbs_eV_per_atom"]) == pytest.approx(enthalpy + fakes.ZERO_POINT, abs=1e-5)
    assert (best["status"], best["model"], best["pressure_GPa"], best["formula"]) == (
        "converged",
        "flat",
        "150",
        "H3S",
    )
    assert best["rank_quantum"] == "1"


def test_flat_info_keys_are_set_on_every_structure_also_on_merged_ones(tmp_path):
    structures = [*metals("Cu", "Al"), bulk("Cu")]
    found = ranked(structures, tmp_path, search_settings())
    assert len(found) == 2
    for atoms in structures:
        info = atoms.info
        assert info["gibbs"] == pytest.approx(info["enthalpy"] + fakes.ZERO_POINT)
        assert (info["status"], info["gibbs_model"], info["model"]) == ("converged", "emt", "emt")
        assert info["spg_quantum"] == "Fm-3m (225)"
    assert structures[0].info["candidate_id"] == structures[2].info["candidate_id"]


def test_those_outside_the_selection_get_the_estimate_and_are_never_best(tmp_path):
    found = ranked(copper(5), tmp_path, search_settings(max_candidates=3))
    assert sorted(c.status for c in found) == ["converged"] * 3 + ["estimated"] * 2
    assert found[0].status == "converged"
    for c in found:
        if c.status == "estimated":
            assert c.gibbs == pytest.approx(c.enthalpy + fakes.ZERO_POINT, abs=1e-6)
            assert c.rank_quantum is None
            assert "3 SSCHA results" in c.reason


def test_an_estimate_below_every_result_is_not_first():
    common = dict(atoms=bulk("Cu"), pressure=0.0, temperature=0.0, model="m")
    low = a_candidate(id="a", enthalpy=-2.0, status="estimated", gibbs=-1.8, **common)
    dead = a_candidate(id="d", enthalpy=-2.5, status="failed", gibbs=-2.3, **common)
    done = a_candidate(id="b", enthalpy=-1.0, status="converged", gibbs=-0.8, **common)
    broken = a_candidate(id="c", enthalpy=None, status="failed", **common)
    order = numbered([low, broken, done, dead])
    assert [c.id for c in order] == ["b", "d", "a", "c"], (
        "a failed one in the place of its estimate"
    )
    assert [c.rank_quantum for c in order] == [1, None, None, None]
    assert [c.rank_static for c in order] == [3, 1, 2, None]


def test_a_stored_free_energy_is_not_computed_again(tmp_path):
    first = ranked(metals("Cu", "Al"), tmp_path, search_settings())
    again = ranked(metals("Cu", "Al"), tmp_path, search_settings())
    assert len(calls(tmp_path)) == 2
    assert [(c.id, c.gibbs, c.status) for c in again] == [(c.id, c.gibbs, c.status) for c in first]


def test_a_copy_in_another_orientation_reuses_the_stored_free_energy(tmp_path):
    ranked(metals("Cu"), tmp_path, search_settings())
    turned = bulk("Cu", cubic=True)
    turned.rotate(20, "z", rotate_cell=True)
    found = ranked([turned], tmp_path, search_settings())
    assert found[0].id != structure_id(bulk("Cu"))
    assert found[0].status == "converged"
    assert len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    "change",
    [{"pressure": 10.0}, {"temperature": 300.0}, {"n_configs": 500}, {"supercell": [3, 3, 3]}],
)
def test_another_pressure_temperature_or_setting_is_another_free_energy(tmp_path, change):
    ranked(metals("Cu"), tmp_path, search_settings())
    ranked(metals("Cu"), tmp_path, search_settings(**change))
    assert len(calls(tmp_path)) == 2
    assert len({call["folder"] for call in calls(tmp_path)}) == 2


def test_keys_that_only_choose_candidates_do_not_change_the_identity(tmp_path):
    ranked(metals("Cu"), tmp_path, search_settings())
    ranked(
        metals("Cu"),
        tmp_path,
        search_settings(max_candidates=5, window=1.0, when="every_generation", seed_back=False),
    )
    assert len(calls(tmp_path)) == 1


def test_no_ranking_mixes_two_models(tmp_path):
    structures = metals("Cu", "Al")
    reevaluate(structures, fakes.Emt("old"), search_settings())
    with pytest.raises(ValueError, match="model old"):
        rank(structures, evaluator=fakes.Emt("new"), settings=search_settings(), run_dir=tmp_path)


def test_temperatures_run_one_after_the_other_and_the_first_ranks(tmp_path):
    structures = metals("Cu")
    found = ranked(structures, tmp_path, search_settings(temperature=[100.0, 300.0]))
    assert [(call["T"], call["started"]) for call in calls(tmp_path)] == [
        (100.0, False),
        (300.0, True),
    ]
    assert found[0].temperature == 100.0
    cold, warm = table_of(tmp_path)[0], table_of(tmp_path, "ranking_300K.csv")[0]
    assert float(warm["gibbs_eV_per_atom"]) - float(cold["gibbs_eV_per_atom"]) == pytest.approx(
        -0.02, abs=1e-6
    )
    assert structures[0].info["gibbs"] == pytest.approx(found[0].gibbs)


def test_same_seed_same_draws_whatever_the_place_in_the_queue(tmp_path):
    drawn = {}

    def note(atoms, evaluator, **options):
        drawn.setdefault(str(atoms.symbols), []).append(options["seed"])
        return fakes.shifted(atoms, evaluator, **options)

    for name, symbols, seed in (("a", "CuAl", 1), ("b", "AlCu", 1), ("c", "CuAl", 2)):
        pair = [symbols[:2], symbols[2:]]
        ranked(metals(*pair), tmp_path / name, search_settings(), fake=note, seed=seed)
    assert drawn["Cu"][0] == drawn["Cu"][1] != drawn["Cu"][2]
    assert drawn["Cu"][0] == drawn["Al"][0], (
        "common random numbers: what alike candidates share cancels in their difference"
    )


# ----------------------------------------------------------------------------------- quantum phases


def test_im3m_from_a_four_and_an_eight_atom_cell_is_one_phase_with_one_free_energy(tmp_path):
    """The eight-atom cell is first run as it is; its result has a smaller primitive cell and is run
    again from that."""
    small = fakes.h3s(shift=0.12)
    large = make_supercell(fakes.h3s(), [[1, 1, 0], [0, 1, 0], [0, 0, 2]])
    large.positions[5] += [0.11, 0.0, 0.0]
    keys = search_settings(pressure=150.0)
    found = ranked([small, large], tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)
    assert [call["natoms"] for call in calls(tmp_path)] == [4, 8]
    assert {c.spg_quantum for c in found} == {"Im-3m (229)"}
    assert found[0].gibbs == found[1].gibbs == pytest.approx(-1.0 + 0.004)
    assert [c.rank_quantum for c in found] == [1, None]
    assert found[1].same_as == found[0].id
    folders = sorted(path.name for path in tmp_path.glob("sscha/*"))
    assert (
        len({record.folder for record in FreeEnergyStore(tmp_path / "free_energies.db").runs()})
        == 2
    )
    assert folders == [] or len(folders) == 2


def test_several_large_cells_that_end_in_one_phase_share_one_run_of_its_primitive_cell(tmp_path):
    structures = []
    for shift in (0.11, 0.16):
        large = make_supercell(fakes.h3s(), [[1, 1, 0], [0, 1, 0], [0, 0, 2]])
        large.positions[5] += [shift, 0.0, 0.0]
        structures.append(large)
    keys = search_settings(pressure=150.0)
    found = ranked(structures, tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)
    assert [call["natoms"] for call in calls(tmp_path)] == [8, 8, 4]
    assert [c.gibbs for c in found] == [pytest.approx(-0.996)] * 2
    assert "primitive cell" in found[0].reason
    again = ranked(structures, tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)
    assert len(calls(tmp_path)) == 3
    assert [c.gibbs for c in again] == [c.gibbs for c in found]


def test_a_seed_reuses_the_free_energy_of_its_run_while_it_is_that_phase(tmp_path):
    keys = search_settings(pressure=150.0)
    first = ranked(
        [fakes.h3s(shift=0.12)], tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising
    )[0]
    seed = fakes.h3s(lattice=3.05)
    seed.info[SEED_KEY] = first.run_id
    found = ranked([seed], tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)[0]
    assert len(calls(tmp_path)) == 1
    assert (found.gibbs, found.status, found.seed_of) == (first.gibbs, "converged", first.run_id)
    rolled_down = fakes.h3s(lattice=3.05, shift=0.2)
    rolled_down.info[SEED_KEY] = first.run_id
    ranked([rolled_down], tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)
    assert len(calls(tmp_path)) == 2


def test_quantum_traj_holds_the_centroids_with_what_is_known(tmp_path):
    keys = search_settings(pressure=150.0)
    static = fakes.h3s(shift=0.12)
    found = ranked([static], tmp_path, keys, evaluator=fakes.Flat(), fake=fakes.symmetrising)[0]
    frames = read(tmp_path / "quantum.traj", index=":")
    assert len(frames) == 1
    info = frames[0].info
    assert (info["candidate_id"], info["spg_quantum"], info["spg_static"]) == (
        found.id,
        "Im-3m (229)",
        "R3m (160)",
    )
    assert info["gibbs"] == pytest.approx(found.gibbs)
    assert same_phase(Fingerprint(frames[0]), Fingerprint(fakes.h3s()))


# --------------------------------------------------------------------------- failures and processes


def test_a_candidate_that_fails_is_flagged_and_the_others_are_ranked(tmp_path):
    structures = metals("Cu", "Au", "Ag")
    found = {
        c.formula: c
        for c in ranked(structures, tmp_path, search_settings(), fake=fakes.failing_on_gold)
    }
    assert found["Cu"].status == "converged"
    assert found["Au"].status == found["Ag"].status == "failed"
    assert "dissociated" in found["Au"].reason
    assert "no space left" in found["Ag"].reason
    for name in ("Au", "Ag"):
        assert (
            found[name].gibbs is not None and "in the place of its estimate" in found[name].reason
        )
    assert structures[1].info["gibbs"] == found["Au"].gibbs
    assert "dissociated" in structures[1].info["reason"]


def test_rotating_molecules_are_named_in_the_table_and_in_the_structure(tmp_path):
    structures = metals("Cu")
    (candidate,) = ranked(structures, tmp_path, search_settings(), fake=fakes.rotating)
    assert candidate.status == "converged" and "rotating H2 units" in candidate.reason
    assert "rotating H2 units" in structures[0].info["reason"]


def test_candidates_without_a_chance_stop_early_and_the_best_keep_their_order(tmp_path, caplog):
    caplog.set_level("INFO", logger="magus_anharmonic")
    everything = ranked(
        copper(8), tmp_path / "fixed", search_settings(allocation="fixed"), fake=fakes.falling
    )
    raced = ranked(copper(8), tmp_path / "race", search_settings(keep_best=2), fake=fakes.falling)
    assert [c.id for c in raced[:2]] == [c.id for c in everything[:2]]
    assert "so far (1 of" in caplog.text and "unconverged" not in caplog.text, "a round is no end"
    assert all(c.status == "converged" for c in [*everything, *raced[:2]])
    assert {c.status for c in raced[2:]} == {"eliminated"} and all(
        "not among the lowest 2" in c.reason for c in raced[2:]
    )
    assert (
        sum(c.free_energy.n_evaluations for c in raced)
        < sum(c.free_energy.n_evaluations for c in everything) / 2
    )


def test_an_eliminated_candidate_takes_part_again_when_the_winner_is_gone(tmp_path):
    settings = search_settings(keep_best=1)
    winner, loser = ranked(copper(2), tmp_path, settings, fake=fakes.falling)
    assert (winner.status, loser.status) == ("converged", "eliminated")
    (alone,) = ranked(copper(2)[1:], tmp_path, settings, fake=fakes.falling)
    assert alone.status == "converged" and alone.gibbs < loser.gibbs
    assert alone.free_energy.n_evaluations > loser.free_energy.n_evaluations


def test_a_run_that_the_budget_cut_short_waits_outside_of_the_ranking_for_a_larger_one(tmp_path):
    structures = metals("Cu")
    (short,) = ranked(structures, tmp_path, search_settings(budget=500), fake=fakes.falling)
    assert short.status == "unconverged" and short.reason.startswith(
        "the budget of 500 force evaluations is spent"
    )
    assert (
        short.gibbs is not None
        and short.rank_quantum is None
        and short.p_lowest_sampling is None
        and not short.ranked
    )
    assert (
        structures[0].info["status"] == "unconverged" and structures[0].info["gibbs"] == short.gibbs
    )
    assert not (tmp_path / "quantum.traj").exists(), (
        "its centroids are not where it would have ended"
    )
    n_calls = len(calls(tmp_path))
    (again,) = ranked(metals("Cu"), tmp_path, search_settings(budget=500), fake=fakes.falling)
    assert (again.status, again.gibbs) == (short.status, short.gibbs) and len(
        calls(tmp_path)
    ) == n_calls
    (longer,) = ranked(metals("Cu"), tmp_path, search_settings(budget=50_000), fake=fakes.falling)
    assert longer.status == "converged" and longer.rank_quantum == 1 and longer.gibbs < short.gibbs


def test_a_budget_that_ends_after_the_relaxations_leaves_them_in_the_ranking_with_their_errors(
    tmp_path,
):
    """Two that are not told apart: their relaxations have ended, more samples would only have made
    the error bars smaller."""

    def close():
        return [metals("Cu", scale=scale)[0] for scale in (0.99, 0.998)]

    sscha = {"n_configs": 100, "error_tolerance": 2e-4}
    free = ranked(close(), tmp_path / "whole", search_settings(**sscha), fake=fakes.falling)
    whole = sum(c.free_energy.n_evaluations for c in free)
    found = ranked(
        close(), tmp_path / "budget", search_settings(**sscha, budget=whole), fake=fakes.falling
    )
    assert [(c.status, c.rank_quantum) for c in found] == [("converged", 1), ("converged", 2)]
    assert all(
        f"the budget of {whole} force evaluations is spent before its rank was known" in c.reason
        for c in found
    )
    assert 0.0 < found[1].p_lowest_sampling < found[0].p_lowest_sampling < 1.0


def test_an_estimate_rests_on_no_upper_bound(tmp_path):
    def stuck_on_aluminium(atoms, evaluator, **options):
        result = fakes.shifted(atoms, evaluator, **options)
        if "Al" in atoms.symbols:
            result.status, result.reason, result.gibbs = (
                "unconverged",
                "not converged",
                result.gibbs + 5.0,
            )
        return result

    keys = search_settings(max_candidates=4, allocation="fixed")
    found = {
        c.formula: c
        for c in ranked(
            metals("Pt", "Au", "Cu", "Ni", "Al"), tmp_path, keys, fake=stuck_on_aluminium
        )
    }
    assert sorted(c.status for c in found.values()) == [
        "converged",
        "converged",
        "converged",
        "estimated",
        "unconverged",
    ]
    estimated = next(c for c in found.values() if c.status == "estimated")
    assert "3 SSCHA results" in estimated.reason and estimated.gibbs == pytest.approx(
        estimated.enthalpy + fakes.ZERO_POINT, abs=1e-3
    )


def test_the_error_of_the_model_ends_the_sampling(tmp_path):
    """0.3 of 10 meV/atom: a sampling error of 1 meV/atom is small enough, and G stops where the
    relaxation does."""
    structures = metals("Cu")
    (candidate,) = ranked(
        structures, tmp_path, search_settings(), fake=fakes.falling, energy_rmse=0.01
    )
    assert candidate.status == "converged" and candidate.p_lowest_total == 1.0


def test_a_physical_failure_lasts_and_a_defect_of_the_machine_is_tried_again(tmp_path):
    ranked(metals("Au", "Ag"), tmp_path, search_settings(), fake=fakes.failing_on_gold)
    found = {
        c.formula: c.status
        for c in ranked(metals("Au", "Ag"), tmp_path, search_settings(), fake=fakes.shifted)
    }
    assert found == {"Au": "failed", "Ag": "converged"}


def test_a_folder_in_the_way_says_nothing_about_the_structure(tmp_path):
    def in_the_way(atoms, evaluator, **options):
        raise InputError(f"{options['directory']}: holds another SSCHA run")

    (refused,) = ranked(metals("Au"), tmp_path, search_settings(), fake=in_the_way)
    assert refused.status == "failed" and "holds another" in refused.reason
    (again,) = ranked(metals("Au"), tmp_path, search_settings(), fake=fakes.shifted)
    assert again.status == "converged"


def test_temperatures_after_a_failure_are_not_run(tmp_path):
    ranked(
        metals("Au"),
        tmp_path,
        search_settings(temperature=[0.0, 300.0]),
        fake=fakes.failing_on_gold,
    )
    assert "0 K" in table_of(tmp_path, "ranking_300K.csv")[0]["reason"]


def test_a_structure_without_enthalpy_is_in_the_table_as_failed(tmp_path):
    structures = metals("Cu", "Al")
    reevaluate(structures, fakes.Emt(), search_settings())
    structures[1].info.update(enthalpy=float("nan"), reason="relaxation: it dissolved")
    rank(
        structures,
        evaluator=fakes.Emt(),
        settings=search_settings(),
        run_dir=tmp_path,
        free_energy=fakes.shifted,
        workers=1,
    )
    assert [(row["formula"], row["status"], row["reason"]) for row in table_of(tmp_path)][1] == (
        "Al",
        "failed",
        "relaxation: it dissolved",
    )


@pytest.mark.slow
def test_candidates_run_in_processes_and_one_that_dies_takes_nobody_with_it(tmp_path):
    found = {
        c.formula: c
        for c in ranked(
            metals("Cu", "Ni", "Al"),
            tmp_path,
            search_settings(),
            fake=fakes.failing_on_gold,
            workers=2,
        )
    }
    assert found["Cu"].status == found["Al"].status == "converged"
    assert found["Ni"].status == "failed" and "process died" in found["Ni"].reason
    assert os.getpid() not in {call["pid"] for call in calls(tmp_path)}
    alone = ranked(metals("Cu", "Al"), tmp_path / "serial", search_settings(), workers=1)
    assert [c.gibbs for c in alone] == [found[c.formula].gibbs for c in alone]


INTERRUPTED = """
import sys
sys.path.insert(0, {tests!r})
import ranking_fakes as fakes
from ase.build import bulk
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.settings import parse_settings

if __name__ == "__main__":
    keys = parse_settings({{"Fitness": ["SSCHA"], "sscha": {{}}}})
    structures = [bulk("Cu"), bulk("Al")]
    reevaluate(structures, fakes.Emt(), keys)
    rank(structures, evaluator=fakes.Emt(), settings=keys, run_dir={folder!r}, free_energy=fakes.slow, workers=2)
"""


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.full),
    ],
)
def test_interrupted_it_leaves_no_process_behind(tmp_path, sent):
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: len(calls(tmp_path)) == 2, "no two calls", 300)
    process.send_signal(sent)
    process.wait(timeout=120)
    process.stderr.close()
    workers = {call["pid"] for call in calls(tmp_path)}
    wait_for(lambda: not any(alive(pid) for pid in workers), "workers live on")


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except OSError:
        return False


# --------------------------------------------------------------------------------- the store, files


def test_the_store_gives_back_what_was_put_in_also_hashes_that_read_as_numbers(tmp_path):
    key = Key("123456789012", 150.0, 0.0, "1234e5678901")
    atoms = fakes.h3s(shift=0.1)
    record = stored_run(
        "000000000012",
        key,
        atoms,
        "unconverged",
        reason="30 populations",
        enthalpy=-1.0,
        gibbs=-0.8,
        gibbs_error=1e-3,
        gibbs_raw=-0.81,
        finite_size=0.01,
        volume=9.3,
        n_evaluations=3000,
        n_atoms_supercell=32,
        space_group_start="R3m (160)",
        space_group="Im-3m (229)",
        symmetry_tolerance=0.03,
        centroids=fakes.h3s(),
        parent="111111111111",
        reduced="222222222222",
    )
    failed = stored_run("000000000013", key, atoms, "failed", reason="it melted")
    FreeEnergyStore(tmp_path / "x.db").put(record)
    FreeEnergyStore(tmp_path / "x.db").put(failed)
    found = FreeEnergyStore(tmp_path / "x.db")
    assert found.get("000000000012", key) == record
    assert found.get("000000000013", key) == failed
    assert found.get("000000000012", Key("other", 150.0, 0.0, "1234e5678901")) is None


def test_the_store_of_a_generation_is_as_that_one_left_it(tmp_path):
    """A record that generation 1 made and 2 and 3 changed, and one of 2; the folders of the runs
    say the same when the database is lost."""
    key, file = Key("model", 150.0, 0.0, "settings"), tmp_path / "x.db"
    first = stored_run(
        "000000000012",
        key,
        fakes.h3s(),
        "converged",
        gibbs=-0.8,
        gibbs_error=1e-3,
        centroids=fakes.h3s(),
        error_vector=(0.5, 1.0),
    )
    store = FreeEnergyStore(file, 1)
    store.put(first)
    store.put(first.updated(gibbs=-0.9))
    store = FreeEnergyStore(file, 2)
    store.put(stored_run("000000000013", key, fakes.h3s(3.2), "converged", gibbs=-0.7))
    store.put(replace(first.updated(gibbs=-0.9), reduced="000000000013"))
    FreeEnergyStore(file, 3).put(first.updated(gibbs=None, gibbs_error=None, status="failed"))
    for _ in range(2):
        stores = [FreeEnergyStore(file, generation) for generation in (1, 2, 3, None)]
        found = [
            [(r.structure[-2:], r.gibbs, r.reduced[-2:], r.status) for r in store.runs()]
            for store in stores
        ]
        last = [("12", None, "", "failed"), ("13", -0.7, "", "converged")]
        assert found == [
            [("12", -0.9, "", "converged")],
            [("12", -0.9, "13", "converged"), ("13", -0.7, "", "converged")],
            last,
            last,
        ]
        assert [r.generation for r in FreeEnergyStore(file).runs()] == [3, 2]
        file.unlink()
    again = FreeEnergyStore(file, 1)
    again.put(first.updated(gibbs=-1.0))
    assert [
        (r.gibbs, r.before) for r in FreeEnergyStore(file).runs() if r.structure == first.structure
    ] == [(-1.0, ())]


def test_rank_structures_takes_any_calculator_and_leaves_the_structures_alone(tmp_path):
    from ase.calculators.emt import EMT

    structures = metals("Cu", "Al")
    before = [atoms.copy() for atoms in structures]
    found = rank_structures(
        structures,
        EMT(),
        search_settings(),
        tmp_path,
        relax=False,
        free_energy=fakes.shifted,
        workers=1,
    )
    assert [c.status for c in found] == ["converged", "converged"]
    assert structures == before


def test_candidates_are_relaxed_as_the_block_of_the_calculator_says(tmp_path, monkeypatch):
    from magus_anharmonic.potential import relax as relaxations

    square = Atoms(
        "Cu4",
        scaled_positions=[[0, 0, 0], [0.5, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]],
        cell=[2.4, 2.4, 4.8],
        pbc=True,
    )
    used = []
    relax = relaxations.relax
    monkeypatch.setattr(
        relaxations, "relax", lambda *a, **options: used.append(options) or relax(*a, **options)
    )

    def enthalpy(**keys):
        block = {"calculator": "mattersim", "max_step": 300, **keys}
        given = parse_settings({"pressure": 0.0, "MainCalculator": block})
        return (
            rank_structures([square], fakes.Emt(), given, tmp_path / str(len(used)))[0].enthalpy
            or 0.0
        )

    saddle = enthalpy()
    assert enthalpy(perturbations=2, optimizer="bfgs") < saddle - 1e-3
    assert [(options["perturbations"], options["optimizer"]) for options in used] == [
        (0, "ase"),
        (2, "bfgs"),
    ]


def test_what_came_of_every_structure_is_in_one_extxyz_and_one_json(tmp_path):
    """Merged, without SSCHA, failed: each with its own info, and the numbers of the table."""
    given = [bulk("Cu"), bulk("Cu", cubic=True), bulk("Fe"), bulk("Cu", "bcc", a=2.9)]
    for atoms, name in zip(given, ("a b.vasp", "b.vasp", "c.vasp", "d.vasp"), strict=True):
        atoms.info.update(name=name, status="mine", origin={"icsd": 7}, note="one\ntwo")
    write(tmp_path / "a.cif", given[0])
    given[0].info["spacegroup"] = read(tmp_path / "a.cif").info["spacegroup"]
    keys = search_settings(max_candidates=1)
    found = rank_structures(
        given, fakes.Emt(), keys, tmp_path, free_energy=fakes.shifted, workers=1
    )
    assert [(c.status, c.label) for c in found] == [
        ("converged", "a b.vasp"),
        ("estimated", "d.vasp"),
        ("failed", "c.vasp"),
    ]
    assert found[0].merged == "b.vasp" and found[2].reason.startswith("relaxation: ")
    frames = read(tmp_path / "relaxed.extxyz", ":")
    assert [(f.info["name"], f.info["status"], f.info["natoms"]) for f in frames] == [
        ("a b.vasp", "converged", 1),
        ("b.vasp", "converged", 4),
        ("c.vasp", "failed", 1),
        ("d.vasp", "estimated", 1),
    ]
    assert all(f.info["status_given"] == "mine" for f in frames)
    assert all(f.info["origin"] == {"icsd": 7} and f.info["note"] == "one two" for f in frames)
    assert frames[0].info["spacegroup"] == "P 1 (1)"
    for frame, row in ((frames[0], found[0]), (frames[3], found[1])):
        assert frame.info["enthalpy_eV_per_atom"] == pytest.approx(row.enthalpy, abs=1e-7)
        assert frame.info["gibbs_eV_per_atom"] == pytest.approx(row.gibbs, abs=1e-7)
        assert frame.get_potential_energy() / len(frame) == pytest.approx(row.enthalpy, abs=1e-7)
    assert "gibbs_eV_per_atom" not in frames[2].info

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["columns"]["gibbs_eV_per_atom"]["unit"] == "eV/atom"
    for row, candidate in zip(results["rows"], found, strict=True):
        assert set(results["columns"]) < set(row)
        assert (row["gibbs_eV_per_atom"], row["name"]) == (candidate.gibbs, candidate.name)
        (atoms,) = from_pymatgen(row["structure"])
        assert structure_id(atoms) == row["id"]
    assert from_pymatgen(results["rows"][0]["centroids"]) and not results["rows"][1]["centroids"]


def test_the_space_group_of_a_broken_structure_is_p1_also_when_spglib_has_been_told_to_raise(
    monkeypatch,
):
    import spglib.error

    coincident = Atoms("Cu2", positions=[[0, 0, 0], [0.02, 0, 0]], cell=[3, 3, 3], pbc=True)
    for old in (True, False):
        monkeypatch.setattr(spglib.error, "OLD_ERROR_HANDLING", old, raising=False)
        assert space_group(coincident) == "P1 (1)"
        assert len(primitive(coincident)) == 2


def test_rank_file_leaves_a_record_and_writes_nothing_for_bad_input(tmp_path, tiny_checkpoint):
    keys = parse_settings(
        {
            "pressure": 10.0,
            "MainCalculator": {
                "calculator": "mattersim",
                "checkpoint": str(tiny_checkpoint),
                "maxStep": 2,
            },
        }
    )
    with pytest.raises(InputError):
        rank_file(tmp_path / "nothing.cif", keys, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "cu.vasp", bulk("Cu"))
    found = rank_file(tmp_path / "cu.vasp", keys, tmp_path / "out")
    assert [c.status for c in found] == ["static"]
    record = read_run_record(tmp_path / "out")
    assert record.model == found[0].model


def test_what_cannot_be_sent_to_another_process_stays_in_this_one(tmp_path):
    evaluator = fakes.Emt()
    evaluator.handle = lambda: None
    found = ranked(metals("Cu", "Al"), tmp_path, search_settings(), evaluator=evaluator, workers=2)
    assert [c.status for c in found] == ["converged", "converged"]
    assert {call["pid"] for call in calls(tmp_path)} == {os.getpid()}


def test_a_calculator_by_its_short_name_relaxes_as_by_its_import_path():
    from magus_anharmonic.ranking.structures import _relaxation_block

    blocks = [
        _relaxation_block(parse_settings({"MainCalculator": {"calculator": name, "eps": 0.01}}))
        for name in ("emt", "ase.calculators.emt.EMT")
    ]
    assert [(block.eps, block.max_step) for block in blocks] == [(0.01, 100)] * 2
