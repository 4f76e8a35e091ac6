"""Per-species energy shift: the constants in which two DFT codes differ.

GPAW counts energies from spherical spin-paired atoms, VASP from its pseudo-atoms; a model of one code is off by a constant
per species on labels of the other. Fitting the constants first saves the training from learning them, and forgetting the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.batches import LabelledGraphs
from magus_anharmonic.potential.model import FactorisedM3GNet

logger = logging.getLogger(__name__)

RELATIVE_RANK = 1e-6
"""Directions of composition space with a smaller relative singular value are left as they are."""


def refit_shift(module: torch.nn.Module, labelled: Sequence[Atoms], *, batch_size: int = 8) -> dict[str, float]:
    """Add to ``module.normalizer.shift``, IN PLACE, the change that fits the energy residuals per atom best (least squares).

    The change is the one of minimum norm: a single composition fixes one combination of the shifts only, and leaves the
    others where they were. Returns symbol -> change in eV for the species in the labels. Pass a deep copy to keep the module.
    Raises InputError when there are no labels or one is missing.
    """
    if not labelled:
        raise InputError("no labels to refit the energy shift on")
    residual = _energy_residuals(module, labelled, batch_size)
    species = sorted({int(number) for atoms in labelled for number in atoms.numbers})
    fractions = np.array([[np.mean(atoms.numbers == number) for number in species] for atoms in labelled])
    change = np.linalg.lstsq(fractions, residual, rcond=RELATIVE_RANK)[0]
    normalizer: Any = module.normalizer
    shift = normalizer.shift
    with torch.no_grad():
        shift[species] += torch.as_tensor(change, dtype=shift.dtype, device=shift.device)
    found = {chemical_symbols[number]: float(value) for number, value in zip(species, change, strict=True)}
    left = residual - fractions @ change
    logger.info(
        "energy shift refitted on %d labels: %s; energy RMSE %.1f -> %.1f meV/atom",
        len(labelled),
        ", ".join(f"{symbol} {value:+.4f} eV" for symbol, value in found.items()),
        1e3 * float(np.sqrt(np.mean(residual**2))),
        1e3 * float(np.sqrt(np.mean(left**2))),
    )
    return found


def _energy_residuals(module: torch.nn.Module, labelled: Sequence[Atoms], batch_size: int) -> np.ndarray:
    """Label minus model, eV/atom (n,)."""
    model = FactorisedM3GNet(module)
    parts = []
    with torch.no_grad():
        for graph, targets in LabelledGraphs(labelled, module).batches(batch_size):
            parts.append((targets.energy - model.energy(graph, graph.vector) / targets.n_atoms).cpu().numpy())
    return np.concatenate(parts)
