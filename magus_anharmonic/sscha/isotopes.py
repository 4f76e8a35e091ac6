"""Other masses for nothing: the ensemble of a converged run, reweighted to the Gaussian that the
new masses give.

Energies and forces do not depend on masses, so a run with other isotopes can be averaged over the
configurations of the first. That holds as far as the two Gaussians overlap, which falls
exponentially with the number of modes: from H to D each mode of an H atom takes 4.4 per cent of the
sample (variances fall by sqrt(2) at 0 K, and 1 / (s sqrt(2/s - 1)) = 1.046 for s = 1/sqrt(2)), so
that 36 modes leave 0.2 and 72 leave 0.04. Below that, new populations are drawn from the centroids,
force constants and cell of the first run.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh

from magus_anharmonic.sscha.cell import CellStiffness
from magus_anharmonic.sscha.engines import minimise
from magus_anharmonic.sscha.ensemble import Averages, Ensemble, average
from magus_anharmonic.sscha.initial_state import SYMMETRY_OF_A_STATE, supercell_of, with_masses
from magus_anharmonic.sscha.result import (
    Progress,
    RunFolder,
    SschaResult,
    final_ensemble,
    read_start_file,
)
from magus_anharmonic.sscha.reweight import Pool, effective_number
from magus_anharmonic.sscha.start import Start
from magus_anharmonic.sscha.state import SschaState, agree
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import Task, finished_result, gibbs_energy, open_issues
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)

EFFECTIVE_SAMPLE = 0.2
"""Part of the configurations that must count after reweighting; below it the weights' own noise
makes the error bar doubtful."""


def reweighted_result(task: Task, source: Any, folder: RunFolder) -> SschaResult | None:
    """The result of ``task`` from the ensemble of the run in ``source`` alone, without any
    evaluation; None where that does not do.

    Only where nothing but the masses is another (model, temperature and supercell the same, the run
    converged and its populations kept), and the sample, the stress, the remaining decrease and the
    error are good enough for a converged run; which of these was not is logged. The numbers are
    those of a state that the configurations it is averaged over have not seen: that of ``source``
    with the new masses, or where that has further to go, one that half of the configurations led to
    and the other half averages.
    """
    began = time.perf_counter()
    found = _source(task, source)
    if found is None:
        return None
    start, ensemble, own = found
    symmetry = Symmetry(start.state.atoms, start.state.supercell_matrix, SYMMETRY_OF_A_STATE)
    cell = start.stiffness(symmetry, task.pressure)
    state, averages, sample = start.state, *_averaged(own, ensemble, start.state, symmetry, cell)
    sample = min(sample, overlap(own, state))
    problem = (
        "" if sample > EFFECTIVE_SAMPLE else f"ESS/N = {sample:.2f}, not above {EFFECTIVE_SAMPLE:g}"
    )
    if not problem and (problem := _problem(task, state, averages)):
        first, second = _halves(ensemble)
        state = minimise(
            [(own, first)], symmetry, min_effective_sample=EFFECTIVE_SAMPLE, target=start.state
        ).state
        averages, sample = _averaged(own, second, state, symmetry, cell)
        problem = (
            f"ESS/N = {sample:.2f}"
            if sample <= EFFECTIVE_SAMPLE
            else _problem(task, state, averages)
        )
    if problem:
        log.info(
            "other masses: reweighting the ensemble of %s does not do (%s); new populations",
            source,
            problem,
        )
        return None
    log.info(
        "other masses: reweighted from the ensemble of %s (ESS/N = %.2f), no new configurations",
        source,
        sample,
    )
    result = finished_result(task, state, averages, Progress(), start, "", "", began)
    result = replace(
        result,
        reason=(
            f"reweighted from the ensemble of {Path(source).name} (ESS/N = {sample:.2f}): no new"
            " configurations"
        ),
    )
    folder.write_start(start)
    folder.write_result(result)
    return result


def _source(task: Task, source: Any) -> tuple[Start, Ensemble, SschaState] | None:
    """Start with the new masses, and ensemble and state of the run in ``source``; None where more
    than the masses is another."""
    if task.start is None or not isinstance(source, str | Path) or not Path(source).is_dir():
        return None
    path, result, state = Path(source), SschaResult.read(source), task.start
    structure = with_masses(state.atoms, task.atoms, task.masses)
    if np.allclose(structure.get_masses(), state.atoms.get_masses(), atol=1e-6, rtol=0.0):
        return None
    if (
        not result.converged
        or result.model_id != task.model_id
        or state.temperature != task.temperature
    ):
        return None
    ensemble, begun = final_ensemble(path, result), path / "start.npz"
    if (
        supercell_of(structure, task.settings) != state.supercell_matrix
        or ensemble is None
        or not begun.is_file()
    ):
        return None
    response = read_start_file(begun).response
    if task.settings.cell == "variable" and response is None:
        return None
    response = response if task.settings.cell == "variable" else None
    return Start(replace(state, atoms=structure), response, 0), ensemble, state


def overlap(own: SschaState, other: SschaState) -> float:
    """ESS/N that many configurations of ``own`` have for ``other``, a state of the same centroids.

    1 / integral(q^2 / p) of the two Gaussians = product of sqrt(2 l - 1) / l over the eigenvalues l
    of one precision in the metric of the other; 0 where one is below 1/2 and the integral diverges.
    A small sample does not know its own tails and shows more.
    """
    n = len(own.supercell)
    translations = np.tile(np.eye(3), (n, n)) * (np.trace(own.precision) / (3.0 * n) / n)
    values = eigh(other.precision + translations, own.precision + translations, eigvals_only=True)
    return (
        float(np.exp(np.sum(0.5 * np.log(2.0 * values - 1.0) - np.log(values))))
        if values.min() > 0.5
        else 0.0
    )


def _halves(ensemble: Ensemble) -> tuple[Ensemble, Ensemble]:
    """Every other pair, and the rest."""
    pairs = np.arange(len(ensemble.energies)) // 2
    return ensemble.part(pairs % 2 == 0), ensemble.part(pairs % 2 == 1)


def _averaged(
    own: SschaState,
    ensemble: Ensemble,
    state: SschaState,
    symmetry: Symmetry,
    cell: CellStiffness | None,
) -> tuple[Averages, float]:
    """Averages of ``state`` over an ensemble of ``own`` (the same cell), and the effective part of
    the sample."""
    about, weights = reweighted(own, ensemble, state)
    return average(state, about, symmetry, weights, cell), effective_number(weights) / len(weights)


def reweighted(
    own: SschaState, ensemble: Ensemble, state: SschaState
) -> tuple[Ensemble, np.ndarray]:
    """The ensemble of ``own`` as one about the centroids of ``state`` (the same cell), and the
    weights it has there."""
    pool = Pool([(own, ensemble)], target=state)
    shift = state.atoms.positions - own.atoms.positions
    about = replace(
        ensemble, displacements=ensemble.displacements - np.tile(shift, (state.n_cells, 1))
    )
    return about, pool.weights(pool.own)


def reweighted_ensemble(
    source: str | Path, state: SschaState
) -> tuple[Ensemble, np.ndarray] | None:
    """What `reweighted_result` averaged ``state`` over: displacements about its centroids, and
    weights (n,).

    ``source`` : the run that the ensemble is of. None where it is not there, or of another cell or
    temperature than ``state``.
    """
    path = Path(source)
    if not (path / "result.json").is_file():
        return None
    result = SschaResult.read(path)
    ensemble = None if result.force_constants is None else final_ensemble(path, result)
    if ensemble is None:
        return None
    own = result.state
    if own.temperature != state.temperature or not agree(own, state, "cell", atol=1e-9):
        return None
    unmoved = agree(own, state, "force_constants", atol=1e-9)
    return reweighted(own, ensemble if unmoved else _halves(ensemble)[1], state)


def _problem(task: Task, state: SschaState, averages: Averages) -> str:
    """Why these averages are not the end of a run; empty where they are."""
    _, error = gibbs_energy(state, averages, task.pressure)
    issues = open_issues(averages, error, len(state.atoms), task)
    tolerance = task.settings.error_tolerance
    if tolerance is not None and error > tolerance:
        issues.append(
            f"error of G {ev_to_mev(error):.2f} meV/atom, wanted {ev_to_mev(tolerance):.2f}"
        )
    return "; ".join(issues)
