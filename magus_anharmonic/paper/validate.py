"""What was found against what was expected.

Why a value that is asked for is not in the tables of a campaign: which table, phase, pressure or
method is missing.

``magus-anharmonic validate``: a campaign's numbers beside expected ones, and what in the run could
explain a difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import write_json, write_table
from magus_anharmonic.paper.expected import NAMES, ExpectedValue, ExpectedValues, load_expected
from magus_anharmonic.paper.explain import Context, explanations, read_context, undone_steps
from magus_anharmonic.paper.found_values import FINDERS, Found, near, sources_of
from magus_anharmonic.paper.tables import (
    RANKING,
    TABLES,
    Enthalpy,
    TableFolder,
    pressure_of_file,
    ranking_files,
)
from magus_anharmonic.structures import symbol_of

MOST_NAMED = 8


def why_missing(wanted: ExpectedValue, tables: TableFolder) -> str:
    """One clause; the tables are read already."""
    name = NAMES[wanted.name].table
    if name == RANKING:
        return _ranking(wanted, tables)
    rows: list[Any] = tables.rows(next(table for table in TABLES if table.FILE == name))  # type: ignore[attr-defined]
    if not rows:
        return f"{name} is empty" if (tables.folder / name).is_file() else f"there is no {name}"
    if name == Enthalpy.FILE:
        sources = sources_of(wanted)
        rows = [row for row in rows if row.source in sources]
    keys = [("phase", wanted.phase), *(("phase", phase) for phase in wanted.phases or ())]
    keys += [
        (key, getattr(wanted, key))
        for key in ("irrep", "method", "energies_by", "model", "set", "quantity")
    ]
    for key, value in ((key, value) for key, value in keys if value is not None):
        by_symbol = name == Enthalpy.FILE and not wanted.phases
        there = {getattr(row, key) for row in rows} | (
            {symbol_of(row.space_group) for row in rows} if by_symbol else set()
        )
        if value not in there:
            return f"{name} has no {key} {value} (it has {_list(there - {''})})"
        if not (key == "phase" and wanted.phases):
            rows = [
                row
                for row in rows
                if value in (getattr(row, key), symbol_of(getattr(row, "space_group", "")))
            ]
    pressures = sorted({row.pressure_GPa for row in rows if hasattr(row, "pressure_GPa")})
    if wanted.pressure_GPa is not None and not any(
        near(pressure, wanted) for pressure in pressures
    ):
        return f"{name} has it at {_list(pressures)} GPa"
    if wanted.name == "critical_pressure_difference":
        return (
            "it needs the critical pressure by the model and by DFT, each between the pressures of"
            " the run"
        )
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
    found: Sequence[str] = [
        f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values)
    ]
    return (
        ", ".join(found[:MOST_NAMED])
        + (f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else "")
        or "none"
    )


Verdict = Literal["agrees", "disagrees", "not in this run"]
STANDARD_ERRORS = 2.0
"""A difference of so many standard errors still agrees."""


@dataclass(frozen=True)
class Validated:
    """One value: found and expected in the unit of the expected one. difference : found minus the
    nearest expected number."""

    name: str
    unit: str
    found: str
    error: str
    expected: str
    expected_error: str
    difference: str
    verdict: Verdict
    source: str
    could_explain: tuple[str, ...]
    remark: str = ""
    """What one must know to read the numbers: how many there are behind it, that less is better, or
    why it is not in this run."""

    @property
    def line(self) -> str:
        """One line for the terminal."""
        unit = "" if self.unit in ("-", "1") else f" {self.unit}"
        mark = "DISAGREES" if self.verdict == "disagrees" else self.verdict
        remark = f"; {self.remark}" if self.remark else ""
        if self.verdict == "not in this run":
            return (
                f"{mark:16s} {self.name}: expected {self.expected}{unit}{remark}  [{self.source}]"
            )
        bound = {"<": "below ", ">": "above "}.get(self.found[:1], "")
        found = (
            bound
            + (self.found[1:] if bound else self.found)
            + (f" +- {self.error}" if self.error else "")
        )
        expected = self.expected + (f" +- {self.expected_error}" if self.expected_error else "")
        difference = f", difference {self.difference}" if self.difference else ""
        return (
            f"{mark:16s} {self.name}: found {found}, expected {expected}{unit}{difference}{remark} "
            f" [{self.source}]"
        )


def tables_folder(campaign: str | Path) -> Path:
    """Where the tables of a campaign are: below its folder, below ``campaign/`` in it, or the
    folder itself. Raises ``InputError``."""
    root = Path(campaign)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    for folder in (root / "campaign" / "tables", root / "tables", root):
        if folder.is_dir() and any(folder.glob("*.csv")):
            return folder
    if (root / "campaign").is_dir() or (root / "steps.json").is_file():
        return root / "campaign" / "tables"
    raise InputError(f"{root}: no campaign (no tables/*.csv in it or in its campaign/)")


def validate(campaign: str | Path, expected: str | Path) -> list[Validated]:
    """Compare every expected value with what the campaign holds; pure. Raises ``InputError``."""
    folder = tables_folder(campaign)
    return compare_all(load_expected(expected), TableFolder(folder), read_context(folder))


def compare_all(expected: ExpectedValues, tables: TableFolder, context: Context) -> list[Validated]:
    """All values, in the order of the file."""
    rows = []
    for wanted in expected.values:
        found = FINDERS[wanted.name](wanted, tables)
        rows.append(
            compare(wanted, found, context)
            if found is not None
            else _missing(wanted, tables, context)
        )
    return rows


def _missing(wanted: ExpectedValue, tables: TableFolder, context: Context) -> Validated:
    undone = undone_steps(wanted, context)
    why = why_missing(wanted, tables) + (f"; not done: {', '.join(undone[:6])}" if undone else "")
    return replace(_row(wanted, None, "not in this run", (), None), remark=why)


def compare(wanted: ExpectedValue, found: Found, context: Context) -> Validated:
    """One value; agreement is a difference of at most two standard errors, or within the tolerance,
    on the open side of a limit, or, for an error, below what is expected."""
    if found.words:
        agrees = _same_words(wanted, found.words)
        return _row(
            wanted,
            found,
            "agrees" if agrees else "disagrees",
            () if agrees else explanations(wanted, found, context, None),
            None,
        )
    low, high, spread = _expected_range(wanted, found)
    least, most = found.between or (found.value, found.value)
    difference = least - high if least > high else most - low if most < low else 0.0
    agrees = _agrees(wanted, found, low, high, spread, difference)
    reasons = () if agrees else explanations(wanted, found, context, difference)
    return _row(wanted, found, "agrees" if agrees else "disagrees", reasons, difference)


def _expected_range(wanted: ExpectedValue, found: Found) -> tuple[float, float, float]:
    """Lowest and highest expected number and their error; a count among ``out_of`` structures is
    scaled to those of the run."""
    low, high = wanted.range
    spread = (wanted.error or 0.0) * wanted.factor
    if wanted.out_of is not None and found.n is not None and found.n != wanted.out_of:
        scale = found.n / wanted.out_of
        low, high, spread = low * scale, high * scale, spread * math.sqrt(scale)
    return low, high, spread


def _agrees(
    wanted: ExpectedValue, found: Found, low: float, high: float, spread: float, difference: float
) -> bool:
    if found.bound:
        return low <= found.value if found.bound == "<" else high >= found.value
    if difference < 0 and NAMES[wanted.name].smaller_is_better:
        return True
    own = 0.0 if found.between else found.error or 0.0
    allowed = max(
        STANDARD_ERRORS * math.hypot(own, spread), (wanted.tolerance or 0.0) * wanted.factor
    )
    return abs(difference) <= allowed + 1e-12


def _same_words(wanted: ExpectedValue, words: Sequence[str]) -> bool:
    """A name is one of the allowed ones; a sequence is a stretch of the expected one (a run has its
    own pressures)."""
    if isinstance(wanted.value, str):
        return tuple(words) == (wanted.value,)
    allowed = [str(item) for item in wanted.value] if isinstance(wanted.value, list) else []
    stretches = [allowed[i : i + len(words)] for i in range(len(allowed) - len(words) + 1)]
    return list(words) in stretches


def _row(
    wanted: ExpectedValue,
    found: Found | None,
    verdict: Verdict,
    reasons: Sequence[str],
    difference: float | None,
) -> Validated:
    factor = wanted.factor
    low, _, spread = _expected_range(wanted, found or Found())
    expected = _expected_text(wanted)
    if wanted.out_of is not None and found is not None and found.n != wanted.out_of:
        expected = f"{_digits(low / factor)} ({expected} of {wanted.out_of})"
    value = (
        ""
        if found is None
        else (
            " -> ".join(found.words) if found.words else found.bound + _digits(found.value / factor)
        )
    )
    if found is not None and found.n is not None and wanted.out_of is not None:
        value += f" of {found.n}"
    if found is not None and found.between:
        value = f"{_digits(found.between[0] / factor)} to {_digits(found.between[1] / factor)}"
    certain = found is None or found.error is None or bool(found.bound) or found.between is not None
    return Validated(
        wanted.title,
        wanted.unit,
        value,
        "" if certain or found is None else _two_digits((found.error or 0.0) / factor),
        expected,
        _two_digits(spread / factor)
        if spread > 0
        else f"{wanted.tolerance:g} (tolerance)"
        if wanted.tolerance
        else "",
        ""
        if difference is None or (found is not None and found.bound)
        else f"{difference / factor:+.3g}",
        verdict,
        wanted.source,
        tuple(reasons),
        "" if found is None else _remark(wanted, found, verdict, difference),
    )


def _remark(wanted: ExpectedValue, found: Found, verdict: Verdict, difference: float | None) -> str:
    name = NAMES[wanted.name]
    parts = []
    if verdict == "agrees" and name.smaller_is_better and (difference or 0.0) < 0:
        parts.append("less than expected counts as agreement")
    if found.bound:
        parts.append("it does not change sign between the pressures of the run")
    if found.between:
        parts.append("the first relaxes into the second there, which is all that is known")
    if name.table == "model_errors.csv" and found.n is not None:
        parts.append(f"{found.n} labels")
    return "; ".join(parts)


def _expected_text(wanted: ExpectedValue) -> str:
    if wanted.at_least is not None:
        return f"at least {wanted.at_least:g}"
    if wanted.at_most is not None:
        return f"at most {wanted.at_most:g}"
    if isinstance(wanted.value, list):
        between = " -> " if isinstance(wanted.value[0], str) else " to "
        return between.join(
            f"{item:g}" if isinstance(item, int | float) else item for item in wanted.value
        )
    return f"{wanted.value:g}" if isinstance(wanted.value, int | float) else str(wanted.value)


def _digits(value: float) -> str:
    return f"{value:.4g}"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


COLUMNS = (
    "name",
    "unit",
    "found",
    "error",
    "expected",
    "expected_error",
    "difference",
    "verdict",
    "source",
    "could_explain",
    "remark",
)


def write_validation(rows: Sequence[Validated], folder: str | Path) -> None:
    """``validation.csv`` and ``validation.json`` for the report."""
    target = Path(folder)
    lines = [{**asdict(row), "could_explain": "; ".join(row.could_explain)} for row in rows]
    write_table(
        target / "validation.csv", COLUMNS, ([line[name] for name in COLUMNS] for line in lines)
    )
    counts = {
        verdict: sum(row.verdict == verdict for row in rows)
        for verdict in ("agrees", "disagrees", "not in this run")
    }
    write_json(
        target / "validation.json", {"counts": counts, "values": [asdict(row) for row in rows]}
    )
