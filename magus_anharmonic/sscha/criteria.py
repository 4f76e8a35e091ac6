"""When an SSCHA run has converged, and why it has not."""

from __future__ import annotations

import numpy as np

from magus_anharmonic.sscha.averages import Averages
from magus_anharmonic.sscha.task import Progress, Task
from magus_anharmonic.units import EV_PER_A3_IN_GPA

SIGNIFICANT = 2.0
"""Standard errors beyond which something left of the relaxation counts."""
LARGEST_CORRECTION = 5e-3
"""eV/atom: further from the minimum, or less well known, its height cannot be told by the gradients."""
LARGEST_POSITION_ERROR = 0.1
"""Angstrom: centroids that are known less well are not known at all."""
LARGEST_STRAIN_ERROR = 0.1


def correctable(averages: Averages, n: int) -> bool:
    """Whether what a state of ``n`` atoms lies above the minimum is small enough, and known well enough, to be taken off."""
    height, error = averages.decrease / n, (averages.minimum_error - averages.helmholtz_error) / n
    return bool(abs(height) < LARGEST_CORRECTION and error < LARGEST_CORRECTION)


def unconverged(averages: Averages, progress: Progress, n: int, task: Task) -> str:
    """Why the run of a cell of ``n`` atoms has to go on; empty when it has converged.

    The last two populations agree when their G, each an estimate of the same minimum, differ by no more than their errors.
    """
    gibbs, error = progress.gibbs[-1]
    issues = open_issues(averages, error, n, task)
    if len(progress.gibbs) < 2:
        issues.append("one population")
    else:
        before, error_before = progress.gibbs[-2]
        if not abs(gibbs - before) <= SIGNIFICANT * np.hypot(error, error_before) + 1e-6:
            issues.append(f"G changed by {(gibbs - before) * 1e3:.2f} meV/atom in the last population")
    return "; ".join(issues)


def open_issues(averages: Averages, error: float, n: int, task: Task) -> list[str]:
    """What one ensemble of a cell of ``n`` atoms says against the end of the run; ``error`` : of G, eV/atom.

    What is left is measured in energy and in the parameter itself, each by its own stiffness; noise is not left to relax, but so
    much of it that nothing is known is no end either.
    """
    settings, issues = task.settings, []
    strain = np.abs(averages.strain)
    off = np.abs(averages.stress * EV_PER_A3_IN_GPA + np.eye(3) * task.pressure).max()
    if np.any(strain > np.maximum(settings.strain_tolerance, SIGNIFICANT * averages.strain_error)):
        issues.append(f"stress {off:.2f} GPa off the target, a strain of {100 * strain.max():.2g} %")
    elif settings.cell == "variable" and settings.pressure_tolerance is not None and off >= settings.pressure_tolerance:
        issues.append(f"stress {off:.2f} GPa off the target")
    shift = np.abs(averages.shift)
    if np.any(shift > np.maximum(settings.centroid_tolerance, SIGNIFICANT * averages.position_error)):
        issues.append(f"centroids are still to move by {shift.max():.3f} A")
    if not np.all(averages.position_error < LARGEST_POSITION_ERROR):
        issues.append(f"centroids are known to {averages.position_error.max():.2f} A only")
    if not np.all(averages.strain_error < LARGEST_STRAIN_ERROR):
        issues.append(f"the cell is known to {100 * averages.strain_error.max():.0f} % only")
    if averages.decrease / n >= max(settings.free_energy_tolerance, error):
        issues.append(f"G may still fall by {averages.decrease / n * 1e3:.2f} meV/atom")
    elif not correctable(averages, n):
        issues.append(f"the height above the minimum is known to {averages.minimum_error / n * 1e3:.1f} meV/atom only")
    return issues
