"""How far a potential is from labels: RMSE of energy, forces and stress, and the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.potential.losses import LossSettings, combine, mean_loss
from magus_anharmonic.potential.split import parent_of
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import EV_PER_A3_IN_GPA

FEW = 20
"""Labels below which an RMSE is given with its error."""


@dataclass(frozen=True)
class Scores:
    """Errors over ``n`` structures.

    energy_rmse : eV/atom; force_rmse : eV/A per component; stress_rmse : GPa per component of the 3x3 tensor;
    loss : training loss over the whole set (independent of batches). The standard errors of the three RMSE are given for fewer than `FEW`
    structures; labels of one parent count as one there.
    """

    energy_rmse: float
    force_rmse: float
    stress_rmse: float
    loss: float
    n: int
    energy_rmse_error: float | None = None
    force_rmse_error: float | None = None
    stress_rmse_error: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """The numbers by name, for JSON; errors where they are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        energy = with_error(1e3 * self.energy_rmse, None if self.energy_rmse_error is None else 1e3 * self.energy_rmse_error, 1)
        force, stress = with_error(self.force_rmse, self.force_rmse_error, 3), with_error(self.stress_rmse, self.stress_rmse_error, 2)
        return f"{energy} meV/atom, {force} eV/A, {stress} GPa"


def with_error(value: float, error: float | None, decimals: int) -> str:
    """``'12.1 +- 3.0'``, or the value alone."""
    return f"{value:.{decimals}f}" + ("" if error is None else f" +- {error:.{decimals}f}")


@dataclass(frozen=True)
class _DefaultLoss:
    loss: str = "huber"
    force_loss_ratio: float = 1.0
    stress_loss_ratio: float = 0.1


def name_of(atoms: Atoms) -> str:
    """How messages call a structure: its ``info['id']`` or else its identity, and the formula."""
    return f"structure {atoms.info.get('id', structure_id(atoms))} ({atoms.get_chemical_formula()})"


def labels_of(atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy (eV), forces (N, 3) eV/A and stress (3, 3) eV/A^3 attached to ``atoms``.

    Raises InputError naming the structure when one is missing or not finite.
    """
    name = name_of(atoms)
    if atoms.calc is None:
        raise InputError(f"{name}: has no labels; energy, forces and stress are needed (extended XYZ as ASE writes it)")
    try:
        energy = float(atoms.get_potential_energy())
        forces = np.asarray(atoms.get_forces(apply_constraint=False), dtype=float)
        stress = np.asarray(atoms.get_stress(voigt=False, apply_constraint=False), dtype=float)
    except (PropertyNotImplementedError, RuntimeError) as error:
        raise InputError(f"{name}: a label is missing: {error}") from None
    if not (np.isfinite(energy) and np.isfinite(forces).all() and np.isfinite(stress).all()):
        raise InputError(f"{name}: its energy, forces or stress are not finite; leave it out of the labels")
    return energy, forces, stress


def scores_from_residuals(energy: np.ndarray, forces: np.ndarray, stress: np.ndarray, settings: LossSettings | None = None) -> Scores:
    """Scores of residuals in eV/atom (n,), eV/A (N, 3) and GPa (n, 3, 3)."""
    chosen: LossSettings = settings or _DefaultLoss()
    energy_loss, force_loss, stress_loss = (mean_loss(chosen.loss, residual) for residual in (energy, forces, stress))
    loss = float(combine(energy_loss, force_loss, stress_loss, chosen))
    return Scores(_rms(energy), _rms(forces), _rms(stress), loss, len(energy))


def _rms(residual: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(residual, dtype=float)))) if np.size(residual) else 0.0


def score(potential: Any, labelled: Sequence[Atoms], settings: LossSettings | None = None) -> Scores:
    """Scores of ``potential`` (anything ``as_evaluator`` takes) on labelled structures.

    ``settings`` gives ``loss``, ``force_loss_ratio``, ``stress_loss_ratio`` (default: Huber, 1, 0.1).
    Raises InputError when a label is missing.
    """
    return _scores_of(_residuals(potential, labelled), labelled, settings)


def scores_by(potential: Any, labelled: Sequence[Atoms], key: str = "kind", settings: LossSettings | None = None) -> dict[str, Scores]:
    """Scores per value of ``info[key]`` (structures without it: "other"), sorted by name; one evaluation of all."""
    residuals = _residuals(potential, labelled)
    kinds = [str(atoms.info.get(key, "other")) for atoms in labelled]
    found: dict[str, Scores] = {}
    for kind in sorted(set(kinds)):
        chosen = [index for index, other in enumerate(kinds) if other == kind]
        found[kind] = _scores_of([residuals[index] for index in chosen], [labelled[index] for index in chosen], settings)
    return found


Residual = tuple[float, np.ndarray, np.ndarray]


def _scores_of(residuals: Sequence[Residual], labelled: Sequence[Atoms], settings: LossSettings | None) -> Scores:
    found = scores_from_residuals(*_concatenate(residuals), settings)
    if not 0 < found.n < FEW:
        return found
    groups = np.unique([str(atoms.info.get("family") or parent_of(atoms)) for atoms in labelled], return_inverse=True)[1]
    errors = [rmse_error([np.ravel(residual[place]) for residual in residuals], groups) for place in range(3)]
    return replace(found, energy_rmse_error=errors[0], force_rmse_error=errors[1], stress_rmse_error=errors[2])


def rmse_error(residuals: Sequence[np.ndarray], groups: np.ndarray) -> float:
    """Standard error of the RMSE of ``residuals`` (one array per structure), of which those of one group share what is wrong with them.

    By the spread of the mean squares of the groups, and not below that of as many Gaussian numbers.
    """
    squares = np.array([np.sum(np.square(values)) for values in residuals])
    counts = np.array([len(values) for values in residuals], dtype=float)
    mean, n = squares.sum() / counts.sum(), int(groups.max()) + 1
    apart = np.bincount(groups, squares - mean * counts)
    error = np.sqrt(n / max(n - 1, 1) * np.sum(apart**2)) / counts.sum()
    rmse = float(np.sqrt(mean))
    return max(float(error / (2.0 * rmse)), rmse / np.sqrt(2.0 * n)) if rmse > 0.0 else 0.0


def _residuals(potential: Any, labelled: Sequence[Atoms]) -> list[Residual]:
    if not labelled:
        return []
    labels = [labels_of(atoms) for atoms in labelled]
    found = as_evaluator(potential).evaluate(list(labelled))
    return [
        (
            float(found.energy[i] - energy) / len(labelled[i]),
            np.asarray(found.forces[i]) - forces,
            (np.asarray(found.stress[i]) - stress) * EV_PER_A3_IN_GPA,
        )
        for i, (energy, forces, stress) in enumerate(labels)
    ]


def _concatenate(residuals: Sequence[Residual]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not residuals:
        return np.empty(0), np.empty((0, 3)), np.empty((0, 3, 3))
    energy, forces, stress = zip(*residuals, strict=True)
    return np.array(energy), np.concatenate(forces), np.stack(stress)
