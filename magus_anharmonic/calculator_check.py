"""Whether the numbers of an ASE calculator belong together: the work of its forces and stress is the change of its energy.

Two displaced and two strained structures tell a wrong sign, another unit, or a stress per cell, which else end as a cell that runs away or
a sample that collapses. Asked once per calculator; our own potentials differentiate their energy and are not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, is_trouble
from magus_anharmonic.evaluator import CalculatorEvaluator, has_stress
from magus_anharmonic.structures import bare
from magus_anharmonic.units import BOHR, EV_PER_A3_IN_GPA, RYDBERG

log = logging.getLogger(__name__)

DISPLACEMENT, STRAIN = 0.05, 0.02
"""A (rms of a coordinate) and strain: large enough for DFT's noise, small enough for Simpson's rule."""
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
    name = type(evaluator.calculator).__name__
    probe = bare(atoms).repeat((2, 1, 1)) if len(atoms) == 1 and atoms.pbc.all() else bare(atoms)
    rng = np.random.default_rng(20240)
    moves = rng.normal(0.0, DISPLACEMENT, (len(probe), 3))
    moves -= moves.mean(axis=0)
    tensor = rng.uniform(-0.3, 0.3, (3, 3))
    strain = STRAIN * (np.eye(3) + 0.5 * (tensor + tensor.T))
    try:
        middle = evaluator.evaluate([probe])
        steps = [moves * (1.0 if -np.sum(middle.forces[0] * moves) > 0.0 else -1.0), strain]
        if stress and not has_stress(middle):
            raise InputError(f"calculator {name}: gives no stress, which a variable cell needs; keep the cell fixed")
        if stress and np.sum(middle.stress[0] * strain) < 0.0:
            steps[1] = -strain  # uphill, where tension and stiffness do not cancel
        structures = [_stepped(probe, 0.5 * steps[0], None), _stepped(probe, steps[0], None)]
        structures += [_stepped(probe, None, 0.5 * steps[1]), _stepped(probe, None, steps[1])] if stress else []
        found = evaluator.evaluate(structures)
    except InputError:
        raise
    except Exception as error:
        if is_trouble(error):
            raise
        log.debug("the calculator was not checked: it fails for %s", atoms.get_chemical_formula(), exc_info=True)
        return 0
    slopes = [-float(np.sum(forces * steps[0])) for forces in (middle.forces[0], *found.forces[:2])]
    gain = float(found.energy[1] - middle.energy[0])
    _compare(f"calculator {name}: its forces are", "eV/A", gain, slopes, len(probe), FORCE_FACTORS)
    if stress:
        stresses = zip((probe, *structures[2:]), (middle.stress[0], *found.stress[2:]), strict=True)
        slopes = [structure.get_volume() * float(np.sum(tensor * steps[1])) for structure, tensor in stresses]
        factors = {**STRESS_FACTORS, "eV (of the cell, not divided by its volume)": probe.get_volume()}
        gain = float(found.energy[3] - middle.energy[0])
        _compare(f"calculator {name}: its stress is", "eV/A^3", gain, slopes, len(probe), factors)
    evaluator.checked |= {"forces", *(["stress"] if stress else [])}
    return 1 + len(structures)


def _stepped(atoms: Atoms, moves: np.ndarray | None, strain: np.ndarray | None) -> Atoms:
    """A copy with its atoms moved (n, 3) A, or its cell strained (3, 3)."""
    copy = atoms.copy()
    if moves is not None:
        copy.positions += moves
    if strain is not None:
        copy.set_cell(copy.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return copy


def _compare(what: str, unit: str, gain: float, slopes: Sequence[float], n: int, factors: Mapping[str, float]) -> None:
    """``gain`` of energy (eV) over a step, and its ``slopes`` (eV per step) at the beginning, half way and at the end.

    Their integral is exact for quartic wells (Simpson). ``factors``: how many times too large a slope is in which other unit.
    """
    work = (slopes[0] + 4.0 * slopes[1] + slopes[2]) / 6.0
    if not (np.isfinite(work) and np.isfinite(gain)):
        return  # who works with the calculator says where its numbers are not finite
    if abs(work - gain) <= TOLERANCE * max(abs(work), abs(gain)) + NOISE * n:
        return
    said = likely_cause(work / gain if gain else np.inf, unit, factors)
    raise InputError(f"{what} {said}: a small step changes the energy by {gain:.4g} eV, and by {work:.4g} eV according to them")


def likely_cause(ratio: float, unit: str, factors: Mapping[str, float], *, recognised: bool = False) -> str:
    """What makes numbers ``ratio`` times what they should be in ``unit``; with ``recognised`` empty unless a sign or a unit explains it."""
    known = [name for name, factor in factors.items() if abs(abs(ratio) / factor - 1.0) < NEAR]
    right = abs(abs(ratio) - 1.0) < NEAR
    if recognised and not known and not (ratio < 0 and 0.5 < -ratio < 1.5):
        return ""
    guess = f"in {' or '.join(known)} instead of {unit}" if known else "" if right or recognised else f"not in {unit}, or wrong"
    sign = "of the other sign than ASE's" if ratio < 0 and (known or not guess) else ""
    return " and ".join(filter(None, (sign, guess)))
