"""One optimiser step after the other: the inner part of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch_ema import ExponentialMovingAverage

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.batches import LabelledGraphs, Targets
from magus_anharmonic.potential.graph import Graph
from magus_anharmonic.potential.losses import combine, torch_loss
from magus_anharmonic.potential.model import FactorisedM3GNet
from magus_anharmonic.potential.score import Scores, scores_from_residuals
from magus_anharmonic.settings import Count, Loss, NonNegative, Positive, Schedule, Section, parse
from magus_anharmonic.units import EV_PER_A3_IN_GPA

GRADIENT_NORM = 1.0
ADAM_EPSILON = 1e-7


class FinetuneSettings(Section):
    """One training stage."""

    epochs: Count = Field(50, description="passes through the training set")
    learning_rate: Positive = Field(2.0e-4, lt=1.0, description="of Adam, at the start")
    batch_size: Count = Field(8, description="structures per step")
    loss: Loss = "huber"
    force_loss_ratio: NonNegative = Field(1.0, description="weight of the force loss (eV/A)")
    stress_loss_ratio: NonNegative = Field(0.1, description="weight of the stress loss (GPa)")
    schedule: Schedule = "step"
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="of the averaged weights that are validated and kept")
    keep: Literal["best", "last"] = Field(
        "best", description="best: the lowest validation loss, the start included; last: the averaged weights at the end, whatever they are"
    )
    patience: Count | None = Field(None, description="stop after so many epochs without improvement; left out: never")

    @classmethod
    def of(cls, settings: Any) -> FinetuneSettings:
        """From a mapping, or any object with some of the attributes, such as ``LearningSettings``; the rest are defaults.

        Raises InputError for an unknown key, a wrong value, and an object that has none of the attributes.
        """
        if isinstance(settings, cls):
            return settings
        if isinstance(settings, Mapping):
            return parse(cls, dict(settings), "settings")
        found = {name: getattr(settings, name) for name in cls.model_fields if hasattr(settings, name)}
        if not found:
            raise InputError(f"settings: {settings!r} has none of {', '.join(cls.model_fields)}; FinetuneSettings() are the defaults")
        return parse(cls, found, "settings")


class Trainer:
    """Optimiser, schedule and averaged weights around the parameters of one stock M3GNet ``module`` (changed in place).

    Scale and shift of the energy are buffers in MatterSim and stay as they are, unless the module holds them as parameters.
    """

    def __init__(self, module: torch.nn.Module, settings: FinetuneSettings) -> None:
        self.settings = settings
        self.module = module
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.model = FactorisedM3GNet(module)
        self.loss = torch_loss(settings.loss)
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate, eps=ADAM_EPSILON)
        if settings.schedule == "cosine":
            self.scheduler: Any = torch.optim.lr_scheduler.CosineAnnealingLR(
                self.optimizer, T_max=settings.epochs, eta_min=0.01 * settings.learning_rate
            )
        else:
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=10, gamma=0.95)
        self.ema = ExponentialMovingAverage(self.parameters, decay=settings.ema_decay)

    def step(self, graph: Graph, targets: Targets) -> float:
        """One optimiser step; returns the loss before it (NaN or infinite: the weights are left as they were)."""
        energy, forces, stress = self.model(graph, create_graph=True)
        loss = combine(
            self.loss(energy / targets.n_atoms, targets.energy),
            self.loss(forces, targets.forces),
            self.loss(stress * EV_PER_A3_IN_GPA, targets.stress),
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
            residuals = (energy / targets.n_atoms - targets.energy, forces - targets.forces, stress * EV_PER_A3_IN_GPA - targets.stress)
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
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.ema.load_state_dict(state["ema"])


def copy_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy of all parameters and buffers, detached from the module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
