"""Two quasi-harmonic phases whose boundary is a closed expression, and noisy data of them: the
oracle of the phase diagram.

G = e + v p - v0 p^2 / (2 B) + 3/2 k theta + 3 k T ln(1 - exp(-theta/T)) per atom, with p in eV/A^3.
The curvature in p is the same for both, so that the difference is linear in the pressure and P(T) =
-[de + 3/2 k dtheta + 3 k T d ln(...)] / dv.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from magus_anharmonic.phase_diagram.points import GibbsPoint
from magus_anharmonic.sscha.record import FreeEnergy
from magus_anharmonic.units import EV_PER_A3_IN_GPA, KELVIN

CURVATURE = 0.6
"""v0 / B in A^6/eV."""


@dataclass(frozen=True)
class Phase:
    """energy : eV/atom; volume : A^3/atom at no pressure; theta : K."""

    energy: float
    volume: float
    theta: float

    def gibbs(self, pressure, temperature):
        p, t = np.asarray(pressure) / EV_PER_A3_IN_GPA, np.asarray(temperature, dtype=float)
        thermal = np.where(
            t > 0, 3.0 * KELVIN * t * np.log1p(-np.exp(-self.theta / np.where(t > 0, t, 1.0))), 0.0
        )
        return (
            self.energy
            + self.volume * p
            - 0.5 * CURVATURE * p**2
            + 1.5 * KELVIN * self.theta
            + thermal
        )

    def v(self, pressure):
        """A^3/atom."""
        return self.volume - CURVATURE * np.asarray(pressure) / EV_PER_A3_IN_GPA

    def s(self, temperature):
        """eV/K per atom."""
        x = self.theta / temperature
        return 3.0 * KELVIN * (x / np.expm1(x) - np.log1p(-np.exp(-x)))


LOW = Phase(0.0, 5.00, 900.0)
HIGH = Phase(0.0725, 4.90, 1000.0)


def boundary(temperature, low=LOW, high=HIGH):
    """Pressure (GPa) at which both have the same G."""
    return float(
        (high.gibbs(0.0, temperature) - low.gibbs(0.0, temperature))
        / (low.volume - high.volume)
        * EV_PER_A3_IN_GPA
    )


def slope(temperature, low=LOW, high=HIGH):
    """dP/dT by Clausius and Clapeyron, GPa/K."""
    return float(
        (high.s(temperature) - low.s(temperature)) / (high.volume - low.volume) * EV_PER_A3_IN_GPA
    )


def changed(point: GibbsPoint, **values: Any) -> GibbsPoint:
    """A point with other values, its own or of its free energy."""
    own = {one.name for one in fields(GibbsPoint)}
    numbers = {name: value for name, value in values.items() if name not in own}
    return replace(point.updated(**numbers), **{n: values[n] for n in values if n in own})


def data(
    phases,
    seed,
    pressures=(60.0, 110.0, 160.0),
    temperatures=(0.0, 300.0, 600.0),
    *,
    isotopes="natural",
    gibbs_error=5e-4,
    volume_error=5e-3,
    entropy_error=1e-6,
    formula="H3S",
    kinds="GVS",
    true_noise=1.0,
):
    """Points with Gaussian noise (None: none) of ``true_noise`` times the errors that they claim;
    ``kinds`` leaves V or S out."""
    rng = np.random.default_rng(seed)
    nan = float("nan")
    points = []
    for name, phase in phases.items():
        for p in pressures:
            for t in temperatures:
                noise = np.zeros(3) if seed is None else true_noise * rng.normal(size=3)
                s = 0.0 if t == 0 else float(phase.s(t)) + entropy_error * noise[2]
                points.append(
                    GibbsPoint(
                        name,
                        isotopes,
                        formula,
                        p,
                        t,
                        FreeEnergy(
                            status="converged",
                            gibbs=float(phase.gibbs(p, t)) + gibbs_error * noise[0],
                            gibbs_error=gibbs_error,
                            volume=float(phase.v(p)) + volume_error * noise[1]
                            if "V" in kinds
                            else None,
                        ),
                        volume_error if "V" in kinds else nan,
                        s if "S" in kinds else nan,
                        (0.0 if t == 0 else entropy_error) if "S" in kinds else nan,
                    )
                )
    return points
