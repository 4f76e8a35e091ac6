"""``steps.json``: what is known of every step of a campaign; one process writes it, any process reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import read_json, write_json

FILE = "steps.json"

Status = Literal["open", "running", "done", "failed"]


@dataclass(frozen=True)
class StepRecord:
    """One step. ``wall_s`` sums up all sittings; ``key`` is the hash of what the result holds for; ``output`` identifies the result."""

    status: Status
    kind: str
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


_OBJECT, _RECORDS = TypeAdapter(dict[str, Any]), TypeAdapter(dict[str, StepRecord])


def read_records(folder: Path) -> dict[str, StepRecord]:
    """The records in ``folder`` by step, in the order of the campaign; none when it has not begun. Raises ``InputError``."""
    file = folder / FILE
    if not file.is_file():
        return {}
    try:
        _OBJECT.validate_json(file.read_bytes())
        return _RECORDS.validate_python(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise InputError(f"{file}: not readable as the steps of a campaign ({why}); move it away and run the campaign again") from None


def write_records(folder: Path, records: dict[str, StepRecord]) -> None:
    """Write all records atomically."""
    write_json(folder / FILE, {step: asdict(record) for step, record in records.items()})
