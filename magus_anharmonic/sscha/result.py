"""The result of one SSCHA run, and its files."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import DamagedFile, InputError
from magus_anharmonic.files import load_arrays, read_json, replacing, versions, write_json
from magus_anharmonic.sscha.state import SschaState
from magus_anharmonic.sscha.supercells import Repeats, as_repeats


@dataclass(frozen=True)
class SschaResult:
    """Free energy of one structure at one pressure and temperature.

    All numbers describe one state, and come from one ensemble that no minimisation has seen. Numbers that do not
    exist (a run that failed early) are NaN.

    status : "converged", "unconverged" (max_populations reached; the numbers are an upper bound), or "failed".
    reason : why not converged; of a converged run what its populations did not suffice to say about its phase, else empty.
    gibbs, gibbs_raw : (F + P V) / N with and without the finite-size term, eV/atom; gibbs_error : standard error of
    the sampling alone; finite_size, helmholtz (with the finite-size term), decrease (predicted remaining decrease of
    G) : eV/atom; volume : A^3/atom; stress, stress_error : (3, 3) eV/A^3, ASE's sign; pressure : GPa, positive =
    compressed; target_pressure : GPa; temperature : K.
    centroids : average positions, one primitive cell; position_error : A, of the least certain centroid; space_group
    is that of the centroids at ``symmetry_tolerance`` A, space_group_start the one before.
    n_evaluations : energies and forces evaluated, start included; interpolated_imaginary : part of the modes of the
    finite-size mesh that are imaginary (0 where the interpolation can be trusted).
    force_constants : compact, see `state`; None when there is no state.
    """

    status: str
    reason: str
    converged: bool
    gibbs: float
    gibbs_error: float
    gibbs_raw: float
    finite_size: float
    helmholtz: float
    volume: float
    stress: np.ndarray
    stress_error: np.ndarray
    pressure: float
    target_pressure: float
    temperature: float
    decrease: float
    centroids: Atoms
    position_error: float
    space_group_start: str
    space_group: str
    symmetry_tolerance: float
    n_evaluations: int
    n_populations: int
    n_configs: int
    n_atoms_supercell: int
    supercell: Repeats
    interpolated_imaginary: float
    model_id: str
    seconds: float
    force_constants: np.ndarray | None = None

    @property
    def state(self) -> SschaState:
        """The state, to start another run from; raises ``InputError`` when the run has none."""
        if self.force_constants is None:
            raise InputError(f"start: the SSCHA run ended without a state ({self.reason})")
        return SschaState(self.centroids, self.supercell, self.force_constants, self.temperature)

    def write(self, directory: Path) -> None:
        """Write ``result.npz`` (force constants) and then ``result.json``: the run is finished when that exists."""
        if self.force_constants is not None:
            with replacing(directory / "result.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, force_constants=self.force_constants)
        write_json(directory / "result.json", self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Everything but the force constants, ready for JSON."""
        data: dict[str, Any] = {**versions()}
        for field in fields(self):
            if field.name not in ("centroids", "force_constants"):
                value = getattr(self, field.name)
                value = value.tolist() if isinstance(value, np.ndarray) else value
                data[field.name] = None if isinstance(value, float) and not math.isfinite(value) else value
        for name in ("stress", "stress_error"):
            data[name] = data[name] if np.isfinite(getattr(self, name)).all() else None
        data["centroids"] = {
            "symbols": self.centroids.get_chemical_symbols(),
            "cell": self.centroids.cell.array.tolist(),
            "positions": self.centroids.positions.tolist(),
            "masses": self.centroids.get_masses().tolist(),
        }
        return data

    @classmethod
    def read(cls, directory: str | Path) -> SschaResult:
        """Read a finished run; raises ``InputError`` when there is none or it is of another version."""
        path = Path(directory) / "result.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file (not the folder of a finished SSCHA run)")
        data = read_json(path)
        if {name: data.pop(name, None) for name in versions()} != versions():
            raise InputError(
                f"{path}: a result of another version of this package, whose numbers are not those of now; use an empty folder"
            )
        arrays = path.with_name("result.npz")
        try:
            result = cls._from_json(data)
            found = load_arrays(arrays)["force_constants"] if arrays.is_file() else None
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise DamagedFile(f"{path}: not the result of an SSCHA run ({type(error).__name__}: {error})") from None
        return replace(result, force_constants=found)

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> SschaResult:
        nan = float("nan")
        for name, value in data.items():
            if value is None:
                data[name] = np.full((3, 3), nan) if name.startswith("stress") else nan
            elif name.startswith("stress"):
                data[name] = np.array(value)
        data["supercell"] = as_repeats(data["supercell"])
        data["centroids"] = Atoms(**data["centroids"], pbc=True)
        return cls(**data)
