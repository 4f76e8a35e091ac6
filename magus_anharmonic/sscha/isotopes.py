"""Other masses: the free energy on the configurations that a run with other masses evaluated.

V depends on no mass, so that an ensemble of H is one of D with weights. Where too few of the many
modes overlap, a surrogate of V, fitted to some of the configurations, takes the average over new
ones of its own; the others correct it, with their weights: the few that count are enough for the
small difference (two levels: `ensemble`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import eigh

from magus_anharmonic.sscha.cell import CellStiffness, Start
from magus_anharmonic.sscha.engines import effective_sample, minimise, reweighted
from magus_anharmonic.sscha.ensemble import Averages, Ensemble, average, joined
from magus_anharmonic.sscha.result import (
    Progress,
    RunFolder,
    SschaResult,
    final_ensemble,
    read_start_file,
)
from magus_anharmonic.sscha.start import supercell_of, symmetry_of, with_masses
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import Task, finished_result, gibbs_energy, open_issues
from magus_anharmonic.sscha.two_levels import (
    FEWEST,
    Learner,
    Sampler,
    SurrogateFailed,
    corrections,
    minimised_on,
)
from magus_anharmonic.units import ev_to_mev

log = logging.getLogger(__name__)

EFFECTIVE_SAMPLE = 0.2
"""Part of the configurations that must count after reweighting; below it the weights' own noise
makes the error bar doubtful."""
FITTED = 2 * FEWEST
"""Configurations that a surrogate is fitted to; the others correct it."""
FEWEST_EFFECTIVE = 10.0
"""Of how many configurations those that correct a surrogate must be worth."""
LARGE = 2
"""Configurations of the surrogate over ``n_configs``: they cost next to nothing."""
MINIMISATIONS = 4
"""Samples of the surrogate that lead to the state, at least, in all four times ``n_configs``: a
state that is not at its minimum has another stress."""
NEW_DRAWS = 8317
"""Separates the random numbers of the surrogate's configurations from those of the run's."""


@dataclass(frozen=True)
class _Source:
    """A run with other masses: the ``ensemble`` of the state ``own``, and the ``start`` from there
    with the new masses."""

    start: Start
    own: SschaState
    ensemble: Ensemble


@dataclass(frozen=True)
class _Sample:
    """What ``state`` is averaged over: displacements about its centroids, and weights (n,).

    effective : the part of the source's configurations that count; text : the same in words.
    """

    state: SschaState
    ensemble: Ensemble
    weights: np.ndarray
    effective: float
    text: str
    n_surrogate: int = 0


def reweighted_result(task: Task, source: Any, folder: RunFolder) -> SschaResult | None:
    """The result of ``task`` from the ensemble of the run in ``source`` alone, without any
    evaluation; None where that does not do.

    Only where nothing but the masses is another (model, temperature and supercell the same, the run
    converged and its populations kept), and the sample, the stress, the remaining decrease and the
    error are good enough for a converged run; which of these was not is logged. The numbers are
    those of a state that the configurations it is averaged over have not seen: that of ``source``
    with the new masses; or where that has further to go, one that half of the configurations led to
    and the other half averages; or where too few of them count, one that the task's surrogate leads
    to, averaged over two levels.
    """
    began = time.perf_counter()
    found = _source(task, source)
    if found is None:
        return None
    start = found.start
    symmetry = symmetry_of(start.state.atoms, start.state.supercell_matrix, task.settings)
    cell = start.stiffness(symmetry, task.pressure)
    sample = _of_state(found, start.state, found.ensemble)
    averages, problem = _judged(task, sample, symmetry, cell)
    if problem and sample.effective > EFFECTIVE_SAMPLE:
        sample = _by_halves(found, symmetry)
        averages, problem = _judged(task, sample, symmetry, cell)
    elif problem and task.surrogate is not None:
        try:
            sample = _on_two_levels(task, found, symmetry)
            averages, problem = _judged(task, sample, symmetry, cell)
        except SurrogateFailed as error:
            problem = f"{problem}; surrogate {task.surrogate.name}: {error}"
    if problem or averages is None:
        log.info(
            "other masses: reweighting the ensemble of %s does not do (%s); new populations",
            source,
            problem,
        )
        return None
    reason = (
        f"reweighted from the ensemble of {Path(source).name} ({sample.text}): no new"
        " configurations"
    )
    log.info("other masses: %s", reason)
    progress = Progress(n_surrogate=sample.n_surrogate)
    result = finished_result(task, sample.state, averages, progress, start, "", "", began)
    result = replace(result, reason=reason)
    folder.write_start(start)
    folder.write_reweighted(sample.state, sample.ensemble, sample.weights)
    folder.write_result(result)
    return result


def _source(task: Task, source: Any) -> _Source | None:
    """The run in ``source``; None where more than the masses is another."""
    if task.start is None or not isinstance(source, str | Path) or not Path(source).is_dir():
        return None
    path, result, state = Path(source), SschaResult.read(source), task.start
    structure = with_masses(state.atoms, task.atoms, task.masses)
    if task.settings.centroids == "fixed" and not (
        len(structure) == len(task.atoms)
        and np.allclose(structure.cell.array, task.atoms.cell.array, atol=1e-9)
        and np.allclose(structure.positions, task.atoms.positions, atol=1e-9)
    ):
        return None
    if np.allclose(structure.get_masses(), state.atoms.get_masses(), atol=1e-6, rtol=0.0):
        return None
    ensemble, begun = final_ensemble(path, result), path / "start.npz"
    if (
        not result.converged
        or result.model_id != task.model_id
        or state.temperature != task.temperature
        or supercell_of(structure, task.settings) != state.supercell_matrix
        or ensemble is None
        or not begun.is_file()
    ):
        return None
    response = read_start_file(begun).response if task.settings.cell == "variable" else None
    if task.settings.cell == "variable" and response is None:
        return None
    return _Source(Start(replace(state, atoms=structure), response, 0), state, ensemble)


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


def _of_state(found: _Source, state: SschaState, ensemble: Ensemble) -> _Sample:
    """Some of the source's configurations for ``state``, of the same cell; the closed form counts
    where its centroids are those of the source."""
    about, weights = reweighted(found.own, ensemble, state)
    effective = effective_sample(weights, about.level) / len(weights)
    if state is found.start.state:
        effective = min(effective, overlap(found.own, state))
    return _Sample(state, about, weights, effective, f"ESS/N = {effective:.2f}")


def _by_halves(found: _Source, symmetry: Symmetry) -> _Sample:
    """Every other pair leads to a state, which the rest averages."""
    odd = np.arange(len(found.ensemble.energies)) // 2 % 2 == 1
    state = minimise(
        [(found.own, found.ensemble.part(~odd))],
        symmetry,
        min_effective_sample=EFFECTIVE_SAMPLE,
        target=found.start.state,
    ).state
    return _of_state(found, state, found.ensemble.part(odd))


def _on_two_levels(task: Task, found: _Source, symmetry: Symmetry) -> _Sample:
    """The state that a surrogate leads to, and its own configurations, corrected by those of the
    source; one that is fitted learns from the first `FITTED` of these, which correct nothing.
    Raises ``SurrogateFailed``."""
    ensemble, own, state = found.ensemble, found.own, found.start.state
    if ensemble.two_level or len(ensemble.energies) < 2 * FITTED:
        raise SurrogateFailed(f"no {2 * FITTED} configurations of the truth to learn from")
    assert task.surrogate is not None
    fitted = FITTED if task.surrogate.fit is not None else 0
    chosen = np.arange(len(ensemble.energies)) < fitted
    rest = ensemble.part(~chosen)
    surrogate = Learner(task.surrogate, {1: (own, ensemble.part(chosen))}).before(2)
    assert surrogate is not None
    sampler = Sampler(state, surrogate, [task.seed, NEW_DRAWS], "", surrogate)
    size, least = task.settings.n_configs, task.settings.min_effective_sample
    state, used, _ = minimised_on(sampler, symmetry, 2 * (size // 8), least, rounds=MINIMISATIONS)
    sampler = replace(sampler, state=state)
    effective = overlap(own, state) * len(rest.energies)
    count = f"{effective:.0f} of {len(rest.energies)} configurations count"
    if effective < FEWEST_EFFECTIVE:
        raise SurrogateFailed(f"{count}, {FEWEST_EFFECTIVE:.0f} are needed")
    about, weights = reweighted(own, rest, state)
    level = corrections(about, sampler.at(about.displacements))
    large = sampler.of_surrogate(LARGE * size, 2)
    return _Sample(
        state,
        joined([large, level]),
        np.concatenate([np.ones(len(large.energies)), weights]),
        effective / len(rest.energies),
        f"{count}, and correct the surrogate {task.surrogate.name}",
        used + len(large.energies) + len(rest.energies),
    )


def _judged(
    task: Task, sample: _Sample, symmetry: Symmetry, cell: CellStiffness | None
) -> tuple[Averages | None, str]:
    """Averages of the sample, and why they are not the end of a run, empty where they are; no
    averages where too little of it counts."""
    state = sample.state
    if not sample.n_surrogate and sample.effective <= EFFECTIVE_SAMPLE:
        return None, f"{sample.text}, not above {EFFECTIVE_SAMPLE:g}"
    averages = average(state, sample.ensemble, symmetry, sample.weights, cell)
    _, error = gibbs_energy(state, averages, task.pressure)
    issues = open_issues(averages, error, len(state.atoms), task)
    tolerance = task.settings.error_tolerance
    if tolerance is not None and error > tolerance:
        issues.append(
            f"error of G {ev_to_mev(error):.2f} meV/atom, wanted {ev_to_mev(tolerance):.2f}"
        )
    return averages, "; ".join(issues)
