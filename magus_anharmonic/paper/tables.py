"""The tables of a campaign (``campaign/tables/*.csv``): their columns in one place, one frozen
dataclass each; see `columns`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.io.tables import columns as columns
from magus_anharmonic.io.tables import read as read
from magus_anharmonic.io.tables import read_if_there as read_if_there
from magus_anharmonic.io.tables import write as write
from magus_anharmonic.units import GPa

UNITS = {"energy": "eV/atom", "force": "eV/A", "stress": "GPa"}
"""Unit of each quantity of ``parity.csv``."""

GradientQuantity = Literal[
    "force", "gradient_centroid", "gradient_force_constants", "bo_force_centroid"
]
GRADIENT_UNITS = {
    "force": "eV/A",
    "gradient_centroid": "eV/A",
    "gradient_force_constants": "eV/A^2",
    "bo_force_centroid": "eV/A",
}
"""Unit of each quantity of ``gradient_errors.csv``."""


def _check_unit(quantity: str, unit: str, allowed: dict[str, str]) -> None:
    if unit != allowed.get(quantity, unit):
        raise ValueError(
            f"unit: {unit!r}: {quantity} must be in {allowed[quantity]}; convert the numbers"
        )


@dataclass(frozen=True)
class ModelError:
    """Table I: root-mean-square errors of a model on a set of labels."""

    FILE: ClassVar[str] = "model_errors.csv"
    model: Literal["foundation", "finetuned"]
    model_id: str
    set: Literal["training", "validation", "test"]
    n: int
    energy_rmse_eV_per_atom: float
    force_rmse_eV_per_A: float
    stress_rmse_GPa: float | None


@dataclass(frozen=True)
class Parity:
    """Fig. 3: one number by the labels (``reference``) and by the model (``predicted``)."""

    FILE: ClassVar[str] = "parity.csv"
    model: str
    set: str
    quantity: Literal["energy", "force", "stress"]
    unit: str
    reference: float
    predicted: float

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, UNITS)


@dataclass(frozen=True)
class Enthalpy:
    """Figs. 2 and 5: a relaxed structure at a pressure; ``phase`` is its name or empty."""

    FILE: ClassVar[str] = "enthalpies.csv"
    id: str
    phase: str
    formula: str
    natoms: int
    space_group: str
    pressure_GPa: float
    volume_A3_per_atom: float
    enthalpy_eV_per_atom: float
    model_id: str
    source: Literal["produce", "relax", "foundation"]


@dataclass(frozen=True)
class SpaceGroups:
    """The space group of a candidate as it was found, after relaxation by DFT, and with quantum
    ions (SSCHA)."""

    FILE: ClassVar[str] = "space_groups.csv"
    id: str
    pressure_GPa: float
    spg_static: str
    spg_dft: str
    spg_quantum: str
    enthalpy_dft_eV_per_atom: float | None
    reason: str


@dataclass(frozen=True)
class Mode:
    """Fig. 4a: squared frequency of one irreducible representation at Gamma (imaginary:
    negative)."""

    FILE: ClassVar[str] = "modes.csv"
    phase: str
    space_group: str
    irrep: str
    pressure_GPa: float
    method: Literal["harmonic", "sscha-hessian"]
    energies_by: Literal["model", "dft"]
    frequency_squared_cm2: float
    error_cm2: float | None
    model_id: str


@dataclass(frozen=True)
class Band:
    """Fig. 4b: one point of a dispersion (imaginary frequencies negative); files are named by
    `dispersion_file`."""

    FILE: ClassVar[str] = "dispersion-<phase>-<P>GPa.csv"
    distance: float
    label: str
    branch: int
    frequency_cm1: float
    error_cm1: float | None
    method: str


@dataclass(frozen=True)
class GradientError:
    """Figs. 7 and 8 (Eqs. 11 to 15): what averaging over an ensemble leaves of the errors of the
    forces.

    ``rmse`` is what the ensemble of ``n_configs`` gives, its square the sum of those of
    ``systematic`` (what an infinite ensemble would leave, with ``systematic_error``) and
    ``statistical``; ``floor`` is ``single``, the RMSE of one configuration, over sqrt(n_configs).
    """

    FILE: ClassVar[str] = "gradient_errors.csv"
    phase: str
    pressure_GPa: float
    n_configs: int
    quantity: GradientQuantity
    unit: str
    rmse: float
    systematic: float | None
    statistical: float | None
    floor: float | None
    systematic_error: float | None = None
    single: float | None = None

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GradientBin:
    """Figs. 7 and 8: how the errors (model minus reference) of a quantity are distributed;
    ``count`` of them from ``low`` to ``high``."""

    FILE: ClassVar[str] = "gradient_histogram.csv"
    phase: str
    pressure_GPa: float
    quantity: GradientQuantity
    averaged: int
    unit: str
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GradientParity:
    """Figs. 7 and 8: one component of an averaged gradient by the reference and by the model."""

    FILE: ClassVar[str] = "gradient_parity.csv"
    phase: str
    pressure_GPa: float
    quantity: GradientQuantity
    unit: str
    reference: float
    predicted: float

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GibbsCorrection:
    """G by DFT minus G by the model from the labels of one ensemble: first order, its standard
    error, second order; and the free energy of the electrons at ``electronic_temperature_K`` minus
    their energy, with its standard error, where it was asked for."""

    FILE: ClassVar[str] = "gibbs_correction.csv"
    phase: str
    pressure_GPa: float
    n_labels: int
    correction_eV_per_atom: float
    correction_error_eV_per_atom: float | None
    second_order_eV_per_atom: float | None
    electronic_eV_per_atom: float | None = None
    electronic_error_eV_per_atom: float | None = None
    electronic_temperature_K: float | None = None


@dataclass(frozen=True)
class LearningPoint:
    """A model after one round of learning, and its errors on one set of ``n_set`` labels that came
    from ``set_from`` (the dataset, rounds)."""

    FILE: ClassVar[str] = "learning.csv"
    step: str
    generation: int
    model_id: str
    set: str
    energy_rmse_eV_per_atom: float | None
    force_rmse_eV_per_A: float | None
    stress_rmse_GPa: float | None
    n_labels: int
    n_set: int | None = None
    set_from: str = ""


PUBLIC_NAMES = {"train": "training", "validation": "validation", "test": "test"}


def learning_points(step: str, record: Mapping[str, Any]) -> Iterator[LearningPoint]:
    """The errors of a round's model on each set, from its line of ``metrics.jsonl``."""
    for side, public in PUBLIC_NAMES.items():
        found = record.get("new", {}).get(side)
        if found and found.get("n"):
            errors = (found.get(f"{name}_rmse") for name in ("energy", "force", "stress"))
            labels = record.get("n_labels", 0), found["n"], record.get(f"{side}_from", "")
            round_ = step, record["generation"], record.get("new_model", "")
            yield LearningPoint(*round_, public, *errors, *labels)


@dataclass(frozen=True)
class Cost:
    """What a step of the campaign took."""

    FILE: ClassVar[str] = "cost.csv"
    step: str
    n_structures: int
    n_evaluations: int
    n_labels: int
    wall_s: float


@dataclass(frozen=True)
class FailureRow:
    """A structure that a step gave up, and why."""

    FILE: ClassVar[str] = "failures.csv"
    step: str
    id: str
    reason: str


TABLES: tuple[type, ...] = (
    ModelError,
    Parity,
    Enthalpy,
    SpaceGroups,
    Mode,
    Band,
    GradientError,
    GradientBin,
    GradientParity,
    GibbsCorrection,
    LearningPoint,
    Cost,
    FailureRow,
)
"""Every table of a campaign."""

RANKING = "ranking-<P>GPa.csv"
"""Fig. 6: a `Candidate` a row; files are named by `ranking_file`."""

RANKINGS = "ranking-*GPa.csv"
"""Every `ranking_file` of a folder, as a pattern."""

DISPERSIONS = "dispersion-*GPa.csv"
"""Every `dispersion_file` of a folder, as a pattern."""


def ranking_files(folder: Path) -> list[Path]:
    """The rankings in a folder of tables, by name."""
    return sorted(folder.glob(RANKINGS))


def ranking_file(pressure: GPa) -> str:
    """``ranking-100GPa.csv``."""
    return f"ranking-{pressure:g}GPa.csv"


def dispersion_file(phase: str, pressure: GPa) -> str:
    """``dispersion-Im-3m-60GPa.csv``; for other names see `safe_name`."""
    return f"dispersion-{safe_name(phase)}-{pressure:g}GPa.csv"


def pressure_of_file(name: str) -> float:
    """The pressure (GPa) in the name of a ranking or dispersion; raises ``InputError`` when there
    is none."""
    found = re.search(r"-(\d+(?:\.\d+)?)GPa\.csv$", name)
    if not found:
        raise InputError(
            f"{name}: the name must end in -<pressure>GPa.csv, e.g. {ranking_file(100)}"
        )
    return float(found[1])


def phase_of_file(name: str) -> str:
    """The `safe_name` of the phase in the name of a dispersion."""
    return re.sub(r"-(\d+(?:\.\d+)?)GPa\.csv$", "", name).removeprefix("dispersion-")
