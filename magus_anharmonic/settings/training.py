"""Keys of training: those of `learning`, and of one stage of a recipe or of a campaign."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from magus_anharmonic.settings.calculators import LabelerSettings
from magus_anharmonic.settings.section import (
    Count,
    Energy,
    In,
    InsidePath,
    NonNegative,
    Positive,
    Section,
    Three,
)


class TrainingKeys(Section):
    """What every training has: steps and loss."""

    epochs: Count = Field(50, description="passes through the training set")
    learning_rate: Positive = Field(2.0e-4, lt=1.0, description="of Adam, at the start")
    batch_size: Count = Field(8, description="structures per step")
    loss: Literal["huber", "mse"] = Field(
        "huber", description="Huber with delta 0.01, or mean square"
    )
    force_loss_ratio: NonNegative = Field(1.0, description="weight of the force loss (eV/A)")
    stress_loss_ratio: NonNegative = Field(0.1, description="weight of the stress loss (GPa)")


class FinetuneSettings(TrainingKeys):
    """One training stage."""

    schedule: Literal["step", "cosine"] = Field(
        "step",
        description=(
            "step: x 0.95 every 10 epochs, as MatterSim; cosine: to 1 % of the learning rate at the"
            " last epoch"
        ),
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="of the averaged weights that are validated and kept"
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description=(
            "best: the lowest validation loss, the start included; last: the averaged weights at"
            " the end, whatever they are"
        ),
    )
    patience: Count | None = Field(
        None, description="stop after so many epochs without improvement; left out: never"
    )


class LearningSettings(TrainingKeys):
    """``learning``: choose, distort, label, finetune after each generation (Secs. III A and IV A of
    the paper)."""

    labeler: LabelerSettings = Field(description="the DFT code and its settings")
    required: bool = Field(
        True,
        description="false: where the labeler is not installed, run without learning and say so",
    )
    select: Literal["random", "uncertain", "diverse", "sscha"] = Field(
        "random",
        description=(
            "how structures are chosen. random: duplicates kept, as in the paper; uncertain: of the"
            " lowest distinct ones (10 n_sample) those with the largest expected error, at random"
            " while the model has no error estimate; diverse: those farthest from one another and"
            " from the labels in the model's features; sscha: configurations (n_sample x n_perturb)"
            " of the SSCHA ensembles of the candidates whose order is undecided, where they narrow"
            " the differences of G most, and distorted structures for validation and test; at"
            " random while there are none (needs sscha.when: every_generation)"
        ),
    )
    n_sample: Count = Field(10, description="structures chosen per generation")
    n_perturb: Count = Field(10, description="distortions of each")
    atom_displacement: Annotated[NonNegative, In("A")] = Field(
        0.05, le=1.0, description="Angstrom, random direction, fixed length"
    )
    strain: NonNegative = Field(
        0.05, le=0.3, description="six components uniform in [-strain, +strain]"
    )
    n_replay: Annotated[int, Field(ge=0, strict=True)] = Field(
        100, description="structures drawn from the previous training set"
    )
    split: Three = Field(
        (8, 1, 1),
        description=(
            "train : validation : test in every generation, by whole phases, at least one structure"
            " each"
        ),
    )
    target_rmse: Energy | None = Field(
        None,
        description=(
            "eV/atom on the search's own validation labels: the model counts as converged below it"
        ),
    )
    dataset: InsidePath | None = Field(
        None,
        description=(
            "earlier labels of the same DFT settings, for replay: extxyz, or a shipped checkpoint's"
            " name"
        ),
    )
