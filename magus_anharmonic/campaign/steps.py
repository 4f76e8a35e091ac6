"""Steps, what they depend on, their records, and what they share.

Which steps a campaign has, in which order, what each depends on, and the hash by which a finished
one is known again.

``steps.json``: what is known of every step of a campaign; one process writes it, any process reads
    it.

What every step works with: folders, settings, models, the labeler; and what it hands back.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ase import Atoms

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import digest, safe_name, versions
from magus_anharmonic.io.files import reading_table, remove, replacing_table, write_json
from magus_anharmonic.io.tables import write
from magus_anharmonic.labelers import get_labeler
from magus_anharmonic.runs.folder import CampaignFolder
from magus_anharmonic.runs.record import StepRecord, read_steps
from magus_anharmonic.settings.campaign import CampaignSettings
from magus_anharmonic.structures import stripped
from magus_anharmonic.units import GPa

if TYPE_CHECKING:
    from magus_anharmonic.evaluator import Evaluator


@dataclass(frozen=True)
class Step:
    """A unit of work with a folder of its own name.

    needs : steps whose results it reads; settings : everything of the campaign file that its result
    depends on; cycle : of learning, from 1; pressure : GPa.
    """

    id: str
    kind: str
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    pressure: GPa | None = None
    cycle: int = 1


def at(name: str, pressure: GPa) -> str:
    """``learn-075GPa``, ``produce-112.5GPa``."""
    return f"{name}-{pressure:03g}GPa" if pressure == int(pressure) else f"{name}-{pressure:g}GPa"


def phase_folder(phase: str, pressure: GPa) -> str:
    """``Im-3m-060GPa``: a phase at a pressure, below the folder of a step."""
    return at(safe_name(phase), pressure)


def _cycled(name: str, cycle: int) -> str:
    return name if cycle == 1 else f"{name}-cycle{cycle}"


def plan(settings: CampaignSettings, cycles: int = 1) -> list[Step]:
    """The steps in the order in which they run; ``cycles``: of learning, as many as are known to be
    needed."""
    steps: list[Step] = []
    for cycle in range(1, cycles + 1):
        steps += learning_steps(settings, cycle)
    model = (_cycled("final", cycles),) if settings.learning else ()
    steps += _productions(settings, model)
    steps += _static_steps(settings, model)
    steps += _quantum_steps(settings, model)
    return [
        *steps,
        Step(
            "report",
            "report",
            tuple(step.id for step in steps),
            {"figures": settings.figures.model_dump(mode="json")},
        ),
    ]


def learning_steps(settings: CampaignSettings, cycle: int) -> list[Step]:
    """Searches that learn, merge and final model of one cycle."""
    learning = settings.learning
    if learning is None:
        return []
    foundation = _foundation(settings)
    before = (_cycled("final", cycle - 1),) if cycle > 1 else ()
    searches: list[Step] = []
    for p in learning.pressures:
        given = settings.learning_search(p, "foundation", cycle)
        own = {**foundation, "input": given, "host": settings.host}
        searches.append(Step(_cycled(at("learn", p), cycle), "learn", before, own, p, cycle))
        if settings.from_scratch and cycle == 1:
            before = (searches[-1].id,)
    earlier = tuple(_cycled(at("learn", p), c) for c in range(1, cycle) for p in learning.pressures)
    merge = settings.merge.model_dump(mode="json") | {
        "seed": settings.seed,
        "dataset_digest": file_digest(settings.merge.dataset),
    }
    final = settings.final.model_dump(mode="json") | {
        "stages": [stage.model_dump(mode="json") for stage in settings.final_stages]
    }
    if settings.from_scratch:
        final["architecture"] = settings.scratch.architecture.model_dump(mode="json")
    own = tuple(step.id for step in searches)
    return [
        *searches,
        Step(_cycled("merge", cycle), "merge", (*earlier, *own), merge, cycle=cycle),
        Step(
            _cycled("final", cycle),
            "final",
            (_cycled("merge", cycle),),
            {**foundation, "final": final, "seed": settings.seed},
            cycle=cycle,
        ),
    ]


def _foundation(settings: CampaignSettings) -> dict[str, Any]:
    return {"foundation": foundation_digest(settings.foundation)}


def _productions(settings: CampaignSettings, model: tuple[str, ...]) -> list[Step]:
    if settings.produce is None:
        return []
    given = {"phases": _phases(settings), **({} if model else _foundation(settings))}
    return [
        Step(
            at("produce", p),
            "produce",
            model,
            {**given, "input": settings.production_search(p, "final"), "host": settings.host},
            p,
        )
        for p in settings.produce.pressures
    ]


def productions(settings: CampaignSettings) -> tuple[str, ...]:
    """Ids of the production searches."""
    return tuple(at("produce", p) for p in (settings.produce.pressures if settings.produce else []))


def nearest_production(settings: CampaignSettings, pressure: GPa) -> str:
    """The production search at the pressure nearest to ``pressure`` (GPa); the lower one of two."""
    pressures = settings.produce.pressures if settings.produce else []
    return at("produce", min(pressures, key=lambda p: (abs(p - pressure), p)))


def _static_steps(settings: CampaignSettings, model: tuple[str, ...]) -> list[Step]:
    steps = []
    shared = {"calculator": dict(settings.calculator), "phases": _phases(settings)}
    if settings.foundation_check is not None:
        check = settings.foundation_check
        needs = (nearest_production(settings, check.pressure),)
        own = {**shared, **_foundation(settings), **check.model_dump(mode="json")}
        steps.append(
            Step(at("foundation", check.pressure), "foundation", needs, own, check.pressure)
        )
    if settings.relax is not None:
        own = {**shared, **settings.relax.model_dump(mode="json")}
        steps.append(Step("relax", "relax", (*model, *productions(settings)), own))
    return steps


def _quantum_steps(settings: CampaignSettings, model: tuple[str, ...]) -> list[Step]:
    steps = []
    labeler = None if settings.labeler is None else settings.labeler.model_dump(mode="json")
    if settings.sscha is not None:
        shared = {
            "sscha": settings.sscha.settings,
            "calculator": dict(settings.calculator),
            "seed": settings.seed,
        }
        for p in settings.sscha.pressures:
            steps.append(
                Step(at("sscha", p), "sscha", (*model, nearest_production(settings, p)), shared, p)
            )
        if settings.dft is not None:
            own = {**settings.dft.model_dump(mode="json"), "labeler": labeler}
            steps.append(
                Step("dft", "dft", tuple(at("sscha", p) for p in settings.sscha.pressures), own)
            )
    needs = (
        *model,
        *(
            (productions(settings))
            if any(phase.structure is None for phase in settings.phases)
            else ()
        ),
    )
    if settings.hessian is not None:
        own = {
            **settings.hessian.model_dump(mode="json"),
            "phases_given": _phases(settings),
            "labeler": labeler,
            "seed": settings.seed,
        }
        given = {} if model else _foundation(settings)
        steps.append(Step("hessian", "hessian", needs, {**given, **own}))
    if settings.errors is not None:
        own = {**settings.errors.model_dump(mode="json"), "labeler": labeler, "seed": settings.seed}
        steps.append(Step("errors", "errors", ("hessian",), own))
    return steps


def _phases(settings: CampaignSettings) -> list[dict[str, Any]]:
    return [
        {**phase.model_dump(mode="json"), "structure": file_digest(phase.structure)}
        for phase in settings.phases
    ]


def step_key(step: Step, records: Mapping[str, StepRecord]) -> str | None:
    """12 hex digits over the step's settings and the keys and outputs of what it needs; None while
    one of those is not done."""
    needed = []
    for name in step.needs:
        record = records.get(name)
        if record is None or record.status != "done":
            return None
        needed.append([name, record.key, record.output])
    return digest([versions(), step.kind, step.settings, step.pressure, needed])


@cache
def file_digest(path: str | None) -> str | None:
    """12 hex digits over the content of a file; the name itself when it is no file."""
    return path if path is None or not Path(path).is_file() else digest(Path(path))


def foundation_digest(name: str) -> str | None:
    """Of the foundation's file, so that a shipped checkpoint that changed is another one;
    MatterSim's own names stand for themselves."""
    shipped = Path(__file__).resolve().parents[1] / "data" / f"{name}.pth"
    return file_digest(str(shipped if shipped.is_file() else name))


def read_records(folder: Path) -> dict[str, StepRecord]:
    """The records in ``folder`` by step, in the order of the campaign; none when it has not begun.
    Raises ``InputError``."""
    file = CampaignFolder(folder).steps
    if not file.is_file():
        return {}
    return read_steps(file)


def write_records(folder: Path, records: dict[str, StepRecord]) -> None:
    """Write all records atomically."""
    write_json(
        CampaignFolder(folder).steps, {step: asdict(record) for step, record in records.items()}
    )


FOLDER = "campaign"
FINAL = Path("final") / "final.pth"


@dataclass(frozen=True)
class Outcome:
    """What a step did. ``output`` identifies its result; ``failures`` are (id, reason) of
    structures that it gave up."""

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
    def foundation(self) -> Evaluator | None:
        """The model that everything started from; None from scratch."""
        return None if self.settings.from_scratch else self.model(self.settings.foundation)

    @contextmanager
    def labeler(self, folder: Path) -> Iterator[Any]:
        """The labeler of the campaign, its scratch files below ``folder``; its processes end with
        the block."""
        if self.settings.labeler is None:
            raise InputError("labeler: this step needs DFT; give the block labeler")
        labeler = get_labeler(self.settings.labeler, folder / "labeling")
        try:
            yield labeler
        finally:
            labeler.close()


# --- tables: every step writes its own part, ``tables/`` is the parts of all finished ones --------

Row = TypeVar("Row")
STRUCTURES = "structures.extxyz"


def write_part(folder: Path, table: type[Row], rows: Iterable[Row], name: str = "") -> None:
    """Write the rows of one step to ``folder/tables/`` atomically, row by row; ``name``: of the
    file, where that is not the table's own."""
    write(table, folder / "tables" / (name or table.FILE), rows)  # type: ignore[attr-defined]


def assemble(target: Path, folders: Sequence[Path], inside: str = "tables") -> None:
    """Make ``target`` (``campaign/tables``) from the parts in the ``folders`` of finished steps;
    tables without a part are removed.

    ``inside``: where the parts are in each folder.

    Streams line by line, whatever the number of structures.
    """
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        for part in sorted([*(folder / inside).glob("*.csv"), *(folder / inside).glob(STRUCTURES)]):
            parts.setdefault(part.name, []).append(part)
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.iterdir():
        if stale.name not in parts and stale.suffix in (".csv", ".extxyz"):
            remove(stale)
    for name, files in parts.items():
        _concatenate(target / name, files, header=name.endswith(".csv"))


def _concatenate(target: Path, files: Sequence[Path], header: bool) -> None:
    with replacing_table(target) as temporary, temporary.open("wb") as output:
        for number, file in enumerate(files):
            with reading_table(file) as part:
                first = part.readline() if header else b""
                if number == 0:
                    output.write(first)
                shutil.copyfileobj(part, output)


class StructureFile:
    """``structures.extxyz`` of one step: the structures of its tables, written one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        remove(self.path)
        self.n = 0

    def add(self, atoms: Atoms, name: str, space_group: str, pressure: GPa, kind: str) -> None:
        """One structure (``kind``: static or centroids)."""
        from ase.io import write

        frame = stripped(atoms)
        frame.info = {
            "id": name,
            "space_group": space_group,
            "pressure_GPa": float(pressure),
            "kind": kind,
        }
        write(self.path, frame, format="extxyz", append=True)
        self.n += 1


@contextmanager
def structure_file(folder: Path) -> Iterator[StructureFile]:
    """The structures of a step, there when the block has ended well."""
    with replacing_table(folder / "tables" / STRUCTURES) as temporary:
        file = StructureFile(temporary)
        temporary.touch()
        yield file
