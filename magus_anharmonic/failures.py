"""``failures.jsonl``: everything that went wrong in a run, one line each, with its reason."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magus_anharmonic.files import append_jsonl, read_jsonl

NAME = "failures.jsonl"
_NOT_IDENTITY = ("time", "cell", "positions")


def record_failure(folder: str | Path, stage: str, reason: str, **what: Any) -> None:
    """Append one failure to ``folder/failures.jsonl``.

    stage : label, relaxation, sscha, run; ``what`` names the piece of work (generation, id, ...). A failure that is met again by a
    restarted run, with the same reason, is not recorded twice; one of the stage run is, with its time.
    """
    record = {"stage": stage, **what, "reason": reason, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    if stage == "run" or identity(record) not in (identity(known) for known in read_failures(folder)):
        append_jsonl(Path(folder) / NAME, record)


def read_failures(folder: str | Path) -> list[dict[str, Any]]:
    """All recorded failures, the oldest first."""
    return read_jsonl(Path(folder) / NAME)


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """What makes two records the same failure."""
    return {key: value for key, value in record.items() if key not in _NOT_IDENTITY}
