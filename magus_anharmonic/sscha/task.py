"""What an SSCHA run is to compute, when it has converged and why it has not, and the result that
its last state and averages make.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.settings import SschaSettings
from magus_anharmonic.sscha.cell import Start
from magus_anharmonic.sscha.ensemble import Averages
from magus_anharmonic.sscha.nonanalytic import fitted
from magus_anharmonic.sscha.reciprocal import finite_size_term
from magus_anharmonic.sscha.result import Progress, SschaResult
from magus_anharmonic.sscha.state import SschaState, state_digest
from magus_anharmonic.sscha.surrogate import Surrogate
from magus_anharmonic.sscha.symmetry import statistical_tolerance
from magus_anharmonic.structures import space_group, stripped, structure_id
from magus_anharmonic.units import GPa, ev_per_a3_to_gpa, ev_to_mev, gpa_to_ev_per_a3


@dataclass(frozen=True)
class Task:
    """What to compute: a validated, immutable request.

    configurations : displacements (n, n_supercell, 3) in A that another model's run drew from
    ``start``: evaluated again, they are as good as new ones, because what they were drawn from does
    not depend on the model. surrogate : what most configurations are averaged over, if anything.
    """

    atoms: Atoms
    pressure: GPa
    temperature: float
    settings: SschaSettings
    seed: int
    masses: Mapping[str, float] | None
    start: SschaState | None
    model_id: str
    configurations: np.ndarray | None = None
    surrogate: Surrogate | None = None

    def identity(self) -> dict[str, Any]:
        """Everything on which the numbers depend; two runs with the same identity are the same
        run."""
        named = {} if self.surrogate is None else {"surrogate": self.surrogate.name}
        # what auto came to has its name above
        said = ["surrogate"] if self.settings.surrogate == "auto" else []
        return {
            **named,
            "structure": structure_id(self.atoms),
            "formula": self.atoms.get_chemical_formula(),
            "model": self.model_id,
            "pressure": self.pressure,
            "temperature": self.temperature,
            "seed": self.seed,
            "masses": dict(self.masses or {}),
            "start": None if self.start is None else state_digest(self.start),
            "configurations": None if self.configurations is None else len(self.configurations),
            "sscha": self.settings.identity("max_populations", "error_tolerance", *said),
        }


SIGNIFICANT = 2.0
"""Standard errors beyond which something left of the relaxation counts."""
LARGEST_CORRECTION = 5e-3
"""eV/atom: further from the minimum, or less well known, its height cannot be told by the
gradients."""
LARGEST_POSITION_ERROR = 0.1
"""Angstrom: centroids that are known less well are not known at all."""
LARGEST_STRAIN_ERROR = 0.1


def correctable(averages: Averages, n: int) -> bool:
    """Whether what a state of ``n`` atoms lies above the minimum is small enough, and known well
    enough, to be taken off."""
    height, error = (
        averages.predicted_decrease / n,
        (averages.minimum_error - averages.helmholtz_error) / n,
    )
    return bool(abs(height) < LARGEST_CORRECTION and error < LARGEST_CORRECTION)


def unconverged(averages: Averages, progress: Progress, n: int, task: Task) -> str:
    """Why the run of a cell of ``n`` atoms has to go on; empty when it has converged.

    The last two populations agree when their G, each an estimate of the same minimum, differ by no
    more than their errors.
    """
    gibbs, error = progress.gibbs[-1]
    issues = open_issues(averages, error, n, task)
    if len(progress.gibbs) < 2:
        issues.append("one population")
    else:
        before, error_before = progress.gibbs[-2]
        if not abs(gibbs - before) <= SIGNIFICANT * np.hypot(error, error_before) + 1e-6:
            issues.append(
                f"G changed by {ev_to_mev(gibbs - before):.2f} meV/atom in the last population"
            )
    return "; ".join(issues)


def open_issues(averages: Averages, error: float, n: int, task: Task) -> list[str]:
    """What one ensemble of a cell of ``n`` atoms says against the end of the run; ``error`` : of G,
    eV/atom.

    What is left is measured in energy and in the parameter itself, each by its own stiffness; noise
    is not left to relax, but so much of it that nothing is known is no end either.
    """
    settings, issues = task.settings, []
    strain = np.abs(averages.strain)
    off = np.abs(ev_per_a3_to_gpa(averages.stress) + np.eye(3) * task.pressure).max()
    if np.any(strain > np.maximum(settings.strain_tolerance, SIGNIFICANT * averages.strain_error)):
        issues.append(
            f"stress {off:.2f} GPa off the target, a strain of {100 * strain.max():.2g} %"
        )
    elif (
        settings.cell == "variable"
        and settings.pressure_tolerance is not None
        and off >= settings.pressure_tolerance
    ):
        issues.append(f"stress {off:.2f} GPa off the target")
    shift = np.abs(averages.shift)
    if np.any(
        shift > np.maximum(settings.centroid_tolerance, SIGNIFICANT * averages.position_error)
    ):
        issues.append(f"centroids are still to move by {shift.max():.3f} A")
    if not np.all(averages.position_error < LARGEST_POSITION_ERROR):
        issues.append(f"centroids are known to {averages.position_error.max():.2f} A only")
    if not np.all(averages.strain_error < LARGEST_STRAIN_ERROR):
        issues.append(f"the cell is known to {100 * averages.strain_error.max():.0f} % only")
    if averages.predicted_decrease / n >= max(settings.free_energy_tolerance, error):
        issues.append(
            f"predicted decrease of G: {ev_to_mev(averages.predicted_decrease / n):.2f} meV/atom"
        )
    elif not correctable(averages, n):
        issues.append(
            f"the height above the minimum is known to {ev_to_mev(averages.minimum_error / n):.1f}"
            " meV/atom only"
        )
    return issues


def gibbs_energy(state: SschaState, averages: Averages, pressure: GPa) -> tuple[float, float]:
    """(F + P V)/N without finite-size term, and its standard error, eV/atom; ``pressure`` in GPa.

    Of the minimum that the state is near: what it lies above that is known from the gradients
    (`Averages.predicted_decrease`) and taken off. Of the state itself, an upper bound, where that
    is not `correctable`.
    """
    n = len(state.atoms)
    plain = (averages.helmholtz + gpa_to_ev_per_a3(pressure) * state.atoms.get_volume()) / n
    if not correctable(averages, n):
        return float(plain), averages.helmholtz_error / n
    return float(plain - averages.predicted_decrease / n), averages.minimum_error / n


def pressure_of(averages: Averages) -> GPa:
    """Of the ensemble, GPa."""
    return float(ev_per_a3_to_gpa(-np.trace(averages.stress) / 3.0))


def centroid_tolerance(state: SschaState, averages: Averages) -> float:
    """Tolerance in A for the space group of the centroids, from their error and what is left of the
    relaxation."""
    strain = float(np.max(np.abs(averages.strain) + 2.0 * averages.strain_error, initial=0.0))
    error = averages.position_error + np.abs(averages.shift) / 3.0
    return statistical_tolerance(error, strain, float(state.atoms.cell.lengths().max()))


def finished_result(
    task: Task,
    state: SschaState,
    averages: Averages,
    progress: Progress,
    start: Start,
    reason: str,
    group: str,
    began: float,
) -> SschaResult:
    """The result of a run with a usable last state; ``reason`` is empty when it has converged.

    ``group`` : its space group, where that was decided (`unstable`); else that of the centroids
    within their error.
    """
    n = len(state.atoms)
    nonanalytic = fitted(state.atoms, task.settings.born)
    finite = finite_size_term(state, task.settings.reference_spacing, nonanalytic)
    raw, error = gibbs_energy(state, averages, task.pressure)
    volume = float(state.atoms.get_volume() / n)
    tolerance = centroid_tolerance(state, averages)
    gibbs, done = raw + finite.term / n, len(progress.gibbs)
    return SschaResult(
        status="unconverged" if reason else "converged",
        reason=f"not converged after {done} population{'s' * (done > 1)}: {reason}"
        if reason
        else "",
        gibbs=gibbs,
        gibbs_error=error,
        gibbs_raw=raw,
        finite_size=finite.term / n,
        nonanalytic=None if finite.dipoles is None else finite.dipoles / n,
        helmholtz=gibbs - gpa_to_ev_per_a3(task.pressure) * volume,
        volume=volume,
        stress=averages.stress,
        stress_error=averages.stress_error,
        force=averages.force,
        force_error=averages.force_error,
        pressure=pressure_of(averages),
        predicted_decrease=max(0.0, averages.predicted_decrease) / n,
        centroids=state.atoms.copy(),
        position_error=float(np.max(averages.position_error)),
        space_group_start=space_group(start.state.atoms, 0.01),
        space_group=group or space_group(state.atoms, tolerance),
        symmetry_tolerance=tolerance,
        n_atoms_supercell=n * state.n_cells,
        supercell=state.supercell_matrix,
        interpolated_imaginary=finite.imaginary,
        force_constants=state.force_constants,
        charges=None if nonanalytic is None else nonanalytic.charges,
        dielectric=None if nonanalytic is None else nonanalytic.dielectric,
        **_of_any(task, progress, began),
    )


def failed_result(task: Task, reason: str, progress: Progress, began: float) -> SschaResult:
    """The result of a run without a usable state, with the numbers of its last population
    (finite-size term left out)."""
    last = progress.rows[-1] if progress.rows else {}

    def known(name: str) -> float | None:
        return float(last[name]) if math.isfinite(last.get(name, math.nan)) else None

    atoms: Atoms = stripped(task.atoms)
    found = space_group(atoms, task.settings.symprec)
    return SschaResult(
        status="failed",
        reason=reason,
        gibbs_raw=known("gibbs_eV_per_atom"),
        gibbs_error=known("error_eV_per_atom"),
        volume=known("volume_A3_per_atom"),
        pressure=known("pressure_GPa"),
        predicted_decrease=known("predicted_decrease_eV_per_atom"),
        centroids=atoms,
        space_group_start=found,
        space_group=found,
        symmetry_tolerance=task.settings.symprec,
        **_of_any(task, progress, began),
    )


def _of_any(task: Task, progress: Progress, began: float) -> dict[str, Any]:
    """What a result has of its task and of what it took, finished or failed."""
    return {
        "target_pressure": task.pressure,
        "temperature": task.temperature,
        "n_evaluations": progress.n_evaluations,
        "n_surrogate": progress.n_surrogate,
        "n_populations": len(progress.gibbs),
        "n_configs": task.settings.n_configs,
        "model_id": task.model_id,
        "seconds": time.perf_counter() - began,
    }
