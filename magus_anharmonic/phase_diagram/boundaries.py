"""Where the order of phases changes: boundaries P(T) with confidence bands, their slopes, and who
is lowest with which probability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.phase_diagram.points import GibbsPoint
from magus_anharmonic.phase_diagram.surface import GibbsSurface, SurfaceSamples, fit_surface
from magus_anharmonic.units import GPa, ev_per_a3_to_gpa

N_PRESSURES = 241
N_TEMPERATURES = 41
LEVELS = {"lower_95_GPa": 0.025, "lower_68_GPa": 0.16, "upper_68_GPa": 0.84, "upper_95_GPa": 0.975}
INF = math.inf
RESOLVED = 0.5
"""Part of the samples that must cross where the best fit does."""
SIGNIFICANT = 2.0
"""Standard errors by which G must differ somewhere between a crossing and the next one, on one side
at least: surfaces of two phases that have become one cross wherever the noise makes them."""


@dataclass(frozen=True)
class BoundaryPoint:
    """Where ``below`` (stable at lower pressure) and ``above`` have the same G at one temperature:
    a row of ``boundaries.csv``.

    pressure : the median of the sampled fits (that of the best fit where the median is open).
    The quantiles are those of the sampled fits; a sample in which the phases do not cross inside
    the points counts as beyond their last pressure, and a quantile that lies there is infinite
    ("open"). probability_inside : part of the samples that cross here. error : half the 68 % band,
    infinite when it is open. slope : dP/dT = dS/dV. entropy_change and volume_change : above minus
    below. stable : no third phase is lower there.
    """

    isotopes: str
    below: str
    above: str
    temperature_K: float  # noqa: N815
    pressure_GPa: float  # noqa: N815
    error_GPa: float  # noqa: N815
    lower_95_GPa: float  # noqa: N815
    lower_68_GPa: float  # noqa: N815
    upper_68_GPa: float  # noqa: N815
    upper_95_GPa: float  # noqa: N815
    probability_inside: float
    slope_GPa_per_K: float  # noqa: N815
    slope_error_GPa_per_K: float  # noqa: N815
    entropy_change_eV_per_K_per_atom: float  # noqa: N815
    volume_change_A3_per_atom: float  # noqa: N815
    stable: bool


@dataclass(frozen=True)
class SlopeCheck:
    """Clausius-Clapeyron with independent data: dP/dT of the boundary by G alone, and dS/dV by the
    entropies and volumes alone.

    GPa/K at ``temperature`` K; deviation : of the two in standard errors. reason : why there is no
    check, else empty.
    """

    isotopes: str
    below: str
    above: str
    temperature: float
    by_gibbs: float
    by_gibbs_error: float
    by_entropy_volume: float
    by_entropy_volume_error: float
    reason: str = ""

    @property
    def deviation(self) -> float:
        return abs(self.by_gibbs - self.by_entropy_volume) / math.hypot(
            self.by_gibbs_error, self.by_entropy_volume_error
        )


@dataclass(frozen=True)
class PhaseSet:
    """Surfaces of the phases of one composition and one set of isotopes, with as many samples of
    each."""

    isotopes: str
    surfaces: Mapping[str, GibbsSurface]
    samples: Mapping[str, SurfaceSamples]


def phase_set(
    points: Sequence[GibbsPoint],
    isotopes: str,
    *,
    n_samples: int = 1000,
    seed: int = 0,
    offset_error: float = 0.0,
) -> PhaseSet:
    """Fit every phase that has usable points; samples are seeded by phase, so that adding a phase
    changes no other.

    ``offset_error``: eV/atom, error of G of a phase as a whole (the potential's), independent
    between phases. It is drawn once for all isotopes of a phase, because they share the potential.
    """
    surfaces, samples = {}, {}
    for phase in dict.fromkeys(point.phase for point in points):
        mine = [point for point in points if point.phase == phase and point.isotopes == isotopes]
        if not any(point.usable for point in mine):
            continue
        surfaces[phase] = fit_surface(mine)
        tag = [seed, *phase.encode(), 0, *isotopes.encode()]
        sampled = surfaces[phase].sample(n_samples, np.random.default_rng(tag))
        shared = np.random.default_rng([seed, *phase.encode()])
        samples[phase] = replace(sampled, offsets=offset_error * shared.standard_normal(n_samples))
    return PhaseSet(isotopes, surfaces, samples)


def temperature_range(surfaces: Sequence[GibbsSurface], n: int = N_TEMPERATURES) -> np.ndarray:
    """Temperatures (K) that all surfaces have in common, their points among them; empty when there
    are none."""
    lows = max(surface.domain[:, 1].min() for surface in surfaces)
    highs = min(surface.domain[:, 1].max() for surface in surfaces)
    if lows > highs:
        return np.zeros(0)
    own = [t for surface in surfaces for t in surface.domain[:, 1] if lows <= t <= highs]
    return np.unique(np.concatenate([np.linspace(lows, highs, n if highs > lows else 1), own]))


def common_pressures(
    surfaces: Sequence[GibbsSurface], temperature: float, n: int = N_PRESSURES
) -> np.ndarray:
    """Pressures (GPa) inside the points of all surfaces at one temperature; empty when there are
    none."""
    lowest = min(surface.domain[:, 0].min() for surface in surfaces)
    highest = max(surface.domain[:, 0].max() for surface in surfaces)
    grid = np.unique(
        np.concatenate(
            [np.linspace(lowest, highest, n), *(surface.domain[:, 0] for surface in surfaces)]
        )
    )
    keep = np.all([surface.inside(grid, temperature) for surface in surfaces], axis=0)
    return grid[keep]


def pair_boundary(
    phases: PhaseSet, first: str, second: str, temperatures: np.ndarray
) -> list[BoundaryPoint]:
    """The crossings of two phases at the given temperatures (K) that at least half of the samples
    have too."""
    a, b = phases.surfaces[first], phases.surfaces[second]
    found = []
    for temperature in temperatures:
        grid = common_pressures([a, b], float(temperature))
        if len(grid) < 2:
            continue
        difference = b.gibbs(grid, temperature) - a.gibbs(grid, temperature)
        crossings = [(one.position, one.falls) for one in zero_crossings(grid, difference)]
        if not crossings:
            continue
        samples = phases.samples[second].values(grid, temperature) - phases.samples[first].values(
            grid, temperature
        )
        crossings = _significant(crossings, grid, difference, samples.std(axis=0))
        here: list[BoundaryPoint] = []
        for falling in (True, False):
            below, above = (first, second) if falling else (second, first)
            crossing_pressures = np.array(
                [pressure for pressure, falls in crossings if falls == falling]
            )
            for number, pressure in enumerate(crossing_pressures.tolist()):
                sampled = _sampled_crossings(grid, samples if falling else -samples, pressure)
                nearest = np.abs(sampled[:, None] - crossing_pressures).argmin(axis=1) == number
                inside = float((np.isfinite(sampled) & nearest).mean())
                if inside >= RESOLVED:
                    here.append(
                        _point(phases, below, above, float(temperature), pressure, sampled, inside)
                    )
        found += _alternating(here)
    return found


def _significant(
    crossings: Sequence[tuple[float, bool]],
    grid: np.ndarray,
    difference: np.ndarray,
    errors: np.ndarray,
) -> list[tuple[float, bool]]:
    """Those beside which the difference is more than noise."""
    inside = np.searchsorted([pressure for pressure, _ in crossings], grid)
    apart = np.abs(difference) > SIGNIFICANT * errors
    known = [bool(apart[inside == number].any()) for number in range(len(crossings) + 1)]
    return [
        crossing for number, crossing in enumerate(crossings) if known[number] or known[number + 1]
    ]


def _alternating(crossings: Sequence[BoundaryPoint]) -> list[BoundaryPoint]:
    """Of neighbouring crossings in the same sense, with none in the other between them, the most
    certain; by pressure."""
    kept: list[BoundaryPoint] = []
    for one in sorted(crossings, key=lambda crossing: crossing.pressure_GPa):
        if not kept or kept[-1].below != one.below:
            kept.append(one)
        elif one.probability_inside > kept[-1].probability_inside:
            kept[-1] = one
    return kept


class Crossing(NamedTuple):
    """A change of sign from point ``left`` to the next; ``position`` by a straight line."""

    left: int
    position: float
    falls: bool


def zero_crossings(x: np.ndarray, y: np.ndarray) -> list[Crossing]:
    """Where ``y``, given at rising ``x``, changes its sign; a zero counts once, on its left."""
    signs = np.sign(y)
    changes = np.flatnonzero((signs[:-1] != signs[1:]) & (signs[:-1] != 0))
    return [
        Crossing(int(i), float(x[i] - y[i] * (x[i + 1] - x[i]) / (y[i + 1] - y[i])), bool(y[i] > 0))
        for i in changes
    ]


def _sampled_crossings(grid: np.ndarray, samples: np.ndarray, near: float) -> np.ndarray:
    """(n,) the falling crossing of each sample nearest to ``near``; -inf (inf) where the sample is
    below (above) zero all along.

    A sample that only rises counts by its sign at ``near``.
    """
    left, right = samples[:, :-1], samples[:, 1:]
    falling = (left > 0) & (right <= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing_pressures = grid[:-1] + np.diff(grid) * left / (left - right)
    distance = np.where(falling, np.abs(crossing_pressures - near), INF)
    best = np.argmin(distance, axis=1)
    rows = np.arange(len(samples))
    crossing = np.where(falling[rows, best], crossing_pressures[rows, best], 0.0)
    at_near = samples[:, int(np.argmin(np.abs(grid - near)))]
    return np.where(falling.any(axis=1), crossing, np.where(at_near > 0, INF, -INF))


def quantile(values: np.ndarray, level: float) -> float:
    """Quantile of numbers that may be infinite (by order, no interpolation across infinity)."""
    ordered = np.sort(values)
    position = level * (len(ordered) - 1)
    low, high = ordered[int(np.floor(position))], ordered[int(np.ceil(position))]
    if not (np.isfinite(low) and np.isfinite(high)):
        return float(low if level < 0.5 else high)
    return float(low + (high - low) * (position - np.floor(position)))


def _point(
    phases: PhaseSet,
    below: str,
    above: str,
    temperature: float,
    best: float,
    sampled: np.ndarray,
    inside: float,
) -> BoundaryPoint:
    middle = quantile(sampled, 0.5)
    pressure = middle if math.isfinite(middle) else best
    bands = {name: quantile(sampled, level) for name, level in LEVELS.items()}
    low, high = bands["lower_68_GPa"], bands["upper_68_GPa"]
    a, b = phases.surfaces[below], phases.surfaces[above]
    entropy = float(b.entropy(pressure, temperature) - a.entropy(pressure, temperature))
    volume = float(b.volume(pressure, temperature) - a.volume(pressure, temperature))
    slopes = _slopes(phases.samples[below], phases.samples[above], pressure, temperature)
    here = float(a.gibbs(pressure, temperature))
    return BoundaryPoint(
        phases.isotopes,
        below,
        above,
        temperature,
        pressure,
        0.5 * (high - low) if math.isfinite(low) and math.isfinite(high) else INF,
        **bands,
        probability_inside=inside,
        slope_GPa_per_K=ev_per_a3_to_gpa(entropy / volume),
        slope_error_GPa_per_K=_median(slopes)[1],
        entropy_change_eV_per_K_per_atom=entropy,
        volume_change_A3_per_atom=volume,
        stable=all(
            float(other.gibbs(pressure, temperature)) >= here
            for name, other in phases.surfaces.items()
            if name not in (below, above) and other.inside(pressure, temperature)
        ),
    )


def _slopes(
    below: SurfaceSamples, above: SurfaceSamples, pressure: GPa, temperature: float
) -> np.ndarray:
    """(n_samples,) dP/dT = dS/dV of the boundary of two phases at one point, GPa/K."""
    at = (pressure, temperature)
    entropy = below.values(*at, "T") - above.values(*at, "T")
    volume = above.values(*at, "P") - below.values(*at, "P")
    return ev_per_a3_to_gpa((entropy / volume)[:, 0])


def _median(values: np.ndarray) -> tuple[float, float]:
    """Median and half the 68 % range."""
    low, middle, high = np.quantile(values, [0.16, 0.5, 0.84])
    return float(middle), float(0.5 * (high - low))


def all_boundaries(phases: PhaseSet) -> list[BoundaryPoint]:
    """Every crossing of every pair of phases, over the temperatures that the two have in common."""
    found = []
    for first, second in itertools.combinations(phases.surfaces, 2):
        temperatures = temperature_range([phases.surfaces[first], phases.surfaces[second]])
        found += pair_boundary(phases, first, second, temperatures)
    return found


def lowest_probabilities(phases: PhaseSet, pressure: GPa, temperature: float) -> dict[str, float]:
    """Fraction of the samples in which each phase is lowest at (GPa, K), among those whose points
    reach there."""
    names = [
        name
        for name, surface in phases.surfaces.items()
        if bool(surface.inside(pressure, temperature))
    ]
    if not names:
        return {}
    sampled = np.stack([phases.samples[name].values(pressure, temperature)[:, 0] for name in names])
    counts = np.bincount(np.argmin(sampled, axis=0), minlength=len(names)) / sampled.shape[1]
    return dict(zip(names, counts.tolist(), strict=True))


def slope_check(
    points: Sequence[GibbsPoint],
    boundary: Sequence[BoundaryPoint],
    *,
    n_samples: int = 400,
    seed: int = 0,
) -> SlopeCheck | None:
    """Compare the two sides of Clausius-Clapeyron in the middle of one boundary; None for a
    boundary at one temperature."""
    temperatures = [one.temperature_K for one in boundary]
    if not boundary or max(temperatures) - min(temperatures) <= 0:
        return None
    middle = 0.5 * (min(temperatures) + max(temperatures))
    one = min(boundary, key=lambda point: abs(point.temperature_K - middle))
    pairs = [
        [p for p in points if p.phase == name and p.isotopes == one.isotopes]
        for name in (one.below, one.above)
    ]

    def slope(*kinds: str) -> tuple[float, float]:
        samples = [
            fit_surface(mine, kinds).sample(n_samples, np.random.default_rng([seed, k]))
            for k, mine in enumerate(pairs)
        ]
        return _median(_slopes(*samples, one.pressure_GPa, one.temperature_K))

    found, reason = (math.nan,) * 4, ""
    warm = [p for mine in pairs for p in mine if p.usable and p.temperature_K > 0]
    if all(p.volume_error > 0 and p.entropy_error > 0 for p in warm):
        try:
            found = (*slope("G"), *slope("V", "S"))
        except InputError as error:
            reason = str(error)
    else:
        reason = "not every point has a volume and an entropy with their errors"
    return SlopeCheck(one.isotopes, one.below, one.above, one.temperature_K, *found, reason)


@dataclass(frozen=True)
class IsotopeShift:
    """Pressure of a boundary minus that with the ``reference`` masses at the same temperature."""

    isotopes: str
    reference: str
    below: str
    above: str
    temperature_K: float  # noqa: N815
    shift_GPa: float  # noqa: N815
    error_GPa: float  # noqa: N815


def isotope_shifts(boundary: Sequence[BoundaryPoint], reference: str) -> list[IsotopeShift]:
    """The shift of each boundary against that of the isotopes ``reference``."""
    base = {
        (one.below, one.above, round(one.temperature_K, 6)): one
        for one in boundary
        if one.isotopes == reference
    }
    return [
        IsotopeShift(
            one.isotopes,
            reference,
            one.below,
            one.above,
            one.temperature_K,
            one.pressure_GPa - other.pressure_GPa,
            math.hypot(one.error_GPa, other.error_GPa),
        )
        for one in boundary
        if one.isotopes != reference
        and (other := base.get((one.below, one.above, round(one.temperature_K, 6))))
    ]
