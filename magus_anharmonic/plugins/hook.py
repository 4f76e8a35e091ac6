"""Wrapped methods of MAGUS: rounds and seeds.

SSCHA centroids as seeds of the next round, in the file where MAGUS looks for seeds.

What this package does between two rounds of MAGUS: hand the population over, take it back, seed the
next round.

The hook around MAGUS's search: checks the input first, and after each round learns, re-evaluates
and ranks.

``Magus.set_good_pop`` is the one place that every mode (plain, ``-m``, ``-p``) passes once per
round in the main process, with the relaxed and deduplicated population. Class attributes are
wrapped, because the classes' names are bound elsewhere already.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
from ase import Atoms
from ase.io import read, write
from magus.search.search import Magus

from magus_anharmonic.errors import InputError
from magus_anharmonic.generation import SearchState, after_generation, first_model, start
from magus_anharmonic.io.files import remove, replacing
from magus_anharmonic.plugins.calculator import MatterSimCalculator, evaluator_of_magus
from magus_anharmonic.plugins.modes import (
    check_input,
    check_installation,
    check_structure_type,
    is_mode,
    is_ours,
    single_thread,
)
from magus_anharmonic.plugins.parameters import (
    CALCULATOR_BLOCKS,
    OURS,
    check_restart,
    concerns_us,
    fitness_names,
    misspelt_blocks,
    stop,
    tame,
)
from magus_anharmonic.ranking.evaluators import ranking_evaluators
from magus_anharmonic.ranking.fitness import copy_order
from magus_anharmonic.report import report_at_end
from magus_anharmonic.report.screen import show_ranking
from magus_anharmonic.runs.lock import FolderLock, check_free, read_owner
from magus_anharmonic.runs.record import check_continues, check_results_version
from magus_anharmonic.settings import Settings, as_magus_reads, stages
from magus_anharmonic.structures import stripped, structure_id

logger = logging.getLogger(__name__)

MARK = "seeded_by"
OWN = "magus-anharmonic"


def seed_file(folder: str | Path, generation: int) -> Path:
    """``Seeds/seeds_{generation}.traj``, which MAGUS reads before it starts that generation."""
    return Path(folder) / f"seeds_{generation}.traj"


def write_seeds(folder: str | Path, generation: int, structures: Sequence[Atoms]) -> int:
    """Put ``structures`` into the seed file of ``generation``; the info they carry is kept.

    The user's own frames stay, first and unchanged (the file as it was is kept beside it as
    ``.user``); frames of an earlier, interrupted attempt are replaced; a structure that an earlier
    generation was given already is left out. Returns how many seeds of ours the file holds.
    """
    file = seed_file(folder, generation)
    known = _earlier(Path(folder), generation)
    new = {structure_id(atoms): atoms for atoms in structures}
    ours = [_seed(atoms) for key, atoms in new.items() if key not in known]
    present = _frames(file)
    users = [atoms for atoms in present if atoms.info.get(MARK) != OWN]
    if not ours and len(users) == len(present):
        return 0
    if users and len(users) == len(present):
        shutil.copy2(file, file.with_name(file.name + ".user"))
    _replace(file, users + ours)
    if ours:
        logger.info("%d SSCHA centroids are seeds of round %d (%s)", len(ours), generation, file)
    return len(ours)


def clear_seeds(folder: str | Path) -> None:
    """Take the seeds of an earlier search out of every seed file; a new search starts without them,
    the user's own stay."""
    for file in sorted(Path(folder).glob("seeds_*.traj")):
        present = _frames(file)
        users = [atoms for atoms in present if atoms.info.get(MARK) != OWN]
        if len(users) < len(present):
            _replace(file, users)


def _replace(file: Path, frames: list[Atoms]) -> None:
    if not frames:
        remove(file)
        return
    with replacing(file) as temporary:
        write(temporary, frames, format="traj")


def _seed(atoms: Atoms) -> Atoms:
    seed = stripped(atoms)
    seed.info = {**atoms.info, MARK: OWN}
    return seed


def _frames(file: Path) -> list[Atoms]:
    if not file.exists() or file.stat().st_size == 0:
        return []
    return read(file, index=":", format="traj")


def _earlier(folder: Path, generation: int) -> set[str]:
    """Ids of the structures that we seeded into generations before this one."""
    found: set[str] = set()
    for file in folder.glob("seeds_*.traj"):
        number = file.stem.removeprefix("seeds_")
        if number.isdigit() and int(number) < generation:
            found |= {structure_id(atoms) for atoms in _frames(file) if atoms.info.get(MARK) == OWN}
    return found


# What MAGUS derived from positions and cell: out of date once a structure has been moved.
_DERIVED = ("compare_info", "fingerprint")


@dataclass
class Rounds:
    """One search of MAGUS with our keys: its settings, the calculator it relaxes with, and what its
    rounds share."""

    settings: Settings
    ml: bool
    calculator: MatterSimCalculator | None = None
    """None: one of MAGUS's own relaxes."""
    state: SearchState | None = None
    repeats: bool = False
    """Whether the next round is one that an earlier process began."""
    ending: bool = False
    """Whether the round under way is the last one; before that it is told by ``numGen``."""
    finished: int = 0
    """The last round that this process went through."""
    n_best: int = 0
    """Members of ``best_pop`` before that round."""

    @classmethod
    def begin(cls, search: Any, settings: Settings, run_dir: Path, *, restart: bool) -> Rounds:
        """After MAGUS has set up its folders and before its first step: load the model and write
        ``run.json``.

        Raises InputError (checkpoint, labeler, results of another version).
        """
        ml = is_mode(search, "MLMagus")
        calculator = search.ml_calculator if ml else search.main_calculator
        ours = calculator if isinstance(calculator, MatterSimCalculator) else None
        if ours is None and settings.sscha is None:
            return cls(settings, ml)
        if not restart:
            clear_seeds(search.seed_dir)
        described = {
            "host": "magus",
            "command": (
                "magus search" + (" -m" if ml else " -p" if is_mode(search, "PaMagus") else "")
            ),
        }
        seed = None
        if ours is not None:
            if settings.from_scratch:
                seed = first_model(
                    settings,
                    run_dir,
                    functools.partial(_crystals_of, search),
                    restart=restart,
                    described=described,
                )
            ours.begin_round(search.curgen)
        own = evaluator_of_magus(search, ml=ml) if ours is None else ours.potential
        ranking, certifier = ranking_evaluators(settings, own)
        state = start(
            settings,
            run_dir,
            ranking,
            restart=restart,
            learn=not ml,
            seed=seed,
            described=described,
            certifier=certifier,
        )
        if ours is not None:
            ours.seed = state.seed
            if ml:
                ours.energy_rmse = state.energy_rmse
        elif settings.evaluator is None:
            # the calculator of MAGUS has relaxed them, and each further step may be a DFT job
            state.relaxation_steps = 0
        return cls(settings, ml, ours, state, repeats=restart)

    def prepare(self, search: Any) -> None:
        """At the start of a round: tell the calculator which one it is."""
        if self.calculator is not None:
            self.calculator.begin_round(search.curgen)

    def finish(self, search: Any) -> None:
        """Before MAGUS builds its good population: learn, re-evaluate, rank, and seed the next
        round."""
        calculator, state = self.calculator, self.state
        if state is None or (self.settings.learning is None and self.settings.sscha is None):
            return
        if self.ml and self.settings.evaluator is None:
            if calculator is None:
                state.potential = evaluator_of_magus(search, ml=True)
            else:
                state.potential, state.energy_rmse = calculator.potential, calculator.energy_rmse
        survivors = [*search.good_pop, *search.keep_pop, *search.cur_pop]
        sample = self._relaxed(search) if state.learn else []
        self.ending = self.ending or search.curgen >= (state.n_generations or float("inf"))
        seeds = after_generation(state, sample, survivors, search.curgen, last=self.ending)
        if state.learn and calculator is not None:
            calculator.use(state.potential)
        _renew_derived(survivors)
        for population in (search.good_pop, search.keep_pop):
            keep_better(population, search.cur_pop)
        # MAGUS saved it before; now energies are of the new model and free energies are there.
        search.cur_pop.save("gen", search.curgen)
        write_seeds(search.seed_dir, search.curgen + 1, seeds)
        self.finished, self.n_best = search.curgen, len(search.best_pop)

    def conclude(self, search: Any) -> None:
        """After MAGUS has left its loop: rank the last round as the last one, whatever ended it,
        and show what was found."""
        state = self.state
        if state is None or (self.settings.learning is None and self.settings.sscha is None):
            return
        if self.finished and not self.ending:
            logger.warning(
                "the search ended in round %d of %s: its structures are ranked now",
                self.finished,
                state.n_generations,
            )
            after_last, search.curgen, self.ending = search.curgen, self.finished, True
            del search.best_pop.pop[self.n_best :]
            search.analysis()
            search.curgen = after_last
        report_at_end(state.run_dir)
        show_ranking(state.run_dir)

    @staticmethod
    def _relaxed(search: Any) -> list[Atoms]:
        """This round's structures as they were relaxed, duplicates included: ``cur_pop`` has lost
        them."""
        file = Path(search.Population.results_dir) / f"raw{search.curgen}.traj"
        if not file.exists():
            logger.warning(
                "%s is missing: labels are chosen among the structures without duplicates", file
            )
            return list(search.cur_pop)
        population = search.Population(read(file, index=":"), "raw", search.curgen)
        population.check()
        return list(population)


def keep_better(known: Any, current: Sequence[Any]) -> None:
    """Put a better copy in ``current`` in the place of every ``known`` structure that it equals.

    MAGUS replaces every current structure that equals a known one by the known one, and would lose
    the better copy.
    """
    for index, individual in enumerate(known):
        copies = [other for other in current if other == individual]
        known[index] = min([individual, *copies], key=lambda item: copy_order(item.info))


def _renew_derived(individuals: Iterable[Any]) -> None:
    for individual in individuals:
        for key in _DERIVED:
            individual.info.pop(key, None)
        individual.find_spg()


# Beside the search objects, not on them: `magus search -p` pickles the whole object for its
# workers.
_ROUNDS: WeakKeyDictionary[Magus, Rounds] = WeakKeyDictionary()


def attach() -> None:
    """Wrap the methods of ``Magus``; once, however often it is called."""
    methods = (
        ("__init__", _start),
        ("run", _to_the_end),
        ("update_volume_ratio", _before_round),
        ("set_good_pop", _after_round),
    )
    for name, around in methods:
        original = Magus.__dict__[name]
        if not hasattr(original, "by_magus_anharmonic"):
            setattr(Magus, name, _wrapped(original, around))


def _attach_to_miner() -> None:
    """``-smfr`` gives a search a step of its own, which begins with another function than ours is
    around."""
    fly = sys.modules.get("magus.reconstruct.fly_interface")
    if fly is not None and not hasattr(
        fly.smfr_patch_to_Magus.update_volume_ratio, "by_magus_anharmonic"
    ):
        step = _wrapped(fly.smfr_patch_to_Magus.update_volume_ratio, _before_round)
        fly.smfr_patch_to_Magus.update_volume_ratio = staticmethod(step)


def attach_to_surfaces(module: Any) -> None:
    """Have ``magus.reconstruct.rcs_interface`` refuse what SSCHA cannot do before it matches two
    crystals for minutes; that is done while MAGUS reads its input, before there is a search."""
    prepare = module.rcs_interface

    @functools.wraps(prepare)
    def rcs_interface(parameters: Any) -> None:
        if concerns_us(parameters.p_dict):
            try:
                check_structure_type(parameters.p_dict)
            except InputError as error:
                stop(error)
        prepare(parameters)

    module.rcs_interface = rcs_interface


def _wrapped(original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Magus, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, self), self, *args, **kwargs)

    method.by_magus_anharmonic = True  # type: ignore[attr-defined]
    return method


def _start(
    original: Callable[..., None], search: Magus, parameters: Any, restart: bool = False
) -> None:
    keys = parameters.p_dict
    if not concerns_us(keys) and not misspelt_blocks(keys):
        original(parameters, restart=restart)
        return
    tame()
    ml = is_mode(search, "MLMagus")
    if "SSCHA" in fitness_names(keys) and "Comparator" not in keys:
        # MAGUS's own default looks at shapes alone, and would throw away what SSCHA is to tell
        # apart.
        keys["Comparator"] = {"comparator_list": ["naive"]}
        logger.info(
            "Comparator: naive (of equal structures: space group, volume within dV, energy within"
            " dE), because of Fitness: [SSCHA]"
        )
    try:
        settings = check_input(keys, ml=ml, parallel=is_mode(search, "PaMagus"))
        for name in CALCULATOR_BLOCKS:
            # of a list of one stage MAGUS would make a chain, which has no model and cannot learn
            if name in keys and stages(block := as_magus_reads(keys[name])) == OURS:
                keys[name] = block
        run_dir = _run_dir(keys)
        if is_mode(search, "PaMagus"):
            single_thread()
        settings = check_installation(settings, run_dir)
        if not ml:
            # A block for `-m` may stand in the same input; here it plays no part.
            settings = settings.model_copy(update={"ml_calculator": {}})
        if restart:
            check_restart(Path("log.txt"))
            check_results_version(run_dir)
            if is_ours(settings, learner=ml) or settings.sscha is not None:
                check_continues(run_dir, settings, "magus")
        _lock(search, run_dir, only_check=True)
        _seed_generators(settings, 0)
        original(parameters, restart=restart)
        _lock(search, run_dir)
        _ROUNDS[search] = Rounds.begin(search, settings, run_dir, restart=restart)
    except InputError as error:
        stop(error)


def _lock(search: Magus, run_dir: Path, *, only_check: bool = False) -> None:
    """Hold the lock of the results folder as long as ``search`` lives; raises ``InputError`` when
    another process holds it.

    First looked at before MAGUS moves an earlier ``results`` away, taken once the new folder is
    there.
    """
    owner = read_owner(run_dir)
    if owner is not None and owner.alive and owner.pid == os.getpid():
        return
    if only_check:
        check_free(run_dir)
        return
    lock = FolderLock(run_dir, "magus search")
    finalize(search, lock.release)


def _run_dir(keys: Mapping[str, Any]) -> Path:
    return Path(keys["resultsDir"]) / "anharmonic"


def _to_the_end(original: Callable[..., None], search: Magus, *args: Any) -> None:
    _attach_to_miner()
    if search in _ROUNDS and is_mode(search, "MLMagus") and "one_step" in vars(search):
        stop(
            InputError(
                "-m -smfr: the miner's step relaxes with MainCalculator and never trains; search"
                " with -m or with -smfr"
            )
        )
    original(*args)
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        try:
            rounds.conclude(search)
        except InputError as error:
            stop(error)


def _before_round(original: Callable[..., None], search: Magus) -> None:
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        _seed_generators(rounds.settings, search.curgen)
        rounds.prepare(search)
        if rounds.repeats:
            # MAGUS reads the ratio with which this round began from its log, and would mix the
            # volumes of the round before in once more.
            rounds.repeats = False
            return
    original()


def _crystals_of(search: Magus, seed: int, batch: int, n: int) -> list[Atoms]:
    """``n`` random crystals by MAGUS's generator, the same ones for the same ``seed`` and
    ``batch``."""
    random.seed(f"{seed} 0 {batch}")
    np.random.seed([seed % 2**32, 0, batch])
    return [stripped(atoms) for atoms in search.atoms_generator.generate_pop(n)]


def _seed_generators(settings: Settings, generation: int) -> None:
    # MAGUS draws from the global generators; seeded per round, a restarted search draws what it
    # would have drawn.
    if settings.seed is not None:
        random.seed(f"{settings.seed} {generation}")
        np.random.seed([settings.seed % 2**32, generation])


def _after_round(original: Callable[..., None], search: Magus) -> None:
    rounds = _ROUNDS.get(search)
    if rounds is not None:
        try:
            rounds.finish(search)
        except InputError as error:
            stop(error)
    original()
