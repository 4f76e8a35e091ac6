"""Phonon dispersions along the standard path of the crystal, and modes at Gamma by irreducible
representation: which squared frequencies belong to T1u of Im-3m.

Path: Hinuma, Pizzi, Kumagai, Oba, Tanaka, Comp. Mater. Sci. 128, 140 (2017),
doi:10.1016/j.commatsci.2016.10.015, by seekpath. Long-range dipoles (LO-TO splitting) are not
added.

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
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.io import pictures
from magus_anharmonic.io.tables import write_table
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.reciprocal import interpolated_squares, nearest_images
from magus_anharmonic.sscha.record import SYMPREC
from magus_anharmonic.sscha.start import DISPLACEMENT
from magus_anharmonic.sscha.state import SschaState, translations
from magus_anharmonic.sscha.supercells import q_index, shape_supercell_matrix
from magus_anharmonic.sscha.symmetry import Symmetry, symmetric_primitive
from magus_anharmonic.structures import spglib_cell, spglib_or_none, stripped
from magus_anharmonic.units import EV_IN_CM1, HBAR, ev_to_mev

SPACING = 0.01
"""Between points of the path, 2 pi / A."""


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


def band_path(atoms: Atoms, spacing: float = SPACING, symprec: float = SYMPREC) -> BandPath:
    """The path of seekpath for this very cell in the space group that it has at ``symprec`` (A),
    with points ``spacing`` (2 pi / A) apart."""
    import seekpath

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = seekpath.get_path_orig_cell(spglib_cell(atoms), symprec=symprec)
    reciprocal = np.linalg.inv(atoms.cell.array).T
    q, distance, ticks, segments = [], [], [], []
    travelled = 0.0
    for start, end in found["path"]:
        first, last = (np.array(found["point_coords"][label]) for label in (start, end))
        length = float(np.linalg.norm((last - first) @ reciprocal))
        steps = np.linspace(0.0, 1.0, max(2, int(np.ceil(length / spacing)) + 1))
        segments.append((len(q), len(q) + len(steps) - 1))
        q.extend(first + np.outer(steps, last - first))
        distance.extend(travelled + steps * length)
        ticks += [(travelled, _plain(start)), (travelled + length, _plain(end))]
        travelled += length
    return BandPath(np.array(q), np.array(distance), _joined(ticks), segments)


def _plain(label: str) -> str:
    return (
        "Γ" if label == "GAMMA" else label.replace("_0", "₀").replace("_1", "₁").replace("_2", "₂")
    )


def _joined(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """One tick per distance; two points at a jump become ``X|Y``."""
    joined: list[tuple[float, str]] = []
    for where, label in ticks:
        if joined and abs(joined[-1][0] - where) < 1e-9:
            known = joined[-1][1]
            joined[-1] = (where, known if label in known.split("|") else f"{known}|{label}")
        else:
            joined.append((where, label))
    return joined


def bands(state: SschaState, force_constants: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(m, 3n) hbar omega in eV at fractional ``q`` by Fourier interpolation, imaginary as
    negative."""
    changed = replace(state, force_constants=force_constants)
    squares = interpolated_squares(changed, *nearest_images(changed), q)
    return np.sign(squares) * HBAR * np.sqrt(np.abs(squares))


def dispersion(
    hessian: Hessian, harmonic: np.ndarray | None = None, symprec: float = SYMPREC
) -> Dispersion:
    """Harmonic (if given), auxiliary and free-energy Hessian bands along the path of the space
    group that ``state.atoms`` have at ``symprec`` (A); error bars at the q points of the
    supercell."""
    state = hessian.state
    path = band_path(state.atoms, symprec=symprec)
    curves: Mapping[str, np.ndarray | None] = {
        "harmonic": harmonic,
        "auxiliary": state.force_constants,
        "hessian": hessian.force_constants,
    }
    found = {
        name: bands(state, matrix, path.q) for name, matrix in curves.items() if matrix is not None
    }
    return Dispersion(path, found, _marks(hessian, path))


def _marks(hessian: Hessian, path: BandPath) -> list[tuple[float, float, float]]:
    matrix = shape_supercell_matrix(hessian.state.supercell_matrix)
    errors = hessian.hbar_omega_error
    marks = []
    for first, last in path.segments:
        start, along = path.q[first], path.q[last] - path.q[first]
        lengths = path.distance[first], path.distance[last]
        for fraction in _commensurate_fractions(start @ matrix.T, along @ matrix.T):
            index = int(q_index(start + fraction * along, hessian.state.supercell_matrix))
            where = lengths[0] + fraction * (lengths[1] - lengths[0])
            for mode, hbar_omega in enumerate(hessian.hbar_omega[index]):
                marks.append(
                    (
                        float(where),
                        float(hbar_omega),
                        float("nan") if errors is None else float(errors[index, mode]),
                    )
                )
    return sorted(set(marks))


def _commensurate_fractions(start: np.ndarray, along: np.ndarray) -> list[float]:
    """Fractions of a straight piece at which all three coordinates are whole numbers."""
    axis = int(np.argmax(np.abs(along)))
    low, high = sorted((start[axis], start[axis] + along[axis]))
    found = []
    for whole in range(int(np.ceil(low - 1e-6)), int(np.floor(high + 1e-6)) + 1):
        fraction = (whole - start[axis]) / along[axis]
        point = start + fraction * along
        if np.abs(point - np.rint(point)).max() < 1e-5:
            found.append(float(fraction))
    return found


def write_dispersion(found: Dispersion, path: Path) -> None:
    """Write the bands as CSV: distance, fractional q, then one column per band in meV."""
    columns = [
        f"{name}_{mode + 1}_meV"
        for name, values in found.bands.items()
        for mode in range(values.shape[1])
    ]
    table = ev_to_mev(np.concatenate(list(found.bands.values()), axis=1))
    rows = (
        [f"{distance:.6f}", *(f"{x:.8f}" for x in q), *(f"{x:.6f}" for x in row)]
        for distance, q, row in zip(found.path.distance, found.path.q, table, strict=True)
    )
    write_table(path, ["distance_2pi_per_A", "q1", "q2", "q3", *columns], rows)


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

    def levels(self, inside: np.ndarray) -> list[Level]:
        """Levels of a matrix given in this basis, ascending."""
        squares, vectors = np.linalg.eigh(0.5 * (inside + inside.T))
        vectors = self.basis @ vectors
        parts = [
            slice(first, first + self.dimension) for first in range(0, len(squares), self.dimension)
        ]
        return [Level(self.irrep, float(squares[part].mean()), vectors[:, part]) for part in parts]


def spaces(atoms: Atoms, symprec: float = 1e-3) -> tuple[list[Space], np.ndarray]:
    """The spaces of all representations that ``atoms`` (a primitive cell) has at Gamma, and the
    operations (m, 3n, 3n).

    Raises ``InputError`` where the point group has no table.
    """
    symmetry = Symmetry(atoms, (1, 1, 1), symprec)
    names, characters, sizes = _characters(atoms, symmetry, symprec)
    still = translations(atoms.get_masses())
    free = np.eye(3 * len(atoms)) - still @ still.T
    operations = _representation(symmetry)
    found = []
    for name, character, size in zip(names, characters, sizes, strict=True):
        projector = size / len(operations) * np.einsum("g,gij->ij", character, operations)
        projector = free @ (0.5 * (projector + projector.T)) @ free
        weights, basis = np.linalg.eigh(projector)
        if (weights > 0.5).any():
            found.append(Space(name, size, basis[:, weights > 0.5]))
    return found, operations


def levels_by_irrep(matrix: np.ndarray, atoms: Atoms, symprec: float = 1e-3) -> list[Level]:
    """Levels of the mass-weighted matrix (3n, 3n) at Gamma of ``atoms`` (a primitive cell),
    translations left out."""
    return [
        level
        for space in spaces(atoms, symprec)[0]
        for level in space.levels(space.basis.T @ matrix @ space.basis)
    ]


def levels_by_displacing(
    atoms: Atoms, evaluator: Evaluator, wanted: Sequence[str], symprec: float = 1e-3
) -> list[Level]:
    """Levels (eV/A^2/amu) of the wanted representations from as few evaluations as their symmetry
    allows.

    D commutes with the operations: D (g w) = g (D w). A displacement w in general position within
    the space of a representation that occurs m times with dimension d has images that span d of its
    m copies, so that m/d of them, rounded up, each with both signs, are enough (T1u of Im-3m H3S:
    two evaluations instead of the twelve of all force constants). Raises ``InputError`` for a
    representation that is absent.
    """
    present, operations = spaces(atoms, symprec)
    lowest_levels([Level(space.irrep, 0.0, space.basis) for space in present], wanted)
    root = np.sqrt(np.repeat(atoms.get_masses(), 3))
    chosen = [space for space in present if space.irrep in wanted]
    directions = [_in_general_position(space, operations) for space in chosen]
    moved, lengths = [], []
    for direction in (column for found in directions for column in found.T):
        length = DISPLACEMENT / np.abs(direction / root).max()
        lengths.append(length)
        for sign in (1, -1):
            structure = stripped(atoms)
            structure.positions += sign * length * (direction / root).reshape(-1, 3)
            moved.append(structure)
    forces = np.array(evaluator.evaluate(moved).forces, dtype=float).reshape(len(moved), -1)
    responses = -(forces[0::2] - forces[1::2]) / (2 * np.array(lengths)[:, None]) / root
    levels: list[Level] = []
    for space, found in zip(chosen, directions, strict=True):
        mine, responses = responses[: found.shape[1]], responses[found.shape[1] :]
        inside = [
            space.basis.T @ np.einsum("gij,jk->igk", operations, columns).reshape(len(root), -1)
            for columns in (found, mine.T)
        ]
        levels += space.levels(inside[1] @ np.linalg.pinv(inside[0]))
    return levels


def _in_general_position(space: Space, operations: np.ndarray) -> np.ndarray:
    """(3n, k) displacements whose images span the space: the best conditioned of some drawn at
    random."""
    size = space.basis.shape[1]
    n = -(-size // space.dimension**2)
    rng, best, found = np.random.default_rng(0), 0.0, space.basis[:, :n]
    for _ in range(50):
        sampled = space.basis @ rng.normal(size=(size, n))
        sampled /= np.linalg.norm(sampled, axis=0)
        images = space.basis.T @ np.einsum("gij,jk->igk", operations, sampled).reshape(
            len(sampled), -1
        )
        weakest = np.linalg.svd(images, compute_uv=False)[-1]
        if weakest > best:
            best, found = float(weakest), sampled
    return found


def _representation(symmetry: Symmetry) -> np.ndarray:
    """(m, 3n, 3n): what every operation does to displacements."""
    n = symmetry.permutations.shape[1]
    matrices = np.zeros((len(symmetry), n, 3, n, 3))
    for g, (rotation, permutation) in enumerate(
        zip(symmetry.rotations, symmetry.permutations, strict=True)
    ):
        matrices[g, permutation, :, np.arange(n), :] = rotation
    return matrices.reshape(len(symmetry), 3 * n, 3 * n)


def _characters(
    atoms: Atoms, symmetry: Symmetry, symprec: float
) -> tuple[list[str], np.ndarray, list[int]]:
    """Names, characters (irreps, operations) in the order of the operations, and dimensions."""
    from phonopy.phonon.character_table import character_table

    data = spglib_or_none(spglib.get_symmetry_dataset, spglib_cell(atoms), symprec=symprec)
    group = "1" if data is None else str(data.pointgroup)
    change = np.eye(3) if data is None else np.asarray(data.transformation_matrix)
    rotations = [
        np.rint(change @ w @ np.linalg.inv(change)).astype(int) for w in symmetry.fractional
    ]
    for table in character_table.get(group) or []:
        classes = [_class_of(rotation, table["mapping_table"]) for rotation in rotations]
        if None not in classes:
            order = list(table["rotation_list"])
            names = list(table["character_table"])
            rows = [
                [table["character_table"][name][order.index(c)] for c in classes] for name in names
            ]
            if np.iscomplexobj(np.array(rows)):
                rows = np.real(rows).tolist()
            return (
                names,
                np.array(rows, dtype=float),
                [round(abs(table["character_table"][name][order.index("E")])) for name in names],
            )
    raise InputError(
        f"hessian: no character table for the point group {group} of {atoms.get_chemical_formula()}"
    )


def _class_of(rotation: np.ndarray, mapping: Any) -> str | None:
    return next(
        (
            name
            for name, matrices in mapping.items()
            if any((np.array(m) == rotation).all() for m in matrices)
        ),
        None,
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
    present, _ = spaces(symmetric_primitive(atoms, symprec))
    lowest_levels([Level(space.irrep, 0.0, space.basis) for space in present], wanted)
