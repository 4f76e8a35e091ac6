"""Files that SSCHA users exchange: dynamical matrices in Quantum ESPRESSO's format, ensembles of
python-sscha.

Two formats of ensembles: binary (``energies_popN.npy`` ..., with the dynamical matrices
``dyn_gen_popN_*``) and the text files of a ``data_dir`` (``energies_supercell_populationN.dat``
..., dynamical matrices beside them or given). Supercell atoms are in the order of this package,
which is python-sscha's. Its units: Ry, A (binary) or bohr (text), Ry/bohr^3 with the opposite sign
of the stress.
"""

from __future__ import annotations

import logging
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import InputError, one_line, typed_line
from magus_anharmonic.gate import check_structure
from magus_anharmonic.io.files import raise_machine_error
from magus_anharmonic.sscha.ensemble import Ensemble
from magus_anharmonic.sscha.ensemble_checks import checked_ensemble
from magus_anharmonic.sscha.state import SschaState, agree, fold, same_gaussian, sum_rule
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.units import BOHR, RYDBERG

log = logging.getLogger(__name__)

NOISE_OF_MATRICES = 0.02
"""Of the largest force constant: what symmetrising may change without a warning."""
THEIR_BOHR = 1.0 / 1.889725989
"""Angstrom; python-sscha's own constant, in which it writes and reads its text files."""
STRESS = -RYDBERG / BOHR**3


def state_from_dyn(prefix: str | Path, temperature: float = 0.0) -> SschaState:
    """The state of the dynamical matrices ``prefix1`` ... ``prefixN``, with the symmetry of their
    crystal.

    Species may be labelled as pw.x allows it (``H1``, ``H_pbe``, ``h``, ``D``); masses are those of
    the files. Raises ``InputError`` when files are not there or damaged, by their name.
    """
    state = _as_written(prefix, temperature)
    symmetric = Symmetry(state.atoms, state.supercell_matrix).force_constants(state.force_constants)
    change = np.abs(symmetric - state.force_constants).max() / max(np.abs(symmetric).max(), 1e-12)
    if change > NOISE_OF_MATRICES:
        log.warning(
            "%s: they break the symmetry of their crystal by %.1f per cent of the largest;"
            " symmetrised",
            prefix,
            100 * change,
        )
    return replace(state, force_constants=symmetric)


def _as_written(prefix: str | Path, temperature: float) -> SschaState:
    """As `state_from_dyn`, without the symmetry: what an ensemble was drawn from."""
    from magus_anharmonic.sscha.python_sscha import read_dynamical_matrices

    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        try:
            state = read_dynamical_matrices(prefix, temperature, Path(scratch) / "log")
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # cellconstructor raises whatever it stumbles over
            raise_machine_error(error, f"{prefix}1")
            why = typed_line(error, 200)
            raise InputError(
                f"start: {prefix}1, ...: not readable as dynamical matrices of Quantum ESPRESSO"
                f" ({why})"
            ) from None
    check_structure(state.atoms, f"start: {prefix}1")
    return replace(state, force_constants=fold(sum_rule(state.full), state.supercell_matrix))


def write_dyn(state: SschaState, prefix: Path, force_constants: np.ndarray | None = None) -> None:
    """Write ``prefix1`` ... ``prefixN``: the force constants of ``state``, or others of its
    supercell (a Hessian)."""
    from magus_anharmonic.sscha.python_sscha import write_dynamical_matrices

    prefix.parent.mkdir(parents=True, exist_ok=True)
    chosen = state if force_constants is None else replace(state, force_constants=force_constants)
    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        write_dynamical_matrices(chosen, prefix, Path(scratch) / "log")


def write_ensemble(
    state: SschaState, ensemble: Ensemble, folder: Path, population: int = 1, *, text: bool = False
) -> None:
    """Write an ensemble for python-sscha's ``load_bin`` or, with ``text``, its ``load``; the state
    goes beside it as ``dyn_gen_popN_*``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dyn(state, folder / f"dyn_gen_pop{population}_")
    energies = ensemble.energies / RYDBERG
    stresses = ensemble.stresses / STRESS
    if not text:
        np.save(
            folder / f"xats_pop{population}.npy", state.supercell.positions + ensemble.displacements
        )
        np.save(folder / f"forces_pop{population}.npy", ensemble.forces / RYDBERG)
        np.save(folder / f"stresses_pop{population}.npy", stresses)
        np.save(folder / f"energies_pop{population}.npy", energies)
        return
    cell = "\n".join(
        " ".join(f"{value:.16f}" for value in row) for row in state.supercell.cell.array
    )
    symbols = state.supercell.get_chemical_symbols()
    for number, (u, forces, stress) in enumerate(
        zip(ensemble.displacements, ensemble.forces, stresses, strict=True), start=1
    ):
        name = f"population{population}_{number}.dat"
        np.savetxt(folder / f"u_{name}", u / THEIR_BOHR)
        np.savetxt(folder / f"forces_{name}", forces * THEIR_BOHR / RYDBERG)
        np.savetxt(folder / f"pressures_{name}", stress)
        rows = zip(symbols, state.supercell.positions + u, strict=True)
        atoms = "\n".join(f"{symbol} {x:.16f} {y:.16f} {z:.16f}" for symbol, (x, y, z) in rows)
        (folder / f"scf_{name}").write_text(
            f"CELL_PARAMETERS angstrom\n{cell}\n\nATOMIC_POSITIONS angstrom\n{atoms}\n",
            encoding="utf-8",
        )
    np.savetxt(folder / f"energies_supercell_population{population}.dat", energies)


def read_ensemble(
    folder: str | Path,
    temperature: float,
    population: int | None = None,
    dyn: str | Path | None = None,
) -> tuple[SschaState, Ensemble]:
    """State and ensemble from a folder of python-sscha, binary or text; the last population unless
    one is named.

    The state is the one that drew the ensemble: ``dyn_gen_popN_`` or ``dyn_start_populationN_`` in
    the folder (or in the working folder of python-sscha, its parent), where there is none the
    prefix ``dyn``. Raises ``InputError`` naming what is missing, does not fit, or is not what it
    claims to be (`ensemble_checks`), and for a ``dyn`` that is another one than the folder's.
    """
    folder = Path(folder)
    number, binary = _population(folder, population)
    where = f"ensemble: {folder}: population {number}"
    own = generating_matrices(folder, number)
    if own is None and dyn is None:
        raise InputError(
            f"{where}: no dynamical matrices of it (dyn_gen_pop{number}_1); give the prefix of"
            " those that drew it"
        )
    state = _as_written(own or str(dyn), temperature)
    if own is not None and dyn is not None:
        other = _as_written(dyn, temperature)
        if not same_gaussian(state, other) or not agree(state, other, "positions", atol=1e-6):
            raise InputError(
                f"{where}: was drawn from {own}, and {dyn} is another state; leave it out"
            )
    try:
        u, energies, forces, stresses = (_binary if binary else _text)(folder, number, state)
    except Exception as error:  # NumPy's readers raise many types for a damaged file
        raise_machine_error(error, folder)
        raise InputError(f"{where}: {one_line(error)}") from None
    count, atoms = energies.size, len(state.supercell)
    shapes = {
        "energies": (energies, (count,)),
        "displacements": (u, (count, atoms, 3)),
        "forces": (forces, (count, atoms, 3)),
    }
    for name, (values, expected) in {**shapes, "stresses": (stresses, (count, 3, 3))}.items():
        if values.shape != expected or not np.issubdtype(values.dtype, np.floating):
            raise InputError(
                f"{where}: {name} are {values.dtype} of the shape {values.shape}, not numbers of"
                f" {expected}"
            )
    return state, checked_ensemble(state, Ensemble(u, energies, forces, stresses), where)


def generating_matrices(folder: str | Path, population: int | None = None) -> Path | None:
    """Prefix of the dynamical matrices from which an ensemble of python-sscha was drawn; None where
    neither folder nor parent has them."""
    number, _ = _population(Path(folder), population)
    inside, start = Path(folder) / f"dyn_gen_pop{number}_", f"dyn_start_population{number}_"
    prefixes = [inside, Path(folder) / start, Path(folder).resolve().parent / start]
    return next((prefix for prefix in prefixes if Path(f"{prefix}1").is_file()), None)


def _population(folder: Path, wanted: int | None) -> tuple[int, bool]:
    """Number of a population, the last unless one is wanted, and whether it is in the binary
    format."""
    if not folder.is_dir():
        raise InputError(f"ensemble: {folder}: no such folder")
    binary = _numbers(folder, r"energies_pop(\d+)\.npy")
    text = _numbers(folder, r"energies_supercell_population(\d+)\.dat")
    if not binary | text:
        raise InputError(
            f"ensemble: {folder}: holds neither energies_popN.npy nor"
            " energies_supercell_populationN.dat"
        )
    number = max(binary | text) if wanted is None else wanted
    if number not in binary | text:
        raise InputError(
            f"ensemble: {folder}: has no population {number} (there are {sorted(binary | text)})"
        )
    return number, number in binary


def _numbers(folder: Path, pattern: str) -> set[int]:
    return {
        int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(pattern, path.name))
    }


def _binary(
    folder: Path, number: int, state: SschaState
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies, forces, positions = (
        np.load(folder / f"{name}_pop{number}.npy", allow_pickle=False)
        for name in ("energies", "forces", "xats")
    )
    stress = folder / f"stresses_pop{number}.npy"
    stresses = np.load(stress, allow_pickle=False) * STRESS if stress.is_file() else np.zeros(0)
    return (
        positions - state.supercell.positions,
        energies * RYDBERG,
        np.ascontiguousarray(forces) * RYDBERG,
        _or_none(stresses, energies),
    )


def _text(
    folder: Path, number: int, state: SschaState
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    energies = np.loadtxt(folder / f"energies_supercell_population{number}.dat", ndmin=1)
    names = [f"population{number}_{index}.dat" for index in range(1, len(energies) + 1)]
    found = len(list(folder.glob(f"u_population{number}_*.dat")))
    if found != len(names):
        raise InputError(
            f"{len(names)} energies, and {found} files u_population{number}_*.dat: one of them is"
            " cut or incomplete"
        )
    u = np.array([np.loadtxt(folder / f"u_{name}", ndmin=2) for name in names]) * THEIR_BOHR
    forces = (
        np.array([np.loadtxt(folder / f"forces_{name}", ndmin=2) for name in names])
        * RYDBERG
        / THEIR_BOHR
    )
    there = any((folder / f"pressures_{name}").is_file() for name in names)
    stresses = (
        np.array([np.loadtxt(folder / f"pressures_{name}") for name in names]) * STRESS
        if there
        else np.zeros(0)
    )
    return u, energies * RYDBERG, forces, _or_none(stresses, energies)


def _or_none(stresses: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """NaN where an ensemble has no stresses: no file, or the zeros that python-sscha writes; what
    is damaged is left to the checks."""
    if not stresses.any():
        return np.full((energies.size, 3, 3), np.nan)
    return np.where(np.isfinite(stresses), stresses, np.inf)
