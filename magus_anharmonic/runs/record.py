"""``run.json``: what a run was started with, written before its first step, and read before it is
continued."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import magus_anharmonic
from magus_anharmonic.errors import DamagedFile, InputError, one_line
from magus_anharmonic.io.digests import digest, to_json, versions
from magus_anharmonic.io.files import read_json, write_json
from magus_anharmonic.settings import Settings

logger = logging.getLogger(__name__)

NAME = "run.json"


@dataclass(frozen=True)
class CampaignFolder:
    """The files of a campaign (``PATH/campaign``)."""

    root: Path

    @classmethod
    def find(cls, path: str | Path) -> CampaignFolder | None:
        """The campaign in a folder, below it or the folder itself; None where it holds none. Raises
        ``InputError``: no such folder."""
        given = Path(path)
        if not given.is_dir():
            raise InputError(f"{given}: no such folder")
        found = (cls(one) for one in (given / "campaign", given))
        return next((one for one in found if one.steps.is_file() or one.tables.is_dir()), None)

    @property
    def steps(self) -> Path:
        """What is known of every step."""
        return self.root / "steps.json"

    @property
    def record(self) -> Path:
        """What it was started with."""
        return self.root / NAME

    @property
    def tables(self) -> Path:
        """Folder of the tables of all finished steps."""
        return self.root / "tables"

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.root / "figures"


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

_KINDS = {"seed": int, "settings": dict, "earlier_starts": list}
_MEND = "bring an undamaged copy back, or move the folder away and start anew"


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
        previous = read_run_record(file)
        earlier = [*previous.pop("earlier_starts", []), previous]
    record = {
        "version": magus_anharmonic.__version__,
        **versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
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


def read_run_record(path: str | Path, required: Iterable[str] = ()) -> dict[str, Any]:
    """The record in ``path`` (folder or file).

    Raises ``InputError`` that names file and field: not a record, a ``required`` field is missing,
    or a field is not what it should be.
    """
    file = record_file(path)
    try:
        record: Any = read_json(file)
    except DamagedFile as error:
        raise InputError(f"{error}; {_MEND}") from None
    if not isinstance(record, dict) or not isinstance(record.get("version"), str):
        raise InputError(
            f"{file}: not a run record of magus-anharmonic; move the folder away and start anew"
        )
    for field in required:
        if field not in record:
            raise InputError(f"{file}: damaged: no {field}; {_MEND}")
    settings = record.get("settings")
    host = settings.get("host", {}) if isinstance(settings, dict) else {}
    # a search keeps the keys of its host there, a campaign the name of it
    kind_of_host = dict if "host" in record else dict | str
    for field, value, kind in (
        *((name, record.get(name), kind) for name, kind in _KINDS.items()),
        ("settings.host", host, kind_of_host),
    ):
        if not isinstance(value, kind) and (field in record or field == "settings.host"):
            raise InputError(
                f"{file}: damaged: {field} holds {one_line(to_json(value), 60)}; {_MEND}"
            )
    return record


def check_results_version(directory: str | Path) -> None:
    """Refuse to continue in a results folder whose files or numbers are those of another version
    (`files.SCHEMA`, `files.PHYSICS`).

    A folder without a record is new: fine. Raises ``InputError`` that names folder and both
    versions.
    """
    file = record_file(directory)
    if not file.exists():
        return
    record = read_run_record(file)
    version, now = record["version"], magus_anharmonic.__version__
    before = {name: record.get(name, 0) for name in versions()}
    if before != versions() or version.split(".")[:2] != now.split(".")[:2]:
        raise InputError(
            f"{file.parent}: written by magus-anharmonic {version}, this is {now} ({_said(before)};"
            f" now {_said(versions())}): its numbers are not those of now. report and status read"
            " it; to go on take the version that wrote it, or move it away and start anew"
        )


def _said(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


FIXED_KEYS = ("pressure", "symbols", "formula_type", "seed")
FIXED_HOST_KEYS = ("formula",)


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
    made_by = record.get("host")
    if made_by != host:
        raise InputError(
            f"-r: the search in {file.parent.parent} was made by host {made_by!r}, this is host"
            f" {host!r}: their generations differ; go on with"
            f" {_COMMANDS.get(str(made_by), 'the command that made it')}, or start without -r"
        )
    before, now = {**record["settings"], "seed": record["seed"]}, settings.model_dump(mode="json")
    if now["seed"] is None:
        now["seed"] = before["seed"]
    old, new = {**before, **before.get("host", {})}, {**now, **now["host"]}
    for key in _changed(before, now):
        for path, was, is_now in _differences(key, old.get(key), new.get(key)):
            logger.warning(
                "%s: %s, but the search was started with %s",
                path,
                one_line(repr(is_now), 80),
                one_line(repr(was), 80),
            )


_COMMANDS = {
    "magus": "magus search -r (or magus-anharmonic search -r --host magus)",
    "embedded": "magus-anharmonic search -r --host embedded",
}


def _differences(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Path of every key below ``path`` that changed, and both its values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            yield from _differences(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of settings that changed; raises ``InputError`` when one did that may not."""
    changed = [key for key in now if key != "host" and before.get(key) != now[key]]
    old, new = before.get("host", {}), now.get("host", {})
    changed_host = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    fixed = [key for key in changed if key in FIXED_KEYS] + [
        key for key in changed_host if key in FIXED_HOST_KEYS
    ]
    values = {**before, **old}, {**now, **new}
    if fixed:
        raise InputError(
            *(
                f"{key}: {values[1].get(key)!r} but the search was started with"
                f" {values[0].get(key)!r}; start anew without -r"
                for key in fixed
            )
        )
    return changed + changed_host


def record_file(path: str | Path) -> Path:
    """``path`` itself when it names a .json file, else ``path/run.json``."""
    target = Path(path)
    return target if target.suffix == ".json" else target / NAME
