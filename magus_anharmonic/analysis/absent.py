"""Why a value that is asked for is not in the tables of a campaign: which table, phase, pressure or method is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from magus_anharmonic.analysis.expected import NAMES, ExpectedValue
from magus_anharmonic.analysis.found_values import near, sources_of
from magus_anharmonic.analysis.tables import TABLES, Enthalpy, Ranked, TableFolder, pressure_of_file, ranking_files
from magus_anharmonic.structures import symbol_of

MOST_NAMED = 8


def why_absent(wanted: ExpectedValue, tables: TableFolder) -> str:
    """One clause; the tables are read already."""
    name = NAMES[wanted.name].table
    if name == Ranked.FILE:
        return _ranking(wanted, tables)
    rows: list[Any] = tables.rows(next(table for table in TABLES if table.FILE == name))  # type: ignore[attr-defined]
    if not rows:
        return f"{name} is empty" if (tables.folder / name).is_file() else f"there is no {name}"
    if name == Enthalpy.FILE:
        sources = sources_of(wanted)
        rows = [row for row in rows if row.source in sources]
    keys = [("phase", wanted.phase), *(("phase", phase) for phase in wanted.phases or ())]
    keys += [(key, getattr(wanted, key)) for key in ("irrep", "method", "energies_by", "model", "set", "quantity")]
    for key, value in ((key, value) for key, value in keys if value is not None):
        by_symbol = name == Enthalpy.FILE and not wanted.phases
        there = {getattr(row, key) for row in rows} | ({symbol_of(row.space_group) for row in rows} if by_symbol else set())
        if value not in there:
            return f"{name} has no {key} {value} (it has {_list(there - {''})})"
        if not (key == "phase" and wanted.phases):
            rows = [row for row in rows if value in (getattr(row, key), symbol_of(getattr(row, "space_group", "")))]
    pressures = sorted({row.pressure_GPa for row in rows if hasattr(row, "pressure_GPa")})
    if wanted.pressure_GPa is not None and not any(near(pressure, wanted) for pressure in pressures):
        return f"{name} has it at {_list(pressures)} GPa"
    if wanted.name == "critical_pressure_difference":
        return "it needs the critical pressure by the model and by DFT, each between the pressures of the run"
    if wanted.name == "share_kept_by_dft":
        return "nothing became it, or DFT relaxed none of those"
    if pressures:
        return f"{name} has too few pressures for it ({_list(pressures)} GPa)"
    return f"{name} does not hold it"


def _ranking(wanted: ExpectedValue, tables: TableFolder) -> str:
    files = ranking_files(tables.folder)
    pressures = sorted(pressure_of_file(path.name) for path in files)
    if not files:
        return "there is no ranking-<P>GPa.csv"
    if not any(near(pressure, wanted) for pressure in pressures):
        return f"there is no ranking at this pressure ({_list(pressures)} GPa there is)"
    return "the ranking at this pressure has too few free energies for it"


def _list(values: Iterable[Any]) -> str:
    found: Sequence[str] = [f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values)]
    return ", ".join(found[:MOST_NAMED]) + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "") or "none"
