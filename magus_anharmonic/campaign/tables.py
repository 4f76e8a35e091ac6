"""The tables of a campaign: every step writes its own part, ``tables/`` is the parts of all
finished steps one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from magus_anharmonic.io.files import reading_table, remove, replacing_table
from magus_anharmonic.io.tables import table_rows, write_table
from magus_anharmonic.paper.tables import (
    Band,
    Cost,
    Enthalpy,
    FailureRow,
    LearningPoint,
    Mode,
    ModelError,
    Parity,
    SpaceGroups,
    cell,
    columns,
)

COLUMNS: dict[str, tuple[str, ...]] = {
    table.FILE.split("-<")[0].removesuffix(".csv"): columns(table)
    for table in (
        ModelError,
        Parity,
        Enthalpy,
        SpaceGroups,
        Mode,
        Band,
        LearningPoint,
        Cost,
        FailureRow,
    )
}
"""Columns, with their units, by the name of each table that the steps write; what the analysis
reads."""

STRUCTURES = "structures.extxyz"


def write_part(
    folder: Path, name: str, rows: Iterable[Sequence[Any]], table: str | None = None
) -> None:
    """Write the rows of one step (in the order of `COLUMNS`) to ``folder/tables/<name>.csv``
    atomically, row by row."""
    write_table(
        folder / "tables" / f"{name}.csv",
        COLUMNS[table or name],
        ([cell(value) for value in row] for row in rows),
    )


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file one by one; none when there is no such file."""
    if path.is_file():
        with table_rows(path) as rows:
            yield from rows


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
