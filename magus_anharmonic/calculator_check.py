"""Whether the numbers of an ASE calculator belong together: the work of its forces and stress is
the change of its energy.

Displaced and strained structures (two along each of four steps) tell a wrong sign, another unit,
another order of the stresses, a stress per cell or a constant force, which else end as a cell that
runs away or a sample that collapses. Asked once per calculator; our own potentials differentiate
their energy and are not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError, is_machine_error
from magus_anharmonic.evaluator import has_stress
from magus_anharmonic.structures import strain_cell, stripped
from magus_anharmonic.units import BOHR, RYDBERG, ev_per_a3_to_gpa

log = logging.getLogger(__name__)

DISPLACEMENT, STRAIN = 0.05, 0.02
"""A (rms of a coordinate) and strain: large enough for DFT's noise, small enough for Simpson's
rule."""
TOLERANCE = 0.35
"""Relative difference of work and energy that is none: cutoffs, Pulay stress, rounding."""
NOISE = 2e-4
"""eV/atom."""
NORMAL = np.diag([1.0, 0.0, -1.0])
"""Of xx against zz, as `SHEAR`."""
SHEAR = np.array([[0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [-1.0, 1.0, 0.0]])
"""Of yz and xz, against each other: no other order of the components does half as much work."""
BY_ANOTHER_ORDER = 0.2
"""Of the difference of work and energy is left with the normal stresses in their true order."""
DRIFT = 0.03
"""eV/A per atom, above what grids and cutoffs do to the sum of the forces."""
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
    "GPa": ev_per_a3_to_gpa(1.0),
    "kbar": ev_per_a3_to_gpa(10),
    "bar": ev_per_a3_to_gpa(1e4),
    "Ry/bohr^3": BOHR**3 / RYDBERG,
    "Ha/bohr^3": 0.5 * BOHR**3 / RYDBERG,
}


def check_calculator(evaluator: Any, atoms: Atoms, *, stress: bool) -> int:
    """Ask an ASE calculator that was not asked before; returns how many structures that took.

    Raises ``InputError`` that says what is wrong with its forces, or with its stress where
    ``stress`` is needed. An exception of the calculator is left to who works with it.
    """
    stress = stress and bool(atoms.pbc.all())
    checked = getattr(evaluator, "checked", None)
    wanted = {"forces", *(["stress"] if stress else [])}
    if checked is None or checked >= wanted:
        return 0
    own = getattr(evaluator, "calculator", None)
    name = evaluator.labeler.description if own is None else type(own).__name__
    probe = (
        stripped(atoms).repeat((2, 1, 1))
        if len(atoms) == 1 and atoms.pbc.all()
        else stripped(atoms)
    )
    rng = np.random.default_rng(20240)
    moves = rng.normal(0.0, DISPLACEMENT, (len(probe), 3))
    moves -= moves.mean(axis=0)
    # without a shear: shears in another order would hide the unit and the sign of all
    strains = [np.diag(1.0 + rng.uniform(-0.3, 0.3, 3)), NORMAL, SHEAR] if stress else []
    try:
        middle = evaluator.evaluate([probe])
        if stress and not has_stress(middle):
            raise InputError(
                f"calculator {name}: gives no stress, which a variable cell needs; give one that"
                " does as sscha.evaluator, or keep the cells (sscha.cell: fixed and"
                " MainCalculator.relax_lattice: false)"
            )
        moves *= 1.0 if -np.sum(middle.forces[0] * moves) > 0.0 else -1.0
        # uphill, where tension and stiffness do not cancel
        strains = [STRAIN * (-e if np.sum(middle.stress[0] * e) < 0.0 else e) for e in strains]
        structures = [_stepped(probe, part * moves, None) for part in (0.5, 1.0)]
        structures += [_stepped(probe, None, part * e) for e in strains for part in (0.5, 1.0)]
        found = evaluator.evaluate(structures)
        drift = _drift([middle.forces[0], *found.forces[:2]])
        if drift is not None:
            along = 0.3 * drift / np.linalg.norm(drift)
            shifted = evaluator.evaluate([_stepped(probe, np.tile(along, (len(probe), 1)), None)])
    except InputError:
        raise
    except Exception as error:
        if is_machine_error(error):
            raise
        log.debug(
            "the calculator was not checked: it fails for %s",
            atoms.get_chemical_formula(),
            exc_info=True,
        )
        return 0
    what = f"calculator {name}: its"
    gains = found.energy[1::2] - middle.energy[0]
    slopes = [-float(np.sum(forces * moves)) for forces in (middle.forces[0], *found.forces[:2])]
    _compare(f"{what} forces are", "eV/A", float(gains[0]), slopes, len(probe), FORCE_FACTORS)
    if drift is not None:
        gain, work = float(shifted.energy[0] - middle.energy[0]), -float(along @ drift) * len(probe)
        if not _agree(gain, work, len(probe)):
            raise InputError(
                f"{what} forces do not add up to zero ({_numbers(drift)} eV/A per atom, the same in"
                f" other structures), but a shift of all atoms changes the energy by {gain:.2g} eV:"
                " a constant force, or forces of other atoms, is in them"
            )
    for number, strain in enumerate(strains):
        first = 2 + 2 * number
        tensors = (middle.stress[0], *found.stress[first : first + 2])
        slopes, normal = (
            [
                _slope(probe.get_volume(), mask * tensor, part, strain)
                for part, tensor in zip((0.0, 0.5, 1.0), tensors, strict=True)
            ]
            for mask in (np.ones((3, 3)), np.eye(3))
        )
        if number == 0:
            factors = {
                **STRESS_FACTORS,
                "eV (of the cell, not divided by its volume)": probe.get_volume(),
            }
            _compare(f"{what} stress is", "eV/A^3", float(gains[1]), slopes, len(probe), factors)
        elif number == 1:
            _compare_normal(what, float(gains[2]), probe.get_volume(), tensors, strain, len(probe))
        else:
            _compare_shear(what, float(gains[3]), slopes, normal, len(probe))
    checked |= wanted
    return 1 + len(structures) + (drift is not None)


def _slope(volume: float, stress: np.ndarray, part: float, strain: np.ndarray) -> float:
    """Change of the energy (eV) along ``strain`` (3, 3) after ``part`` of it, by the ``stress``
    there; ``volume`` is the one before."""
    now = np.eye(3) + part * strain
    return float(volume * np.linalg.det(now) * np.sum(stress * (strain @ np.linalg.inv(now))))


def _drift(forces: Sequence[np.ndarray]) -> np.ndarray | None:
    """Mean force per atom (3,) eV/A, where it is one and the same in all structures and more than
    noise; else None."""
    means = np.array([each.mean(axis=0) for each in forces])
    size = float(np.linalg.norm(means, axis=1).min())
    rms = float(np.sqrt(np.mean(forces[0] ** 2)))
    same = np.linalg.norm(means - means[0], axis=1).max() < 0.2 * size
    return means[0] if same and size > max(DRIFT, 0.03 * rms) else None


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _stepped(atoms: Atoms, moves: np.ndarray | None, strain: np.ndarray | None) -> Atoms:
    """A copy with its atoms moved (n, 3) A, or its cell strained (3, 3)."""
    copy = atoms.copy()
    if moves is not None:
        copy.positions += moves
    if strain is not None:
        strain_cell(copy, strain)
    return copy


def _compare(
    what: str, unit: str, gain: float, slopes: Sequence[float], n: int, factors: Mapping[str, float]
) -> None:
    """``gain`` of energy (eV) over a step, and its ``slopes`` (eV per step) at the beginning, half
    way and at the end.

    Their integral is exact for quartic wells (Simpson). ``factors``: how many times too large a
    slope is in which other unit.
    """
    work = _work(slopes)
    if _agree(gain, work, n):
        return
    said = likely_cause(work / gain if gain else np.inf, unit, factors)
    raise InputError(
        f"{what} {said}: a small step changes the energy by {gain:.4g} eV, and by {work:.4g} eV"
        " according to them"
    )


def _compare_normal(
    what: str,
    gain: float,
    volume: float,
    stresses: Sequence[np.ndarray],
    strain: np.ndarray,
    n: int,
) -> None:
    """As `_compare`, of a strain of xx against zz, where unit and sign are known to be right; the
    ``stresses`` are those at its beginning, half way and at its end."""
    misfits = {}
    for order in permutations(range(3)):
        normal = [np.diag(np.diag(stress)[list(order)]) for stress in stresses]
        parts = zip((0.0, 0.5, 1.0), normal, strict=True)
        work = _work([_slope(volume, stress, part, strain) for part, stress in parts])
        misfits[order] = abs(work - gain)
    own, best = misfits[0, 1, 2], min(misfits, key=misfits.__getitem__)
    if own > NOISE * n and misfits[best] < BY_ANOTHER_ORDER * own:
        given = ", ".join(("xx", "yy", "zz")[best.index(axis)] for axis in range(3))
        raise InputError(
            f"{what} normal stresses are in another order than ASE's (xx, yy, zz, yz, xz, xy):"
            f" {given}, as it seems: a strain of xx against zz changes the energy by {gain:.4g} eV,"
            f" and by {own:.2g} eV more or less according to them"
        )


def _compare_shear(
    what: str, gain: float, slopes: Sequence[float], normal: Sequence[float], n: int
) -> None:
    """As `_compare`, of a strain of yz and xz alone, where the unit is known to be right.

    ``normal`` is the part of the normal stresses in ``slopes``.
    """
    work = _work(slopes)
    if _agree(gain, work, n):
        return
    left = gain - _work(normal)
    ratio = (work - _work(normal)) / left if left else np.inf
    factors = {"twice": 2.0, "half": 0.5, "four times": 4.0}
    known = [name for name, factor in factors.items() if abs(ratio / factor - 1.0) < NEAR]
    guess = f"{known[0]} what they should be, or " if known else ""
    raise InputError(
        f"{what} shear stresses are {guess}in another order than ASE's (xx, yy, zz, yz, xz, xy), or"
        f" wrong: a small shear changes the energy by {gain:.4g} eV, and by {work:.4g} eV according"
        " to them"
    )


def _work(slopes: Sequence[float]) -> float:
    return (slopes[0] + 4.0 * slopes[1] + slopes[2]) / 6.0


def _agree(gain: float, work: float, n: int) -> bool:
    """Whether both (eV, of n atoms) are the same but for noise; who works with the calculator says
    where its numbers are not finite."""
    if not (np.isfinite(work) and np.isfinite(gain)):
        return True
    return abs(work - gain) <= TOLERANCE * max(abs(work), abs(gain)) + NOISE * n


def likely_cause(
    ratio: float, unit: str, factors: Mapping[str, float], *, recognised: bool = False
) -> str:
    """What makes numbers ``ratio`` times what they should be in ``unit``; with ``recognised`` empty
    unless a sign or a unit explains it."""
    known = [name for name, factor in factors.items() if abs(abs(ratio) / factor - 1.0) < NEAR]
    right = abs(abs(ratio) - 1.0) < NEAR
    if recognised and not known and not (ratio < 0 and 0.5 < -ratio < 1.5):
        return ""
    guess = (
        f"in {' or '.join(known)} instead of {unit}"
        if known
        else ""
        if right or recognised
        else f"not in {unit}, or wrong"
    )
    sign = "of the other sign than ASE's" if ratio < 0 and (known or not guess) else ""
    return " and ".join(filter(None, (sign, guess)))
