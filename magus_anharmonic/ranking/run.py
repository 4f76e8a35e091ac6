"""One SSCHA run as it is stored: what it belongs to, its free energy, where it led."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.io.digests import digest, renamed, versions
from magus_anharmonic.settings import OF_A_RANKING, SschaSettings
from magus_anharmonic.sscha.record import OLD_STATES, FreeEnergy, WithFreeEnergy
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa


@dataclass(frozen=True)
class Key:
    """What a free energy belongs to besides its structure; pressure in GPa, temperature in K."""

    model: str
    pressure: GPa
    temperature: float
    settings_hash: str

    def folder(self, structure: str) -> str:
        """Name of the run's folder below ``sscha/``: structure id and eight digits of this key."""
        text = f"{self.model} {self.pressure:.6f} {self.temperature:.6f} {self.settings_hash}"
        return f"{structure}-{digest(text)[:8]}"


def sscha_hash(settings: SschaSettings, seed: int = 0, earlier: Sequence[float] = ()) -> str:
    """Twelve hex digits over what changes the number: keys of ``sscha``, seed, and the temperatures
    (K) run before."""
    physics = {
        **settings.model_dump(mode="json", exclude=set(OF_A_RANKING)),
        "n_configs_start": settings.ranking_start,
    }
    data = {**physics, **versions(), "seed": seed, "earlier": list(earlier)}
    return digest(data)


@dataclass(frozen=True, kw_only=True)
class Run(WithFreeEnergy):
    """One SSCHA run: ``start`` in, ``centroids`` out (None when it failed), and its free energy.

    ``enthalpy`` : of the start, eV/atom. ``parent`` is the structure whose run led to this one (a
    centroid reduced to its primitive cell, or a saddle point that was followed), ``reduced`` the
    run that took over from this one in the first case, ``followed`` the one in the second.
    ``budget_spent`` : the budget (force evaluations of a race) where that ended the run, else None.
    ``generation`` : of a search, that last changed the run (None: not part of one), and ``before``
    : what earlier ones left, oldest first.
    """

    structure: str
    key: Key
    start: Atoms
    free_energy: FreeEnergy
    enthalpy: float | None = None
    centroids: Atoms | None = None
    parent: str = ""
    reduced: str = ""
    followed: str = ""
    budget_spent: int | None = None
    generation: int | None = None
    before: tuple[Run, ...] = ()

    @property
    def folder(self) -> str:
        """Name of the folder below ``sscha/``."""
        return self.key.folder(self.structure)

    @property
    def phase(self) -> Atoms:
        """The centroids; ValueError for a run that failed."""
        if self.centroids is None:
            raise ValueError(f"{self.folder}: the run failed and has no centroids")
        return self.centroids

    def as_of(self, generation: int | None) -> Run | None:
        """The run as this generation of a search left it, None before there was one;
        ``generation`` None: as it is."""
        versions = [*self.before, self]
        while generation is not None and versions and (versions[-1].generation or 0) > generation:
            versions.pop()
        return replace(versions[-1], before=tuple(versions[:-1])) if versions else None

    def stored(self) -> dict[str, Any]:
        """Its numbers and words by their names."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _APART}
        energy = {one.name: getattr(self.free_energy, one.name) for one in fields(FreeEnergy)}
        if energy["error_vector"] is not None:
            energy["error_vector"] = np.array(energy["error_vector"])
        return {**own, **energy}

    @classmethod
    def of(
        cls,
        stored: Mapping[str, Any],
        key: Key,
        start: Atoms,
        centroids: Atoms | None,
        before: Sequence[Run] = (),
    ) -> Run:
        """What `stored` gave, also in earlier versions."""
        values = {_OLD.get(name, name): value for name, value in renamed(stored).items()}
        if values.get("error_vector") is not None:
            values["error_vector"] = tuple(np.asarray(values["error_vector"], dtype=float).tolist())
        values["status"] = OLD_STATES.get(values["status"], values["status"])
        own = {one.name for one in fields(cls)} - _APART
        energy = {one.name for one in fields(FreeEnergy)}
        return cls(
            key=key,
            start=stripped(start),
            centroids=centroids,
            before=tuple(before),
            free_energy=FreeEnergy(**{name: values[name] for name in energy & values.keys()}),
            **{name: values[name] for name in own & values.keys()},
        )


_APART = {"key", "start", "free_energy", "centroids", "before"}
"""Fields of a run that are stored beside its numbers and words."""
_OLD = {
    "spg_static": "space_group_start",
    "spg_quantum": "space_group",
    "n_supercell": "n_atoms_supercell",
}
