"""Labelled structures in batches, the loss, the scores, and the split into sides.

Split labels into training, validation and test set by a hash of where they come from.

The side of a structure depends on its parent alone: all distortions of one structure stay together,
and a label keeps its side when the set grows.

The training loss of MatterSim: energy per atom, forces and stress, each by MSE or Huber's loss.

loss = L(E/N) + force_loss_ratio * L(F) + stress_loss_ratio * L(S), E in eV, F in eV/A, S in GPa
(ASE's sign, all nine components); as in ``Potential.loss_calc`` of mattersim 1.2.3.  Huber's delta
of 0.01 is that of MatterSim's own finetuning script.

Labelled structures as batches of graphs.

Training moves no atom, so the neighbours of every structure are found once; a batch is only a
concatenation.

How far a potential is from labels: RMSE of energy, forces and stress, and the training loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError

from magus_anharmonic.energy_surface import LABEL_ERROR
from magus_anharmonic.errors import InputError
from magus_anharmonic.evaluator import as_evaluator
from magus_anharmonic.io.digests import digest
from magus_anharmonic.potential.graph import Graph, build_graph, check, find_neighbours
from magus_anharmonic.settings import TrainingKeys
from magus_anharmonic.structures import structure_id
from magus_anharmonic.units import ev_per_a3_to_gpa, ev_to_mev


def parent_of(atoms: Atoms) -> str:
    """``info['parent']``, or else the identity of the structure itself."""
    return str(atoms.info.get("parent", structure_id(atoms)))


def side_of_name(name: str, split: Sequence[int] = (8, 1, 1)) -> int:
    """0, 1 or 2 (training, validation, test): by the hash of a parent's name, so that it is the
    same for ever."""
    position = int(digest(name), 16) / 16**12 * sum(split)
    return 0 if position < split[0] else 1 if position < split[0] + split[1] else 2


def split_by_parent(
    labelled: Sequence[Atoms], split: Sequence[int] = (8, 1, 1)
) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
    """Training, validation and test set, expected to be in the ratio ``split`` (three numbers >=
    0), order kept."""
    parts: tuple[list[Atoms], list[Atoms], list[Atoms]] = ([], [], [])
    for atoms in labelled:
        parts[side_of_name(parent_of(atoms), split)].append(atoms)
    return parts


HUBER_DELTA = 0.01
"""Residual (eV/atom, eV/A, GPa) above which Huber's loss grows linearly."""


def mean_loss(name: str, residual: np.ndarray) -> float:
    """Mean over all elements of the loss ``name`` ("mse" or "huber") of ``residual`` (any shape); 0
    for no elements."""
    size = np.abs(np.asarray(residual, dtype=float)).ravel()
    if not size.size:
        return 0.0
    if name == "mse":
        return float(np.mean(size**2))
    linear = HUBER_DELTA * (size - 0.5 * HUBER_DELTA)
    return float(np.mean(np.where(size < HUBER_DELTA, 0.5 * size**2, linear)))


def torch_loss(name: str) -> Any:
    """The same loss as a ``torch.nn`` module (mean over all elements)."""
    import torch

    return torch.nn.MSELoss() if name == "mse" else torch.nn.HuberLoss(delta=HUBER_DELTA)


def combine(energy: Any, forces: Any, stress: Any, settings: TrainingKeys) -> Any:
    """Weighted sum of the three mean losses (floats or tensors)."""
    return energy + forces * settings.force_loss_ratio + stress * settings.stress_loss_ratio


@dataclass(frozen=True)
class Targets:
    """Labels of a batch: energy per atom (n,) eV in float64, forces (N, 3) eV/A, stress (n, 3, 3)
    GPa; n_atoms (n,)."""

    energy: torch.Tensor
    forces: torch.Tensor
    stress: torch.Tensor
    n_atoms: torch.Tensor


class LabelledGraphs:
    """Neighbours and targets of labelled structures, for models with the cutoffs of ``module``.

    Raises InputError, naming the structure, when a label is missing or a structure cannot be
    evaluated.
    """

    def __init__(self, labelled: Sequence[Atoms], module: torch.nn.Module) -> None:
        reference = next(module.parameters())
        self._dtype, self._device = reference.dtype, reference.device
        arguments: Any = module.model_args
        self._cutoff, self._threebody_cutoff = (
            float(arguments["cutoff"]),
            float(arguments["threebody_cutoff"]),
        )
        self._structures = list(labelled)
        labels = [labels_of(atoms) for atoms in self._structures]
        for atoms in self._structures:
            check(atoms, name_of(atoms))
        self._neighbours = [
            find_neighbours(atoms, self._cutoff, name_of(atoms)) for atoms in self._structures
        ]
        self._count = self._tensor([len(atoms) for atoms in self._structures], torch.float64)
        self._energy = (
            self._tensor([energy for energy, _, _ in labels], torch.float64) / self._count
        )
        self._forces = [self._tensor(forces) for _, forces, _ in labels]
        self._stress = self._tensor([ev_per_a3_to_gpa(stress) for _, _, stress in labels]).reshape(
            -1, 3, 3
        )

    def _tensor(self, values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.as_tensor(
            np.asarray(values, dtype=float), dtype=dtype or self._dtype, device=self._device
        )

    def __len__(self) -> int:
        return len(self._structures)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Graph, Targets]:
        """The structures ``indices`` as one graph with its targets."""
        chosen = [int(i) for i in indices]
        graph = build_graph(
            [self._structures[i] for i in chosen],
            self._cutoff,
            self._dtype,
            self._device,
            threebody_cutoff=self._threebody_cutoff,
            neighbours=[self._neighbours[i] for i in chosen],
        )
        index = torch.as_tensor(chosen, device=self._device)
        forces = torch.cat([self._forces[i] for i in chosen])
        return graph, Targets(self._energy[index], forces, self._stress[index], self._count[index])

    def batches(
        self, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[tuple[Graph, Targets]]:
        """All structures in ``order`` (default: as given), ``batch_size`` at a time, the last batch
        smaller."""
        order = np.arange(len(self)) if order is None else order
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


SMALL_ERROR = 1e-3
"""eV/atom: a label that is known so well counts half as much as an exact one."""


def weights_by_error(labelled: Sequence[Atoms]) -> np.ndarray | None:
    """(n,) how often each label is to be seen, 1 on average, by its statistical error
    (`LABEL_ERROR`, eV per cell): 1 / (`SMALL_ERROR`^2 + error^2). None where all are
    exact."""
    errors = np.array([float(atoms.info.get(LABEL_ERROR, 0.0)) / len(atoms) for atoms in labelled])
    if not errors.any():
        return None
    weights = 1.0 / (SMALL_ERROR**2 + errors**2)
    return weights / weights.mean()


FEW = 20
"""Labels below which an RMSE is given with its error."""


@dataclass(frozen=True)
class Scores:
    """Errors over ``n`` structures.

    energy_rmse : eV/atom; force_rmse : eV/A per component; stress_rmse : GPa per component of the
    3x3 tensor; loss : training loss over the whole set (independent of batches). The standard
    errors of the three RMSE are given for fewer than `FEW` structures; labels of one parent count
    as one there.
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
        energy = with_error(
            ev_to_mev(self.energy_rmse),
            None if self.energy_rmse_error is None else ev_to_mev(self.energy_rmse_error),
            1,
        )
        force, stress = (
            with_error(self.force_rmse, self.force_rmse_error, 3),
            with_error(self.stress_rmse, self.stress_rmse_error, 2),
        )
        return f"{energy} meV/atom, {force} eV/A, {stress} GPa"


def with_error(value: float, error: float | None, decimals: int) -> str:
    """``'12.1 +- 3.0'``, or the value alone."""
    return f"{value:.{decimals}f}" + ("" if error is None else f" +- {error:.{decimals}f}")


def name_of(atoms: Atoms) -> str:
    """How messages call a structure: its ``info['id']`` or else its identity, and the formula."""
    return f"structure {atoms.info.get('id', structure_id(atoms))} ({atoms.get_chemical_formula()})"


def labels_of(atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy (eV), forces (N, 3) eV/A and stress (3, 3) eV/A^3 attached to ``atoms``.

    Raises InputError naming the structure when one is missing or not finite.
    """
    name = name_of(atoms)
    if atoms.calc is None:
        raise InputError(
            f"{name}: has no labels; energy, forces and stress are needed (extended XYZ as ASE"
            " writes it)"
        )
    try:
        energy = float(atoms.get_potential_energy())
        forces = np.asarray(atoms.get_forces(apply_constraint=False), dtype=float)
        stress = np.asarray(atoms.get_stress(voigt=False, apply_constraint=False), dtype=float)
    except (PropertyNotImplementedError, RuntimeError) as error:
        raise InputError(f"{name}: a label is missing: {error}") from None
    if not (np.isfinite(energy) and np.isfinite(forces).all() and np.isfinite(stress).all()):
        raise InputError(
            f"{name}: its energy, forces or stress are not finite; leave it out of the labels"
        )
    return energy, forces, stress


def scores_from_residuals(
    energy: np.ndarray, forces: np.ndarray, stress: np.ndarray, settings: TrainingKeys | None = None
) -> Scores:
    """Scores of residuals in eV/atom (n,), eV/A (N, 3) and GPa (n, 3, 3)."""
    chosen = settings or TrainingKeys()
    energy_loss, force_loss, stress_loss = (
        mean_loss(chosen.loss, residual) for residual in (energy, forces, stress)
    )
    loss = float(combine(energy_loss, force_loss, stress_loss, chosen))
    return Scores(_rms(energy), _rms(forces), _rms(stress), loss, len(energy))


def _rms(residual: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(residual, dtype=float)))) if np.size(residual) else 0.0


def score(
    potential: Any, labelled: Sequence[Atoms], settings: TrainingKeys | None = None
) -> Scores:
    """Scores of ``potential`` (anything ``as_evaluator`` takes) on labelled structures.

    ``settings`` gives ``loss``, ``force_loss_ratio``, ``stress_loss_ratio`` (default: Huber, 1,
    0.1). Raises InputError when a label is missing.
    """
    return _scores_of(_residuals(potential, labelled), labelled, settings)


def scores_by(
    potential: Any,
    labelled: Sequence[Atoms],
    key: str = "kind",
    settings: TrainingKeys | None = None,
) -> dict[str, Scores]:
    """Scores per value of ``info[key]`` (structures without it: "other"), sorted by name; one
    evaluation of all."""
    residuals = _residuals(potential, labelled)
    kinds = [str(atoms.info.get(key, "other")) for atoms in labelled]
    found: dict[str, Scores] = {}
    for kind in sorted(set(kinds)):
        chosen = [index for index, other in enumerate(kinds) if other == kind]
        found[kind] = _scores_of(
            [residuals[index] for index in chosen], [labelled[index] for index in chosen], settings
        )
    return found


Residual = tuple[float, np.ndarray, np.ndarray]


def _scores_of(
    residuals: Sequence[Residual], labelled: Sequence[Atoms], settings: TrainingKeys | None
) -> Scores:
    found = scores_from_residuals(*_concatenate(residuals), settings)
    if not 0 < found.n < FEW:
        return found
    groups = np.unique(
        [str(atoms.info.get("family") or parent_of(atoms)) for atoms in labelled],
        return_inverse=True,
    )[1]
    errors = [
        rmse_error([np.ravel(residual[index]) for residual in residuals], groups)
        for index in range(3)
    ]
    return replace(
        found, energy_rmse_error=errors[0], force_rmse_error=errors[1], stress_rmse_error=errors[2]
    )


def rmse_error(residuals: Sequence[np.ndarray], groups: np.ndarray) -> float:
    """Standard error of the RMSE of ``residuals`` (one array per structure), of which those of one
    group share what is wrong with them.

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
            ev_per_a3_to_gpa(np.asarray(found.stress[i]) - stress),
        )
        for i, (energy, forces, stress) in enumerate(labels)
    ]


def _concatenate(residuals: Sequence[Residual]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if not residuals:
        return np.empty(0), np.empty((0, 3)), np.empty((0, 3, 3))
    energy, forces, stress = zip(*residuals, strict=True)
    return np.array(energy), np.concatenate(forces), np.stack(stress)
