"""Load a checkpoint, and ask once per model and process: is it evaluated here as by stock
MatterSim, alone and in a batch?

What could go wrong: another version of MatterSim with another architecture, a compiler or a BLAS
that computes wrong numbers, indices of a batch that are mixed up. None of these raises an error by
itself.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.energy_surface import FreeEnergySurface
from magus_anharmonic.errors import CheckpointError, InputError, MagusAnharmonicError, NotFinite
from magus_anharmonic.evaluator import Evaluation
from magus_anharmonic.potential import checkpoint, uncertainty
from magus_anharmonic.potential.evaluate import Potential
from magus_anharmonic.potential.resources import chosen_device
from magus_anharmonic.units import gpa_to_ev_per_a3

logger = logging.getLogger(__name__)

ENERGY, FORCES, STRESS = 1e-4, 1e-3, 1e-3
"""Tolerated: eV/atom, eV/A, eV/A^3; of the scale of the numbers where they are larger than 1. Ten
times what is usual."""

_checked: set[tuple[str, str, str]] = set()


def load(
    name_or_path: str | Path,
    device: str | None = None,
    *,
    dtype: str = "float32",
    edges_per_batch: int | None = None,
) -> Potential:
    """Load a checkpoint: a name MatterSim knows, one that this package ships, or a path.

    device
        ``cpu``, ``cuda``, ...; None takes cuda where there is one.
    dtype
        ``float32`` as MatterSim, or ``float64`` for finite differences.

    The first time that a process loads a model, it is compared with stock MatterSim
    (`check_against_stock`). Raises CheckpointError, InputError for a device that is not there, and
    MagusAnharmonicError when that comparison fails.
    """
    chosen = chosen_device(device)
    path = checkpoint.resolve(name_or_path)
    module, content = checkpoint.read(path, chosen)
    species = checkpoint.species_of(content)
    errors = uncertainty.error_model_of(content, module.model_args["units"])
    surface = surface_in(content, path)
    potential = Potential(
        module,
        path=path,
        species=species,
        device=chosen,
        dtype=dtype,
        edges_per_batch=edges_per_batch,
        error_model=errors,
    )
    check_once(potential)
    # not before: the check's own structures are far from anything
    potential.surface = surface
    return potential


def surface_in(content: Mapping[str, Any], path: Path | str) -> FreeEnergySurface | None:
    """What a checkpoint's dictionary says that it is a free energy of; None: a potential. Raises
    CheckpointError."""
    try:
        return FreeEnergySurface.of(content, f"checkpoint {path}")
    except InputError as error:
        raise CheckpointError(str(error)) from None


def check_once(potential: Potential) -> None:
    """`check_against_stock`, unless this process has done it for these weights, device and
    precision."""
    key = (potential.model_id, potential.device, str(potential.dtype))
    if key not in _checked:
        check_against_stock(potential)
        _checked.add(key)


def check_against_stock(potential: Potential) -> None:
    """Raise MagusAnharmonicError when a handful of tiny structures differ alone, in a batch, and
    with stock MatterSim.

    CheckpointError when their energies, forces or stresses are not even finite.
    """
    structures = probes(sorted(potential.species_seen or {1, 8, 14, 16}))
    try:
        together = potential.evaluate(structures)
    except NotFinite as error:
        where = potential.path or f"model {potential.model_id}"
        raise CheckpointError(
            f"checkpoint {where}: its weights give no numbers for ordinary structures ({error});"
            " take another copy"
        ) from None
    for index, atoms in enumerate(structures):
        _compare(
            potential, "alone", "in a batch", potential.evaluate([atoms]), together, index, atoms
        )
    for index, (atoms, stock) in enumerate(
        zip(structures, _stock(potential, structures), strict=True)
    ):
        _compare(potential, "with stock MatterSim", "here", stock, together, index, atoms)
    logger.debug(
        "model %s: %d structures agree alone, in a batch and with stock MatterSim",
        potential.model_id,
        len(structures),
    )


def probes(species: list[int]) -> list[Atoms]:
    """Five structures of 1 to 4 atoms without symmetry, of at most five of ``species``: dense,
    dilute, and two alike."""
    rng = np.random.default_rng(0)
    chosen = species[:: max(1, (len(species) + 4) // 5)]
    built = []
    for index, (count, volume) in enumerate(((1, 6.0), (2, 12.0), (3, 15.0), (4, 25.0), (4, 25.0))):
        numbers = [chosen[(index + k) % len(chosen)] for k in range(count)]
        edge = (count * volume) ** (1 / 3)
        cell = edge * (np.eye(3) + rng.uniform(-0.1, 0.1, (3, 3)))
        corners = np.array([[0, 0, 0], [0.5, 0.5, 0.1], [0.5, 0.0, 0.5], [0.0, 0.5, 0.6]])[:count]
        built.append(
            Atoms(
                numbers,
                scaled_positions=corners + rng.uniform(-0.05, 0.05, (count, 3)),
                cell=cell,
                pbc=True,
            )
        )
    built[-1].set_cell(built[-2].cell, scale_atoms=True)
    return built


def _stock(potential: Potential, structures: list[Atoms]) -> list[Evaluation]:
    """Stock MatterSim's results, one structure at a time: its batches have had wrong three-body
    indices."""
    from mattersim.datasets.utils.build import build_dataloader
    from mattersim.forcefield.potential import Potential as StockPotential

    stock = StockPotential(copy.deepcopy(potential.module).float(), device=potential.device)
    cutoffs = {
        "cutoff": potential.model.cutoff,
        "threebody_cutoff": potential.model.threebody_cutoff,
    }
    found = []
    for atoms in structures:
        loader = build_dataloader([atoms.copy()], batch_size=1, only_inference=True, **cutoffs)
        energy, forces, stress = stock.predict_properties(
            loader, include_forces=True, include_stresses=True
        )
        found.append(
            Evaluation(
                np.array(energy, dtype=float), [forces[0]], gpa_to_ev_per_a3(1.0) * np.array(stress)
            )
        )
    return found


def _compare(
    potential: Potential,
    one: str,
    other: str,
    single: Evaluation,
    batch: Evaluation,
    index: int,
    atoms: Atoms,
) -> None:
    pairs = (
        (
            "energy (eV/atom)",
            ENERGY,
            single.energy[0] / len(atoms),
            batch.energy[index] / len(atoms),
        ),
        ("force (eV/A)", FORCES, single.forces[0], batch.forces[index]),
        ("stress (eV/A^3)", STRESS, single.stress[0], batch.stress[index]),
    )
    for what, tolerance, first, second in pairs:
        difference = float(np.abs(np.subtract(first, second)).max())
        if not difference <= tolerance * max(1.0, float(np.abs(first).max())):
            raise MagusAnharmonicError(
                f"model {potential.model_id} ({potential.path}): the {what} of"
                f" {atoms.get_chemical_formula()} differs by {difference:.1e} {one} and {other} on"
                f" {potential.device}: this installation computes wrong numbers; stopped. Compare"
                " the versions of mattersim and torch with those of the README, and please report"
                " this"
            )
