"""``run.json``: what a run was started with, written before its first step, and read before it is
continued. How far it is: ``search.json`` of a search, ``steps.json`` of a campaign, and what is
left of a work at its pace. ``failures.jsonl``: everything that went wrong, with its reason.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import magus_anharmonic
from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.io.digests import digest, time_stamp, versions
from magus_anharmonic.io.files import append_jsonl, read_as, read_jsonl, write_json
from magus_anharmonic.runs.folder import SearchFolder
from magus_anharmonic.settings import Settings
from magus_anharmonic.units import time_left

logger = logging.getLogger(__name__)


PACKAGES = (
    "magus-anharmonic",
    "torch",
    "mattersim",
    "ase",
    "ase-ga",
    "python-sscha",
    "cellconstructor",
    "numpy",
    "scipy",
    "spglib",
    "vesin",
    "pyxtal",
    "pydantic",
    "gpaw",
    "gpaw-data",
    "magus-kit",
    "magus",
)

_MEND = "bring an undamaged copy back, or move the folder away and start anew"


class RecordedSettings(BaseModel):
    """Settings as they were resolved; those that somebody reads by name. ``host``: the keys of a
    search's host, of a campaign the name of it."""

    model_config = ConfigDict(extra="allow")

    host: dict[str, Any] | str = {}
    num_gen: int | None = None
    learning: dict[str, Any] | None = None
    sscha: dict[str, Any] | None = None


class RunRecord(BaseModel):
    """What a run was started with.

    ``host`` : magus or embedded; ``start`` : digest of the start of a ranking; ``earlier_starts`` :
    the records before it, the oldest first. What else `write_run_record` writes is kept.
    """

    model_config = ConfigDict(extra="allow")

    version: str
    seed: int | None = None
    model: str | None = None
    settings: RecordedSettings = RecordedSettings()
    host: str | None = None
    command: str = "magus search"
    start: Any = None
    labeler_settings_hash: str | None = None
    earlier_starts: list[dict[str, Any]] = []


class SearchState(BaseModel):
    """``search.json``: the last finished generation, and the volume ratio for the next."""

    finished: int
    volume_ratio: float


@dataclass(frozen=True)
class StepRecord:
    """One step of a campaign. ``wall_s`` sums up all sittings; ``key`` is the hash of what the
    result holds for; ``output`` identifies the result."""

    status: Literal["open", "running", "done", "failed"]
    kind: str = ""
    pressure_GPa: float | None = None
    started: str = ""
    finished: str = ""
    wall_s: float = 0.0
    n_structures: int = 0
    n_evaluations: int = 0
    n_labels: int = 0
    reason: str = ""
    key: str = ""
    output: str = ""

    def changed(self, **values: Any) -> StepRecord:
        """A copy with other values."""
        return replace(self, **values)


def read_steps(file: Path) -> dict[str, StepRecord]:
    """The steps of a campaign's ``steps.json``, in its order; raises ``DamagedFile``."""
    return read_as(dict[str, StepRecord], file, "move it away and run the campaign again")


def package_versions() -> dict[str, str | None]:
    """Installed version of every package that touches a number; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["magus-anharmonic"] = magus_anharmonic.__version__
    return versions


def settings_hash(settings: BaseModel) -> str:
    """12 hexadecimal digits over the resolved settings; the order of keys does not matter."""
    return digest(settings.model_dump(mode="json"))


def write_run_record(
    path: str | Path,
    settings: BaseModel,
    *,
    seed: int,
    model_id: str | None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of one start to ``path`` (a folder, then ``run.json`` in it, or the file)
    and return it.

    An existing record is kept: its fields move to the list ``earlier_starts``, the oldest first.
    """
    file = record_file(path)
    earlier: list[dict[str, Any]] = []
    if file.exists():
        previous = read_run_record(file).model_dump(exclude_unset=True)
        earlier = [*previous.pop("earlier_starts", []), previous]
    record = {
        "version": magus_anharmonic.__version__,
        **versions(),
        "started": time_stamp(),
        "seed": seed,
        "model": model_id,
        "settings_hash": settings_hash(settings),
        "settings": settings.model_dump(mode="json"),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        **(extra or {}),
        "earlier_starts": earlier,
    }
    write_json(file, record)
    return record


def read_run_record(path: str | Path, required: Iterable[str] = ()) -> RunRecord:
    """The record in ``path`` (folder or file).

    Raises ``InputError`` that names file and field: not a record, a ``required`` field is missing,
    or a field is not what it should be.
    """
    file = record_file(path)
    record = read_as(RunRecord, file, _MEND)
    for field in required:
        if field not in record.model_fields_set:
            raise InputError(f"{file}: damaged: no {field}; {_MEND}")
    return record


def check_results_version(directory: str | Path) -> None:
    """Refuse to continue in a results folder whose files or numbers are those of another version
    (`digests.SCHEMA`, `digests.PHYSICS`).

    A folder without a record is new: fine. Raises ``InputError`` that names folder and both
    versions.
    """
    file = record_file(directory)
    if not file.exists():
        return
    record = read_run_record(file)
    version, now = record.version, magus_anharmonic.__version__
    before = {name: (record.model_extra or {}).get(name, 0) for name in versions()}
    if before != versions() or version.split(".")[:2] != now.split(".")[:2]:
        raise InputError(
            f"{file.parent}: written by magus-anharmonic {version}, this is {now} ({_said(before)};"
            f" now {_said(versions())}): its numbers are not those of now. report and status read"
            " it; to go on take the version that wrote it, or move it away and start anew"
        )


def _said(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


FIXED_KEYS = ("pressure", "symbols", "formula_type", "seed", "formula")


def check_continues(directory: str | Path, settings: Settings, host: str) -> None:
    """Look whether ``settings`` can go on with the search in ``directory``; keys that changed are
    named in a warning.

    Raises ``InputError``: there is no search of ours, another ``host`` (magus, embedded) made it,
    or a key changed on which the structures found so far depend.
    """
    file = record_file(directory)
    if not file.exists():
        raise InputError(
            f"-r: the search in {file.parent.parent} was started without this package: its"
            " enthalpies are not MatterSim's, and would be replaced. Start without -r; its"
            " structures, copied to Seeds/seeds_1.traj, are relaxed again as seeds"
        )
    record = read_run_record(file, ("seed", "settings"))
    if record.host != host:
        raise InputError(
            f"-r: the search in {file.parent.parent} was made by host {record.host!r}, this is host"
            f" {host!r}: their generations differ; go on with"
            f" {_COMMANDS.get(str(record.host), 'the command that made it')}, or start without -r"
        )
    before = record.settings.model_dump(exclude_unset=True) | {"seed": record.seed}
    now = settings.model_dump(mode="json")
    now["seed"] = record.seed if now["seed"] is None else now["seed"]
    old, new = before.pop("host", {}), now.pop("host")
    changed = list(_differences("", before | old, now | new))
    if any(path in FIXED_KEYS for path, _, _ in changed):
        raise InputError(
            *(
                f"{key}: {is_now!r} but the search was started with {was!r}; start anew without -r"
                for key, was, is_now in changed
                if key in FIXED_KEYS
            )
        )
    for path, *values in changed:
        is_now, was = (one_line(repr(value), 80) for value in reversed(values))
        logger.warning("%s: %s, but the search was started with %s", path, is_now, was)


_COMMANDS = {
    "magus": "magus search -r (or magus-anharmonic search -r --host magus)",
    "embedded": "magus-anharmonic search -r --host embedded",
}


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Path of every key below ``path`` that changed, and both its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(f"{path}.{key}".lstrip("."), before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def record_file(path: str | Path) -> Path:
    """``path`` itself when it names a .json file, else ``path/run.json``."""
    target = Path(path)
    return target if target.suffix == ".json" else SearchFolder(target).record


_NOT_IDENTITY = ("time", "cell", "positions")


def record_failure(folder: str | Path, stage: str, reason: str, **what: Any) -> None:
    """Append one failure to ``folder/failures.jsonl``; see `record_failures`."""
    record_failures(folder, stage, [{**what, "reason": reason}])


def record_failures(folder: str | Path, stage: str, failures: Sequence[dict[str, Any]]) -> None:
    """Append failures to ``folder/failures.jsonl``.

    stage : label, relaxation, sscha, run; each failure has a ``reason`` and what names the piece of
    work (generation, id, ...). One that a restarted run meets again, with the same reason, is not
    recorded twice; one of the stage run is, with its time.
    """
    known = (
        set()
        if stage == "run" or not failures
        else {digest(identity(record)) for record in read_failures(folder)}
    )
    now = time_stamp()
    new = [
        record
        for failure in failures
        if digest(identity(record := {"stage": stage, **failure, "time": now})) not in known
    ]
    if new:
        append_jsonl(SearchFolder(folder).failures, *new)


def read_failures(folder: str | Path) -> list[dict[str, Any]]:
    """All recorded failures, the oldest first."""
    return read_jsonl(SearchFolder(folder).failures)


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """What makes two records the same failure."""
    return {key: value for key, value in record.items() if key not in _NOT_IDENTITY}


class Progress:
    """A work of ``total`` pieces of which ``done`` were there before it began; ``interval``:
    seconds between two lines of progress."""

    def __init__(self, total: float, done: float = 0.0, interval: float = 0.0) -> None:
        self.total, self._before, self._interval = total, done, interval
        self._began = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._began

    def due(self) -> bool:
        """Whether the next line of progress may be said; it counts as said then."""
        now = time.monotonic()
        if now - self._told < self._interval:
            return False
        self._told = now
        return True

    def left(self, done: float, rest: float | None = None, separator: str = "; ") -> str:
        """``"; about 3 min left"`` when ``done`` pieces are done and ``rest`` (None: all others)
        are not; empty where that cannot be told."""
        rest = self.total - done if rest is None else rest
        text = time_left(self.seconds, done - self._before, rest)
        return f"{separator}{text}" if text else ""
