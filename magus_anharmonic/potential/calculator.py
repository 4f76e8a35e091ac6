"""``MatterSim``: an ASE calculator on a MatterSim checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from magus_anharmonic.potential.guards import cell_volume

if TYPE_CHECKING:
    from magus_anharmonic.potential.evaluate import Potential


SETTINGS = ("checkpoint", "device", "dtype")


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError that names a keyword which ``MatterSim`` does not have: ignored, it would
    stand for the foundation model."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, SETTINGS, n=1) or ["checkpoint"]
            raise TypeError(
                f"MatterSim: unknown keyword {name}; did you mean {near[0]}? It takes"
                f" {', '.join(SETTINGS)}"
            )


class MatterSim(Calculator):
    """Energy (eV), free energy (the same), forces (eV/A) and stress (Voigt, eV/A^3) of a MatterSim
    checkpoint.

    `energy_error` is the expected error of that energy. There is no stress without a cell that has
    a volume. The checkpoint is loaded at the first calculation. Pickles and copies hold its name
    and settings, not the weights.

    checkpoint
        A name MatterSim knows, one that this package ships, or a path.
    device
        ``cpu``, ``cuda``, ...; None takes cuda where there is one.
    dtype
        ``float32`` or ``float64``.
    """

    # Not one of ``results``: ASE's Properties and SinglePointCalculator refuse names that they do
    # not know.
    _energy_error: float | None = None
    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self,
        checkpoint: str | Path = "mattersim-v1.0.0-1M",
        device: str | None = None,
        *,
        dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        check_names(kwargs, {"atoms", "directory", "label", "restart"})
        super().__init__(**kwargs)
        self.checkpoint, self.device, self.dtype = str(checkpoint), device, dtype
        self._potential: Potential | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SETTINGS and self.__dict__.get("_potential") is not None:
            self._potential = None
            self.reset()

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Change checkpoint, device or dtype, and forget what was computed; returns what changed.
        Raises TypeError for other names."""
        check_names(kwargs, SETTINGS)
        given = {
            name: str(value) if name == "checkpoint" else value for name, value in kwargs.items()
        }
        changed = {name: value for name, value in given.items() if value != getattr(self, name)}
        for name, value in changed.items():
            setattr(self, name, value)
        return changed

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """Checkpoint, device and dtype."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def potential(self) -> Potential:
        """The loaded model; raises CheckpointError."""
        if self._potential is None:
            from magus_anharmonic.potential import load

            self._potential = load(self.checkpoint, self.device, dtype=self.dtype)
        return self._potential

    @property
    def model_id(self) -> str:
        """Id of the weights; loads the checkpoint."""
        return self.potential.model_id

    @property
    def energy_error(self) -> float | None:
        """Expected error of the last energy against the DFT that the model learned, in eV per ATOM;
        None before, and without an estimate.

        See `magus_anharmonic.potential.uncertainty`.
        """
        return self._energy_error

    def reset(self) -> None:
        """ASE calls this when the structure has changed."""
        super().reset()
        self._energy_error = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_potential": None}

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes
    ) -> None:
        """ASE's entry point; all properties come from one evaluation."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        found = self.potential.evaluate([self.atoms])
        energy = float(found.energy[0])
        self.results = {"energy": energy, "free_energy": energy, "forces": found.forces[0]}
        if np.isfinite(cell_volume(self.atoms)):
            self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress[0])
        self._energy_error = found.error_of(0)
