"""The inner part of training: a new model, one epoch after the other, and the state that a killed
training goes on from.

A new model has random weights, and an energy scale and shift fitted to the labels. The file
``<out>.state`` holds all that a training under way needs to go on after an epoch, used whole or not
at all.
"""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch_ema import ExponentialMovingAverage

from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.io.files import readable, unsealed
from magus_anharmonic.potential.checkpoint import write_torch
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.labelled import (
    LabelledGraphs,
    Scores,
    Targets,
    combine,
    labels_of,
    scores_from_residuals,
    torch_loss,
)
from magus_anharmonic.potential.m3gnet import FactorisedM3GNet
from magus_anharmonic.settings import Architecture, FinetuneSettings
from magus_anharmonic.units import ev_per_a3_to_gpa, ev_to_mev

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """One line of the history; ``epoch`` 0 is the model before training, and has no
    ``train_loss``."""

    epoch: int
    learning_rate: float
    train_loss: float | None
    validation: Scores
    seconds: float

    @classmethod
    def of(cls, data: dict[str, Any]) -> Epoch:
        """Inverse of ``asdict``."""
        return cls(**{**data, "validation": Scores(**data["validation"])})


@dataclass(frozen=True)
class TrainingState:
    """``key`` names the inputs; ``trainer`` is `Trainer.state`, ``best_state`` the weights of
    ``best_epoch``."""

    key: str
    trainer: dict[str, Any]
    best_epoch: int
    best_state: dict[str, torch.Tensor]
    history: list[Epoch]


def write_state(path: Path, state: TrainingState) -> None:
    """Whole or not at all; raises OSError where the disk is full."""
    history = [asdict(epoch) for epoch in state.history]
    write_torch(path, {**vars(state), "history": history}, sealed=True)


def read_state(path: Path, trainer: Trainer, key: str) -> TrainingState | None:
    """The state in a file, which ``trainer`` can surely restore; None when it belongs to other
    inputs than ``key``.

    Raises DamagedFile when it is not readable, not what `write_state` wrote, or does not fit
    ``trainer``, which is never changed; disk and memory errors as they are.
    """
    with readable(path, "the state of a training"):
        # torch loads half a state, or one with changed bits, without an error
        content = unsealed(path)
        if len(content) == path.stat().st_size:
            raise DamagedFile(f"{path}: its seal is gone")
        device = next(trainer.module.parameters()).device
        found = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if found["key"] != key:
            return None
        state = TrainingState(**found | {"history": [Epoch.of(one) for one in found["history"]]})
        rehearsal = Trainer(copy.deepcopy(trainer.module), trainer.settings)
        rehearsal.restore(copy.deepcopy(state.trainer))
    return state


GRADIENT_NORM = 1.0

ADAM_EPSILON = 1e-7


class Trainer:
    """Optimiser, schedule and averaged weights around the parameters of one stock M3GNet ``module``
    (changed in place).

    Scale and shift of the energy are buffers in MatterSim and stay as they are, unless the module
    holds them as parameters.
    """

    def __init__(self, module: torch.nn.Module, settings: FinetuneSettings) -> None:
        self.settings = settings
        self.module = module
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.model = FactorisedM3GNet(module)
        self.loss = torch_loss(settings.loss)
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.learning_rate, eps=ADAM_EPSILON
        )
        if settings.schedule == "cosine":
            self.scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=settings.epochs, eta_min=0.01 * settings.learning_rate
            )
        else:
            self.scheduler = torch.optim.lr_scheduler.StepLR(
                self.optimizer, step_size=10, gamma=0.95
            )
        self.ema = ExponentialMovingAverage(self.parameters, decay=settings.ema_decay)

    def step(self, graph: Graph, targets: Targets) -> float:
        """One optimiser step; returns the loss before it (NaN or infinite: the weights are left as
        they were)."""
        energy, forces, stress = self.model(graph, create_graph=True)
        loss = combine(
            self.loss(energy / targets.n_atoms, targets.energy),
            self.loss(forces, targets.forces),
            self.loss(ev_per_a3_to_gpa(stress), targets.stress),
            self.settings,
        )
        value = float(loss.detach())
        if not np.isfinite(value):
            return value
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.ema.update()
        return value

    def scores(self, data: LabelledGraphs, batch_size: int = 8) -> Scores:
        """Scores of the current (not the averaged) weights on ``data``."""
        parts: tuple[list[np.ndarray], ...] = ([], [], [])
        for graph, targets in data.batches(batch_size):
            energy, forces, stress = self.model(graph)
            residuals = (
                energy / targets.n_atoms - targets.energy,
                forces - targets.forces,
                ev_per_a3_to_gpa(stress) - targets.stress,
            )
            for part, residual in zip(parts, residuals, strict=True):
                part.append(residual.detach().cpu().double().numpy())
        energies, force_parts, stresses = (np.concatenate(part) for part in parts)
        return scores_from_residuals(energies, force_parts, stresses, self.settings)

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """Copy of the module's state with the averaged weights."""
        with self.ema.average_parameters():
            return copy_state(self.module)

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors and plain containers."""
        return {
            part: getattr(self, part).state_dict()
            for part in ("module", "optimizer", "scheduler", "ema")
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        for part, content in state.items():
            getattr(self, part).load_state_dict(content)


def copy_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy of all parameters and buffers, detached from the module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def from_scratch(
    labelled: Sequence[Atoms],
    architecture: Architecture | None = None,
    *,
    seed: int,
    device: str = "cpu",
) -> torch.nn.Module:
    """MatterSim's ``M3Gnet`` with weights drawn from ``seed`` and `fit_scaling` of the labels; the
    global generator is left alone.

    Raises InputError when a label is missing.
    """
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    architecture = architecture or Architecture()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = M3Gnet(device="cpu", **architecture.model_dump())
    normalizer: Any = module.normalizer
    scale, shift = fit_scaling(labelled, len(normalizer.scale))
    normalizer.scale.copy_(torch.as_tensor(scale, dtype=normalizer.scale.dtype))
    normalizer.shift.copy_(torch.as_tensor(shift, dtype=normalizer.shift.dtype))
    return module.to(device).eval()


def fit_scaling(labelled: Sequence[Atoms], size: int = 95) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (eV, by atomic number) as ``AtomScaling`` of mattersim 1.2.3 fits them.

    shift : least squares of the total energies on the composition
    ("per_species_energy_mean_linear_reg"), the one of minimum norm where compositions leave it
    open. scale : mean over components of the mean square force of a species
    ("per_species_forces_rms"; MatterSim takes no root).
    """
    labels = [labels_of(atoms) for atoms in labelled]
    counts = np.array(
        [np.bincount(atoms.numbers, minlength=size) for atoms in labelled], dtype=float
    )
    shift = np.linalg.lstsq(counts, np.array([energy for energy, _, _ in labels]), rcond=1e-8)[0]
    numbers = np.concatenate([atoms.numbers for atoms in labelled])
    square = np.concatenate([(forces**2).mean(axis=1) for _, forces, _ in labels])
    total = np.bincount(numbers, weights=square, minlength=size)
    return total / np.maximum(np.bincount(numbers, minlength=size), 1), shift


RELATIVE_RANK = 1e-6
"""Of `refit_shift`: directions of composition space with a smaller relative singular value are left
as they are."""


def refit_shift(
    module: torch.nn.Module, labelled: Sequence[Atoms], batch_size: int = 8
) -> dict[str, float]:
    """Add to ``module.normalizer.shift``, IN PLACE, the change that fits the energy residuals per
    atom best (least squares).

    They are the constants in which two DFT codes differ (GPAW counts energies from spherical
    spin-paired atoms, VASP from its pseudo-atoms); fitting them first saves the training from
    learning them, and forgetting the rest. The change is the one of minimum norm: a single
    composition fixes one combination of the shifts only, and leaves the others where they were.
    Returns symbol -> change in eV for the species in the labels. Pass a deep copy to keep the
    module. Raises InputError when there are no labels or one is missing.
    """
    if not labelled:
        raise InputError("no labels to refit the energy shift on")
    model, parts = FactorisedM3GNet(module), []
    with torch.no_grad():
        for graph, targets in LabelledGraphs(labelled, module).batches(batch_size):
            energy = model.energy(graph, graph.vector) / targets.n_atoms
            parts.append((targets.energy - energy).cpu().numpy())
    residual = np.concatenate(parts)
    species = sorted({int(number) for atoms in labelled for number in atoms.numbers})
    fractions = np.array(
        [[np.mean(atoms.numbers == number) for number in species] for atoms in labelled]
    )
    change = np.linalg.lstsq(fractions, residual, rcond=RELATIVE_RANK)[0]
    normalizer: Any = module.normalizer
    shift = normalizer.shift
    with torch.no_grad():
        shift[species] += torch.as_tensor(change, dtype=shift.dtype, device=shift.device)
    found = {
        chemical_symbols[number]: float(value)
        for number, value in zip(species, change, strict=True)
    }
    left = residual - fractions @ change
    logger.info(
        "energy shift refitted on %d labels: %s; energy RMSE %.1f -> %.1f meV/atom",
        len(labelled),
        ", ".join(f"{symbol} {value:+.4f} eV" for symbol, value in found.items()),
        ev_to_mev(float(np.sqrt(np.mean(residual**2)))),
        ev_to_mev(float(np.sqrt(np.mean(left**2)))),
    )
    return found
