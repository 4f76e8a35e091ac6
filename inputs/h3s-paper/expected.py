"""``expected.yaml``: values that a campaign should reproduce, each with unit, error and source;
checked and brought to our units.

Lies beside the inputs of the paper; loaded by ``magus_anharmonic.paper.script``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import Section, load_yaml, nearest, parse
from magus_anharmonic.units import EV_IN_CM1, EV_PER_A3_IN_GPA

UNITS: dict[str, dict[str, float]] = {
    "energy": {"eV/atom": 1.0, "meV/atom": 1e-3},
    "force": {"eV/A": 1.0, "meV/A": 1e-3},
    "force constant": {"eV/A^2": 1.0, "meV/A^2": 1e-3},
    "pressure": {"GPa": 1.0, "kbar": 0.1, "Mbar": 100.0, "eV/A^3": EV_PER_A3_IN_GPA},
    "frequency": {"cm^-1": 1.0, "meV": 1e-3 * EV_IN_CM1, "THz": 33.35640951981521},
    "number": {"1": 1.0},
    "phases": {"-": 1.0},
}
"""Dimension: its units, each in terms of the first."""


@dataclass(frozen=True)
class Name:
    """What a value name stands for. needs : keys that choose the value; table : where it comes
    from."""

    dimension: str
    table: str
    needs: tuple[str, ...]
    meaning: str
    smaller_is_better: bool = False


NAMES: dict[str, Name] = {
    "energy_rmse": Name(
        "energy", "model_errors.csv", ("model", "set"), "error of energies (Table I)", True
    ),
    "force_rmse": Name(
        "force", "model_errors.csv", ("model", "set"), "error of forces (Table I)", True
    ),
    "stress_rmse": Name(
        "pressure", "model_errors.csv", ("model", "set"), "error of stresses (Table I)", True
    ),
    "stability_sequence": Name(
        "phases", "enthalpies.csv", (), "phases of lowest enthalpy, with rising pressure"
    ),
    "transition_pressure": Name(
        "pressure", "enthalpies.csv", ("phases",), "where two named phases have the same enthalpy"
    ),
    "enthalpy_above_lowest": Name(
        "energy",
        "enthalpies.csv",
        ("phase", "pressure_GPa"),
        "of a phase above the lowest structure (Fig. 2)",
    ),
    "enthalpy_rank": Name(
        "number",
        "enthalpies.csv",
        ("phase", "pressure_GPa"),
        "place of a phase by enthalpy, 1 is lowest (Fig. 2)",
    ),
    "critical_pressure": Name(
        "pressure",
        "modes.csv",
        ("phase", "irrep", "method", "energies_by"),
        "where a squared frequency is zero (Fig. 4a)",
    ),
    "critical_pressure_difference": Name(
        "pressure",
        "modes.csv",
        ("phase", "irrep", "method"),
        "between the model's critical pressure and that by DFT (Fig. 4a)",
        True,
    ),
    "n_transformed": Name(
        "number",
        "ranking-<P>GPa.csv",
        ("space_group", "pressure_GPa"),
        "structures that SSCHA brought to a space group (Fig. 6a)",
    ),
    "n_with_free_energy": Name(
        "number", "ranking-<P>GPa.csv", ("pressure_GPa",), "structures relaxed by SSCHA"
    ),
    "lowest_space_group": Name(
        "phases",
        "ranking-<P>GPa.csv",
        ("pressure_GPa",),
        "space group of the lowest free energy (Fig. 6c)",
    ),
    "share_kept_by_dft": Name(
        "number",
        "space_groups.csv",
        ("space_group",),
        "of those that became it: share that keeps its own by DFT",
    ),
    "gibbs_minus_enthalpy": Name(
        "energy", "ranking-<P>GPa.csv", ("pressure_GPa",), "mean of G - H (Fig. 6c)"
    ),
    "reordering_window": Name(
        "energy",
        "ranking-<P>GPa.csv",
        ("pressure_GPa",),
        "H up to which G leaves the line (Fig. 6c)",
    ),
    "gradient_error": Name(
        "force",
        "gradient_errors.csv",
        ("phase", "pressure_GPa", "quantity"),
        "error of forces and gradients (Figs. 7, 8)",
        True,
    ),
}
"""Every value that can be validated."""
OLD_NAMES = {"n_became": "n_transformed"}
"""Of files of earlier versions."""


class ExpectedValue(Section):
    """One value of ``expected.yaml``."""

    name: str = Field(description="one of the names that `magus-anharmonic validate --names` lists")
    unit: str = Field(description="of value, error and tolerance")
    value: float | list[float] | list[str] | str | None = Field(
        None, description="a number, [low, high], a name, or a list of names"
    )
    error: float | None = Field(None, ge=0, description="standard error of the expected value")
    tolerance: float | None = Field(
        None,
        gt=0,
        description="a difference that counts as agreement anyway, e.g. for 'around 200'",
    )
    at_least: float | None = Field(None, description="instead of value")
    at_most: float | None = Field(None, description="instead of value")
    source: str = Field(description="where the number is from")
    method: str | None = Field(None, description="harmonic | sscha-hessian (modes)")
    energies_by: Literal["model", "dft"] | None = Field(
        None, description="who gave the energies of a mode"
    )
    model: Literal["foundation", "finetuned"] | None = Field(None, description="whose errors")
    set: Literal["training", "validation", "test"] | None = Field(None, description="which labels")
    phase: str | None = Field(None, description="name of a phase")
    phases: list[str] | None = Field(None, description="two phases: below and above the transition")
    space_group: str | None = Field(None, description="symbol, e.g. Im-3m")
    irrep: str | None = Field(None, description="e.g. T1u")
    quantity: str | None = Field(
        None, description="force | gradient_centroid | gradient_force_constants | bo_force_centroid"
    )
    table_source: Literal["produce", "relax", "foundation"] | None = Field(
        None, description="which rows of enthalpies.csv"
    )
    pressure_GPa: float | None = Field(None, ge=0, description="GPa")  # noqa: N815
    out_of: int | None = Field(
        None,
        ge=1,
        description="structures among which the expected number was counted (n_transformed)",
    )
    labels: str | None = Field(
        None, description="the DFT behind the expected value, e.g. vasp PBE 500 eV"
    )
    foundation: str | None = Field(
        None,
        description="the foundation checkpoint behind the expected value, e.g. mattersim-v1.0.0-1M",
    )
    supercell: list[int] | None = Field(None, description="of the expected value")
    n_labels: int | None = Field(None, description="labels behind the expected value")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        value = OLD_NAMES.get(value, value)
        if value not in NAMES:
            raise ValueError(f"unknown value{nearest(value, NAMES)}")
        return value

    @model_validator(mode="after")
    def _complete(self) -> ExpectedValue:
        name = NAMES[self.name]
        missing = [key for key in name.needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"{self.name}: needs {', '.join(missing)}")
        allowed = UNITS[self.dimension]
        if self.unit not in allowed:
            known = {unit: dimension for dimension, units in UNITS.items() for unit in units}
            other = (
                f"is a unit of {known[self.unit]}"
                if self.unit in known
                else f"is no unit that is known{nearest(self.unit, known)}"
            )
            raise ValueError(
                f"{self.name}: unit: {self.unit!r} {other}; allowed: {', '.join(allowed)}"
            )
        given = [key for key in ("value", "at_least", "at_most") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.name}: give one of value, at_least, at_most")
        self._check_value(name.dimension == "phases")
        return self

    def _check_value(self, words: bool) -> None:
        value = self.value
        if words and not (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(item, str) for item in value))
        ):
            raise ValueError(f"{self.name}: value: must be a name, or a list of names in order")
        if not words and value is not None:
            numbers = value if isinstance(value, list) else [value]
            if (
                not all(isinstance(item, int | float) for item in numbers)
                or len(numbers) > 2
                or sorted(numbers) != numbers
            ):
                raise ValueError(f"{self.name}: value: must be a number or [low, high]")
        if self.phases is not None and len(self.phases) != 2:
            raise ValueError(
                f"{self.name}: phases: must be two, the one below the transition first"
            )

    @property
    def dimension(self) -> str:
        """One of the keys of `UNITS`."""
        return (
            "force constant"
            if self.quantity == "gradient_force_constants"
            else NAMES[self.name].dimension
        )

    @property
    def factor(self) -> float:
        """Of the unit, to the first unit of its dimension (that of the tables)."""
        return UNITS[self.dimension][self.unit]

    @property
    def range(self) -> tuple[float, float]:
        """Expected numbers as (low, high) in the unit of the tables; infinite on the open side, and
        for names."""
        low, high = -float("inf"), float("inf")
        if NAMES[self.name].dimension == "phases":
            return low, high
        if isinstance(self.value, list):
            low, high = float(self.value[0]), float(self.value[-1])
        elif isinstance(self.value, int | float):
            low = high = float(self.value)
        low = low if self.at_least is None else self.at_least
        high = high if self.at_most is None else self.at_most
        return low * self.factor, high * self.factor

    @property
    def words(self) -> str:
        """The expected value as it was given."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        values = self.value if isinstance(self.value, list) else [self.value]
        between = " -> " if isinstance(values[0], str) else " to "
        return between.join(v if isinstance(v, str) else f"{v:g}" for v in values)

    @property
    def title(self) -> str:
        """The name with what chooses the value."""
        parts = [self.name]
        for key in (
            "phase",
            "phases",
            "space_group",
            "irrep",
            "method",
            "energies_by",
            "model",
            "set",
            "quantity",
            "table_source",
        ):
            value = getattr(self, key)
            if value is not None:
                parts.append(" to ".join(value) if isinstance(value, list) else str(value))
        if self.pressure_GPa is not None:
            parts.append(f"{self.pressure_GPa:g} GPa")
        return " ".join(parts)


class ExpectedValues(Section):
    """The whole file."""

    about: str = Field("", description="what the values are of")
    values: list[ExpectedValue] = Field(min_length=1, description="one entry per value")


def load_expected(path: str | Path) -> ExpectedValues:
    """Read and check ``expected.yaml``; raises ``InputError`` with every problem: unknown names
    with the nearest, wrong units."""
    file = Path(path)
    data: dict[str, Any] = load_yaml(file)
    try:
        return parse(ExpectedValues, data)
    except InputError as error:
        raise InputError(*(f"{file}: {problem}" for problem in error.problems)) from None
