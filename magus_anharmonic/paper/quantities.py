"""Each number of the paper, once: its value, its error, and what it rests on.

Figures, `validate` and the report take the numbers of a campaign from here and from `enthalpies`.

Critical pressures (Fig. 4a) come from a weighted parabola through points with error bars (four or
more, when it fits them), else from monotone interpolation (Fritsch and Carlson,
doi:10.1137/0717021). Their error is the spread over 400 sets of points drawn from the error bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from magus_anharmonic.paper.tables import (
    UNITS,
    GradientError,
    LearningPoint,
    Mode,
    ModelError,
    Parity,
    SpaceGroups,
)
from magus_anharmonic.phase_diagram.boundaries import zero_crossings
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.sscha.record import MINIMA
from magus_anharmonic.structures import decided_group, symbol_of
from magus_anharmonic.units import GPa, ev_to_mev

# --- models against their labels: Table I, Fig. 3 -------------------------------------------------

SETS = ("training", "validation", "test")
MODELS = ("foundation", "finetuned")


@dataclass(frozen=True)
class TableOne:
    """One line of Table I: root-mean-square errors, each with its standard error (of independent
    labels: the value over the root of 2n)."""

    set: str
    model: str
    model_id: str
    n: int
    energy_meV_per_atom: float
    force_meV_per_A: float
    stress_GPa: float | None
    relative_error: float | None = None


def table_one(rows: Sequence[ModelError]) -> list[TableOne]:
    """The lines in the paper's order: by set, foundation before finetuned; the last row of a model
    and set counts."""
    last = {(row.set, row.model): row for row in rows}
    chosen = [last[one, by] for one in SETS for by in MODELS if (one, by) in last]  # type: ignore[index]
    return [
        TableOne(
            r.set,
            r.model,
            r.model_id,
            r.n,
            ev_to_mev(r.energy_rmse_eV_per_atom),
            ev_to_mev(r.force_rmse_eV_per_A),
            r.stress_rmse_GPa,
            1.0 / math.sqrt(2.0 * r.n) if r.n > 0 else None,
        )
        for r in chosen
    ]


@dataclass(frozen=True)
class ParityStatistics:
    """Agreement of one quantity on one set over the points of ``parity.csv``, in the unit given.
    ``r_squared`` is None where the reference does not vary."""

    model: str
    set: str
    quantity: str
    unit: str
    n: int
    rmse: float
    mean_absolute: float
    mean: float
    r_squared: float | None


def parity_statistics(rows: Sequence[Parity]) -> list[ParityStatistics]:
    """RMSE, mean absolute and mean error (predicted minus reference) by model, set and quantity."""
    groups: dict[tuple[str, str, str], list[Parity]] = {}
    for row in rows:
        groups.setdefault((row.model, row.set, row.quantity), []).append(row)
    found = []
    for key, members in sorted(groups.items()):
        reference = np.array([row.reference for row in members])
        error = np.array([row.predicted for row in members]) - reference
        spread = float(np.sum((reference - reference.mean()) ** 2))
        means = float(np.sqrt(np.mean(error**2))), float(np.abs(error).mean()), float(error.mean())
        r_squared = 1.0 - float(np.sum(error**2)) / spread if spread > 0 else None
        found.append(ParityStatistics(*key, UNITS[key[2]], len(members), *means, r_squared))
    return found


# --- learning curves ------------------------------------------------------------------------------

Curve = tuple[str, str, int | None, str, int]
"""Step, set, number of its labels, where they came from, and the round where that is not known."""


def learning_curves(rows: Sequence[LearningPoint]) -> dict[Curve, list[LearningPoint]]:
    """Errors against the round on one and the same set of labels each: of the test set where a step
    has one, else of the validation set. Rounds of different sets are different curves."""
    tested = {row.step for row in rows if row.set == "test"}
    found: dict[Curve, list[LearningPoint]] = {}
    for row in rows:
        if row.set == ("test" if row.step in tested else "validation"):
            alone = row.generation if row.n_set is None else 0
            key = row.step, row.set, row.n_set, row.set_from, alone
            found.setdefault(key, []).append(row)
    return found


# --- soft modes: Fig. 4a --------------------------------------------------------------------------

RESAMPLES = 400
WORST_FIT = 3.0
"""Largest chi^2 per degree of freedom of a parabola that is believed."""
METHODS = {
    ("harmonic", "model"): "harmonic, model",
    ("harmonic", "dft"): "harmonic, DFT",
    ("sscha-hessian", "model"): "SSCHA Hessian, model",
    ("sscha-hessian", "dft"): "SSCHA Hessian, DFT",
}
"""Method and who gave the energies, in words, in the order of the figure."""

Series = tuple[str, str, str, str]
"""Phase, irreducible representation, method, who gave the energies."""


@dataclass(frozen=True)
class CriticalPressure:
    """Where a squared frequency rises through zero; no pressure and a ``reason`` where it does not.

    how : parabola or interpolation. error_GPa : standard error from the error bars of the points,
    None where they have none. lowest_GPa, highest_GPa : of the points. stable : the square is
    positive at the highest.
    """

    phase: str
    irrep: str
    method: str
    energies_by: str
    critical_pressure_GPa: float | None
    error_GPa: float | None
    how: str
    n_points: int
    reason: str
    lowest_GPa: float = math.nan
    highest_GPa: float = math.nan
    stable: bool = False

    @property
    def words(self) -> str:
        """``"zero at 101.0 +- 1.2 GPa"``, or why there is none."""
        if self.critical_pressure_GPa is None:
            return self.reason
        spread = "" if self.error_GPa is None else f" ± {self.error_GPa:.1f}"
        return f"zero at {self.critical_pressure_GPa:.1f}{spread} GPa"


def series(rows: Sequence[Mode]) -> dict[Series, list[Mode]]:
    """The points of every curve by pressure; of several rows at one pressure the last counts."""
    found: dict[Series, dict[float, Mode]] = {}
    for row in rows:
        key = (row.phase, row.irrep, row.method, row.energies_by)
        found.setdefault(key, {})[row.pressure_GPa] = row
    order = {method: number for number, method in enumerate(METHODS)}
    keys = sorted(found, key=lambda key: (*key[:2], order.get(key[2:], len(order)), key))  # type: ignore[call-overload]
    return {key: [found[key][p] for p in sorted(found[key])] for key in keys}


def critical_pressures(rows: Sequence[Mode]) -> list[CriticalPressure]:
    """One for every curve of ``rows``."""
    return [critical_pressure(points) for points in series(rows).values()]


def critical_pressure(points: Sequence[Mode], seed: int = 0) -> CriticalPressure:
    """Of the points of one curve, by rising pressure. Of several changes of sign the highest from
    negative to positive counts: above it the structure is stable."""
    x = np.array([p.pressure_GPa for p in points], dtype=float)
    y = np.array([p.frequency_squared_cm2 for p in points], dtype=float)
    errors = np.array([p.error_cm2 for p in points], dtype=float)  # None: not a number
    value, error, how, reason = None, None, "", "one pressure alone has no change of sign"
    if len(x) > 1:
        with_errors = bool(np.isfinite(errors).all() and (errors > 0).all())
        find, how = _interpolated_root, "interpolation"
        if with_errors and len(x) >= 4 and _parabola_fits(x, y, errors):
            find, how = _parabola_root(x, errors), "parabola"
        value = find(x, y)
        sign = "positive" if y[-1] > 0 else "negative"
        reason = (
            f"no change from negative to positive between {x[0]:g} and {x[-1]:g} GPa ({sign} at the"
            " highest)"
        )
        if value is not None:
            reason = "" if with_errors or np.isnan(errors).all() else "some points have no error"
        if value is not None and with_errors:
            noise = np.random.default_rng(seed).standard_normal((RESAMPLES, len(y)))
            roots = [root for one in y + errors * noise if (root := find(x, one)) is not None]
            error = float(np.std(roots, ddof=1)) if len(roots) > 1 else None
            lost = 1.0 - len(roots) / RESAMPLES
            if lost >= 0.05:
                reason = f"{100 * lost:.0f} % of the resampled curves have no change of sign"
    first = points[0]
    key = first.phase, first.irrep, first.method, first.energies_by
    ends = float(x[0]), float(x[-1]), bool(y[-1] >= 0)
    return CriticalPressure(*key, value, error, how, len(x), reason, *ends)


def _interpolated_root(x: np.ndarray, y: np.ndarray) -> float | None:
    """Highest upward zero of the monotone interpolation."""
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import brentq

    rising = [one.left for one in zero_crossings(x, y) if not one.falls]
    if not rising:
        return None
    curve, i = PchipInterpolator(x, y), rising[-1]
    return float(brentq(lambda p: float(curve(p)), x[i], x[i + 1], xtol=1e-9))


def _design(x: np.ndarray) -> np.ndarray:
    scaled = (x - x.mean()) / np.ptp(x)
    return np.stack([np.ones_like(scaled), scaled, scaled**2], axis=1)


def _parabola_fits(x: np.ndarray, y: np.ndarray, errors: np.ndarray) -> bool:
    design = _design(x) / errors[:, None]
    coefficients = np.linalg.lstsq(design, y / errors, rcond=None)[0]
    return float(np.sum((design @ coefficients - y / errors) ** 2)) / (len(x) - 3) < WORST_FIT


def _parabola_root(
    x: np.ndarray, errors: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """Highest upward zero of the parabola through points at ``x`` with ``errors``, as a function of
    (x, y)."""
    inverse = np.linalg.pinv(_design(x) / errors[:, None])

    def find(x: np.ndarray, y: np.ndarray) -> float | None:
        c, b, a = inverse @ (y / errors)
        roots = np.roots([a, b, c])
        real = roots.real[np.abs(roots.imag) < 1e-12]
        rising = x.mean() + np.ptp(x) * real[2.0 * a * real + b > 0]
        inside = rising[(x[0] <= rising) & (rising <= x[-1])]
        return float(inside.max()) if len(inside) else None

    return find


# --- rankings: Fig. 6 -----------------------------------------------------------------------------

LINEAR_ABOVE = 0.05
"""eV/atom above the lowest enthalpy: where the paper finds G linear in H; a line needs three
structures there, else takes all."""
SIGMAS = 3.0
"""A structure whose G is farther from the line than this many times the scatter about it, and than
`SMALLEST`, is reordered."""
SMALLEST = 2.0
"""meV/atom."""
LEAST_FOR_WINDOW = 8
"""Structures; with fewer, one that leaves the line says nothing about where the order changes."""
MOST_IN_LINE = 600
"""Structures, evenly along the enthalpy, whose slopes in pairs make the line."""


@dataclass(frozen=True)
class Moved:
    """One structure: above the lowest static enthalpy and above the lowest G, meV/atom;
    ``deviation`` from the line."""

    id: str
    spg_static: str
    spg_quantum: str
    enthalpy_meV_per_atom: float
    gibbs_meV_per_atom: float
    gibbs_error_meV_per_atom: float | None
    deviation_meV_per_atom: float | None
    status: str


@dataclass(frozen=True)
class Reordering:
    """What SSCHA does to a ranking; energies in meV/atom.

    shift : mean of G - H; shift_error : its standard error, from the scatter. slope, offset,
    scatter : the line G = offset + slope H through the structures above ``linear_above`` (both
    above their lowest) and the spread about it, None with fewer than three structures. window :
    highest enthalpy of a reordered structure (`SIGMAS`), 0 without one, None with fewer than
    `LEAST_FOR_WINDOW` structures; window_error : to the next structure above. best : space group
    of the lowest G that is a minimum, empty without one; n_transformed_best : structures that had
    another space group and ended in that one; n_changed : that changed their space group at all,
    of n with a G. n_kept_by_dft : of the changed ones relaxed by DFT (n_checked_by_dft), those that
    keep the static one there: they are minima, and only SSCHA changes them.
    """

    pressure_GPa: float
    n: int
    n_changed: int
    best: str
    n_transformed_best: int
    shift: float
    slope: float | None
    offset: float | None
    scatter: float | None
    linear_above: float
    window: float | None
    n_checked_by_dft: int
    n_kept_by_dft: int
    shift_error: float | None = None
    window_error: float | None = None


def computed(rows: Sequence[Candidate]) -> list[Candidate]:
    """Rows with a static enthalpy and a free energy that was computed."""
    return [r for r in rows if r.free_energy.computed and r.enthalpy is not None]


def lowest(rows: Sequence[Candidate]) -> Candidate | None:
    """The row of lowest free energy that is a minimum as far as is known; None without one.
    ``rows``: `computed` ones."""
    minima = [r for r in rows if r.status in MINIMA]
    return min(minima, key=lambda r: r.gibbs or 0.0, default=None)


class _SpaceGroups(Protocol):
    """A row with the static and the quantum (SSCHA) space group."""

    @property
    def spg_static(self) -> str: ...

    @property
    def spg_quantum(self) -> str: ...


def new_space_group(row: _SpaceGroups) -> str:
    """Symbol of the space group that a structure took with SSCHA; empty where it
    kept its own, or noise leaves two."""
    symbol = symbol_of(decided_group(row.spg_quantum))
    return "" if symbol == symbol_of(row.spg_static) else symbol


def kept_by_dft(rows: Sequence[SpaceGroups], space_group: str | None = None) -> tuple[int, int]:
    """Of the structures that SSCHA brings to another space group (None: whichever) and that
    DFT relaxed: how many keep the static one there, of how many."""
    mine = [
        row
        for row in rows
        if row.spg_dft and new_space_group(row) and space_group in (None, new_space_group(row))
    ]
    return sum(symbol_of(row.spg_dft) == symbol_of(row.spg_static) for row in mine), len(mine)


def reordering(
    rows: Sequence[Candidate], checked: Sequence[SpaceGroups] = (), phase: str | None = None
) -> tuple[Reordering, list[Moved]]:
    """Numbers of Fig. 6 and its points; ``phase``: the space group to count (None: that of the
    lowest G). Needs one computed row."""
    shown = computed(rows)
    h = np.array([r.enthalpy for r in shown])
    g = np.array([r.gibbs for r in shown])
    minimum = lowest(shown)
    best = phase or ("" if minimum is None else symbol_of(minimum.spg_quantum))
    above_h, above_g = ev_to_mev(h - h.min()), ev_to_mev(g - g.min())
    slope, offset, deviations, scatter, threshold = _line_fit(above_h, above_g)
    changed = [r for r in shown if new_space_group(r)]
    ids = {r.id for r in changed}
    n_kept, n_checked = kept_by_dft([row for row in checked if row.id in ids])
    window = window_error = None
    if scatter is not None and len(shown) >= LEAST_FOR_WINDOW:
        outside = above_h[np.abs(deviations) > max(SIGMAS * scatter, SMALLEST)]
        window = float(outside.max()) if len(outside) else 0.0
        above = above_h[above_h > window + 1e-6]
        window_error = float(above.min() - window) if len(above) else None
    moved = [
        Moved(
            r.id,
            r.spg_static,
            r.spg_quantum,
            float(above_h[i]),
            float(above_g[i]),
            None if r.gibbs_error is None else ev_to_mev(r.gibbs_error),
            None if scatter is None else float(deviations[i]),
            r.status,
        )
        for i, r in enumerate(shown)
    ]
    shifts = ev_to_mev(g - h)
    single = moved[0].gibbs_error_meV_per_atom
    return Reordering(
        pressure_GPa=shown[0].pressure,
        n=len(shown),
        n_changed=len(changed),
        best=best,
        n_transformed_best=sum(new_space_group(r) == best for r in changed),
        shift=float(shifts.mean()),
        slope=slope,
        offset=offset,
        scatter=scatter,
        linear_above=threshold,
        window=window,
        n_checked_by_dft=n_checked,
        n_kept_by_dft=n_kept,
        shift_error=float(shifts.std(ddof=1) / np.sqrt(len(g))) if len(g) > 1 else single,
        window_error=window_error,
    ), moved


def _line_fit(
    h: np.ndarray, g: np.ndarray
) -> tuple[float | None, float | None, np.ndarray, float | None, float]:
    """Theil-Sen line (few outliers do not turn it) of the upper part, deviations of all, and their
    robust scatter there."""
    from scipy.stats import theilslopes

    threshold = ev_to_mev(LINEAR_ABOVE) if np.sum(h >= ev_to_mev(LINEAR_ABOVE)) >= 3 else 0.0
    upper = h >= threshold
    if upper.sum() < 3 or np.ptp(h[upper]) < 1e-6:
        return None, None, np.full(len(h), np.nan), None, threshold
    order = np.flatnonzero(upper)[np.argsort(h[upper], kind="stable")]
    few = order[np.unique(np.linspace(0, len(order) - 1, MOST_IN_LINE).astype(int))]
    slope, offset = (float(value) for value in theilslopes(g[few], h[few])[:2])
    deviations = g - offset - slope * h
    scatter = 1.4826 * float(np.median(np.abs(deviations[upper] - np.median(deviations[upper]))))
    return slope, offset, deviations, scatter, threshold


# --- the model against DFT in an ensemble: Figs. 7 and 8 -----------------------------------------


def gradient_error(
    rows: Sequence[GradientError], phase: str, pressure: GPa, quantity: str
) -> GradientError | None:
    """The row of the most configurations at a pressure (GPa, the nearest within `NEAR`)."""
    mine = [
        row
        for row in rows
        if (row.phase, row.quantity) == (phase, quantity)
        and abs(row.pressure_GPa - pressure) < NEAR
    ]
    return max(
        mine, key=lambda row: (-abs(row.pressure_GPa - pressure), row.n_configs), default=None
    )


def standard_error(row: GradientError) -> float | None:
    """Of its RMSE: the statistical part of an averaged one, of that of single configurations the
    value over the root of 2n."""
    if row.statistical is not None:
        return row.statistical
    single = row.quantity == "force" and row.n_configs
    return row.rmse / math.sqrt(2.0 * row.n_configs) if single else None


NEAR = 0.51
"""GPa, within which a table's pressure is the one asked for."""
