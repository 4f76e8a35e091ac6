"""The block ``sscha``: keys of one free-energy run, and of the ranking that asks for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from magus_anharmonic.settings.born import BornCharges
from magus_anharmonic.settings.calculators import LabelerSettings
from magus_anharmonic.settings.section import (
    Count,
    Energy,
    Even,
    In,
    InsidePath,
    Kelvin,
    Length,
    Positive,
    Section,
    Spacing,
    Symprec,
)
from magus_anharmonic.units import quantity

Row = tuple[int, int, int]

WORTHWHILE = 100
"""Configurations of a population, below which a surrogate saves nothing: with 40 in a single cell
of four atoms two runs of twenty failed that ended without surrogate, with 100 none."""

OF_A_RANKING = (
    "evaluator",
    "temperature",
    "when",
    "max_candidates",
    "window",
    "seed_back",
    "allocation",
    "confidence",
    "keep_best",
    "budget",
    "hessian",
    "truth",
    "truth_error",
    "truth_labels",
)
"""Keys of ``sscha`` that decide who gets a free energy, and at which temperatures; all others are
those of a run (`SschaSettings.of_a_run`)."""


class SschaSettings(Section):
    """``sscha``: free energies of the low-enthalpy structures (Secs. II and IV B of the paper)."""

    evaluator: InsidePath | dict[str, Any] | None = Field(
        None,
        description=(
            "whose energies: a checkpoint, the import path of an ASE calculator, a name of an"
            " installed package, or a block as"
            " MainCalculator ({calculator: ..., arguments: {...}}); left out: the calculator of the"
            " search, whatever it is; with surface: free-energy the potential that the model is of"
        ),
    )
    temperature: Kelvin | list[Kelvin] = Field(
        0.0, description="K; a list runs one after the other"
    )
    when: Literal["converged_model", "every_generation"] = Field(
        "converged_model",
        description=(
            "converged_model: last generation, or once validation RMSE is below"
            " learning.target_rmse; without learning: every generation"
        ),
    )
    max_candidates: Count = Field(
        100, description="the lowest distinct structures, counted per model"
    )
    window: Energy | None = Field(
        None,
        description=(
            "only structures this far (eV/atom) above the best enthalpy, or above the hull of"
            " several compositions"
        ),
    )
    supercell: (
        tuple[Count, Count, Count] | tuple[Row, Row, Row] | dict[Literal["min_length"], Length]
    ) = Field(
        (2, 2, 2),
        description=(
            "three repetitions of the primitive cell, three rows of whole numbers (its vectors in"
            " those of the primitive cell), or {min_length: Angstrom between images}: the fewest"
            " cells, not always repetitions"
        ),
    )
    cell: Literal["variable", "fixed"] = Field(
        "variable", description="relax the cell at the target pressure, or keep it"
    )
    centroids: Literal["relaxed", "fixed"] = Field(
        "relaxed",
        description=(
            "fixed: structure and cell stay exactly as given, whether a minimum or not, and the"
            " result has the gradient and the stress of F there (implies cell: fixed, hessian: 0,"
            " seed_back: false)"
        ),
    )
    n_configs: Even = Field(
        1000,
        description=(
            "most configurations of a population, even (+u/-u pairs); fewer far from the minimum"
        ),
    )
    max_populations: Count = Field(30, description="most populations of one relaxation")
    engine: Literal["native", "python-sscha"] = Field(
        "native", description="who minimises on an ensemble"
    )
    surrogate: InsidePath = Field(
        "auto",
        description=(
            "cheap energies that most configurations are averaged over, a few of the truth"
            " correcting them: none, polynomial (fitted to the run's own configurations), a"
            " checkpoint, or the import path of an evaluator, an ASE calculator or a function"
            " fit(structures, found); auto: polynomial for a MatterSim potential, engine: native"
            " and n_configs of 100 or more, else none"
        ),
    )
    strain_tolerance: Positive = Field(
        0.005, description="what the cell may still be strained by, or twice its error"
    )
    centroid_tolerance: Length = Field(
        0.005, description="Angstrom, what centroids may still have to move, or twice their error"
    )
    pressure_tolerance: Annotated[Positive, In("GPa")] | None = Field(
        None,
        description=(
            "GPa, largest component of stress minus target; left out: energy and strain decide"
            " alone"
        ),
    )
    free_energy_tolerance: Energy = Field(
        0.2e-3, description="eV/atom, predicted remaining decrease of G"
    )
    min_effective_sample: Positive = Field(
        0.5, lt=1.0, description="effective sample size / n_configs that ends a minimisation"
    )
    symprec: Symprec = Field(0.05, description="Angstrom, symmetry of the start")
    reference_spacing: Spacing = Field(
        0.02, description="2 pi / A: q spacing to which the free energy is interpolated"
    )
    error_tolerance: Energy | None = Field(
        None,
        description=(
            "eV/atom, sampling error of G that ends a run; left out: none; in a ranking 0.3 of the"
            " model's validation RMSE, 0.001 where that is not known"
        ),
    )
    n_configs_start: Even | None = Field(
        None,
        description=(
            "of the first population, doubled up to n_configs; left out: n_configs; with"
            " elimination an eighth of it, at least 100"
        ),
    )
    allocation: Literal["elimination", "fixed"] = Field(
        "elimination",
        description=(
            "elimination: who cannot be among the best, ends far above the lowest or is of the"
            " phase of another stops early; fixed: everybody runs to the end"
        ),
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        0.95, description="that no stopped candidate belongs to the best"
    )
    keep_best: Count = Field(
        3,
        description=(
            "so many of the lowest phases (of each composition) are run to the end and put in"
            " order; none that is more than 0.05 eV/atom (or three times the model's validation"
            " RMSE) above the lowest"
        ),
    )
    budget: Count | None = Field(
        None, description="most force evaluations of the race of one ranking; left out: no limit"
    )
    hessian: int = Field(
        3,
        ge=0,
        description=(
            "so many of the lowest phases (of each composition) are checked for saddle points"
            " (free-energy Hessian), which are followed; 0: none"
        ),
    )
    seed_back: bool = Field(True, description="hand SSCHA centroids back to the search as seeds")
    born: BornCharges = None
    truth: LabelerSettings | None = Field(
        None,
        description=(
            "labeler (a block as learning.labeler) whose G the ranking is of: labels of ensembles"
            " of the keep_best lowest phases correct that of the model, in a search after its last"
            " generation"
        ),
    )
    truth_error: Energy = Field(
        1e-3, description="eV/atom, of the correction of a phase: labels are added until then"
    )
    truth_labels: int = Field(60, ge=20, description="most labels of a phase for truth")

    @model_validator(mode="after")
    def _truth_of_energies(self) -> SschaSettings:
        name = self.truth.calculator if self.truth else None
        if name == "sscha":
            raise ValueError(
                "truth: calculator: sscha labels free energies; the truth is a code of energies"
                " and forces: gpaw, vasp, espresso, an import path"
            )
        if name == "main":
            raise ValueError(
                "truth: calculator: main: MAGUS's MainCalculator labels only for its own loop;"
                " give gpaw, vasp, espresso, an import path"
            )
        return self

    @model_validator(mode="after")
    def _one_surface(self) -> SschaSettings:
        if self.surrogate not in ("auto", "none") and self.engine == "python-sscha":
            raise ValueError(
                "surrogate: engine: python-sscha minimises on one energy surface; take engine:"
                " native, or surrogate: none"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _nothing_moves(cls, data: Any) -> Any:
        fixed = isinstance(data, dict) and data.get("centroids") == "fixed"
        return {**data, "cell": "fixed", "hessian": 0, "seed_back": False} if fixed else data

    @field_validator("temperature", mode="before")
    @classmethod
    def _kelvin(cls, value: Any) -> Any:
        values = [quantity(item, "K") for item in (value if isinstance(value, list) else [value])]
        if not values:
            raise ValueError("must be a number or a list of numbers in K")
        if min(values) < 0:
            raise ValueError("must not be below 0 K")
        return values if isinstance(value, list) else values[0]

    @field_validator("supercell", mode="before")
    @classmethod
    def _repetitions(cls, value: Any) -> Any:
        problem = ValueError(
            "must be three whole numbers >= 1, three rows of three whole numbers, or {min_length:"
            " Angstrom}"
        )
        if isinstance(value, dict):
            if set(value) != {"min_length"}:
                raise problem
            if not quantity(value["min_length"], "A") > 0:
                raise ValueError("min_length must be above 0 A")
            return value
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise problem
        if all(
            isinstance(row, list | tuple) and len(row) == 3 and all(type(n) is int for n in row)
            for row in value
        ):
            (a, b, c), (d, e, f), (g, h, i) = value
            if a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g) == 0:
                raise ValueError("its three rows lie in one plane")
            return tuple(tuple(row) for row in value)
        if any(type(n) is not int or n < 1 for n in value):
            raise problem
        return tuple(value)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without charges a run is the one that it was before there was this key."""
        data = handler(self)
        return {key: value for key, value in data.items() if key != "born" or value is not None}

    def of_a_run(self) -> dict[str, Any]:
        """The keys that change what one run gives, and their values."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in OF_A_RANKING
        }

    def identity(self, *ignored: str) -> dict[str, Any]:
        """What the numbers of a run depend on, as JSON has it, without ``ignored`` keys; what came
        later only where it is used, so that earlier runs keep their names."""
        off = {"centroids"} if self.centroids == "relaxed" else set()
        if self.surrogate == "none" or (self.surrogate == "auto" and not self.surrogate_pays):
            off |= {"surrogate"}
        return self.model_dump(mode="json", exclude={*OF_A_RANKING, *ignored, *off})

    @property
    def surrogate_pays(self) -> bool:
        """Whether ``surrogate: auto`` takes one for a potential that has one."""
        return self.engine == "native" and self.n_configs >= WORTHWHILE

    @property
    def ranking_start(self) -> int:
        """Configurations of the first population in a ranking."""
        if self.n_configs_start is not None:
            return self.n_configs_start
        return (
            self.n_configs
            if self.allocation == "fixed"
            else min(self.n_configs, max(100, self.n_configs // 16 * 2))
        )

    def configurations(self, population: int, start: int | None = None) -> int:
        """How many configurations the population with this number (from 1) has; ``start``: the
        first, where the settings do not say."""
        first = self.n_configs_start or start or self.n_configs
        return min(self.n_configs, first * 2 ** min(population - 1, 20))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures in K, in the order in which they run."""
        return (
            tuple(self.temperature) if isinstance(self.temperature, list) else (self.temperature,)
        )
