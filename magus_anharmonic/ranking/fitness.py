"""The fitness ``SSCHA``: flat ``info`` keys in, one finite number per structure out (larger is better).

Pure, because MAGUS calls fitnesses 5-10 times per generation, on duplicates and in forked workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.hull import above_hull
from magus_anharmonic.ranking.candidate import RANKED
from magus_anharmonic.ranking.compositions import composition
from magus_anharmonic.ranking.estimate import GibbsEstimate, fit_estimates

LARGEST = 1e6
"""eV/atom; anything larger is no energy."""


def number(value: Any) -> float | None:
    """``value`` as a finite float when it is a real number of sensible size, else None (bool and text are no numbers)."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    energy = float(value) if abs(value) <= LARGEST else math.nan
    return energy if math.isfinite(energy) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def computed_gibbs(info: Mapping[str, Any]) -> float | None:
    """The SSCHA free energy (eV/atom) if there is one of the model that gave the enthalpy, else None."""
    return _gibbs(info, RANKED)


def _gibbs(info: Mapping[str, Any], states: Sequence[str]) -> float | None:
    if _text(info.get("status")) not in states:
        return None
    model = _text(info.get("model"))
    if not model or model != _text(info.get("gibbs_model")):
        return None
    return number(info.get("gibbs"))


def copy_order(info: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Sorts copies of one structure, the best first: a computed free energy before none, then the lower G, then the lower enthalpy."""
    gibbs, enthalpy = computed_gibbs(info), number(info.get("enthalpy"))
    return gibbs is None, gibbs or 0.0, math.inf if enthalpy is None else enthalpy


def population_fitness(structures: Sequence[Atoms]) -> list[float]:
    """`fitness_values` of structures with ``info`` and their own compositions."""
    return fitness_values([atoms.info for atoms in structures], [composition(atoms) for atoms in structures])


def fitness_values(infos: Sequence[Mapping[str, Any]], compositions: Sequence[str] | None = None) -> list[float]:
    """Minus the free energy per atom of every structure, finite whatever the ``info`` holds.

    * a computed G counts when it belongs to the model of the enthalpy (``gibbs_model == model``);
    * a stale or missing one is replaced by the estimate from those present (`fit_estimates`), in the order of the
      enthalpies, and never above the best computed one of its composition; without any computed G the enthalpy itself counts;
    * so is that of an unconverged run, but it is an upper bound: where it is below the estimate it counts, above it speaks against nobody;
    * so is that of a run that failed, or whose worker died: a result that is not there speaks against nobody;
    * below all others come structures without a usable enthalpy.

    With several ``compositions`` (reduced formulas; None: all the same) it is minus the distance above the hull of those numbers.
    """
    names = ["" for _ in infos] if compositions is None else list(compositions)
    values = _free_energies(infos, names)
    if len({names[i] for i in values}) > 1:
        order = sorted(values)
        values = dict(zip(order, above_hull([names[i] for i in order], np.array([values[i] for i in order])).tolist(), strict=True))
    worst = max(values.values(), default=0.0)
    return [-values.get(i, worst + 1.0) for i in range(len(infos))]


def _free_energies(infos: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[int, float]:
    """G by position, computed or estimated (eV/atom), of those that have a usable enthalpy or G."""
    enthalpies = [number(info.get("enthalpy")) for info in infos]
    gibbs = [computed_gibbs(info) for info in infos]
    errors = [number(info.get("gibbs_error")) or 0.0 for info in infos]
    known = [(n, h, g, e) for n, h, g, e in zip(names, enthalpies, gibbs, errors, strict=True) if g is not None and h is not None]
    estimates = fit_estimates(known, names)
    values = {i: g for i, g in enumerate(gibbs) if g is not None}
    for name in dict.fromkeys(names):
        best = min((g for i, g in enumerate(gibbs) if g is not None and names[i] == name), default=None)
        others = {i: h for i, h in enumerate(enthalpies) if names[i] == name and h is not None and gibbs[i] is None}
        values.update(_estimated(others, estimates.get(name), best))
        if best is not None:
            bounds = {i: bound for i in others if (bound := _gibbs(infos[i], ("unconverged",))) is not None}
            values.update({i: max(min(values[i], bound), math.nextafter(best, math.inf)) for i, bound in bounds.items()})
    return values


def _estimated(enthalpies: dict[int, float], estimate: GibbsEstimate | None, best: float | None) -> dict[int, float]:
    """Estimates that keep the order of the enthalpies strictly and stay above ``best``."""
    result: dict[int, float] = {}
    floor = -math.inf if best is None else best
    last: float | None = None
    for index, enthalpy in sorted(enthalpies.items(), key=lambda item: item[1]):
        value = enthalpy if estimate is None else estimate(enthalpy)
        if last is None or enthalpy > last:
            floor = max(value, math.nextafter(floor, math.inf))
        result[index] = floor
        last = enthalpy
    return result
