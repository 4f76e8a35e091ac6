"""The one place where units are converted.

Inside the package: eV, Angstrom, amu, K, pressures and stresses in eV/A^3. What is in GPa or meV
says so in its name or type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from ase import units as _ase

Values = TypeVar("Values", bound=Any)
"""A number, or an array of them."""
GPa = Annotated[float, "GPa"]
"""What is in GPa, because it crosses a border (keys, commands, tables, MAGUS): ``pressure: GPa``. A
``pressure: float`` is in eV/A^3."""

EV_PER_A3_IN_GPA: float = 1.0 / _ase.GPa
"""1 eV/A^3 expressed in GPa (160.2177)."""

BOHR: float = _ase.Bohr
"""Bohr radius in Angstrom."""

RYDBERG: float = _ase.Ry
"""Rydberg energy in eV."""

COULOMB: float = _ase.Ha * _ase.Bohr
"""e^2 / (4 pi epsilon_0) in eV A (14.3996)."""

KELVIN: float = _ase.kB
"""Boltzmann constant in eV/K."""

AMU_IN_RYDBERG_MASS: float = _ase._amu / _ase._me / 2.0
"""1 amu in the mass unit of Rydberg atomic units (twice the electron mass)."""

HBAR: float = _ase._hbar * _ase.J * _ase.s
"""hbar in eV * ASE time units, so that omega = sqrt(k/m) with k in eV/A^2 and m in amu gives
HBAR*omega in eV."""

EV_IN_CM1: float = 1.0 / _ase.invcm
"""1 eV in cm^-1."""


def gpa_to_ev_per_a3(pressure: Values) -> Values:
    """Pressure in GPa to eV/A^3."""
    return pressure / EV_PER_A3_IN_GPA


def ev_per_a3_to_gpa(stress: Values) -> Values:
    """Stress or pressure in eV/A^3 to GPa."""
    return stress * EV_PER_A3_IN_GPA


def ev_to_mev(energy: Values) -> Values:
    """Energy in eV to meV; likewise forces in eV/A to meV/A, slopes in GPa/K to MPa/K."""
    return 1000.0 * energy


UNITS: dict[str, dict[str, float]] = {
    "pressure": {
        "GPa": 1.0,
        "TPa": 1000.0,
        "MPa": 1e-3,
        "kPa": 1e-6,
        "Pa": 1e-9,
        "Mbar": 100.0,
        "kbar": 0.1,
        "bar": 1e-4,
        "atm": 1.01325e-4,
        "eV/A^3": EV_PER_A3_IN_GPA,
    },
    "temperature": {"K": 1.0},
    "energy": {
        per: energy
        for name, energy in {
            "eV": 1.0,
            "meV": 1e-3,
            "Ry": _ase.Ry,
            "mRy": 1e-3 * _ase.Ry,
            "Ha": _ase.Ha,
            "kJ/mol": _ase.kJ / _ase.mol,
            "kcal/mol": _ase.kcal / _ase.mol,
        }.items()
        for per in ((f"{name}/atom", name) if "mol" not in name else (name,))
    },
    "length": {"A": 1.0, "Angstrom": 1.0, "nm": 10.0, "pm": 0.01, "bohr": BOHR},
    "force": {"eV/A": 1.0, "meV/A": 1e-3, "Ry/bohr": _ase.Ry / BOHR, "Ha/bohr": _ase.Ha / BOHR},
    "reciprocal spacing": {
        "2 pi/A": 1.0,
        "1/A": 0.5 / math.pi,
        "2 pi/bohr": 1 / BOHR,
        "1/bohr": 0.5 / math.pi / BOHR,
    },
    "time": {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    "mass": {"amu": 1.0, "u": 1.0},
}
"""Dimension -> the units that a value may be given in, and what they are in the first, which is
that of a bare number."""
EXAMPLES = {
    "pressure": "150 GPa",
    "temperature": "300 K",
    "energy": "5 meV",
    "length": "0.1 A",
    "force": "10 meV/A",
    "reciprocal spacing": "0.03 2 pi/A",
    "time": "2 h",
    "mass": "2.014 amu",
}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def dimension_of(unit: str) -> str:
    """The dimension of a unit of `UNITS`; empty for any other text."""
    return next((name for name, units in UNITS.items() if unit in units), "")


def quantity(value: Any, unit: str) -> float:
    """A number in ``unit`` (one that a bare number has, see `UNITS`): a number as it is, a text
    such as ``150 GPa`` converted.

    Raises ValueError for what is neither, and for a unit of another dimension.
    """
    dimension = dimension_of(unit)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = re.fullmatch(rf"\s*({NUMBER})\s*(.*?)\s*", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"must be a number in {unit}, or one with its unit: {EXAMPLES[dimension]}")
    number, given = float(found[1]), re.sub(r"\s*([/*])\s*", r"\1", found[2].replace("Å", "A"))
    given = re.sub(r"^2[ *]?pi", "2 pi", given)
    if not given:
        return number
    if given not in UNITS[dimension]:
        close = [name for name in UNITS[dimension] if name.lower() == given.lower()]
        other = dimension_of(given)
        why = f"is a unit of {other}" if other else "is no unit that is known here"
        hint = f"; did you mean {close[0]}?" if close else ""
        needed = f"needed is {dimension}, e.g. {EXAMPLES[dimension]}"
        raise ValueError(f"{given} {why}{hint or f'; {needed}'}")
    # 3 kbar are 0.3 GPa, without what binary fractions add
    return float(f"{number * UNITS[dimension][given]:.12g}")


def duration(seconds: float) -> str:
    """``'40 s'``, ``'12 min'``, ``'3.5 h'``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def span(values: Iterable[float], unit: str) -> str:
    """``'50 to 150 GPa'``: from the least to the greatest; empty without a value."""
    found = sorted(set(values))
    ends = dict.fromkeys(found[:1] + found[-1:])
    return f"{' to '.join(f'{end:g}' for end in ends)} {unit}" if found else ""


def time_left(seconds: float, done: float, rest: float) -> str:
    """``'about 12 min left'`` for the ``rest`` of a work of which ``done`` took ``seconds``; empty
    where that cannot be told."""
    return f"about {duration(seconds / done * rest)} left" if done > 0 and rest > 0 else ""
