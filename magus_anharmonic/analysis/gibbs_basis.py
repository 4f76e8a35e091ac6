"""The functions of pressure and temperature that a `GibbsSurface` is made of, with their derivatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.polynomial import chebyshev

from magus_anharmonic.units import EV_PER_A3_IN_GPA, KELVIN


def einstein(theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k T ln(1 - exp(-theta/T)) in eV and its derivative with respect to T in eV/K; both zero at 0 K."""
    t = np.asarray(temperature, dtype=float)
    x = theta / np.where(t > 0, t, 1.0)
    value = np.where(t > 0, KELVIN * t * np.log1p(-np.exp(-x)), 0.0)
    slope = np.where(t > 0, KELVIN * (np.log1p(-np.exp(-x)) - x * np.exp(-x) / -np.expm1(-x)), 0.0)
    return value, slope


def einstein_shift(theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of `einstein` with respect to ln(theta): k theta / (exp(x) - 1), and k x^2 exp(x) / (exp(x) - 1)^2, x = theta / T."""
    t = np.asarray(temperature, dtype=float)
    x = theta / np.where(t > 0, t, 1.0)
    number = np.exp(-x) / -np.expm1(-x)
    return np.where(t > 0, KELVIN * theta * number, 0.0), np.where(t > 0, KELVIN * x**2 * number * (1.0 + number), 0.0)


@dataclass(frozen=True)
class Basis:
    """Functions of (P, T). centre, half : GPa; thetas : K, or a single 0 for a term linear in T about ``zero`` (K).

    bends : for each theta that was fitted too the coefficients of its term; adds the derivative of that term with respect to ln(theta).
    """

    centre: float
    half: float
    cold: int
    thermal: int
    thetas: tuple[float, ...]
    zero: float = 0.0
    bends: tuple[tuple[float, ...], ...] = ()

    @property
    def size(self) -> int:
        return self.cold + 1 + len(self.thetas) * (self.thermal + 1) + len(self.bends)

    def values(self, pressure: np.ndarray, temperature: np.ndarray, derivative: str = "") -> np.ndarray:
        """(n, size) values in eV; their derivatives with respect to ``"P"`` in A^3 or ``"T"`` in eV/K. Pressures in GPa."""
        u = (np.asarray(pressure, dtype=float) - self.centre) / self.half
        degree = max(self.cold, self.thermal)
        powers = chebyshev.chebvander(u, degree)
        if derivative == "P":
            unit = np.eye(degree + 1)
            powers = np.stack([chebyshev.chebval(u, chebyshev.chebder(unit[k])) for k in range(degree + 1)], axis=-1)
            powers = powers * (EV_PER_A3_IN_GPA / self.half)
        cold = powers[:, : self.cold + 1]
        parts = [np.zeros_like(cold) if derivative == "T" else cold]
        for theta in self.thetas:
            value, slope = self._thermal(theta, np.asarray(temperature, dtype=float))
            parts.append(powers[:, : self.thermal + 1] * (slope if derivative == "T" else value)[:, None])
        for theta, bend in zip(self.thetas, self.bends, strict=False):
            value, slope = einstein_shift(theta, np.asarray(temperature, dtype=float))
            parts.append((powers[:, : self.thermal + 1] @ np.array(bend) * (slope if derivative == "T" else value))[:, None])
        return np.concatenate(parts, axis=1)

    def _thermal(self, theta: float, temperature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if theta == 0:
            return KELVIN * (temperature - self.zero), np.full_like(temperature, KELVIN)
        return einstein(theta, temperature)
