"""``free_energy``: SSCHA relaxation of centroids, force constants and cell of one structure; F, V,
stress, G = (F + PV)/N."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import (
    InputError,
    MagusAnharmonicError,
    SschaError,
    is_machine_error,
    typed_line,
)
from magus_anharmonic.evaluator import Evaluator, as_evaluator
from magus_anharmonic.settings import SschaSettings, check_pressure, parse
from magus_anharmonic.sscha.initial_state import check_crystal, configurations_of, read_state
from magus_anharmonic.sscha.isotopes import reweighted_result
from magus_anharmonic.sscha.result import Progress, RunFolder, SschaResult
from magus_anharmonic.sscha.run import SschaRun
from magus_anharmonic.sscha.supercells import image_warning
from magus_anharmonic.sscha.task import Task, failed_result
from magus_anharmonic.units import GPa

log = logging.getLogger(__name__)


DEFAULTS = SschaSettings()
"""What `free_energy` takes where nothing is said: the defaults of the block ``sscha``."""


def free_energy(
    atoms: Atoms,
    evaluator: Any,
    pressure: GPa = 0.0,
    temperature: float = 0.0,
    supercell: Any = DEFAULTS.supercell,
    cell: str = DEFAULTS.cell,
    n_configs: int = DEFAULTS.n_configs,
    max_populations: int = DEFAULTS.max_populations,
    engine: str = DEFAULTS.engine,
    seed: int = 0,
    masses: Mapping[str, float] | None = None,
    start: Any = None,
    directory: str | Path | None = None,
    any_start: bool = False,
    **tolerances: float,
) -> SschaResult:
    """SSCHA free energy of ``atoms`` at ``pressure`` (GPa) and ``temperature`` (K).

    Parameters
    ----------
    evaluator
        Our ``Potential``, any ASE calculator, or a labeler.
    supercell
        Three repetitions of the primitive cell, or ``{"min_length": Angstrom}``.
    cell
        ``"variable"`` relaxes the cell at the pressure, ``"fixed"`` keeps it.
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
        matrices (``.../dyn_pop5_``). Of the folder of another model's run the configurations of the
        last state are evaluated again, before any is drawn. Of the folder of a run with other
        masses they are reweighted, without any evaluation, where that is enough (`isotopes`).
    directory
        Where the files of the run go; the same run started again there continues. None: nothing is
        kept.
    any_start
        A run in ``directory`` that differs in its start alone is the same run (its minimum does not
        depend on where it began): it is taken as it is, or goes on. Else it is refused.
    tolerances
        ``pressure_tolerance`` (GPa), ``free_energy_tolerance`` and ``error_tolerance`` (eV/atom),
        ``n_configs_start``, ``min_effective_sample``, ``symprec`` (A), ``reference_spacing`` (2 pi
        / A); defaults and meaning as in the block ``sscha`` of the input.

    Returns
    -------
    SschaResult
        Also for runs that fail or do not converge: see its ``status`` and ``reason``.

    Raises
    ------
    InputError
        A wrong argument, or a folder that holds another run.
    """
    settings = parse(
        SschaSettings,
        dict(
            supercell=supercell,
            cell=cell,
            n_configs=n_configs,
            max_populations=max_populations,
            engine=engine,
            **tolerances,
        ),
        "sscha",
    )
    check_crystal(atoms, masses)
    try:
        pressure = check_pressure(pressure)
        source = as_evaluator(evaluator, [atoms])
    except (ValueError, TypeError) as error:
        raise InputError(
            f"pressure: {error}" if isinstance(error, ValueError) else f"evaluator: {error}"
        ) from None
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not 0 <= temperature < np.inf
    ):
        raise InputError(
            f"sscha.temperature: {temperature!r}: must be one number in K, not below 0"
        )
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
        )
        kept = directory is not None
        folder = RunFolder(
            directory if kept else scratch, task.identity(), any_start=any_start, kept=kept
        )
        return folder.finished(settings.max_populations, settings.error_tolerance) or _guarded(
            task, source, folder, start
        )


def _guarded(task: Task, evaluator: Evaluator, folder: RunFolder, start: Any) -> SschaResult:
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
