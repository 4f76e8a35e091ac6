"""What this package does between two rounds of MAGUS: hand the population over, take it back, seed the next round."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import read

from magus_anharmonic.generation import SearchState, after_generation, start
from magus_anharmonic.plugins.calculator import MatterSimCalculator
from magus_anharmonic.plugins.modes import is_mode
from magus_anharmonic.plugins.seeds import clear_seeds, write_seeds
from magus_anharmonic.ranking.fitness import copy_order
from magus_anharmonic.report import report_at_end
from magus_anharmonic.report.screen import show_ranking
from magus_anharmonic.settings import Settings

logger = logging.getLogger(__name__)

# What MAGUS derived from positions and cell: out of date once a structure has been moved.
_DERIVED = ("compare_info", "fingerprint")


@dataclass
class Rounds:
    """One search of MAGUS with our keys: its settings, the calculator it relaxes with, and what its rounds share."""

    settings: Settings
    ml: bool
    calculator: MatterSimCalculator | None = None
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
        """After MAGUS has set up its folders and before its first step: load the model and write ``run.json``.

        Raises InputError (checkpoint, labeler, results of another version).
        """
        ml = is_mode(search, "MLMagus")
        calculator = search.ml_calculator if ml else search.main_calculator
        if not isinstance(calculator, MatterSimCalculator):
            return cls(settings, ml)
        if not restart:
            clear_seeds(search.seed_dir)
        calculator.begin_round(search.curgen)
        described = {"host": "magus", "command": "magus search" + (" -m" if ml else " -p" if is_mode(search, "PaMagus") else "")}
        state = start(settings, run_dir, restart=restart, learn=not ml, potential=calculator.potential, described=described)
        calculator.use(state.potential)
        calculator.seed = state.seed
        if ml:
            calculator.energy_rmse = state.energy_rmse
        return cls(settings, ml, calculator, state, repeats=restart)

    def prepare(self, search: Any) -> None:
        """At the start of a round: tell the calculator which one it is."""
        if self.calculator is not None:
            self.calculator.begin_round(search.curgen)

    def finish(self, search: Any) -> None:
        """Before MAGUS builds its good population: learn, re-evaluate, rank, and seed the next round."""
        calculator, state = self.calculator, self.state
        if calculator is None or state is None or (self.settings.learning is None and self.settings.sscha is None):
            return
        if self.ml:
            state.potential, state.energy_rmse = calculator.potential, calculator.energy_rmse
        survivors = [*search.good_pop, *search.keep_pop, *search.cur_pop]
        sample = self._relaxed(search) if state.learn else []
        self.ending = self.ending or search.curgen >= (state.n_generations or float("inf"))
        seeds = after_generation(state, sample, survivors, search.curgen, last=self.ending)
        calculator.use(state.potential)
        _renew_derived(survivors)
        for population in (search.good_pop, search.keep_pop):
            keep_better(population, search.cur_pop)
        # MAGUS saved it before; now energies are of the new model and free energies are there.
        search.cur_pop.save("gen", search.curgen)
        write_seeds(search.seed_dir, search.curgen + 1, seeds)
        self.finished, self.n_best = search.curgen, len(search.best_pop)

    def conclude(self, search: Any) -> None:
        """After MAGUS has left its loop: rank the last round as the last one, whatever ended it, and show what was found."""
        state = self.state
        if state is None or (self.settings.learning is None and self.settings.sscha is None):
            return
        if self.finished and not self.ending:
            logger.warning("the search ended in round %d of %s: its structures are ranked now", self.finished, state.n_generations)
            after_last, search.curgen, self.ending = search.curgen, self.finished, True
            del search.best_pop.pop[self.n_best :]
            search.analysis()
            search.curgen = after_last
        report_at_end(state.run_dir)
        show_ranking(state.run_dir)

    @staticmethod
    def _relaxed(search: Any) -> list[Atoms]:
        """This round's structures as they were relaxed, duplicates included: ``cur_pop`` has lost them."""
        file = Path(search.Population.results_dir) / f"raw{search.curgen}.traj"
        if not file.exists():
            logger.warning("%s is missing: labels are chosen among the structures without duplicates", file)
            return list(search.cur_pop)
        population = search.Population(read(file, index=":"), "raw", search.curgen)
        population.check()
        return list(population)


def keep_better(known: Any, current: Sequence[Any]) -> None:
    """Put a better copy in ``current`` in the place of every ``known`` structure that it equals.

    MAGUS replaces every current structure that equals a known one by the known one, and would lose the better copy.
    """
    for place, individual in enumerate(known):
        copies = [other for other in current if other == individual]
        known[place] = min([individual, *copies], key=lambda item: copy_order(item.info))


def _renew_derived(individuals: Iterable[Any]) -> None:
    for individual in individuals:
        for key in _DERIVED:
            individual.info.pop(key, None)
        individual.find_spg()
