"""What every step works with: folders, settings, models, the labeler; and what it hands back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms

from magus_anharmonic.campaign.plan import Step
from magus_anharmonic.campaign.tables import STRUCTURES
from magus_anharmonic.errors import InputError
from magus_anharmonic.files import remove, replacing
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.settings.campaign import CampaignSettings
from magus_anharmonic.structures import bare

if TYPE_CHECKING:
    from magus_anharmonic.evaluator import Evaluator

FOLDER = "campaign"
FINAL = Path("final") / "final.pth"


@dataclass(frozen=True)
class Outcome:
    """What a step did. ``output`` identifies its result; ``failures`` are (id, reason) of structures that it gave up."""

    n_structures: int = 0
    n_evaluations: int = 0
    n_labels: int = 0
    output: str = ""
    reason: str = ""
    failures: Sequence[tuple[str, str]] = ()


@dataclass
class Context:
    """One campaign in ``root`` (``PATH/campaign``)."""

    settings: CampaignSettings
    root: Path
    _models: dict[str, Any] = field(default_factory=dict)

    def folder(self, step: Step | str) -> Path:
        """Where a step leaves what it makes; the cycles of the final model share one folder."""
        name = step if isinstance(step, str) else step.id
        return self.root / ("final" if name.startswith("final-cycle") else name)

    def move_away(self, folder: Path) -> None:
        """Move the folder of a step to ``superseded/<step>-<number>``."""
        if not folder.exists():
            return
        target, number = self.root / "superseded", 1
        target.mkdir(exist_ok=True)
        while (target / f"{folder.name}-{number}").exists():
            number += 1
        folder.rename(target / f"{folder.name}-{number}")

    @property
    def final_checkpoint(self) -> str:
        """The model of the second stage: the finetuned one, or without learning the foundation."""
        return str(self.root / FINAL) if self.settings.learning else self.settings.foundation

    def model(self, checkpoint: str) -> Evaluator:
        """A loaded checkpoint, kept for the steps to come."""
        from magus_anharmonic.potential import load

        path = Path(checkpoint)
        name = f"{checkpoint} {path.stat().st_mtime_ns if path.is_file() else ''}"
        if name not in self._models:
            self._models = {name: load(checkpoint, device=self.settings.device)}
        return self._models[name]

    @property
    def final_model(self) -> Evaluator:
        """See `final_checkpoint`."""
        return self.model(self.final_checkpoint)

    @property
    def foundation(self) -> Evaluator:
        """The model that everything started from."""
        return self.model(self.settings.foundation)

    @contextmanager
    def labeler(self, folder: Path) -> Iterator[Any]:
        """The labeler of the campaign, its scratch files below ``folder``; its processes end with the block."""
        if self.settings.labeler is None:
            raise InputError("labeler: this step needs DFT; give the block labeler")
        labeler = get_labeler(self.settings.labeler, folder / "labeling")
        try:
            yield labeler
        finally:
            labeler.close()


class StructureFile:
    """``structures.extxyz`` of one step: the structures of its tables, written one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        remove(self.path)
        self.n = 0

    def add(self, atoms: Atoms, name: str, space_group: str, pressure: float, kind: str) -> None:
        """One structure (``kind``: static or centroids)."""
        from ase.io import write

        frame = bare(atoms)
        frame.info = {"id": name, "space_group": space_group, "pressure_GPa": float(pressure), "kind": kind}
        write(self.path, frame, format="extxyz", append=True)
        self.n += 1


@contextmanager
def structure_file(folder: Path) -> Iterator[StructureFile]:
    """The structures of a step, there when the block has ended well."""
    with replacing(folder / "tables" / STRUCTURES) as temporary:
        file = StructureFile(temporary)
        temporary.touch()
        yield file
