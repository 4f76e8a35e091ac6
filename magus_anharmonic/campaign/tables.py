"""The tables of a campaign: every step writes its own part, ``tables/`` is the parts of all
finished steps one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from magus_anharmonic.io.files import reading_table, remove, replacing_table
from magus_anharmonic.io.tables import write

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
