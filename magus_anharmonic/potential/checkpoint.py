"""Checkpoints in MatterSim's format: find, read, check, identify and save them.

A checkpoint written here is one of MatterSim's with additional keys (``model_id``, ``parent_id``,
``metrics``, ``species``, ``provenance``), which stock ``mattersim`` ignores.
"""

from __future__ import annotations

import difflib
import io
import itertools
import logging
import socket
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from magus_anharmonic.errors import CheckpointError, one_line
from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import raise_machine_error, replacing, seal
from magus_anharmonic.settings import SCRATCH

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MATTERSIM_FILES = {
    "mattersim-v1.0.0-1m": "mattersim-v1.0.0-1M.pth",
    "mattersim-v1.0.0-5m": "mattersim-v1.0.0-5M.pth",
}
MATTERSIM_URL = "https://raw.githubusercontent.com/microsoft/mattersim/main/pretrained_models/"
SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "data"
FALLBACK = "h3s-gpaw-small"

MAX_Z = 94
Cutoff = Annotated[float, Field(ge=1.2, le=20.0)]
"""Angstrom; below, no atom of any matter has two neighbours."""


class _Arguments(BaseModel):
    """Of the architecture, as far as something else could not be evaluated here."""

    model_config = ConfigDict(strict=True, extra="allow")

    max_l: Literal[4] = 4
    max_n: Literal[4] = 4
    max_z: Literal[94] = 94
    units: PositiveInt = 128
    num_blocks: PositiveInt = 3
    cutoff: Cutoff = 5.0
    threebody_cutoff: Cutoff = 4.0

    @field_validator("threebody_cutoff")
    @classmethod
    def _within(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("cutoff", value):
            raise ValueError(f"is supported up to {info.data['cutoff']} Angstrom, the cutoff")
        return value


class _Content(BaseModel):
    """What MatterSim or `save` writes into a checkpoint."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: dict[str, Any]
    model_args: _Arguments
    metrics: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    model_id: str | None = None
    parent_id: str | None = None
    surface: dict[str, Any] | None = None
    species: (
        Annotated[list[Annotated[int, Field(ge=1, le=MAX_Z, strict=True)]], Field(strict=False)]
        | None
    ) = None


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk: where it is, the id of its weights, and where it comes from."""

    path: Path
    model_id: str
    parent_id: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    species: frozenset[int] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def mattersim_folder() -> Path:
    """Where MatterSim keeps the checkpoints it downloads."""
    return Path("~/.local/mattersim/pretrained_models").expanduser()


def shipped() -> list[str]:
    """Names of the checkpoints that come with this package."""
    return sorted(file.stem for file in SHIPPED_FOLDER.glob("*.pth"))


def resolve(name_or_path: str | Path) -> Path:
    """File of a checkpoint: a name MatterSim knows, a name this package ships, or a path.

    MatterSim's checkpoints are downloaded by MatterSim when they are not there yet. Raises
    CheckpointError.
    """
    text = str(name_or_path)
    if text == SCRATCH and not Path(text).is_file():
        raise CheckpointError(
            "checkpoint scratch: stands for new weights, which a search that learns trains first"
            " (MainCalculator and learning: in input.yaml); here give a trained checkpoint"
        )
    file_name = MATTERSIM_FILES.get(text.lower().removesuffix(".pth"))
    if file_name and not Path(text).is_file():
        target = mattersim_folder() / file_name
        return target if target.is_file() else _download(file_name, target)
    if text in shipped():
        return SHIPPED_FOLDER / f"{text}.pth"
    path = Path(text).expanduser()
    if path.is_file():
        return path
    known = [*(name.removesuffix(".pth") for name in MATTERSIM_FILES.values()), *shipped()]
    if path.is_dir():
        problem = "is a folder; give the .pth file in it"
    else:
        near = difflib.get_close_matches(text, known, n=1)
        problem = "does not exist" + (f"; did you mean {near[0]}?" if near else "")
    raise CheckpointError(f"checkpoint {text} {problem} (a path, or one of {', '.join(known)})")


def _download(file_name: str, target: Path) -> Path:
    """MatterSim's own downloader, into a temporary folder first: a broken download leaves no file
    behind."""
    logger.info(
        "checkpoint %s is not in %s: downloading it from %s",
        file_name,
        target.parent,
        MATTERSIM_URL,
    )
    try:
        if not urllib.request.getproxies():
            socket.create_connection(("raw.githubusercontent.com", 443), timeout=10).close()
        from mattersim.utils.download_utils import download_checkpoint

        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            download_checkpoint(file_name, save_folder=folder)
            (Path(folder) / file_name).replace(target)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {file_name} could not be downloaded ({type(error).__name__}): fetch"
            f" {MATTERSIM_URL}{file_name} by hand and put it into {target.parent}, or use the"
            f" checkpoint that is shipped here: {FALLBACK}"
        ) from error
    return target


def read(path: str | Path, device: str = "cpu") -> tuple[torch.nn.Module, dict[str, Any]]:
    """Read a checkpoint: MatterSim's ``M3Gnet`` module with its weights, in evaluation mode, and
    the whole dictionary.

    Raises CheckpointError with the file and the reason when it is missing, truncated, of another
    architecture, not finite, or when its weights are not those that its own ``model_id`` was made
    of.
    """
    content = _load(Path(path), device)
    try:
        _Content.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where, value = ".".join(map(str, first["loc"])), one_line(repr(first["input"]), 40)
        raise CheckpointError(f"checkpoint {path}: {where} = {value}: {first['msg']}") from None
    from mattersim.forcefield.m3gnet.m3gnet import M3Gnet

    try:
        module = M3Gnet(device=device, **content["model_args"]).to(device)
        module.load_state_dict(content["model"], strict=True)
    except Exception as error:  # torch and MatterSim raise their own for what does not fit
        raise_machine_error(error, path)
        reason = one_line(error, 200)
        raise CheckpointError(
            f"checkpoint {path} does not fit MatterSim's M3GNet architecture: {reason}"
        ) from error
    broken = [
        name for name, value in module.state_dict().items() if not bool(value.isfinite().all())
    ]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} holds weights that are not finite ({broken[0]} and"
            f" {len(broken) - 1} more)"
        )
    _check_identity(path, module, content)
    return module.eval(), content


def _check_identity(path: str | Path, module: torch.nn.Module, content: Mapping[str, Any]) -> None:
    """Weights that changed after they were saved still load, and give other numbers: only the
    stored id tells."""
    stored = content.get("model_id")
    # Another version of MatterSim may tell more arguments than the one that saved the file.
    if stored is None or stored in (
        model_id(module, arguments) for arguments in (None, content["model_args"])
    ):
        return
    raise CheckpointError(
        f"checkpoint {path}: its weights or cutoffs are those of model {model_id(module)}, not of"
        f" model {stored} as it says itself: damaged or changed since it was saved; take another"
        " copy. If they were changed on purpose, delete its keys model_id and error_model"
    )


def _load(path: Path, device: str) -> dict[str, Any]:
    import torch

    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise_machine_error(error, path)
        reason = one_line(error, 160)
        raise CheckpointError(
            f"checkpoint {path} cannot be read (truncated, or no checkpoint at all): {reason}"
        ) from error
    if not isinstance(content, dict) or not {"model_name", "model", "model_args"} <= {*content}:
        raise CheckpointError(
            f"checkpoint {path} is not in MatterSim's format: no model_name, model or model_args"
        )
    if str(content["model_name"]).lower() != "m3gnet":
        raise CheckpointError(
            f"checkpoint {path} is of the architecture {content['model_name']}; only m3gnet is"
            " supported"
        )
    return content


def describe(path: str | Path) -> Model:
    """Id, parent, metrics and species of a checkpoint; raises CheckpointError."""
    module, content = read(path)
    return Model(
        Path(path),
        model_id(module),
        content.get("parent_id"),
        content.get("metrics") or {},
        species_of(content),
        content.get("provenance") or {},
    )


def species_of(content: Mapping[str, Any]) -> frozenset[int] | None:
    """Atomic numbers of the data behind a checkpoint that `read` returned, or None when it does not
    say."""
    species = content.get("species")
    return None if not species else frozenset(species)


def model_id(module: torch.nn.Module, arguments: Mapping[str, Any] | None = None) -> str:
    """Twelve hex digits of the weights and the architecture; the same on every device and in
    float64.

    arguments : of the architecture, instead of those that the installed MatterSim tells.
    """
    weights = (
        (name, value.detach().to("cpu").float().numpy())
        for name, value in sorted(module.state_dict().items())
    )
    return digest(dict(arguments or _arguments(module)), *itertools.chain.from_iterable(weights))


def _arguments(module: Any) -> dict[str, Any]:
    return dict(module.get_model_args())


def save(
    module: torch.nn.Module,
    path: str | Path,
    *,
    parent_id: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    species: Iterable[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
    description: str = "",
    **extra: Any,
) -> Model:
    """Write a checkpoint in MatterSim's format, whole or not at all.

    module
        MatterSim's ``M3Gnet``. ``metrics``, ``provenance`` and ``extra`` may hold plain Python
        values and tensors only.
    species
        Atomic numbers that the training data hold, of the parent's too.
    """
    import torch
    from torch_ema import ExponentialMovingAverage

    # last_epoch stays -1: stock MatterSim continues counting there, and would train no epoch at all
    # otherwise.
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=1e-7)
    identity = model_id(module)
    numbers = None if species is None else sorted(int(number) for number in species)
    content = {
        "model_name": "m3gnet",
        "model": {
            name: value.detach().to("cpu").float() for name, value in module.state_dict().items()
        },
        "model_args": _arguments(module),
        "optimizer": optimizer.state_dict(),
        "ema": ExponentialMovingAverage(module.parameters(), decay=0.99).state_dict(),
        "scheduler": (
            torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.95).state_dict()
        ),
        "last_epoch": -1,
        "validation_metrics": {"loss": 10000000.0},
        "description": description,
        "model_id": identity,
        "parent_id": parent_id,
        "metrics": _plain(metrics or {}),
        "species": numbers,
        "provenance": _plain(provenance or {}),
        **{key: _plain(value) for key, value in extra.items()},
    }
    write_torch(path, content)
    return Model(
        Path(path),
        identity,
        parent_id,
        content["metrics"],
        species_of(content),
        content["provenance"],
    )


def write_torch(path: str | Path, content: Mapping[str, Any], sealed: bool = False) -> None:
    """``torch.save`` whole or not at all; the same content gives the same bytes. ``sealed``: to be
    read by `unsealed`. Raises OSError where the disk is full."""
    import torch

    # Through memory: torch's own writer hides the disk's error and puts the name of the temporary
    # file into the archive.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if sealed:
            seal(temporary)


def _plain(value: Any) -> Any:
    """NumPy values as Python's own, because a safe load accepts nothing else."""
    import torch

    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor) or not hasattr(value, "tolist"):
        return str(value) if isinstance(value, Path) else value
    return value.tolist()
