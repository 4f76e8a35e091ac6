"""The blocks of ``campaign.yaml``, each a step of the campaign."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from magus_anharmonic.settings import section
from magus_anharmonic.settings.section import (
    Ascending,
    Count,
    Energy,
    Even,
    EvenFrom4,
    Force,
    Kelvin,
    Length,
    NonNegative,
    OfThree,
    Positive,
    PressureGPa,
    PressuresGPa,
    Section,
    Three,
)
from magus_anharmonic.settings.training import FinetuneSettings

Share = Annotated[int, Field(ge=0, strict=True)]


class Pressures(Section):
    """Base of the blocks that run at several pressures."""

    pressures: PressuresGPa = Field(description="GPa, ascending")


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


class StageSettings(FinetuneSettings):
    """One entry of ``final.stages``."""

    epochs: Count = Field(100, description="passes through the training set")
    learning_rate: Positive = Field(1.0e-3, lt=1.0, description="of Adam, at the start")
    stress_loss_ratio: NonNegative = Field(1.0, description="weight of the stress loss (GPa)")


def _paper_stages() -> list[StageSettings]:
    return [StageSettings(), StageSettings(force_loss_ratio=0.1, stress_loss_ratio=0.1)]


class MergeSettings(Section):
    """``merge``: one data set from all searches; the distortions of one phase stay on one side."""

    split: Annotated[tuple[Count, Share, Share], OfThree] = Field(
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


class FinalSettings(Section):
    """``final``: the final model, finetuned from the foundation checkpoint on the merged labels
    (Sec. IV A of the paper)."""

    refit_shift: bool = Field(
        True, description="fit the energy shift per species to the training labels first"
    )
    stages: list[StageSettings] = Field(
        default_factory=_paper_stages,
        min_length=1,
        description=(
            "one after the other; the paper's two: force/stress ratios 1, then 0.1. Left out with"
            " foundation: scratch: those of learning.settings.scratch"
        ),
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
    symprec: Length = Field(
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
