"""Files that SSCHA users exchange: dynamical matrices in Quantum ESPRESSO's format, ensembles of python-sscha.

Two formats of ensembles: binary (``energies_popN.npy`` ..., with the dynamical matrices ``dyn_gen_popN_*``) and the text
files of a ``data_dir`` (``energies_supercell_populationN.dat`` ..., dynamical matrices beside them or given). Supercell
atoms are in the order of this package, which is python-sscha's. Its units: Ry, A (binary) or bohr (text), Ry/bohr^3
with the opposite sign of the stress.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import raise_trouble
from magus_anharmonic.sscha.averages import Ensemble
from magus_anharmonic.sscha.start import nearest_neighbour
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.units import BOHR, RYDBERG

THEIR_BOHR = 1.0 / 1.889725989
"""Angstrom; python-sscha's own constant, in which it writes and reads its text files."""
STRESS = -RYDBERG / BOHR**3


def state_from_dyn(prefix: str | Path, temperature: float = 0.0) -> SschaState:
    """The state of the dynamical matrices ``prefix1`` ... ``prefixN``; raises ``InputError`` when they are not there."""
    from magus_anharmonic.sscha.python_sscha import read_dynamical_matrices

    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        try:
            return read_dynamical_matrices(prefix, temperature, Path(scratch) / "log")
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # cellconstructor raises whatever it stumbles over
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"start: {prefix}1, ...: not readable as dynamical matrices of Quantum ESPRESSO ({why})") from None


def write_dyn(state: SschaState, prefix: Path, force_constants: np.ndarray | None = None) -> None:
    """Write ``prefix1`` ... ``prefixN``: the force constants of ``state``, or others of its supercell (a Hessian)."""
    from magus_anharmonic.sscha.python_sscha import write_dynamical_matrices

    prefix.parent.mkdir(parents=True, exist_ok=True)
    chosen = state if force_constants is None else replace(state, force_constants=force_constants)
    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        write_dynamical_matrices(chosen, prefix, Path(scratch) / "log")


def write_ensemble(state: SschaState, ensemble: Ensemble, folder: Path, population: int = 1, *, text: bool = False) -> None:
    """Write an ensemble for python-sscha's ``load_bin`` or, with ``text``, its ``load``; the state goes beside it as ``dyn_gen_popN_*``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dyn(state, folder / f"dyn_gen_pop{population}_")
    energies = ensemble.energies / RYDBERG
    stresses = ensemble.stresses / STRESS
    if not text:
        np.save(folder / f"xats_pop{population}.npy", state.supercell.positions + ensemble.displacements)
        np.save(folder / f"forces_pop{population}.npy", ensemble.forces / RYDBERG)
        np.save(folder / f"stresses_pop{population}.npy", stresses)
        np.save(folder / f"energies_pop{population}.npy", energies)
        return
    cell = "\n".join(" ".join(f"{value:.16f}" for value in row) for row in state.supercell.cell.array)
    symbols = state.supercell.get_chemical_symbols()
    for number, (u, forces, stress) in enumerate(zip(ensemble.displacements, ensemble.forces, stresses, strict=True), start=1):
        name = f"population{population}_{number}.dat"
        np.savetxt(folder / f"u_{name}", u / THEIR_BOHR)
        np.savetxt(folder / f"forces_{name}", forces * THEIR_BOHR / RYDBERG)
        np.savetxt(folder / f"pressures_{name}", stress)
        rows = zip(symbols, state.supercell.positions + u, strict=True)
        atoms = "\n".join(f"{symbol} {x:.16f} {y:.16f} {z:.16f}" for symbol, (x, y, z) in rows)
        (folder / f"scf_{name}").write_text(f"CELL_PARAMETERS angstrom\n{cell}\n\nATOMIC_POSITIONS angstrom\n{atoms}\n", encoding="utf-8")
    np.savetxt(folder / f"energies_supercell_population{population}.dat", energies)


def read_ensemble(
    folder: str | Path, temperature: float, population: int | None = None, dyn: str | Path | None = None
) -> tuple[SschaState, Ensemble]:
    """State and ensemble from a folder of python-sscha, binary or text; the last population unless one is named.

    ``dyn`` : prefix of the dynamical matrices that made the ensemble, where they are not in the folder as
    ``dyn_gen_popN_`` or ``dyn_start_populationN_`` (there or in the working folder of python-sscha, its parent).
    Raises ``InputError`` naming the file that is missing or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"ensemble: {folder}: no such folder")
    binary = _numbers(folder, r"energies_pop(\d+)\.npy")
    text = _numbers(folder, r"energies_supercell_population(\d+)\.dat")
    if not binary | text:
        raise InputError(f"ensemble: {folder}: holds neither energies_popN.npy nor energies_supercell_populationN.dat")
    number = max(binary | text) if population is None else population
    if number not in binary | text:
        raise InputError(f"ensemble: {folder}: has no population {number} (there are {sorted(binary | text)})")
    state = state_from_dyn(dyn if dyn is not None else _prefix(folder, number), temperature)
    read = _binary if number in binary else _text
    try:
        u, energies, forces, stresses = read(folder, number, state)
    except Exception as error:  # NumPy's readers raise many types for a damaged file
        raise_trouble(error, folder)
        raise InputError(f"ensemble: {folder}: population {number}: {' '.join(str(error).split())}") from None
    expected = (len(energies), len(state.supercell), 3)
    for name, values in (("displacements", u), ("forces", forces)):
        if values.shape != expected or not np.isfinite(values).all():
            raise InputError(f"ensemble: {folder}: {name} have the shape {values.shape}, the dynamical matrices ask for {expected}")
    if np.sqrt((u**2).sum(axis=-1)).mean() > 0.5 * nearest_neighbour(state.atoms).min():
        raise InputError(
            f"ensemble: {folder}: the displacements are as large as the crystal; the dynamical matrices are of another structure"
        )
    return state, _paired(Ensemble(u, energies, forces, stresses))


def _numbers(folder: Path, pattern: str) -> set[int]:
    return {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))}


def _prefix(folder: Path, number: int) -> Path:
    places = [folder / f"dyn_gen_pop{number}_", folder / f"dyn_start_population{number}_", folder.parent / f"dyn_start_population{number}_"]
    for place in places:
        if Path(f"{place}1").is_file():
            return place
    raise InputError(f"ensemble: {folder}: no dynamical matrices of population {number} ({places[0].name}1); give their prefix")


def _binary(folder: Path, number: int, state: SschaState) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies, forces, positions = (
        np.load(folder / f"{name}_pop{number}.npy", allow_pickle=False) for name in ("energies", "forces", "xats")
    )
    stress = folder / f"stresses_pop{number}.npy"
    stresses = np.load(stress, allow_pickle=False) * STRESS if stress.is_file() else np.full((len(energies), 3, 3), np.nan)
    return positions - state.supercell.positions, energies * RYDBERG, np.ascontiguousarray(forces) * RYDBERG, stresses


def _text(folder: Path, number: int, state: SschaState) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies = np.loadtxt(folder / f"energies_supercell_population{number}.dat", ndmin=1)
    names = [f"population{number}_{index}.dat" for index in range(1, len(energies) + 1)]
    u = np.array([np.loadtxt(folder / f"u_{name}", ndmin=2) for name in names]) * THEIR_BOHR
    forces = np.array([np.loadtxt(folder / f"forces_{name}", ndmin=2) for name in names]) * RYDBERG / THEIR_BOHR
    stresses = np.full((len(energies), 3, 3), np.nan)
    if (folder / f"pressures_{names[0]}").is_file():
        stresses = np.array([np.loadtxt(folder / f"pressures_{name}") for name in names]) * STRESS
    return u, energies * RYDBERG, forces, stresses


def _paired(ensemble: Ensemble) -> Ensemble:
    """+u and -u next to each other, where the first half of the ensemble is +u and the second -u."""
    u = ensemble.displacements
    half = len(u) // 2
    if len(u) % 2 or half == 0 or not np.allclose(u[:half], -u[half:], rtol=0.0, atol=1e-6):
        return ensemble
    order = np.arange(len(u)).reshape(2, half).T.ravel()
    return Ensemble(u[order], ensemble.energies[order], ensemble.forces[order], ensemble.stresses[order])
