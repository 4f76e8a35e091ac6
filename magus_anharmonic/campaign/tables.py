"""The tables of a campaign: every step writes its own part, ``tables/`` is the parts of all finished steps one after the other."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from magus_anharmonic.files import replacing

COLUMNS: dict[str, tuple[str, ...]] = {
    "model_errors": ("model", "model_id", "set", "n", "energy_rmse_eV_per_atom", "force_rmse_eV_per_A", "stress_rmse_GPa"),
    "parity": ("model", "set", "quantity", "unit", "reference", "predicted"),
    "enthalpies": (
        "id", "phase", "formula", "natoms", "space_group", "pressure_GPa", "volume_A3_per_atom", "enthalpy_eV_per_atom", "model_id",
        "source",
    ),
    "space_groups": ("id", "pressure_GPa", "spg_static", "spg_dft", "spg_quantum", "enthalpy_dft_eV_per_atom", "reason"),
    "modes": (
        "phase", "space_group", "irrep", "pressure_GPa", "method", "energies_by", "frequency_squared_cm2", "error_cm2", "model_id",
    ),
    "dispersion": ("distance", "label", "branch", "frequency_cm1", "error_cm1", "method"),
    "learning": (
        "step", "generation", "model_id", "set", "energy_rmse_eV_per_atom", "force_rmse_eV_per_A", "stress_rmse_GPa", "n_labels",
    ),
    "cost": ("step", "n_structures", "n_evaluations", "n_labels", "wall_s"),
    "failures": ("step", "id", "reason"),
}  # fmt: skip
"""Columns by the name of the table, with their units."""

STRUCTURES = "structures.extxyz"


def write_part(folder: Path, name: str, rows: Iterable[Sequence[Any]], table: str | None = None) -> None:
    """Write the rows of one step (in the order of `COLUMNS`) to ``folder/tables/<name>.csv`` atomically, row by row."""
    with replacing(folder / "tables" / f"{name}.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS[table or name])
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if value != value else f"{value:.10g}"
    return value


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file one by one; none when there is no such file."""
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def assemble(target: Path, folders: Sequence[Path], inside: str = "tables") -> None:
    """Make ``target`` (``campaign/tables``) from the parts in the ``folders`` of finished steps; tables without a part are removed.

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
            stale.unlink()
    for name, files in parts.items():
        _concatenate(target / name, files, header=name.endswith(".csv"))


def _concatenate(target: Path, files: Sequence[Path], header: bool) -> None:
    with replacing(target) as temporary, temporary.open("wb") as output:
        for number, file in enumerate(files):
            with file.open("rb") as part:
                first = part.readline() if header else b""
                if number == 0:
                    output.write(first)
                shutil.copyfileobj(part, output)
