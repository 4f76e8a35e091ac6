"""The one place where units are converted.

Inside the package: eV, Angstrom, amu, K, pressures and stresses in eV/A^3. What is in GPa or meV
says so in its name or type.
"""

from __future__ import annotations

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


def duration(seconds: float) -> str:
    """``'40 s'``, ``'12 min'``, ``'3.5 h'``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(seconds: float, done: float, rest: float) -> str:
    """``'about 12 min left'`` for the ``rest`` of a work of which ``done`` took ``seconds``; empty
    where that cannot be told."""
    return f"about {duration(seconds / done * rest)} left" if done > 0 and rest > 0 else ""
