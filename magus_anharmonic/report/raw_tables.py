"""Tables as a report reads them: whatever the file holds is shown or named as a problem, and never
ends the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from magus_anharmonic.io.tables import text_rows


@dataclass(frozen=True)
class RawTable:
    """The first rows of a table as text. ``total`` counts all rows of the file, shown or not."""

    name: str
    columns: tuple[str, ...] = ()
    rows: list[dict[str, str]] = field(default_factory=list)
    total: int = 0

    @property
    def hidden(self) -> int:
        """Rows of the file that are not in ``rows``."""
        return self.total - len(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows)


def read_raw_table(path: Path, limit: int | None = None) -> RawTable:
    """The first ``limit`` rows (None: all) of a CSV file; a missing file is an empty table.

    Raises ``InputError``: see `text_rows`.
    """
    if not path.is_file():
        return RawTable(path.name)
    rows: list[dict[str, str]] = []
    total = 0
    columns: tuple[str, ...] = ()
    for line in text_rows(path, shown=path.name):
        columns = columns or tuple(line)
        total += 1
        if limit is None or len(rows) < limit:
            rows.append(line)
    return RawTable(path.name, columns, rows, total)


def number(text: str | None) -> float | None:
    """The finite number that a cell holds, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
