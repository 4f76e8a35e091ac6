"""VASP and Quantum ESPRESSO: input written, output read, played by small programs that write
recorded-style output."""

import re
import sys
import textwrap

import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from ase.units import Bohr, GPa, Ry

from magus_anharmonic.errors import InputError, LabelerError
from magus_anharmonic.labelers import CallableLabeler, get_labeler
from magus_anharmonic.labelers.base import Recipe
from magus_anharmonic.labelers.espresso import zero_smearing_energy
from magus_anharmonic.labelers.worker import run_job
from magus_anharmonic.settings import LabelerSettings

# H first and last, so that a code that sorts by species must be sorted back.
STRUCTURE = Atoms(
    "HSHH",
    positions=[[1.5, 0, 0.1], [0, 0, 0], [0, 1.5, 0], [0, 0, 1.4]],
    cell=np.eye(3) * 3.0,
    pbc=True,
)

VASP_FORCES = [[0.1, 0, 0], [0.2, 0, 0], [0.3, 0, 0], [-0.6, 0, 0]]  # in VASP's order: H H H S
VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <kpoints><varray name="kpointlist"><v>0.0 0.0 0.0</v></varray><varray name="weights"><v>1.0</v></varray></kpoints>
 <parameters></parameters>
 <atominfo><array name="atoms"><set>
   <rc><c>H </c><c>1</c></rc><rc><c>H </c><c>1</c></rc><rc><c>H </c><c>1</c></rc><rc><c>S </c><c>2</c></rc>
 </set></array></atominfo>
 <structure name="initialpos"><crystal><varray name="basis"><v>3 0 0</v><v>0 3 0</v><v>0 0 3</v></varray></crystal>
  <varray name="positions"><v>0.5 0 0.0333333</v><v>0 0.5 0</v><v>0 0 0.4666667</v><v>0 0 0</v></varray></structure>
 <calculation>
  <scstep><energy><i name="e_fr_energy">-15.30</i><i name="e_wo_entrp">-15.20</i><i name="e_0_energy">-15.25</i></energy></scstep>
  <structure><crystal><varray name="basis"><v>3 0 0</v><v>0 3 0</v><v>0 0 3</v></varray></crystal>
  <varray name="positions"><v>0.5 0 0.0333333</v><v>0 0.5 0</v><v>0 0 0.4666667</v><v>0 0 0</v></varray></structure>
  <varray name="forces">FORCES</varray>
  <varray name="stress"><v>100 0 0</v><v>0 200 10</v><v>0 10 300</v></varray>
  <energy><i name="e_fr_energy">-15.30</i><i name="e_wo_entrp">-15.20</i><i name="e_0_energy">0.0</i></energy>
 </calculation>
</modeling>
""".replace("FORCES", "".join(f"<v>{x} {y} {z}</v>" for x, y, z in VASP_FORCES))
OUTCAR = """ vasp.6.4.2 20Jul23 (build) complex
   EDIFF  = 0.1E-05   stopping-criterion for ELM
   ISPIN  =      1    spin polarized calculation?
   NBANDS=      8
------------------------ aborting loop EDIFF was LOOPEND ------------------------
"""


def fake_program(path, body):
    """Command line of a program that runs ``body`` (Python) in the folder where the code would
    run."""
    path.write_text(textwrap.dedent(body))
    return f"{sys.executable} {path}"


@pytest.fixture
def vasp(tmp_path, monkeypatch):
    """A function (how the electronic loop ended) -> labeler whose VASP is a small program."""
    for symbol in ("H", "S"):
        potcar = tmp_path / "pp" / "potpaw_PBE" / symbol / "POTCAR"
        potcar.parent.mkdir(parents=True)
        potcar.write_text(
            f"  PAW_PBE {symbol} 15Jun2001\n   1.0\n parameters from PSCTR are:\n End of Dataset\n"
        )
    monkeypatch.setenv("VASP_PP_PATH", str(tmp_path / "pp"))

    def writes(reason="reached"):
        ended = (
            "because EDIFF is reached"
            if reason == "reached"
            else "EDIFF was not reached (unconverged)"
        )
        outcar = OUTCAR.replace("EDIFF was LOOPEND", ended)
        return (
            f"open('vasprun.xml', 'w').write({VASPRUN!r})\nopen('OUTCAR', 'w').write({outcar!r})\n"
        )

    def make(reason="reached", body="", **settings):
        command = fake_program(tmp_path / "vasp.py", body or f"{writes(reason)}print('running')\n")
        arguments = {"command": command, **settings.pop("arguments", {})}
        return get_labeler(
            LabelerSettings(calculator="vasp", arguments=arguments, **settings),
            tmp_path / "scratch",
        )

    make.writes = writes
    return make


def test_vasp_gets_the_papers_settings_and_its_results_are_those_of_the_input(vasp, tmp_path):
    with vasp() as labeler:
        (label,) = labeler.label([STRUCTURE])
    assert label.ok, label.reason
    assert label.energy == pytest.approx(-15.25)
    assert label.free_energy == pytest.approx(-15.30)
    assert label.forces[:, 0] == pytest.approx([0.1, -0.6, 0.2, 0.3])
    # VASP prints kbar, positive when compressed; ASE's stress has the other sign.
    assert label.stress == pytest.approx(
        -np.array([[100, 0, 0], [0, 200, 10], [0, 10, 300]]) * 0.1 * GPa
    )
    incar = (tmp_path / "scratch" / "slot0" / "INCAR").read_text()
    keys = dict(re.findall(r"^\s*(\w+)\s*=\s*(\S+)", incar, re.M))
    assert (
        float(keys["ENCUT"]) == 500 and keys["GGA"].upper() == "PE" and float(keys["SIGMA"]) == 0.05
    )
    assert int(keys["NSW"]) == 0 and int(keys["IBRION"]) == -1
    kpoints = (tmp_path / "scratch" / "slot0" / "KPOINTS").read_text().splitlines()
    assert kpoints[2].lower().startswith("g") and kpoints[3].split() == [
        "12",
        "12",
        "12",
    ]  # 1 / (3.0 * 0.03) = 11.1
    written = read(tmp_path / "scratch" / "slot0" / "POSCAR")
    assert sorted(written.get_chemical_symbols()) == sorted(STRUCTURE.get_chemical_symbols())


def test_vasp_without_electronic_convergence_is_a_failure(vasp):
    with vasp("unconverged") as labeler:
        (result,) = labeler.label([STRUCTURE])
    assert not result.ok and "SCF did not converge" in result.reason


@pytest.mark.parametrize(
    ("body", "words"),
    [("import sys; sys.exit(3)", "error: 3"), ("print('no output at all')", "OUTCAR")],
)
def test_vasp_that_dies_never_returns_the_results_of_the_structure_before(vasp, body, words):
    with vasp() as labeler:
        assert labeler.label([STRUCTURE])[0].ok
    with vasp(body=body) as labeler:
        (result,) = labeler.label([STRUCTURE])
    assert not result.ok and words in result.reason


def test_a_command_that_needs_a_shell_is_refused_before_anything_is_started(vasp, tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(
        InputError,
        match=r"learning\.labeler\.arguments\.command: .*only a shell understands '; touch",
    ):
        vasp(arguments={"command": f"{sys.executable} -c pass ; touch {marker}"})
    assert not marker.exists() and not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("through_the_environment", [False, True])
def test_a_command_with_quotes_and_redirections_works_whatever_bytes_vasp_prints(
    vasp, tmp_path, monkeypatch, through_the_environment
):
    body = (
        "import sys\nassert sys.argv[1:] == ['--map-by', 'socket; 2 > 1'], sys.argv\n"
        f"{vasp.writes()}for out in (sys.stderr.buffer, open('OUTCAR', 'ab')):\n"
        "    out.write(b'\\xfc\\n')\n"
    )
    program = fake_program(tmp_path / "vasp.py", body)
    command = f"{program} --map-by 'socket; 2 > 1' > vasp.log 2>&1"
    if through_the_environment:
        monkeypatch.setenv("ASE_VASP_COMMAND", command)
    given = {"command": None if through_the_environment else command}
    with vasp(body=body, arguments=given) as labeler:
        (label,) = labeler.label([STRUCTURE])
    assert label.ok, label.reason
    assert (tmp_path / "scratch/slot0/vasp.log").read_bytes() == b"\xfc\n"


def test_vasp_parallelisation_is_not_part_of_the_settings_hash(vasp):
    assert (
        vasp().settings_hash
        == vasp(arguments={"ncore": 4, "kpar": 2}).settings_hash
        != vasp(arguments={"encut": 600}).settings_hash
    )
    assert vasp().n_workers == 1


def test_vasp_without_pseudopotentials_says_which_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("VASP_PP_PATH", raising=False)
    monkeypatch.setenv("ASE_VASP_COMMAND", f"{sys.executable} -c pass")
    with pytest.raises(InputError, match="VASP_PP_PATH"):
        get_labeler(LabelerSettings(calculator="vasp"), tmp_path)


# ------------------------------------------------------------------ Quantum ESPRESSO

PWO = """
     Program PWSCF v.7.2 starts on 20Nov2025 at 10:00:00

     bravais-lattice index     =            0
     lattice parameter (alat)  =       5.6692  a.u.
     unit-cell volume          =     182.2100 (a.u.)^3
     number of atoms/cell      =            4
     number of atomic types    =            2
     celldm(1)=   5.669178  celldm(2)=   0.000000  celldm(3)=   0.000000

     crystal axes: (cart. coord. in units of alat)
               a(1) = (   1.000000   0.000000   0.000000 )
               a(2) = (   0.000000   1.000000   0.000000 )
               a(3) = (   0.000000   0.000000   1.000000 )

   Cartesian axes

     site n.     atom                  positions (alat units)
         1           H   tau(   1) = (   0.5000000   0.0000000   0.0333333  )
         2           S   tau(   2) = (   0.0000000   0.0000000   0.0000000  )
         3           H   tau(   3) = (   0.0000000   0.5000000   0.0000000  )
         4           H   tau(   4) = (   0.0000000   0.0000000   0.4666667  )

     number of k points=     1  Gaussian smearing, width (Ry)=  0.0100
                       cart. coord. in units 2pi/alat
        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000

     the Fermi energy is    10.0000 ev

!    total energy              =     -25.00000000 Ry
     total all-electron energy =     -800.0 Ry
     estimated scf accuracy    <          1.0E-09 Ry
     smearing contrib. (-TS)   =      -0.00400000 Ry
     internal energy E=F+TS    =     -24.99600000 Ry

     CONVERGENCE

     Forces acting on atoms (cartesian axes, Ry/au):

     atom    1 type  1   force =     0.01000000    0.00000000    0.00000000
     atom    2 type  2   force =    -0.06000000    0.00000000    0.00000000
     atom    3 type  1   force =     0.02000000    0.00000000    0.00000000
     atom    4 type  1   force =     0.03000000    0.00000000    0.00000000

     Total force =     0.070000     Total SCF correction =     0.000000

     Computing stress (Cartesian axis) and pressure

          total   stress  (Ry/bohr**3)                   (kbar)     P=     1000.00
   0.00500000   0.00000000   0.00000000          735.53        0.00        0.00
   0.00000000   0.00600000   0.00010000            0.00      882.63       14.71
   0.00000000   0.00010000   0.00700000            0.00       14.71     1029.74

   JOB DONE.
"""
ACHIEVED = "convergence has been achieved in   9 iterations"
UPF = {"H": "H.upf", "S": "S.upf"}


@pytest.fixture
def espresso(tmp_path):
    """A function (line about convergence) -> labeler whose pw.x is a small program."""

    for name in UPF.values():
        (tmp_path / name).touch()

    def make(line=ACHIEVED, exit_code=0, **arguments):
        output = PWO.replace("CONVERGENCE", line)
        command = fake_program(
            tmp_path / "pw.py", f"print({output!r})\nimport sys; sys.exit({exit_code})\n"
        )
        given = {
            "command": command,
            "pseudo_dir": str(tmp_path),
            "pseudopotentials": UPF,
            **arguments,
        }
        return get_labeler(
            LabelerSettings(calculator="espresso", arguments=given), tmp_path / "scratch"
        )

    return make


def test_espresso_energy_is_extrapolated_to_zero_smearing_whatever_bytes_pw_prints(
    espresso, tmp_path
):
    made, program = espresso(), tmp_path / "pw.py"
    noise = "import sys\nsys.stdout.buffer.write(b'     title \\xfc\\n')\nsys.stdout.flush()\n"
    program.write_text(noise + program.read_text())
    with made as labeler:
        (label,) = labeler.label([STRUCTURE])
    assert label.ok, label.reason
    assert label.free_energy == pytest.approx(-25.0 * Ry)
    # Gaussian smearing: E0 = (E + F) / 2, with E = F + TS = -24.996 Ry.
    assert label.energy == pytest.approx(-24.998 * Ry)
    assert label.forces[:, 0] == pytest.approx(
        np.array([0.01, -0.06, 0.02, 0.03]) * Ry / Bohr, rel=1e-5
    )
    stress = -np.array([[0.005, 0, 0], [0, 0.006, 0.0001], [0, 0.0001, 0.007]]) * Ry / Bohr**3
    assert label.stress == pytest.approx(stress, rel=1e-4, abs=1e-8)


def test_espresso_input_asks_for_forces_and_stress_of_a_single_point(espresso, tmp_path):
    with espresso(input_data={"ecutwfc": 80, "ecutrho": 640}) as labeler:
        labeler.label([STRUCTURE])
    text = (tmp_path / "scratch" / "slot0" / "espresso.pwi").read_text()
    keys = dict(re.findall(r"^\s*(\w+)\s*=\s*(\S+)", text, re.M))
    assert keys["calculation"] == "'scf'" and keys["tprnfor"] == keys["tstress"] == ".true."
    assert float(keys["ecutwfc"]) == 80 and keys["smearing"] == "'gaussian'"
    assert re.search(r"K_POINTS automatic\s+12 12 12\s+0 0 0", text)
    assert "H.upf" in text and "S.upf" in text


@pytest.mark.parametrize(
    ("line", "exit_code", "reason"),
    [
        ("convergence NOT achieved after 100 iterations: stopping", 0, "NOT achieved"),
        ("", 0, "did not finish"),
        (ACHIEVED, 2, ""),
    ],
)
def test_espresso_without_convergence_or_with_an_error_is_a_failure(
    espresso, line, exit_code, reason
):
    with espresso(line, exit_code) as labeler:
        (result,) = labeler.label([STRUCTURE])
    assert not result.ok and result.reason and reason in result.reason


def test_espresso_hash_holds_what_pw_gets_by_default(espresso):
    assert (
        espresso().settings_hash
        == espresso(input_data={"system": {"ecutwfc": 60, "ecutrho": 480}}).settings_hash
    )
    assert (
        espresso().settings_hash != espresso(input_data={"system": {"degauss": 0.02}}).settings_hash
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"command": "pw.x > out"},
            r"arguments\.command: 'pw\.x > out': redirects .* leave that out",
        ),
        ({"input_data": {"smearing": "lorentzian"}}, r"input_data.system.smearing: 'lorentzian'"),
    ],
)
def test_espresso_refuses_redirections_and_smearings_without_a_known_extrapolation(
    espresso, arguments, message
):
    with pytest.raises(InputError, match=message):
        espresso(**arguments)


def test_methfessel_paxton_extrapolates_by_a_third():
    output = "     smearing contrib. (-TS)   =      -0.00300000 Ry\n"
    assert zero_smearing_energy(-10.0, output, "mp") == pytest.approx(-10.0 + 0.001 * Ry)
    assert zero_smearing_energy(-10.0, output, "cold") == -10.0


# -------------------------------------------------------------- worker and adapter, in this process


def job(task, directory, code="ase.calculators.emt.EMT", **more):
    atoms = Atoms(
        "Cu4",
        scaled_positions=[[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
        cell=np.eye(3) * 3.7,
        pbc=True,
    )
    recipe = Recipe(code, {}, None, {})
    return {"task": task, "atoms": atoms, "recipe": recipe, "directory": str(directory), **more}


def test_worker_answers_with_plain_data(tmp_path):
    answer = run_job(job("label", tmp_path))
    assert (
        answer["ok"]
        and isinstance(answer["energy"], float)
        and len(answer["forces"]) == 4
        and answer["seconds"] > 0
    )


def test_worker_names_a_calculator_without_stress(tmp_path):
    answer = run_job(job("label", tmp_path, code="misbehaving.WithoutStress"))
    assert not answer["ok"] and "no stress" in answer["reason"]


def test_a_function_can_be_a_labeler():
    found = {"energy": -1.0, "forces": np.zeros((4, 3)), "stress": np.array([1.0, 2, 3, 4, 5, 6])}
    labeler = CallableLabeler(
        lambda structures: [found, "it did not converge", {**found, "energy": np.nan}],
        description="MAGUS",
        settings={"a": 1},
    )
    seen = []
    results = labeler.label([STRUCTURE] * 3, lambda index, result: seen.append(index))
    assert [result.ok for result in results] == [True, False, False] and seen == [0, 1, 2]
    assert results[0].stress[1, 2] == 4.0 and results[0].settings_hash == labeler.settings_hash
    assert results[1].reason == "it did not converge" and "NaN" in results[2].reason
    assert (
        labeler.settings_hash
        != CallableLabeler(len, description="MAGUS", settings={"a": 2}).settings_hash
    )
    with pytest.raises(LabelerError, match="2 structures given, 3 results"):
        labeler.label([STRUCTURE] * 2)
