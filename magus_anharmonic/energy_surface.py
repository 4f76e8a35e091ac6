"""Which surface labels and models are of: the static one of a potential, or the free energy
F(R, cell) of SSCHA at fixed centroids on a potential.

A label of a free energy has `LABEL_KEY` in its ``info``, a model of it the same in its checkpoint,
both as `FreeEnergySurface.as_dict`; what has none is static. The two are never mixed: SSCHA on a
free energy would count the motion of the ions twice, and a potential knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import to_json

LABEL_KEY = "surface"
"""In the ``info`` of a label and in a checkpoint."""
LABEL_ERROR = "label_energy_error"
"""In the ``info`` of a label: standard error of its energy, eV per cell."""
FORCE_ERROR = "label_force_error"
"""The same of its forces, eV/A, root mean square over components."""
SAME_MASS = 1e-3
"""amu."""


@dataclass(frozen=True)
class FreeEnergySurface:
    """F(R, cell) of the SSCHA supercell at fixed centroids.

    temperature : K; masses : amu by symbol, of every species; supercell : three repetitions, three
    rows, or ``{"min_length": A}``; potential : model id of what SSCHA ran on; finite_size : what of
    the finite-size term is in the energies.
    """

    temperature: float
    masses: Mapping[str, float]
    supercell: Any
    potential: str
    finite_size: str = "not included"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``info`` and checkpoints."""
        return {"kind": "free-energy", **asdict(self)}

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str) -> FreeEnergySurface | None:
        """From the ``info`` of a label or a checkpoint's dictionary; None: static. Raises
        ``InputError`` for what is no description, naming ``where``."""
        stored = content.get(LABEL_KEY)
        if stored is None:
            return None
        names = {one.name for one in fields(cls)}
        if not isinstance(stored, Mapping) or set(stored) != {"kind", *names}:
            raise InputError(
                f"{where}: {LABEL_KEY}: {stored!r}: is no description of a free-energy surface"
            )
        return cls(**{name: stored[name] for name in names})

    @staticmethod
    def for_checkpoint(surface: FreeEnergySurface | None) -> dict[str, Any]:
        """Further keys of a checkpoint; empty for a potential."""
        return {} if surface is None else {LABEL_KEY: surface.as_dict()}

    def __str__(self) -> str:
        masses = ", ".join(f"{symbol} {mass:g}" for symbol, mass in sorted(self.masses.items()))
        return (
            f"free energy at {self.temperature:g} K of {masses} amu (supercell"
            f" {to_json(self.supercell)}, potential {self.potential}, finite-size term"
            f" {self.finite_size})"
        )

    def difference(self, other: FreeEnergySurface) -> str:
        """Names of what is not the same of two surfaces, with both values; empty where they are
        one. Masses of species that only one knows are no difference."""
        found = [
            f"{name} {to_json(getattr(self, name))} and {to_json(getattr(other, name))}"
            for name in ("temperature", "supercell", "potential", "finite_size")
            if to_json(getattr(self, name)) != to_json(getattr(other, name))
        ]
        return "; ".join([*found, *self._mass_differences(other.masses)])

    def other_masses(self, atoms: Atoms) -> dict[str, float]:
        """The masses (amu by symbol) of the surface that are not those of ``atoms``."""
        own = masses_of(atoms)
        return {
            symbol: mass
            for symbol, mass in self.masses.items()
            if symbol in own and abs(mass - own[symbol]) > SAME_MASS
        }

    def _mass_differences(self, masses: Mapping[str, float]) -> list[str]:
        return [
            f"mass of {symbol} {self.masses[symbol]:g} and {mass:g} amu"
            for symbol, mass in sorted(masses.items())
            if symbol in self.masses and abs(self.masses[symbol] - mass) > SAME_MASS
        ]

    def require(self, structures: Sequence[Atoms], temperature: float | None = None) -> None:
        """Raise ``InputError`` that names what differs where ``structures`` have other masses, or
        another ``temperature`` (K) is wanted. A structure that carries no masses has the natural
        ones."""
        wrong = []
        if temperature is not None and abs(temperature - self.temperature) > 1e-6:
            wrong.append(f"temperature {self.temperature:g} and {temperature:g} K")
        for atoms in structures if not wrong else ():
            if wrong := self._mass_differences(masses_of(atoms)):
                break
        if wrong:
            raise InputError(
                f"free-energy model: {wrong[0]} (the model's, and what is asked for): it is the"
                f" {self}; take a model of these conditions, or make its labels"
            )


def masses_of(atoms: Atoms) -> dict[str, float]:
    """Mean mass (amu) of every species, by symbol."""
    symbols, masses = np.array(atoms.get_chemical_symbols()), atoms.get_masses()
    return {str(symbol): float(masses[symbols == symbol].mean()) for symbol in sorted(set(symbols))}


def surface_of_labels(labelled: Sequence[Atoms]) -> FreeEnergySurface | None:
    """The one surface that all labels are of; None: the static one. Raises ``InputError`` where
    they are of several."""
    found: dict[str, FreeEnergySurface | None] = {}
    for atoms in labelled:
        one = FreeEnergySurface.of(atoms.info, f"label {atoms.info.get('id', '')}")
        found.setdefault("static" if one is None else str(one), one)
    surfaces = list(found.values())
    if None in surfaces and len(surfaces) > 1:
        raise InputError(
            f"labels: some are of the {next(one for one in surfaces if one)}, some static"
            " energies; train one model on each kind"
        )
    first = surfaces[0] if surfaces else None
    for other in surfaces[1:]:
        assert first is not None and other is not None
        if different := first.difference(other):
            raise InputError(f"labels: of two free-energy surfaces ({different}); train one each")
        first = replace(first, masses={**other.masses, **first.masses})
    return first


def check_start(
    labels: FreeEnergySurface | None, start: FreeEnergySurface | None, start_id: str
) -> None:
    """Raise ``InputError`` where labels must not train a model that starts from the weights
    ``start_id`` of the surface ``start``: free energies start from their own potential, or from a
    model of the same surface; static energies from no free energy."""
    if labels is None and start is not None:
        raise InputError(
            f"model {start_id}: is no potential but the {start}; static (DFT) labels train a"
            f" potential: start from {start.potential}, or from any other"
        )
    if labels is None:
        return
    if start is None and start_id != labels.potential:
        raise InputError(
            f"labels: are the {labels}; a model of it starts from that potential, or from an"
            f" earlier model of it, not from {start_id}"
        )
    if start is not None and (different := labels.difference(start)):
        raise InputError(
            f"model {start_id}: is of another free-energy surface than the labels ({different})"
        )


def surface_in_use(evaluator: Any) -> FreeEnergySurface | None:
    """What an evaluator (or the ASE calculator in one) or a labeler is a free energy of; None: a
    static one."""
    inside = getattr(getattr(evaluator, "calculator", None), "potential", evaluator)
    surface = getattr(inside, "surface", None)
    return surface if isinstance(surface, FreeEnergySurface) else None


def require_kind(model: Any, wanted: str, where: str) -> None:
    """Raise ``InputError`` where the model of the block at the key ``where`` is not of the
    ``surface`` (static or free-energy) that the block names."""
    surface = surface_in_use(model)
    if wanted == "static" and surface is not None:
        raise InputError(
            f"{where}.checkpoint: model {model.model_id} is no potential but the {surface}; to"
            f" relax on it add surface: free-energy, else give the potential {surface.potential}"
        )
    if wanted == "free-energy" and surface is None:
        raise InputError(
            f"{where}.surface: free-energy: model {model.model_id} is a potential: it knows no"
            " motion of the ions; give a model that was trained on free-energy labels, or leave"
            " surface out"
        )


def require_potential(evaluator: Any, what: str) -> None:
    """Raise ``InputError`` where ``evaluator`` is a free-energy model: ``what`` cannot use one."""
    surface = surface_in_use(evaluator)
    if surface is not None:
        raise InputError(
            f"{what}: model {evaluator.model_id} is no potential but the {surface}: the motion of"
            f" the ions would count twice; give the potential {surface.potential}"
        )
