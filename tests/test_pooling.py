"""Duplicates: runs of one phase in one supercell are one sample, runs in another supercell tell
what the supercell costs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from crystal_models import Crystals, crystal
from hypothesis import given, settings
from hypothesis import strategies as st
from records import a_candidate, csv_rows, stored_run

from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.jobs import with_result
from magus_anharmonic.ranking.phases import (
    combined,
    common_error,
    label_phases,
    merge_duplicates,
    same_supercell,
)
from magus_anharmonic.ranking.store import FreeEnergyStore, Key
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.ranking.uncertainty import CommonNumbers, difference_error, with_probabilities
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.structures import stripped

PHASE = crystal((3.0,) * 3, 1.0, 0.2, -0.3, 1.0)
MODEL = Crystals([PHASE])
FEWER = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
"""Four cells, with the symmetry of the cube."""
KEY = Key(MODEL.model_id, 0.0, 0.0, "0123456789ab")


# --------------------------------------------------------------------------- the mean and its error


def test_independent_runs_count_by_the_inverse_squares_of_their_errors():
    found = combined([1.0, 1.004], np.diag([1e-6, 4e-6]), remaining=[1.0, 1.0])
    assert found.weights == pytest.approx([0.8, 0.2]) and found.value == pytest.approx(1.0008)
    assert found.error == pytest.approx(math.sqrt(0.8e-6))


def test_runs_with_the_same_random_numbers_add_nothing_to_one_another():
    shared = combined([1.0, 1.0], np.full((2, 2), 1e-6))
    assert shared.error == pytest.approx(1e-3), "twice the same configurations are one sample"
    worse = combined([1.0, 1.001], np.array([[1e-6, 1.5e-6], [1.5e-6, 4e-6]]))
    assert worse.weights == pytest.approx([1.0, 0.0]) and worse.error == pytest.approx(1e-3)


def test_the_scatter_of_the_pooled_value_is_its_error_bar():
    """10,000 times three runs, two of them with common numbers; the Birge factor is left out (it
    looks at each draw)."""
    matrix = np.array([[1.0, 0.6, 0.0], [0.6, 1.5, 0.0], [0.0, 0.0, 2.0]])
    samples = np.random.default_rng(3).multivariate_normal(np.zeros(3), matrix, size=10_000)
    found = combined(np.zeros(3), matrix)
    assert np.std(samples @ found.weights) == pytest.approx(found.error, rel=0.03)
    assert np.std(samples @ found.weights) < 0.95 * min(
        np.std(samples @ weights) for weights in np.eye(3)
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_pooled_value_lies_between_and_its_error_is_never_above_the_smallest(n, seed):
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, 3)) * 10.0 ** rng.uniform(-2, 0)
    matrix = factors @ factors.T + np.diag(rng.uniform(1e-6, 1.0, n))
    values = rng.normal(size=n)
    found = combined(values, matrix, remaining=np.full(n, 1e3))
    assert values.min() - 1e-9 <= found.value <= values.max() + 1e-9
    assert found.weights.min() >= 0.0 and found.weights.sum() == pytest.approx(1.0)
    assert found.error <= np.sqrt(np.diag(matrix)).min() * (1 + 1e-9)


def test_runs_that_disagree_widen_the_error():
    agree, apart = (combined([0.0, d], np.diag([1e-6, 1e-6])) for d in (1e-3, 10e-3))
    assert agree.error == pytest.approx(1e-3 / math.sqrt(2.0))
    assert apart.error == pytest.approx(10e-3 / 2.0), "Birge: half their distance"
    relaxing = combined([0.0, 10e-3], np.diag([1e-6, 1e-6]), remaining=[0.0, 10e-3])
    assert relaxing.error < 1.1 * agree.error, (
        "one that may still fall by as much does not disagree"
    )


# -------------------------------------------------------------------- which supercells are the same


def state(supercell_matrix, shift=(0.0, 0.0, 0.0), edges=(3.0, 3.0, 3.0)):
    atoms = Atoms(
        "LiH", positions=[np.zeros(3), np.array(edges) / 2.0 + shift], cell=edges, pbc=True
    )
    n = int(
        round(
            abs(
                np.linalg.det(
                    np.diag(supercell_matrix)
                    if np.ndim(supercell_matrix) == 1
                    else np.array(supercell_matrix)
                )
            )
        )
    )
    return SschaState(atoms, supercell_matrix, np.zeros((n, 2, 2, 3, 3)), 0.0)


def turned(one, order=(1, 2, 0)):
    """The same crystal and supercell with the axes exchanged, other lattice vectors, and the atoms
    in another order."""
    rotation = np.eye(3)[list(order)]
    change = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    atoms = Atoms(
        one.atoms.numbers,
        one.atoms.positions @ rotation,
        cell=change @ one.atoms.cell.array @ rotation,
        pbc=True,
    )[::-1]
    matrix = np.diag(one.supercell_matrix) @ np.rint(np.linalg.inv(change)).astype(int)
    return replace(
        one, atoms=atoms, supercell_matrix=tuple(tuple(int(x) for x in row) for row in matrix)
    )


def test_a_supercell_is_the_same_however_it_is_described():
    for one in (
        state((2, 2, 1), (0.0, 0.0, 0.2)),
        state((3, 1, 2), edges=(3.0, 3.1, 3.4)),
        state((2, 2, 2)),
    ):
        assert (
            same_supercell(one, one)
            and same_supercell(one, turned(one))
            and same_supercell(turned(one), one)
        )
    wider = state((2, 2, 2), edges=(3.02,) * 3)
    assert same_supercell(state((2, 2, 2)), wider), (
        "two relaxations at one pressure end at nearly one volume"
    )


def test_supercells_that_differ_in_size_shape_or_direction_are_not_the_same():
    cubic = state((2, 2, 2))
    assert not same_supercell(cubic, state((2, 2, 1)))
    assert not same_supercell(state((2, 1, 1)), state(((1, 1, 0), (-1, 1, 0), (0, 0, 1)))), (
        "as many atoms, another lattice"
    )
    along, across = state((1, 1, 2), (0.0, 0.0, 0.3)), state((2, 1, 1), (0.0, 0.0, 0.3))
    assert not same_supercell(along, across), (
        "the same lattice, in another direction of the crystal"
    )
    assert same_supercell(across, state((1, 2, 1), (0.0, 0.0, 0.3))), (
        "these two are one by symmetry"
    )
    heavy = cubic.atoms.copy()
    heavy.set_masses([7.0, 2.014])
    assert not same_supercell(cubic, replace(cubic, atoms=heavy)), (
        "deuterium is no sample of hydrogen"
    )
    assert not same_supercell(cubic, replace(cubic, temperature=300.0))


# --------------------------------------------------------------------------- from runs to the table


class Runs:
    """Runs of one crystal under one key, as a ranking leaves them."""

    def __init__(self, root):
        self.root, self.store = root, FreeEnergyStore(root / "free_energies.db")
        self.common = CommonNumbers(root / "sscha")
        self.candidates: list[Candidate] = []

    def add(self, name, *, seed, supercell=(2, 2, 2), n_configs=100, **numbers):
        result = free_energy(
            PHASE.atoms,
            MODEL,
            supercell=supercell,
            n_configs=n_configs,
            seed=seed,
            cell="fixed",
            reference_spacing=0.1,
            directory=self.root / "sscha" / KEY.folder(name),
        )
        record = stored_run(
            name,
            KEY,
            PHASE.atoms,
            **{**vars(result.numbers), **numbers},
            centroids=stripped(result.centroids),
        )
        self.store.put(record)
        candidate = a_candidate(name, PHASE.atoms, enthalpy=-1.0, model=KEY.model)
        self.candidates.append(with_result(candidate, record, self.store.final(record)))
        return record

    def table(self):
        merged = merge_duplicates(
            label_phases(self.candidates),
            self.store,
            KEY,
            self.root / "sscha",
            self.common.covariance,
        )
        return {c.id: c for c in merged}


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_independent_runs_of_one_supercell_are_one_sample(runs):
    one, other = runs.add("aaaa", seed=1), runs.add("bbbb", seed=2)
    table = runs.table()
    leader = next(c for c in table.values() if not c.same_as)
    low, high = sorted((one.gibbs, other.gibbs))
    assert low < leader.gibbs < high
    assert leader.gibbs_error == pytest.approx(
        (one.gibbs_error**-2 + other.gibbs_error**-2) ** -0.5
    )
    assert leader.gibbs_error < min(one.gibbs_error, other.gibbs_error)
    assert leader.gibbs == pytest.approx(
        leader.free_energy.gibbs_raw + leader.free_energy.finite_size
    )
    assert (
        len(leader.pooled) == 2
        and "pooled from 2 runs" in leader.reason
        and leader.duplicate_spread is None
    )
    duplicate = next(c for c in table.values() if c.same_as)
    assert duplicate.gibbs == high and not duplicate.pooled, (
        "the row of the other one keeps its own number"
    )


def test_what_one_run_of_a_phase_could_not_decide_another_one_did(runs):
    open_ = "P4mm (99) or P4/mmm (123): not decided, 2.3 sigma"
    runs.add("aaaa", seed=1, gibbs=-1.0, space_group=open_)
    runs.add("bbbb", seed=2, gibbs=-0.9999, space_group="P4/mmm (123)")
    table = runs.table()
    assert table["aaaa"].same_as == "bbbb" and table["bbbb"].spg_quantum == "P4/mmm (123)"


def test_the_same_random_numbers_twice_are_no_second_sample(runs):
    one, _ = runs.add("aaaa", seed=1), runs.add("bbbb", seed=1)
    leader = runs.table()["aaaa"]
    assert not leader.pooled and "pooled" not in leader.reason
    assert leader.gibbs == pytest.approx(one.gibbs) and leader.gibbs_error == pytest.approx(
        one.gibbs_error, rel=1e-6
    )


def test_another_supercell_is_never_pooled_and_its_distance_is_the_finite_size_error(runs):
    small, large = runs.add("aaaa", seed=1, supercell=FEWER), runs.add("bbbb", seed=2)
    duplicates = runs.table()
    assert duplicates["aaaa"].same_as == "bbbb", "the one with more atoms stands for the phase"
    assert (
        duplicates["bbbb"].gibbs == large.gibbs
        and duplicates["bbbb"].gibbs_error == large.gibbs_error
        and not duplicates["bbbb"].pooled
    )
    assert duplicates["bbbb"].duplicate_spread == pytest.approx(abs(small.gibbs - large.gibbs))
    rival = replace(duplicates["bbbb"], id="cccc", duplicate_spread=None, same_as="")
    rival = rival.updated(gibbs=large.gibbs + 0.02)
    found = {c.id: c for c in with_probabilities([*duplicates.values(), rival], 0.001)}
    assert found["cccc"].difference_finite_size_error == pytest.approx(
        duplicates["bbbb"].duplicate_spread
    )
    assert found["bbbb"].difference_finite_size_error == 0.0


def test_the_run_before_a_reduction_to_the_primitive_cell_shows_the_spread(runs):
    final = runs.add("bbbb", seed=2)
    runs.add("aaaa", seed=1, supercell=FEWER, reduced="bbbb")
    leader = next(c for c in runs.table().values() if not c.same_as)
    assert leader.gibbs == final.gibbs and leader.duplicate_spread > 0.0


def test_a_run_that_has_not_converged_or_whose_files_are_gone_is_not_pooled(runs):
    import shutil

    one = runs.add("aaaa", seed=1)
    runs.add("bbbb", seed=2, status="unconverged")
    assert runs.table()["aaaa"].gibbs == one.gibbs and runs.table()["aaaa"].duplicate_spread is None
    lost = runs.add("cccc", seed=3)
    shutil.rmtree(runs.root / "sscha" / KEY.folder("cccc"))
    assert not runs.table()["bbbb"].same_as, "where it ends is not known"
    leader = next(c for c in runs.table().values() if c.ranked and not c.same_as)
    assert not leader.pooled and leader.duplicate_spread == pytest.approx(
        abs(one.gibbs - lost.gibbs)
    )


def test_the_error_of_a_difference_follows_the_runs_that_were_pooled(runs):
    """Two runs make the pooled one; a third shares the numbers of the first: half of that is shared
    with the mean."""
    for name, seed in (("aaaa", 1), ("bbbb", 2)):
        runs.add(name, seed=seed)
    leader = next(c for c in runs.table().values() if not c.same_as)
    single = replace(leader, pooled=(), sscha_folder=KEY.folder("aaaa"))
    share = dict(leader.pooled)[KEY.folder("aaaa")]
    own = runs.common.covariance(single.sscha_folder, single.sscha_folder)
    assert common_error(leader, single, runs.common.covariance) == pytest.approx(share * own)
    assert difference_error(leader.gibbs_error, math.sqrt(own), share * own) < math.hypot(
        leader.gibbs_error, math.sqrt(own)
    )


def test_a_run_that_ended_in_a_higher_minimum_is_no_sample_of_the_lower_one(runs):
    low, high = runs.add("aaaa", seed=1), runs.add("bbbb", seed=2)
    runs.store.put(high.updated(gibbs=low.gibbs + 10.0 * low.gibbs_error))
    runs.candidates[1] = runs.candidates[1].updated(gibbs=low.gibbs + 10.0 * low.gibbs_error)
    leader = runs.table()["aaaa"]
    assert leader.gibbs == low.gibbs and not leader.pooled
    assert leader.duplicate_spread == pytest.approx(10.0 * low.gibbs_error)


@pytest.mark.slow
def test_a_ranking_pools_two_starts_that_quantum_motion_brings_to_one_phase(tmp_path):
    """A shallow double well: the centred start is a static saddle, the other one lies in a well;
    both end in the middle."""
    one = crystal((3.0, 3.0, 3.3), 1.0, 0.2, -0.3, 1.0, well=5.5, wall=3.0, shift=(0.0, 0.0, 0.25))
    structures = [replace(one, shift=(0.0, 0.0, 0.0)).atoms, one.atoms]
    block = {
        "n_configs": 200,
        "reference_spacing": 0.1,
        "hessian": 0,
        "allocation": "fixed",
        "cell": "fixed",
    }
    keys = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": block})
    table = rank_structures(structures, Crystals([one]), keys, tmp_path, relax=False, workers=1)
    records = list(FreeEnergyStore(tmp_path / "free_energies.db").runs())
    assert len(records) == 2 and table[1].same_as == table[0].id
    assert {record.free_energy.space_group_start for record in records} == {
        "P4/mmm (123)",
        "P4mm (99)",
    }
    assert table[0].gibbs_error < min(record.gibbs_error for record in records)
    assert min(r.gibbs for r in records) <= table[0].gibbs <= max(r.gibbs for r in records)
    assert [row["n_pooled"] for row in csv_rows(tmp_path / "ranking.csv")] == ["2", "1"]
