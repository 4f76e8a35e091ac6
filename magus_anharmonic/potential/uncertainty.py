"""How far a model's energies and forces are expected to be from the DFT that it learned, structure
by structure.

The variance of a linear readout fitted to features v of the training atoms (last-layer prediction
rigidity, Bigi, Chong, Ceriotti and Grasselli, doi:10.1088/2632-2153/ad805f):

    C = sum over the training atoms of v v^T,   sigma^2(v) = alpha^2 v^T (C + ridge)^-1 v

with v the atom features after the last block, which MatterSim's readout takes in; the readout is
treated as if it were linear. The energy per atom of a structure has v = the mean over its atoms;
the error of its forces (root mean square over components) takes the mean over atoms of sigma^2,
because forces are local. alpha is one number each, such that the squared errors of the validation
labels are on average those predicted; what labels of a free energy are wrong by themselves does not
count.

What the estimate means: the model against its DFT, for structures drawn like the validation labels.
It knows nothing of the error of DFT, of errors that all training labels share, or of effects beyond
the cutoff. Far from the training data it says "far", not by how many eV.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from ase import Atoms
from scipy.optimize import minimize_scalar
from torch import Tensor

from magus_anharmonic.energy_surface import FORCE_ERROR, LABEL_ERROR
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.labelled import LabelledGraphs
from magus_anharmonic.potential.m3gnet import FactorisedM3GNet
from magus_anharmonic.units import ev_to_mev

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "error_model"
RIDGE = 1e-6
"""Of the largest eigenvalue of C; directions in which the training atoms do not vary at all stay
finite."""
USUAL = 0.95
"""Part of the known structures whose estimates count as usual."""
BATCH = 8


@dataclass(frozen=True)
class Uncertainty:
    """Expected errors of n structures: vectors (n, u) eV/atom, see `ErrorModel.vectors`;
    force_error (n,) eV/A, rms over components."""

    vectors: np.ndarray
    force_error: np.ndarray

    @property
    def energy_error(self) -> np.ndarray:
        """(n,) eV/atom."""
        return np.linalg.norm(self.vectors, axis=1)


@dataclass(frozen=True)
class ErrorModel:
    """The estimate that belongs to one set of weights.

    whitening : (u, u), with sigma = alpha |whitening v|; energy_scale (eV/atom), force_scale (eV/A)
    : the two alphas; usual_energy_error, usual_force_error : what 95 % of the training and
    validation structures stay below; calibrated_on : "validation" or "training"; n_training,
    n_calibration : structures.
    """

    whitening: Tensor
    energy_scale: float
    force_scale: float
    usual_energy_error: float
    usual_force_error: float
    calibrated_on: str
    n_training: int
    n_calibration: int

    def predict(self, features: Tensor, graph: Graph) -> Uncertainty:
        """Errors of the structures of ``graph`` from the features (N, u) of its atoms."""
        means, force = _whitened(self.whitening.to(features.device), features, graph)
        return Uncertainty(self.energy_scale * means, self.force_scale * force)

    def vectors(self, features: np.ndarray) -> np.ndarray:
        """Error vectors (n, u) in eV/atom of structures with mean ``features`` (n, u).

        The covariance of the energy errors of two structures is the product of their vectors,
        alpha^2 v^T (C + ridge)^-1 v', so that the error of an average is the length of the average
        vector and that of a difference the length of the difference.
        """
        return (
            self.energy_scale
            * np.asarray(features, dtype=float)
            @ self.whitening.double().cpu().numpy().T
        )

    def spread(self, features: np.ndarray, group_size: int = 1) -> float:
        """Expected standard deviation (eV/atom) of the energy error among structures with mean
        ``features`` (n, u).

        Means over each ``together`` of them, next to each other, are compared (2: pairs +u/-u). An
        error that all share does not count, and errors that cancel within a pair do not either.
        Raises ValueError for fewer than two means.
        """
        means = self.vectors(features).reshape(-1, group_size, features.shape[1]).mean(axis=1)
        if len(means) < 2:
            raise ValueError(
                "the spread of the error needs at least two structures, or groups of structures"
            )
        return float(np.sqrt(np.square(means - means.mean(axis=0)).sum() / (len(means) - 1)))

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers and one float32 tensor on the CPU."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "whitening": self.whitening.detach().cpu().float()}

    def __str__(self) -> str:
        where = f"calibrated on {self.n_calibration} {self.calibrated_on} labels"
        return (
            f"expected errors up to {ev_to_mev(self.usual_energy_error):.1f} meV/atom and"
            f" {self.usual_force_error:.3f} eV/A ({where})"
        )


def for_checkpoint(errors: ErrorModel | None) -> dict[str, Any]:
    """Further keys of `checkpoint.save` that keep the estimate with the weights; empty without
    one."""
    return {} if errors is None else {CHECKPOINT_KEY: errors.as_dict()}


def error_model_of(content: Mapping[str, Any], units: int) -> ErrorModel | None:
    """The estimate stored in a checkpoint's dictionary; None when it has none (MatterSim's own).

    One that does not fit or holds wrong numbers is left out with a warning and does not stop
    anything: energies and forces do not depend on it, and whatever uses it can do without.
    """
    stored = content.get(CHECKPOINT_KEY)
    if stored is None:
        return None
    try:
        found = ErrorModel(**stored)
        usable = (
            found.whitening.shape == (units, units)
            and bool(found.whitening.isfinite().all())
            and _sensible(found)
        )
    except (TypeError, AttributeError):
        usable = False
    if not usable:
        logger.warning(
            "the error estimate in the checkpoint is not readable or holds wrong numbers: the model"
            " is used without one"
        )
        return None
    return found


def _sensible(model: ErrorModel) -> bool:
    """Whether all numbers are such, finite and not negative."""
    numbers = (
        getattr(model, item.name)
        for item in fields(model)
        if item.name not in ("whitening", "calibrated_on")
    )
    real = all(type(value) in (int, float) and 0 <= value < float("inf") for value in numbers)
    return real and isinstance(model.calibrated_on, str)


def fit(
    module: torch.nn.Module, train: Sequence[Atoms], validation: Sequence[Atoms] = ()
) -> ErrorModel | None:
    """The estimate for the weights of ``module`` from its labelled training and validation
    structures.

    Costs one forward pass over ``train`` and one evaluation of ``validation``; without validation
    structures the training set calibrates, which makes the errors too small, and a warning says so.
    None (with a warning) when the model's numbers on the labels are not finite. Raises InputError
    when a label is missing.
    """
    model = FactorisedM3GNet(module)
    known, labels = LabelledGraphs(train, module), LabelledGraphs(validation or train, module)
    if not validation:
        logger.warning(
            "no validation labels: the error estimate is calibrated on the training set, and too"
            " small"
        )
    features = [(graph, model.atom_features(graph)) for graph, _ in known.batches(BATCH)]
    whitening = _whitening(value for _, value in features)
    parts = [
        _errors_and_distances(model, whitening, graph, targets)
        for graph, targets in labels.batches(BATCH)
    ]
    energy, forces, energy_distance, force_distance = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    noise, force_noise = _noise(validation or train)
    scales = (
        error_scale(energy, energy_distance, noise),
        error_scale(forces, force_distance, force_noise),
    )
    inside = [_whitened(whitening, value, graph) for graph, value in features]
    usual = [
        np.quantile(np.concatenate(distances), USUAL)
        for distances in (
            [*(np.linalg.norm(means, axis=1) for means, _ in inside), energy_distance],
            [*(local for _, local in inside), force_distance],
        )
    ]
    numbers = np.array(
        [*scales, *(scale * value for scale, value in zip(scales, usual, strict=True))]
    )
    if not (np.isfinite(numbers).all() and bool(whitening.isfinite().all())):
        logger.warning(
            "no error estimate: the model's energies or forces of its labels are not finite"
        )
        return None
    on = "validation" if validation else "training"
    return ErrorModel(whitening.float(), *numbers.tolist(), on, len(train), len(labels))


def mean_features(model: FactorisedM3GNet, graph: Graph) -> np.ndarray:
    """(n, u): the features of each structure of ``graph``, means over its atoms."""
    return _means(model.atom_features(graph).double(), graph).cpu().numpy()


def _whitening(parts: Iterable[Tensor]) -> Tensor:
    """A (u, u) with A^T A = (C + ridge)^-1, float64."""
    covariance: Any = 0.0
    for features in parts:
        covariance = covariance + features.double().T @ features.double()
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0.0) + RIDGE * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    return vectors.T / values.sqrt()[:, None]


def _means(values: Tensor, graph: Graph) -> Tensor:
    total = values.new_zeros(len(graph.n_atoms), *values.shape[1:]).index_add(
        0, graph.structure, values
    )
    counts = torch.as_tensor(graph.n_atoms, dtype=values.dtype, device=values.device)
    return total / counts.view(-1, *[1] * (values.dim() - 1))


def _whitened(whitening: Tensor, features: Tensor, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """(n, u) A mean(v) and (n,) root mean square over the atoms of |A v|."""
    white = features.double() @ whitening.double().T
    local = _means(white.square().sum(dim=1), graph).sqrt()
    return _means(white, graph).cpu().numpy(), local.cpu().numpy()


def _errors_and_distances(
    model: FactorisedM3GNet, whitening: Tensor, graph: Graph, targets: Any
) -> tuple[np.ndarray, ...]:
    """(n,) error of the energy per atom, (n,) root mean square error of the forces, and both
    distances."""
    energy, forces, _, features = model.evaluate(graph)
    difference = (energy / targets.n_atoms - targets.energy).cpu().numpy()
    square = (
        _means((forces - targets.forces).double().square().mean(dim=1), graph).sqrt().cpu().numpy()
    )
    means, local = _whitened(whitening, features, graph)
    return difference, square, np.linalg.norm(means, axis=1), local


def _noise(labels: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) standard errors of the labels themselves: of the energy per atom (eV) and of the forces
    (eV/A, root mean square over components); zero where they have none."""
    energy = [atoms.info.get(LABEL_ERROR, 0.0) / len(atoms) for atoms in labels]
    return np.array(energy), np.array([atoms.info.get(FORCE_ERROR, 0.0) for atoms in labels])


def error_scale(errors: np.ndarray, distances: np.ndarray, noise: np.ndarray) -> float:
    """alpha of greatest likelihood for Gaussian errors of variance (alpha distance)^2 + noise^2.

    Where noise alone explains the errors, what it would hide: one standard error of alpha^2 by the
    Fisher information at zero, (sum over labels of (distance / noise)^4 / 2)^(-1/2).
    """
    distances = np.maximum(distances, 1e-12)
    largest = float(np.sqrt(np.mean((errors / distances) ** 2)))
    if not noise.any() or not largest > 0.0:
        return largest
    parts = distances / np.maximum(noise, 1e-12)
    smallest = float(np.sum(parts**4) / 2) ** -0.25
    if smallest >= largest:
        return largest

    def minus_likelihood(log_alpha: float) -> float:
        variance = (np.exp(log_alpha) * distances) ** 2 + noise**2
        return float(np.sum(np.log(variance) + errors**2 / variance))

    found = minimize_scalar(
        minus_likelihood, bounds=(np.log(smallest), np.log(largest)), method="bounded"
    )
    return float(np.exp(found.x))
