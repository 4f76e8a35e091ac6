"""Arguments of a relaxation: what is allowed, and in which units it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.optimizers import OPTIMIZERS
from magus_anharmonic.settings.section import MAX_PRESSURE_GPA
from magus_anharmonic.units import gpa_to_ev_per_a3


@dataclass(frozen=True)
class Options:
    """Arguments of `relax`, with pressures in eV/A^3."""

    pressure: float
    force_tolerance: float
    stress_tolerance: float
    max_steps: int
    max_move: float
    relax_cell: bool
    fix_symmetry: bool
    symprec: float
    optimizers: tuple[str, ...]
    kicks: int


def checked(
    *,
    pressure: Any,
    force_tolerance: Any,
    stress_tolerance: Any,
    max_steps: Any,
    max_move: Any,
    relax_cell: bool,
    fix_symmetry: bool,
    symprec: Any,
    optimizer: Any,
    kicks: Any,
    edges_in_flight: Any,
) -> Options:
    """The options, pressures given in GPa; raises InputError with one line for each argument that makes no sense."""
    positive = {"force_tolerance": force_tolerance, "stress_tolerance": stress_tolerance, "max_move": max_move, "symprec": symprec}
    problems = [
        f"{name} = {value!r}: must be a positive number" for name, value in positive.items() if not _is_number(value) or not value > 0
    ]
    if _is_number(symprec) and np.isposinf(symprec):
        problems.append(f"symprec = {symprec!r}: must be finite")
    counts = {"max_steps": max_steps, "edges_in_flight": 1 if edges_in_flight is None else edges_in_flight}
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            problems.append(f"{name} = {value!r}: must be a whole number, at least 1")
    if not isinstance(kicks, Integral) or kicks < 0 or (kicks and fix_symmetry):
        problems.append(f"kicks = {kicks!r}: must be a whole number, 0 or more, and 0 with fix_symmetry, because they break it")
    if not _is_number(pressure) or not abs(pressure) <= MAX_PRESSURE_GPA:
        problems.append(f"pressure = {pressure!r}: must be a number in GPa between -{MAX_PRESSURE_GPA:g} and {MAX_PRESSURE_GPA:g}")
    optimizers = _names(optimizer)
    if not optimizers:
        problems.append(f"optimizer = {optimizer!r}: only {', '.join(OPTIMIZERS)}, or several of them, are possible")
    if problems:
        raise InputError(*problems)
    return Options(
        pressure=gpa_to_ev_per_a3(pressure),
        force_tolerance=force_tolerance,
        stress_tolerance=gpa_to_ev_per_a3(stress_tolerance),
        max_steps=max_steps,
        max_move=max_move,
        relax_cell=relax_cell,
        fix_symmetry=fix_symmetry,
        symprec=symprec,
        optimizers=optimizers,
        kicks=kicks,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not np.isnan(float(value))


def _names(optimizer: Any) -> tuple[str, ...]:
    """Names of optimisers; none where one is not known."""
    names = (optimizer,) if isinstance(optimizer, str) else tuple(optimizer) if isinstance(optimizer, Sequence) else ()
    return names if all(isinstance(name, str) and name in OPTIMIZERS for name in names) else ()
