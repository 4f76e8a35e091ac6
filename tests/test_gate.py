"""The gate: structures that are not what they seem are refused by name, in every command, before
any work."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from refusals import refused
from typer.testing import CliRunner

from magus_anharmonic import free_energy
from magus_anharmonic.cli import app
from magus_anharmonic.errors import InputError
from magus_anharmonic.gate import check_structure, check_structures, read_sources, read_structures
from magus_anharmonic.learning.dataset import read_labels
from magus_anharmonic.ranking.structures import rank_structures
from magus_anharmonic.search.archive import Archive
from magus_anharmonic.settings import parse_settings
from magus_anharmonic.structures import as_pymatgen, primitive, space_group, structure_id

CELL = """data_a
_cell_length_a 3.0
_cell_length_b 3.0
_cell_length_c 3.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M 'P 1'
loop_
_symmetry_equiv_pos_as_xyz
'x,y,z'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
"""
DUMP = """ITEM: TIMESTEP
0
ITEM: NUMBER OF ATOMS
2
ITEM: BOX BOUNDS pp pp pp
0.0 3.0
0.0 3.0
0.0 3.0
ITEM: ATOMS id type {column}x y z
1 1 {first}0.0 0.0 0.0
2 2 {second}1.5 1.5 1.5
"""


def copper(**changes):
    atoms = bulk("Cu", cubic=True)
    atoms.info["name"] = "run007"
    for name, value in changes.items():
        getattr(atoms, f"set_{name}")(value)
    return atoms


def broken(how):
    atoms = copper()
    if how == "position":
        atoms.positions[2, 1] = np.nan
    elif how == "cell":
        atoms.cell[1, 1] = np.inf
    elif how == "ghost":
        atoms.numbers[1] = 0
    elif how == "beyond":
        atoms.numbers[1] = 200
    elif how == "column":
        atoms.set_array("occupancy", np.array([1.0, 1.0, 0.5, 1.0]))
    elif how == "mixed":
        atoms.info["occupancy"] = {"0": {"Cu": 0.6, "Au": 0.4}}
    elif how == "mass 0":
        atoms.set_masses([0.0, 63.5, 63.5, 63.5])
    elif how == "mass":
        atoms.set_masses([1.0, 63.5, 63.5, 63.5])
    elif how == "slab":
        atoms.pbc = (True, True, False)
    elif how == "flat":
        atoms.cell[2] = 0.0
    elif how == "twice":
        atoms += Atoms("Cu", positions=[[0.0, 0.0, 0.3]])
    elif how == "image":
        atoms.positions[1] = atoms.positions[0] + atoms.cell[2] + [0.1, 0.0, 0.0]
    elif how == "nm":
        atoms.set_cell(atoms.cell.array / 10.0, scale_atoms=True)
    return atoms


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("position", ["not finite", "atom 2"]),
        ("cell", ["cell", "not finite"]),
        ("ghost", ["no known element", "atom 1"]),
        ("beyond", ["no known element", "atom 1"]),
        ("column", ["occupanc", "atom 2"]),
        ("mixed", ["occupanc", "Au 0.4"]),
        ("mass 0", ["mass", "atom 0", "63.5"]),
        ("mass", ["mass", "1 amu"]),
        ("slab", ["periodic"]),
        ("flat", ["no cell"]),
        ("twice", ["on top of one another", "Cu 0", "Cu 4"]),
        ("image", ["on top of one another"]),
        ("nm", ["A^3/atom"]),
    ],
)
def test_what_cannot_be_is_refused_by_name_in_files_and_in_python(how, words, tmp_path):
    for call in (
        check_structure,
        lambda atoms: free_energy(atoms, EMT()),
        lambda atoms: rank(atoms, tmp_path),
    ):
        with refused("run007", *words):
            call(broken(how))
    assert not list(tmp_path.iterdir()), "nothing was begun"


def rank(atoms, folder):
    rank_structures([bulk("Cu"), atoms], EMT(), parse_settings({"pressure": 0.0}), folder / "out")


def test_every_structure_of_a_file_that_will_not_do_is_named_at_once():
    with pytest.raises(InputError) as error:
        check_structures([copper(), broken("position"), copper(), broken("ghost")], "file: ")
    assert [problem.split(" ")[2] for problem in error.value.problems] == ["1", "3"]


def test_crystals_of_all_densities_pass():
    hydrogen = Atoms("H2", positions=[[0, 0, 0], [0.74, 0, 0]], cell=[1.6, 1.2, 1.2], pbc=True)
    deuterium = bulk("H", "bcc", a=1.5)
    deuterium.set_masses([2.014])
    skewed = bulk("Cu").copy()
    skewed.set_cell([skewed.cell[0], skewed.cell[1] + 9 * skewed.cell[0], skewed.cell[2]])
    for atoms in (hydrogen, deuterium, skewed, bulk("Cs", "bcc", a=6.1), bulk("Cu", a=2.5)):
        check_structure(atoms)


@pytest.mark.parametrize(
    ("sites", "words"),
    [
        ("S1 S 0 0 0 0.6\nSe1 Se 0 0 0 0.4\nH1 H 0.5 0 0 1", ["S 0.6", "Se 0.4"]),
        ("S1 S 0 0 0 1\nH1 H 0.45 0.5 0 0.5\nH2 H 0.55 0.5 0 0.5", ["H 0.5"]),
        ("S1 S 0 0 0 1\nH1 H 0.5 0.5 0 1", []),
    ],
)
def test_partial_occupancies_are_not_taken_as_full(sites, words, tmp_path):
    (tmp_path / "a.cif").write_text(CELL + sites + "\n")
    if not words:
        assert len(read_structures(tmp_path / "a.cif")[0]) == 2
        return
    with refused("a.cif", "occupanc", *words):
        read_structures(tmp_path / "a.cif")


@pytest.mark.parametrize("unknown", ["?", ".", "'?'"])
def test_an_occupancy_that_cif_leaves_open_is_full(unknown, tmp_path):
    """``?`` is unknown and ``.`` the default, which is 1; both were refused as partial."""
    (tmp_path / "a.cif").write_text(f"{CELL}S1 S 0 0 0 {unknown}\nH1 H 0.5 0.5 0 1\n")
    assert read_structures(tmp_path / "a.cif")[0].get_chemical_formula() == "HS"
    (tmp_path / "b.cif").write_text(f"{CELL}S1 S 0 0 0 {unknown}\nH1 H 0.5 0.5 0 0.5\n")
    with pytest.raises(InputError, match=r"partial occupancies \(H 0.5\)"):
        read_structures(tmp_path / "b.cif")


ISOTOPES = {
    "a.xyz": '2\nLattice="3 0 0 0 3 0 0 0 3" Properties=species:S:1:pos:R:3\nS 0 0 0\nD 1.5 1.5 1.5\n',
    "POSCAR": "x\n1.0\n3 0 0\n0 3 0\n0 0 3\nS D\n1 1\nDirect\n0 0 0\n.5 .5 .5\n",
    "geometry.in": "lattice_vector 3 0 0\nlattice_vector 0 3 0\nlattice_vector 0 0 3\natom 0 0 0 S\natom 1.5 1.5 1.5 D\n",
    "a.dump": DUMP.format(column="element ", first="S ", second="D "),
    "a.pwi": "&system\n ibrav=0, nat=2, ntyp=2\n/\nATOMIC_SPECIES\nS 32 S.upf\nD 2 H.upf\nCELL_PARAMETERS angstrom\n3 0 0\n0 3 0\n"
    "0 0 3\nATOMIC_POSITIONS crystal\nS 0 0 0\nD .5 .5 .5\n",
}


@pytest.mark.parametrize("name", ISOTOPES)
@pytest.mark.parametrize(("symbol", "mass"), [("D", "2.014"), ("T", "3.016")])
def test_deuterium_is_said_to_be_hydrogen_of_another_mass(
    name, symbol, mass, tmp_path, monkeypatch
):
    """ASE knows D in CIF alone; elsewhere the user read ``KeyError: 'D'``."""
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(
        ISOTOPES[name]
        .replace("D ", f"{symbol} ")
        .replace("S D", f"S {symbol}")
        .replace(" D\n", f" {symbol}\n")
    )
    readers = [lambda: read_structures(name, format="espresso-in" if name == "a.pwi" else None)]
    if name == "a.xyz":
        readers.append(lambda: read_labels(name))
    if name == "POSCAR":
        Path("Seeds").mkdir()
        Path("Seeds/POSCARS_1").write_text(
            Path(name).read_text().replace("Direct", "Direct configuration= 1")
        )
        readers.append(lambda: Archive(tmp_path).read_seeds(1))
    for read in readers:
        with pytest.raises(
            InputError, match=rf"{symbol} is no element but hydrogen of {mass} amu: write H"
        ):
            read()


def test_atoms_of_two_elements_in_one_place_are_not_one_of_them(tmp_path):
    """ASE leaves out the second with a warning; one that the symmetry makes anyway is left out
    rightly."""
    columns = CELL.replace("_atom_site_occupancy\n", "")
    (tmp_path / "a.cif").write_text(columns + "S1 S 0 0 0\nSe1 Se 0 0 0\nH1 H 0.5 0 0\n")
    with pytest.raises(InputError, match=r"a\.cif: S and Se are in one place"):
        read_structures(tmp_path / "a.cif")
    (tmp_path / "b.cif").write_text(columns + "S1 S 0 0 0\nS2 S 1 0 0\nH1 H 0.5 0 0\n")
    with pytest.warns(UserWarning, match="are equivalent"):
        assert len(read_structures(tmp_path / "b.cif")[0]) == 2


@pytest.mark.parametrize("column", ["occ", "Occupancy", "site_occupancy", "mass", "isotope_masses"])
def test_columns_that_ase_does_not_read_are_not_passed_over(column, tmp_path):
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    atoms.set_array(column, np.array([1.0, 0.5]))
    write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.raises(
        InputError, match="occupanc" if "occ" in column.lower() else "not read: call it masses"
    ):
        read_structures(tmp_path / "a.xyz", format="extxyz")
    atoms.set_array(column, atoms.get_masses() if "mass" in column else np.ones(2))
    check_structure(atoms)


@pytest.mark.parametrize("length", [1e9, 1e160, 1e200])
def test_a_cell_or_a_coordinate_of_another_world_is_refused_at_once(length):
    """The fault: the search for neighbours never came back, or raised an error of its own."""
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.positions[3, 0] = length
    cell = np.diag([length, 5.6, 5.6])
    for wrong in (
        atoms,
        Atoms("Na", cell=cell, pbc=True),
        Atoms("Na", cell=cell @ [[1, 0, 0], [0, 1, 0], [1, 0, 1]], pbc=True),
    ):
        with pytest.raises(InputError, match="beyond 100000 A"):
            check_structure(wrong)


def test_a_name_may_be_anything():
    atoms = bulk("Cu")
    atoms.positions[0] = np.nan
    atoms.info["name"] = np.array([1, 2])
    with pytest.raises(InputError, match=r"\[1 2\], Cu\) has coordinates"):
        check_structure(atoms)


def test_types_are_no_elements(tmp_path):
    (tmp_path / "types.dump").write_text(DUMP.format(column="", first="", second=""))
    with pytest.raises(InputError, match=r"types\.dump .*which elements"):
        read_structures(tmp_path / "types.dump")
    (tmp_path / "elements.dump").write_text(DUMP.format(column="element ", first="S ", second="H "))
    assert read_structures(tmp_path / "elements.dump")[0].get_chemical_formula() == "HS"
    data = (
        "LAMMPS data\n\n2 atoms\n2 atom types\n0 3 xlo xhi\n0 3 ylo yhi\n0 3 zlo zhi\n{}\nAtoms #"
        " atomic\n\n1 1 0 0 0\n2 2 1.5 1.5 1.5\n"
    )
    (tmp_path / "types.data").write_text(data.format(""))
    with pytest.raises(InputError, match="Masses"):
        read_structures(tmp_path / "types.data", format="lammps-data")
    (tmp_path / "masses.data").write_text(data.format("\nMasses\n\n1 32.06\n2 1.008\n"))
    assert (
        read_structures(tmp_path / "masses.data", format="lammps-data")[0].get_chemical_formula()
        == "HS"
    )


def labelled(atoms):
    atoms.calc = SinglePointCalculator(
        atoms, energy=0.0, forces=np.zeros((len(atoms), 3)), stress=np.zeros(6)
    )
    return atoms


@pytest.mark.parametrize("how", ["position", "column"])
@pytest.mark.parametrize(
    "command",
    [
        ("rank", "FILE", "--pressure", "1", "-o", "out"),
        ("hessian", "FILE", "--checkpoint", "CHECKPOINT", "-o", "out"),
        ("phase-diagram", "FILE", "--pressure", "1", "--checkpoint", "CHECKPOINT", "-o", "out"),
        (
            "errors",
            "FILE",
            "--pressure",
            "1",
            "--checkpoint",
            "CHECKPOINT",
            "--reference",
            "labeler.yaml",
            "-o",
            "out",
        ),
        ("train", "FILE", "--checkpoint", "CHECKPOINT", "-o", "out/new.pth"),
    ],
    ids=lambda command: command[0] if isinstance(command, tuple) else command,
)
def test_every_command_refuses_them(command, how, tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.chdir(tmp_path)
    write("bad.xyz", labelled(broken(how)), format="extxyz")
    Path("labeler.yaml").write_text("labeler: {calculator: ase.calculators.emt.EMT}\n")
    arguments = [
        {"FILE": "bad.xyz", "CHECKPOINT": str(tiny_checkpoint)}.get(word, word) for word in command
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert (
        "bad.xyz" in result.output
        and "run007" in result.output
        and "Traceback" not in result.output
    )
    assert "not finite" in result.output or "occupanc" in result.output


def test_a_coordinate_that_is_not_finite_does_not_reach_spglib():
    atoms = broken("position")
    assert space_group(atoms) == "P1 (1)", "spglib would end the process"
    assert len(primitive(atoms)) == len(atoms)


# --- what a user brings ------------------------------------------------------------------------


def test_files_folders_ranges_patterns_and_databases_are_read_in_order_and_named(tmp_path):
    from ase.db import connect

    for name, a in (("a", 3.6), ("b", 3.7)):
        write(tmp_path / f"{name}.vasp", bulk("Cu", "fcc", a=a))
    (tmp_path / "README").write_text("not a structure\n")
    write(tmp_path / "all.extxyz", [bulk("Cu", "fcc", a=3.5 + 0.1 * i) for i in range(4)])
    with connect(tmp_path / "found.db", append=False) as base:
        for a in (3.5, 3.6, 3.7):
            base.write(bulk("Cu", "fcc", a=a), a=a)

    def names(*sources):
        found = read_sources([str(tmp_path / source) for source in sources])
        return [Path(atoms.info["name"]).name for atoms in found]

    assert names("b.vasp", "a.vasp") == ["b.vasp", "a.vasp"]
    assert names("*.vasp") == ["a.vasp", "b.vasp"]
    assert names("all.extxyz@1:3") == ["all.extxyz@1", "all.extxyz@2"]
    assert names("all.extxyz@-1") == ["all.extxyz@3"]
    assert names("all.extxyz@::2") == ["all.extxyz@0", "all.extxyz@2"]
    assert names("found.db@a>3.55") == ["found.db@id=2", "found.db@id=3"]
    assert names("found.db@-1", "found.db@:1") == ["found.db@id=3", "found.db@id=1"], "as in ASE"
    assert names("a.vasp", "*.vasp", "a.vasp@0") == ["a.vasp", "b.vasp"], "once each"
    (tmp_path / "found.db").unlink()
    for name in ("keys.yaml", "a.png", "job.log", "notes.md", "results.json", "relax.py"):
        (tmp_path / name).write_text("pressure: 1\n")
    assert names("") == ["a.vasp", *(f"all.extxyz@{i}" for i in range(4)), "b.vasp"]


def test_what_pymatgen_wrote_is_read_without_it(tmp_path):
    """One structure, a list, a mapping, entries; D and oxidation states; shared sites are refused."""
    cell = bulk("NaCl", "rocksalt", a=5.6)
    hydride = Atoms(
        "LiH",
        scaled_positions=[[0, 0, 0], [0.5] * 3],
        cell=bulk("LiH", "rocksalt", a=4.1).cell,
        pbc=True,
    )
    hydride.set_masses([6.94, 2.014])
    one, other = as_pymatgen(cell), as_pymatgen(hydride)
    one["sites"][0]["species"] = [{"element": "Na", "oxidation_state": 1, "occu": 1}]
    one["properties"] = {"id": "mp-22862"}
    entry = {"@class": "ComputedStructureEntry", "energy": -3.0, "structure": other}
    for name, data in (("one", one), ("many", [one, entry]), ("named", {"a": one, "b": other})):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    found = read_sources([tmp_path / f"{name}.json" for name in ("one", "many", "named")])
    assert [atoms.get_chemical_formula() for atoms in found] == ["ClNa", *2 * ["ClNa", "HLi"]]
    assert found[0].info["id"] == "mp-22862" and found[1].info["name"].endswith("many.json@0")
    assert structure_id(found[0]) == structure_id(cell)
    assert structure_id(found[2]) == structure_id(hydride), "deuterium"
    one["sites"][0]["species"] = [{"element": "Na", "occu": 0.5}, {"element": "K", "occu": 0.5}]
    (tmp_path / "shared.json").write_text(json.dumps(one))
    with pytest.raises(InputError, match="partial occupancies"):
        read_sources([tmp_path / "shared.json"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("zero.extxyz", "Empty file"),
        ("half.json", "not readable"),
        ("absent.vasp", "no such file"),
        ("*.cif", "matches no file"),
        ("empty", "no file of a format that ASE knows"),
        ("a.vasp@first", "must be a number or a range"),
        ("a.vasp@5", "the file holds 1"),
        ("a.vasp@0:1:0", "must be a number or a range"),
        ("damaged", "a.cif.gz: damaged"),
    ],
)
def test_a_source_that_gives_nothing_is_named_beside_all_others_that_do_not(tmp_path, source, said):
    write(tmp_path / "a.vasp", bulk("Cu", "fcc", a=3.6))
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.extxyz").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.cif.gz").write_text("not packed")
    (tmp_path / "half.json").write_text('{"@class": "Structure", "sites": [')
    with pytest.raises(InputError) as caught:
        read_sources([tmp_path / source, tmp_path / "a.vasp", tmp_path / "gone.cif"])
    first, second = caught.value.problems
    assert said in first and "gone.cif" in second
