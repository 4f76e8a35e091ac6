"""Every key of ``campaign.yaml``: the two stages of the paper over several pressures (Fig. 1b),
step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import section
from magus_anharmonic.settings.search import (
    CalculatorSettings,
    LabelerSettings,
    LearningSettings,
    Settings,
    SschaSettings,
    parse_settings,
)
from magus_anharmonic.settings.section import (
    Count,
    NonNegative,
    Positive,
    PressureGPa,
    Section,
    load_yaml,
    parse,
)
from magus_anharmonic.settings.training import FinetuneSettings

PressuresGPa = Annotated[list[PressureGPa], Field(min_length=1)]
Share = Annotated[int, Field(ge=0, strict=True)]

OWNED_BY_THE_CAMPAIGN = (
    "pressure",
    "learning",
    "sscha",
    "main_calculator",
    "ml_calculator",
    "fitness",
    "seed",
)


def in_order(pressures: Sequence[float]) -> Sequence[float]:
    """The same pressures; ValueError unless they are given once each, ascending."""
    for first, second in zip(pressures[:-1], pressures[1:], strict=True):
        if second <= first:
            raise ValueError(
                f"pressures out of order: {second:g} GPa comes after {first:g} GPa; give each once,"
                " ascending"
            )
    return pressures


class Pressures(Section):
    """Base of the blocks that run at several pressures."""

    pressures: PressuresGPa = Field(description="GPa, ascending")

    @field_validator("pressures")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        return list(in_order(value))


class PhaseSettings(Section):
    """One entry of ``phases``: a name that tables, figures and Hessians use."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[^\s,]+$", description="e.g. Im-3m")
    structure: section.InsidePath | None = Field(
        None,
        description=(
            "file of one structure, relative to the campaign file; left out: found by the searches"
        ),
    )
    space_group: Annotated[int, Field(ge=1, le=230, strict=True)] | None = Field(
        None, description="number; left out: that of `structure` at 0.05 Angstrom"
    )
    natoms: Count | None = Field(
        None, description="atoms of the primitive cell, to tell phases of one space group apart"
    )

    @model_validator(mode="after")
    def _findable(self) -> PhaseSettings:
        if self.structure is None and self.space_group is None:
            raise ValueError(
                "give structure (a file) or space_group (a number), else nothing says which phase"
                " this is"
            )
        return self


class CampaignLearning(Pressures):
    """``learning``: independent searches that learn, one per pressure; the keys of `learning` of
    input.yaml are in ``settings``."""

    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of the block `learning` of input.yaml but the labeler, e.g. n_sample",
    )
    search: dict[str, Any] = Field(
        default_factory=dict,
        description="MAGUS's keys for these searches alone, laid over `search`",
    )
    target_rmse: Positive | None = Field(
        None,
        description=(
            "eV/atom, of the final model on the validation set; further cycles of learning while it"
            " is not reached"
        ),
    )
    max_cycles: Count = Field(1, description="most cycles of learning, the first included")

    @model_validator(mode="after")
    def _cycles(self) -> CampaignLearning:
        if self.max_cycles > 1 and self.target_rmse is None:
            raise ValueError(
                "max_cycles above 1 needs target_rmse: without it nothing says when to stop"
            )
        return self


class StageSettings(FinetuneSettings):
    """One entry of ``final.stages``."""

    epochs: Count = Field(100, description="passes through the training set")
    learning_rate: Positive = Field(1.0e-3, lt=1.0, description="of Adam, at the start")
    stress_loss_ratio: NonNegative = Field(1.0, description="weight of the stress loss (GPa)")


def _paper_stages() -> list[StageSettings]:
    return [StageSettings(), StageSettings(force_loss_ratio=0.1, stress_loss_ratio=0.1)]


class MergeSettings(Section):
    """``merge``: one data set from all searches; the distortions of one phase stay on one side."""

    split: tuple[Count, Share, Share] = Field(
        (8, 1, 1), description="train : validation : test, by families of parents"
    )
    dataset: section.InsidePath | None = Field(
        None,
        description=(
            "earlier labels of the same DFT settings, for training only: extxyz, or a shipped"
            " checkpoint's name"
        ),
    )
    n_dataset: Count | None = Field(
        None, description="so many of them, drawn at random; left out: all"
    )

    @field_validator("split", mode="before")
    @classmethod
    def _three_parts(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class FinalSettings(Section):
    """``final``: the final model, finetuned from the foundation checkpoint on the merged labels
    (Sec. IV A of the paper)."""

    refit_shift: bool = Field(
        True, description="fit the energy shift per species to the training labels first"
    )
    stages: list[StageSettings] = Field(
        default_factory=_paper_stages,
        min_length=1,
        description="one after the other; the paper's two: force/stress ratios 1, then 0.1",
    )


class ProduceSettings(Pressures):
    """``produce``: searches with the final model, one per pressure."""

    search: dict[str, Any] = Field(
        default_factory=dict,
        description="MAGUS's keys for these searches alone, laid over `search`",
    )


class FoundationSettings(Section):
    """``foundation_check``: what the foundation model makes of the structures found (Fig. 2 of the
    paper)."""

    pressure: PressureGPa = Field(150.0, description="GPa")
    max_structures: Count = Field(
        200, description="the lowest distinct structures of the nearest production search"
    )


class RelaxSettings(Pressures):
    """``relax``: the low-enthalpy distinct structures and the named phases at more pressures (Fig.
    5 of the paper)."""

    max_structures: Count = Field(
        100, description="lowest distinct structures of each production search"
    )
    window: Positive | None = Field(
        None, description="eV/atom above the lowest enthalpy of its search; left out: no limit"
    )


class CampaignSscha(Pressures):
    """``sscha``: free energies of the lowest distinct structures at chosen pressures; the keys of
    `sscha` of input.yaml in ``settings``."""

    settings: dict[str, Any] = Field(
        default_factory=dict, description="keys of the block `sscha` of input.yaml, e.g. n_configs"
    )


class DftSettings(Section):
    """``dft``: candidates whose space group the SSCHA changed, relaxed by the labeler from their
    static structures."""

    max_structures: Count | None = Field(
        None, description="per pressure, the lowest free energies first; left out: every one"
    )
    force_tolerance: Positive = Field(0.05, description="eV/A")
    max_steps: Count = Field(100, description="most steps of one relaxation")
    symprec: Positive = Field(
        0.05, description="Angstrom, of the three space groups that are compared"
    )


class HessianPhase(Section):
    """One entry of ``hessian.phases``."""

    name: str = Field(description="one of `phases`")
    irreps: list[str] = Field(
        default_factory=list,
        description="irreducible representations at Gamma to follow, e.g. [T1u]; empty: all",
    )


class HessianSettings(Pressures):
    """``hessian``: harmonic and free-energy-Hessian modes at Gamma of chosen phases over pressures
    (Fig. 4 of the paper)."""

    phases: list[HessianPhase] = Field(
        min_length=1, description="which phases, and which of their modes"
    )
    temperature: NonNegative = Field(0.0, description="K")
    supercell: tuple[Count, Count, Count] = Field(
        (3, 3, 3), description="repetitions of the primitive cell"
    )
    n_configs: Count = Field(
        1000, description="configurations per population and of the Hessian, even"
    )
    max_populations: Count = Field(20, description="most populations of one SSCHA relaxation")
    dispersions: list[PressureGPa] = Field(
        default_factory=list, description="GPa, of `pressures`: with the dispersion of every phase"
    )
    dft_harmonic: list[PressureGPa] = Field(
        default_factory=list,
        description="GPa: harmonic modes by the labeler too, at its own relaxed cell",
    )
    dft_sscha: list[PressureGPa] = Field(
        default_factory=list,
        description=(
            "GPa, of `pressures`: SSCHA and Hessian by the labeler, from the model's state, fixed"
            " cell"
        ),
    )
    dft_supercell: tuple[Count, Count, Count] = Field((2, 2, 2), description="of dft_sscha")
    dft_n_configs: Count = Field(100, description="of dft_sscha, even")
    dft_max_populations: Count = Field(3, description="of dft_sscha")

    @field_validator("supercell", "dft_supercell", mode="before")
    @classmethod
    def _three(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("n_configs", "dft_n_configs")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2 or value < 4:
            raise ValueError("must be even and at least 4: configurations come in +u/-u pairs")
        return value

    @model_validator(mode="after")
    def _subsets(self) -> HessianSettings:
        in_order(self.dispersions)
        in_order(self.dft_harmonic)
        in_order(self.dft_sscha)
        for name in ("dispersions", "dft_sscha"):
            extra = sorted(set(getattr(self, name)) - set(self.pressures))
            if extra:
                raise ValueError(f"{name}: {extra[0]:g} GPa is not one of hessian.pressures")
        return self


class ErrorSettings(Section):
    """``errors``: errors of the free-energy gradient against DFT and the first-order correction of
    G (Figs. 7 and 8 of the paper)."""

    phases: list[str] = Field(min_length=1, description="names of `phases`")
    pressures: PressuresGPa = Field(
        description="GPa, ascending, of hessian.pressures: their ensembles are used"
    )
    n_configs: Count = Field(
        500, description="configurations labelled by DFT per phase and pressure, even"
    )

    @field_validator("pressures")
    @classmethod
    def _ascending(cls, value: list[float]) -> list[float]:
        return list(in_order(value))


class FigureSettings(Section):
    """``figures``: what the figures show."""

    reference_phase: str | None = Field(
        None, description="one of `phases`: zero of the relative enthalpies (Fig. 5)"
    )


class CampaignSettings(Section):
    """A whole campaign. Blocks that are left out are steps that are not done; `learning` left out:
    the foundation is the final model."""

    seed: int = Field(0, ge=0, description="same campaign file and seed, same result")
    foundation: section.InsidePath = Field(
        "mattersim-v1.0.0-1M",
        description=(
            "a name MatterSim knows, a path relative to the campaign file, or a shipped one"
        ),
    )
    device: Literal["cpu", "cuda"] | None = Field(
        None, description="cpu or cuda; left out: cuda when there is one"
    )
    host: Literal["auto", "magus", "embedded"] = Field(
        "auto", description="who searches; auto: stock MAGUS when it is installed"
    )
    search: dict[str, Any] = Field(
        description=(
            "MAGUS's keys that all searches share, as in input.yaml, without pressure and"
            " calculator"
        )
    )
    calculator: dict[str, Any] = Field(
        default_factory=dict, description="keys of MainCalculator but the checkpoint, e.g. eps"
    )
    labeler: LabelerSettings | None = Field(
        None, description="the DFT code and its settings, for every label of the campaign"
    )
    phases: list[PhaseSettings] = Field(default_factory=list, description="named phases")
    learning: CampaignLearning | None = Field(
        None, description="the first stage; left out: no learning"
    )
    merge: MergeSettings = Field(
        default_factory=MergeSettings, description="the data set of the final model"
    )
    final: FinalSettings = Field(default_factory=FinalSettings, description="the final model")
    produce: ProduceSettings | None = Field(None, description="the second stage")
    foundation_check: FoundationSettings | None = Field(None, description="left out: not done")
    relax: RelaxSettings | None = Field(None, description="left out: not done")
    sscha: CampaignSscha | None = Field(None, description="left out: not done")
    dft: DftSettings | None = Field(None, description="left out: not done")
    hessian: HessianSettings | None = Field(None, description="left out: not done")
    errors: ErrorSettings | None = Field(None, description="left out: not done")
    figures: FigureSettings = Field(
        default_factory=FigureSettings, description="what the figures show"
    )

    @model_validator(mode="after")
    def _whole(self) -> CampaignSettings:
        problems = [*self._phase_problems(), *self._missing_blocks(), *self._search_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _phase_problems(self) -> list[str]:
        names = [phase.name for phase in self.phases]
        problems = [
            f"phases: {name} is defined twice"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        wanted = {
            "hessian.phases": [phase.name for phase in self.hessian.phases] if self.hessian else [],
            "errors.phases": self.errors.phases if self.errors else [],
            "figures.reference_phase": [self.figures.reference_phase],
        }
        known = ", ".join(names) or "none"
        return problems + [
            f"{key}: {name!r} is not defined under phases (defined: {known})"
            for key, given in wanted.items()
            for name in given
            if name is not None and name not in names
        ]

    def _missing_blocks(self) -> list[str]:
        needs = [
            ("foundation_check", self.foundation_check, "produce", self.produce),
            ("relax", self.relax, "produce", self.produce),
            ("sscha", self.sscha, "produce", self.produce),
            ("dft", self.dft, "sscha", self.sscha),
            ("errors", self.errors, "hessian", self.hessian),
            ("learning", self.learning, "labeler", self.labeler),
            ("dft", self.dft, "labeler", self.labeler),
            ("errors", self.errors, "labeler", self.labeler),
            (
                "hessian.dft_harmonic",
                self.hessian and self.hessian.dft_harmonic,
                "labeler",
                self.labeler,
            ),
            ("hessian.dft_sscha", self.hessian and self.hessian.dft_sscha, "labeler", self.labeler),
        ]
        problems = [
            f"{name}: needs the block {other}"
            for name, block, other, there in needs
            if block and not there
        ]
        if self.errors and self.hessian:
            extra = sorted(set(self.errors.pressures) - set(self.hessian.pressures))
            problems += [
                f"errors.pressures: {p:g} GPa is not one of hessian.pressures, whose ensembles are"
                " used"
                for p in extra
            ]
            followed = {phase.name for phase in self.hessian.phases}
            problems += [
                f"errors.phases: {n} is not one of hessian.phases, whose ensembles are used"
                for n in self.errors.phases
                if n not in followed
            ]
        return problems

    def _search_problems(self) -> list[str]:
        """Keys inside the free blocks, checked as the searches will check them."""
        problems = []
        blocks = {
            "search": self.search,
            "learning.search": self.learning.search if self.learning else {},
        }
        blocks["produce.search"] = self.produce.search if self.produce else {}
        for where, block in blocks.items():
            problems += [
                f"{where}.{key}: is set by the campaign itself; leave it out"
                for key in block
                if _owned(str(key))
            ]
        for where, block in (("calculator", self.calculator),):
            problems += [
                f"{where}.{key}: is set by the campaign itself; leave it out"
                for key in block
                if section.snake_case(str(key)) == "checkpoint"
            ]
        if not problems:
            for build in (self._check_searches, self._check_sscha):
                try:
                    build()
                except InputError as error:
                    problems += error.problems
        return problems

    def _check_searches(self) -> None:
        if self.learning is not None:
            self.learning_search(self.learning.pressures[0], self.foundation)
        if self.produce is not None:
            self.production_search(self.produce.pressures[0], self.foundation)
        parse(CalculatorSettings, {"calculator": "mattersim", **self.calculator}, "calculator")

    def _check_sscha(self) -> None:
        if self.sscha is not None:
            parse(SschaSettings, self.sscha.settings, "sscha.settings")

    def input_yaml(
        self,
        pressure: float,
        checkpoint: str,
        extra: dict[str, Any],
        learning: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The ``input.yaml`` of one search of this campaign."""
        calculator = {
            "calculator": "mattersim",
            "jobPrefix": "MatterSim",
            **self.calculator,
            "checkpoint": checkpoint,
        }
        if self.device is not None:
            calculator["device"] = self.device
        given = {
            **self.search,
            **extra,
            "pressure": pressure,
            "seed": self.seed,
            "MainCalculator": calculator,
        }
        return given if learning is None else {**given, "learning": learning}

    def learning_search(self, pressure: float, checkpoint: str, cycle: int = 1) -> dict[str, Any]:
        """``input.yaml`` of a search that learns; every cycle has a seed of its own. Raises
        ``InputError``."""
        if self.learning is None or self.labeler is None:
            raise InputError("learning: this campaign does not learn")
        block = {**self.learning.settings, "labeler": self.labeler.model_dump(mode="json")}
        parse(LearningSettings, block, "learning.settings")
        found = self.input_yaml(pressure, checkpoint, self.learning.search, block)
        found["seed"] = self.seed + 1000 * (cycle - 1)
        parse_settings(found)
        return found

    def production_search(self, pressure: float, checkpoint: str) -> dict[str, Any]:
        """``input.yaml`` of a search with the final model. Raises ``InputError``."""
        if self.produce is None:
            raise InputError("produce: this campaign has no production searches")
        found = self.input_yaml(pressure, checkpoint, self.produce.search)
        parse_settings(found)
        return found

    def ranking_settings(self, pressure: float, checkpoint: str) -> Settings:
        """Settings of the SSCHA ranking at one pressure (GPa)."""
        given = self.input_yaml(pressure, checkpoint, {})
        return parse_settings(
            {**given, "Fitness": ["SSCHA"], "sscha": self.sscha.settings if self.sscha else {}}
        )


def _owned(key: str) -> bool:
    return {"MLCalculator": "ml_calculator"}.get(
        key, section.snake_case(key)
    ) in OWNED_BY_THE_CAMPAIGN


def load_campaign(path: str | Path) -> CampaignSettings:
    """Read and validate ``campaign.yaml``; files in it become absolute. Every problem in one
    ``InputError``."""
    file = Path(path)
    return resolved(parse_campaign(load_yaml(file)), file.resolve().parent)


def parse_campaign(data: dict[str, Any]) -> CampaignSettings:
    """Validate the mapping of a ``campaign.yaml``."""
    try:
        return parse(CampaignSettings, data)
    except InputError as error:
        lines = [
            line.removeprefix("input: ")
            for problem in error.problems
            for line in problem.splitlines()
        ]
        raise InputError(*lines) from None


def resolved(settings: CampaignSettings, folder: Path) -> CampaignSettings:
    """The settings with files relative to ``folder`` made absolute; raises ``InputError`` for a
    structure file that is missing."""
    phases, problems = [], []
    for phase in settings.phases:
        file = None if phase.structure is None else folder / phase.structure
        if file is not None and not file.is_file():
            problems.append(f"phases.{phase.name}.structure: {file}: no such file")
        phases.append(phase.model_copy(update={"structure": None if file is None else str(file)}))
    if problems:
        raise InputError(*problems)
    changes: dict[str, Any] = {"phases": phases}
    if (folder / settings.foundation).is_file():
        changes["foundation"] = str(folder / settings.foundation)
    dataset = settings.merge.dataset
    if dataset is not None and (folder / dataset).is_file():
        changes["merge"] = settings.merge.model_copy(update={"dataset": str(folder / dataset)})
    return settings.model_copy(update=changes)
