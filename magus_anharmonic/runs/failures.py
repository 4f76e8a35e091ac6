"""``failures.jsonl``: everything that went wrong in a run, one line each, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magus_anharmonic.io.digests import digest
from magus_anharmonic.io.files import append_jsonl, read_jsonl

NAME = "failures.jsonl"
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
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = [
        record
        for failure in failures
        if digest(identity(record := {"stage": stage, **failure, "time": now})) not in known
    ]
    if new:
        append_jsonl(Path(folder) / NAME, *new)


def read_failures(folder: str | Path) -> list[dict[str, Any]]:
    """All recorded failures, the oldest first."""
    return read_jsonl(Path(folder) / NAME)


def identity(record: dict[str, Any]) -> dict[str, Any]:
    """What makes two records the same failure."""
    return {key: value for key, value in record.items() if key not in _NOT_IDENTITY}
