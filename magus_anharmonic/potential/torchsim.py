"""A `Potential` as a model of TorchSim, for whoever wants its integrators and optimisers.

TorchSim: O. Cohen et al., doi:10.1088/3050-287X/ae1799. It is optional; nothing else in this
    package needs it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase import Atoms

from magus_anharmonic.errors import InputError

if TYPE_CHECKING:
    from magus_anharmonic.potential.evaluate import Potential


def torchsim_model(potential: Potential, dtype: torch.dtype = torch.float64) -> Any:
    """A TorchSim ``ModelInterface`` (0.3 to 0.6) that evaluates with ``potential``.

    Energies in eV, forces in eV/A, stress in eV/A^3 in ASE's sign, as TorchSim has them. ``dtype``
    is that of TorchSim's states, not of the network: positions and cells are not rounded to the
    network's float32. Nothing can be differentiated through the result. Raises InputError when
    TorchSim is not installed.
    """
    return _model_class()(potential, dtype)


@functools.cache
def _model_class() -> type[Any]:
    try:
        from torch_sim.models.interface import ModelInterface
    except ImportError as error:
        raise InputError(
            f"TorchSim cannot be imported ({error}): pip install 'magus-anharmonic[torchsim]'"
        ) from error

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
        return (
            value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        )

    numbers, positions = array("atomic_numbers"), array("positions")
    system = array("system_idx") if array("system_idx").ndim else np.zeros(len(numbers), dtype=int)
    cells = array("cell").reshape(-1, 3, 3)
    pbc = np.broadcast_to(array("pbc"), 3)
    return [
        Atoms(
            numbers=numbers[system == index],
            positions=positions[system == index],
            cell=cell.T,
            pbc=pbc,
        )
        for index, cell in enumerate(cells)
    ]
