"""``free_energy``: SSCHA relaxation of centroids, force constants and cell of one structure; F, V,
stress, G = (F + PV)/N."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import (
    InputError,
    MagusAnharmonicError,
    SschaError,
    is_machine_error,
    typed_line,
)
from magus_anharmonic.evaluator import EnergySource, Evaluator, as_evaluator
from magus_anharmonic.notebook import says_in_notebooks
from magus_anharmonic.settings import SschaSettings, check_pressure, parse
from magus_anharmonic.settings.born import Born
from magus_anharmonic.sscha.isotopes import reweighted_result
from magus_anharmonic.sscha.nonanalytic import require_fit
from magus_anharmonic.sscha.result import Progress, RunFolder, SschaResult, stored_identity
from magus_anharmonic.sscha.run import SschaRun
from magus_anharmonic.sscha.start import check_crystal, configurations_of, read_state
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.supercells import SupercellMatrix, image_warning
from magus_anharmonic.sscha.surrogate import Fit, surrogate_of
from magus_anharmonic.sscha.task import Task, failed_result
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)

DEFAULTS = SschaSettings()
"""What `free_energy` takes where nothing is said: the defaults of the block ``sscha``."""


SupercellChoice = SupercellMatrix | dict[Literal["min_length"], float]
"""Repetitions of the primitive cell, or the distance of images, A."""
StartOfRun = SschaResult | SschaState | str | Path
"""What a run may start from."""
SurrogateChoice = str | EnergySource | Fit
"""What may be a surrogate; see `free_energy`."""


@says_in_notebooks
def free_energy(
    atoms: Atoms,
    evaluator: EnergySource,
    pressure: GPa = 0.0,
    temperature: float = 0.0,
    supercell: SupercellChoice = DEFAULTS.supercell,
    cell: Literal["variable", "fixed"] = DEFAULTS.cell,
    n_configs: int = DEFAULTS.n_configs,
    max_populations: int = DEFAULTS.max_populations,
    engine: Literal["native", "python-sscha"] = DEFAULTS.engine,
    seed: int = 0,
    masses: Mapping[str, float] | None = None,
    start: StartOfRun | None = None,
    directory: str | Path | None = None,
    any_start: bool = False,
    *,
    centroids: Literal["relaxed", "fixed"] = DEFAULTS.centroids,
    surrogate: SurrogateChoice = DEFAULTS.surrogate,
    error_tolerance: float | None = DEFAULTS.error_tolerance,
    free_energy_tolerance: float = DEFAULTS.free_energy_tolerance,
    pressure_tolerance: GPa | None = DEFAULTS.pressure_tolerance,
    strain_tolerance: float = DEFAULTS.strain_tolerance,
    centroid_tolerance: float = DEFAULTS.centroid_tolerance,
    min_effective_sample: float = DEFAULTS.min_effective_sample,
    n_configs_start: int | None = DEFAULTS.n_configs_start,
    symprec: float = DEFAULTS.symprec,
    reference_spacing: float = DEFAULTS.reference_spacing,
    born: Born | Mapping[str, str] | Sequence[Born] | None = None,
) -> SschaResult:
    """SSCHA free energy of ``atoms`` at ``pressure`` (GPa) and ``temperature`` (K).

    In a notebook every population is a line below the cell while the run goes on.

    Parameters
    ----------
    evaluator
        Our ``Potential``, any ASE calculator, or a labeler.
    supercell
        Three repetitions of the primitive cell, three rows of whole numbers, or ``{"min_length":
        Angstrom}``.
    cell
        ``"variable"`` relaxes the cell at the pressure, ``"fixed"`` keeps it.
    centroids
        ``"fixed"`` keeps structure and cell exactly as they are given, minimum or not, and
        minimises in the force constants alone: F as a function of the centroids. Its gradient is
        minus ``force`` of the result, its strain derivative ``stress``, both of the last ensemble.
    n_configs, max_populations
        Configurations per ensemble (even: +u/-u pairs; a quarter, at least 20 to 100, while far
        from the minimum), and most ensembles.
    engine
        ``"native"``, or ``"python-sscha"``: who minimises on an ensemble. Ensembles and results are
        ours either way.
    masses
        Isotopes, amu by symbol, e.g. ``{"H": 2.014}``; in place of those that ``atoms`` carries
        (natural elements where it has none).
    start
        Cell, centroids and force constants to start from instead of harmonic ones: an
        `SschaResult`, the folder of a finished run, or the prefix of Quantum ESPRESSO dynamical
        matrices (``.../dyn_pop5_``); with fixed centroids the force constants alone. Of the folder
        of another model's run the configurations of the last state are evaluated again, before any
        is drawn. Of the folder of a run with other masses they are reweighted, without any
        evaluation, where that is enough, alone or with the ``surrogate`` (`sscha.isotopes`).
    directory
        Where the files of the run go; the same run started again there continues. None: nothing is
        kept.
    any_start
        A run in ``directory`` that differs in its start alone is the same run (its minimum does not
        depend on where it began): it is taken as it is, or goes on. Else it is refused.
    error_tolerance, free_energy_tolerance
        eV/atom: the sampling error of G that ends the run (None: none), and the decrease of G that
        may still be predicted at its end.
    pressure_tolerance, strain_tolerance, centroid_tolerance
        GPa, none and Angstrom: how far stress (None: not asked), cell and centroids may still be
        from their end, or twice their errors.
    min_effective_sample
        Effective sample size over ``n_configs`` that ends a minimisation.
    n_configs_start
        Configurations of the first population, doubled up to ``n_configs`` (None: ``n_configs``).
    surrogate
        A cheap energy surface that most configurations are averaged over; a few of the evaluator
        correct it, so that the result is the evaluator's own with fewer of its evaluations
        (`magus_anharmonic.sscha.two_levels`). ``"polynomial"``: fitted to the run's own
        configurations; a checkpoint, an evaluator, an ASE calculator or a function
        ``fit(structures, found) -> Evaluator``, or the import path of one; ``"none"``;
        ``"auto"``: polynomial for a MatterSim potential, the native engine and 100 or more
        ``n_configs``, else none.
        ``n_configs`` is then what the populations are worth, not what is evaluated.
    symprec, reference_spacing
        Angstrom and 2 pi / Angstrom: symmetry of the start, and spacing of the q points of the
        finite-size term.
    born
        Born charges and dielectric tensor for the non-analytic (LO-TO) term: a ``Born`` (from
        arrays: ``Born.of(atoms, charges, dielectric)``) or ``{structure file: BORN file}`` of this
        structure, or a list of ``Born`` of several, of which the nearest is taken, if one is near.

    Returns
    -------
    SschaResult
        Also for runs that fail or do not converge: see its ``converged``, ``status``, ``reason``.

    Raises
    ------
    InputError
        A wrong argument, or a folder that holds another run.
    """
    given = {**locals(), "born": [born] if isinstance(born, Born) else born}
    if surrogate is None:
        surrogate = "none"
    given["surrogate"] = surrogate if isinstance(surrogate, str) else "given"
    settings = parse(SschaSettings, {key: given[key] for key in DEFAULTS.of_a_run()}, "sscha")
    check_crystal(atoms, masses)
    if isinstance(born, Born | Mapping) and settings.born:
        require_fit(atoms, settings.born)
    try:
        pressure = check_pressure(pressure)
        source = as_evaluator(evaluator, [atoms])
    except (ValueError, TypeError) as error:
        raise InputError(
            f"pressure: {error}" if isinstance(error, ValueError) else f"evaluator: {error}"
        ) from None
    if settings.surrogate == "auto":
        earlier = None if directory is None else stored_identity(directory)
        # a run that was begun without goes on without
        begun = earlier is not None and "surrogate" not in earlier
        if begun or not settings.surrogate_pays:
            surrogate = "none"
    cheap = surrogate_of(surrogate, atoms, source)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, Real)
        or not 0 <= temperature < np.inf
    ):
        raise InputError(
            f"sscha.temperature: {temperature!r}: must be one number in K, not below 0"
        )
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed: {seed!r}: must be one whole number, not below 0")
    with tempfile.TemporaryDirectory(prefix="sscha-") as scratch:
        state = None if start is None else read_state(start, float(temperature))
        configurations = configurations_of(start, source.model_id)
        task = Task(
            atoms,
            pressure,
            float(temperature),
            settings,
            int(seed),
            masses,
            state,
            source.model_id,
            configurations,
            cheap,
        )
        folder = RunFolder(
            scratch if directory is None else directory,
            task.identity(),
            any_start=any_start,
            kept=directory is not None,
        )
        return folder.finished(settings.max_populations, settings.error_tolerance) or _guarded(
            task, source, folder, start
        )


def _guarded(
    task: Task, evaluator: Evaluator, folder: RunFolder, start: StartOfRun | None
) -> SschaResult:
    """Run; a failure becomes a result with its reason. Only physics is final: a broken evaluator
    may be repaired.

    Machine errors are raised, and the run goes on from its last population when it is called
    again.
    """
    began = time.perf_counter()
    progress = Progress()
    try:
        if (
            folder.read_progress() is None
            and (found := reweighted_result(task, start, folder)) is not None
        ):
            return found
        run = SschaRun(task, evaluator, folder, progress)
        while (
            not (run.converged and run.precise)
            and run.n_populations < task.settings.max_populations
        ):
            run.advance()
        if warning := image_warning(
            run.state.supercell.cell.array, getattr(evaluator, "cutoff", None)
        ):
            log.warning("%s: %s", task.atoms.get_chemical_formula(), warning)
        return run.finish()
    except InputError:
        raise
    except SschaError as error:
        result = failed_result(task, str(error), progress, began)
        folder.write_result(result)
    except (MagusAnharmonicError, RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        if is_machine_error(error):
            raise
        result = failed_result(task, typed_line(error), progress, began)
    if result.status == "failed":
        log.warning(
            "%s at %g GPa: SSCHA failed: %s",
            task.atoms.get_chemical_formula(),
            task.pressure,
            result.reason,
        )
    return result
