"""Saddle points among the lowest phases: found by the Hessian, followed into the subgroup, and out
of the ranking."""

import numpy as np
import pytest
import ranking_fakes as fakes
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st
from records import csv_rows
from saddle_model import HydrogenBond, RockSaltWells

from magus_anharmonic.errors import DamagedFile, SschaError
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking import stability
from magus_anharmonic.ranking.rank import rank
from magus_anharmonic.ranking.store import FreeEnergyStore
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.sscha.gibbs import free_energy
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.report import draw_convergence, read_convergence
from magus_anharmonic.sscha.result import RunFolder
from magus_anharmonic.sscha.state import SschaState, fourier, repeated
from magus_anharmonic.sscha.supercells import cell_offsets, commensurate, shape_supercell_matrix
from magus_anharmonic.sscha.unstable import down_the_mode, real_patterns, simple_directions
from magus_anharmonic.structures import space_group, structure_id

SADDLE, MINIMUM = HydrogenBond(-4.0, 10.0, 14.0), HydrogenBond(1.0, 8.0, 3.0)


def keys(**sscha):
    common = {
        "supercell": [1, 1, 1],
        "cell": "fixed",
        "n_configs": 6000,
        "max_populations": 12,
        "allocation": "fixed",
    }
    return parse_settings({"Fitness": ["SSCHA"], "sscha": {**common, **sscha}})


def ranked(model, folder, settings, structures=None):
    population = structures or [model.crystal()]
    reevaluate(population, model, settings)
    return rank(
        population,
        evaluator=model,
        settings=settings,
        run_dir=folder,
        free_energy=free_energy,
        workers=1,
    )


@pytest.mark.slow
def test_a_symmetric_saddle_is_followed_and_what_lies_below_it_is_ranked(tmp_path):
    follower, saddle = ranked(SADDLE, tmp_path, keys())
    assert (
        saddle.status == "saddle"
        and saddle.rank_quantum is None
        and saddle.spg_quantum == "P4/mmm (123)"
    )
    assert (
        saddle.free_energy.hessian_deciding < 0 < saddle.free_energy.hessian_error
        and saddle.free_energy.p_stable < 0.03
    )
    assert (follower.rank_quantum, follower.parent, follower.spg_quantum) == (
        1,
        saddle.id,
        "P4mm (99)",
    )
    assert follower.status == "stable"
    gain = (SADDLE.free_energy(symmetric=True)[0] - SADDLE.free_energy(symmetric=False)[0]) / 3
    found, error = (
        saddle.free_energy.gibbs_raw - follower.free_energy.gibbs_raw,
        np.hypot(saddle.gibbs_error, follower.gibbs_error),
    )
    assert gain > 5 * error and found == pytest.approx(gain, abs=4 * error)
    assert follower.id in saddle.reason and "lower" in saddle.reason
    first, second = csv_rows(tmp_path / "ranking.csv")
    assert (first["parent"], first["status"], second["status"]) == (saddle.id, "stable", "saddle")
    assert float(second["hessian_deciding_cm1"]) < 0 < float(first["hessian_deciding_cm1"])


@pytest.mark.slow
def test_a_minimum_is_called_stable_and_is_checked_once(tmp_path, monkeypatch):
    (candidate,) = ranked(MINIMUM, tmp_path, keys(n_configs=1000))
    assert (
        candidate.status == "stable"
        and candidate.free_energy.p_stable > 0.99
        and candidate.free_energy.hessian_deciding > 0
    )
    assert (tmp_path / "sscha" / candidate.sscha_folder / "convergence.png").stat().st_size > 10_000
    monkeypatch.setattr(
        stability, "hessian_of_folder", lambda folder: pytest.fail("computed twice")
    )
    (again,) = ranked(MINIMUM, tmp_path, keys(n_configs=1000))
    assert (again.status, again.free_energy.p_stable, again.gibbs) == (
        candidate.status,
        candidate.free_energy.p_stable,
        candidate.gibbs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("k", [-14.0, pytest.param(-12.0, marks=pytest.mark.full)])
def test_a_well_beyond_a_barrier_is_looked_for_before_a_phase_is_called_stable(tmp_path, k):
    """The middle is a minimum of the free energy by the motion of the proton alone; the exact well
    lies below it, or above, or is none."""
    model = HydrogenBond(k, 60.0, 2.0)
    gain = (model.free_energy(symmetric=True)[0] - model.free_energy(symmetric=False)[0]) / 3
    found = ranked(
        model, tmp_path, keys(n_configs=2000 if k == -14.0 else 6000)
    )  # the middle is nearly flat at -12
    middle = next(c for c in found if c.id == structure_id(model.crystal()))
    assert middle.status == "stable" and middle.spg_quantum == "P4/mmm (123)"
    assert "harmonic modes are imaginary; down the deepest, followed to" in middle.reason
    if k == -14.0:
        assert gain == pytest.approx(2e-3, abs=5e-4)
        assert (
            found[0].parent == middle.id
            and found[0].spg_quantum == "P4mm (99)"
            and middle.rank_quantum == 2
        )
        error = np.hypot(found[0].gibbs_error, middle.gibbs_error)
        assert middle.free_energy.gibbs_raw - found[0].free_energy.gibbs_raw == pytest.approx(
            gain, abs=4 * error
        )
    else:
        assert gain < 1e-5 and middle.rank_quantum == 1
        own = middle.free_energy.n_evaluations
        rest = [
            r
            for r in FreeEnergyStore(tmp_path / "free_energies.db").runs()
            if r.parent == middle.id
        ]
        assert len(rest) == 1 and rest[0].free_energy.n_evaluations < 2 * own


@pytest.mark.slow
def test_a_first_order_well_below_cubic_rock_salt_is_found(tmp_path):
    """Given the cubic crystal alone, with wells of 8 meV/atom in the static energy and a phase 1.5
    meV/atom below in free energy."""
    model = RockSaltWells()
    gain = model.free_energy(symmetric=True)[0] - model.free_energy(symmetric=False)[0]
    assert gain == pytest.approx(1.5e-3, abs=2e-4)
    lower, cubic = ranked(model, tmp_path, keys(n_configs=2000), [model.crystal()])
    assert cubic.status == "stable" and (cubic.spg_quantum, cubic.rank_quantum) == (
        "Fm-3m (225)",
        2,
    )
    assert (lower.rank_quantum, lower.parent, lower.spg_quantum) == (1, cubic.id, "R3m (160)")
    error = np.hypot(lower.gibbs_error, cubic.gibbs_error)
    assert (
        cubic.free_energy.gibbs_raw - lower.free_energy.gibbs_raw
        == pytest.approx(gain, abs=4 * error + 1e-5)
        and gain > 4 * error
    )


@pytest.mark.full
def test_cubic_h3s_at_100_gpa_is_a_minimum_for_the_shipped_model(tmp_path):
    """Statically it is a saddle point with 12 imaginary modes of 93; quantum motion makes it a
    minimum, by more than three standard errors of 200 configurations."""
    from magus_anharmonic.potential import load
    from magus_anharmonic.ranking.structures import rank_structures

    block = {"supercell": [2, 2, 2], "n_configs": 200, "max_populations": 8, "hessian": 1}
    settings = parse_settings({"pressure": 100.0, "Fitness": ["SSCHA"], "sscha": block})
    (found,) = rank_structures(
        [fakes.h3s(3.15)], load("h3s-gpaw-small", device="cpu"), settings, tmp_path, workers=1
    )
    assert (found.status, found.spg_quantum) == ("stable", "Im-3m (229)"), found.reason
    assert found.free_energy.p_stable > 0.977
    assert found.free_energy.hessian_deciding > 3 * found.free_energy.hessian_error


# ---------------------------------------------------------------- the rules, with invented Hessians


def hessian(square, error=0.1):
    """Of one atom, with one mode that is not surely positive, at q = (1/2, 0, 0)."""
    state = SschaState(
        Atoms("H", cell=[2.0] * 3, pbc=True), (2, 1, 1), np.zeros((2, 1, 1, 3, 3)), 0.0
    )
    squares, errors = np.array([[0.0] * 3, [square, 2.0, 3.0]]), np.array([[0.0] * 3, [error] * 3])
    points = np.array([[0.0, 0, 0], [0.5, 0, 0]])
    return Hessian(
        state,
        state.force_constants,
        points,
        squares,
        errors,
        np.zeros((2, 3, 3)),
        np.array([0, 1]),
        10,
        False,
        True,
    )


class Verdicts:
    """Stands in for Hessians and displacements: by structure id the squared frequency, and what a
    saddle leads to."""

    def __init__(self, monkeypatch, squares, below=None):
        self.squares, self.below, self.asked = squares, below, []
        monkeypatch.setattr(stability, "hessian_of_folder", self.hessian_of_folder)
        monkeypatch.setattr(stability, "down_the_mode", self.down_the_mode)

    def hessian_of_folder(self, folder):
        name = folder.name.split("-")[0]
        self.asked.append(name)
        return hessian(self.squares[name]) if name in self.squares else None

    def down_the_mode(self, found, evaluator, symprec):
        if isinstance(self.below, Exception):
            raise self.below
        return self.below.copy()


def copper(scale=1.0):
    atoms = bulk("Cu")
    atoms.set_cell(atoms.cell * scale, scale_atoms=True)
    return atoms


def distorted(ratio=1.25):
    """A tetragonal crystal of copper with this c/a (1.414 would be cubic): below the cubic one
    here."""
    a = (23.6 / ratio) ** (1 / 3)
    return bulk("Cu", "bct", a=a, c=a * ratio)


def names(*structures):
    return [structure_id(atoms) for atoms in structures]


def rules(**sscha):
    return parse_settings({"Fitness": ["SSCHA"], "sscha": {"allocation": "fixed", **sscha}})


def run(folder, structures, fake=fakes.shifted, **sscha):
    evaluator = fakes.Emt()
    reevaluate(structures, evaluator, rules(**sscha))
    found = rank(
        structures,
        evaluator=evaluator,
        settings=rules(**sscha),
        run_dir=folder,
        free_energy=fake,
        workers=1,
    )
    return {candidate.id: candidate for candidate in found}


def n_runs(folder):
    return len(read_jsonl(folder / "calls.jsonl"))


def test_undecided_keeps_its_status_and_says_what_is_missing(tmp_path, monkeypatch):
    (name,) = names(copper())
    Verdicts(monkeypatch, {name: 0.05})
    found = run(tmp_path, [copper()])[name]
    assert found.status == "converged" and found.rank_quantum == 1
    assert "undecided" in found.reason and found.free_energy.p_stable == pytest.approx(
        0.69, abs=0.01
    )


def test_only_the_lowest_distinct_phases_are_asked_and_none_with_zero(tmp_path, monkeypatch):
    crystals = [copper(), copper(1.03), copper(1.06)]
    lowest = names(*crystals)
    verdicts = Verdicts(monkeypatch, dict.fromkeys(lowest, 1.0))
    run(tmp_path / "none", crystals, hessian=0)
    assert verdicts.asked == []
    found = run(tmp_path / "two", crystals, hessian=2)
    assert verdicts.asked == lowest[:2]
    assert [found[name].status for name in lowest] == ["stable", "stable", "converged"]


def test_a_run_without_an_ensemble_or_without_its_end_is_not_judged(tmp_path, monkeypatch):
    def unfinished(*arguments, **options):
        result = fakes.shifted(*arguments, **options)
        result.status, result.reason = "unconverged", "not converged"
        return result

    (name,) = names(copper())
    verdicts = Verdicts(monkeypatch, {})
    assert run(tmp_path / "a", [copper()])[name].status == "converged"
    assert run(tmp_path / "b", [copper()], fake=unfinished)[name].status == "unconverged"
    assert verdicts.asked == [name], "an unconverged state has no Hessian worth the name"


def deeper(gain):
    """As `shifted`, but what is not cubic is ``gain`` eV/atom lower than it would be."""

    def fake(atoms, evaluator, **options):
        result = fakes.shifted(atoms, evaluator, **options)
        if "m-3m" not in result.space_group:
            result.gibbs -= gain
        return result

    return fake


def test_a_saddle_leaves_the_winners_and_the_next_one_is_asked_in_its_place(tmp_path, monkeypatch):
    first, second, below = names(copper(), copper(1.05), distorted())
    verdicts = Verdicts(monkeypatch, {first: -1.0, second: 1.0, below: 1.0}, distorted())
    found = run(tmp_path, [copper(), copper(1.05)], fake=deeper(2.0), hessian=1)
    assert (
        found[first].status,
        found[first].rank_quantum,
        found[below].status,
        found[below].rank_quantum,
    ) == ("saddle", None, "stable", 1)
    assert (
        found[below].parent == first
        and found[below].members == ()
        and found[second].rank_quantum == 2
    )
    assert f"followed to {below}" in found[first].reason and ", lower (" in found[first].reason
    assert verdicts.asked.count(second) == 0
    calls = n_runs(tmp_path)
    again = run(tmp_path, [copper(), copper(1.05)], fake=deeper(2.0), hessian=1)
    assert (
        n_runs(tmp_path) == calls
        and again[first] == found[first]
        and again[below].gibbs == found[below].gibbs
    )


def test_a_candidate_that_lies_below_the_saddle_is_one_row_and_is_not_run_again(
    tmp_path, monkeypatch
):
    """Two structures end in the saddle; both lead to the third, which is in the population."""
    first, second, below = names(copper(), copper(1.0105), distorted())

    def cubic(atoms, evaluator, **options):
        result = deeper(-0.5)(atoms, evaluator, **options)
        if "m-3m" in result.space_group:
            result.gibbs, result.centroids = -5.0, copper()
        return result

    Verdicts(monkeypatch, {first: -1.0, second: -1.0}, distorted())
    found = run(tmp_path, [copper(), copper(1.0105), distorted()], fake=cubic)
    assert sorted(found) == sorted([first, second, below]) and n_runs(tmp_path) == 3
    assert [found[name].status for name in (first, second)] == ["saddle", "saddle"]
    assert (
        found[below].rank_quantum,
        found[below].parent in (first, second),
        found[below].members,
    ) == (1, True, (2,))


def test_what_lies_above_the_saddle_is_said_to_be_not_lower(tmp_path, monkeypatch):
    first, below = names(copper(), distorted())
    Verdicts(monkeypatch, {first: -1.0}, distorted())
    found = run(tmp_path, [copper()], fake=deeper(-1.0))
    assert (
        found[first].status == "saddle"
        and "not lower" in found[first].reason
        and found[below].rank_quantum == 1
    )


def test_a_run_that_comes_back_to_the_saddle_is_no_phase_of_its_own(tmp_path, monkeypatch):
    def back(atoms, evaluator, **options):
        return fakes.shifted(copper(), evaluator, **options)

    first, below = names(copper(), distorted())
    Verdicts(monkeypatch, {first: -1.0}, distorted())
    found = run(tmp_path, [copper()], fake=back)
    assert (
        list(found) == [first]
        and found[first].status == "saddle"
        and "came back" in found[first].reason
    )
    assert not (tmp_path / "quantum.traj").exists(), (
        "neither the saddle nor its double is handed to the search"
    )


def test_two_steps_down_and_no_further(tmp_path, monkeypatch):
    steps = [copper(), distorted(), distorted(1.15), distorted(1.6)]
    ids = names(*steps)
    verdicts = Verdicts(monkeypatch, dict.fromkeys(ids, -1.0))
    led = {ids[k]: steps[k + 1] for k in range(3)}
    verdicts.down_the_mode = lambda found, evaluator, symprec: led[verdicts.asked[-1]].copy()
    monkeypatch.setattr(stability, "down_the_mode", verdicts.down_the_mode)
    found = run(tmp_path, [copper()], fake=deeper(1.0))
    assert [found[name].status for name in ids[:3]] == ["saddle"] * 3 and ids[3] not in found
    assert "not followed" in found[ids[2]].reason
    assert [found[name].parent for name in ids[1:3]] == ids[:2]
    assert n_runs(tmp_path) == 3
    run(tmp_path, [copper()], fake=deeper(1.0))
    assert n_runs(tmp_path) == 3


def test_a_saddle_that_could_not_be_followed_is_followed_by_the_next_ranking(tmp_path, monkeypatch):
    def full(atoms, evaluator, **options):
        if "m-3m" not in space_group(atoms):
            raise OSError("no space left on device")
        return fakes.shifted(atoms, evaluator, **options)

    first, below = names(copper(), distorted())
    Verdicts(monkeypatch, {first: -1.0}, distorted())
    found = run(tmp_path, [copper()], fake=full)
    assert (
        list(found) == [first]
        and "following it failed: OSError: no space left" in found[first].reason
    )
    found = run(tmp_path, [copper()], fake=deeper(2.0))
    assert (
        found[below].rank_quantum == 1
        and "no space left" not in found[first].reason
        and "lower" in found[first].reason
    )


def test_the_verdict_does_not_change_what_a_free_energy_is(tmp_path, monkeypatch):
    Verdicts(monkeypatch, dict.fromkeys(names(copper()), 1.0))
    run(tmp_path, [copper()], hessian=0)
    assert run(tmp_path, [copper()], hessian=3)[names(copper())[0]].status == "stable"
    assert n_runs(tmp_path) == 1
    record = next(FreeEnergyStore(tmp_path / "free_energies.db").runs())
    assert record.status == "stable" and record.free_energy.p_stable == pytest.approx(1.0)


# --------------------------------------------------------------------------------- the displacement


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 0.25, 0.75, 1 / 3]), min_size=3, max_size=3))
def test_the_new_cell_is_the_smallest_in_which_the_mode_is_periodic(point):
    q = np.array(point)
    lattice = bulk("Cu").cell.array
    found = commensurate(q[None], lattice)
    matrix, offsets = shape_supercell_matrix(found), cell_offsets(found)
    order = next(n for n in range(1, 13) if np.allclose(n * q, np.rint(n * q)))
    assert matrix @ q == pytest.approx(np.rint(matrix @ q), abs=1e-9)
    assert round(np.linalg.det(matrix)) == order == len(offsets)
    phases = np.exp(2j * np.pi * offsets @ q)
    assert len(np.unique(phases.round(6))) == order, (
        "every cell of the new one has a phase of its own"
    )
    assert len(repeated(bulk("Cu"), found)) == order


def test_the_patterns_are_modes_of_the_crystal_in_the_new_cell():
    """An eigenvector at q = (1/3, 1/3, 0) becomes an eigenvector at Gamma of the cell with three
    atoms, with the same eigenvalue."""
    from sscha_models import harmonic_state

    from magus_anharmonic.evaluator import as_evaluator

    evaluator = fakes.Emt()
    atoms, q = bulk("Cu"), np.array([1 / 3, 1 / 3, 0.0])
    compact = harmonic_state(atoms, (3, 3, 3), as_evaluator(evaluator)).force_constants
    values, vectors = np.linalg.eigh(fourier(compact, (3, 3, 3), q[None])[0])
    found = commensurate(q[None], atoms.cell.array)
    cell = repeated(atoms, found)
    for mode in range(3):
        for pattern in real_patterns(vectors[:, mode : mode + 1], q, found):
            moved = [cell.copy() for _ in range(2)]
            for sign, one in zip((0.01, -0.01), moved, strict=True):
                one.positions += sign * pattern
            forces = np.array(evaluator.evaluate(moved).forces)
            assert -(forces[0] - forces[1]) / 0.02 == pytest.approx(
                values[mode] * pattern, abs=0.02 * values.max()
            )


def test_simple_directions_of_a_triply_degenerate_mode_hold_the_three_high_symmetries():
    directions = simple_directions(np.eye(3)[:, None, :])
    found = {tuple(np.sort(np.abs(direction[0])).round(3)) for direction in directions}
    assert (
        found == {(0.0, 0.0, 1.0), (0.0, 0.707, 0.707), (0.577, 0.577, 0.577)}
        and len(directions) == 13
    )


def test_a_displacement_is_seen_by_the_search_for_symmetry_or_refused():
    """The proton mode of the hydrogen bond: P4/mmm to P4mm, at most 0.15 of the bond, more where
    symprec would hide it."""
    atoms = SADDLE.crystal()
    compact = np.zeros((1, 3, 3, 3, 3))
    compact[0] = (np.eye(3) - 1.0 / 3.0)[:, :, None, None] * np.eye(3) * 5.0
    masses = atoms.get_masses()
    pattern = np.array([1.0, -0.5, -0.5]) * np.sqrt(masses)
    vectors = np.zeros((1, 9, 9))
    vectors[0, 2::3, 0] = pattern / np.linalg.norm(pattern)
    squares = np.array([[-1.0, 0, 0, 0, 1, 2, 3, 4, 5]])
    state = SschaState(atoms, (1, 1, 1), compact, 0.0)
    found = Hessian(
        state,
        compact,
        np.zeros((1, 3)),
        squares,
        np.full((1, 9), 0.1),
        vectors,
        np.zeros(1, dtype=int),
        10,
        False,
        True,
    )
    start = down_the_mode(found, SADDLE, 0.05)
    assert space_group(start, 0.05) == "P4mm (99)"
    shift = start.positions - atoms.positions
    assert 0.02 < np.abs(shift).max() <= 0.15 * 1.2 + 1e-9 and np.allclose(shift[:, :2], 0)
    with pytest.raises(SschaError, match="symprec"):
        down_the_mode(found, SADDLE, 1.0)


# -------------------------------------------------------------------------------------- the picture


def test_a_changed_digit_of_the_table_is_not_drawn(tmp_path, caplog):
    table = tmp_path / "convergence.csv"
    names = (
        "population free_energy_eV_per_atom gibbs_eV_per_atom error_eV_per_atom pressure_GPa "
        "pressure_error_GPa effective_sample fc_gradient_eV_per_A2 centroid_force_eV_per_A"
    ).split()
    row = dict(zip(names, (1, -1.0, -0.9, 0.01, 149.0, 0.2, 0.6, None, 0.02), strict=True))
    RunFolder(tmp_path, {"model": "m"}).write_convergence([row, {**row, "population": 2}])
    assert np.isnan(read_convergence(table)["fc_gradient_eV_per_A2"]).all()
    whole = table.read_text()
    table.write_text(whole.replace("-0.9", "-0.8"))
    with pytest.raises(DamagedFile, match=r"convergence\.csv: changed since it was written"):
        read_convergence(table)
    assert draw_convergence(tmp_path) is None and "changed since" in caplog.text
    table.write_text(whole)
    assert draw_convergence(tmp_path) is not None
