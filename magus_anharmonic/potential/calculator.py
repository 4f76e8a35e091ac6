"""Faces of a MatterSim checkpoint for others' programs: ``MatterSim``, an ASE calculator, and
`torchsim_model`."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from magus_anharmonic.errors import CheckpointError, InputError, MagusAnharmonicError
from magus_anharmonic.potential.guards import cell_volume

if TYPE_CHECKING:
    from magus_anharmonic.potential.evaluate import Potential

SETTINGS = ("checkpoint", "device", "dtype", "compute_stress", "stress_weight")
OF_TRAINING = ("args_dict", "load_training_state", "model_name")
"""Words of stock MatterSim that change no number of a calculator; taken and not used."""
ENERGY_SUM = 1e-4
"""eV/atom; by so much the energies of the atoms may differ from that of the structure."""


def _refuse_unknown(given: Iterable[str], *known: str) -> None:
    """Raise TypeError: ignored, a misspelt keyword would stand for the foundation model."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or ["checkpoint"]
            raise TypeError(
                f"MatterSim: unknown keyword {name}; did you mean {near[0]}? It takes"
                f" {', '.join(known)}"
            )


class MatterSim(Calculator):
    """Energy (eV), free energy (the same), energies of the atoms (eV), forces (eV/A) and stress
    (Voigt, eV/A^3) of a MatterSim checkpoint.

    `energy_error` is the expected error of that energy. There is no stress without a cell that has
    a volume. The checkpoint is loaded at the first calculation. Pickles and copies hold its name
    and settings, not the weights.

    checkpoint
        A name MatterSim knows, one that this package ships, or a path; ``load_path`` is stock
        MatterSim's word for it. Or ``potential``, what `magus_anharmonic.load` returns.
    device
        ``cpu``, ``cuda``, ...; None takes cuda where there is one.
    dtype
        ``float32`` or ``float64``.
    model_id
        Of the weights, as `todict` tells it: another model in the file raises CheckpointError.
    compute_stress, stress_weight
        As in stock MatterSim: whether there is a stress, and by what one of 1 GPa is multiplied.
    """

    # Not one of ``results``: ASE's Properties and SinglePointCalculator refuse names that they do
    # not know.
    _energy_error: float | None = None
    implemented_properties: ClassVar[list[str]] = [
        "energy", "free_energy", "energies", "forces", "stress",
    ]  # fmt: skip

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        device: str | None = None,
        *,
        dtype: str = "float32",
        load_path: str | Path | None = None,
        potential: Potential | None = None,
        model_id: str | None = None,
        compute_stress: bool = True,
        stress_weight: float = units.GPa,
        **kwargs: Any,
    ) -> None:
        of_ase = ("atoms", "directory", "label", "restart")
        _refuse_unknown(
            kwargs, *SETTINGS, "load_path", "potential", "model_id", *OF_TRAINING, *of_ase
        )
        super().__init__(**{name: kwargs[name] for name in of_ase if name in kwargs})
        self._potential: Potential | None = None
        if potential is not None:
            if getattr(potential, "path", None) is None:
                raise TypeError("MatterSim: potential is no model that load() has read from a file")
            load_path, device = potential.path, potential.device
            dtype = str(potential.dtype).removeprefix("torch.")
        if None not in (checkpoint, load_path):
            raise TypeError("MatterSim: give one of checkpoint, load_path and potential")
        self.checkpoint = str(checkpoint or load_path or "mattersim-v1.0.0-1M")
        self.device, self.dtype = device, dtype
        self.compute_stress, self.stress_weight = compute_stress, stress_weight
        self._wanted, self._potential = model_id, potential

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in SETTINGS and self.__dict__.get("_potential") is not None:
            self._potential = self._wanted = None
            self.reset()

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Change settings, and forget what was computed; returns what changed. Raises TypeError for
        other names."""
        _refuse_unknown(kwargs, *SETTINGS, "load_path")
        if "load_path" in kwargs:
            kwargs["checkpoint"] = kwargs.pop("load_path")
        given = {
            name: str(value) if name == "checkpoint" else value for name, value in kwargs.items()
        }
        changed = {name: value for name, value in given.items() if value != getattr(self, name)}
        for name, value in changed.items():
            setattr(self, name, value)
        return changed

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """Settings, and the id of the weights; loads the checkpoint."""
        return {name: getattr(self, name) for name in SETTINGS} | {"model_id": self.model_id}

    @property
    def potential(self) -> Potential:
        """The loaded model; raises CheckpointError."""
        if self._potential is None:
            from magus_anharmonic.potential import load

            found = load(self.checkpoint, self.device, dtype=self.dtype)
            if self._wanted not in (None, found.model_id):
                raise CheckpointError(
                    f"checkpoint {self.checkpoint} holds model {found.model_id}, not {self._wanted}"
                )
            self._potential = found
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
        """ASE's entry point; all properties but the energies of the atoms come from one evaluation.

        Raises MagusAnharmonicError where those do not add up to the energy.
        """
        super().calculate(atoms, properties or ["energy"], system_changes)
        found = self.potential.evaluate([self.atoms])
        energy = float(found.energy[0])
        self.results = {"energy": energy, "free_energy": energy, "forces": found.forces[0]}
        if self.compute_stress and np.isfinite(cell_volume(self.atoms)):
            scale = self.stress_weight / units.GPa
            self.results["stress"] = scale * full_3x3_to_voigt_6_stress(found.stress[0])
        if "energies" in (properties or ()):
            (energies,) = self.potential.atomic_energies([self.atoms])
            if not abs(energies.sum() - energy) <= ENERGY_SUM * len(energies):
                raise MagusAnharmonicError(
                    f"model {self.model_id}: the energies of the atoms add up to"
                    f" {energies.sum():.6g} eV, and that of the structure is {energy:.6g} eV"
                )
            self.results["energies"] = energies
        self._energy_error = found.error_of(0)


def torchsim_model(potential: Potential, dtype: Any = None) -> Any:
    """A TorchSim ``ModelInterface`` (0.3 to 0.6) that evaluates with ``potential``, for whoever
    wants its integrators and optimisers (O. Cohen et al., doi:10.1088/3050-287X/ae1799).

    Energies in eV, forces in eV/A, stress in eV/A^3 in ASE's sign, as TorchSim has them. ``dtype``
    (None: float64) is that of TorchSim's states, not of the network: positions and cells are not
    rounded to the network's float32. Nothing can be differentiated through the result. Raises
    InputError when TorchSim is not installed.
    """
    return _model_class()(potential, dtype)


@functools.cache
def _model_class() -> type[Any]:
    import torch

    try:
        from torch_sim.models.interface import ModelInterface
    except ImportError as error:
        raise InputError(
            f"TorchSim cannot be imported ({error}): pip install 'magus-anharmonic[torchsim]'"
        ) from error

    class TorchSimModel(ModelInterface):  # type: ignore[misc]
        def __init__(self, potential: Potential, dtype: torch.dtype | None) -> None:
            super().__init__()
            self.potential = potential
            self._device, self._dtype = torch.device(potential.device), dtype or torch.float64
            self._compute_stress = self._compute_forces = True
            self._memory_scales_with = "n_atoms_x_density"
            self.implemented_properties = ["energy", "forces", "stress"]

        def forward(self, state: Any, **_: Any) -> dict[str, torch.Tensor]:
            found = self.potential.evaluate(structures(state))
            arrays = {
                "energy": found.energy,
                "forces": np.concatenate(found.forces),
                "stress": found.stress,
            }
            return {
                name: torch.as_tensor(array, dtype=self._dtype, device=self._device)
                for name, array in arrays.items()
            }

    return TorchSimModel


def structures(state: Any) -> list[Atoms]:
    """The systems of a TorchSim state (or a dictionary of its fields), which keeps cell vectors as
    columns."""

    def array(name: str) -> np.ndarray:
        value = state.get(name) if isinstance(state, dict) else getattr(state, name)
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)

    numbers, positions = array("atomic_numbers"), array("positions")
    system = array("system_idx") if array("system_idx").ndim else np.zeros(len(numbers), dtype=int)
    cells, pbc = array("cell").reshape(-1, 3, 3), np.broadcast_to(array("pbc"), 3)
    return [
        Atoms(numbers[system == i], positions[system == i], cell=cell.T, pbc=pbc)
        for i, cell in enumerate(cells)
    ]
