"""Free energies of structures that had no SSCHA: a line through those that had.

Well above the ground state G is nearly linear in H (Fig. 6c of the paper), so
``G_est = a + b H + margin`` with a margin of two standard deviations of the fit: an estimate never flatters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MIN_POINTS = 3
SLOPE_RANGE = (0.5, 1.5)
"""Slopes outside come from points too close in H or from a phase transition among them; then b = 1."""


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
        return (
            f"{self.intercept:+.4f} + {self.slope:.3f} H + {1000 * self.margin:.1f} meV/atom margin, "
            f"from {self.n_points} SSCHA result{'s' * (self.n_points != 1)}"
        )


def fit_estimate(enthalpies: Sequence[float], gibbs: Sequence[float], errors: Sequence[float] | None = None) -> GibbsEstimate | None:
    """Least-squares line from SSCHA results of one model, pressure and temperature; None without results.

    From three points on: the line, and two standard deviations of its residuals as margin. With fewer:
    ``H + max(G - H)`` plus two statistical errors. All in eV/atom; ``errors`` are standard errors of G.
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
    return GibbsEstimate(intercept, slope, 2.0 * float(np.sqrt(residuals @ residuals / free)), h.size)


def _largest_shift(h: np.ndarray, g: np.ndarray, noise: np.ndarray) -> GibbsEstimate:
    return GibbsEstimate(float(np.max(g - h)), 1.0, 2.0 * float(np.max(noise)), h.size)


def fit_estimates(known: Sequence[tuple[str, float, float, float]], compositions: Iterable[str]) -> dict[str, GibbsEstimate]:
    """An estimate for each of the ``compositions`` from results (composition, H, G, standard error of G), eV/atom.

    A composition with results of its own has their line. Others have ``H + max(G - H)`` of all results plus two errors: energies per
    atom of several compositions lie on no common line. Empty without results.
    """
    if not known:
        return {}
    lines = {}
    for name in dict.fromkeys(compositions):
        own = [numbers for other, *numbers in known if other == name]
        fitted = fit_estimate(*zip(*own, strict=True)) if own else None
        lines[name] = fitted or _largest_shift(*np.array([numbers for _, *numbers in known], dtype=float).T)
    return lines
