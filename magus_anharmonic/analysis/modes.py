"""Fig. 4a: squared frequency of one irreducible representation at Gamma against pressure, and the pressure where it is zero.

A critical pressure comes from a weighted parabola through points with error bars (four or more, when it fits them), else from monotone
interpolation (Fritsch and Carlson, doi:10.1137/0717021). Its error is the spread over 400 sets of points drawn from the error bars;
points without error bars give a critical pressure without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magus_anharmonic.analysis import style
from magus_anharmonic.analysis.tables import Mode

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
    """Where a squared frequency becomes zero; no pressure and a ``reason`` where it does not. Pressures in GPa.

    ``how``: parabola or interpolation. ``error``: standard error from the error bars of the points, None where they have none.
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
        found.setdefault((row.phase, row.irrep, row.method, row.energies_by), {})[row.pressure_GPa] = row
    keys = sorted(found, key=lambda key: (key[0], key[1], ORDER.index((key[2], key[3]))))
    return {key: [found[key][p] for p in sorted(found[key])] for key in keys}


def critical_pressures(rows: Sequence[Mode]) -> list[CriticalPressure]:
    """One for every curve of ``rows``."""
    found = []
    for (phase, irrep, method, energies_by), points in series(rows).items():
        value, error, how, reason = critical_pressure(
            [p.pressure_GPa for p in points], [p.frequency_squared_cm2 for p in points], [p.error_cm2 for p in points]
        )
        found.append(CriticalPressure(phase, irrep, method, energies_by, value, error, how, len(points), reason))
    return found


def critical_pressure(
    pressures: Sequence[float], squares: Sequence[float], errors: Sequence[float | None], seed: int = 0
) -> tuple[float | None, float | None, str, str]:
    """Critical pressure (GPa) with standard error, how it was found, and why there is none.

    ``pressures`` rising, ``squares`` in cm^-2. Of several changes of sign the highest from negative to positive counts: above it the
    structure is stable.
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
        return None, None, how, f"no change from negative to positive between {x[0]:g} and {x[-1]:g} GPa ({sign} at the highest)"
    if not with_errors:
        return value, None, how, "" if np.isnan(known).all() else "some points have no error bar"
    drawn = y + known * np.random.default_rng(seed).standard_normal((RESAMPLES, len(y)))
    roots = [root for root in (find(x, one) for one in drawn) if root is not None]
    lost = RESAMPLES - len(roots)
    reason = (
        "" if lost < 0.05 * RESAMPLES else f"{100 * lost / RESAMPLES:.0f} % of the sets drawn from the error bars have no change of sign"
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


def _parabola_root(x: np.ndarray, errors: np.ndarray) -> Callable[[np.ndarray, np.ndarray], float | None]:
    """Highest upward zero of the parabola through points at ``x`` with ``errors``, as a function of (x, y)."""
    inverse = np.linalg.pinv(_design(x) / errors[:, None])

    def find(x: np.ndarray, y: np.ndarray) -> float | None:
        c, b, a = inverse @ (y / errors)
        roots = np.roots([a, b, c])
        real = roots.real[np.abs(roots.imag) < 1e-12]
        rising = [root for root in real if 2.0 * a * root + b > 0]
        inside = [x.mean() + np.ptp(x) * root for root in rising if x[0] <= x.mean() + np.ptp(x) * root <= x[-1]]
        return float(max(inside)) if inside else None

    return find


def draw_modes(rows: Sequence[Mode], folder: Path, name: str) -> list[Path]:
    """Curves of one phase and irreducible representation; critical pressures as bands of one standard error."""
    curves, found = series(rows), critical_pressures(rows)
    first = rows[0]
    with style.figure(title=f"{first.phase}: {first.irrep} at Γ") as (made, (axes,)):
        axes.axhline(0.0, color=style.GREY, lw=1)
        for (key, points), critical in zip(curves.items(), found, strict=True):
            index = ORDER.index((key[2], key[3]))
            where = critical.critical_pressure_GPa
            spread = "" if critical.error_GPa is None else f" ± {critical.error_GPa:.1f}"
            label = WORDS[key[2], key[3]] + ("" if where is None else f" (zero at {where:.1f}{spread} GPa)")
            x, y = [p.pressure_GPa for p in points], [p.frequency_squared_cm2 / 1e6 for p in points]
            bars = [None if p.error_cm2 is None else p.error_cm2 / 1e6 for p in points]
            style.points(axes, x, y, bars, index=index, label=label, mfc="none" if key[3] == "dft" else None, linestyle=_line(key, len(x)))
            if where is not None and critical.error_GPa is not None:
                axes.axvspan(where - critical.error_GPa, where + critical.error_GPa, color=style.color(index), alpha=0.15, lw=0)
        style.room(axes, [row.pressure_GPa for row in rows])
        axes.set_xlabel("pressure (GPa)")
        axes.set_ylabel("squared frequency (10⁶ cm⁻²)")
        style.legend(axes, fontsize=8)
        return style.save(made, folder, name)


def _line(key: Series, n_points: int) -> str:
    if n_points < 2:
        return "none"
    return "--" if key[3] == "dft" else "-"
