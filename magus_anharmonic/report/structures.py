"""Structures of a report: found among all that a run stored, written as CIF, POSCAR and extxyz
beside the page, and drawn as balls and sticks (a scene for the viewer, a still picture for paper
and for browsers without WebGL)."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from html import escape
from itertools import islice, product
from pathlib import Path
from typing import Literal

import numpy as np
import spglib
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.io.files import TEMPORARY, readable, reading_table
from magus_anharmonic.io.tables import values
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.report.text import RankingView
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.sscha.record import SYMPREC
from magus_anharmonic.structures import HYDROGEN, space_group, spglib_cell, standardized, stripped
from magus_anharmonic.units import GPa

FILES = 100
"""Most structures of one ranking that are written: the paper's number of free energies."""
ALL = "structures.extxyz"
OWN = re.compile(r"[^.].*GPa-.*-(static|centroids)\.(cif|vasp)")
"""Names of the files that `write_structures` makes."""
TOLERANCES = (SYMPREC, 0.02, 0.01, 1e-3, 1e-4, 0.1, 0.2)
"""A, at which a structure is asked for the space group of its label, after the label's own."""

Kind = Literal["static", "centroids"]
WORDS: dict[Kind, str] = {"static": "static", "centroids": "SSCHA centroids"}


@dataclass(frozen=True)
class Crystal:
    """One structure of a ranking: as relaxed statically, or the SSCHA centroids."""

    line: Candidate
    pressure: GPa
    temperature: float
    kind: Kind
    space_group: str
    atoms: Atoms

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        what = f"{self.line.formula} {self.space_group}, {WORDS[self.kind]}, {self.pressure:g} GPa"
        return what + (f", {self.temperature:g} K" if self.kind == "centroids" else "")

    @property
    def stem(self) -> str:
        """File name without suffix, whatever the id holds."""
        rank = "" if self.line.rank_quantum is None else f"{self.line.rank_quantum:03d}-"
        heat = f"-{self.temperature:g}K" if self.kind == "centroids" else ""
        return f"{self.pressure:g}GPa{heat}-{rank}{safe_name(self.line.id)}-{self.kind}"

    @cached_property
    def conventional(self) -> Atoms | None:
        """The conventional cell in the space group of the label, at the tolerance at which the
        structure has it; None where it has it at none (noise leaves two, another file)."""
        own = (self.line.tolerance,) if self.kind == "centroids" else ()
        for symprec in (*own, *TOLERANCES):
            if space_group(self.atoms, symprec) == self.space_group:
                return standardized(self.atoms, symprec)
        return None


Lookup = Callable[[Candidate, GPa, Kind], Atoms | None]
"""The structure of a line of a ranking; None where the run has none."""


def _crystals(rankings: Iterable[RankingView], stored: Lookup) -> list[Crystal]:
    """Structures of the rankings' first lines, in the order of the rankings."""
    found = []
    for view in rankings:
        for line in view.lines[:FILES]:
            for kind in WORDS:
                atoms = stored(line, view.pressure, kind)
                if atoms is not None:
                    group = line.spg_static if kind == "static" else line.spg_quantum
                    where = view.pressure, view.temperature
                    group = group or space_group(atoms)
                    found.append(Crystal(line, *where, kind, group, stripped(atoms)))
    return found


def campaign_crystals(path: Path, rankings: list[RankingView]) -> list[Crystal]:
    """Structures of the rankings' first lines from ``structures.extxyz``.

    The file is read frame by frame, and only frames that are wanted become structures. Raises
    ``InputError``: not extxyz, or changed since it was written.
    """
    if not path.is_file():
        return []
    wanted = {(line.id, view.pressure) for view in rankings for line in view.lines[:FILES]}
    found: dict[tuple[str, float, str], Atoms] = {}
    for comment, text in _frames(path):
        key = (_info(comment, "id"), _float(_info(comment, "pressure_GPa")))
        kind = _info(comment, "kind") or "static"
        if key in wanted and (*key, kind) not in found:
            found[*key, kind] = _parsed(path, text)
    return _crystals(rankings, lambda line, pressure, kind: found.get((line.id, pressure, kind)))


def _frames(path: Path) -> Iterator[tuple[str, str]]:
    """(comment line, whole text) of every frame of an extxyz file, none of them parsed."""
    with (
        reading_table(path) as content,
        io.TextIOWrapper(content, encoding="utf-8", errors="replace") as file,
    ):
        number = 0
        for first in file:
            number += 1
            if not first.strip():
                continue
            try:
                natoms = int(first)
            except ValueError:
                raise InputError(
                    f"{path.name}: line {number}: {first.strip()[:40]!r} should be a number of"
                    " atoms (extxyz)"
                ) from None
            body = list(islice(file, natoms + 1))
            number += len(body)
            if len(body) < natoms + 1:
                return  # the last frame was cut short by a kill
            yield body[0], first + "".join(body)


def _info(comment: str, key: str) -> str:
    """The text of one key of an extxyz comment line, as written: ASE would read an id such as
    12345e678901 as a number."""
    match = re.search(rf'(?:^|\s){key}=(?:"((?:[^"\\]|\\.)*)"|(\S+))', comment)
    return "" if match is None else (match[1] or match[2] or "").replace('\\"', '"')


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _parsed(path: Path, text: str) -> Atoms:
    from ase.io import read

    with readable(path, "extxyz"):
        return read(io.StringIO(text), format="extxyz")


def search_crystals(
    anharmonic: Path, rankings: list[RankingView], starts: Callable[[], Mapping[str, Atoms]]
) -> list[Crystal]:
    """Structures of the rankings' first lines from what a search or ``rank`` leaves: the
    populations and ``quantum.traj``.

    ``starts`` : asked (see `stored_starts`) when these hold not all.
    """
    statics: dict[str, Atoms] = {}
    results = anharmonic.parent
    newest = sorted(results.glob("gen*.traj"), key=_generation, reverse=True)[:1]
    for path in [results / "good.traj", *newest]:
        for atoms in _traj(path):
            statics.setdefault(str(atoms.info.get("candidate_id", "")), atoms)
    moving = _traj(SearchFolder(anharmonic).quantum)
    centroids = {str(atoms.info.get("sscha_folder", "")): atoms for atoms in moving}
    if any(line.id not in statics for view in rankings for line in view.lines[:FILES]):
        statics = {**starts(), **statics}

    def stored(line: Candidate, pressure: GPa, kind: Kind) -> Atoms | None:
        return statics.get(line.id) if kind == "static" else centroids.get(line.sscha_folder)

    return _crystals(rankings, stored)


def _generation(path: Path) -> int:
    digits = re.sub(r"\D", "", path.stem)
    return int(digits) if digits else 0


def _traj(path: Path) -> list[Atoms]:
    from ase.io import iread

    if not path.is_file():
        return []
    with readable(path, "a trajectory"):
        return list(iread(path, index=":", format="traj"))


def stored_starts(anharmonic: Path) -> dict[str, Atoms]:
    """Structures of the database by their ids; raises ``MagusAnharmonicError`` when it cannot be
    read now."""
    from magus_anharmonic.ranking.store import read_records

    path = SearchFolder(anharmonic).free_energies
    records = read_records(path) if path.is_file() else []
    return {record.structure: record.start for record in records}


def write_structures(folder: Path, crystals: Iterable[Crystal]) -> int:
    """``NAME.cif`` (see `cif`) and ``NAME.vasp`` (a POSCAR) for each and all of them, with the
    numbers of the ranking, in ``structures.extxyz``; returns how many.

    Files of an earlier report that this one does not write are removed, others in ``folder`` are
    left alone. Each file is whole or absent; none is flushed to disk by itself, since all can be
    made again.
    """
    from ase.io import write

    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-", suffix=TEMPORARY) as making:
        for crystal in crystals:
            stem = Path(making) / crystal.stem
            stem.with_name(f"{stem.name}.cif").write_text(cif(crystal), encoding="utf-8")
            poscar = stem.with_name(f"{stem.name}.vasp")
            write(poscar, crystal.atoms, format="vasp", direct=True, sort=True)
            frames.append(_frame(crystal))
        if frames:
            write(Path(making) / ALL, frames, format="extxyz")
        new = sorted(Path(making).iterdir())
        for path in new:
            path.replace(folder / path.name)
    names = {path.name for path in new}
    for path in folder.iterdir():
        if path.name not in names and (path.name == ALL or OWN.fullmatch(path.name)):
            path.unlink()
    return len(frames)


def _frame(crystal: Crystal) -> Atoms:
    """The structure with everything that the ranking's table says about it in its ``info``."""
    frame = crystal.atoms.copy()
    known = values(crystal.line).items()
    frame.info = {name: value for name, value in known if value not in (None, "")}
    frame.info |= {"space_group": crystal.space_group, "kind": crystal.kind, "file": crystal.stem}
    frame.info["pressure_GPa"] = crystal.pressure
    return frame


def cif(crystal: Crystal) -> str:
    """The conventional cell in the space group of the label: its operations, and one atom of each
    orbit; the cell as it is, in P1, where the structure does not have that group."""
    atoms, group = crystal.conventional, crystal.space_group
    operations, chosen, counts = ["x, y, z"], range(len(crystal.atoms)), np.ones(len(crystal.atoms))
    if atoms is None:
        atoms, group = crystal.atoms, "P1 (1)"
    else:
        found = spglib.get_symmetry_dataset(spglib_cell(atoms), symprec=1e-3)
        parts = zip(found.rotations, found.translations, strict=True)
        operations = [_operation(rotation, shift) for rotation, shift in parts]
        _, chosen, counts = np.unique(found.equivalent_atoms, return_index=True, return_counts=True)
    symbol, number = group.rstrip(")").split(" (")
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    lines = [
        f"# {crystal.label}",
        f"data_{crystal.stem}",
        f"_chemical_formula_sum '{atoms.get_chemical_formula()}'",
        *(f"_cell_{name} {x:.8f}" for name, x in zip(names, atoms.cell.cellpar(), strict=True)),
        f"_space_group_name_H-M_alt '{symbol}'",
        f"_space_group_IT_number {number}",
        "loop_",
        "_space_group_symop_operation_xyz",
        *(f"'{operation}'" for operation in operations),
        "loop_",
        *(f"_atom_site_{name}" for name in ("type_symbol", "label", "symmetry_multiplicity")),
        *(f"_atom_site_fract_{axis}" for axis in "xyz"),
        "_atom_site_occupancy",
    ]
    scaled, masses = atoms.get_scaled_positions(), atoms.get_masses()
    for serial, (index, count) in enumerate(zip(chosen, counts, strict=True), start=1):
        element = atoms.symbols[index]
        for name, mass in HYDROGEN.items() if element == "H" else ():
            element = name if abs(masses[index] - mass) < 0.02 else element
        where = " ".join(f"{value:.10f}" for value in scaled[index])
        lines.append(f"{element} {element}{serial} {count:.0f} {where} 1")
    return "\n".join(lines) + "\n"


def _operation(rotation: np.ndarray, translation: np.ndarray) -> str:
    """``"-x+1/2, y, z"``."""
    parts = []
    for row, shift in zip(rotation.tolist(), translation, strict=True):
        axes = "".join("+-"[k < 0] + axis for k, axis in zip(row, "xyz", strict=True) if k)
        fraction = Fraction(float(shift)).limit_denominator(24) % 1
        parts.append(axes.lstrip("+") + (f"+{fraction}" if fraction else ""))
    return ", ".join(parts)


# --- pictures -------------------------------------------------------------------------------------

MAX_ATOMS = 64
"""Cells above this size are drawn as they are given, not as conventional cells."""
MAX_BALLS = 600
BOND_FACTOR = 1.2
"""Two atoms are joined within this factor times the sum of their covalent radii (Cordero et al.,
doi:10.1039/b801115j)."""
EDGES = [(i, j) for i, j in product(range(8), repeat=2) if i < j and (i ^ j) in (1, 2, 4)]


@dataclass(frozen=True)
class Scene:
    """What is drawn; positions in Angstrom around the middle of the cell.

    ``numbers`` (n,), ``positions`` (n, 3): the atoms with their images on the faces; ``bonds``:
    pairs of indices; ``corners`` (8, 3): of the cell, in the order of the three bits of the index;
    ``conventional``: not the cell that was given.
    """

    numbers: np.ndarray
    positions: np.ndarray
    bonds: list[tuple[int, int]]
    corners: np.ndarray
    conventional: bool


def scene(crystal: Crystal) -> Scene:
    """The conventional cell (unless larger than `MAX_ATOMS`) with everything that lies on its
    faces, and bonds within it."""
    found = crystal.conventional
    shown = crystal.atoms if found is None or len(found) > MAX_ATOMS else found
    scaled = shown.get_scaled_positions() % 1.0
    scaled[scaled > 1 - 1e-3] -= 1.0
    shifts = np.array(list(product((0, 1), repeat=3)))
    images = scaled[:, None] + shifts
    atom, image = np.nonzero((images < 1 + 1e-3).all(axis=-1))
    atom, image = atom[:MAX_BALLS], image[:MAX_BALLS]
    cell, numbers = shown.cell.array, shown.numbers[atom]
    positions = (images[atom, image] - 0.5) @ cell
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    near = (distances < BOND_FACTOR * (radii[:, None] + radii[None])) & (distances > 0.1)
    bonds = [(int(i), int(j)) for i, j in np.argwhere(np.triu(near, 1))]
    corners = (shifts[:, ::-1] - 0.5) @ cell
    return Scene(numbers, positions, bonds, corners, len(shown) != len(crystal.atoms))


def color(number: int) -> str:
    """Jmol's colour of an element, ``#rrggbb``; pure white (hydrogen) a little darker, to be seen
    on white paper."""
    red, green, blue = (int(round(255 * min(value, 0.94))) for value in jmol_colors[number])
    return f"#{red:02x}{green:02x}{blue:02x}"


def radius(number: int) -> float:
    """Radius of a ball in Angstrom: far less than the atom, so that the bonds are seen."""
    return float(0.16 + 0.16 * covalent_radii[number])


def as_json(drawn: Scene) -> dict[str, object]:
    """The scene for the viewer, coordinates with two digits."""
    kinds = np.unique(drawn.numbers).tolist()
    atoms = zip(drawn.numbers.tolist(), drawn.positions.round(2).tolist(), strict=True)
    return {
        "kinds": [
            {"symbol": chemical_symbols[n], "color": color(n), "radius": round(radius(n), 3)}
            for n in kinds
        ],
        "atoms": [[kinds.index(number), *position] for number, position in atoms],
        "bonds": [list(bond) for bond in drawn.bonds],
        "corners": drawn.corners.round(2).tolist(),
    }


def still(drawn: Scene, label: str, size: int = 240) -> str:
    """The scene as an SVG of ``size`` x ``size`` pixels seen from the front, a little above and
    from the side; ``label`` is its name."""
    view = _view(np.radians(-72.0), np.radians(-18.0))
    points, corners = drawn.positions @ view.T, drawn.corners @ view.T
    everything = np.vstack([points, corners])[:, :2]
    scale = 0.86 * size / max(*np.ptp(everything, axis=0), 1e-9)
    middle = (everything.max(axis=0) + everything.min(axis=0)) / 2

    def at(point: np.ndarray) -> tuple[float, float]:
        x, y = scale * (point[:2] - middle)
        return round(size / 2 + float(x), 1), round(size / 2 - float(y), 1)

    shapes = []
    lines = [("cell", corners[i], corners[j]) for i, j in EDGES]
    for name, first, last in lines + [("bond", points[i], points[j]) for i, j in drawn.bonds]:
        (x1, y1), (x2, y2) = at(first), at(last)
        line = f'<line class="{name}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'
        shapes.append(((first[2] + last[2]) / 2, line))
    for number, point in zip(drawn.numbers.tolist(), points, strict=True):
        (x, y), r = at(point), scale * radius(number)
        ball = f'<circle cx="{x}" cy="{y}" r="{r:.1f}" fill="{color(number)}"/>'
        shapes.append((point[2], ball))
    body = "".join(text for _, text in sorted(shapes, key=lambda shape: shape[0]))
    name = escape(label)
    return (
        f'<svg class="still" viewBox="0 0 {size} {size}" role="img"'
        f' aria-label="{name}"><title>{name}</title>{body}</svg>'
    )


def _view(x: float, z: float) -> np.ndarray:
    """Turn about z, then x (radians); the viewer looks along -z."""
    cx, sx, cz, sz = np.cos(x), np.sin(x), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return about_x @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
