"""Structures from files: read, relaxed, evaluated, ranked.

Static energies of structures: evaluation with the newest model, and relaxation towards its minima.

``magus-anharmonic rank --start-dyn PREFIX --load-ensemble FOLDER``: one candidate that SSCHA users
bring with them.

Ranking of structures from anywhere: ``magus-anharmonic rank FILE``, or `rank_structures` in a
script.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, SschaError, one_line
from magus_anharmonic.evaluator import (
    EnergySource,
    Evaluation,
    Evaluator,
    as_evaluator,
    evaluate_each,
    has_stress,
    set_energy_error,
)
from magus_anharmonic.gate import check_structures, read_sources
from magus_anharmonic.notebook import says_in_notebooks
from magus_anharmonic.ranking.candidate import RankingTable, write_relaxed
from magus_anharmonic.ranking.evaluators import ranking_evaluators
from magus_anharmonic.ranking.jobs import Workers
from magus_anharmonic.ranking.rank import Truth, rank
from magus_anharmonic.ranking.uncertainty import ModelTerm
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.runs.lock import locked
from magus_anharmonic.runs.record import check_results_version, read_run_record, write_run_record
from magus_anharmonic.scheduler import open_scheduler
from magus_anharmonic.settings import (
    CalculatorSettings,
    RelaxationSettings,
    Settings,
    is_evaluator,
    parse_calculator,
)
from magus_anharmonic.sscha.engines import effective_number, minimise, reweighted
from magus_anharmonic.sscha.ensemble import Ensemble, average
from magus_anharmonic.sscha.qe_files import generating_matrices, read_ensemble, state_from_dyn
from magus_anharmonic.sscha.result import SschaResult
from magus_anharmonic.sscha.state import (
    LARGEST_AMPLITUDE_LATER,
    SschaState,
    floor_modes,
    state_digest,
)
from magus_anharmonic.sscha.symmetry import Symmetry
from magus_anharmonic.sscha.task import pressure_of
from magus_anharmonic.structures import stripped, structure_id
from magus_anharmonic.units import GPa, gpa_to_ev_per_a3

log = logging.getLogger(__name__)


def reevaluate(
    structures: Sequence[Atoms], evaluator: Evaluator, settings: Settings, relaxation_steps: int = 0
) -> None:
    """Energy (eV), its expected error and enthalpy (eV/atom), forces, stress (Voigt) and model into
    the ``info`` of each structure.

    Structures that another model relaxed are first brought nearer to the minimum of this one,
    ``relaxation_steps`` at most. One that cannot be evaluated gets an infinite enthalpy and the
    reason: it is out of every ranking.
    """
    foreign = [atoms for atoms in structures if atoms.info.get("model") != evaluator.model_id]
    if foreign and relaxation_steps > 0:
        for reason in relax_inplace(foreign, evaluator, settings, relaxation_steps):
            if reason:
                log.info("a survivor stays as it was, the new model does not relax it: %s", reason)
    for atoms, found in zip(structures, _evaluate_each(structures, evaluator), strict=True):
        atoms.info["model"] = evaluator.model_id
        set_energy_error(atoms, None if isinstance(found, str) else found.error_of(0))
        if isinstance(found, str):
            log.warning("a survivor cannot be evaluated and is out of the ranking: %s", found)
            atoms.info.update(enthalpy=np.inf, reason=found)
            continue
        energy, forces, stress = float(found.energy[0]), found.forces[0], found.stress[0]
        work = gpa_to_ev_per_a3(settings.pressure) * atoms.get_volume()
        voigt = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        atoms.info.update(
            energy=energy,
            enthalpy=(energy + work) / len(atoms),
            forces=np.array(forces),
            stress=np.array(voigt),
        )
        if atoms.calc is not None:
            _renew_results(atoms, energy, forces, voigt)


def _renew_results(atoms: Atoms, energy: float, forces: np.ndarray, stress: np.ndarray) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=stress)


def _evaluate_each(structures: Sequence[Atoms], evaluator: Evaluator) -> list[Evaluation | str]:
    """As `evaluate_each`, where numbers that are not finite are a reason too."""
    found = evaluate_each(evaluator, [stripped(atoms) for atoms in structures])
    with_stress = any(not isinstance(one, str) and has_stress(one) for one in found)
    return [
        one
        if isinstance(one, str)
        or np.isfinite(one.energy).all()
        and np.isfinite(one.forces[0]).all()
        and (not with_stress or np.isfinite(one.stress).all())
        else "energy, forces or stress are not finite"
        for one in found
    ]


def _relaxation_block(settings: Settings) -> RelaxationSettings:
    """Where it is said how to relax with what is ranked by: the block of the calculator, or the
    defaults where it is one of MAGUS's own."""
    named = None if settings.on_free_energy else settings.evaluator
    block = named or settings.calculator
    if block is None and is_evaluator(str(settings.main_calculator.get("calculator", ""))):
        block = parse_calculator(settings.main_calculator, "MainCalculator")
    return block or CalculatorSettings()


def relax_inplace(
    structures: Sequence[Atoms],
    evaluator: Evaluator,
    settings: Settings,
    max_steps: int | None = None,
) -> list[str]:
    """Relax cell and positions at the target pressure as the block of the calculator says, in
    ``max_steps`` at most (None: the block's).

    Returns one reason per structure, empty where it went well; a structure that dissolves, overlaps
    or runs away stays as it was.
    """
    from magus_anharmonic.potential.relax import relax_on, relax_options

    options = relax_options(_relaxation_block(settings))
    if max_steps is not None:
        options["max_steps"] = max_steps
    with open_scheduler(settings) as scheduler:
        relaxed = relax_on(
            scheduler,
            evaluator,
            [stripped(atoms, constraints=True) for atoms in structures],
            settings.pressure,
            **options,
        )
    for atoms, result in zip(structures, relaxed, strict=True):
        if not result.failed:
            atoms.set_cell(result.atoms.cell.array, scale_atoms=False)
            atoms.positions = result.atoms.positions
    return [
        (result.reason or "the relaxation failed") if result.failed else "" for result in relaxed
    ]


SMALLEST = 4
"""Configurations of an ensemble."""


def check_sources(structures: Sequence[str], dyn: str | None, ensemble: Path | None) -> None:
    """Raise ``InputError`` unless there is either a file of structures or a start of one
    candidate."""
    given = dyn is not None or ensemble is not None
    if not structures and not given:
        raise InputError(
            "structures: give a file of structures, or the start of one candidate with --start-dyn"
            " or --load-ensemble"
        )
    if structures and given:
        raise InputError(
            f"{structures[0]}: --start-dyn and --load-ensemble bring their structure with them;"
            " leave the file out"
        )


def rank_start(
    dyn: str | None, ensemble: Path | None, settings: Settings, output: str | Path, **options: Any
) -> RankingTable:
    """SSCHA of one candidate from the state of ``dyn`` (prefix of dynamical matrices), or of
    ``ensemble`` after minimising on it.

    The structure is not relaxed statically before, and the supercell is that of the files unless
    ``sscha.supercell`` is a length. Raises ``InputError`` (files that are missing, damaged or do
    not fit, a folder of another start or process) before any work.
    """
    if settings.sscha is None:
        raise InputError("sscha: --start-dyn and --load-ensemble need this block")
    sscha = settings.sscha
    state = read_start(
        dyn, ensemble, sscha.temperatures[0], settings.pressure, sscha.min_effective_sample
    )
    if not isinstance(sscha.supercell, dict):
        settings = settings.model_copy(
            update={"sscha": sscha.model_copy(update={"supercell": state.supercell_matrix})}
        )
    sources = {
        "start_dyn": dyn and str(dyn),
        "load_ensemble": ensemble and str(ensemble),
        "start": state_digest(state),
    }
    structure = stripped(state.atoms)
    return rank_alone(
        [structure],
        settings,
        output,
        sources,
        relax=False,
        starts={structure_id(structure): state},
        **options,
    )


def read_start(
    dyn: str | None,
    ensemble: Path | None,
    temperature: float,
    pressure: GPa,
    min_effective_sample: float,
) -> SschaState:
    """The state to start from at ``temperature`` (K); with an ensemble the one that minimising on
    it leads to (cell fixed).

    With both the ensemble is reweighted from the matrices that drew it, which its folder holds, to
    ``dyn``, and minimised from there. What it says about that state, at ``pressure`` (GPa), is
    logged. Raises ``InputError``.
    """
    if ensemble is None:
        if dyn is None:
            raise InputError("start: neither dynamical matrices nor an ensemble")
        return state_from_dyn(dyn, temperature)
    own, sampled = read_ensemble(
        ensemble, temperature, dyn=None if generating_matrices(ensemble) else dyn
    )
    count = len(sampled.energies)
    if count < SMALLEST:
        raise InputError(
            f"--load-ensemble: {ensemble}: {count} configurations; must be at least {SMALLEST}"
        )
    start_state = own if dyn is None else state_from_dyn(dyn, temperature)
    _require_reweightable(own, start_state, f"--start-dyn {dyn}, --load-ensemble {ensemble}")
    symmetry = Symmetry(start_state.atoms, start_state.supercell_matrix)
    start_state = replace(
        start_state, force_constants=symmetry.force_constants(start_state.force_constants)
    )
    try:
        about, weights = reweighted(own, sampled, start_state)
        sample = effective_number(weights) / count
        if sample < min_effective_sample:
            raise InputError(
                f"--load-ensemble: {ensemble}: of its configurations {100 * sample:.0f} per cent"
                f" count for {dyn} (at least {100 * min_effective_sample:.0f} are needed): give one"
                " of the two alone"
            )
        log.info("%s: %s", ensemble, what_it_says(start_state, about, weights, symmetry, pressure))
        better = minimise(
            [(own, sampled)],
            symmetry,
            min_effective_sample=min_effective_sample,
            target=start_state,
        ).state
    except (SschaError, np.linalg.LinAlgError) as error:
        raise InputError(f"--load-ensemble: {ensemble}: {one_line(error)}") from None
    return floor_modes(better, symmetry, LARGEST_AMPLITUDE_LATER)


def _require_reweightable(own: SschaState, other: SschaState, where: str) -> None:
    """Raise ``InputError`` unless an ensemble of ``own`` can be averaged for ``other``: one
    crystal, cell, supercell and set of masses."""
    pairs = {
        "supercell": (np.array(own.supercell_matrix), np.array(other.supercell_matrix)),
        "species or their order": (own.atoms.numbers, other.atoms.numbers),
        "masses": (own.atoms.get_masses(), other.atoms.get_masses()),
        "cell": (own.atoms.cell.array, other.atoms.cell.array),
    }
    for name, (one, two) in pairs.items():
        if one.shape != two.shape or not np.allclose(one, two, rtol=0.0, atol=1e-4):
            raise InputError(
                f"{where}: the {name} of the matrices is another one than that of the ensemble's"
                " own; give one of the two alone"
            )


def what_it_says(
    state: SschaState, ensemble: Ensemble, weights: np.ndarray, symmetry: Symmetry, pressure: GPa
) -> str:
    """F, error and pressure of the state by an ensemble about its centroids; energies are those of
    whatever surface made it."""
    averages, n = average(state, ensemble, symmetry, weights), len(state.atoms)
    found = pressure_of(averages)
    stress = (
        f"pressure {found:.2f} GPa (wanted: {pressure:g})" if np.isfinite(found) else "no stress"
    )
    return (
        f"{len(weights)} configurations, F = {averages.helmholtz / n:.5f} +-"
        f" {averages.helmholtz_error / n:.5f} eV/atom (energy surface and zero of that ensemble,"
        f" ESS/N = {effective_number(weights) / len(weights):.2f}), {stress}; it improves the"
        " start, G comes from fresh ensembles of the model"
    )


def rank_file(
    sources: str | Path | Sequence[str | Path],
    settings: Settings,
    output: str | Path,
    **options: Any,
) -> RankingTable:
    """Rank the structures of files and folders (`gate.read_sources`) with the calculator that
    ``settings`` name; everything goes to ``output``. ``options`` are those of `rank_structures`.

    The same call again takes up what is finished. Raises ``InputError`` (file, structure,
    checkpoint, a folder of another version, or one in which another process works); nothing is
    written then.
    """
    paths = [sources] if isinstance(sources, str | Path) else list(sources)
    structures = read_sources(paths)
    given = {"structures": [str(path) for path in paths]}
    return rank_alone(structures, settings, output, given, **options)


def rank_alone(
    structures: Sequence[Atoms],
    settings: Settings,
    output: str | Path,
    sources: dict[str, Any],
    **options: Any,
) -> RankingTable:
    """Rank with the calculator of ``settings`` while no other process works in ``output``;
    ``sources`` go into its run record.

    ``options`` are those of `rank_structures`. Raises ``InputError`` (also where ``output`` holds a
    ranking of another ``start`` than that of ``sources``).
    """
    with locked(output, "magus-anharmonic rank"):
        check_results_version(output)
        begun = SearchFolder(output).record.is_file()
        if "start" in sources and begun and read_run_record(output).start != sources["start"]:
            raise InputError(f"{output}: holds a ranking with another start; give another folder")
        found, options["certifier"] = ranking_evaluators(settings)
        evaluator = as_evaluator(found, structures)
        seed = settings.seed or 0
        write_run_record(output, settings, seed=seed, model_id=evaluator.model_id, extra=sources)
        return rank_structures(structures, evaluator, settings, output, seed=seed, **options)


@says_in_notebooks
def rank_structures(
    structures: Sequence[Atoms],
    evaluator: EnergySource,
    settings: Settings,
    run_dir: str | Path,
    *,
    seed: int = 0,
    relax: bool = True,
    free_energy: Callable[..., SschaResult] | None = None,
    workers: Workers = None,
    starts: Mapping[str, SschaState] | None = None,
    measured: Mapping[str, ModelTerm] | None = None,
    truth: Truth | None = None,
    certifier: Evaluator | None = None,
) -> RankingTable:
    """Relax at ``settings.pressure``, find the distinct ones, and rank them by free energy.

    Everything goes to ``run_dir``: ``ranking.csv`` (and ``ranking_<T>K.csv`` for further
    temperatures), ``results.json``, ``relaxed.extxyz`` (`write_relaxed`), ``quantum.traj``,
    ``free_energies.db``, and a folder per SSCHA run in ``sscha/``.
    The same call again takes up what is finished. The structures are not changed; one that cannot
    be relaxed is in the table as failed, with the reason.

    Parameters
    ----------
    evaluator
        Our ``Potential``, any ASE calculator, or a labeler.
    settings
        Of `parse_settings`, with the block ``sscha``: ``parse_settings({"pressure": 150, "Fitness":
        ["SSCHA"], "sscha": {"temperature": 300}})``.
    relax
        False takes the structures as they are.
    free_energy
        A stand-in for `free_energy`, with its arguments.
    workers
        Who runs SSCHA: a scheduler, or a number of local processes; None takes
        ``settings.scheduler``.
    starts
        By structure id: the SSCHA state from which that structure's run starts, instead of a
        harmonic one.
    measured
        By candidate id or space-group symbol: what DFT labels say about the model's G.
    truth
        Who labels for ``sscha.truth``: ``paper.truth.labels_of(settings, run_dir)``.
    certifier
        Where ``evaluator`` is a free-energy model: the potential that it is of, with which SSCHA
        certifies the lowest.
    """
    check_structures(structures)
    if truth is None and settings.sscha is not None and settings.sscha.truth is not None:
        raise InputError("sscha.truth: give truth=paper.truth.labels_of(settings, run_dir) too")
    source = as_evaluator(evaluator, structures)
    if constrained := sum(bool(atoms.constraints) for atoms in structures):
        log.warning(
            "constraints of %d of %d structures do not hold here: SSCHA moves every atom",
            constrained,
            len(structures),
        )
    copies = [stripped(atoms) for atoms in structures]
    for atoms, given in zip(copies, structures, strict=True):
        if given.info.get("name"):
            atoms.info["name"] = str(given.info["name"])
    reasons = relax_inplace(copies, source, settings) if relax else [""] * len(copies)
    good = [atoms for atoms, reason in zip(copies, reasons, strict=True) if not reason]
    reevaluate(good, source, settings)
    for index, (atoms, reason) in enumerate(zip(copies, reasons, strict=True)):
        if reason:
            atoms.info["reason"] = f"relaxation: {reason}"
            log.warning("structure %d is out of the ranking: %s", index, atoms.info["reason"])
    found = rank(
        copies,
        evaluator=certifier or source,
        model=source if certifier is not None else None,
        settings=settings,
        run_dir=run_dir,
        seed=seed,
        free_energy=free_energy,
        workers=workers,
        starts=starts,
        measured=measured,
        truth=truth,
    )
    write_relaxed(Path(run_dir) / "relaxed.extxyz", copies, structures, found)
    return found
