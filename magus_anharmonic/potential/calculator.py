"""The potential as an ASE calculator and as a TorchSim model.

``MatterSim``: an ASE calculator on a MatterSim checkpoint.

A `Potential` as a model of TorchSim, for whoever wants its integrators and optimisers.

TorchSim: O. Cohen et al., doi:10.1088/3050-287X/ae1799. It is optional; nothing else in this package needs it.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from magus_anharmonic.errors import InputError
from magus_anharmonic.potential.graph import cell_volume

if TYPE_CHECKING:
    from magus_anharmonic.potential.evaluate import Potential


SETTINGS = ("checkpoint", "device", "dtype")


def check_names(given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError that names a keyword which ``MatterSim`` does not have: ignored, it would stand for the foundation model."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, SETTINGS, n=1) or ["checkpoint"]
            raise TypeError(f"MatterSim: unknown keyword {name}; did you mean {near[0]}? It takes {', '.join(SETTINGS)}")


class MatterSim(Calculator):
    """Energy (eV), free energy (the same), forces (eV/A) and stress (Voigt, eV/A^3) of a MatterSim checkpoint.

    `energy_error` is the expected error of that energy. There is no stress without a cell that has a volume.
    The checkpoint is loaded at the first calculation. Pickles and copies hold its name and settings, not the weights.

    checkpoint
        A name MatterSim knows, one that this package ships, or a path.
    device
        ``cpu``, ``cuda``, ...; None takes cuda where there is one.
    dtype
        ``float32`` or ``float64``.
    """

    # Not one of ``results``: ASE's Properties and SinglePointCalculator refuse names that they do not know.
    _energy_error: float | None = None
    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self, checkpoint: str | Path = "mattersim-v1.0.0-1M", device: str | None = None, *, dtype: str = "float32", **kwargs: Any
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
        """Change checkpoint, device or dtype, and forget what was computed; returns what changed. Raises TypeError for other names."""
        check_names(kwargs, SETTINGS)
        given = {name: str(value) if name == "checkpoint" else value for name, value in kwargs.items()}
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
        """Expected error of the last energy against the DFT that the model learned, in eV per ATOM; None before, and without an estimate.

        See `magus_anharmonic.potential.uncertainty`.
        """
        return self._energy_error

    def reset(self) -> None:
        """ASE calls this when the structure has changed."""
        super().reset()
        self._energy_error = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_potential": None}

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """ASE's entry point; all properties come from one evaluation."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        found = self.potential.evaluate([self.atoms])
        energy = float(found.energy[0])
        self.results = {"energy": energy, "free_energy": energy, "forces": found.forces[0]}
        if np.isfinite(cell_volume(self.atoms)):
            self.results["stress"] = full_3x3_to_voigt_6_stress(found.stress[0])
        self._energy_error = found.error_of(0)


def torchsim_model(potential: Potential, dtype: torch.dtype = torch.float64) -> Any:
    """A TorchSim ``ModelInterface`` (0.3 to 0.6) that evaluates with ``potential``.

    Energies in eV, forces in eV/A, stress in eV/A^3 in ASE's sign, as TorchSim has them. ``dtype`` is that of TorchSim's states, not
    of the network: positions and cells are not rounded to the network's float32. Nothing can be differentiated through the result.
    Raises InputError when TorchSim is not installed.
    """
    return _model_class()(potential, dtype)


@functools.cache
def _model_class() -> type[Any]:
    try:
        from torch_sim.models.interface import ModelInterface
    except ImportError as error:
        raise InputError(f"TorchSim cannot be imported ({error}): pip install 'magus-anharmonic[torchsim]'") from error

    class TorchSimModel(ModelInterface):  # type: ignore[misc]
        def __init__(self, potential: Potential, dtype: torch.dtype) -> None:
            super().__init__()
            self.potential = potential
            self._device, self._dtype = torch.device(potential.device), dtype
            self._compute_stress = self._compute_forces = True
            self._memory_scales_with = "n_atoms_x_density"
            self.implemented_properties = ["energy", "forces", "stress"]

        def forward(self, state: Any, **_: Any) -> dict[str, torch.Tensor]:
            found = self.potential.evaluate(structures(state))
            arrays = {"energy": found.energy, "forces": np.concatenate(found.forces), "stress": found.stress}
            return {name: torch.as_tensor(array, dtype=self._dtype, device=self._device) for name, array in arrays.items()}

    return TorchSimModel


def structures(state: Any) -> list[Atoms]:
    """The systems of a TorchSim state (or a dictionary of its fields), which keeps cell vectors as columns."""

    def array(name: str) -> np.ndarray:
        value = state.get(name) if isinstance(state, dict) else getattr(state, name)
        return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)

    numbers, positions = array("atomic_numbers"), array("positions")
    system = array("system_idx") if array("system_idx").ndim else np.zeros(len(numbers), dtype=int)
    cells = array("cell").reshape(-1, 3, 3)
    pbc = np.broadcast_to(array("pbc"), 3)
    return [
        Atoms(numbers=numbers[system == index], positions=positions[system == index], cell=cell.T, pbc=pbc)
        for index, cell in enumerate(cells)
    ]
