"""Long-range dipoles between the q points of a supercell. Oracles: phonopy on its own example MgO,
the Lyddane-Sachs-Teller splitting, and rigid ions, whose dipoles are known exactly."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from ase.neighborlist import neighbor_list
from ase.spacegroup import crystal
from campaign_inputs import write_campaign
from refusals import refused
from rigid_ions import COULOMB, RigidIons

from magus_anharmonic.campaign.steps import plan
from magus_anharmonic.errors import InputError
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import SschaSettings, parse, parse_settings
from magus_anharmonic.settings.born import Born, read_born
from magus_anharmonic.settings.campaign import load_campaign
from magus_anharmonic.sscha import SschaResult, free_energy
from magus_anharmonic.sscha.nonanalytic import dipole_squares, fitted
from magus_anharmonic.sscha.qe_files import state_from_dyn
from magus_anharmonic.sscha.reciprocal import finite_size_term, interpolated_squares
from magus_anharmonic.sscha.report import hessian_of_run
from magus_anharmonic.sscha.start import harmonic_force_constants
from magus_anharmonic.sscha.state import (
    SschaState,
    atom_order,
    fold,
    fourier,
    inverse_fourier,
    phonon_energy,
    repeated,
)
from magus_anharmonic.sscha.supercells import q_points
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import EV_IN_CM1

MGO = Path(__file__).with_name("mgo")
THZ = 4.135667696e-3
"""eV."""


@pytest.fixture(scope="module")
def mgo():
    """phonopy's own MgO with its charges, its force constants as a state of ours, and our reading
    of the charges, which are of the conventional cell."""
    import phonopy

    phonon = phonopy.load(
        unitcell_filename=MGO / "POSCAR-unitcell",
        supercell_matrix=[2, 2, 2],
        primitive_matrix="auto",
        force_sets_filename=MGO / "FORCE_SETS",
        born_filename=MGO / "BORN",
        is_compact_fc=False,
        log_level=0,
    )
    phonon.symmetrize_force_constants()
    phonon.nac_params = {**phonon.nac_params, "factor": COULOMB}
    cell = phonon.primitive
    atoms = Atoms(cell.symbols, positions=cell.positions, cell=cell.cell, masses=cell.masses, pbc=1)
    matrix = np.rint(phonon.supercell.cell @ np.linalg.inv(cell.cell)).astype(int)
    matrix = tuple(tuple(row) for row in matrix.tolist())
    order = np.argsort(atom_order(repeated(atoms, matrix), phonon.supercell.positions))
    full = phonon.force_constants[np.ix_(order, order)].transpose(0, 2, 1, 3)
    compact = fold(full.reshape(3 * len(order), -1), matrix)
    state = SschaState(atoms, matrix, compact, 300.0)
    return phonon, state, fitted(atoms, [read_born(MGO / "POSCAR-unitcell", MGO / "BORN")])


@pytest.mark.parametrize("direction", [(1.0, 1.0, 0.0), (0.3, 0.1, 0.2)])
def test_frequencies_towards_gamma_are_phonopys_and_split_as_lyddane_sachs_and_teller_say(
    mgo, direction
):
    phonon, state, dipoles = mgo
    squares = dipole_squares(state, dipoles, np.zeros((1, 3)), np.array(direction))[0]
    phonon.run_qpoints([[0, 0, 0]], nac_q_direction=direction)
    assert phonon_energy(squares)[3:] == pytest.approx(phonon.qpoints.frequencies[0][3:] * THZ)
    charge, epsilon = 0.5 * (1.97154667 + 1.97212333), 3.38121106
    mass = 1.0 / (1.0 / state.masses).sum()
    split = 4 * np.pi * COULOMB * charge**2 / (epsilon * state.atoms.get_volume() * mass)
    assert squares[5] - squares[3] == pytest.approx(split, rel=1e-6)
    assert squares[4] == pytest.approx(squares[3], rel=1e-6)
    assert phonon_energy(squares[5]) - phonon_energy(squares[3]) > 0.03


def test_frequencies_and_free_energy_of_the_harmonic_crystal_are_phonopys_with_its_charges(mgo):
    phonon, state, dipoles = mgo
    q = np.array([[0.1, 0.0, 0.1], [0.01, 0.0, 0.0], [0.31, -0.2, 0.05]])
    phonon.run_qpoints(q)
    ours = phonon_energy(interpolated_squares(state, q, dipoles))
    assert ours == pytest.approx(phonon.qpoints.frequencies * THZ, abs=1e-7)
    found = finite_size_term(state, 0.04, dipoles)
    phonon.run_mesh(found.mesh, is_mesh_symmetry=False, is_gamma_center=True)
    phonon.run_thermal_properties(temperatures=[300.0], cutoff_frequency=1e-2)
    theirs = phonon.get_thermal_properties_dict()["free_energy"][0] / 96.48533212
    assert state.harmonic_free_energy + found.term == pytest.approx(theirs, abs=1e-6)
    assert abs(found.dipoles) > 5e-4, "what is tested is not nothing"


def ionic_state(ions, repetitions, temperature=300.0):
    atoms, matrix = ions.crystal(), (repetitions,) * 3
    compact = harmonic_force_constants(atoms, matrix, Symmetry(atoms, matrix), ions)
    return SschaState(atoms, matrix, compact, temperature)


def ionic_charges(ions, atoms):
    return Born.of(atoms, ions.charges(atoms)[:, None, None] * np.eye(3), np.eye(3))


def test_with_dipoles_the_free_energy_of_a_small_supercell_is_that_of_a_large_one():
    ions = RigidIons()
    states = [ionic_state(ions, n) for n in (2, 3)]
    dipoles = fitted(states[0].atoms, [ionic_charges(ions, states[0].atoms)])
    raw = np.array([state.harmonic_free_energy for state in states])
    plain = raw + [finite_size_term(state, 0.03).term for state in states]
    whole = raw + [finite_size_term(state, 0.03, dipoles).term for state in states]
    assert abs(plain[1] - plain[0]) > 3e-3
    assert abs(whole[1] - whole[0]) < 1e-6, "eV per cell of two atoms"
    assert whole[0] - plain[0] == pytest.approx(
        finite_size_term(states[0], 0.03, dipoles).dipoles, abs=1e-9
    )
    # nothing changes where SSCHA measures
    q = q_points(states[0].supercell_matrix)
    assert interpolated_squares(states[0], q, dipoles) == pytest.approx(
        interpolated_squares(states[0], q), abs=1e-9
    )


def test_dft_of_rock_salt_in_a_small_supercell_is_that_of_a_large_one_too():
    """NaCl by DFPT: the q points of 2x2x2 against those of 4x4x4."""
    half, charge = 2.8451507380878356, 1.1007123 * np.eye(3)
    cell = half * (1 - np.eye(3))
    atoms = Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=cell, pbc=True)
    born = Born.of(atoms, np.array([charge, -charge]), 2.474413280838 * np.eye(3))
    with np.load(MGO.with_name("nacl") / "force_constants.npz") as stored:
        compact = {4: stored["compact"]}
    q = q_points((2, 2, 2))
    compact[2] = inverse_fourier(fourier(compact[4], (4, 4, 4), q), (2, 2, 2), q)
    plain, whole = np.zeros(2), np.zeros(2)
    for index, n in enumerate((2, 4)):
        state = SschaState(atoms, (n, n, n), compact[n], 0.0)
        plain[index] = whole[index] = state.harmonic_free_energy
        plain[index] += finite_size_term(state, 0.03).term
        whole[index] += finite_size_term(state, 0.03, fitted(atoms, [born])).term
    assert plain[1] - plain[0] > 4e-4
    assert abs(whole[1] - whole[0]) < 1e-5, "eV per cell of two atoms"


PSEUDO = Path("/usr/share/espresso/pseudo")
PW = """&control
 calculation = 'scf', prefix = 'mgo', pseudo_dir = '/usr/share/espresso/pseudo', outdir = 'tmp'
/
&system
 ibrav = 0, nat = 2, ntyp = 2, ecutwfc = 40
/
&electrons
 conv_thr = 1e-12
/
ATOMIC_SPECIES
Mg 24.305 Mg.pz-n-vbc.UPF
O 15.999 O.pz-kjpaw.UPF
ATOMIC_POSITIONS crystal
Mg 0 0 0
O 0.5 0.5 0.5
CELL_PARAMETERS angstrom
0 2.1 2.1
2.1 0 2.1
2.1 2.1 0
K_POINTS automatic
2 2 2 1 1 1
"""
PH = """phonons
&inputph
 prefix = 'mgo', outdir = 'tmp', epsil = .true., tr2_ph = 1e-13, fildyn = 'dyn1'
/
0 0 0
"""
DYNMAT = "&input fildyn = 'dyn1', asr = 'simple', q(1) = 1, q(2) = 0, q(3) = 0 /\n"


@pytest.mark.real_espresso
@pytest.mark.skipif(
    shutil.which("ph.x") is None or not (PSEUDO / "Mg.pz-n-vbc.UPF").is_file(),
    reason="skipped: no ph.x here (apt-get install quantum-espresso quantum-espresso-data)",
)
def test_charges_of_ph_x_are_read_and_the_splitting_is_that_of_its_own_dynmat_x(tmp_path):
    for program, text in (("pw.x", PW), ("ph.x", PH), ("dynmat.x", DYNMAT)):
        file = tmp_path / f"{program}.pwi"
        file.write_text(text)
        command = [program, "-in", file.name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:]
    theirs = [float(row) for row in re.findall(r"^\s+[4-6]\s+(\S+)\s", done.stdout, re.M)]
    state = state_from_dyn(tmp_path / "dyn")
    dipoles = fitted(state.atoms, [read_born(tmp_path / "pw.x.pwi", tmp_path / "dyn1")])
    along_x = state.atoms.cell.array @ [1.0, 0.0, 0.0]
    squares = dipole_squares(state, dipoles, np.zeros((1, 3)), along_x)[0]
    ours = phonon_energy(squares)[3:] * EV_IN_CM1
    assert ours == pytest.approx(theirs, rel=2e-3) and theirs[2] - theirs[0] > 200


def anatase(u=0.208):
    basis = [(0, 0, 0), (0, 0, u)]
    return crystal(["Ti", "O"], basis, spacegroup=141, cellpar=[3.78, 3.78, 9.5, 90, 90, 90])


def anatase_charges(atoms):
    """(n, 3, 3) and (3, 3) with the symmetry of anatase: the oxygens' in-plane components differ,
    and which is the larger one changes from site to site."""
    ti = np.flatnonzero(atoms.numbers == 22)
    charges = np.zeros((len(atoms), 3, 3))
    charges[ti] = np.diag([6.6, 6.6, 5.8])
    first, second, vectors = neighbor_list("ijD", atoms, 2.1)
    for oxygen in np.flatnonzero(atoms.numbers == 8):
        bonds = np.abs(vectors[(first == oxygen) & (atoms.numbers[second] == 22)])
        plane = (-5.4, -1.2) if bonds[:, 0].max() > bonds[:, 1].max() else (-1.2, -5.4)
        charges[oxygen] = np.diag([*plane, -2.9])
    return charges, np.diag([7.2, 7.2, 6.6])


def test_charges_are_turned_and_reordered_with_the_crystal():
    given = anatase()
    charges, dielectric = anatase_charges(given)
    born = Born.of(given, charges, dielectric)
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    other = anatase(0.212)  # relaxed, at another volume and ratio of axes
    expected, tensor = anatase_charges(other)
    stretched = other.cell.array * [1.03, 1.03, 1.05]
    other.set_cell(stretched @ turn, scale_atoms=True)
    order = rng.permutation(len(other))
    other = other[order]
    other.positions += rng.random(3)
    other.set_cell(np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]]) @ other.cell.array)
    other.wrap()
    found = fitted(other, [born])
    assert found.charges == pytest.approx(turn.T @ expected[order] @ turn, abs=1e-6)
    assert found.dielectric == pytest.approx(turn.T @ tensor @ turn, abs=1e-6)


def test_of_several_structures_the_nearest_gives_the_charges_and_a_strange_one_none():
    given, far = anatase(), anatase(0.213)
    charges, dielectric = anatase_charges(given)
    first, second = Born.of(given, charges, dielectric), Born.of(far, 0.9 * charges, dielectric)
    assert fitted(anatase(0.212), [first, second]).charges == pytest.approx(0.9 * charges)
    assert fitted(anatase(0.209), [first, second]).charges == pytest.approx(charges)
    assert fitted(anatase(0.24), [first, second]) is None, "no oxygen is where it was"
    assert fitted(RigidIons().crystal(), [first, second]) is None


def test_a_run_with_charges_says_so_and_its_phonons_split(tmp_path):
    import phonopy

    ions = RigidIons()
    atoms = ions.crystal()
    options = {"cell": "fixed", "supercell": (2, 2, 1), "n_configs": 16, "max_populations": 1}
    born = ionic_charges(ions, atoms)
    result = free_energy(atoms, ions, born=born, directory=tmp_path / "run", **options)
    found = result.numbers
    plain = finite_size_term(result.state, SschaSettings().reference_spacing)
    assert plain.dipoles is None and abs(found.nonanalytic) > 1e-4
    assert found.finite_size == pytest.approx(plain.term / 2 + found.nonanalytic, abs=1e-9)
    assert found.gibbs == pytest.approx(found.gibbs_raw + found.finite_size, abs=1e-9)
    again = SschaResult.read(tmp_path / "run")
    assert again.dipoles.charges == pytest.approx(result.charges)
    with pytest.raises(InputError, match=r"another SSCHA run \(different: sscha\)"):
        free_energy(atoms, ions, directory=tmp_path / "run", **options)
    hessian_of_run(tmp_path / "run", tmp_path / "phonons")
    rows = np.genfromtxt(tmp_path / "phonons" / "dispersion.csv", delimiter=",", names=True)
    transverse, longitudinal = rows["auxiliary_4_meV"][0], rows["auxiliary_6_meV"][0]
    mass, square = 1.0 / (1.0 / atoms.get_masses()).sum(), (1e-3 / phonon_energy(1.0)) ** 2
    split = 4 * np.pi * COULOMB * ions.charge**2 / (atoms.get_volume() * mass)
    assert square * (longitudinal**2 - transverse**2) == pytest.approx(split, rel=1e-3)
    read = phonopy.load(tmp_path / "phonons" / "phonopy.yaml", log_level=0)
    assert read.nac_params["born"] == pytest.approx(result.charges)


def test_the_key_reads_the_files_once_and_a_run_depends_on_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(MGO / "BORN", "BORN")
    shutil.copy(MGO / "POSCAR-unitcell", "MgO.vasp")
    settings = parse(SschaSettings, {"born": {"MgO.vasp": "BORN"}}, "sscha")
    assert settings.of_a_run()["born"][0].charges[4][0][0] == pytest.approx(-1.9721233)
    stored = settings.model_dump(mode="json")
    Path("BORN").unlink()
    assert parse(SschaSettings, stored, "sscha") == settings
    assert "born" not in SschaSettings().model_dump(), "a run of before there was the key goes on"


def test_a_campaign_keeps_what_the_files_hold(tmp_path):
    files = {str(MGO / "POSCAR-unitcell"): str(MGO / "BORN")}
    block = {"pressures": [100], "settings": {"born": files}}
    loaded = load_campaign(write_campaign(tmp_path, sscha=block))
    (step,) = (one for one in plan(loaded) if one.kind == "sscha")
    (born,) = step.settings["sscha"]["born"]
    assert born["dielectric"][0][0] == 3.38121106
    assert loaded.ranking_settings(100.0, loaded.foundation).sscha.born[0].symbols[4] == "O"


def test_a_ranking_says_whose_g_holds_the_dipoles(tmp_path):
    ions = RigidIons()
    salt = ions.crystal()
    other = Atoms("MgO", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.6] * 3, pbc=True)
    block = {
        "born": [ionic_charges(ions, salt)],
        "supercell": [2, 2, 1],
        "cell": "fixed",
        "n_configs": 20,
        "max_populations": 1,
        "hessian": 0,
        "allocation": "fixed",
    }
    settings = parse_settings({"pressure": 0, "Fitness": ["SSCHA"], "sscha": block})
    found = rank_structures([salt, other], ions, settings, tmp_path, relax=False, workers=1)
    numbers = {one.spg_static: one.free_energy for one in found}
    assert numbers["Fm-3m (225)"].nonanalytic is not None
    lacking = numbers["Pm-3m (221)"]
    assert lacking.nonanalytic is None and "none of sscha.born is of this phase" in lacking.reason


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([0, 1, 2], "inequivalent atoms (Mg, O)"),
        ([0, 1, 2, 3, 3], "inequivalent atoms (Mg, O)"),
        ([0, 1, 2, 2], "add up to 1.97 |e| per atom"),
        ([0, 2], "inequivalent atoms (Mg, O)"),
    ],
)
def test_a_born_file_of_something_else_is_refused(tmp_path, lines, problem):
    text = (MGO / "BORN").read_text().splitlines()
    file = tmp_path / "BORN"
    file.write_text("\n".join(text[line] for line in lines))
    with refused(problem, str(file), "sscha.born"):
        parse(SschaSettings, {"born": {str(MGO / "POSCAR-unitcell"): str(file)}}, "sscha")


def test_charges_that_cannot_be_are_refused_and_so_are_those_of_another_structure():
    atoms, ions = anatase(), RigidIons()
    charges, dielectric = anatase_charges(atoms)
    with pytest.raises(InputError, match="break the space group of the structure by"):
        Born.of(atoms, charges[:, [2, 0, 1]][:, :, [2, 0, 1]], dielectric)  # another frame
    with pytest.raises(InputError, match="dielectric: breaks the space group"):
        Born.of(atoms, charges, np.diag([6.6, 8.2, 7.2]))
    with pytest.raises(InputError, match="a metal has no non-analytic term"):
        Born.of(atoms, charges, -dielectric)
    with pytest.raises(InputError, match=r"charges: must be \(12, 3, 3\)"):
        Born.of(atoms, charges[:6], dielectric)
    born = Born.of(atoms, charges, dielectric)
    with pytest.raises(InputError, match=r"of TiO2|of Ti2O4.*6 atoms.*the structure is MgO"):
        free_energy(ions.crystal(), ions, born=born)
    salt = ionic_charges(ions, ions.crystal())
    caesium = Atoms("MgO", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.6] * 3, pbc=True)
    with pytest.raises(InputError, match="lattice strained by more than 5 %"):
        free_energy(caesium, ions, born=salt)


def test_files_of_another_place_are_named(tmp_path):
    write(tmp_path / "MgO.vasp", RigidIons().crystal())
    with pytest.raises(InputError, match=r"nowhere\.vasp: no such file"):
        read_born(tmp_path / "nowhere.vasp", MGO / "BORN")
    with pytest.raises(InputError, match=r"nowhere: no such file \(phonopy's BORN"):
        read_born(tmp_path / "MgO.vasp", tmp_path / "nowhere")
