"""What an SSCHA run or a ranking asks energies of.

The ``Evaluator`` protocol: energies, forces and stresses of many structures in one call.

And which energy surface an ASE calculator is: an id of its class, its parameters, and its numbers
for fixed structures. Parameters alone do not tell: weights, files and attributes that a calculator
does not list change what it returns.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from ase.data import atomic_numbers, covalent_radii

from magus_anharmonic.errors import (
    InputError,
    MagusAnharmonicError,
    is_machine_error,
    is_out_of_memory,
    one_line,
)
from magus_anharmonic.io.digests import digest
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


def device_kind(evaluator: Any) -> Literal["cuda", "cpu"]:
    """Where it computes, as far as it says."""
    return "cuda" if str(getattr(evaluator, "device", "cpu")).startswith("cuda") else "cpu"


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
    if isinstance(source, type):  # has the methods, but no parameters
        raise TypeError(
            f"{source.__name__} is a class; give one made of it: {source.__name__}(...)"
        )
    if isinstance(source, CalculatorEvaluator):
        return source.for_structures(structures)
    if hasattr(source, "evaluate") and hasattr(source, "model_id"):
        return source
    if hasattr(source, "label") and hasattr(source, "settings_hash"):
        return LabelerEvaluator(source)
    if isinstance(source, BaseCalculator) or hasattr(source, "get_potential_energy"):
        return CalculatorEvaluator(source).for_structures(structures)
    raise TypeError(f"{type(source).__name__} is no evaluator, ASE calculator or labeler")


OUTPUT_KEYS = {
    "directory",
    "label",
    "prefix",
    "txt",
    "logfile",
    "outfile",
    "restart",
    "command",
    "profile",
    "atoms",
}
"""Parameters of ASE's calculators that say where files and programs are, not what the numbers
are."""
DIGITS = 5
"""Decimals of a number of the fingerprint in scientific notation: rounding of another processor is
below them."""


class NoIdError(MagusAnharmonicError):
    """A calculator of which no id can be made; says why."""


def parameters_digest(calculator: Any) -> str:
    """Digest of class, module and parameters (``todict``); files among them count by their content,
    wherever they lie."""
    kind = type(calculator)
    found = _parameters(calculator)
    shown = {key: _plain(value) for key, value in found.items() if key not in OUTPUT_KEYS}
    return digest([kind.__module__, kind.__qualname__, shown], length=None)


def calculator_id(calculator: Any, elements: Sequence[str]) -> str:
    """Class name and twelve hexadecimal digits of parameters and of energies and forces of
    `probes`; the calculator stays as it is.

    elements : symbols of the compound. Raises `NoIdError` where the calculator does not evaluate
    the probes, and what the machine raises.
    """
    if not elements:
        raise NoIdError("the elements are not known")
    numbers = [f"{number:.{DIGITS}e}" for number in _numbers(calculator, probes(elements))]
    parts = [parameters_digest(calculator), sorted(set(elements)), numbers]
    return f"{_name(calculator)}-{digest(parts)}"


def unnamed(calculator: Any) -> str:
    """An id that no other evaluator has, here or anywhere."""
    return f"{_name(calculator)}{_UNNAMED}{os.urandom(6).hex()}"


def is_unnamed(model_id: str) -> bool:
    """Whether the id says that nothing is known about the energy surface."""
    return _UNNAMED in model_id


_UNNAMED = "-unnamed-"


def _name(calculator: Any) -> str:
    return type(calculator).__name__.lower()


def probes(elements: Sequence[str]) -> list[Atoms]:
    """Two distorted chains of atoms that hold every element twice, one with the small atoms at
    their bond lengths, one with the large."""
    symbols = sorted(set(elements))
    sites = [*symbols, *reversed(symbols)]
    radii = np.array([covalent_radii[atomic_numbers[symbol]] for symbol in symbols])
    shifts = 0.04 * np.sin(np.arange(1, 3 * len(sites) + 1) ** 2).reshape(-1, 3)
    found = []
    for spacing in (2.1 * radii.mean(), 2.4 * radii.max() + 0.3):
        cell = spacing * np.array(
            [[1.0, 0.05, 0.0], [0.0, 1.02, 0.04], [0.03, 0.0, 0.98 * len(sites)]]
        )
        scaled = np.array([[0.0, 0.0, index / len(sites)] for index in range(len(sites))])
        found.append(Atoms(sites, positions=scaled @ cell + spacing * shifts, cell=cell, pbc=True))
    return found


def _numbers(calculator: Any, structures: Sequence[Atoms]) -> np.ndarray:
    """Energy (eV) of each structure, their difference, and two components of the forces (eV/A)
    along fixed directions."""
    energies, forces = [], []
    try:
        with _apart(calculator) as duplicate:
            for atoms in structures:
                atoms.calc = duplicate
                energies.append(float(atoms.get_potential_energy()))
                pattern = np.cos(np.arange(2 * 3 * len(atoms))).reshape(2, -1)
                forces.extend(pattern @ np.asarray(atoms.get_forces(), dtype=float).ravel())
    except (
        Exception
    ) as error:  # a calculator may raise anything for structures that it was not made for
        if is_machine_error(error):
            raise
        raise NoIdError(one_line(f"{type(error).__name__}: {error}", 160)) from error
    numbers = np.array([*energies, *np.diff(energies), *forces])
    if not np.isfinite(numbers).all():
        raise NoIdError("its energies or forces are not finite")
    return numbers


@contextlib.contextmanager
def _apart(calculator: Any) -> Iterator[Any]:
    """A copy of the calculator that writes its files, if any, into a folder of its own."""
    try:
        duplicate = copy.deepcopy(calculator)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, ValueError):
        duplicate = copy.copy(
            calculator
        )  # handles of files, libraries and devices are shared, results and parameters are not
    if callable(getattr(duplicate, "reset", None)):
        duplicate.reset()
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        if isinstance(getattr(duplicate, "directory", None), str | Path):
            duplicate.directory = folder
        yield duplicate


def _parameters(calculator: Any) -> dict[str, Any]:
    todict = getattr(calculator, "todict", None)
    try:
        found = todict() if callable(todict) else getattr(calculator, "parameters", {})
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RuntimeError,
        NotImplementedError,
    ):  # the numbers still tell
        found = getattr(calculator, "parameters", {})
    return dict(found) if isinstance(found, Mapping) else {}


def _plain(value: Any) -> Any:
    """What of a parameter JSON can hold; a file as the digest of its content."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(item)
            for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)
        ]
    if isinstance(value, str | Path):
        return _content(str(value)) or str(value)
    if value is None or isinstance(value, bool | int | float | complex):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if callable(getattr(value, "todict", None)):
        return [type(value).__qualname__, _plain(_parameters(value))]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _content(text: str) -> str | None:
    path = Path(text).expanduser()
    try:
        found = path.stat() if len(text) < 4096 and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # no text that names a file
        return None
    return (
        None
        if found is None
        else _digest_of(str(path.resolve()), found.st_mtime_ns, found.st_size, found.st_ino)
    )


@lru_cache(maxsize=256)
def _digest_of(path: str, *_changes: int) -> str:
    return digest(Path(path), length=None)
