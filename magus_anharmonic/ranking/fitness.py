"""Estimates of G and the fitness.

Free energies of structures that had no SSCHA: a line through those that had.

Well above the ground state G is nearly linear in H (Fig. 6c of the paper), so ``G_est = a + b H +
margin`` with a margin of two standard deviations of the fit: an estimate never flatters.

Rankings of several compositions: free energies above the hull of all, beside the order inside each.

G per atom of two compositions cannot be compared; its distance above the lower convex hull can. The
hull is that of the candidates themselves, so that the extreme compositions are on it. Only computed
free energies make it; estimates are measured against it.

The fitness ``SSCHA``: flat ``info`` keys in, one finite number per structure out (larger is
better).

Pure, because MAGUS calls fitnesses 5-10 times per generation, on duplicates and in forked workers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic import third_party
from magus_anharmonic.errors import InputError
from magus_anharmonic.hull import (
    HullStatistics,
    above_hull,
    hull_probabilities,
    lower_hull,
    pool_fractions,
    reduced_formula,
)
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.sscha.record import OLD_STATES, RANKED
from magus_anharmonic.structures import formula

MIN_POINTS = 3
SLOPE_RANGE = (0.5, 1.5)
"""Slopes outside come from points too close in H or from a phase transition among them; then b =
1."""


@dataclass(frozen=True)
class GibbsEstimate:
    """``G_est(H) = intercept + slope * H + margin``, eV/atom; grows with H."""

    intercept: float
    slope: float
    margin: float
    n_points: int

    def __call__(self, enthalpy: float) -> float:
        """Estimated free energy (eV/atom) of a structure with this enthalpy (eV/atom)."""
        return self.intercept + self.slope * enthalpy + self.margin

    @property
    def description(self) -> str:
        """The line in words, for the ranking's column ``reason``."""
        several = "s" * (self.n_points != 1)
        return (
            f"G = {self.slope:.3f} H {self.intercept + self.margin:+.4f} eV/atom, with a margin of"
            f" {self.margin:.4f} above {self.n_points} SSCHA result{several}"
        )


def fit_estimate(
    enthalpies: Sequence[float], gibbs: Sequence[float], errors: Sequence[float] | None = None
) -> GibbsEstimate | None:
    """Least-squares line from SSCHA results of one model, pressure and temperature; None without
    results.

    From three points on: the line, and two standard deviations of its residuals as margin. With
    fewer: ``H + max(G - H)`` plus two statistical errors. All in eV/atom; ``errors`` are standard
    errors of G.
    """
    h, g = np.asarray(enthalpies, dtype=float), np.asarray(gibbs, dtype=float)
    noise = np.zeros_like(g) if errors is None else np.asarray(errors, dtype=float)
    if h.size == 0:
        return None
    if h.size < MIN_POINTS:
        return _largest_shift(h, g, noise)
    centred = h - h.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (g - g.mean())) / spread if spread > 0 else 1.0
    free = h.size - 2
    if not SLOPE_RANGE[0] <= slope <= SLOPE_RANGE[1]:
        slope, free = 1.0, h.size - 1
    intercept = float(g.mean() - slope * h.mean())
    residuals = g - intercept - slope * h
    return GibbsEstimate(
        intercept, slope, 2.0 * float(np.sqrt(residuals @ residuals / free)), h.size
    )


def _largest_shift(h: np.ndarray, g: np.ndarray, noise: np.ndarray) -> GibbsEstimate:
    return GibbsEstimate(float(np.max(g - h)), 1.0, 2.0 * float(np.max(noise)), h.size)


def fit_estimates(
    known: Sequence[tuple[str, float, float, float]], compositions: Iterable[str]
) -> dict[str, GibbsEstimate]:
    """An estimate for each of the ``compositions`` from results (composition, H, G, standard error
    of G), eV/atom.

    A composition with results of its own has their line. Others have ``H + max(G - H)`` of all
    results plus two errors: energies per atom of several compositions lie on no common line. Empty
    without results.
    """
    if not known:
        return {}
    lines = {}
    for name in dict.fromkeys(compositions):
        own = [numbers for other, *numbers in known if other == name]
        fitted = fit_estimate(*zip(*own, strict=True)) if own else None
        lines[name] = fitted or _largest_shift(
            *np.array([numbers for _, *numbers in known], dtype=float).T
        )
    return lines


N_SAMPLES = 400
"""Hulls sampled for the error bars: probabilities to about 0.02."""
_SEED = 108


def composition(atoms: Atoms) -> str:
    """Reduced formula with the metals first, e.g. ``'H3S'`` (``'D3S'`` with deuterium): one name
    for all cells of a composition."""
    return reduced_formula(formula(atoms))


def with_heights(candidates: Sequence[Candidate], model_error: float | None) -> list[Candidate]:
    """Fill in the distances above the hulls of H and of G, with errors and probabilities; nothing
    where all are of one composition.

    ``p_on_hull_sampling`` is by sampling alone, ``p_on_hull_total`` with the expected error of each
    static energy (else ``model_error``, eV/atom), taken as independent: between compositions little
    cancels. Both are None where a phase has no such number.
    """
    if len({c.composition for c in candidates}) < 2:
        return list(candidates)
    return _with_gibbs_heights(_with_static_heights(candidates), model_error)


def _with_static_heights(candidates: Sequence[Candidate]) -> list[Candidate]:
    known = [c for c in candidates if c.enthalpy is not None]
    if not known:
        return list(candidates)
    heights = above_hull([c.composition for c in known], np.array([c.enthalpy for c in known]))
    filled = {
        c.id: replace(c, enthalpy_above_hull=float(height))
        for c, height in zip(known, heights, strict=True)
    }
    return [filled.get(c.id, c) for c in candidates]


def _with_gibbs_heights(
    candidates: Sequence[Candidate], model_error: float | None
) -> list[Candidate]:
    phases = [c for c in candidates if c.phase_ranked]
    if not phases:
        return list(candidates)
    fractions = pool_fractions([c.composition for c in (*phases, *candidates)])
    corners, everywhere = fractions[: len(phases)], fractions[len(phases) :]
    gibbs, sampling = [c.gibbs for c in phases], [c.gibbs_error or 0.0 for c in phases]
    at = tuple(map(tuple, corners.tolist())), tuple(gibbs)
    found = _sampled_hull(*at, tuple(sampling))
    model = [model_error if c.model_error is None else c.model_error for c in phases]
    known = [value for value in model if value is not None]
    total = (
        _sampled_hull(*at, tuple(np.hypot(sampling, known).tolist())).p_on_hull
        if len(known) == len(phases)
        else None
    )
    filled = {
        c.id: {
            "gibbs_above_hull_error": float(found.error[k]),
            "p_on_hull_sampling": float(found.p_on_hull[k]),
            "p_on_hull_total": None if total is None else float(total[k]),
        }
        for k, c in enumerate(phases)
    }
    hull = lower_hull(corners, np.array(gibbs), everywhere)
    return [
        replace(c, gibbs_above_hull=_above(c, float(height)), **filled.get(c.id, {}))
        for c, height in zip(candidates, hull, strict=True)
    ]  # fmt: skip


@functools.lru_cache(maxsize=8)
def _sampled_hull(
    corners: tuple[tuple[float, ...], ...], gibbs: tuple[float, ...], errors: tuple[float, ...]
) -> HullStatistics:
    """Kept, because a ranking makes its tables many times from the same numbers."""
    energies = np.array(gibbs)
    noise = np.random.default_rng(_SEED).normal(size=(N_SAMPLES, len(energies)))
    return hull_probabilities(np.array(corners), energies, energies + noise * errors)


def _above(candidate: Candidate, hull: float) -> float | None:
    """Computed free energies cannot be below the hull of which they are part; None for failures and
    beyond the hull's ends."""
    if candidate.gibbs is None or candidate.status == "failed" or not np.isfinite(hull):
        return None
    return max(0.0, candidate.gibbs - hull) if candidate.phase_ranked else candidate.gibbs - hull


LARGEST = 1e6
"""eV/atom; anything larger is no energy."""


def number(value: Any) -> float | None:
    """``value`` as a finite float when it is a real number of sensible size, else None (bool and
    text are no numbers)."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        return None
    energy = float(value) if abs(value) <= LARGEST else math.nan
    return energy if math.isfinite(energy) else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def computed_gibbs(info: Mapping[str, Any]) -> float | None:
    """The SSCHA free energy (eV/atom) if there is one of the model that gave the enthalpy, else
    None."""
    return _gibbs(info, RANKED)


def _gibbs(info: Mapping[str, Any], states: Sequence[str]) -> float | None:
    status = _text(info.get("status"))
    if OLD_STATES.get(status, status) not in states:
        return None
    model = _text(info.get("model"))
    if not model or model != _text(info.get("gibbs_model")):
        return None
    return number(info.get("gibbs"))


def copy_order(info: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Sorts copies of one structure, the best first: a computed free energy before none, then the
    lower G, then the lower enthalpy."""
    gibbs, enthalpy = computed_gibbs(info), number(info.get("enthalpy"))
    return gibbs is None, gibbs or 0.0, math.inf if enthalpy is None else enthalpy


EMBEDDED_FITNESSES = ("Enthalpy", "Ehull", "SSCHA")


@functools.cache
def third_party_fitness(name: str) -> Callable[[Sequence[Atoms]], list[float]]:
    """The fitness that another package declares under ``name``; raises ``InputError`` where it
    cannot be used.

    What it returns raises ``InputError`` too, unless it is one finite number per structure.
    """
    if name not in (others := third_party.declared("fitness")):
        only = "only MAGUS knows this fitness" if name in ("Gap", "XRD") else "unknown fitness"
        known = ", ".join((*EMBEDDED_FITNESSES, *others))
        raise InputError(f"Fitness: {name}: {only}; the embedded host has {known}")
    function = third_party.load("fitness", name)
    if not callable(function):
        raise InputError(f"Fitness: {name}: {function!r} is no function of a list of structures")

    def checked(structures: Sequence[Atoms]) -> list[float]:
        values = [float(value) for value in function(structures)]
        if len(values) != len(structures) or not np.isfinite(values).all():
            raise InputError(
                f"Fitness: {name}: must return one finite number for each of the"
                f" {len(structures)} structures, returned {values}"
            )
        return values

    return checked


def population_fitness(structures: Sequence[Atoms]) -> list[float]:
    """`fitness_values` of structures with ``info`` and their own compositions."""
    return fitness_values(
        [atoms.info for atoms in structures], [composition(atoms) for atoms in structures]
    )


def fitness_values(
    infos: Sequence[Mapping[str, Any]], compositions: Sequence[str] | None = None
) -> list[float]:
    """Minus the free energy per atom of every structure, finite whatever the ``info`` holds.

    * a computed G counts when it belongs to the model of the enthalpy (``gibbs_model == model``);
    * a stale or missing one is replaced by the estimate from those present (`fit_estimates`), in
      the order of the enthalpies, and never above the best computed one of its composition; without
      any computed G the enthalpy itself counts;
    * so is that of an unconverged run, but it is an upper bound: where it is below the estimate it
      counts, above it speaks against nobody;
    * so is that of a run that failed, or whose worker died: a result that is not there speaks
      against nobody;
    * below all others come structures without a usable enthalpy.

    With several ``compositions`` (reduced formulas; None: all the same) it is minus the distance
    above the hull of those numbers.
    """
    names = ["" for _ in infos] if compositions is None else list(compositions)
    values = _free_energies(infos, names)
    if len({names[i] for i in values}) > 1:
        order = sorted(values)
        values = dict(
            zip(
                order,
                above_hull(
                    [names[i] for i in order], np.array([values[i] for i in order])
                ).tolist(),
                strict=True,
            )
        )
    worst = max(values.values(), default=0.0)
    return [-values.get(i, worst + 1.0) for i in range(len(infos))]


def _free_energies(infos: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[int, float]:
    """G by position, computed or estimated (eV/atom), of those that have a usable enthalpy or G."""
    enthalpies = [number(info.get("enthalpy")) for info in infos]
    gibbs = [computed_gibbs(info) for info in infos]
    errors = [number(info.get("gibbs_error")) or 0.0 for info in infos]
    known = [
        (n, h, g, e)
        for n, h, g, e in zip(names, enthalpies, gibbs, errors, strict=True)
        if g is not None and h is not None
    ]
    estimates = fit_estimates(known, names)
    values = {i: g for i, g in enumerate(gibbs) if g is not None}
    for name in dict.fromkeys(names):
        best = min(
            (g for i, g in enumerate(gibbs) if g is not None and names[i] == name), default=None
        )
        others = {
            i: h
            for i, h in enumerate(enthalpies)
            if names[i] == name and h is not None and gibbs[i] is None
        }
        values.update(_estimated(others, estimates.get(name), best))
        if best is not None:
            bounds = {
                i: bound
                for i in others
                if (bound := _gibbs(infos[i], ("unconverged",))) is not None
            }
            values.update(
                {
                    i: max(min(values[i], bound), math.nextafter(best, math.inf))
                    for i, bound in bounds.items()
                }
            )
    return values


def _estimated(
    enthalpies: dict[int, float], estimate: GibbsEstimate | None, best: float | None
) -> dict[int, float]:
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
