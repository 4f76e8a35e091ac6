"""``magus-anharmonic rank --start-dyn PREFIX --load-ensemble FOLDER``: one candidate that SSCHA users bring with them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from magus_anharmonic.errors import InputError, SschaError
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.files import rank_alone
from magus_anharmonic.settings import Settings
from magus_anharmonic.sscha.averages import Ensemble, average
from magus_anharmonic.sscha.begin import state_digest, with_masses
from magus_anharmonic.sscha.native import minimise
from magus_anharmonic.sscha.qe_files import read_ensemble, state_from_dyn
from magus_anharmonic.sscha.start import LARGEST_AMPLITUDE_LATER, floor_modes
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.structures import bare, structure_id
from magus_anharmonic.units import EV_PER_A3_IN_GPA

log = logging.getLogger(__name__)

SMALLEST = 4
"""Configurations of an ensemble, even: they are averaged in pairs."""


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
    Raises ``InputError`` (files that are missing or do not fit, isotopes, a folder of another start or process) before any work.
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

    What the ensemble says about its own state, at ``pressure`` (GPa), is logged. Raises ``InputError``.
    """
    if ensemble is None:
        if dyn is None:
            raise InputError("start: neither dynamical matrices nor an ensemble")
        state = state_from_dyn(dyn, temperature)
        require_natural_masses(state)
        return state
    state, drawn = read_ensemble(ensemble, temperature, dyn=dyn)
    require_natural_masses(state)
    count = len(drawn.energies)
    if count < SMALLEST or count % 2:
        raise InputError(f"--load-ensemble: {ensemble}: {count} configurations; must be even and at least {SMALLEST}")
    symmetry = Symmetry(state.atoms, state.repeats)
    try:
        log.info("%s: %s", ensemble, what_it_says(state, drawn, symmetry, pressure))
        better = minimise([(state, drawn)], symmetry, min_effective_sample=min_effective_sample).state
    except (SschaError, np.linalg.LinAlgError) as error:
        raise InputError(f"--load-ensemble: {ensemble}: {' '.join(str(error).split())}") from None
    return floor_modes(better, symmetry, LARGEST_AMPLITUDE_LATER)


def require_natural_masses(state: SschaState) -> None:
    """A ranking is of natural elements: refuse the dynamical matrices of isotopes instead of changing their masses unseen."""
    natural = with_masses(state.atoms, None).get_masses()
    for symbol, mass, usual in zip(state.atoms.get_chemical_symbols(), state.atoms.get_masses(), natural, strict=True):
        if abs(mass - usual) > 0.01 * usual:
            raise InputError(
                f"start: {symbol} has the mass {mass:.3f} amu, rank takes {usual:.3f}; isotopes: free_energy(..., masses=) in Python"
            )


def what_it_says(state: SschaState, ensemble: Ensemble, symmetry: Symmetry, pressure: float) -> str:
    """F, error and pressure of the state by its own ensemble; energies are those of whatever surface made it."""
    averages, n = average(state, ensemble, symmetry), len(state.atoms)
    found = -np.trace(averages.stress) / 3.0 * EV_PER_A3_IN_GPA
    stress = f"pressure {found:.2f} GPa (wanted: {pressure:g})" if np.isfinite(found) else "no stress"
    return (
        f"{len(ensemble.energies)} configurations, F = {averages.helmholtz / n:.5f} +- {averages.helmholtz_error / n:.5f} eV/atom "
        f"(energy surface and zero of that ensemble), {stress}; it improves the start, G comes from fresh ensembles of the model"
    )
