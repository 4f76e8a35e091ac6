"""Keys of training: those of `learning`, and of one stage of a recipe or of a campaign."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from magus_anharmonic.settings.section import Count, NonNegative, Positive, Section


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
