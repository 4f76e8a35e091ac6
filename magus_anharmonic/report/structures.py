"""Structures of the report: files and pictures.

A crystal as balls and sticks: the scene that the viewer turns, and the still picture for paper and
for browsers without WebGL.

The structures of a report: found among all that a run stored, and written as CIF, POSCAR and extxyz
beside the page.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import islice, product
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.io.files import TEMPORARY, readable, reading_table
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.report.text import RankingView
from magus_anharmonic.structures import space_group, standardized, stripped
from magus_anharmonic.units import GPa

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
    pairs of indices;
    ``corners`` (8, 3): of the cell, in the order of the three bits of the index; ``conventional``:
        not the cell that was given.
    """

    numbers: np.ndarray
    positions: np.ndarray
    bonds: list[tuple[int, int]]
    corners: np.ndarray
    conventional: bool


def scene(atoms: Atoms, symprec: float = 0.05) -> Scene:
    """The conventional cell (unless larger than `MAX_ATOMS`) with everything that lies on its
    faces, and bonds within it."""
    shown = _conventional(atoms, symprec)
    conventional = shown is not None
    shown = shown if shown is not None else atoms
    cell = shown.cell.array
    scaled = shown.get_scaled_positions() % 1.0
    scaled[scaled > 1 - 1e-3] -= 1.0
    numbers, points = [], []
    for number, point in zip(shown.numbers, scaled, strict=True):
        for shift in product((0, 1), repeat=3):
            image = point + shift
            if (image < 1 + 1e-3).all():
                numbers.append(number)
                points.append(image)
    positions = (np.array(points[:MAX_BALLS]) - 0.5) @ cell
    kinds = np.array(numbers[:MAX_BALLS])
    corners = (
        np.array([[(index >> bit) & 1 for bit in range(3)] for index in range(8)]) - 0.5
    ) @ cell
    return Scene(
        kinds,
        positions,
        _bonds(kinds, positions),
        corners,
        conventional and len(shown) != len(atoms),
    )


def _conventional(atoms: Atoms, symprec: float) -> Atoms | None:
    found = standardized(atoms, symprec)
    return None if found is None or len(found) > MAX_ATOMS else found


def _bonds(numbers: np.ndarray, positions: np.ndarray) -> list[tuple[int, int]]:
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    near = (distances < BOND_FACTOR * (radii[:, None] + radii[None])) & (distances > 0.1)
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(near, 1))]


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
    kinds = sorted({int(number) for number in drawn.numbers})
    return {
        "kinds": [
            {
                "symbol": chemical_symbols[number],
                "color": color(number),
                "radius": round(radius(number), 3),
            }
            for number in kinds
        ],
        "atoms": [
            [kinds.index(int(number)), *(round(float(value), 2) for value in position)]
            for number, position in zip(drawn.numbers, drawn.positions, strict=True)
        ],
        "bonds": [list(bond) for bond in drawn.bonds],
        "corners": [[round(float(value), 2) for value in corner] for corner in drawn.corners],
    }


def still(drawn: Scene, label: str, size: int = 240) -> str:
    """The scene as an SVG of ``size`` x ``size`` pixels seen from the front, a little above and
    from the side; ``label`` is its name."""
    view = _rotation(np.radians(-72.0), np.radians(0.0), np.radians(-18.0))
    points, corners = drawn.positions @ view.T, drawn.corners @ view.T
    everything = np.vstack([points, corners])
    scale = 0.86 * size / max(np.ptp(everything[:, 0]), np.ptp(everything[:, 1]), 1e-9)
    middle = (everything.max(axis=0) + everything.min(axis=0)) / 2

    def at(point: np.ndarray) -> tuple[float, float]:
        x, y = scale * (point[:2] - middle[:2])
        return round(size / 2 + float(x), 1), round(size / 2 - float(y), 1)

    shapes = []
    for i, j in EDGES:
        (x1, y1), (x2, y2) = at(corners[i]), at(corners[j])
        depth = (corners[i][2] + corners[j][2]) / 2
        shapes.append((depth, f'<line class="cell" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'))
    for i, j in drawn.bonds:
        (x1, y1), (x2, y2) = at(points[i]), at(points[j])
        shapes.append(
            (
                (points[i][2] + points[j][2]) / 2,
                f'<line class="bond" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>',
            )
        )
    for number, point in zip(drawn.numbers, points, strict=True):
        x, y = at(point)
        shapes.append(
            (
                point[2],
                (
                    f'<circle cx="{x}" cy="{y}" r="{scale * radius(int(number)):.1f}"'
                    f' fill="{color(int(number))}"/>'
                ),
            )
        )
    body = "".join(text for _, text in sorted(shapes, key=lambda shape: shape[0]))
    name = escape(label)
    return (
        f'<svg class="still" viewBox="0 0 {size} {size}" role="img"'
        f' aria-label="{name}"><title>{name}</title>{body}</svg>'
    )


def _rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn about z, then y, then x (radians); the viewer looks along -z."""
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


Kind = Literal["static", "centroids"]

FILES = 100
"""Most structures of one ranking that are written: the paper's number of free energies."""

ALL = "structures.extxyz"
OWN = re.compile(r"[^.].*GPa-.*-(static|centroids)\.(cif|vasp)")
"""Names of the files that `write_structures` makes."""

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


def campaign_crystals(path: Path, rankings: Iterable[RankingView]) -> list[Crystal]:
    """Structures of the rankings' first lines from ``structures.extxyz``, in the order of the
    rankings.

    The file is read frame by frame, and only frames that are wanted become structures. Raises
    ``InputError``: not extxyz, or changed since it was written.
    """
    if not path.is_file():
        return []
    wanted = {(line.id, ranking.pressure) for ranking in rankings for line in ranking.lines[:FILES]}
    found: dict[tuple[str, float, str], Atoms] = {}
    for comment, text in _frames(path):
        key = (_info(comment, "id"), _float(_info(comment, "pressure_GPa")))
        kind = _info(comment, "kind") or "static"
        if key in wanted and (*key, kind) not in found:
            found[*key, kind] = _parsed(path, text)
    return _in_order(found, rankings)


def _in_order(
    found: dict[tuple[str, float, str], Atoms], rankings: Iterable[RankingView]
) -> list[Crystal]:
    crystals = []
    for ranking in rankings:
        for line in ranking.lines[:FILES]:
            for kind in WORDS:
                atoms = found.get((line.id, ranking.pressure, kind))
                if atoms is not None:
                    crystals.append(_crystal(line, ranking, kind, atoms))
    return crystals


def _crystal(line: Candidate, ranking: RankingView, kind: Kind, atoms: Atoms) -> Crystal:
    group = (line.spg_static if kind == "static" else line.spg_quantum) or space_group(atoms)
    return Crystal(line, ranking.pressure, ranking.temperature, kind, group, stripped(atoms))


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
    anharmonic: Path, rankings: Iterable[RankingView], starts: Callable[[], Mapping[str, Atoms]]
) -> list[Crystal]:
    """Structures of the rankings' first lines from what a search or ``rank`` leaves: the
    populations and ``quantum.traj``.

    ``starts`` : asked (see `stored_starts`) when these hold not all.
    """
    statics: dict[str, Atoms] = {}
    results = anharmonic.parent
    for path in [
        results / "good.traj",
        *sorted(results.glob("gen*.traj"), key=_generation, reverse=True)[:1],
    ]:
        for atoms in _traj(path):
            statics.setdefault(str(atoms.info.get("candidate_id", "")), atoms)
    centroids = {
        str(atoms.info.get("sscha_folder", "")): atoms
        for atoms in _traj(anharmonic / "quantum.traj")
    }
    if any(line.id not in statics for ranking in rankings for line in ranking.lines[:FILES]):
        for name, atoms in starts().items():
            statics.setdefault(name, atoms)
    crystals = []
    for ranking in rankings:
        for line in ranking.lines[:FILES]:
            if line.id in statics:
                crystals.append(_crystal(line, ranking, "static", statics[line.id]))
            if line.sscha_folder in centroids:
                crystals.append(_crystal(line, ranking, "centroids", centroids[line.sscha_folder]))
    return crystals


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
    from magus_anharmonic.ranking.store import NAME, read_records

    path = anharmonic / NAME
    return (
        {record.structure: record.start for record in read_records(path)} if path.is_file() else {}
    )


def write_structures(folder: Path, crystals: Iterable[Crystal]) -> int:
    """``NAME.cif`` and ``NAME.vasp`` (a POSCAR) for each and all of them in ``structures.extxyz``;
    returns how many.

    Files of an earlier report that this one does not write are removed, others in ``folder`` are
    left alone. Each file is whole or absent; none is flushed to disk by itself, since all can be
    made again.
    """
    from ase.io import write

    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-", suffix=TEMPORARY) as making:
        for crystal in crystals:
            write(Path(making) / f"{crystal.stem}.cif", crystal.atoms, format="cif")
            write(
                Path(making) / f"{crystal.stem}.vasp",
                crystal.atoms,
                format="vasp",
                direct=True,
                sort=True,
            )
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
    frame = crystal.atoms.copy()
    frame.info = {
        "id": crystal.line.id,
        "formula": crystal.line.formula,
        "space_group": crystal.space_group,
        "pressure_GPa": crystal.pressure,
        "kind": crystal.kind,
        "file": crystal.stem,
    }
    return frame
