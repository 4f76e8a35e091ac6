"""``magus-anharmonic rank --start-dyn PREFIX --load-ensemble FOLDER``: one candidate that SSCHA users bring with them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import InputError, SschaError, one_line
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.files import rank_alone
from magus_anharmonic.settings import Settings
from magus_anharmonic.sscha.averages import Ensemble, average
from magus_anharmonic.sscha.begin import state_digest
from magus_anharmonic.sscha.isotopes import reweighted
from magus_anharmonic.sscha.native import minimise
from magus_anharmonic.sscha.qe_files import generating_matrices, read_ensemble, state_from_dyn
from magus_anharmonic.sscha.reweight import effective_number
from magus_anharmonic.sscha.start import LARGEST_AMPLITUDE_LATER, floor_modes
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import bare, structure_id
from magus_anharmonic.units import EV_PER_A3_IN_GPA

log = logging.getLogger(__name__)

SMALLEST = 4
"""Configurations of an ensemble."""


def check_sources(structures: Path | None, dyn: str | None, ensemble: Path | None) -> None:
    """Raise ``InputError`` unless there is either a file of structures or a start of one candidate."""
    given = dyn is not None or ensemble is not None
    if structures is None and not given:
        raise InputError("structures: give a file of structures, or the start of one candidate with --start-dyn or --load-ensemble")
    if structures is not None and given:
        raise InputError(f"{structures}: --start-dyn and --load-ensemble bring their structure with them; leave the file out")


def rank_start(dyn: str | None, ensemble: Path | None, settings: Settings, output: str | Path) -> list[Candidate]:
    """SSCHA of one candidate from the state of ``dyn`` (prefix of dynamical matrices), or of ``ensemble`` after minimising on it.

    The structure is not relaxed statically before, and the supercell is that of the files unless ``sscha.supercell`` is a length.
    Raises ``InputError`` (files that are missing, damaged or do not fit, a folder of another start or process) before any work.
    """
    if settings.sscha is None or settings.calculator is None:
        raise InputError("MainCalculator, sscha: --start-dyn and --load-ensemble need both blocks")
    sscha = settings.sscha
    state = read_start(dyn, ensemble, sscha.temperatures[0], settings.pressure, sscha.min_effective_sample)
    if not isinstance(sscha.supercell, dict):
        settings = settings.model_copy(update={"sscha": sscha.model_copy(update={"supercell": state.repeats})})
    sources = {"start_dyn": dyn and str(dyn), "load_ensemble": ensemble and str(ensemble), "start": state_digest(state)}
    structure = bare(state.atoms)
    return rank_alone([structure], settings, settings.calculator, output, sources, relax=False, starts={structure_id(structure): state})


def read_start(dyn: str | None, ensemble: Path | None, temperature: float, pressure: float, min_effective_sample: float) -> SschaState:
    """The state to start from at ``temperature`` (K); with an ensemble the one that minimising on it leads to (cell fixed).

    With both the ensemble is reweighted from the matrices that drew it, which its folder holds, to ``dyn``, and minimised from there. What
    it says about that state, at ``pressure`` (GPa), is logged. Raises ``InputError``.
    """
    if ensemble is None:
        if dyn is None:
            raise InputError("start: neither dynamical matrices nor an ensemble")
        return state_from_dyn(dyn, temperature)
    own, drawn = read_ensemble(ensemble, temperature, dyn=None if generating_matrices(ensemble) else dyn)
    count = len(drawn.energies)
    if count < SMALLEST:
        raise InputError(f"--load-ensemble: {ensemble}: {count} configurations; must be at least {SMALLEST}")
    begin = own if dyn is None else state_from_dyn(dyn, temperature)
    _require_reweightable(own, begin, f"--start-dyn {dyn}, --load-ensemble {ensemble}")
    symmetry = Symmetry(begin.atoms, begin.repeats)
    begin = replace(begin, force_constants=symmetry.force_constants(begin.force_constants))
    try:
        about, weights = reweighted(own, drawn, begin)
        sample = effective_number(weights) / count
        if sample < min_effective_sample:
            raise InputError(
                f"--load-ensemble: {ensemble}: of its configurations {100 * sample:.0f} per cent count for {dyn} (at least "
                f"{100 * min_effective_sample:.0f} are needed): give one of the two alone"
            )
        log.info("%s: %s", ensemble, what_it_says(begin, about, weights, symmetry, pressure))
        better = minimise([(own, drawn)], symmetry, min_effective_sample=min_effective_sample, target=begin).state
    except (SschaError, np.linalg.LinAlgError) as error:
        raise InputError(f"--load-ensemble: {ensemble}: {one_line(error)}") from None
    return floor_modes(better, symmetry, LARGEST_AMPLITUDE_LATER)


def _require_reweightable(own: SschaState, other: SschaState, where: str) -> None:
    """Raise ``InputError`` unless an ensemble of ``own`` can be averaged for ``other``: one crystal, cell, supercell and set of masses."""
    pairs = {
        "supercell": (np.array(own.repeats), np.array(other.repeats)),
        "species or their order": (own.atoms.numbers, other.atoms.numbers),
        "masses": (own.atoms.get_masses(), other.atoms.get_masses()),
        "cell": (own.atoms.cell.array, other.atoms.cell.array),
    }
    for name, (one, two) in pairs.items():
        if one.shape != two.shape or not np.allclose(one, two, rtol=0.0, atol=1e-4):
            raise InputError(
                f"{where}: the {name} of the matrices is another one than that of the ensemble's own; give one of the two alone"
            )


def what_it_says(state: SschaState, ensemble: Ensemble, weights: np.ndarray, symmetry: Symmetry, pressure: float) -> str:
    """F, error and pressure of the state by an ensemble about its centroids; energies are those of whatever surface made it."""
    averages, n = average(state, ensemble, symmetry, weights), len(state.atoms)
    found = -np.trace(averages.stress) / 3.0 * EV_PER_A3_IN_GPA
    stress = f"pressure {found:.2f} GPa (wanted: {pressure:g})" if np.isfinite(found) else "no stress"
    return (
        f"{len(weights)} configurations, F = {averages.helmholtz / n:.5f} +- {averages.helmholtz_error / n:.5f} eV/atom (energy surface "
        f"and zero of that ensemble, ESS/N = {effective_number(weights) / len(weights):.2f}), {stress}; it improves the start, G comes "
        "from fresh ensembles of the model"
    )
