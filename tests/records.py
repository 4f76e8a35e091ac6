"""Runs and candidates from their numbers, for tests."""

import csv
from dataclasses import fields

from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.ranking.elimination import Standing
from magus_anharmonic.ranking.store import Run
from magus_anharmonic.sscha.record import FreeEnergy

NUMBERS = {one.name for one in fields(FreeEnergy)}


def csv_rows(path):
    """The rows of a table, by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def stored_run(structure, key, start, status="converged", **values):
    """A run; ``values`` : fields of it or of its free energy."""
    energy = {name: values.pop(name) for name in NUMBERS & values.keys()}
    numbers = FreeEnergy(status=status, **energy)
    return Run(structure=structure, key=key, start=start, free_energy=numbers, **values)


def a_candidate(id, atoms=None, status="static", **values):
    """A candidate; ``values`` : fields of it or of its free energy."""
    energy = {name: values.pop(name) for name in NUMBERS & values.keys()}
    return Candidate(id=id, atoms=atoms, free_energy=FreeEnergy(status=status, **energy), **values)


def standing(gibbs, error=1e-3, left=0.0, fallen=0.0, converged=False, n_populations=3, **more):
    """A `Standing` in a race: G, its error, what it may still fall by and fell by last, eV/atom."""
    status = "converged" if converged else "unconverged"
    numbers = {"gibbs": gibbs, "gibbs_error": error, "predicted_decrease": left}
    return Standing(FreeEnergy(status, n_populations=n_populations, **numbers), fallen, **more)
