"""One round of a search, the same in MAGUS and in the embedded host.

The host (`search.host.Search`, or MAGUS through `plugins.hook`) makes and relaxes structures, and
chooses parents. It calls `start` once, and after each generation `after_generation`:

1. learn (`learning.learn`): label some relaxed structures by DFT and finetune: a new model;
2. re-evaluate (`ranking.structures`): relax and evaluate the survivors with the model in use,
   because no ranking mixes two models;
3. rank (`ranking.rank`): SSCHA for those who may be the lowest; G, its error and the rank as flat
   ``info`` keys, by which the host selects;
4. seed: SSCHA centroids that no survivor stands for are seeds of the next generation.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from magus_anharmonic.energy_surface import surface_in_use
from magus_anharmonic.errors import InputError, LabelerNotInstalled
from magus_anharmonic.evaluator import Evaluator
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import SCRATCH, Settings
from magus_anharmonic.units import GPa, ev_to_mev

if TYPE_CHECKING:
    from magus_anharmonic.learning.choose import Contender
    from magus_anharmonic.ranking.rank import Truth
    from magus_anharmonic.ranking.uncertainty import ModelTerm

log = logging.getLogger(__name__)

RELAXATION_STEPS = 50
"""Steps that bring survivors of an older model near the minimum of the new one."""


@dataclass
class SearchState:
    """One search between its rounds. ``potential`` is the newest model; the host relaxes with it.
    Where that is a free energy, ``certifier`` is the potential that SSCHA certifies with.

    Under ``magus search -m`` MAGUS's own loop trains: then ``learn`` is False and the plug-in sets
    ``potential`` and ``energy_rmse`` (eV/atom, validation) before it calls `after_generation`.
    ``candidates`` is the latest ranking.
    """

    settings: Settings
    run_dir: Path
    potential: Evaluator
    seed: int
    labeler: Any = None
    store: Any = None
    learn: bool = True
    n_generations: int | None = None
    energy_rmse: float | None = None
    relaxation_steps: int = RELAXATION_STEPS
    certifier: Evaluator | None = None
    free_energy: Callable[..., Any] | None = None
    truth: Truth | None = None
    workers: int | None = None
    candidates: list[Candidate] = field(default_factory=list)


def after_generation(
    state: SearchState,
    population: Sequence[Atoms],
    survivors: Iterable[Atoms],
    generation: int,
    *,
    last: bool | None = None,
) -> list[Atoms]:
    """Learn from ``population`` (relaxed, duplicates kept), then re-evaluate and rank ``survivors``
    in place.

    Parameters
    ----------
    survivors
        Everything that will be compared from now on (good, keep and current ones); one structure
        may appear twice.
    generation
        Number of the round, from 1.
    last
        Whether this is the last round; None: when ``generation`` is ``numGen``.

    Returns SSCHA centroids that no survivor stands for yet, as seeds of the next round. Doing a
    finished round again costs nothing but the evaluation of the survivors.
    """
    from magus_anharmonic.ranking.rank import rank

    ending = generation >= (state.n_generations or np.inf) if last is None else last
    unique = list({id(atoms): atoms for atoms in survivors}.values())
    _learn(state, population, generation)
    reevaluate(unique, state.potential, state.settings, state.relaxation_steps)
    on_free_energy = surface_in_use(state.potential) is not None
    state.candidates = rank(
        unique,
        evaluator=state.certifier or state.potential,
        model=state.potential if on_free_energy else None,
        settings=state.settings,
        run_dir=state.run_dir,
        seed=state.seed,
        generation=generation,
        n_generations=generation if ending else generation + 1,
        energy_rmse=state.energy_rmse,
        free_energy=state.free_energy,
        workers=state.workers,
        measured=measured_terms(state.run_dir, state.settings.pressure),
        truth=state.truth if ending else None,
    )
    _summarise(state.candidates, generation)
    sscha = state.settings.sscha
    wanted = sscha is not None and sscha.seed_back and not ending
    return quantum_seeds(state.candidates) if wanted else []


def _learn(state: SearchState, population: Sequence[Atoms], generation: int) -> None:
    learning = state.settings.learning
    if not state.learn or state.labeler is None or learning is None:
        return
    from magus_anharmonic.learning.learn import learn

    learned = learn(
        list(population),
        generation=generation,
        potential=state.potential,
        settings=learning,
        labeler=state.labeler,
        store=state.store,
        run_dir=state.run_dir,
        seed=state.seed,
        contenders=undecided(state, generation) if learning.select == "sscha" else (),
    )
    state.potential = learned.potential
    state.energy_rmse = validation_rmse(learned.metrics)


def quantum_seeds(candidates: Sequence[Candidate]) -> list[Atoms]:
    """Centroids of quantum phases that no candidate's static structure is: the search would not
    find them by itself.

    Each carries ``sscha_centroid``, by which the ranking knows it again and reuses the free energy.
    """
    from magus_anharmonic.ranking.jobs import info_of
    from magus_anharmonic.ranking.matcher import Fingerprint, same_phase
    from magus_anharmonic.ranking.phases import primitive_fingerprint

    present = {c.seed_of for c in candidates if c.ranked and c.seed_of == c.run_id}
    new = [c for c in candidates if c.phase_ranked and c.run_id not in present]
    statics = [Fingerprint(c.structure) for c in candidates if c.members] if new else []
    seeds = []
    for candidate in new:
        fingerprint = primitive_fingerprint(candidate.centroids, candidate.tolerance)
        if any(same_phase(fingerprint, other) for other in statics):
            continue
        atoms = fingerprint.atoms.copy()
        atoms.info.update(
            info_of(candidate.free_energy),
            candidate_id=candidate.id,
            sscha_centroid=candidate.run_id,
            gibbs_model=candidate.model,
        )
        seeds.append(atoms)
    return seeds


def _summarise(candidates: Sequence[Candidate], generation: int) -> None:
    counts = Counter(candidate.status for candidate in candidates)
    words = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    log.info("round %d: %d distinct structures (%s)", generation, len(candidates), words or "none")
    if counts.get("unconverged") and not any(c.ranked for c in candidates):
        log.warning(
            "round %d: no free energy has converged, so nothing is ranked by it; the reasons are in"
            " ranking.csv",
            generation,
        )
    for c in [c for c in candidates if c.rank_quantum is not None][:3]:
        height = c.gibbs_above_hull
        above = "" if height is None else f", {ev_to_mev(height):.1f} meV/atom above the hull"
        log.info(
            "  %d. %s %s -> %s, G = %.5f +- %.5f eV/atom%s",
            c.rank_quantum,
            c.id,
            c.spg_static,
            c.spg_quantum,
            c.gibbs,
            c.gibbs_error,
            above,
        )


# --- a search begins, or goes on


def start(
    settings: Settings,
    run_dir: str | Path,
    potential: Evaluator,
    *,
    restart: bool = False,
    learn: bool = True,
    seed: int | None = None,
    record: bool = True,
    described: Mapping[str, Any] | None = None,
    certifier: Evaluator | None = None,
) -> SearchState:
    """Prepare a search whose own files are in ``run_dir`` (``results/anharmonic``) and write its
    ``run.json``.

    Parameters
    ----------
    potential
        What is ranked with, see `ranking.evaluators.ranking_evaluators`.
    restart
        Go on with the recorded seed of ``run_dir``.
    learn
        False under ``magus search -m``, where the ML calculator learns.
    seed
        Instead of the one that the settings or the record name.
    record
        False where the host has written ``run.json`` already.
    described
        Further fields of ``run.json``: who runs the search, and by which command.
    certifier
        The second of `ranking_evaluators`.

    Raises ``InputError`` (another version's folder, no model that learns, no labeler).
    """
    from magus_anharmonic.paper.truth import labels_of
    from magus_anharmonic.runs.record import check_results_version, write_run_record

    folder = Path(run_dir)
    check_results_version(folder)
    if learn:
        settings = checked_labelers(settings, folder)
    labeler, store = (None, None)
    if learn and settings.learning is not None:
        labeler, store = _labeler(settings, folder)
    if seed is None:
        seed = settings.seed if settings.seed is not None else _recorded_seed(folder, restart)
    state = SearchState(
        settings,
        folder,
        potential,
        seed,
        labeler,
        store,
        learn=labeler is not None,
        n_generations=settings.num_gen,
        energy_rmse=_recorded_rmse(folder) if restart else None,
        certifier=certifier,
        truth=labels_of(settings, folder),
    )
    if record:
        extra = {"restart": restart, "learning": state.learn, **(described or {})}
        write_run_record(folder, settings, seed=seed, model_id=potential.model_id, extra=extra)
    return state


def first_model(
    settings: Settings,
    run_dir: str | Path,
    crystals: Callable[[int, int, int], list[Atoms]],
    *,
    restart: bool = False,
    described: Mapping[str, Any] | None = None,
) -> int:
    """With ``checkpoint: scratch``: make the model that the first generation relaxes with
    (`learning.first`), unless it is there; the seed of the search.

    crystals : ``crystals(seed, batch, n)``, n random crystals of the host. restart, described : see
    `start`, which the host calls afterwards.
    """
    from magus_anharmonic.learning import first
    from magus_anharmonic.runs.record import write_run_record

    folder = Path(run_dir)
    seed = settings.seed if settings.seed is not None else _recorded_seed(folder, restart)
    if newest_checkpoint(folder) is None:
        write_run_record(folder, settings, seed=seed, model_id=SCRATCH, extra=dict(described or {}))
        labeler, store = _labeler(settings, folder)
        first.first_model(
            functools.partial(crystals, seed),
            pressure=settings.pressure,
            settings=settings.learning,
            labeler=labeler,
            store=store,
            run_dir=folder,
            seed=seed,
            device=settings.calculator.device,
        )
    return seed


def newest_checkpoint(run_dir: str | Path, up_to: int | None = None) -> Path | None:
    """``checkpoints/gen{N}.pth`` with the largest N (not above ``up_to``), or None."""
    found = {}
    for path in SearchFolder(run_dir).checkpoints.glob("gen*.pth"):
        number = re.fullmatch(r"gen(\d+)", path.stem)
        if number and (up_to is None or int(number[1]) <= up_to):
            found[int(number[1])] = path
    return found[max(found)] if found else None


def checked_labelers(settings: Settings, folder: str | Path) -> Settings:
    """The settings, without ``learning`` where its labeler is not installed and it is not required;
    touches no file.

    Raises ``InputError``: no model that can learn, no labeler, a dataset that is missing or of
    other DFT settings.
    """
    from magus_anharmonic.paper.truth import labels_of

    labels_of(settings, folder)
    learning = settings.learning
    if learning is None:
        return settings
    if settings.calculator is None:
        raise InputError(
            "learning: needs a model that can learn: MainCalculator: {calculator: mattersim, ...};"
            " without learning: any calculator searches and ranks"
        )
    from magus_anharmonic.labelers import get_labeler
    from magus_anharmonic.learning.dataset import read_dataset

    try:
        labeler = get_labeler(learning.labeler, SearchFolder(folder).labeling, settings)
    except LabelerNotInstalled as error:
        if learning.required or settings.from_scratch:
            raise
        log.warning("running without learning: %s", error)
        return settings.model_copy(update={"learning": None})
    if learning.dataset is not None:
        read_dataset(learning.dataset, labeler.settings_hash)
    return settings


def _labeler(settings: Settings, folder: Path) -> tuple[Any, Any]:
    from magus_anharmonic.labelers import get_labeler
    from magus_anharmonic.learning.dataset import LabelStore

    files = SearchFolder(folder)
    labeler = get_labeler(settings.learning.labeler, files.labeling, settings)
    return labeler, LabelStore(files.labels)


def _recorded_seed(folder: Path, restart: bool) -> int:
    from magus_anharmonic.runs.record import read_run_record, record_file

    if restart and record_file(folder).exists():
        recorded = read_run_record(folder).seed
        if recorded is not None:
            return recorded
    return secrets.randbelow(2**31)


def _recorded_rmse(folder: Path) -> float | None:
    from magus_anharmonic.io.files import read_jsonl

    records = read_jsonl(SearchFolder(folder).metrics, ("new",))
    return validation_rmse(records[-1]) if records else None


def validation_rmse(metrics: dict[str, Any]) -> float | None:
    """Energy RMSE (eV/atom) of the model in use on validation labels of the search, from a record
    of ``metrics.jsonl``; None if unknown."""
    from magus_anharmonic.learning.learn import DATASET

    if metrics.get("validation_from") == DATASET:
        return None
    new = metrics.get("new")
    scores = new.get("validation") if isinstance(new, dict) else None
    value = scores.get("energy_rmse") if isinstance(scores, dict) else None
    return float(value) if value is not None and np.isfinite(value) else None


def measured_terms(run_dir: str | Path, pressure: GPa) -> dict[str, ModelTerm]:
    """What ``gibbs_correction.csv`` in ``run_dir`` (of ``magus-anharmonic errors --tables``) says
    about phases at ``pressure`` (GPa).

    Rows without an error bar are left out. Raises ``InputError`` for a table that cannot be read.
    """
    from magus_anharmonic.paper import tables
    from magus_anharmonic.ranking.uncertainty import Electronic, ModelTerm

    def electronic(row: tables.GibbsCorrection) -> Electronic | None:
        names = (
            "electronic_eV_per_atom",
            "electronic_error_eV_per_atom",
            "electronic_temperature_K",
        )
        found = [getattr(row, name) for name in names]
        return None if None in found else Electronic(*found)

    rows = tables.read_if_there(tables.GibbsCorrection, run_dir)
    return {
        row.phase: ModelTerm(
            row.correction_eV_per_atom + (row.second_order_eV_per_atom or 0.0),
            row.correction_error_eV_per_atom,
            electronic(row),
        )
        for row in rows
        if row.correction_error_eV_per_atom is not None and abs(row.pressure_GPa - pressure) < 1e-6
    }


# --- whose ensembles are worth labels

UNDECIDED = 0.01
"""A candidate whose probability of being the lowest is larger is undecided against the lowest
one."""

_ENSEMBLE = 107


def undecided(state: SearchState, generation: int) -> list[Contender]:
    """The lowest candidate of the latest ranking and those that may be lower after all, each with
    an ensemble of its SSCHA state.

    The ensembles are drawn anew (no run has seen them) for ``n_sample * n_perturb`` labels each.
    Empty when nothing is undecided, or when the runs left no folders.
    """
    from magus_anharmonic.learning.choose import Contender
    from magus_anharmonic.sscha.result import SschaResult
    from magus_anharmonic.sscha.state import displaced, sample

    learning = state.settings.learning
    phases = sorted(
        (c for c in state.candidates if c.phase_ranked and c.sscha_folder),
        key=lambda c: (c.gibbs, c.id),
    )
    found: list[Contender] = []
    for candidate in phases:
        probability = (
            candidate.p_lowest_sampling
            if candidate.p_lowest_total is None
            else candidate.p_lowest_total
        )
        folder = SearchFolder(state.run_dir).sscha / candidate.sscha_folder
        if (found and (probability or 0.0) < UNDECIDED) or not (folder / "result.json").is_file():
            continue
        result = SschaResult.read(folder)
        if result.force_constants is None:
            continue
        n_configs = 2 * max(1, learning.n_sample * learning.n_perturb // 2)
        rng = np.random.default_rng(
            [state.seed, generation, zlib.crc32(candidate.id.encode()), _ENSEMBLE]
        )
        configurations = displaced(result.state, sample(result.state, n_configs, rng))
        spread = expected_spread(state.potential, configurations)
        found.append(
            Contender(candidate.id, result.centroids, configurations, probability or 0.0, spread)
        )
    return found if len(found) > 1 else []


def expected_spread(potential: Any, configurations: Sequence[Atoms], most: int = 64) -> float:
    """Expected standard deviation of the model's energy error among pairs +u/-u of an ensemble,
    eV/atom; 1 where there is no estimate."""
    estimate = getattr(potential, "energy_error_spread", None)
    enough = estimate is not None and len(configurations) >= 4
    spread = estimate(list(configurations[:most]), group_size=2) if enough else None
    return 1.0 if spread is None else spread
