"""When an SSCHA run has converged, and why it has not."""

from __future__ import annotations

import numpy as np

from magus_anharmonic.sscha.averages import Averages
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.task import Progress, Task
from magus_anharmonic.units import EV_PER_A3_IN_GPA


def unconverged(state: SschaState, averages: Averages, progress: Progress, task: Task, promised: float) -> str:
    """Why the run has to go on; empty when it has converged.

    The last two populations agree when G neither rose nor fell by more than their errors, after what the step between them
    had ``promised`` (eV/atom): a fall that was foreseen is no sign of drift.
    """
    gibbs, error = progress.gibbs[-1]
    issues = open_issues(averages, error, len(state.atoms), task)
    if len(progress.gibbs) < 2:
        issues.append("one population")
    else:
        before, error_before = progress.gibbs[-2]
        noise = 2.0 * np.hypot(error, error_before) + 1e-6
        if not -noise - max(0.0, promised) <= gibbs - before <= noise:
            issues.append(f"G changed by {(gibbs - before) * 1e3:.2f} meV/atom in the last population")
    return "; ".join(issues)


def open_issues(averages: Averages, error: float, n: int, task: Task) -> list[str]:
    """What one ensemble of a cell of ``n`` atoms says against the end of the run; ``error`` : of G, eV/atom."""
    settings, issues = task.settings, []
    if settings.cell == "variable":
        deviation = np.abs(averages.stress * EV_PER_A3_IN_GPA + np.eye(3) * task.pressure).max()
        if deviation >= settings.pressure_tolerance:
            issues.append(f"stress {deviation:.2f} GPa off the target")
    if averages.decrease / n >= max(settings.free_energy_tolerance, error):
        issues.append(f"G may still fall by {averages.decrease / n * 1e3:.2f} meV/atom")
    return issues
