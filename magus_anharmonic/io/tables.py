"""CSV files whose rows are frozen dataclasses: the fields are the columns, in order, with units in
their names.

A field that may be ``None`` is an empty cell. Reading fails with an ``InputError`` that names file,
line and column; columns that the dataclass does not name are left alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import RENAMED
from magus_anharmonic.io.files import reading_table, replacing_table

Row = TypeVar("Row")


def columns(table: type) -> tuple[str, ...]:
    """Names of the columns of a table, in order."""
    return tuple(field.name for field in fields(table))


def read(table: type[Row], path: str | Path) -> list[Row]:
    """All rows of ``path``, in the order of the file; see `rows_of`."""
    return list(rows_of(table, path))


def read_if_there(table: type[Row], folder: str | Path, name: str | None = None) -> list[Row]:
    """All rows of ``folder / name`` (None: the table's own file), none when there is no such
    file."""
    path = Path(folder) / (name or table.FILE)  # type: ignore[attr-defined]
    return read(table, path) if path.is_file() else []


def rows_of(table: type[Row], path: str | Path) -> Iterator[Row]:
    """Rows of the CSV file ``path`` one by one, as instances of ``table``.

    Raises ``InputError`` (on the first row asked for) when the file is missing, a column is missing
    or has another unit in its name, a cell is no number, a word is not one of those allowed, or a
    unit is not the one of the quantity.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    readers = _readers(table)
    with table_rows(file) as lines:
        _check_columns(table, file, lines.fieldnames or ())
        for line in lines:
            values = {}
            for name, (convert, default) in readers.items():
                text = line.get(name)
                try:
                    values[name] = (
                        default
                        if text is None and default is not _REQUIRED
                        else convert((text or "").strip())
                    )
                except ValueError as error:
                    raise InputError(
                        f"{file}: line {lines.line_num}: {name}: {text!r}: {error}"
                    ) from None
            try:
                yield table(**values)
            except ValueError as error:
                raise InputError(f"{file}: line {lines.line_num}: {error}") from None


def write(table: type[Row], path: str | Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` to the CSV file ``path`` atomically; numbers with ten digits, ``None`` and NaN
    as empty cells."""
    names = columns(table)
    write_table(path, names, ([cell(getattr(row, name)) for name in names] for row in rows))


def write_table(path: str | Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV table atomically, row by row; its digest goes into `SUMS`."""
    with (
        replacing_table(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


@contextlib.contextmanager
def table_rows(
    path: str | Path, shown: str | None = None, restkey: str | None = None
) -> Iterator[csv.DictReader[str]]:
    """A reader of the rows of a CSV file; raises ``InputError`` that names the file where it is not
    UTF-8 or no table, see `reading_table`.

    shown : what the error calls the file, None: its path. restkey : of cells beyond the header.
    """
    file = Path(path)
    try:
        with (
            reading_table(file, shown) as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as handle,
        ):
            rows = csv.DictReader(handle, restkey=restkey)
            if rows.fieldnames:
                rows.fieldnames = [RENAMED.get(name, name) for name in rows.fieldnames]
            yield rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{shown or file}: not readable as a table ({error}); the step that writes it has to"
            " run again"
        ) from None


def text_rows(
    path: str | Path, needed: Iterable[str] = (), shown: str | None = None
) -> Iterator[dict[str, str]]:
    """Rows of a CSV file one by one, every cell a text without surrounding spaces.

    Raises ``InputError`` that names the file (``shown``, None: by its path): not readable, not
    UTF-8, no header, or no column of the ``needed`` ones.
    """
    name = shown or str(path)
    with table_rows(path, shown, restkey="") as reader:
        if not reader.fieldnames:
            raise InputError(f"{name}: empty; the step that writes it has to run again")
        there = [column.strip() for column in reader.fieldnames]
        absent = [column for column in needed if column not in there]
        if absent:
            raise InputError(f"{name}: no column {', '.join(absent)}; it has {', '.join(there)}")
        for line in reader:
            yield {
                column.strip(): (line.get(column) or "").strip()
                for column in reader.fieldnames
                if column
            }


_REQUIRED: Any = object()


@cache
def _readers(table: type) -> dict[str, tuple[Callable[[str], Any], Any]]:
    hints = get_type_hints(table)
    missing = fields(table)[0].default
    return {
        field.name: (
            _reader(hints[field.name]),
            _REQUIRED if field.default is missing else field.default,
        )
        for field in fields(table)
    }


def _reader(hint: Any) -> Callable[[str], Any]:
    """How a cell becomes a value of the type ``hint``; ValueError says what is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = _reader(next(part for part in get_args(hint) if part is not type(None)))
        return lambda text: None if text == "" or text.lower() == "nan" else inner(text)
    if get_origin(hint) is Literal:
        return lambda text: _word(text, get_args(hint))
    return {str: str, int: _whole, float: _number}[hint]


def _word(text: str, allowed: tuple[str, ...]) -> str:
    if text not in allowed:
        raise ValueError(f"must be {' or '.join(allowed)}")
    return text


def _whole(text: str) -> int:
    value = _number(text)
    if value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def cell(value: Any) -> str:
    """A value as it stands in a table: numbers with ten digits, nothing for ``None`` and what is no
    finite number, yes or no for a truth value, several values with spaces."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(cell(part) for part in value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


_UNIT_WORDS = (
    r"_(?:m?eV|meV|Ry|Ha|kJ|kcal|J|GPa|kbar|Mbar|bar|Pa|A3?|bohr3?|nm3?|cm1|cm2|THz2?|K|s|h"
    r"|per|atom|mol|cell|fu)(?=_|$)"
)


def _stem(column: str) -> str:
    """The name of a column without its unit."""
    previous = None
    while previous != column:
        previous, column = column, re.sub(_UNIT_WORDS, "", column)
    return column


def _check_columns(table: type, file: Path, found: Iterable[str]) -> None:
    there = [name.strip() for name in found if name]
    problems = []
    for name, (_, default) in _readers(table).items():
        if name in there or default is not _REQUIRED:
            continue
        other = next(
            (
                known
                for known in there
                if known not in columns(table) and _stem(known) == _stem(name)
            ),
            None,
        )
        if other is not None:
            problems.append(
                f"{file}: column {other}: wrong unit; convert the numbers and name the column"
                f" {name}"
            )
        else:
            problems.append(
                f"{file}: column {name} is missing; needed are {', '.join(columns(table))}"
            )
    if problems:
        raise InputError(*problems)


class TableFolder:
    """The tables in one folder, each read once; a missing one has no rows."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: dict[str, list[Any]] = {}

    def rows(self, table: type[Row], name: str | None = None) -> list[Row]:
        """See `read_if_there`."""
        key = name or table.FILE  # type: ignore[attr-defined]
        if key not in self._known:
            self._known[key] = read_if_there(table, self.folder, name)
        return self._known[key]
