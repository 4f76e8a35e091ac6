"""``campaign.yaml``: the two stages of the paper over several pressures (Fig. 1b), step by step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from magus_anharmonic.errors import InputError
from magus_anharmonic.settings import section
from magus_anharmonic.settings.calculators import CalculatorSettings, LabelerSettings
from magus_anharmonic.settings.campaign_blocks import CampaignLearning as CampaignLearning
from magus_anharmonic.settings.campaign_blocks import CampaignSscha as CampaignSscha
from magus_anharmonic.settings.campaign_blocks import DftSettings as DftSettings
from magus_anharmonic.settings.campaign_blocks import ErrorSettings as ErrorSettings
from magus_anharmonic.settings.campaign_blocks import FigureSettings as FigureSettings
from magus_anharmonic.settings.campaign_blocks import FinalSettings as FinalSettings
from magus_anharmonic.settings.campaign_blocks import FoundationSettings as FoundationSettings
from magus_anharmonic.settings.campaign_blocks import HessianSettings as HessianSettings
from magus_anharmonic.settings.campaign_blocks import MergeSettings as MergeSettings
from magus_anharmonic.settings.campaign_blocks import PhaseSettings as PhaseSettings
from magus_anharmonic.settings.campaign_blocks import ProduceSettings as ProduceSettings
from magus_anharmonic.settings.campaign_blocks import RelaxSettings as RelaxSettings
from magus_anharmonic.settings.search import Settings, parse_settings
from magus_anharmonic.settings.section import Device, Section, Seed, load_yaml, parse
from magus_anharmonic.settings.sscha import SschaSettings
from magus_anharmonic.settings.training import FinetuneSettings, LearningSettings, ScratchSettings
from magus_anharmonic.units import GPa

OWNED_BY_THE_CAMPAIGN = (
    "pressure",
    "learning",
    "sscha",
    "main_calculator",
    "ml_calculator",
    "fitness",
    "seed",
)


class CampaignSettings(Section):
    """A whole campaign. Blocks that are left out are steps that are not done; `learning` left out:
    the foundation is the final model."""

    seed: Seed = 0
    foundation: section.InsidePath = Field(
        section.FOUNDATION,
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
        problems = []
        blocks = {
            "search": self.search,
            "learning.search": self.learning.search if self.learning else {},
            "produce.search": self.produce.search if self.produce else {},
        }
        for where, block in blocks.items():
            problems += [
                f"{where}.{key}: is set by the campaign itself; leave it out"
                for key in block
                if _owned(str(key))
            ]
        problems += [
            f"calculator.{key}: is set by the campaign itself; leave it out"
            for key in self.calculator
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
            self.production_search(self.produce.pressures[0], "final.pth")
        parse(CalculatorSettings, {"calculator": "mattersim", **self.calculator}, "calculator")

    def _check_sscha(self) -> None:
        if self.sscha is not None:
            if parse(SschaSettings, self.sscha.settings, "sscha.settings").evaluator is not None:
                raise InputError("sscha.settings.evaluator: a campaign ranks by its final model")

    @property
    def from_scratch(self) -> bool:
        """Whether the campaign begins without any model."""
        return self.foundation == section.SCRATCH

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
    return parse(CampaignSettings, data)


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
