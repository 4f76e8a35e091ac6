"""The file ``<out>.state`` of a training that is under way: all that it needs to go on after an epoch, used whole or not at all."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from magus_anharmonic.errors import DamagedFile
from magus_anharmonic.potential.checkpoint import write_torch
from magus_anharmonic.potential.memory import raise_trouble_of_torch
from magus_anharmonic.potential.score import Scores
from magus_anharmonic.potential.trainer import Trainer


@dataclass(frozen=True)
class Epoch:
    """One line of the history; ``epoch`` 0 is the model before training, and has no ``train_loss``."""

    epoch: int
    learning_rate: float
    train_loss: float | None
    validation: Scores
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Epoch:
        """Inverse of `as_dict`."""
        return cls(**{**data, "validation": Scores(**data["validation"])})


@dataclass(frozen=True)
class TrainingState:
    """``key`` names the inputs; ``trainer`` is `Trainer.state`, ``best_state`` the weights of ``best_epoch``."""

    key: str
    trainer: dict[str, Any]
    best_epoch: int
    best_state: dict[str, torch.Tensor]
    history: list[Epoch]


def write_state(path: Path, state: TrainingState) -> None:
    """Whole or not at all; raises OSError where the disk is full."""
    content = {**vars(state), "history": [epoch.as_dict() for epoch in state.history]}
    write_torch(path, {**content, "digest": _digest(content)})


def read_state(path: Path, trainer: Trainer, key: str) -> TrainingState | None:
    """The state in a file, which ``trainer`` can surely restore; None when it belongs to other inputs than ``key``.

    Raises DamagedFile when it is not readable, not what `write_state` wrote, or does not fit ``trainer``, which is never changed;
    troubles of the disk and of memory as they are.
    """
    try:
        content = torch.load(path, map_location=next(trainer.module.parameters()).device, weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged file
        raise_trouble_of_torch(error, path)
        raise DamagedFile(f"not readable: {error}") from None
    if not isinstance(content, dict) or "key" not in content:
        raise DamagedFile("it holds no state of a training")
    if content["key"] != key:
        return None
    # torch restores halves of a state, and bits that changed, without a word
    if content.pop("digest", None) != _digest(content):
        raise DamagedFile("it is not as it was written")
    try:
        state = TrainingState(**{**content, "history": [Epoch.from_dict(epoch) for epoch in content["history"]]})
        Trainer(copy.deepcopy(trainer.module), trainer.settings).restore(copy.deepcopy(state.trainer))
    except Exception as error:  # of another version of this package or of torch, each part of which raises its own
        raise_trouble_of_torch(error, path)
        raise DamagedFile(f"it does not fit: {type(error).__name__}: {error}") from None
    return state


def _digest(value: Any) -> str:
    """The same for equal contents, also after they were saved, loaded and brought to another device."""
    if isinstance(value, Mapping):
        text = "mapping " + "".join(sorted(f"{name!r}:{_digest(item)}" for name, item in value.items()))
    elif isinstance(value, list | tuple):
        text = "list " + "".join(map(_digest, value))
    elif isinstance(value, torch.Tensor):
        array = value.detach().cpu().numpy()
        return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
    else:
        text = f"{type(value).__name__} {value!r}"
    return hashlib.sha256(text.encode()).hexdigest()
