"""The fitness ``SSCHA`` of MAGUS: reads what the hook stored, computes nothing."""

from __future__ import annotations

from typing import Any

from magus.fitness import FitnessCalculator


class SschaFitness(FitnessCalculator):
    """``Fitness: [SSCHA]``: minus the free energy in eV/atom, an estimate where SSCHA has not run; always finite.

    With ``formulaType: var`` minus its distance above the hull of the population, as MAGUS's ``Ehull`` for enthalpies.

    MAGUS asks 5 to 10 times per search round, on duplicates and in forked workers, so this must stay cheap.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)

    def calc(self, pop: Any) -> None:
        """Set ``info['fitness']['sscha']`` of every individual."""
        from magus_anharmonic.ranking.fitness import population_fitness

        individuals = list(pop)
        for individual, value in zip(individuals, population_fitness(individuals), strict=True):
            individual.info["fitness"]["sscha"] = value
