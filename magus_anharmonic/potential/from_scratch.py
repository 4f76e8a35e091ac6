"""A new model: random weights, and an energy scale and shift fitted to labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from pydantic import Field

from magus_anharmonic.potential.labelled import labels_of
from magus_anharmonic.settings import Count, Positive, Section


class Architecture(Section):
    """Shape of a MatterSim (M3GNet) model; the defaults make a small one (162 k parameters).
    MatterSim-v1.0.0-1M: 3 blocks of 128 units."""

    num_blocks: Count = Field(2, description="message-passing blocks")
    units: Count = Field(64, description="width of atom and edge features")
    cutoff: Positive = Field(5.0, description="Angstrom, of the edges")
    threebody_cutoff: Positive = Field(
        4.0, description="Angstrom, of the bonds that make angles; at most the cutoff"
    )


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
