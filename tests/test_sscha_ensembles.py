"""Ensembles of python-sscha that are taken over: of which state they are, and whether they are what
they claim."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from refusals import refused
from sscha_models import EV, evaluated, harmonic_state

from magus_anharmonic.errors import InputError
from magus_anharmonic.paper.ensemble_errors import displacements_of
from magus_anharmonic.ranking.structures import read_start
from magus_anharmonic.sscha.ensemble import average
from magus_anharmonic.sscha.qe_files import (
    read_ensemble,
    require_sampled_from,
    state_from_dyn,
    write_dyn,
    write_ensemble,
)
from magus_anharmonic.sscha.state import displaced, fold, sample, sum_rule
from magus_anharmonic.sscha.symmetry import Symmetry


@pytest.fixture(scope="module")
def aluminium():
    """fcc Al at 300 K with force constants of 1.5 times the harmonic ones, and 200
    configurations."""
    atoms = bulk("Al", a=4.05)
    state = harmonic_state(atoms, (2, 2, 2), temperature=300.0)
    state = replace(state, force_constants=1.5 * state.force_constants)
    return state, evaluated(state, EV, 200)


@pytest.fixture
def folder(aluminium, tmp_path):
    """python-sscha's folder with ensemble 1, and dyn_pop1_ beside it, where it is said to have
    led."""
    state, ensemble = aluminium
    write_ensemble(state, ensemble, tmp_path / "data_dir")
    write_dyn(led_to(state), tmp_path / "dyn_pop1_")
    return tmp_path


def led_to(state):
    return replace(state, force_constants=state.force_constants / 1.25)


def test_an_ensemble_is_reweighted_from_what_drew_it_to_the_matrices_it_led_to(
    folder, aluminium, caplog
):
    state, _ = aluminium
    with caplog.at_level(logging.INFO, logger="magus_anharmonic"):
        found = read_start(str(folder / "dyn_pop1_"), folder / "data_dir", 300.0, 0.0, 0.3)
    said = next(line for line in caplog.messages if "F = " in line)
    helmholtz, error = (float(said.split("F = ")[1].split(" ")[index]) for index in (0, 2))
    target = led_to(state)
    fresh = average(
        target, evaluated(target, EV, 600, seed=5), Symmetry(target.atoms, target.supercell_matrix)
    )
    assert helmholtz == pytest.approx(
        fresh.helmholtz, abs=4.0 * np.hypot(error, fresh.helmholtz_error)
    )
    own = average(
        state, evaluated(state, EV, 600, seed=6), Symmetry(state.atoms, state.supercell_matrix)
    )
    assert own.helmholtz - fresh.helmholtz > 5.0 * error, "the two states are told apart"
    assert "ESS/N = 1.00" not in said
    alone = read_start(None, folder / "data_dir", 300.0, 0.0, 0.3)
    assert found.modes.hbar_omega == pytest.approx(alone.modes.hbar_omega, rel=0.05), (
        "both minimise on one ensemble"
    )


def test_the_matrices_it_led_to_are_refused_where_those_that_drew_it_are_gone(folder):
    for file in (folder / "data_dir").glob("dyn_gen*"):
        file.unlink()
    with pytest.raises(InputError, match="was not drawn from these.*dyn_gen_popN_"):
        read_start(str(folder / "dyn_pop1_"), folder / "data_dir", 300.0, 0.0, 0.3)


def test_an_ensemble_that_does_not_reach_the_matrices_is_refused(folder, aluminium):
    state, _ = aluminium
    write_dyn(replace(state, force_constants=4.0 * state.force_constants), folder / "far")
    with pytest.raises(InputError, match="per cent count"):
        read_start(str(folder / "far"), folder / "data_dir", 300.0, 0.0, 0.3)
    write_dyn(state.strained(0.02 * np.eye(3)), folder / "other")
    with pytest.raises(InputError, match="the cell of the matrices"):
        read_start(str(folder / "other"), folder / "data_dir", 300.0, 0.0, 0.3)
    with pytest.raises(InputError, match="is another state"):
        read_ensemble(folder / "data_dir", 300.0, dyn=folder / "dyn_pop1_")


def test_the_sample_tells_its_temperature(aluminium, tmp_path):
    state, _ = aluminium
    for sampled_at in (50.0, 300.0, 900.0):
        write_ensemble(
            replace(state, temperature=sampled_at),
            evaluated(replace(state, temperature=sampled_at), EV, 60),
            tmp_path / "data",
        )
        read_ensemble(tmp_path / "data", sampled_at)
        for wrong in {0.0, 300.0, 900.0} - {sampled_at, 0.0 if sampled_at < 100 else sampled_at}:
            with pytest.raises(
                InputError, match=f"drawn from these dynamical matrices at {wrong:g} K.*would fit"
            ) as error:
                read_ensemble(tmp_path / "data", wrong)
            told = float(str(error.value).split(" K would fit")[0].rsplit(" ", 1)[1])
            assert told == pytest.approx(sampled_at, rel=0.2, abs=60.0)


def test_how_well_a_sample_knows_its_temperature_is_said(aluminium, caplog):
    """60 configurations that were drawn 50 K off pass: that is within their noise."""
    state, _ = aluminium
    widths, right = {}, 0
    for count in (60, 600):
        for seed in range(8):
            caplog.clear()
            u = sample(state, count, np.random.default_rng(seed))
            with caplog.at_level(logging.INFO, logger="magus_anharmonic"):
                require_sampled_from(state, u, "ensemble")
            said = next(line for line in caplog.messages if "95 per cent" in line)
            low, high = (float(n) for n in re.findall(r"between (\d+) and (\d+) K", said)[0])
            widths[count], right = high - low, right + (low <= 300.0 <= high)
    assert 10.0 < widths[600] < 0.5 * widths[60] < 100.0
    assert right >= 12, "of 16, of which 15 are expected"


def test_chance_alone_refuses_none(aluminium):
    state, _ = aluminium
    rng = np.random.default_rng(1)
    for number in range(100):
        require_sampled_from(state, sample(state, 10 + 2 * (number % 40), rng), "ensemble")


def test_other_masses_and_softer_matrices_are_seen(aluminium):
    state, ensemble = aluminium
    heavy = state.atoms.copy()
    heavy.set_masses([54.0])
    for other in (
        replace(state, atoms=heavy, temperature=0.0),
        led_to(state),
        replace(state, temperature=0.0),
    ):
        with pytest.raises(InputError, match="was not drawn"):
            require_sampled_from(other, ensemble.displacements, "ensemble")


def nan(values, index):
    values[index] = np.nan


def times(values, index, factor):
    values[index] *= factor


def swapped(values):
    values[:] = np.roll(values, 7, axis=0)


DAMAGE = {
    "energy nan": ("energies", lambda v: nan(v, 7), ["energies", "configuration 8", "finite"]),
    "force nan": ("forces", lambda v: nan(v, (11, 0, 1)), ["forces", "configuration 12", "finite"]),
    "position inf": (
        "xats",
        lambda v: times(v, (3, 1), np.inf),
        ["displacements", "configuration 4", "finite"],
    ),
    "stress nan": (
        "stresses",
        lambda v: nan(v, (5, 2, 2)),
        ["stresses", "configuration 6", "finite"],
    ),
    "energy 0": ("energies", lambda v: times(v, 9, 1e3), ["configuration 10", "do not belong"]),
    "force": ("forces", lambda v: times(v, 20, 1000.0), ["configuration 21", "do not belong"]),
    "stress": (
        "stresses",
        lambda v: times(v, 20, 1000.0),
        ["stresses", "configuration 21", "do not belong"],
    ),
    "force sign": ("forces", lambda v: times(v, slice(None), -1.0), ["forces"]),
    "force unit": ("forces", lambda v: times(v, slice(None), 13.6057), ["forces"]),
    "energy unit": ("energies", lambda v: times(v, slice(None), 13.6057), ["energies"]),
    "energy per cell": ("energies", lambda v: times(v, slice(None), 1 / 8), ["energies"]),
    "energy order": ("energies", swapped, ["energies"]),
    "force order": ("forces", swapped, ["forces"]),
    "larger": ("xats", lambda v: v.__iadd__(0.5 * (v - v.mean(axis=0))), ["was not drawn"]),
    "copied": ("xats", lambda v: v.__setitem__(4, v[0]), ["same configuration", "1", "5"]),
    "partner": (
        "xats",
        lambda v: v.__setitem__(4, v[4] + 0.01 * np.sin(np.arange(24)).reshape(8, 3)),
        ["mirror image", "5", "6"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ensemble_is_refused_with_the_configuration(folder, damage):
    name, change, words = DAMAGE[damage]
    file = folder / "data_dir" / f"{name}_pop1.npy"
    values = np.load(file)
    change(values)
    np.save(file, values)
    with refused("data_dir", "population 1", *words):
        read_ensemble(folder / "data_dir", 300.0)


@pytest.mark.parametrize(
    ("rows", "words"), [(199, ["mirror image"]), ((0, 2, 4, 6), ["mirror image"])]
)
def test_configurations_without_their_mirror_image_are_refused(folder, rows, words):
    for name in ("xats", "forces", "stresses", "energies"):
        file = folder / "data_dir" / f"{name}_pop1.npy"
        values = np.load(file)
        np.save(file, values[:rows] if isinstance(rows, int) else values[list(rows)])
    with refused(*words):
        read_ensemble(folder / "data_dir", 300.0)


def test_wrapped_atoms_are_taken_back_and_the_order_of_configurations_is_free(folder, aluminium):
    state, ensemble = aluminium
    rng = np.random.default_rng(3)
    order = rng.permutation(200)
    for name in ("xats", "forces", "stresses", "energies"):
        file = folder / "data_dir" / f"{name}_pop1.npy"
        values = np.load(file)[order]
        if name == "xats":
            cell = state.supercell.cell.array
            values = (values @ np.linalg.inv(cell) % 1.0) @ cell
            assert np.abs(values - np.load(file)[order]).max() > 1.0
        np.save(file, values)
    _, again = read_ensemble(folder / "data_dir", 300.0)
    assert again.displacements[0::2] == pytest.approx(-again.displacements[1::2], abs=1e-9)
    symmetry = Symmetry(state.atoms, state.supercell_matrix)
    assert average(state, again, symmetry).helmholtz == pytest.approx(
        average(state, ensemble, symmetry).helmholtz, abs=1e-7
    )


def test_a_cut_list_of_energies_loses_no_configurations_unsaid(aluminium, tmp_path):
    state, ensemble = aluminium
    write_ensemble(state, ensemble, tmp_path, text=True)
    energies = tmp_path / "energies_supercell_population1.dat"
    energies.write_text("".join(energies.read_text().splitlines(keepends=True)[:120]))
    with pytest.raises(InputError, match=r"120 energies, and 200 files"):
        read_ensemble(tmp_path, 300.0)


def test_the_crystal_of_an_ensemble_is_checked_as_every_other(aluminium, tmp_path):
    state, ensemble = aluminium
    heavy = state.atoms.copy()
    heavy.set_masses([200.0])
    write_ensemble(replace(state, atoms=heavy), ensemble, tmp_path)
    with pytest.raises(InputError, match="masses that cannot be"):
        read_ensemble(tmp_path, 300.0)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1.0, ""),
        (-1.0, "another sign"),
        (14710.5, "GPa?"),
        (-14710.5, "GPa?"),
        (91.8, r"(eV/A^3?)"),
        (147105.0, "GPa"),
    ],
)
def test_stresses_of_another_sign_or_unit_are_said_and_not_used(folder, caplog, factor, words):
    """They were logged as a pressure."""
    file = folder / "data_dir" / "stresses_pop1.npy"
    np.save(file, factor * np.load(file))
    _, ensemble = read_ensemble(folder / "data_dir", 300.0)
    assert np.isnan(ensemble.stresses).all() == bool(words)
    said = [line for line in caplog.messages if "its stresses are not used" in line]
    assert len(said) == bool(words) and all(words in line for line in said)
    if words:
        with caplog.at_level(logging.INFO, logger="magus_anharmonic"):
            read_start(None, folder / "data_dir", 300.0, 0.0, 0.3)
        assert any("no stress" in line for line in caplog.messages)


def test_an_ensemble_without_stresses_is_one_without_pressure(folder):
    np.save(folder / "data_dir" / "stresses_pop1.npy", np.zeros((200, 3, 3)))
    _, zeros = read_ensemble(folder / "data_dir", 300.0)
    (folder / "data_dir" / "stresses_pop1.npy").unlink()
    _, absent = read_ensemble(folder / "data_dir", 300.0)
    assert np.isnan(zeros.stresses).all() and np.isnan(absent.stresses).all()


def test_configurations_for_the_errors_command_are_of_the_state(aluminium):
    state, ensemble = aluminium
    assert len(displacements_of(state, displaced(state, ensemble.displacements), "file")) == 200
    with pytest.raises(InputError, match="file: was not drawn"):
        displacements_of(
            replace(state, temperature=0.0), displaced(state, ensemble.displacements), "file"
        )


# ------------------------------------------------------------------------------- dynamical matrices


def rewritten(source, target, change):
    target.mkdir(parents=True, exist_ok=True)
    for file in source.parent.glob(f"{source.name}*"):
        (target / file.name).write_text(change(file.name, file.read_text()))
    return target / source.name


@pytest.mark.parametrize("label", ["Al1", "Al_pbe", "al", "AL-x", "Ala"])
def test_type_labels_of_pw_are_elements(folder, label):
    prefix = rewritten(
        folder / "dyn_pop1_",
        folder / "labelled",
        lambda _, text: text.replace("'Al ", f"'{label} "),
    )
    state = state_from_dyn(prefix, 300.0)
    assert state.atoms.get_chemical_symbols() == ["Al"]
    assert state.modes.hbar_omega == pytest.approx(
        state_from_dyn(folder / "dyn_pop1_", 300.0).modes.hbar_omega, rel=1e-9
    )


def test_labels_of_hydrogen_and_labels_that_are_no_elements():
    from magus_anharmonic.sscha.python_sscha import element_of

    labels = {
        "H1": 1.008,
        "H_pbe": 1.008,
        "h": 1.008,
        "D": 2.014,
        "d": 2.014,
        "T": 3.016,
        "Hs": 1.008,
        "HE": 1.008,
        "H2 ": 2.014,
    }
    assert {element_of(label, mass) for label, mass in labels.items()} == {"H"}
    assert (
        element_of("He1", 4.003),
        element_of("Co", 58.9),
        element_of("Co", 12.0),
        element_of("s", 32.06),
    ) == ("He", "Co", "C", "S")
    for label in ("1", "", "_H", "Xx", "Q"):
        with pytest.raises(InputError, match="names no element"):
            element_of(label, 1.0)


@pytest.mark.parametrize("damage", ["NaN", "-nan", "Infinity", "************"])
def test_what_is_no_number_in_a_file_of_matrices_names_the_file(folder, damage):
    def change(name, text):
        if name != "dyn_pop1_2":
            return text
        head, rest = text.split("Dynamical", 1)
        line = next(line for line in rest.splitlines() if line.count(".") == 6)
        return head + "Dynamical" + rest.replace(line, line.replace(line.split()[0], damage, 1), 1)

    prefix = rewritten(folder / "dyn_pop1_", folder / "damaged", change)
    with pytest.raises(InputError, match="dyn_pop1_2: holds"):
        state_from_dyn(prefix)


def test_matrices_come_with_the_symmetry_of_their_crystal(aluminium, tmp_path, caplog):
    state, _ = aluminium
    noise = (
        np.random.default_rng(0).normal(size=state.full.shape)
        * 0.003
        * np.abs(state.force_constants).max()
    )
    noise = fold(sum_rule(noise), state.supercell_matrix)
    write_dyn(replace(state, force_constants=state.force_constants + noise), tmp_path / "noisy")
    found = state_from_dyn(tmp_path / "noisy", 300.0)
    assert Symmetry(found.atoms, found.supercell_matrix).force_constants(
        found.force_constants
    ) == pytest.approx(found.force_constants, abs=1e-12)
    assert found.force_constants.sum(axis=(0, 2)) == pytest.approx(0.0, abs=1e-10)
    write_dyn(
        replace(state, force_constants=state.force_constants + 30.0 * noise), tmp_path / "wrong"
    )
    with caplog.at_level(logging.WARNING, logger="magus_anharmonic"):
        state_from_dyn(tmp_path / "wrong", 300.0)
    assert "break the symmetry" in caplog.text
