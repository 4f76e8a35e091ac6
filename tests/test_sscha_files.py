"""What SSCHA users exchange and look at: dynamical matrices, ensembles, dispersions, the group that
error bars support, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import write
from crystals import PAIR, h3s
from records import csv_rows
from sscha_models import EV, QuarticPair, evaluated, harmonic_state, phonopy_of
from typer.testing import CliRunner

from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.sscha import free_energy, python_sscha
from magus_anharmonic.sscha.hessian import free_energy_hessian
from magus_anharmonic.sscha.phonons import band_path, bands, dispersion
from magus_anharmonic.sscha.qe_files import read_ensemble, state_from_dyn, write_dyn, write_ensemble
from magus_anharmonic.sscha.report import hessian_of_run, write_phonopy
from magus_anharmonic.sscha.start import harmonic_force_constants
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.supercells import q_points
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.unstable import supported_group
from magus_anharmonic.units import HBAR, RYDBERG


@pytest.fixture(scope="module")
def hcp():
    """hcp Cu with q points that are not their own negatives."""
    state = harmonic_state(bulk("Cu", "hcp", a=2.5, c=4.1), (3, 3, 1), temperature=100.0)
    return state, evaluated(state, EV, 10)


def test_dynamical_matrices_load_in_cellconstructor_with_the_same_phonons(hcp, tmp_path):
    import cellconstructor as CC
    import cellconstructor.Phonons

    state, _ = hcp
    write_dyn(state, tmp_path / "dyn")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"dyn{number}" for number in range(1, len(files) + 1)]
    with python_sscha.quiet(tmp_path / "log"):
        dyn = CC.Phonons.Phonons(str(tmp_path / "dyn"), len(files))
        quanta = dyn.DiagonalizeSupercell()[0] * RYDBERG
        before = np.array(dyn.dynmats)
        dyn.Symmetrize()
    assert tuple(dyn.GetSupercell()) == (3, 3, 1)
    assert np.sort(quanta)[3:] == pytest.approx(np.sort(state.modes.hbar_omega), abs=1e-8)
    assert np.array(dyn.dynmats) == pytest.approx(before, abs=1e-7 * np.abs(before).max()), (
        "they have the symmetry of the crystal"
    )
    back = state_from_dyn(tmp_path / "dyn", 100.0)
    assert back.force_constants == pytest.approx(state.force_constants, abs=1e-7)
    with pytest.raises(InputError, match="no such file"):
        state_from_dyn(tmp_path / "nothing")


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_our_ensembles_load_in_python_sscha_and_come_back(hcp, tmp_path, text):
    import sscha.Ensemble

    state, ensemble = hcp
    folder = tmp_path / "data"
    write_ensemble(state, ensemble, folder, 2, text=text)
    count = len([path for path in folder.iterdir() if path.name.startswith("dyn_gen_pop2_")])
    with python_sscha.quiet(tmp_path / "log"):
        import cellconstructor as CC
        import cellconstructor.Phonons

        loaded = sscha.Ensemble.Ensemble(
            CC.Phonons.Phonons(str(folder / "dyn_gen_pop2_"), count), T0=100.0
        )
        loaded.load(str(folder), 2, 10) if text else loaded.load_bin(str(folder), 2)
        energy = loaded.get_free_energy()
        known = (
            python_sscha.to_ensemble(state, ensemble).get_free_energy()
            + ensemble.energies.mean() / RYDBERG
        )
    assert loaded.u_disps.reshape(10, -1, 3) == pytest.approx(ensemble.displacements, abs=1e-6)
    assert loaded.forces * RYDBERG == pytest.approx(ensemble.forces, abs=1e-6)
    assert loaded.get_stress_tensor() is not None
    assert energy == pytest.approx(known, abs=1e-6)
    back, again = read_ensemble(folder, 100.0)
    assert back.force_constants == pytest.approx(state.force_constants, abs=1e-7)
    for name in ("displacements", "energies", "forces", "stresses"):
        assert getattr(again, name) == pytest.approx(getattr(ensemble, name), abs=1e-6)


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_python_sschas_ensembles_load_here(hcp, tmp_path, monkeypatch, text):
    state, ensemble = hcp
    monkeypatch.chdir(tmp_path)
    with python_sscha.quiet(tmp_path / "log"):
        theirs = python_sscha.to_ensemble(state, ensemble)
        theirs.save("data", 3) if text else theirs.save_bin("data", 3)
    back, again = read_ensemble("data", 100.0, 3)
    assert back.supercell_matrix == state.supercell_matrix
    assert again.displacements == pytest.approx(ensemble.displacements, abs=1e-6)
    assert again.forces == pytest.approx(ensemble.forces, abs=1e-6)
    assert again.stresses == pytest.approx(ensemble.stresses, abs=1e-8)
    assert again.energies - again.energies.mean() == pytest.approx(
        ensemble.energies - ensemble.energies.mean(), abs=1e-6
    )
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    ours, own = (
        free_energy_hessian(state, ensemble, symmetry),
        free_energy_hessian(back, again, symmetry),
    )
    assert own.force_constants == pytest.approx(ours.force_constants, abs=1e-4)


def test_an_ensemble_that_begins_with_all_the_plus_signs_is_put_into_pairs(hcp, tmp_path):
    state, ensemble = hcp
    order = np.concatenate([np.arange(0, 10, 2), np.arange(1, 10, 2)])
    write_ensemble(state, ensemble.part(order), tmp_path)
    _, again = read_ensemble(tmp_path, 100.0)
    assert again.displacements[0::2] == pytest.approx(-again.displacements[1::2], abs=1e-12)
    assert again.forces == pytest.approx(ensemble.forces, abs=1e-10)


def test_an_ensemble_that_cannot_be_used_is_named(hcp, tmp_path):
    state, ensemble = hcp
    with pytest.raises(InputError, match="no such folder"):
        read_ensemble(tmp_path / "absent", 0.0)
    with pytest.raises(InputError, match="neither"):
        read_ensemble(tmp_path, 0.0)
    write_ensemble(state, ensemble, tmp_path / "a")
    with pytest.raises(InputError, match="no population 7"):
        read_ensemble(tmp_path / "a", 0.0, 7)
    other = harmonic_state(bulk("Cu", "hcp", a=2.5, c=4.1), (2, 1, 1))
    write_dyn(other, tmp_path / "other")
    with pytest.raises(InputError, match="ensemble: .*a: "):
        read_ensemble(tmp_path / "a", 0.0, dyn=tmp_path / "other")
    for file in (tmp_path / "a").glob("dyn_*"):
        file.unlink()
    with pytest.raises(InputError, match="dyn_gen_pop1_1"):
        read_ensemble(tmp_path / "a", 0.0)


def test_harmonic_bands_equal_phonopy_on_the_same_force_constants():
    atoms = bulk("Cu", "hcp", a=2.5, c=4.1)
    state = harmonic_state(atoms, (3, 3, 2))
    phonopy = phonopy_of(atoms, state.supercell_matrix)
    ours = state.supercell.get_scaled_positions()
    difference = phonopy.supercell.scaled_positions[:, None] - ours[None]
    order = np.abs(difference - np.round(difference)).max(axis=2).argmin(axis=1)
    full = state.full.reshape(len(order), 3, len(order), 3).transpose(0, 2, 1, 3)
    phonopy.force_constants = np.ascontiguousarray(full[np.ix_(order, order)])
    path = band_path(atoms)
    found = bands(state, state.force_constants, path.q)
    chosen = np.linspace(0, len(path.q) - 1, 25).astype(int)
    for index in chosen:
        squares = np.linalg.eigvalsh(phonopy.get_dynamical_matrix_at_q(path.q[index]))
        assert found[index] ** 2 == pytest.approx(
            squares * HBAR**2, abs=1e-8 * found.max() ** 2 + 1e-12
        )


def test_the_path_is_that_of_the_crystal_in_the_given_cell():
    path = band_path(bulk("Al", "fcc", a=4.0))
    labels = [label for _, label in path.ticks]
    assert labels[:3] == ["Γ", "X", "U|K"] and "L" in labels
    assert path.distance[0] == 0.0 and np.all(np.diff(path.distance) >= 0)
    cartesian = path.q @ np.linalg.inv(bulk("Al", "fcc", a=4.0).cell.array).T
    where = {label: distance for distance, label in path.ticks}
    assert np.linalg.norm(cartesian[np.searchsorted(path.distance, where["X"])]) == pytest.approx(
        1 / 4.0
    )
    steps = [
        np.linalg.norm(np.diff(cartesian[first : last + 1], axis=0), axis=1)
        for first, last in path.segments
    ]
    assert max(step.max() for step in steps) <= 0.01 + 1e-9


@pytest.mark.parametrize(("tolerance", "cubic"), [(0.05, True), (1e-3, False)])
def test_the_path_is_that_of_the_space_group_at_the_tolerance_of_its_label(tolerance, cubic):
    path = band_path(im3m(0.01), symprec=tolerance)
    assert ("H" in {label for _, label in path.ticks}) == cubic


@pytest.mark.parametrize(
    ("matrix", "points"),
    [((2, 2, 2), 5), (((-1, 1, 1), (1, -1, 1), (1, 1, -1)), 4)],
    ids=["Gamma twice, X twice and L", "slanted"],
)
def test_bands_meet_the_frequencies_at_the_q_points_of_the_supercell(matrix, points):
    state = harmonic_state(bulk("Al", "fcc", a=3.9), matrix, EV, 300.0, raised=True)
    found = free_energy_hessian(state, evaluated(state, EV, 20), Symmetry(state.atoms, matrix))
    shown = dispersion(found, harmonic=state.force_constants)
    assert set(shown.bands) == {"harmonic", "auxiliary", "hessian"}
    assert len({round(where, 9) for where, _, _ in shown.marks}) == points
    for where, hbar_omega, error in shown.marks:
        nearest = np.abs(shown.path.distance - where) < 1e-9
        assert np.abs(shown.bands["hessian"][nearest] - hbar_omega).min() < 1e-5
        assert error >= 0.0


def im3m(shift, noise=0.0, seed=0):
    """H3S; R3m when the hydrogens are ``shift`` A off the middle of their bonds, with noise on
    every coordinate."""
    atoms = h3s(shift=shift)
    atoms.positions += np.random.default_rng(seed).normal(0, 1, (4, 3)) * noise
    return atoms


def test_the_supported_group_follows_the_error_bars():
    certain = supported_group(im3m(0.06), 0.004)
    assert certain.group == "R3m (160)"
    assert [step.group for step in certain.steps] == ["R3m (160)", "Im-3m (229)"]
    assert (certain.steps[0].supported, certain.steps[1].supported) == (True, False)
    assert certain.steps[1].pull > 3.0 and certain.steps[1].shift == pytest.approx(0.045, abs=0.02)
    uncertain = supported_group(im3m(0.06), 0.05)
    assert uncertain.group == "Im-3m (229)"
    assert uncertain.steps[0].group == "R3m (160)"


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_size_of_the_error_bars_hides_no_symmetry(seed):
    assert supported_group(im3m(0.0, noise=0.01, seed=seed), 0.01).group == "Im-3m (229)"
    assert supported_group(im3m(0.0, noise=0.01, seed=seed), 0.0005).group != "Im-3m (229)"


def test_a_cell_that_is_strained_beyond_its_error_is_not_cubic():
    atoms = im3m(0.0)
    atoms.set_cell(atoms.cell.array * [1.0, 1.0, 1.02], scale_atoms=True)
    assert supported_group(atoms, 0.05).group != "Im-3m (229)"
    assert supported_group(atoms, 0.05, strain_error=0.01).group == "Im-3m (229)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of a double well that quantum motion makes a minimum."""
    folder = tmp_path_factory.mktemp("sscha") / "run"
    free_energy(
        PAIR,
        QuarticPair(),
        cell="fixed",
        supercell=(1, 1, 1),
        n_configs=400,
        max_populations=6,
        directory=folder,
    )
    return folder


def invoke(*arguments):
    result = CliRunner().invoke(app, ["hessian", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_makes_phonons_and_a_verdict_of_a_finished_run(run, tmp_path):
    code, text = invoke(run, "-o", tmp_path)
    assert code == 0, text
    assert "Stable" in text and "cm^-1" in text and "Probability" in text
    names = {path.name for path in tmp_path.iterdir()}
    files = {
        ".sha256sums",
        "dyn_auxiliary1",
        "dyn_hessian1",
        "frequencies.csv",
        "dispersion.csv",
        "dispersion.png",
        "dispersion.svg",
        "phonopy.yaml",
        "FORCE_CONSTANTS",
        "band.yaml",
        "hessian.json",
    }
    assert names == files
    data = json.loads((tmp_path / "hessian.json").read_text())
    assert (
        data["status"] == "stable"
        and data["probability_stable"] > 0.99
        and data["n_configs"] == 400
    )
    rows = csv_rows(tmp_path / "frequencies.csv")
    assert len(rows) == 6
    optical = [float(row["hessian_meV"]) for row in rows if abs(float(row["hessian_meV"])) > 1e-2]
    assert optical == pytest.approx([float(row["auxiliary_meV"]) for row in rows][3:], rel=0.05), (
        "by symmetry there is no bubble"
    )
    back = state_from_dyn(tmp_path / "dyn_hessian")
    assert back.modes.hbar_omega * 1e3 == pytest.approx(np.sort(optical), rel=1e-6)


@pytest.mark.parametrize("supercell_matrix", [(1, 2, 1), ((1, 1, 0), (-1, 1, 0), (0, 0, 2))])
def test_phonopy_reads_the_force_constants_and_has_the_same_frequencies(tmp_path, supercell_matrix):
    import phonopy
    import yaml

    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    atoms.symbols[1], atoms.positions[2, 0] = "Cu", 0.1
    symmetry = Symmetry(atoms, supercell_matrix)
    compact = harmonic_force_constants(atoms, supercell_matrix, symmetry, EV)
    state, path = SschaState(atoms, supercell_matrix, compact, 0.0), band_path(atoms)
    write_phonopy(state, path, tmp_path)
    read = phonopy.load(tmp_path / "phonopy.yaml", log_level=0)
    q = np.concatenate([q_points(supercell_matrix), [[0.1, 0.2, -0.3]]])
    theirs = np.sort(read.run_qpoints(q).frequencies, axis=1) * 4.135667696e-3
    ours = bands(state, compact, q)
    squares = np.sign(ours) * ours**2
    assert np.sign(theirs) * theirs**2 == pytest.approx(squares, abs=2e-6 * squares.max())
    with (tmp_path / "band.yaml").open() as file:
        written = yaml.safe_load(file)
    assert len(written["phonon"]) == len(path.q) and written["labels"][0][0] == path.ticks[0][1]
    read.save(tmp_path / "phonopy.yaml")  # as phonopy-load does in the folder where it is run
    again = phonopy.load(
        tmp_path / "phonopy.yaml",
        force_constants_filename=tmp_path / "FORCE_CONSTANTS",
        log_level=0,
    )
    after = np.sort(again.run_qpoints(q).frequencies, axis=1) * 4.135667696e-3
    assert after == pytest.approx(theirs, abs=1e-6)


def test_more_configurations_are_drawn_from_the_final_state(run, tmp_path):
    evaluator = as_evaluator(QuarticPair())
    report = hessian_of_run(run, tmp_path, evaluator=evaluator, n_configs=1000)
    stored = hessian_of_run(run, tmp_path / "stored")
    assert (report.hessian.n_configs, stored.hessian.n_configs) == (1000, 400)
    assert report.hessian.errors[0, 3:].mean() < stored.hessian.errors[0, 3:].mean()
    assert (tmp_path / "dispersion.csv").read_text().splitlines()[0].count("harmonic") == 6
    again = hessian_of_run(run, tmp_path / "again", evaluator=evaluator, n_configs=1000)
    assert np.array_equal(again.hessian.squares, report.hessian.squares), "same seed, same result"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.cif",), ["nowhere.cif", "no such file"]),
        ((".",), ["result.json"]),
        (("structure.xyz", "--checkpoint", "nowhere.pth"), ["nowhere.pth"]),
        (("two.xyz", "--checkpoint", "x"), ["two.xyz", "2 structures"]),
        (("broken.cif", "--checkpoint", "x"), ["broken.cif"]),
        (("RUN", "--n-configs", "7"), ["--n-configs", "even"]),
        (("RUN", "--n-configs", "2000"), ["--n-configs", "400", "--checkpoint"]),
        (("RUN", "--checkpoint", "nowhere.pth"), ["nowhere.pth"]),
    ],
)
def test_wrong_input_is_one_clear_line_and_leaves_nothing(
    run, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    write("structure.xyz", PAIR)
    write("two.xyz", [PAIR, PAIR])
    Path("broken.cif").write_text("data_\n_cell_length_a x\n")
    code, text = invoke(*(run if argument == "RUN" else argument for argument in arguments))
    assert code == 2, text
    assert "Traceback" not in text and len(text.strip().splitlines()) == 1
    assert all(word in text for word in words), text
    assert {path.name for path in tmp_path.iterdir()} == {"structure.xyz", "two.xyz", "broken.cif"}


def test_a_run_of_another_model_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="emt"):
        hessian_of_run(run, tmp_path, evaluator=EV)


def test_the_group_of_a_result_is_that_of_its_error_bar(run):
    from magus_anharmonic.sscha import SschaResult

    result = SschaResult.read(run)
    found = supported_group(result.centroids, result.position_error)
    assert found.group == result.space_group == "Pm-3m (221)"
    moved = result.centroids.copy()
    moved.positions[1, 0] += 0.05
    assert supported_group(moved, 0.002).group != "Pm-3m (221)"
    assert supported_group(moved, 0.05).group == "Pm-3m (221)"


@pytest.mark.slow
def test_the_command_takes_a_structure_from_the_start(tmp_path, tiny_checkpoint):
    write(
        tmp_path / "a.xyz", Atoms("SiC", positions=[[0, 0, 0], [1.5] * 3], cell=[3.0] * 3, pbc=True)
    )
    options = (
        "--checkpoint",
        tiny_checkpoint,
        "--supercell",
        1,
        1,
        1,
        "--n-configs",
        20,
        "--max-populations",
        1,
        "--fixed-cell",
        "--v4",
    )
    code, text = invoke(tmp_path / "a.xyz", *options, "-o", tmp_path / "out")
    assert code == 0, text
    data = json.loads((tmp_path / "out" / "hessian.json").read_text())
    assert data["fourth_order"] and data["n_configs"] == 20
    assert data["sscha_status"] == "unconverged"
    assert "had not converged" in text and "fourth-order term is left out" not in text
    assert (tmp_path / "out" / "sscha" / "result.json").is_file()
