"""``campaign.yaml``: the two stages of the paper over several pressures (Fig. 1b), step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings.calculators import (
    CalculatorSettings,
    FinalSettings,
    FinetuneSettings,
    LabelerSettings,
    LearningSettings,
    MergeSettings,
    ScratchSettings,
)
from magus_anharmonic.settings.search import Settings, parse_settings
from magus_anharmonic.settings.section import (
    FOUNDATION,
    SCRATCH,
    Ascending,
    Count,
    Device,
    Energy,
    Even,
    EvenFrom4,
    Force,
    InsidePath,
    Kelvin,
    PressureGPa,
    PressuresGPa,
    Section,
    Seed,
    Symprec,
    Three,
    load_yaml,
    parse,
    snake_case,
)
from magus_anharmonic.settings.sscha import SschaSettings
from magus_anharmonic.units import GPa


class Pressures(Section):
    """Base of the blocks that run at several pressures."""

    pressures: PressuresGPa = Field(description="GPa, ascending")


class PhaseSettings(Section):
    """One entry of ``phases``: a name that tables, figures and Hessians use."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[^\s,]+$", description="e.g. Im-3m")
    structure: InsidePath | None = Field(
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
    target_rmse: Energy | None = Field(
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
    window: Energy | None = Field(
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
    force_tolerance: Force = Field(0.05, description="eV/A")
    max_steps: Count = Field(100, description="most steps of one relaxation")
    symprec: Symprec = Field(
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
    temperature: Kelvin = Field(0.0, description="K")
    supercell: Three = Field((3, 3, 3), description="repetitions of the primitive cell")
    n_configs: EvenFrom4 = Field(
        1000, description="configurations per population and of the Hessian, even"
    )
    max_populations: Count = Field(20, description="most populations of one SSCHA relaxation")
    dispersions: Annotated[list[PressureGPa], Ascending] = Field(
        default_factory=list, description="GPa, of `pressures`: with the dispersion of every phase"
    )
    dft_harmonic: Annotated[list[PressureGPa], Ascending] = Field(
        default_factory=list,
        description="GPa: harmonic modes by the labeler too, at its own relaxed cell",
    )
    dft_sscha: Annotated[list[PressureGPa], Ascending] = Field(
        default_factory=list,
        description=(
            "GPa, of `pressures`: SSCHA and Hessian by the labeler, from the model's state, fixed"
            " cell"
        ),
    )
    dft_supercell: Three = Field((2, 2, 2), description="of dft_sscha")
    dft_n_configs: EvenFrom4 = Field(100, description="of dft_sscha, even")
    dft_max_populations: Count = Field(3, description="of dft_sscha")

    @model_validator(mode="after")
    def _subsets(self) -> HessianSettings:
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
    n_configs: Even = Field(
        500, description="configurations labelled by DFT per phase and pressure, even"
    )


class FigureSettings(Section):
    """``figures``: what the figures show."""

    reference_phase: str | None = Field(
        None, description="one of `phases`: zero of the relative enthalpies (Fig. 5)"
    )


OWNED_BY_THE_CAMPAIGN = (
    "pressure learning sscha main_calculator ml_calculator mlcalculator fitness seed"
).split()


class CampaignSettings(Section):
    """A whole campaign. Blocks that are left out are steps that are not done; `learning` left out:
    the foundation is the final model."""

    seed: Seed = 0
    foundation: InsidePath = Field(
        FOUNDATION,
        description=(
            "a name MatterSim knows, a path relative to the campaign file, a shipped one, or"
            " scratch: new weights, which the first search that learns trains (learning.settings"
            ".scratch); each further one begins with the model and the labels of the one before"
        ),
    )
    device: Device = None
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
        problems = [
            *self._phase_problems(),
            *self._missing_blocks(),
            *self._scratch_problems(),
            *self._search_problems(),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _phase_problems(self) -> list[str]:
        names = [phase.name for phase in self.phases]
        problems = [
            f"phases: {name} is defined twice"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        wanted: dict[str, Sequence[str | None]] = {
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
        needs = {
            "produce": ("foundation_check", "relax", "sscha"),
            "sscha": ("dft",),
            "hessian": ("errors",),
            "labeler": ("learning", "dft", "errors"),
        }
        problems = [
            f"{name}: needs the block {other}"
            for other, names in needs.items()
            if not getattr(self, other)
            for name in names
            if getattr(self, name)
        ]
        for name in ("dft_harmonic", "dft_sscha"):
            if getattr(self.hessian, name, None) and not self.labeler:
                problems.append(f"hessian.{name}: needs the block labeler")
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

    def _scratch_problems(self) -> list[str]:
        if not self.from_scratch:
            return []
        needs = "foundation: scratch: new weights know nothing before they are trained"
        return [
            *([] if self.learning else [f"{needs}: needs the block learning"]),
            *([f"foundation_check: {needs}; leave it out"] if self.foundation_check else []),
        ]

    def _search_problems(self) -> list[str]:
        """Keys inside the free blocks, checked as the searches will check them."""
        blocks = {
            "search": self.search,
            "learning.search": self.learning.search if self.learning else {},
            "produce.search": self.produce.search if self.produce else {},
            "calculator": self.calculator,
        }
        problems = [
            f"{where}.{key}: is set by the campaign itself; leave it out"
            for where, block in blocks.items()
            for key in block
            if snake_case(str(key))
            in (("checkpoint",) if where == "calculator" else OWNED_BY_THE_CAMPAIGN)
        ]
        if not problems:
            for check in (self._check_searches, self._check_sscha):
                try:
                    check()
                except InputError as error:
                    problems += error.problems
        return problems

    def _check_searches(self) -> None:
        if self.learning is not None:
            self.learning_search(self.learning.pressures[0], self.foundation)
        if self.produce is not None:
            self.production_search(self.produce.pressures[0], "final.pth")
        parse(CalculatorSettings, {"calculator": "mattersim", **self.calculator}, "calculator")

    def _check_sscha(self) -> None:
        if self.sscha is not None:
            if parse(SschaSettings, self.sscha.settings, "sscha.settings").evaluator is not None:
                raise InputError("sscha.settings.evaluator: a campaign ranks by its final model")

    @property
    def from_scratch(self) -> bool:
        """Whether the campaign begins without any model."""
        return self.foundation == SCRATCH

    @property
    def scratch(self) -> ScratchSettings:
        """How new weights are made and trained: `learning.settings.scratch`."""
        given = self.learning.settings.get("scratch", {}) if self.learning else {}
        return parse(ScratchSettings, given, "learning.settings.scratch")

    @property
    def final_stages(self) -> Sequence[FinetuneSettings]:
        """Trainings of the final model: those of new weights where none are given for them."""
        given = "stages" in self.final.model_fields_set
        return self.scratch.stages if self.from_scratch and not given else self.final.stages

    def input_yaml(
        self,
        pressure: GPa,
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

    def learning_search(self, pressure: GPa, checkpoint: str, cycle: int = 1) -> dict[str, Any]:
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

    def production_search(self, pressure: GPa, checkpoint: str) -> dict[str, Any]:
        """``input.yaml`` of a search with the final model. Raises ``InputError``."""
        if self.produce is None:
            raise InputError("produce: this campaign has no production searches")
        found = self.input_yaml(pressure, checkpoint, self.produce.search)
        parse_settings(found)
        return found

    def ranking_settings(self, pressure: GPa, checkpoint: str) -> Settings:
        """Settings of the SSCHA ranking at one pressure (GPa)."""
        given = self.input_yaml(pressure, checkpoint, {})
        return parse_settings(
            {**given, "Fitness": ["SSCHA"], "sscha": self.sscha.settings if self.sscha else {}}
        )


def load_campaign(path: str | Path) -> CampaignSettings:
    """Read and validate ``campaign.yaml``; files in it become absolute. Every problem in one
    ``InputError``."""
    file = Path(path)
    return resolved(parse(CampaignSettings, load_yaml(file)), file.resolve().parent)


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
    if settings.sscha is not None and "born" in settings.sscha.settings:
        # what the files hold, so that a changed one is computed anew
        whole = parse(SschaSettings, settings.sscha.settings, "sscha.settings")
        born = whole.model_dump(mode="json").get("born")
        given = {**settings.sscha.settings, "born": born}
        changes["sscha"] = settings.sscha.model_copy(update={"settings": given})
    return settings.model_copy(update=changes)
