"""A labeler around any function, e.g. MAGUS's own MainCalculator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import LabelerError
from magus_anharmonic.labelers.base import Failure, Label, OnResult, Relaxed, settings_hash
from magus_anharmonic.labelers.pool import problem
from magus_anharmonic.structures import change_of


class CallableLabeler:
    """Labels made by ``function(structures) -> results``, one result per structure, in order.

    A result is a mapping with ``energy`` (eV), ``forces`` (N, 3) eV/A, ``stress`` (6,) or (3, 3) eV/A^3 in ASE's sign and, if known,
    ``free_energy`` (eV); or a string, the reason why there is none. ``settings`` is whatever defines the energy surface; it is hashed.
    """

    def __init__(
        self, function: Callable[[list[Atoms]], Sequence[Mapping[str, Any] | str]], *, description: str, settings: Mapping[str, Any]
    ) -> None:
        self._function = function
        self.description = description
        self.settings_hash = settings_hash("main", settings, None)

    def label(self, structures: Sequence[Atoms], on_result: OnResult | None = None) -> list[Label | Failure]:
        """See `Labeler`; raises ``LabelerError`` when the function returns another number of results."""
        started = time.monotonic()
        given = [atoms.copy() for atoms in structures]
        found = list(self._function(given))
        if len(found) != len(structures):
            raise LabelerError(f"{self.description}: {len(structures)} structures given, {len(found)} results came back")
        seconds = (time.monotonic() - started) / max(1, len(structures))
        changes = [change_of(*pair) for pair in zip(structures, given, strict=True)]
        results: list[Label | Failure] = [
            Failure(atoms, f"{self.description} {changed}: its results are those of another structure", self.settings_hash)
            if changed and not isinstance(item, str)
            else self._result(atoms, item, seconds)
            for atoms, item, changed in zip(structures, found, changes, strict=True)
        ]
        if on_result is not None:
            for index, result in enumerate(results):
                on_result(index, result)
        return results

    def _result(self, atoms: Atoms, found: Mapping[str, Any] | str, seconds: float) -> Label | Failure:
        from ase.stress import voigt_6_to_full_3x3_stress

        if isinstance(found, str):
            return Failure(atoms, found, self.settings_hash)
        stress = np.asarray(found["stress"], dtype=float)
        stress = voigt_6_to_full_3x3_stress(stress) if stress.shape == (6,) else stress
        forces = np.asarray(found["forces"], dtype=float)
        reason = problem({"ok": True, "energy": found["energy"], "forces": forces, "stress": stress}, len(atoms))
        if reason:
            return Failure(atoms, reason, self.settings_hash)
        return Label(atoms, float(found["energy"]), found.get("free_energy"), forces, stress, self.settings_hash, seconds)

    def relax(
        self, structures: Sequence[Atoms], pressure: float = 0.0, *, force_tolerance: float = 0.05, max_steps: int = 300
    ) -> list[Relaxed]:
        """Raises ``LabelerError``: a function of single points cannot relax."""
        raise LabelerError(f"{self.description}: makes single points only")

    def close(self) -> None:
        """Nothing to end."""
