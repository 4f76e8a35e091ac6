"""The fitness ``SSCHA``: flat ``info`` keys in, one finite number per structure out (larger is better).

Pure, because MAGUS calls fitnesses 5-10 times per generation, on duplicates and in forked workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from magus_anharmonic.ranking.candidate import RANKED
from magus_anharmonic.ranking.estimate import GibbsEstimate, fit_estimate

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
    if _text(info.get("free_energy_status")) not in states:
        return None
    model = _text(info.get("model"))
    if not model or model != _text(info.get("free_energy_model")):
        return None
    return number(info.get("free_energy"))


def has_failed(info: Mapping[str, Any]) -> bool:
    """True when SSCHA failed with the model that gave the enthalpy."""
    same_model = _text(info.get("model")) == _text(info.get("free_energy_model"))
    return _text(info.get("free_energy_status")) == "failed" and same_model


def fitness_values(infos: Sequence[Mapping[str, Any]]) -> list[float]:
    """Minus the free energy per atom of every structure, finite whatever the ``info`` holds.

    * a computed G counts when it belongs to the model of the enthalpy (``free_energy_model == model``);
    * a stale or missing one is replaced by the estimate from those present (`fit_estimate`), in the order of the
      enthalpies, and never above the best computed one; without any computed G the enthalpy itself counts;
    * so is that of an unconverged run, but it is an upper bound: where it is below the estimate it counts, above it speaks against nobody;
    * below those come structures without a usable enthalpy, below everything those whose SSCHA failed.
    """
    enthalpies = [number(info.get("enthalpy")) for info in infos]
    failed = [has_failed(info) for info in infos]
    gibbs = [None if bad else computed_gibbs(info) for info, bad in zip(infos, failed, strict=True)]
    errors = [number(info.get("free_energy_error")) or 0.0 for info in infos]
    pairs = [(h, g, e) for h, g, e in zip(enthalpies, gibbs, errors, strict=True) if g is not None]
    known = [pair for pair in pairs if pair[0] is not None]
    estimate = fit_estimate(*zip(*known, strict=True)) if known else None
    best = min((pair[1] for pair in pairs), default=None)
    values = {i: g for i, g in enumerate(gibbs) if g is not None}
    others = {i: h for i, h in enumerate(enthalpies) if h is not None and i not in values and not failed[i]}
    values.update(_estimated(others, estimate, best))
    if best is not None:
        bounds = {i: bound for i in others if (bound := _gibbs(infos[i], ("unconverged",))) is not None}
        values.update({i: max(min(values[i], bound), math.nextafter(best, math.inf)) for i, bound in bounds.items()})
    worst = max(values.values(), default=0.0)
    return [-values.get(i, worst + (2.0 if failed[i] else 1.0)) for i in range(len(infos))]


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
