"""From the last state and its averages to a `SschaResult`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms

from magus_anharmonic.sscha.averages import Averages
from magus_anharmonic.sscha.criteria import correctable
from magus_anharmonic.sscha.finite_size import finite_size_term
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.start import Start
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import statistical_tolerance
from magus_anharmonic.structures import bare, space_group
from magus_anharmonic.units import EV_PER_A3_IN_GPA

if TYPE_CHECKING:
    from magus_anharmonic.sscha.task import Progress, Task

NAN = float("nan")


def gibbs_energy(state: SschaState, averages: Averages, pressure: float) -> tuple[float, float]:
    """(F + P V)/N without finite-size term, and its standard error, eV/atom; ``pressure`` in GPa.

    Of the minimum that the state is near: what it lies above that is known from the gradients (`Averages.decrease`) and taken off. Of the
    state itself, an upper bound, where that is not `correctable`.
    """
    n = len(state.atoms)
    plain = (averages.helmholtz + pressure / EV_PER_A3_IN_GPA * state.atoms.get_volume()) / n
    if not correctable(averages, n):
        return float(plain), averages.helmholtz_error / n
    return float(plain - averages.decrease / n), averages.minimum_error / n


def centroid_tolerance(state: SschaState, averages: Averages) -> float:
    """Tolerance in A for the space group of the centroids, from their error and what is left of the relaxation."""
    strain = float(np.max(np.abs(averages.strain) + 2.0 * averages.strain_error, initial=0.0))
    error = averages.position_error + np.abs(averages.shift) / 3.0
    return statistical_tolerance(error, strain, float(state.atoms.cell.lengths().max()))


def finished_result(
    task: Task, state: SschaState, averages: Averages, progress: Progress, begin: Start, reason: str, group: str, began: float
) -> SschaResult:
    """The result of a run with a usable last state; ``reason`` is empty when it has converged.

    ``group`` : its space group, where that was decided (`identity`); else that of the centroids within their error.
    """
    n = len(state.atoms)
    finite = finite_size_term(state, task.settings.reference_spacing)
    raw, error = gibbs_energy(state, averages, task.pressure)
    work = task.pressure / EV_PER_A3_IN_GPA * float(state.atoms.get_volume()) / n
    tolerance = centroid_tolerance(state, averages)
    return SschaResult(
        status="unconverged" if reason else "converged",
        reason=f"not converged after {len(progress.gibbs)} populations: {reason}" if reason else "",
        converged=not reason,
        gibbs=raw + finite.term / n,
        gibbs_error=error,
        gibbs_raw=raw,
        finite_size=finite.term / n,
        helmholtz=raw - work + finite.term / n,
        volume=float(state.atoms.get_volume() / n),
        stress=averages.stress,
        stress_error=averages.stress_error,
        pressure=float(-np.trace(averages.stress) / 3.0 * EV_PER_A3_IN_GPA),
        target_pressure=task.pressure,
        temperature=task.temperature,
        decrease=max(0.0, averages.decrease) / n,
        centroids=state.atoms.copy(),
        position_error=float(np.max(averages.position_error)),
        space_group_start=space_group(begin.state.atoms, 0.01),
        space_group=group or space_group(state.atoms, tolerance),
        symmetry_tolerance=tolerance,
        n_evaluations=progress.n_evaluations,
        n_populations=len(progress.gibbs),
        n_configs=task.settings.n_configs,
        n_atoms_supercell=n * state.n_cells,
        supercell=state.repeats,
        interpolated_imaginary=finite.imaginary,
        model_id=task.model_id,
        seconds=time.perf_counter() - began,
        force_constants=state.force_constants,
    )


def failed_result(task: Task, reason: str, progress: Progress, began: float) -> SschaResult:
    """The result of a run without a usable state, with the numbers of its last population (finite-size term left out)."""
    gibbs, error = progress.gibbs[-1] if progress.gibbs else (NAN, NAN)
    last = progress.rows[-1] if progress.rows else {}
    atoms: Atoms = bare(task.atoms)
    found = space_group(atoms, task.settings.symprec)
    return SschaResult(
        status="failed",
        reason=reason,
        converged=False,
        gibbs=NAN,
        gibbs_error=error,
        gibbs_raw=gibbs,
        finite_size=NAN,
        helmholtz=NAN,
        volume=last.get("volume_A3_per_atom", NAN),
        stress=np.full((3, 3), NAN),
        stress_error=np.full((3, 3), NAN),
        pressure=last.get("pressure_GPa", NAN),
        target_pressure=task.pressure,
        temperature=task.temperature,
        decrease=last.get("predicted_decrease_eV_per_atom", NAN),
        centroids=atoms,
        position_error=NAN,
        space_group_start=found,
        space_group=found,
        symmetry_tolerance=task.settings.symprec,
        n_evaluations=progress.n_evaluations,
        n_populations=len(progress.gibbs),
        n_configs=task.settings.n_configs,
        n_atoms_supercell=0,
        supercell=(0, 0, 0),
        interpolated_imaginary=NAN,
        model_id=task.model_id,
        seconds=time.perf_counter() - began,
    )
