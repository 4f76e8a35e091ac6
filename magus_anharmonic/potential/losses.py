"""The training loss of MatterSim: energy per atom, forces and stress, each by MSE or Huber's loss.

loss = L(E/N) + force_loss_ratio * L(F) + stress_loss_ratio * L(S), E in eV, F in eV/A, S in GPa (ASE's sign, all nine
components); as in ``Potential.loss_calc`` of mattersim 1.2.3.  Huber's delta of 0.01 is that of MatterSim's own finetuning script.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

HUBER_DELTA = 0.01
"""Residual (eV/atom, eV/A, GPa) above which Huber's loss grows linearly."""


class LossSettings(Protocol):
    """What the loss needs to know; ``LearningSettings`` and ``FinetuneSettings`` both have it."""

    @property
    def loss(self) -> str: ...

    @property
    def force_loss_ratio(self) -> float: ...

    @property
    def stress_loss_ratio(self) -> float: ...


def mean_loss(name: str, residual: np.ndarray) -> float:
    """Mean over all elements of the loss ``name`` ("mse" or "huber") of ``residual`` (any shape); 0 for no elements."""
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


def combine(energy: Any, forces: Any, stress: Any, settings: LossSettings) -> Any:
    """Weighted sum of the three mean losses (floats or tensors)."""
    return energy + forces * settings.force_loss_ratio + stress * settings.stress_loss_ratio
