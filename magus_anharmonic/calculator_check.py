"""Whether the numbers of an ASE calculator belong together: the work of its forces and stress is the change of its energy.

A displaced and two strained structures tell a wrong sign, another unit, or a stress per cell, which else end as a cell that runs away or
a sample that collapses. Asked once per calculator; our own potentials differentiate their energy and are not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import CalculatorEvaluator, has_stress
from magus_anharmonic.structures import bare
from magus_anharmonic.units import BOHR, EV_PER_A3_IN_GPA, RYDBERG

log = logging.getLogger(__name__)

DISPLACEMENT, STRAIN = 0.05, 0.02
"""A (rms of a coordinate) and strain: large enough for DFT's noise, small enough for the trapezoidal rule."""
TOLERANCE = 0.35
"""Relative difference of work and energy that is none: cutoffs, Pulay stress, rounding."""
NOISE = 2e-4
"""eV/atom."""
NEAR = 0.12
"""Relative distance at which a factor is recognised."""
FORCE_FACTORS: dict[str, float] = {
    "eV/bohr": BOHR,
    "Ry/A": 1 / RYDBERG,
    "Ry/bohr": BOHR / RYDBERG,
    "Ha/bohr": 0.5 * BOHR / RYDBERG,
    "meV/A": 1e3,
}
STRESS_FACTORS: dict[str, float] = {
    "GPa": EV_PER_A3_IN_GPA, "kbar": 10 * EV_PER_A3_IN_GPA, "bar": 1e4 * EV_PER_A3_IN_GPA, "Ry/bohr^3": BOHR**3 / RYDBERG,
    "Ha/bohr^3": 0.5 * BOHR**3 / RYDBERG,
}  # fmt: skip


def check_calculator(evaluator: Any, atoms: Atoms, *, stress: bool) -> int:
    """Ask an ASE calculator that was not asked before; returns how many structures that took.

    Raises ``InputError`` that says what is wrong with its forces, or with its stress where ``stress`` is needed. An exception of the
    calculator is left to who works with it.
    """
    stress = stress and bool(atoms.pbc.all())
    if not isinstance(evaluator, CalculatorEvaluator) or evaluator.checked >= {"forces", *(["stress"] if stress else [])}:
        return 0
    probe = bare(atoms).repeat((2, 1, 1)) if len(atoms) == 1 and atoms.pbc.all() else bare(atoms)
    rng = np.random.default_rng(20240)
    moves = rng.normal(0.0, DISPLACEMENT, (len(probe), 3))
    moves -= moves.mean(axis=0)
    tensor = rng.uniform(-0.3, 0.3, (3, 3))
    strain = STRAIN * (np.eye(3) + 0.5 * (tensor + tensor.T))
    displaced, wide, narrow = probe.copy(), probe.copy(), probe.copy()
    displaced.positions += moves
    for strained, sign in ((wide, 1.0), (narrow, -1.0)):
        strained.set_cell(probe.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
    try:
        found = evaluator.evaluate([probe, displaced, *([wide, narrow] if stress else [])])
    except Exception:
        log.debug("the calculator was not checked: it fails for %s", atoms.get_chemical_formula(), exc_info=True)
        return 0
    gain = found.energy - found.energy[0]
    work = -0.5 * float(np.sum((found.forces[0] + found.forces[1]) * moves))
    _compare(f"calculator {evaluator.model_id}: its forces", "eV/A", work, float(gain[1]), len(probe), FORCE_FACTORS)
    if stress:
        if not has_stress(found):
            raise InputError(f"calculator {evaluator.model_id}: gives no stress, which a variable cell needs; keep the cell fixed")
        # of the two strains the one where the energy changes more: in the other, tension and stiffness may cancel
        other, sign, after = (2, 1.0, wide) if abs(gain[2]) > abs(gain[3]) else (3, -1.0, narrow)
        virials = probe.get_volume() * found.stress[0] + after.get_volume() * found.stress[other]
        factors = {**STRESS_FACTORS, "eV (of the cell, not divided by its volume)": probe.get_volume()}
        work = 0.5 * sign * float(np.sum(virials * strain))
        _compare(f"calculator {evaluator.model_id}: its stress", "eV/A^3", work, float(gain[other]), len(probe), factors)
    evaluator.checked |= {"forces", *(["stress"] if stress else [])}
    return len(gain)


def _compare(what: str, unit: str, work: float, gain: float, n: int, factors: Mapping[str, float]) -> None:
    """``work`` and ``gain`` in eV; ``factors``: how many times too large the work is in which other unit."""
    if not (np.isfinite(work) and np.isfinite(gain)):
        return  # who works with the calculator says where its numbers are not finite
    if abs(work - gain) <= TOLERANCE * max(abs(work), abs(gain)) + NOISE * n:
        return
    ratio = work / gain if gain else np.inf
    known = [name for name, factor in factors.items() if abs(abs(ratio) / factor - 1.0) < NEAR]
    guess = f"in {' or '.join(known)} instead of {unit}" if known else "" if abs(abs(ratio) - 1.0) < NEAR else f"not in {unit}, or wrong"
    sign = "of the other sign than ASE's" if ratio < 0 and (known or not guess) else ""
    said = " and ".join(filter(None, (sign, guess)))
    raise InputError(
        f"{what} are {said}: a small step changes the energy by {gain:.4g} eV, and by {work:.4g} eV according to them"
        if "forces" in what
        else f"{what} is {said}: a small strain changes the energy by {gain:.4g} eV, and by {work:.4g} eV according to it"
    )
