"""The state and the configurations in which ``magus-anharmonic errors`` measures, from what the user names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from magus_anharmonic.analysis.errors_run import Source, displacements_of, source_of_result, source_of_state
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.gate import read_structures
from magus_anharmonic.sscha import free_energy
from magus_anharmonic.sscha.begin import read_state
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.run_folder import read_population_file
from magus_anharmonic.sscha.state import SschaState


def find_source(
    path: Path,
    model: Evaluator,
    run_folder: Path,
    *,
    phase: str = "",
    pressure: float | None = None,
    temperature: float = 0.0,
    supercell: tuple[int, int, int] = (2, 2, 2),
    seed: int = 0,
) -> Source:
    """The state of a finished run (a folder), of dynamical matrices (a prefix), or of a structure file, which is run first.

    Raises ``InputError``: nothing there, no pressure (GPa) for a structure or matrices, or a run that ended without a state.
    """
    if path.is_dir():
        return source_of_result(SschaResult.read(path), phase)
    if not path.is_file() and not Path(f"{path}1").is_file():
        raise InputError(f"{path}: no such structure file, no folder of an SSCHA run, and no dynamical matrices {path}1")
    if pressure is None:
        raise InputError(f"--pressure: is needed for {path}: only the folder of a run says it")
    if Path(f"{path}1").is_file():
        return source_of_state(read_state(path, temperature), pressure, phase)
    atoms = read_structures(path, index=-1)[0]
    result = free_energy(
        atoms, model, pressure=pressure, temperature=temperature, supercell=supercell, n_configs=500, seed=seed, directory=run_folder
    )
    return source_of_result(result, phase)


def given_displacements(state: SschaState, path: Path) -> np.ndarray:
    """Displacements (n, n_supercell, 3) A of the configurations in a file; raises ``InputError`` when they are not pairs of this state."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".npz":
        drawn_from, ensemble = read_population_file(path)
        structures = [drawn_from.supercell.copy() for _ in ensemble.displacements]
        for atoms, displacement in zip(structures, ensemble.displacements, strict=True):
            atoms.positions += displacement
    else:
        structures = read_structures(path)
    return displacements_of(state, structures, str(path))
