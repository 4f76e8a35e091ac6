"""What an SSCHA run or a ranking asks energies of, and whether a calculator's words can be
believed.

The ``Evaluator`` protocol: energies, forces and stresses of many structures in one call.

Whether the numbers of an ASE calculator belong together: the work of its forces and stress is the
change of its energy.

Two displaced and two strained structures tell a wrong sign, another unit, or a stress per cell,
which else end as a cell that runs away or a sample that collapses. Asked once per calculator; our
own potentials differentiate their energy and are not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError

from magus_anharmonic.calculator_id import NoIdError, calculator_id, parameters_digest, unnamed
from magus_anharmonic.errors import InputError, MagusAnharmonicError, is_machine_error
from magus_anharmonic.structures import change_of, stripped
from magus_anharmonic.units import BOHR, EV_PER_A3_IN_GPA, RYDBERG

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Results for n structures, in the order of the input.

    energy : (n,) eV; forces : n arrays (N_i, 3) eV/A; stress : (n, 3, 3) eV/A^3, ASE's sign, all
    NaN where the source has none. energy_error : (n,) eV/atom, expected error of the energies
    against the DFT that the model learned; None where the source has no estimate (see
    `magus_anharmonic.potential.uncertainty`).
    """

    energy: np.ndarray
    forces: list[np.ndarray]
    stress: np.ndarray
    energy_error: np.ndarray | None = None

    def error_of(self, index: int) -> float | None:
        """``energy_error`` of one structure (eV/atom), or None."""
        return None if self.energy_error is None else float(self.energy_error[index])


def has_stress(found: Evaluation) -> bool:
    """Whether the source gives stresses at all."""
    return not np.isnan(found.stress).all()


ENERGY_ERROR = "energy_error"
"""``info`` key: expected error of the energy against the model's DFT, eV/atom; only where the model
has an estimate."""


@runtime_checkable
class Evaluator(Protocol):
    """Anything that evaluates structures in batches; ``model_id`` names the energy surface."""

    @property
    def model_id(self) -> str: ...

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation: ...


def set_energy_errors(evaluator: Any, structures: Sequence[Atoms]) -> None:
    """Set ``info['energy_error']`` (eV/atom), or remove it where ``evaluator`` has no estimate."""
    estimate = getattr(evaluator, "uncertainty", None)
    found = estimate(structures) if estimate is not None and structures else None
    for index, atoms in enumerate(structures):
        set_energy_error(atoms, None if found is None else float(found.energy_error[index]))


def set_energy_error(atoms: Atoms, error: float | None) -> None:
    """Set ``info['energy_error']`` (eV/atom), or remove it."""
    atoms.info.pop(ENERGY_ERROR, None)
    if error is not None:
        atoms.info[ENERGY_ERROR] = error


class CalculatorEvaluator:
    """Evaluator that calls an ASE calculator, one structure after the other.

    model_id : instead of the calculator's own, or of one that `calculator_id` makes. elements :
    symbols for which it is made.
    """

    def __init__(
        self, calculator: BaseCalculator, model_id: str | None = None, elements: Iterable[str] = ()
    ) -> None:
        self.calculator = calculator
        self.checked: set[str] = set()
        """What of its results `calculator_check` has found to belong to its energies."""
        self.elements = tuple(sorted(set(elements)))
        self._model_id = model_id
        self._found = ("", "")

    @property
    def model_id(self) -> str:
        """Of the energy surface; one that nothing else has, with a warning, where none can be
        made."""
        own = self._model_id or getattr(self.calculator, "model_id", None)
        if own:
            return str(own)
        now = parameters_digest(self.calculator)
        if self._found[0] != now:
            self._found = now, self._made_id()
        return self._found[1]

    def __getstate__(self) -> dict[str, Any]:
        # another process may not see the files that the calculator was made of
        named = self._model_id is None and getattr(self.calculator, "model_id", None) is None
        return {**self.__dict__, "_model_id": self.model_id if named else self._model_id}

    def _made_id(self) -> str:
        try:
            return calculator_id(self.calculator, self.elements)
        except NoIdError as error:
            log.warning(
                "calculator %s: no id can be made of it (%s): no number of another start is reused."
                " An attribute model_id, another for every set of parameters, gives it one",
                type(self.calculator).__name__,
                error,
            )
            return unnamed(self.calculator)

    def for_structures(self, structures: Iterable[Atoms]) -> CalculatorEvaluator:
        """Itself, or where it knows no elements one that knows those of ``structures``."""
        if self.elements:
            return self
        duplicate = CalculatorEvaluator(
            self.calculator,
            self._model_id,
            {symbol for atoms in structures for symbol in atoms.symbols},
        )
        duplicate.checked = self.checked
        return duplicate

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See `Evaluator`; the given structures are not changed."""
        energy, forces, stress = [], [], []
        for atoms in structures:
            copy = atoms.copy()
            copy.calc = self.calculator
            energy.append(copy.get_potential_energy())
            forces.append(np.asarray(copy.get_forces(apply_constraint=False), dtype=float))
            if forces[-1].shape != (len(atoms), 3):
                raise InputError(
                    f"calculator {self.model_id}: gives forces of shape {forces[-1].shape} for"
                    f" {len(atoms)} atoms"
                )
            changed = change_of(atoms, copy)
            if changed:
                raise InputError(
                    f"calculator {self.model_id}: it {changed}: its results are those of another"
                    " structure"
                )
            try:
                stress.append(copy.get_stress(voigt=False, apply_constraint=False))
            except PropertyNotImplementedError:  # a fixed cell needs none
                stress.append(np.full((3, 3), np.nan))
        return Evaluation(np.array(energy), forces, np.array(stress).reshape(-1, 3, 3))


class LabelerEvaluator:
    """Evaluator that asks a labeler (DFT); a label that fails raises, because an ensemble needs all
    of them."""

    def __init__(self, labeler: Any) -> None:
        self.labeler = labeler

    @property
    def model_id(self) -> str:
        return f"dft-{self.labeler.settings_hash}"

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation:
        """See `Evaluator`; raises ``MagusAnharmonicError`` with the labeler's reason."""
        labels = self.labeler.label(list(structures))
        for index, label in enumerate(labels):
            if not label.ok:
                raise MagusAnharmonicError(
                    f"label {index + 1} of {len(labels)} failed: {label.reason}"
                )
        return Evaluation(
            np.array([label.energy for label in labels]),
            [label.forces for label in labels],
            np.array([label.stress for label in labels]).reshape(-1, 3, 3),
        )


def as_evaluator(source: Any, structures: Iterable[Atoms] = ()) -> Evaluator:
    """Make an evaluator of a Potential, an ASE calculator or a labeler; TypeError for anything
    else.

    ``structures`` hold the elements for which a calculator's id is made.
    """
    if isinstance(source, CalculatorEvaluator):
        return source.for_structures(structures)
    if hasattr(source, "evaluate") and hasattr(source, "model_id"):
        return source
    if hasattr(source, "label") and hasattr(source, "settings_hash"):
        return LabelerEvaluator(source)
    if isinstance(source, BaseCalculator) or hasattr(source, "get_potential_energy"):
        return CalculatorEvaluator(source).for_structures(structures)
    raise TypeError(f"{type(source).__name__} is no evaluator, ASE calculator or labeler")


DISPLACEMENT, STRAIN = 0.05, 0.02
"""A (rms of a coordinate) and strain: large enough for DFT's noise, small enough for Simpson's
rule."""
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
    "GPa": EV_PER_A3_IN_GPA,
    "kbar": 10 * EV_PER_A3_IN_GPA,
    "bar": 1e4 * EV_PER_A3_IN_GPA,
    "Ry/bohr^3": BOHR**3 / RYDBERG,
    "Ha/bohr^3": 0.5 * BOHR**3 / RYDBERG,
}


def check_calculator(evaluator: Any, atoms: Atoms, *, stress: bool) -> int:
    """Ask an ASE calculator that was not asked before; returns how many structures that took.

    Raises ``InputError`` that says what is wrong with its forces, or with its stress where
    ``stress`` is needed. An exception of the calculator is left to who works with it.
    """
    stress = stress and bool(atoms.pbc.all())
    if not isinstance(evaluator, CalculatorEvaluator) or evaluator.checked >= {
        "forces",
        *(["stress"] if stress else []),
    }:
        return 0
    name = type(evaluator.calculator).__name__
    probe = (
        stripped(atoms).repeat((2, 1, 1))
        if len(atoms) == 1 and atoms.pbc.all()
        else stripped(atoms)
    )
    rng = np.random.default_rng(20240)
    moves = rng.normal(0.0, DISPLACEMENT, (len(probe), 3))
    moves -= moves.mean(axis=0)
    tensor = rng.uniform(-0.3, 0.3, (3, 3))
    strain = STRAIN * (np.eye(3) + 0.5 * (tensor + tensor.T))
    try:
        middle = evaluator.evaluate([probe])
        steps = [moves * (1.0 if -np.sum(middle.forces[0] * moves) > 0.0 else -1.0), strain]
        if stress and not has_stress(middle):
            raise InputError(
                f"calculator {name}: gives no stress, which a variable cell needs; keep the cell"
                " fixed"
            )
        if stress and np.sum(middle.stress[0] * strain) < 0.0:
            steps[1] = -strain  # uphill, where tension and stiffness do not cancel
        structures = [_stepped(probe, 0.5 * steps[0], None), _stepped(probe, steps[0], None)]
        structures += (
            [_stepped(probe, None, 0.5 * steps[1]), _stepped(probe, None, steps[1])]
            if stress
            else []
        )
        found = evaluator.evaluate(structures)
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
    slopes = [-float(np.sum(forces * steps[0])) for forces in (middle.forces[0], *found.forces[:2])]
    gain = float(found.energy[1] - middle.energy[0])
    _compare(f"calculator {name}: its forces are", "eV/A", gain, slopes, len(probe), FORCE_FACTORS)
    if stress:
        stresses = zip((probe, *structures[2:]), (middle.stress[0], *found.stress[2:]), strict=True)
        slopes = [
            structure.get_volume() * float(np.sum(tensor * steps[1]))
            for structure, tensor in stresses
        ]
        factors = {
            **STRESS_FACTORS,
            "eV (of the cell, not divided by its volume)": probe.get_volume(),
        }
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


def _compare(
    what: str, unit: str, gain: float, slopes: Sequence[float], n: int, factors: Mapping[str, float]
) -> None:
    """``gain`` of energy (eV) over a step, and its ``slopes`` (eV per step) at the beginning, half
    way and at the end.

    Their integral is exact for quartic wells (Simpson). ``factors``: how many times too large a
    slope is in which other unit.
    """
    work = (slopes[0] + 4.0 * slopes[1] + slopes[2]) / 6.0
    if not (np.isfinite(work) and np.isfinite(gain)):
        return  # who works with the calculator says where its numbers are not finite
    if abs(work - gain) <= TOLERANCE * max(abs(work), abs(gain)) + NOISE * n:
        return
    said = likely_cause(work / gain if gain else np.inf, unit, factors)
    raise InputError(
        f"{what} {said}: a small step changes the energy by {gain:.4g} eV, and by {work:.4g} eV"
        " according to them"
    )


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
