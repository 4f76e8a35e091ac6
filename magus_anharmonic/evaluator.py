"""What an SSCHA run or a ranking asks energies of.

The ``Evaluator`` protocol: energies, forces and stresses of many structures in one call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError

from magus_anharmonic.calculator_id import NoIdError, calculator_id, parameters_digest, unnamed
from magus_anharmonic.errors import (
    InputError,
    MagusAnharmonicError,
    is_machine_error,
    is_out_of_memory,
    one_line,
)
from magus_anharmonic.notebook import Described
from magus_anharmonic.structures import change_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Evaluation(Described):
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

    def described(self) -> dict[str, str]:
        """How many structures, their energies, and what is known beside forces."""
        low, high = np.min(self.energy, initial=np.inf), np.max(self.energy, initial=-np.inf)
        return {
            "structures": str(len(self.energy)),
            "energies": f"{low:.5f} to {high:.5f} eV" if len(self.energy) else "none",
            "stress": "yes" if has_stress(self) else "no",
            "energy errors": "no" if self.energy_error is None else "yes",
        }

    def error_of(self, index: int) -> float | None:
        """``energy_error`` of one structure (eV/atom), or None."""
        return None if self.energy_error is None else float(self.energy_error[index])

    def one(self, i: int) -> Evaluation:
        """The results of one structure."""
        error = None if self.energy_error is None else self.energy_error[i : i + 1]
        return Evaluation(self.energy[i : i + 1], [self.forces[i]], self.stress[i : i + 1], error)


def has_stress(found: Evaluation) -> bool:
    """Whether the source gives stresses at all."""
    return not np.isnan(found.stress).all()


@dataclass(frozen=True, repr=False)
class Relaxation(Described):
    """The end of one relaxation.

    atoms carries species, cell and positions alone; energy eV; enthalpy eV/atom; forces (N, 3)
    eV/A; stress (3, 3) eV/A^3 in ASE's sign. ``failed`` structures must not be used, ``reason``
    says why (or why one has not converged); n_steps counts evaluations.
    """

    atoms: Atoms
    energy: float
    enthalpy: float
    forces: np.ndarray
    stress: np.ndarray
    converged: bool
    failed: bool
    n_steps: int
    reason: str = ""

    def described(self) -> dict[str, str]:
        """Structure, enthalpy and how it ended."""
        state = "failed" if self.failed else "converged" if self.converged else "unconverged"
        return {
            "structure": self.atoms.get_chemical_formula(),
            "enthalpy": f"{self.enthalpy:.5f} eV/atom",
            "status": state + (f" ({self.reason})" if self.reason else ""),
            "evaluations": str(self.n_steps),
        }

    @classmethod
    def without_result(cls, atoms: Atoms, reason: str, n_steps: int = 0) -> Relaxation:
        """A relaxation that failed before there was any number."""
        forces, stress = np.full((len(atoms), 3), np.nan), np.full((3, 3), np.nan)
        return cls(atoms, np.nan, np.nan, forces, stress, False, True, n_steps, reason)


ENERGY_ERROR = "energy_error"
"""``info`` key: expected error of the energy against the model's DFT, eV/atom; only where the model
has an estimate."""


@runtime_checkable
class Evaluator(Protocol):
    """Anything that evaluates structures in batches; ``model_id`` names the energy surface."""

    @property
    def model_id(self) -> str: ...

    def evaluate(self, structures: Sequence[Atoms]) -> Evaluation: ...


def evaluate_each(
    evaluator: Evaluator,
    structures: Sequence[Atoms],
    caught: type[Exception] = MagusAnharmonicError,
) -> list[Evaluation | str]:
    """One evaluation per structure, or the reason why there is none.

    When a batch fails, its structures are evaluated one by one, so that the others do not suffer.
    Machine errors, and what is not ``caught``, are raised.
    """
    if not structures:
        return []
    try:
        batch = evaluator.evaluate(structures)
        return [batch.one(index) for index in range(len(structures))]
    except caught as error:
        if is_machine_error(error) and not (len(structures) > 1 and is_out_of_memory(error)):
            raise
        if len(structures) == 1:
            log.debug("evaluation of %s failed", structures[0], exc_info=True)
            return [one_line(error) or type(error).__name__]
    # not in the handler: what fails alone has not failed because of the batch
    return [evaluate_each(evaluator, [atoms], caught)[0] for atoms in structures]


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
    of them.

    checked : see `CalculatorEvaluator`; None: nothing of it is to be checked.
    """

    def __init__(self, labeler: LabelSource, checked: set[str] | None = None) -> None:
        self.labeler, self.checked = labeler, checked

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


class LabelSource(Protocol):
    """What of a labeler (DFT) makes an evaluator: `magus_anharmonic.labelers.Labeler`."""

    @property
    def settings_hash(self) -> str: ...

    def label(self, structures: Sequence[Atoms], /) -> Sequence[Any]: ...


EnergySource = Evaluator | BaseCalculator | LabelSource
"""What energies, forces and stresses may come from: our ``Potential``, any ASE calculator, a
labeler."""


def as_evaluator(source: EnergySource, structures: Iterable[Atoms] = ()) -> Evaluator:
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
