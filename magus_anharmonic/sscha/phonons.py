"""Phonon dispersions along the standard path of the crystal, and modes at Gamma by irreducible
representation: which squared frequencies belong to T1u of Im-3m.

Path: Hinuma, Pizzi, Kumagai, Oba, Tanaka, Comp. Mater. Sci. 128, 140 (2017),
doi:10.1016/j.commatsci.2016.10.015, by seekpath. Long-range dipoles (LO-TO splitting) are in the
bands where Born charges are given; Gamma is then the limit along the path.

Representations: projectors P = d/|G| sum_g chi(g)* D(g) on the mass-weighted displacements of the
primitive cell; the characters, under the names of Mulliken, are phonopy's tables. Projecting the
dynamical matrix needs no degenerate levels to be recognised in noisy frequencies.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import spglib
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures
from magus_anharmonic.io.tables import cell, write_table
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.nonanalytic import NonAnalytic, dipole_squares
from magus_anharmonic.sscha.reciprocal import interpolated_squares
from magus_anharmonic.sscha.record import SYMPREC
from magus_anharmonic.sscha.state import SschaState, phonon_energy, translations
from magus_anharmonic.sscha.supercells import cell_index, dual, shape_supercell_matrix
from magus_anharmonic.sscha.symmetry import Symmetry, symmetric_primitive
from magus_anharmonic.structures import spglib_cell, spglib_or_none
from magus_anharmonic.units import EV_IN_CM1, ev_to_mev

SPACING = 0.01
"""Between points of the path, 2 pi / A."""
EXACT = 1e-3
"""A, for crystals that are symmetric."""


@dataclass(frozen=True)
class BandPath:
    """Points of a path in the reciprocal lattice of the given cell.

    q : (m, 3) fractional; distance : (m,) 2 pi / A along the path, without the jumps; ticks :
    (distance, label) of the special points; segments : (first, last) index of every straight piece.
    """

    q: np.ndarray
    distance: np.ndarray
    ticks: list[tuple[float, str]]
    segments: list[tuple[int, int]]


@dataclass(frozen=True)
class Dispersion:
    """Bands along a path. bands : name -> (m, 3n) eV, imaginary as negative; marks : `Hessian`
    frequencies where the path meets a q point of the supercell, (distance, phonon energy, standard
    error or NaN) in eV."""

    path: BandPath
    bands: dict[str, np.ndarray]
    marks: list[tuple[float, float, float]]


def band_path(atoms: Atoms, symprec: float = SYMPREC) -> BandPath:
    """The path of seekpath for this very cell in the space group that it has at ``symprec`` (A)."""
    import seekpath

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = seekpath.get_path_orig_cell(spglib_cell(atoms), symprec=symprec)
    reciprocal = np.linalg.inv(atoms.cell.array).T
    q, distance, segments = [], [], []
    ticks: dict[float, list[str]] = {}
    travelled = 0.0
    for names in found["path"]:
        first, last = (np.array(found["point_coords"][name]) for name in names)
        length = float(np.linalg.norm((last - first) @ reciprocal))
        steps = np.linspace(0.0, 1.0, max(2, int(np.ceil(length / SPACING)) + 1))
        segments.append((len(q), len(q) + len(steps) - 1))
        q.extend(first + np.outer(steps, last - first))
        distance.extend(travelled + steps * length)
        for name, where in zip(names, (travelled, travelled + length), strict=True):
            label = name.replace("GAMMA", "Γ").replace("_0", "₀").replace("_1", "₁")
            there = ticks.setdefault(where, [])
            if (label := label.replace("_2", "₂")) not in there:
                there.append(label)
        travelled += length
    shown = [(where, "|".join(labels)) for where, labels in ticks.items()]
    return BandPath(np.array(q), np.array(distance), shown, segments)


def bands(state: SschaState, force_constants: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(m, 3n) hbar omega in eV at fractional ``q`` by Fourier interpolation, imaginary as
    negative."""
    changed = replace(state, force_constants=force_constants)
    return phonon_energy(interpolated_squares(changed, q))


def path_bands(
    state: SschaState, force_constants: np.ndarray, path: BandPath, dipoles: NonAnalytic | None
) -> np.ndarray:
    """`bands` along a path, with long-range dipoles where they are given: at Gamma the limit along
    the straight piece that ends there."""
    if dipoles is None:
        return bands(state, force_constants, path.q)
    changed = replace(state, force_constants=force_constants)
    squares = interpolated_squares(changed, path.q, dipoles)
    for first, last in path.segments:
        for end, other in ((first, last), (last, first)):
            if np.abs(path.q[end]).max() < 1e-9:
                squares[end] = dipole_squares(changed, dipoles, path.q[[end]], path.q[other])[0]
    return phonon_energy(squares)


def dispersion(
    hessian: Hessian,
    harmonic: np.ndarray | None = None,
    symprec: float = SYMPREC,
    dipoles: NonAnalytic | None = None,
) -> Dispersion:
    """Harmonic (if given), auxiliary and free-energy Hessian bands along the path of the space
    group that ``state.atoms`` have at ``symprec`` (A), with long-range dipoles where they are
    given; error bars at the q points of the supercell."""
    state = hessian.state
    path = band_path(state.atoms, symprec=symprec)
    curves: Mapping[str, np.ndarray | None] = {
        "harmonic": harmonic,
        "auxiliary": state.force_constants,
        "hessian": hessian.force_constants,
    }
    found = {
        name: path_bands(state, matrix, path, dipoles)
        for name, matrix in curves.items()
        if matrix is not None
    }
    return Dispersion(path, found, _marks(hessian, path))


def _marks(hessian: Hessian, path: BandPath) -> list[tuple[float, float, float]]:
    matrix = shape_supercell_matrix(hessian.state.supercell_matrix)
    found, errors = hessian.hbar_omega, hessian.hbar_omega_error
    marks = set()
    for first, last in path.segments:
        start, end = path.q[first] @ matrix.T, path.q[last] @ matrix.T
        axis = int(np.argmax(np.abs(end - start)))
        low, high = sorted((start[axis], end[axis]))
        for whole in range(int(np.ceil(low - 1e-6)), int(np.floor(high + 1e-6)) + 1):
            fraction = (whole - start[axis]) / (end - start)[axis]
            point = start + fraction * (end - start)
            if np.abs(point - np.rint(point)).max() < 1e-5:
                q = cell_index(np.rint(point).astype(int), dual(hessian.state.supercell_matrix))
                where = np.interp(fraction, (0.0, 1.0), path.distance[[first, last]])
                values = zip(found[q].tolist(), errors[q].tolist(), strict=True)
                marks |= {(float(where), *pair) for pair in values}
    return sorted(marks)


def write_dispersion(found: Dispersion, path: Path) -> None:
    """Write the bands as CSV: distance, fractional q, then one column per band in meV."""
    columns = [
        f"{name}_{mode + 1}_meV"
        for name, values in found.bands.items()
        for mode in range(values.shape[1])
    ]
    table = [found.path.distance, found.path.q, *map(ev_to_mev, found.bands.values())]
    rows = np.column_stack(table).tolist()
    names = ["distance_2pi_per_A", "q1", "q2", "q3", *columns]
    write_table(path, names, (map(cell, row) for row in rows))


LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "harmonic": ("harmonic", {"color": pictures.GREY, "lw": 1.0, "ls": "--"}),
    "auxiliary": ("SSCHA auxiliary", {"color": pictures.color(0), "lw": 1.0}),
    "hessian": ("free-energy Hessian (physical phonons)", {"color": pictures.color(1)}),
}
"""Name in the legend and look of the bands."""


def draw_dispersion(found: Dispersion, folder: Path, title: str = "") -> None:
    """Draw the bands into ``folder/dispersion.svg`` and ``.png``. Imaginary frequencies are shown
    as negative."""
    with pictures.figure(size=(7.2, 4.6), title=title) as (made, (axes,)):
        for name, values in found.bands.items():
            label, look = LINES[name]
            for first, last in found.path.segments:
                part = slice(first, last + 1)
                lines = axes.plot(found.path.distance[part], ev_to_mev(values[part]), **look)
                if first == 0:
                    lines[0].set_label(label)
        if found.marks:
            where, hbar_omega, error = np.array(found.marks).T
            known = not np.isnan(error).all()
            look = {**LINES["hessian"][1], "fmt": "o", "ms": 3, "capsize": 2, "lw": 0.8}
            label = "at the q points of the supercell" + (", with standard error" * known)
            bars = ev_to_mev(np.nan_to_num(error)) if known else None
            axes.errorbar(where, ev_to_mev(hbar_omega), yerr=bars, label=label, **look)
        ticks = found.path.ticks
        for tick, _ in ticks:
            axes.axvline(tick, color="0.85", lw=0.8, zorder=0)
        axes.axhline(0.0, color="k", lw=0.8)
        axes.set_xticks([tick for tick, _ in ticks], [name for _, name in ticks])
        axes.set_xlim(found.path.distance[0], found.path.distance[-1])
        axes.set_ylabel("ħω (meV; imaginary shown as negative)")
        mev_in_cm1 = EV_IN_CM1 / ev_to_mev(1.0)
        right = axes.secondary_yaxis(
            "right", functions=(lambda mev: mev * mev_in_cm1, lambda cm1: cm1 / mev_in_cm1)
        )
        right.set_ylabel("wave number (cm⁻¹)")
        made.legend(loc="outside lower center", ncols=2)
        pictures.save(made, folder, "dispersion")


@dataclass(frozen=True)
class Level:
    """One level of an irreducible representation: squared frequency in the unit of the matrix, and
    its (3n, d) vectors."""

    irrep: str
    square: float
    vectors: np.ndarray


@dataclass(frozen=True)
class Space:
    """The optical displacements of one irreducible representation: basis (3n, m d), mass weighted;
    dimension d."""

    irrep: str
    dimension: int
    basis: np.ndarray


def spaces(atoms: Atoms) -> list[Space]:
    """The spaces of all representations that ``atoms`` (a primitive cell) has at Gamma.

    Raises ``InputError`` where the point group has no table.
    """
    symmetry = Symmetry(atoms, (1, 1, 1), EXACT)
    still = translations(atoms.get_masses())
    free = np.eye(3 * len(atoms)) - still @ still.T
    operations = _representation(symmetry)
    found = []
    for name, character, size in _characters(atoms, symmetry):
        projector = size / len(operations) * np.einsum("g,gij->ij", character, operations)
        projector = free @ (0.5 * (projector + projector.T)) @ free
        weights, basis = np.linalg.eigh(projector)
        if (weights > 0.5).any():
            found.append(Space(name, size, basis[:, weights > 0.5]))
    return found


def levels_by_irrep(matrix: np.ndarray, atoms: Atoms) -> list[Level]:
    """Levels of the mass-weighted matrix (3n, 3n) at Gamma of ``atoms`` (a primitive cell),
    ascending in each representation, translations left out."""
    levels = []
    for space in spaces(atoms):
        inside = space.basis.T @ matrix @ space.basis
        squares, vectors = np.linalg.eigh(0.5 * (inside + inside.T))
        vectors = space.basis @ vectors
        for first in range(0, len(squares), space.dimension):
            part = slice(first, first + space.dimension)
            levels.append(Level(space.irrep, float(squares[part].mean()), vectors[:, part]))
    return levels


def _representation(symmetry: Symmetry) -> np.ndarray:
    """(m, 3n, 3n): what every operation does to displacements."""
    n = symmetry.permutations.shape[1]
    matrices = np.zeros((len(symmetry), n, 3, n, 3))
    for g, (rotation, permutation) in enumerate(
        zip(symmetry.rotations, symmetry.permutations, strict=True)
    ):
        matrices[g, permutation, :, np.arange(n), :] = rotation
    return matrices.reshape(len(symmetry), 3 * n, 3 * n)


def _characters(atoms: Atoms, symmetry: Symmetry) -> list[tuple[str, np.ndarray, int]]:
    """Name, characters (in the order of the operations) and dimension of every representation."""
    from phonopy.phonon.character_table import character_table

    data = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(atoms), symprec=EXACT)
    group = "1" if data is None else str(data.pointgroup)
    change = np.eye(3) if data is None else np.asarray(data.transformation_matrix)
    rotations = np.rint(change @ symmetry.fractional @ np.linalg.inv(change)).astype(int)
    for table in character_table.get(group) or []:
        order, kinds = list(table["rotation_list"]), table["mapping_table"].items()
        classes = [
            next((name for name, some in kinds if (np.array(some) == w).all((1, 2)).any()), None)
            for w in rotations
        ]
        if None not in classes:
            columns, one = [order.index(name) for name in classes], order.index("E")
            rows = table["character_table"].items()
            return [(name, np.real(row)[columns], round(abs(row[one]))) for name, row in rows]
    raise InputError(
        f"hessian: no character table for the point group {group} of {atoms.get_chemical_formula()}"
    )


def lowest_levels(levels: Sequence[Level], wanted: Sequence[str]) -> list[Level]:
    """The lowest level of every wanted irreducible representation (all of them when none is named).

    Raises ``InputError`` for one that the phase does not have at Gamma.
    """
    present = sorted({level.irrep for level in levels})
    missing = [name for name in wanted if name not in present]
    if missing:
        raise InputError(
            f"hessian.phases.irreps: {missing[0]}: this phase has no such optical mode at Gamma; it"
            f" has {', '.join(present)}"
        )
    return [
        min((level for level in levels if level.irrep == name), key=lambda level: level.square)
        for name in wanted or present
    ]


def check_irreps(atoms: Atoms | None, wanted: Sequence[str], symprec: float = 0.05) -> None:
    """Raise ``InputError`` for a representation that ``atoms`` does not have; a structure that is
    not known yet passes."""
    if atoms is None or not wanted:
        return
    present = spaces(symmetric_primitive(atoms, symprec))
    lowest_levels([Level(space.irrep, 0.0, space.basis) for space in present], wanted)
