"""A crystal as balls and sticks: the scene that the viewer turns, and the still picture for paper and for browsers without WebGL."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import product

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from magus_anharmonic.structures import standardized

MAX_ATOMS = 64
"""Cells above this size are drawn as they are given, not as conventional cells."""

MAX_BALLS = 600
BOND_FACTOR = 1.2
"""Two atoms are joined within this factor times the sum of their covalent radii (Cordero et al., doi:10.1039/b801115j)."""

EDGES = [(i, j) for i, j in product(range(8), repeat=2) if i < j and (i ^ j) in (1, 2, 4)]


@dataclass(frozen=True)
class Scene:
    """What is drawn; positions in Angstrom around the middle of the cell.

    ``numbers`` (n,), ``positions`` (n, 3): the atoms with their images on the faces; ``bonds``: pairs of indices;
    ``corners`` (8, 3): of the cell, in the order of the three bits of the index; ``conventional``: not the cell that was given.
    """

    numbers: np.ndarray
    positions: np.ndarray
    bonds: list[tuple[int, int]]
    corners: np.ndarray
    conventional: bool


def scene(atoms: Atoms, symprec: float = 0.05) -> Scene:
    """The conventional cell (unless larger than `MAX_ATOMS`) with everything that lies on its faces, and bonds within it."""
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
    corners = (np.array([[(index >> bit) & 1 for bit in range(3)] for index in range(8)]) - 0.5) @ cell
    return Scene(kinds, positions, _bonds(kinds, positions), corners, conventional and len(shown) != len(atoms))


def _conventional(atoms: Atoms, symprec: float) -> Atoms | None:
    found = standardized(atoms, symprec)
    return None if found is None or len(found) > MAX_ATOMS else found


def _bonds(numbers: np.ndarray, positions: np.ndarray) -> list[tuple[int, int]]:
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    near = (distances < BOND_FACTOR * (radii[:, None] + radii[None])) & (distances > 0.1)
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(near, 1))]


def color(number: int) -> str:
    """Jmol's colour of an element, ``#rrggbb``; pure white (hydrogen) a little darker, to be seen on white paper."""
    red, green, blue = (int(round(255 * min(value, 0.94))) for value in jmol_colors[number])
    return f"#{red:02x}{green:02x}{blue:02x}"


def radius(number: int) -> float:
    """Radius of a ball in Angstrom: far less than the atom, so that the bonds are seen."""
    return float(0.16 + 0.16 * covalent_radii[number])


def as_json(drawn: Scene) -> dict[str, object]:
    """The scene for the viewer, coordinates with two digits."""
    kinds = sorted({int(number) for number in drawn.numbers})
    return {
        "kinds": [{"symbol": chemical_symbols[number], "color": color(number), "radius": round(radius(number), 3)} for number in kinds],
        "atoms": [
            [kinds.index(int(number)), *(round(float(value), 2) for value in position)]
            for number, position in zip(drawn.numbers, drawn.positions, strict=True)
        ],
        "bonds": [list(bond) for bond in drawn.bonds],
        "corners": [[round(float(value), 2) for value in corner] for corner in drawn.corners],
    }


def still(drawn: Scene, label: str, size: int = 240) -> str:
    """The scene as an SVG of ``size`` x ``size`` pixels seen from the front, a little above and from the side; ``label`` is its name."""
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
        shapes.append(((points[i][2] + points[j][2]) / 2, f'<line class="bond" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'))
    for number, point in zip(drawn.numbers, points, strict=True):
        x, y = at(point)
        shapes.append((point[2], f'<circle cx="{x}" cy="{y}" r="{scale * radius(int(number)):.1f}" fill="{color(int(number))}"/>'))
    body = "".join(text for _, text in sorted(shapes, key=lambda shape: shape[0]))
    name = escape(label)
    return f'<svg class="still" viewBox="0 0 {size} {size}" role="img" aria-label="{name}"><title>{name}</title>{body}</svg>'


def _rotation(x: float, y: float, z: float) -> np.ndarray:
    """Turn about z, then y, then x (radians); the viewer looks along -z."""
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z
