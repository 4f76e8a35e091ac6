"""Quantum ESPRESSO's own pw.x, and ABINIT: labels of real codes, and what they say when they fail.

Debian has both: apt-get install quantum-espresso quantum-espresso-data abinit abinit-data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read
from ase.units import GPa
from waiting import wait_for

from magus_anharmonic.errors import InputError, MachineError
from magus_anharmonic.io.files import write_json
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.labelers.espresso import family
from magus_anharmonic.paper.truth import labels_of
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.settings import LabelerSettings, load_settings, parse_settings
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.starter import write_input

PSEUDO = Path("/usr/share/espresso/pseudo")
SI, AL, H = "Si.pz-vbc.UPF", "Al.pz-vbc.UPF", "H.pz-vbc.UPF"
pytestmark = [
    pytest.mark.real_espresso,
    pytest.mark.skipif(
        shutil.which("pw.x") is None or not (PSEUDO / SI).is_file(),
        reason="skipped: no pw.x here (apt-get install quantum-espresso quantum-espresso-data)",
    ),
]


def silicon() -> Atoms:
    atoms = bulk("Si", a=5.4)
    atoms.positions[1] += (0.06, -0.04, 0.03)
    return atoms


def aluminium() -> Atoms:
    atoms = bulk("Al", a=4.0, cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def alane() -> Atoms:
    """Pm-3n AlH3, 8 atoms, displaced."""
    scaled = [[0, 0, 0], [0.5] * 3]
    scaled += [[0.25, 0.5, 0], [0.75, 0.5, 0], [0, 0.25, 0.5], [0, 0.75, 0.5]]
    scaled += [[0.5, 0, 0.25], [0.5, 0, 0.75]]
    atoms = Atoms("Al2H6", scaled_positions=scaled, cell=[3.15] * 3, pbc=True)
    atoms.rattle(0.04, seed=2)
    return atoms


def labels(folder: Path, structures, *, timeout: float = 300.0, k_spacing=0.08, **arguments):
    data = arguments.pop("input_data", {})
    system = {"ecutwfc": 20, **data.get("system", {})}
    given = {
        "pseudo_dir": str(PSEUDO),
        "pseudopotentials": {"Si": SI, "Al": AL, "H": H},
        "input_data": {**data, "system": system},
        **arguments,
    }
    settings = LabelerSettings(
        calculator="espresso", arguments=given, k_spacing=k_spacing, timeout=timeout, n_workers=1
    )
    with get_labeler(settings, folder) as labeler:
        return labeler.label(list(structures))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "cutoff", "k_spacing"),
    [(silicon, 20, 0.08), (aluminium, 20, 0.08), (alane, 30, 0.12)],
    ids=["Si", "Al", "AlH3"],
)
def test_a_label_is_what_ase_reads_in_pws_output(tmp_path, make, cutoff, k_spacing):
    atoms = make()
    data = {"system": {"ecutwfc": cutoff}}
    (label,) = labels(tmp_path, [atoms], input_data=data, k_spacing=k_spacing)
    assert label.ok, label.reason
    output = tmp_path / "slot0" / "espresso.pwo"
    found = read(output, format="espresso-out")
    assert label.free_energy == pytest.approx(found.get_potential_energy(), abs=1e-8)
    assert label.forces == pytest.approx(found.get_forces(), abs=1e-8)
    assert label.stress == pytest.approx(found.get_stress(voigt=False), abs=1e-10)
    assert np.abs(label.forces).max() > 0.1  # eV/A: the order of the atoms is part of the claim
    (smearing,) = (
        float(line.split()[-2]) for line in output.read_text().splitlines() if "(-TS)" in line
    )
    half_of_ts = -0.5 * smearing * 13.605693  # Gaussian smearing
    assert label.energy == pytest.approx(label.free_energy + half_of_ts, abs=1e-5)


@pytest.mark.slow
def test_forces_and_stress_are_the_derivatives_of_the_free_energy(tmp_path):
    """Al (a metal), displaced and strained at random. pw.x's stress is that of a basis without
    end: 0.15 GPa of 10 are left at this cutoff."""
    atoms, rng = aluminium(), np.random.default_rng(0)
    direction, strain = rng.normal(size=(4, 3)), rng.normal(size=(3, 3))
    strain = (strain + strain.T) / np.linalg.norm(strain + strain.T)
    step, moved = 0.005, []
    for sign in (1, -1):
        one, other = atoms.copy(), atoms.copy()
        one.positions += sign * step * direction
        other.set_cell(atoms.cell @ (np.eye(3) + sign * step * strain), scale_atoms=True)
        moved += [one, other]
    data = {"system": {"ecutwfc": 45}}
    made = labels(tmp_path, [atoms, *moved], kpts=[2, 2, 2], k_spacing=None, input_data=data)
    slopes = [
        (plus.free_energy - minus.free_energy) / (2 * step)
        for plus, minus in zip(made[1:3], made[3:], strict=True)
    ]
    assert -slopes[0] == pytest.approx(np.sum(made[0].forces * direction), rel=0.01)
    stress = np.sum(made[0].stress * strain) / GPa
    assert slopes[1] / atoms.get_volume() / GPa == pytest.approx(stress, abs=0.15)


@pytest.mark.slow
def test_magnetic_moments_and_charges_of_the_input_reach_pw(tmp_path):
    """As with ASE's own calculator: moments make the run spin-polarised, `tot_charge` is a key."""
    magnetic = bulk("Fe", a=2.8)  # ASE gives it moments
    still = magnetic.copy()
    still.set_initial_magnetic_moments(None)
    iron = {"Fe": "Fe.pbe-nd-rrkjus.UPF"}
    system = {"ecutwfc": 25, "ecutrho": 200, "degauss": 0.02}
    first, second = labels(
        tmp_path,
        [still, magnetic],
        pseudopotentials=iron,
        input_data={"system": system},
        k_spacing=0.12,
    )
    assert second.energy < first.energy - 0.1
    neutral, charged = (
        labels(tmp_path / str(charge), [silicon()], input_data={"system": {"tot_charge": charge}})[
            0
        ]
        for charge in (0, 1)
    )
    assert neutral.ok and charged.ok
    assert charged.settings_hash != neutral.settings_hash
    assert abs(charged.energy - neutral.energy) > 1.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_data": {"electrons": {"electron_maxstep": 2}}}, "SCF did not converge"),
        ({"pseudopotentials": {"Al": AL}}, "pseudopotentials: has no file for Si"),
        ({"input_data": {"system": {"ecutwfx": 30}}}, "bad line in namelist &system"),
        (
            {
                "kpts": [40, 40, 40],
                "k_spacing": None,
                "input_data": {"system": {"nosym": True, "noinv": True}},
            },
            "too many k-points",
        ),
    ],
)
def test_a_label_that_fails_says_what_pw_said(tmp_path, arguments, words):
    (failure,) = labels(tmp_path, [silicon()], **arguments)
    assert not failure.ok and words in failure.reason, failure.reason


def test_pw_without_end_is_ended_after_the_timeout(tmp_path):
    hard = {"system": {"ecutwfc": 150}}
    (failure,) = labels(tmp_path, [silicon()], input_data=hard, k_spacing=0.01, timeout=6)
    assert not failure.ok and "within 6 s" in failure.reason
    assert not _running(tmp_path)


def test_a_killed_pw_is_trouble_of_the_machine(tmp_path):
    def kill():
        wait_for(lambda: _running(tmp_path), "pw.x does not run")
        for number in _running(tmp_path):
            os.kill(number, 9)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(MachineError, match=r"pw\.x was killed \(SIGKILL\)"):
        labels(tmp_path, [silicon()], input_data={"system": {"ecutwfc": 150}}, k_spacing=0.01)
    killer.join()


def _running(folder: Path) -> list[int]:
    """pw.x's that work below a folder."""
    return [
        found.pid
        for found in psutil.process_iter(["name", "cwd"])
        if found.info["name"] == "pw.x" and Path(found.info["cwd"] or "/").is_relative_to(folder)
    ]


@pytest.mark.parametrize("where", ["outdir", "scratch"])
def test_a_full_disk_is_not_a_property_of_the_structure(tmp_path, where):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = {"outdir": "1m", "scratch": "16k"}[where]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk]).returncode:
        pytest.skip("skipped: a small disk needs the right to mount one")
    try:
        control = {"outdir": str(disk), "disk_io": "medium"} if where == "outdir" else {}
        folder = tmp_path / "scratch" if where == "outdir" else disk
        data = {"control": control, "system": {"ecutwfc": 80 if where == "outdir" else 20}}
        with pytest.raises((MachineError, OSError), match=f"No space left on device.*{disk}"):
            labels(folder, [silicon()], input_data=data)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("pseudopotentials", "words"),
    [
        ({"Si": "Si.nothing.UPF"}, r"pseudopotentials\.Si: there is no file Si\.nothing\.UPF"),
        ({"Si": AL}, r"pseudopotentials\.Si: .*Al\.pz-vbc\.UPF is a pseudopotential of Al"),
        (["Si"], r"has 5 files for Si .*name the one to take"),
        (["Xe"], "has no file for Xe"),
        (
            {"Si": SI, "H": "H.blyp-vbc.UPF"},
            r"different functionals: Si\.pz-vbc\.UPF \(LDA \(PZ\)\), H\.blyp-vbc\.UPF \(BLYP\)",
        ),
        ({}, "is missing"),
    ],
)
def test_wrong_pseudopotentials_are_refused_before_pw_starts(tmp_path, pseudopotentials, words):
    with pytest.raises(InputError, match=words):
        labels(tmp_path, [silicon()], pseudopotentials=pseudopotentials)


def test_elements_get_files_of_the_functional_that_all_of_them_have(tmp_path, monkeypatch):
    """Five files for H, one for Al: with Al, H is LDA. `init` names what pw.x takes together."""
    assert family(PSEUDO, ["Al", "H"])[0] == {"Al": AL, "H": H}
    monkeypatch.setenv("ESPRESSO_PSEUDO", str(PSEUDO))
    for compound, files in (
        ("AlH3", {"Al": AL, "H": H}),
        ("GeH4", {"Ge": "Ge.pbe-kjpaw.UPF", "H": "H.pbe-kjpaw.UPF"}),
    ):
        written = write_input(
            "search", compound, [50.0], labeler="espresso", path=tmp_path / compound
        )
        learning = load_settings(written).learning
        assert learning is not None
        assert learning.labeler.arguments["pseudopotentials"] == files


def test_a_family_brings_files_and_cutoffs(tmp_path):
    """A folder of UPF files, one an element; and one with the JSON of the SSSP library."""
    for name in (SI, AL):
        shutil.copy(PSEUDO / name, tmp_path)
    assert family(tmp_path, ["Si", "Al"]) == ({"Si": SI, "Al": AL}, {})
    shutil.copy(PSEUDO / "Si.pbe-rrkj.UPF", tmp_path)
    entry = {"filename": SI, "cutoff_wfc": 18.0, "cutoff_rho": 72.0}
    write_json(
        tmp_path / "SSSP.json", {"Si": entry, "Al": {**entry, "filename": AL, "cutoff_wfc": 16.0}}
    )
    files, cutoffs = family(tmp_path, ["Si", "Al"])
    assert files == {"Si": SI, "Al": AL} and cutoffs == {"ecutwfc": 18.0, "ecutrho": 72.0}
    settings = LabelerSettings(
        calculator="espresso",
        arguments={"pseudo_dir": str(tmp_path), "pseudopotentials": ["Si", "Al"]},
        k_spacing=0.1,
        n_workers=1,
    )
    with get_labeler(settings, tmp_path / "scratch") as labeler:
        (label,) = labeler.label([silicon()])
    assert label.ok, label.reason
    text = (tmp_path / "scratch" / "slot0" / "espresso.pwi").read_text()
    assert "ecutwfc          = 18.0" in text and "ecutrho          = 72.0" in text


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("abinit") is None, reason="skipped: no ABINIT (apt-get install abinit abinit-data)"
)
def test_abinit_labels_by_its_import_path(tmp_path, monkeypatch):
    """Command and folder of pseudopotentials stand in ASE's configuration, as ASE asks for; its
    forces are those of pw.x with another pseudopotential to 15 %."""
    configuration = tmp_path / "ase.ini"
    configuration.write_text("[abinit]\ncommand = abinit\npp_paths = /usr/share/abinit/psp\n")
    monkeypatch.setenv("ASE_CONFIG_PATH", str(configuration))
    monkeypatch.setattr("magus_anharmonic.labelers.codes.ALLOW", "NOTHING")
    arguments = {
        "ecut": 250,
        "kpts": [3, 3, 3],
        "pps": "pspnc",
        "xc": "LDA",
        "toldff": 1e-5,
        "chksymtnons": 0,
    }
    settings = LabelerSettings(
        calculator="ase.calculators.abinit.Abinit", arguments=arguments, n_workers=1
    )
    with get_labeler(settings, tmp_path / "scratch") as labeler:
        good, bad = labeler.label([silicon(), Atoms("Xe", cell=[6] * 3, pbc=True)])
    assert good.ok, good.reason
    (quantum_espresso,) = labels(tmp_path / "pw", [silicon()], k_spacing=None, kpts=[3, 3, 3])
    difference = good.forces[1] - quantum_espresso.forces[1]
    assert np.abs(difference).max() < 0.15 * np.abs(good.forces).max()
    assert not bad.ok and "Xe" in bad.reason


@pytest.mark.full
def test_g_of_a_model_corrected_by_pw_is_that_of_sscha_driven_by_pw(tmp_path):
    """Aluminium in 8 atoms at 300 K: EMT with at most 40 labels, against every configuration by
    pw.x."""
    block = {
        "calculator": "espresso",
        "k_spacing": 0.08,
        "n_workers": 1,
        "arguments": {
            "pseudo_dir": str(PSEUDO),
            "pseudopotentials": {"Al": AL},
            "input_data": {"system": {"ecutwfc": 20}},
        },
    }
    run = {"temperature": 300.0, "cell": "fixed", "reference_spacing": 0.5, "hessian": 0}
    given = {**run, "n_configs": 1000, "truth": block, "truth_labels": 40}
    settings = parse_settings({"pressure": 0.0, "Fitness": ["SSCHA"], "sscha": given})
    atoms = bulk("Al", a=4.0)
    (row,) = rank_structures(
        [atoms],
        EMT(),
        settings,
        tmp_path / "ranking",
        relax=False,
        workers=1,
        truth=labels_of(settings, tmp_path / "ranking"),
    )
    with get_labeler(settings.sscha.truth, tmp_path / "labels") as labeler:
        direct = free_energy(
            atoms, labeler, 0.0, 300.0, cell="fixed", reference_spacing=0.5, n_configs=40
        )
    assert direct.converged
    error = np.hypot(np.hypot(row.gibbs_error, row.model_correction_error), direct.gibbs_error)
    assert row.model_correction_error <= 1.5e-3
    assert row.gibbs == pytest.approx(direct.gibbs, abs=3.0 * error)
