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
    Length,
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


class Architecture(Section):
    """Shape of a MatterSim (M3GNet) model; the defaults make a small one (162 k parameters).
    MatterSim-v1.0.0-1M: 3 blocks of 128 units."""

    num_blocks: Count = Field(2, description="message-passing blocks")
    units: Count = Field(64, description="width of atom and edge features")
    cutoff: Length = Field(5.0, description="Angstrom, of the edges")
    threebody_cutoff: Length = Field(
        4.0, description="Angstrom, of the bonds that make angles; at most the cutoff"
    )


class ScratchSettings(Section):
    """``learning.scratch``: the first model with ``checkpoint: scratch``."""

    n_structures: Count = Field(40, description="random crystals labelled in each batch")
    batches: Count = Field(
        3,
        description=(
            "the first as drawn; the crystals of the others are first followed downhill for a few"
            " steps of the model so far; fewer once learning.target_rmse is met"
        ),
    )
    architecture: Architecture = Field(
        default_factory=Architecture, description="shape of the model"
    )
    stages: list[FinetuneSettings] = Field(
        default_factory=lambda: [
            FinetuneSettings(
                epochs=100,
                learning_rate=2.0e-3,
                batch_size=4,
                schedule="cosine",
                force_loss_ratio=0.2,
                stress_loss_ratio=0.02,
                keep="last",
            ),
            FinetuneSettings(
                epochs=20,
                learning_rate=6.0e-4,
                batch_size=8,
                loss="mse",
                schedule="cosine",
                force_loss_ratio=0.01,
                stress_loss_ratio=1.0e-4,
                keep="last",
            ),
        ],
        min_length=1,
        description=(
            "trainings after each other: forces first, then energies; each with the keys of a"
            " stage of a recipe"
        ),
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
            "how structures are chosen; left out with surface: free-energy: uncertain. random:"
            " duplicates kept, as in the paper; uncertain: of the"
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
    scratch: ScratchSettings = Field(
        default_factory=ScratchSettings,
        description="how the first model is made with checkpoint: scratch",
    )
