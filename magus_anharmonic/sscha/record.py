"""What is known of one free energy: made once by an SSCHA run, carried by reference from there on.

A stored run, a candidate of a ranking, the tables, the report and `docs/columns.md` all take the
fields of `FreeEnergy` as they stand here: a number that is added here is in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

from magus_anharmonic.io.tables import column

State = Literal[
    "converged",
    "stable",
    "saddle",
    "unconverged",
    "eliminated",
    "estimated",
    "static",
    "failed",
    "transformed",
]
"""``converged`` : the relaxation came to its end; ``stable``, ``saddle`` : so it did, and the
Hessian of the free energy has no negative mode, or has one, beyond two standard errors.
``unconverged`` : the populations or the budget ran out; ``eliminated`` : stopped early, because it
cannot be among the best or ends far above them; both G are upper bounds. ``estimated`` : G from a
line through others; ``static`` : no G. ``failed`` : no G, and a reason. ``transformed`` : another
phase now (of a phase diagram)."""

CONVERGED: tuple[State, ...] = ("converged", "stable", "saddle")
"""States whose relaxation came to its end."""
MINIMA: tuple[State, ...] = ("converged", "stable")
"""States that are minima as far as is known."""
RANKED: tuple[State, ...] = (*MINIMA, "eliminated")
"""States whose free energy takes part in the ranking. Below a saddle point there is something
lower, and where an unconverged run would have ended nobody knows; an eliminated one is known to end
above the best."""
COMPUTED: tuple[State, ...] = (*RANKED, "saddle")
"""States with a free energy that says something about the structure."""
WITH_ERROR: tuple[State, ...] = (*COMPUTED, "unconverged")
"""States whose free energy is that of an ensemble of their own and has a standard error."""

OLD_STATES = {"sscha": "converged", "became": "transformed"}
"""Words of earlier versions in their files."""

SYMPREC = 0.05
"""A, where a run says nothing else."""

_MADE = "sscha.task.finished_result"
_TRUST = "ranking.uncertainty.ensemble_trust"
_HESSIAN = "ranking.stability.with_verdict"


@dataclass(frozen=True)
class FreeEnergy:
    """Free energy of one structure at one pressure and temperature: its numbers, each with unit,
    equation and origin as metadata (`io.tables.column`); ``None`` where there is no number.

    ``error_vector`` (eV/atom) : what the model's error of the mean energy shares with that of other
    ensembles (`ErrorModel.vectors`); in no table.
    """

    status: State = column(
        "what became of it: `converged`, `stable` (minimum), `saddle`, `unconverged`,"
        " `eliminated`, `estimated`, `static`, `failed`",
        origin="sscha.task.finished_result",
        default="static",
        needed=True,
        old=OLD_STATES,
        info=True,
    )
    reason: str = column(
        "why it did not converge, failed, or is not to be trusted",
        origin=_MADE,
        default="",
        needed=True,
        info=True,
    )
    gibbs: float | None = column(
        "Gibbs free energy, finite-size term included, and electronic where it is given",
        "eV/atom",
        equation="(F + P V) / N + finite_size + electronic",
        origin=_MADE,
        needed=True,
        info=True,
    )
    gibbs_error: float | None = column(
        "standard error of gibbs by sampling alone",
        "eV/atom",
        origin="sscha.task.gibbs_energy",
        needed=True,
        info=True,
    )
    gibbs_raw: float | None = column(
        "gibbs without finite-size term, of the supercell as it is",
        "eV/atom",
        equation="(F + P V) / N",
        origin="sscha.task.gibbs_energy",
    )
    finite_size: float | None = column(
        "finite-size term: harmonic free energy on a fine mesh of q points minus that of the"
        " supercell",
        "eV/atom",
        equation="F_harm(mesh) - F_harm(supercell)",
        origin="sscha.reciprocal.finite_size_term",
    )
    nonanalytic: float | None = column(
        "what of finite_size comes from long-range dipoles (LO-TO splitting); empty: they are not"
        " in gibbs, no Born charges of this phase were given",
        "eV/atom",
        equation="finite_size with dipoles - finite_size without",
        origin="sscha.reciprocal.finite_size_term",
    )
    electronic: float | None = column(
        "free energy of the electrons at the temperature minus their energy at zero smearing, mean"
        " of the DFT labels of the ensemble (`errors --electronic`), in gibbs; empty: not in it",
        "eV/atom",
        equation="<F_el - E_0> / N",
        origin="ranking.uncertainty.with_electronic",
    )
    predicted_decrease: float | None = column(
        "by how much the relaxation may still lower gibbs", "eV/atom", origin=_MADE
    )
    volume: float | None = column("volume of the SSCHA cell", "A^3/atom", origin=_MADE)
    space_group_start: str = column(
        "space group of the structure from which the run started", origin=_MADE, default=""
    )
    space_group: str = column(
        "space group of the SSCHA centroids",
        origin=_MADE,
        default="",
        name="spg_quantum",
        needed=True,
        info=True,
    )
    symmetry_tolerance: float | None = column(
        "tolerance of the space group of the centroids, from their error",
        "A",
        origin="sscha.task.centroid_tolerance",
    )
    n_evaluations: int = column("energies and forces that were evaluated", origin=_MADE, default=0)
    n_surrogate: int = column(
        "the same of the surrogate (`sscha.surrogate`), beside those of n_evaluations",
        origin=_MADE,
        default=0,
    )
    n_populations: int = column("ensembles of the run", origin=_MADE, default=0)
    n_atoms_supercell: int | None = column(
        "atoms of the supercell", origin=_MADE, name="natoms_supercell"
    )
    ensemble_error: float | None = column(
        "expected error of the model's forces over the final ensemble", "eV/A", origin=_TRUST
    )
    hessian_deciding: float | None = column(
        "frequency of the mode of the free-energy Hessian that decides about stability; negative:"
        " imaginary",
        "cm^-1",
        origin=_HESSIAN,
    )
    hessian_error: float | None = column(
        "standard error of hessian_deciding", "cm^-1", origin=_HESSIAN
    )
    p_stable: float | None = column(
        "probability that the Hessian has no negative mode",
        origin="sscha.hessian.Hessian.probability_stable",
    )
    error_vector: tuple[float, ...] | None = None

    @property
    def converged(self) -> bool:
        """The relaxation came to its end."""
        return self.status in CONVERGED

    @property
    def ranked(self) -> bool:
        """True with a free energy that counts in a ranking."""
        return self.status in RANKED and self.gibbs is not None

    @property
    def computed(self) -> bool:
        """True with a free energy of its own that says something about the structure."""
        return self.status in COMPUTED and self.gibbs is not None

    @property
    def numbers(self) -> FreeEnergy:
        """The record alone, without what a class below this one has besides."""
        names = (one.name for one in fields(FreeEnergy))
        return FreeEnergy(**{name: vars(self)[name] for name in names})


INFO_KEYS = {
    one.name: one.metadata["name"] or one.name
    for one in fields(FreeEnergy)
    if one.metadata.get("info")
}
"""Fields of `FreeEnergy` and the keys of ``Atoms.info`` that they fill."""


Carrier = TypeVar("Carrier", bound="WithFreeEnergy")


class WithFreeEnergy:
    """A dataclass that carries a free energy, which answers for it."""

    free_energy: FreeEnergy

    @property
    def status(self) -> State:
        return self.free_energy.status

    @property
    def reason(self) -> str:
        return self.free_energy.reason

    @property
    def gibbs(self) -> float | None:
        return self.free_energy.gibbs

    @property
    def gibbs_error(self) -> float | None:
        return self.free_energy.gibbs_error

    @property
    def ranked(self) -> bool:
        """True with a free energy that counts, also when another stands for the same phase."""
        return self.free_energy.ranked

    @property
    def tolerance(self) -> float:
        """Of the space group of the centroids, A."""
        return self.free_energy.symmetry_tolerance or SYMPREC

    def updated(self: Carrier, **numbers: Any) -> Carrier:
        """The same with other numbers of its free energy."""
        return replace(self, free_energy=replace(self.free_energy, **numbers))  # type: ignore[type-var]
