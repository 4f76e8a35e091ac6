"""The main loop of the embedded host: one step as MAGUS's, restartable at any moment.

Every random draw comes from a generator seeded with (seed, generation, purpose), and every stage
ends in a file that is read back before it is used: a search that was killed and restarted is the
search that was not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, reason_of
from magus_anharmonic.evaluator import is_unnamed
from magus_anharmonic.generation import (
    SearchState,
    after_generation,
    checked_labelers,
    first_model,
    newest_checkpoint,
    start,
)
from magus_anharmonic.io.files import read_jsonl
from magus_anharmonic.ranking.evaluators import ranking_evaluators
from magus_anharmonic.ranking.structures import reevaluate
from magus_anharmonic.report import report_at_end
from magus_anharmonic.runs.lock import check_free, guarded, locked, remove_unfinished
from magus_anharmonic.runs.record import (
    RunRecord,
    check_continues,
    check_results_version,
    read_run_record,
    record_failure,
    write_run_record,
)
from magus_anharmonic.search import population as pops
from magus_anharmonic.search.archive import Archive, best_of
from magus_anharmonic.search.generate import Geometry, RandomGenerator, crystals_of
from magus_anharmonic.search.keys import HostKeys, parse_host_keys
from magus_anharmonic.search.population import OffspringGenerator
from magus_anharmonic.search.relaxation import Relaxer, build_relaxer, forget, require
from magus_anharmonic.settings import CalculatorSettings, Settings

log = logging.getLogger(__name__)

WHAT = "magus-anharmonic search"


class Purpose(IntEnum):
    """What a stream of random numbers is for."""

    RANDOM = 1
    OFFSPRING = 2


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found: ``good`` is sorted, best first; ``best`` holds the best of every
    generation."""

    results: Path
    n_generations: int
    good: list[Atoms]
    best: list[Atoms]
    seed: int
    seconds: float


def run(settings: Settings, directory: str | Path = ".", restart: bool = False) -> SearchOutcome:
    """Search in ``directory`` and leave MAGUS's ``results/`` there.

    Parameters
    ----------
    restart
        Go on with the search in ``directory``; without it an existing ``results`` is moved to
        ``results1``, ...

    Raises
    ------
    InputError
        Anything wrong in the input, before any file is touched.
    MagusAnharmonicError
        No structure could be made, or none is left.
    """
    began = time.perf_counter()
    keys, warnings = parse_host_keys(settings)
    for line in warnings:
        log.warning(line)
    archive = Archive(Path(directory).resolve())
    with contextlib.ExitStack() as stack:
        if restart:
            if not archive.files.record.exists():
                raise InputError(
                    f"-r: no search to go on with in {archive.results}; start without -r"
                )
            check_results_version(archive.anharmonic)
            check_continues(archive.anharmonic, settings, "embedded")
            stack.enter_context(locked(archive.anharmonic, WHAT))
            stack.enter_context(_recording(archive.anharmonic))
            remove_unfinished(archive.results, locked_folder=archive.anharmonic)
        settings = checked_labelers(settings, archive.anharmonic)
        relaxer, evaluator, certifier = None, None, None
        if not settings.from_scratch:  # what is wrong there ends before any file is touched
            relaxer = _relaxer(settings, archive, restart)
            evaluator, certifier = ranking_evaluators(settings, relaxer.evaluator)
        if not restart:
            archive.directory.mkdir(parents=True, exist_ok=True)
            with guarded(
                archive.directory
            ):  # of two starts at once the second finds the first at work and moves nothing
                check_free(archive.anharmonic)
                archive.start()
                stack.enter_context(locked(archive.anharmonic, WHAT))
            stack.enter_context(_recording(archive.anharmonic))
        if relaxer is None:
            seed = first_model(
                settings,
                archive.anharmonic,
                functools.partial(crystals_of, settings),
                restart=restart,
                described={"host": "embedded"},
            )
            settings = settings.model_copy(update={"seed": seed})
            relaxer = _relaxer(settings, archive, True)
            evaluator, certifier = ranking_evaluators(settings, relaxer.evaluator)
        settings, known = _open(archive, settings, relaxer, restart)
        state = None
        if settings.learning is not None or settings.sscha is not None:
            state = start(
                settings,
                archive.anharmonic,
                restart=restart,
                potential=evaluator,
                seed=settings.seed,
                record=False,
                certifier=certifier,
            )
        relaxer.run_dir = archive.anharmonic
        search = Search(settings, keys, relaxer, archive, state)
        search.run(known)
        if state is not None:
            report_at_end(archive.anharmonic)
    return SearchOutcome(
        archive.results,
        search.num_gen,
        search.good,
        archive.load("best", ""),
        search.seed,
        time.perf_counter() - began,
    )


def _relaxer(settings: Settings, archive: Archive, own: bool) -> Relaxer:
    """With the newest of the search's ``own`` models, or the calculator of its settings."""
    learned = newest_checkpoint(archive.anharmonic, archive.finished()[0]) if own else None
    return build_relaxer(settings, learned)


@contextlib.contextmanager
def _recording(folder: Path) -> Iterator[None]:
    """Leave the reason in ``failures.jsonl`` when a search stops before its end (a killed one
    cannot)."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            record_failure(folder, "run", reason_of(error))
        raise


def _open(
    archive: Archive, settings: Settings, relaxer: Relaxer, restart: bool
) -> tuple[Settings, bool]:
    """Check or describe the results folder; returns the settings with the seed, and whether the
    energies in it are this model's."""
    record = read_run_record(archive.anharmonic) if restart else None
    known = record is None or _check_model(archive, relaxer, record)
    seed = settings.seed
    if seed is None:
        seed = record.seed if record else None
    if seed is None:
        seed = secrets.randbits(31)
    settings = settings.model_copy(update={"seed": seed})
    write_run_record(
        archive.anharmonic,
        settings,
        seed=seed,
        model_id=relaxer.evaluator.model_id,
        extra={"host": "embedded"},
    )
    log.info("seed %d", seed)
    return settings, known


def _check_model(archive: Archive, relaxer: Relaxer, record: RunRecord) -> bool:
    """Refuse to go on with another model than the one that the search had: a checkpoint or a
    parameter was replaced meanwhile.

    False where one of the two has no id: its energies are worked out again.
    """
    found = relaxer.evaluator.model_id
    generation = archive.finished()[0]
    own = newest_checkpoint(archive.anharmonic, generation)
    if own is not None:
        lines = read_jsonl(archive.files.metrics, ("generation", "new_model"))
        models = {f"gen{line['generation']}": line["new_model"] for line in lines}
        file, known = str(own), models.get(own.stem)
    else:
        starts = [*(start.get("model") for start in record.earlier_starts), record.model]
        # a search that learns records later starts with the models that it made; one with another
        # calculator has one model
        named = [one for one in (starts[0], starts[-1]) if one and not is_unnamed(one)]
        known = named[0] if named else starts[0]
        matter = isinstance(relaxer.settings, CalculatorSettings)
        file = "MainCalculator.checkpoint" if matter else "MainCalculator"
    if known is None or known == found:
        return True
    if is_unnamed(known) or is_unnamed(found):
        log.warning(
            "-r: whether the stored energies are those of %s cannot be told: they are worked out"
            " again",
            file,
        )
        return False
    raise InputError(
        f"{file}: holds the model {found}, but the search went on with {known}: the file was"
        " replaced, or a parameter changed; put the earlier one back, or start anew without -r"
    )


class Search:
    """The populations between two generations, and the step from one to the next."""

    def __init__(
        self,
        settings: Settings,
        keys: HostKeys,
        relaxer: Relaxer,
        archive: Archive,
        state: SearchState | None,
    ) -> None:
        self.settings, self.keys, self.relaxer = settings, keys, relaxer
        self.archive, self.state = archive, state
        self.fitness = settings.fitness or [
            "Enthalpy" if settings.formula_type == "fix" else "Ehull"
        ]
        self.geometry = Geometry(keys, settings.symbols)
        self.checker = pops.Checker(keys, self.geometry)
        self.random = RandomGenerator(self.geometry)
        self.offspring = OffspringGenerator(keys, self.geometry, self.checker)
        self.units = [
            Atoms([s for s, n in zip(settings.symbols, row, strict=True) for _ in range(n)])
            for row in keys.units
        ]
        self.num_gen, self.seed = settings.num_gen or 0, settings.seed or 0
        self.begun = time.perf_counter()
        self.good: list[Atoms] = []
        self.keep: list[Atoms] = []
        self.current: list[Atoms] = []
        self.volume_ratio = keys.volume_ratio
        self._known = True
        """Whether what is there of the generation was made with this model."""

    def run(self, known: bool = True) -> None:
        """All generations that are not finished yet; not ``known``: energies that are there are of
        another model."""
        done, ratio = self.archive.finished()
        self.archive.restore_best(done)
        if done:
            self.volume_ratio = ratio
            self._load(done)
            if not known:
                self._evaluate_again()
            log.info("going on after generation %d of %d", done, self.num_gen)
        times: list[float] = []
        for generation in range(done + 1, self.num_gen + 1):
            self.begun = time.perf_counter()
            self._known = known or generation > done + 1
            self._step(generation)
            times.append(time.perf_counter() - self.begun)
            left = np.mean(times) * (self.num_gen - generation)
            best = self.good[0]
            log.info(
                "generation %d of %d done in %.0f s: best %s, space group %d, %.4f eV/atom; about"
                " %.0f s left",
                generation,
                self.num_gen,
                times[-1],
                best.get_chemical_formula(),
                best.info["spg"],
                best.info["enthalpy"],
                left,
            )

    def _load(self, generation: int) -> None:
        known: dict[str, Atoms] = {}
        for name in ("good", "keep", "gen"):
            # one object per structure, so that nothing is evaluated or ranked twice
            loaded = [
                known.setdefault(atoms.info["identity"], atoms)
                for atoms in self.archive.load(name, generation)
            ]
            setattr(self, "current" if name == "gen" else name, loaded)

    def _evaluate_again(self) -> None:
        survivors = {id(atoms): atoms for atoms in [*self.good, *self.keep, *self.current]}
        evaluator = self.state.potential if self.state else self.relaxer.evaluator
        reevaluate(list(survivors.values()), evaluator, self.settings)
        self._keep_usable()

    def _step(self, generation: int) -> None:
        log.info("generation %d of %d begins", generation, self.num_gen)
        raw = self.archive.known("raw", generation) if self._known else None
        if raw is None:
            initial = self.archive.known("init", generation)
            if initial is None:
                self._save("init", generation, self._initial(generation))
                initial = self.archive.load("init", generation)
            chunks = self.archive.anharmonic / "relax" / str(generation)
            if not self._known:
                forget(chunks)
            relaxed = self.relaxer.relax(initial, chunks)
            if relaxed:
                self._save("raw", generation, relaxed)
            forget(chunks)  # when nothing succeeded, a restart tries again
            require(relaxed, "relaxation", "every relaxation failed; see the reasons above")
            raw = self.archive.load("raw", generation)
        relaxed = self._checked(raw, "after relaxation")
        require(
            relaxed,
            "after relaxation",
            "raise max_step, popSize or max_enthalpy, or look at results/raw*.traj",
        )
        self.current = self._distinct(relaxed)
        self._save("gen", generation, self.current)
        self._learn_and_rank(generation, [pops.copied(atoms) for atoms in relaxed])
        self._select(generation)
        self._finish(generation)

    def _initial(self, generation: int) -> list[Atoms]:
        """Random structures, offspring of the last generation and the kept ones, and seeds; all
        checked."""
        children: list[Atoms] = []
        n = self.keys.init_size or self.keys.pop_size
        if generation > 1:
            n = self.keys.pop_size
            parents = pops.remove_duplicates([*self.current, *self.keep], self.fitness, self.keys)
            pops.set_dominators(parents, self.fitness)
            rng = np.random.default_rng([self.seed, generation, Purpose.OFFSPRING])
            children = self.offspring.generate(parents, int(n * (1 - self.keys.rand_ratio)), rng)
        rng = np.random.default_rng([self.seed, generation, Purpose.RANDOM])
        fresh = self.random.generate(n - len(children), self.volume_ratio, rng)
        for atoms in fresh:
            symbols = list(self.settings.symbols)
            atoms.info = {"symbols": symbols, "parentE": 0.0, "origin": "random"}
        seeds = self.archive.read_seeds(generation)
        for atoms in seeds:
            atoms.info = {**atoms.info, "origin": "seed"}
        population = self._checked([*children, *fresh, *seeds], "before relaxation")
        numbers: Counter[str] = Counter()
        for atoms in population:
            name = "seed" if atoms.info["origin"] == "seed" else "init"
            identity = f"{name}{generation}-{numbers[name]}"
            numbers[name] += 1
            atoms.info |= {"identity": identity, "gen": generation, "used": 0}
        origins = Counter(atoms.info["origin"] for atoms in population)
        log.info(
            "%d new structures: %s",
            len(population),
            ", ".join(f"{n} {origin}" for origin, n in sorted(origins.items())),
        )
        require(population, "generator", "raise volume_ratio or lower d_ratio")
        return population

    def _checked(self, population: Sequence[Atoms], when: str) -> list[Atoms]:
        problems = [self.checker.problem(atoms) for atoms in population]
        reasons = Counter(problem for problem in problems if problem)
        if reasons:
            log.info(
                "dropped %s: %s",
                when,
                ", ".join(f"{count} for {reason}" for reason, count in reasons.most_common()),
            )
        return [
            atoms for atoms, problem in zip(population, problems, strict=True) if problem is None
        ]

    def _distinct(self, relaxed: list[Atoms]) -> list[Atoms]:
        for atoms in relaxed:
            pops.find_space_group(atoms, self.keys.symprec)
        distinct = pops.remove_duplicates(relaxed, self.fitness, self.keys)
        log.info("%d structures, %d of them distinct", len(relaxed), len(distinct))
        return distinct

    def _learn_and_rank(self, generation: int, relaxed: list[Atoms]) -> None:
        """Learning, re-evaluation and free energies, at the place of MAGUS's ``set_good_pop``."""
        if self.state is None:
            return
        survivors = [*self.good, *self.keep, *self.current]
        last = generation == self.num_gen
        seeds = after_generation(self.state, relaxed, survivors, generation, last=last)
        if self.state.learn:
            self.relaxer.evaluator = self.state.potential
        self.archive.write_seeds(generation + 1, seeds)
        self._keep_usable()

    def _keep_usable(self) -> None:
        """Leave the structures that the new model can evaluate, with the space groups they have
        now."""
        self.good, self.keep, self.current = (
            [atoms for atoms in part if np.isfinite(atoms.info["enthalpy"])]
            for part in (self.good, self.keep, self.current)
        )
        for atoms in (*self.good, *self.keep, *self.current):
            pops.find_space_group(atoms, self.keys.symprec)
        require(self.current, "re-evaluation", "the new model evaluates none of the structures")

    def _select(self, generation: int) -> None:
        known = [*self.good, *self.keep]
        self.current = [
            pops.copied(atoms) for atoms in pops.replace_known(self.current, known, self.keys)
        ]
        candidates = [pops.copied(atoms) for atoms in [*known, *self.current]]
        self.good = pops.select_good(candidates, self.fitness, self.keys)
        self.keep = pops.select_keep(self.good, self.keys.save_good)

    def _finish(self, generation: int) -> None:
        balls = [self.geometry.ball_volume(self.geometry.counts(atoms)) for atoms in self.current]
        mean = np.mean(
            [atoms.get_volume() / ball for atoms, ball in zip(self.current, balls, strict=True)]
        )
        self.volume_ratio = float(0.7 * mean + 0.3 * self.volume_ratio)
        self._save("gen", generation, self.current)
        for name in ("good", "keep"):
            self._save(name, generation, getattr(self, name))
        self._save("good", "", self.good)
        self.archive.add_best(best_of(self.good, generation), self.units)
        self.archive.finish(generation, self.volume_ratio, time.perf_counter() - self.begun)
        self._load(generation)

    def _save(self, name: str, generation: Any, population: Sequence[Atoms]) -> None:
        self.archive.save(name, generation, population, self.units)
