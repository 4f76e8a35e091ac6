"""Phonon dispersions along the standard path of the crystal: points, interpolated bands, table and picture.

Path: Hinuma, Pizzi, Kumagai, Oba, Tanaka, Comp. Mater. Sci. 128, 140 (2017), doi:10.1016/j.commatsci.2016.10.015, by
seekpath. Long-range dipoles (LO-TO splitting) are not added.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ase import Atoms

from magus_anharmonic.files import replacing, write_text
from magus_anharmonic.sscha.finite_size import interpolated_squares, nearest_images
from magus_anharmonic.sscha.hessian import Hessian
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.supercells import q_index, supercell_matrix
from magus_anharmonic.structures import spglib_cell
from magus_anharmonic.units import EV_IN_CM1, HBAR

SPACING = 0.01
"""Between points of the path, 2 pi / A."""


@dataclass(frozen=True)
class BandPath:
    """Points of a path in the reciprocal lattice of the given cell.

    q : (m, 3) fractional; distance : (m,) 2 pi / A along the path, without the jumps; ticks : (distance, label) of the
    special points; segments : (first, last) index of every straight piece.
    """

    q: np.ndarray
    distance: np.ndarray
    ticks: list[tuple[float, str]]
    segments: list[tuple[int, int]]


@dataclass(frozen=True)
class Dispersion:
    """Bands along a path. bands : name -> (m, 3n) eV, imaginary as negative; marks : `Hessian` frequencies where the path
    meets a q point of the supercell, (distance, quantum, standard error or NaN) in eV."""

    path: BandPath
    bands: dict[str, np.ndarray]
    marks: list[tuple[float, float, float]]


def band_path(atoms: Atoms, spacing: float = SPACING, symprec: float = 1e-3) -> BandPath:
    """The path of seekpath for this very cell, with points ``spacing`` (2 pi / A) apart."""
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
    return "Γ" if label == "GAMMA" else label.replace("_0", "₀").replace("_1", "₁").replace("_2", "₂")


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
    """(m, 3n) hbar omega in eV at fractional ``q`` by Fourier interpolation, imaginary as negative."""
    changed = replace(state, force_constants=force_constants)
    squares = interpolated_squares(changed, *nearest_images(changed), q)
    return np.sign(squares) * HBAR * np.sqrt(np.abs(squares))


def dispersion(hessian: Hessian, harmonic: np.ndarray | None = None, spacing: float = SPACING) -> Dispersion:
    """Harmonic (if given), auxiliary and free-energy Hessian bands; error bars at the q points of the supercell."""
    state = hessian.state
    path = band_path(state.atoms, spacing)
    curves: Mapping[str, np.ndarray | None] = {
        "harmonic": harmonic,
        "auxiliary": state.force_constants,
        "hessian": hessian.force_constants,
    }
    found = {name: bands(state, matrix, path.q) for name, matrix in curves.items() if matrix is not None}
    return Dispersion(path, found, _marks(hessian, path))


def _marks(hessian: Hessian, path: BandPath) -> list[tuple[float, float, float]]:
    matrix = supercell_matrix(hessian.state.repeats)
    errors = hessian.quantum_error
    marks = []
    for first, last in path.segments:
        start, along = path.q[first], path.q[last] - path.q[first]
        lengths = path.distance[first], path.distance[last]
        for fraction in _meetings(start @ matrix.T, along @ matrix.T):
            index = int(q_index(start + fraction * along, hessian.state.repeats))
            where = lengths[0] + fraction * (lengths[1] - lengths[0])
            for mode, quantum in enumerate(hessian.quantum[index]):
                marks.append((float(where), float(quantum), float("nan") if errors is None else float(errors[index, mode])))
    return sorted(set(marks))


def _meetings(start: np.ndarray, along: np.ndarray) -> list[float]:
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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{name}_{mode + 1}_meV" for name, values in found.bands.items() for mode in range(values.shape[1])]
    writer.writerow(["distance_2pi_per_A", "q1", "q2", "q3", *columns])
    table = np.concatenate(list(found.bands.values()), axis=1) * 1e3
    for distance, q, row in zip(found.path.distance, found.path.q, table, strict=True):
        writer.writerow([f"{distance:.6f}", *(f"{value:.8f}" for value in q), *(f"{value:.6f}" for value in row)])
    write_text(path, text.getvalue())


STYLES = {
    "harmonic": dict(color="0.65", lw=1.0, ls="--"),
    "auxiliary": dict(color="C0", lw=1.0, ls="-"),
    "hessian": dict(color="C3", lw=1.4, ls="-"),
}
NAMES = {"harmonic": "harmonic", "auxiliary": "SSCHA auxiliary", "hessian": "free-energy Hessian (physical phonons)"}


def draw_dispersion(found: Dispersion, path: Path, title: str = "") -> None:
    """Draw the bands; PNG or SVG by the suffix of ``path``. Imaginary frequencies are shown as negative."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in found.bands.items():
        for number, (first, last) in enumerate(found.path.segments):
            part = slice(first, last + 1)
            lines = axes.plot(found.path.distance[part], values[part] * 1e3, **STYLES[name])
            if number == 0:
                lines[0].set_label(NAMES[name])
    if found.marks:
        where, quantum, error = np.array(found.marks).T
        bars = None if np.isnan(error).all() else np.nan_to_num(error) * 1e3
        label = "at the q points of the supercell" + ("" if bars is None else ", with standard error")
        axes.errorbar(where, quantum * 1e3, yerr=bars, fmt="o", ms=3, color=STYLES["hessian"]["color"], capsize=2, lw=0.8, label=label)
    for place, _ in found.path.ticks:
        axes.axvline(place, color="0.85", lw=0.8, zorder=0)
    axes.axhline(0.0, color="k", lw=0.8)
    axes.set_xticks([place for place, _ in found.path.ticks], [label for _, label in found.path.ticks])
    axes.set_xlim(found.path.distance[0], found.path.distance[-1])
    axes.set_ylabel("ħω (meV; imaginary shown as negative)")
    right = axes.secondary_yaxis("right", functions=(lambda mev: mev * 1e-3 * EV_IN_CM1, lambda cm1: cm1 / EV_IN_CM1 * 1e3))
    right.set_ylabel("wave number (cm$^{-1}$)")
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format=path.suffix.removeprefix("."))
