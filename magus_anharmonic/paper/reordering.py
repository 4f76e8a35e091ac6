"""Soft modes against pressure, and what the ions' motion reorders.

Fig. 4a: squared frequency of one irreducible representation at Gamma against pressure, and the
pressure where it is zero.

A critical pressure comes from a weighted parabola through points with error bars (four or more,
when it fits them), else from monotone interpolation (Fritsch and Carlson, doi:10.1137/0717021). Its
error is the spread over 400 sets of points drawn from the error bars; points without error bars
give a critical pressure without one.

Fig. 6: space groups, static and with SSCHA, free energy against static enthalpy, and where
the order changes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from magus_anharmonic.paper.tables import Mode, SpaceGroups
from magus_anharmonic.phase_diagram import style
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.sscha.record import MINIMA
from magus_anharmonic.structures import decided_group, number_of, symbol_of

RESAMPLES = 400
WORST_FIT = 3.0
"""Largest chi^2 per degree of freedom of a parabola that is believed."""
WORDS = {
    ("harmonic", "model"): "harmonic, model",
    ("harmonic", "dft"): "harmonic, DFT",
    ("sscha-hessian", "model"): "SSCHA Hessian, model",
    ("sscha-hessian", "dft"): "SSCHA Hessian, DFT",
}
ORDER = tuple(WORDS)


@dataclass(frozen=True)
class CriticalPressure:
    """Where a squared frequency becomes zero; no pressure and a ``reason`` where it does not.
    Pressures in GPa.

    ``how``: parabola or interpolation. ``error``: standard error from the error bars of the points,
        None where they have none.
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


Series = tuple[str, str, str, str]
"""Phase, irreducible representation, method, who gave the energies."""


def series(rows: Sequence[Mode]) -> dict[Series, list[Mode]]:
    """The points of every curve by pressure; of several rows at one pressure the last counts."""
    found: dict[Series, dict[float, Mode]] = {}
    for row in rows:
        found.setdefault((row.phase, row.irrep, row.method, row.energies_by), {})[
            row.pressure_GPa
        ] = row
    keys = sorted(found, key=lambda key: (key[0], key[1], ORDER.index((key[2], key[3]))))
    return {key: [found[key][p] for p in sorted(found[key])] for key in keys}


def critical_pressures(rows: Sequence[Mode]) -> list[CriticalPressure]:
    """One for every curve of ``rows``."""
    found = []
    for (phase, irrep, method, energies_by), points in series(rows).items():
        value, error, how, reason = critical_pressure(
            [p.pressure_GPa for p in points],
            [p.frequency_squared_cm2 for p in points],
            [p.error_cm2 for p in points],
        )
        found.append(
            CriticalPressure(
                phase, irrep, method, energies_by, value, error, how, len(points), reason
            )
        )
    return found


def critical_pressure(
    pressures: Sequence[float],
    squares: Sequence[float],
    errors: Sequence[float | None],
    seed: int = 0,
) -> tuple[float | None, float | None, str, str]:
    """Critical pressure (GPa) with standard error, how it was found, and why there is none.

    ``pressures`` rising, ``squares`` in cm^-2. Of several changes of sign the highest from negative
    to positive counts: above it the structure is stable.
    """
    x, y = np.array(pressures, dtype=float), np.array(squares, dtype=float)
    if len(x) < 2:
        return None, None, "", "one pressure alone has no change of sign"
    known = np.array([math.nan if error is None else error for error in errors], dtype=float)
    with_errors = bool(np.isfinite(known).all() and (known > 0).all())
    find, how = _interpolated_root, "interpolation"
    if with_errors and len(x) >= 4 and _parabola_fits(x, y, known):
        find, how = _parabola_root(x, known), "parabola"
    value = find(x, y)
    if value is None:
        sign = "positive" if y[-1] > 0 else "negative"
        return (
            None,
            None,
            how,
            (
                f"no change from negative to positive between {x[0]:g} and {x[-1]:g} GPa ({sign} at"
                " the highest)"
            ),
        )
    if not with_errors:
        return value, None, how, "" if np.isnan(known).all() else "some points have no error bar"
    sampled = y + known * np.random.default_rng(seed).standard_normal((RESAMPLES, len(y)))
    roots = [root for root in (find(x, one) for one in sampled) if root is not None]
    lost = RESAMPLES - len(roots)
    reason = (
        ""
        if lost < 0.05 * RESAMPLES
        else (
            f"{100 * lost / RESAMPLES:.0f} % of the sets drawn from the error bars have no change"
            " of sign"
        )
    )
    return value, float(np.std(roots, ddof=1)) if len(roots) > 1 else None, how, reason


def _interpolated_root(x: np.ndarray, y: np.ndarray) -> float | None:
    """Highest upward zero of the monotone interpolation; a straight line between two points."""
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import brentq

    upward = np.flatnonzero((y[:-1] < 0) & (y[1:] >= 0))
    if not len(upward):
        return None
    start = upward[-1]
    if len(x) == 2:
        return float(x[0] - y[0] * (x[1] - x[0]) / (y[1] - y[0]))
    curve = PchipInterpolator(x, y)
    return float(brentq(lambda p: float(curve(p)), x[start], x[start + 1], xtol=1e-9))


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
        rising = [root for root in real if 2.0 * a * root + b > 0]
        inside = [
            x.mean() + np.ptp(x) * root
            for root in rising
            if x[0] <= x.mean() + np.ptp(x) * root <= x[-1]
        ]
        return float(max(inside)) if inside else None

    return find


def draw_modes(rows: Sequence[Mode], folder: Path, name: str) -> list[Path]:
    """Curves of one phase and irreducible representation; critical pressures as bands of one
    standard error."""
    curves, found = series(rows), critical_pressures(rows)
    first = rows[0]
    with style.figure(title=f"{first.phase}: {first.irrep} at Γ") as (made, (axes,)):
        axes.axhline(0.0, color=style.GREY, lw=1)
        for (key, points), critical in zip(curves.items(), found, strict=True):
            index = ORDER.index((key[2], key[3]))
            where = critical.critical_pressure_GPa
            spread = "" if critical.error_GPa is None else f" ± {critical.error_GPa:.1f}"
            label = WORDS[key[2], key[3]] + (
                "" if where is None else f" (zero at {where:.1f}{spread} GPa)"
            )
            x, y = [p.pressure_GPa for p in points], [p.frequency_squared_cm2 / 1e6 for p in points]
            bars = [None if p.error_cm2 is None else p.error_cm2 / 1e6 for p in points]
            style.points(
                axes,
                x,
                y,
                bars,
                index=index,
                label=label,
                mfc="none" if key[3] == "dft" else None,
                linestyle=_line_style(key, len(x)),
            )
            if where is not None and critical.error_GPa is not None:
                axes.axvspan(
                    where - critical.error_GPa,
                    where + critical.error_GPa,
                    color=style.color(index),
                    alpha=0.15,
                    lw=0,
                )
        style.room(axes, [row.pressure_GPa for row in rows])
        axes.set_xlabel("pressure (GPa)")
        axes.set_ylabel("squared frequency (10⁶ cm⁻²)")
        style.legend(axes, fontsize=8)
        return style.save(made, folder, name)


def _line_style(key: Series, n_points: int) -> str:
    if n_points < 2:
        return "none"
    return "--" if key[3] == "dft" else "-"


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
    """What quantum ions (SSCHA) do to a ranking; energies in meV/atom.

    shift : mean of G - H; slope, offset, scatter : the line G = offset + slope H through the
    structures above ``linear_above`` (both above their lowest) and the spread about it, None with
    fewer than three structures. window : highest enthalpy of a reordered structure (`SIGMAS`), 0
    without one, None with fewer than `LEAST_FOR_WINDOW` structures. best : space group of the
    lowest G; n_transformed_best : structures that had another space group and ended in that one;
    n_changed : that changed their space group at all, of n with a G. n_kept_by_dft : of the changed
    ones relaxed by DFT (n_checked_by_dft), those that keep the static one there: they are minima,
    and only quantum ions (SSCHA) change them.
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


def computed(rows: Sequence[Candidate]) -> list[Candidate]:
    """Rows with a static enthalpy and a free energy that was computed."""
    return [r for r in rows if r.free_energy.computed and r.enthalpy is not None]


def lowest(rows: Sequence[Candidate]) -> Candidate | None:
    """The row of lowest free energy that is a minimum as far as is known; None without one.
    ``rows``: `computed` ones."""
    minima = [r for r in rows if r.status in MINIMA]
    return min(minima, key=lambda r: r.gibbs or 0.0, default=None)


class _Moving(Protocol):
    """A row of a ranking: space groups, static and with SSCHA."""

    @property
    def spg_static(self) -> str: ...

    @property
    def spg_quantum(self) -> str: ...


def new_space_group(row: _Moving) -> str:
    """Symbol of the space group that a structure took with SSCHA; empty where it kept its
    own, or noise leaves two."""
    symbol = symbol_of(decided_group(row.spg_quantum))
    return "" if symbol == symbol_of(row.spg_static) else symbol


def reordering(
    rows: Sequence[Candidate], checked: Sequence[SpaceGroups] = (), phase: str | None = None
) -> tuple[Reordering, list[Moved]]:
    """Numbers of Fig. 6 and its points; ``phase``: the space group to count (None: that of the
    lowest G). Needs one computed row."""
    shown = computed(rows)
    h = np.array([r.enthalpy for r in shown])
    g = np.array([r.gibbs for r in shown])
    best = phase or symbol_of((lowest(shown) or shown[int(np.argmin(g))]).spg_quantum)
    above_h, above_g = 1e3 * (h - h.min()), 1e3 * (g - g.min())
    slope, offset, deviations, scatter, threshold = _line_fit(above_h, above_g)
    changed = [r for r in shown if new_space_group(r)]
    dft = {row.id: row for row in checked if row.spg_dft}
    in_dft = [dft[r.id] for r in changed if r.id in dft]
    window = None
    if scatter is not None and len(shown) >= LEAST_FOR_WINDOW:
        outside = above_h[np.abs(deviations) > max(SIGMAS * scatter, SMALLEST)]
        window = float(outside.max()) if len(outside) else 0.0
    moved = [
        Moved(
            r.id,
            r.spg_static,
            r.spg_quantum,
            float(above_h[i]),
            float(above_g[i]),
            None if r.gibbs_error is None else 1e3 * r.gibbs_error,
            None if scatter is None else float(deviations[i]),
            r.status,
        )
        for i, r in enumerate(shown)
    ]
    numbers = Reordering(
        pressure_GPa=shown[0].pressure,
        n=len(shown),
        n_changed=len(changed),
        best=best,
        n_transformed_best=sum(new_space_group(r) == best for r in changed),
        shift=float(1e3 * np.mean(g - h)),
        slope=slope,
        offset=offset,
        scatter=scatter,
        linear_above=threshold,
        window=window,
        n_checked_by_dft=len(in_dft),
        n_kept_by_dft=sum(symbol_of(row.spg_dft) == symbol_of(row.spg_static) for row in in_dft),
    )
    return numbers, moved


def _line_fit(
    h: np.ndarray, g: np.ndarray
) -> tuple[float | None, float | None, np.ndarray, float | None, float]:
    """Theil-Sen line (few outliers do not turn it) of the upper part, deviations of all, and their
    robust scatter there."""
    from scipy.stats import theilslopes

    threshold = 1e3 * LINEAR_ABOVE if np.sum(h >= 1e3 * LINEAR_ABOVE) >= 3 else 0.0
    upper = h >= threshold
    if upper.sum() < 3 or np.ptp(h[upper]) < 1e-6:
        return None, None, np.full(len(h), np.nan), None, threshold
    order = np.flatnonzero(upper)[np.argsort(h[upper], kind="stable")]
    few = order[np.unique(np.linspace(0, len(order) - 1, MOST_IN_LINE).astype(int))]
    slope, offset = (float(value) for value in theilslopes(g[few], h[few])[:2])
    deviations = g - offset - slope * h
    scatter = 1.4826 * float(np.median(np.abs(deviations[upper] - np.median(deviations[upper]))))
    return slope, offset, deviations, scatter, threshold


def draw_reordering(
    numbers: Reordering, moved: Sequence[Moved], folder: Path, name: str
) -> list[Path]:
    """Space group after against before; G against H with the line and the window."""
    title = (
        f"{numbers.n} structures at {numbers.pressure_GPa:g} GPa:"
        f" {numbers.n_transformed_best} became {numbers.best}"
    )
    with style.figure(2, title=title) as (made, (groups, energies)):
        _groups(groups, moved)
        _energies(energies, numbers, moved)
        return style.save(made, folder, name)


def _groups(axes, moved: Sequence[Moved]) -> None:  # type: ignore[no-untyped-def]
    pairs = Counter(
        (number_of(m.spg_static), number_of(m.spg_quantum)) for m in moved if m.spg_quantum
    )
    if not pairs:
        style.say(axes, "no space groups")
    axes.plot([0, 230], [0, 230], color=style.GREY, lw=1)
    for changed in (False, True):
        shown = {pair: count for pair, count in pairs.items() if (pair[0] != pair[1]) == changed}
        if shown:
            x, y = zip(*shown, strict=True)
            sizes = [25.0 + 12.0 * (count - 1) for count in shown.values()]
            label = f"{'changed' if changed else 'kept'}: {sum(shown.values())}"
            axes.scatter(
                x,
                y,
                s=sizes,
                color=style.color(int(changed)),
                marker=style.marker(int(changed)),
                alpha=0.7,
                label=label,
            )
    axes.set_xlim(0, 235)
    axes.set_ylim(0, 235)
    axes.set_xlabel("static space group number")
    axes.set_ylabel("space group number, ions moving")
    style.legend(axes, loc="lower right")


def _energies(axes, numbers: Reordering, moved: Sequence[Moved]) -> None:  # type: ignore[no-untyped-def]
    for index, (label, chosen) in enumerate(
        (
            (
                f"ended in {numbers.best}",
                lambda m: symbol_of(decided_group(m.spg_quantum)) == numbers.best,
            ),
            ("other", lambda m: symbol_of(decided_group(m.spg_quantum)) != numbers.best),
        )
    ):
        shown = [m for m in moved if chosen(m)]
        if shown:
            x, y = [m.enthalpy_meV_per_atom for m in shown], [m.gibbs_meV_per_atom for m in shown]
            style.points(
                axes,
                x,
                y,
                [m.gibbs_error_meV_per_atom for m in shown],
                index=1 - index,
                label=label,
                linestyle="none",
                capsize=2,
                rasterized=len(shown) > 500,
                alpha=0.8,
            )
    heights = [m.enthalpy_meV_per_atom for m in moved]
    if numbers.slope is not None and numbers.offset is not None:
        ends = [numbers.linear_above, max(heights)]
        axes.plot(
            ends,
            [numbers.offset + numbers.slope * x for x in ends],
            color=style.GREY,
            label=f"line, slope {numbers.slope:.2f}",
        )
    if numbers.window:
        axes.axvspan(
            0.0,
            numbers.window,
            color=style.color(4),
            alpha=0.15,
            lw=0,
            label=f"reordered up to {numbers.window:.0f} meV/atom",
        )
    style.room(axes, heights)
    axes.set_xlabel("static enthalpy\nabove the lowest (meV/atom)")
    axes.set_ylabel("free energy\nabove the lowest (meV/atom)")
    style.legend(axes, fontsize=8)
