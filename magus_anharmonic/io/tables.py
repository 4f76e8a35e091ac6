"""Tables whose columns are the fields of records (frozen dataclasses), written and read here alone.

A field made by `column` says its unit, what it means, its equation and where it is made; its column
is its name with the unit: ``gibbs`` in eV/atom is ``gibbs_eV_per_atom``. A field that holds another
such record brings that one's columns along. `docs/columns.md` is made from them. A plain dataclass
has one column a field, by the field's own name, with the unit in it.

A field that may be ``None`` is an empty cell. Reading fails with an ``InputError`` that names file,
line and column; columns that the record does not have are left alone.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.digests import RENAMED, finite
from magus_anharmonic.io.files import reading_table, replacing_table

Row = TypeVar("Row")


def column(
    meaning: str,
    unit: str = "",
    *,
    equation: str = "",
    origin: str = "",
    default: Any = None,
    name: str = "",
    digits: str = ".6f",
    needed: bool = False,
    info: bool = False,
    old: Mapping[str, str] | None = None,
) -> Any:
    """A field of a record that is a column of its tables.

    Parameters
    ----------
    meaning, unit, equation
        In words, of the number as it stands, and what it is computed by.
    origin
        Function (``module.name`` below this package) that makes it.
    name
        Of the column, where it is not that of the field with the unit.
    digits
        Format of a number in the table.
    needed
        Whether a table without this column cannot be read.
    info
        Whether it is a key of ``Atoms.info`` too.
    old
        Words that earlier versions wrote, and what they are now.
    """
    told = {"meaning": meaning, "unit": unit, "equation": equation, "origin": origin}
    own: dict[str, Any] = {**told, "name": name, "digits": digits, "needed": needed}
    own |= {"info": info, "old": old or {}}
    return field(default=default, metadata=own)


def held(record: Any, digits: str = "", **changes: Mapping[str, Any]) -> Any:
    """A field with a record of its own, whose columns come along, numbers with ``digits`` (empty:
    as there); ``changes``: of a field of that one, what its column here has otherwise (name,
    default, needed)."""
    all_ = {"digits": digits} if digits else {}
    return field(default=record, metadata={"held": (all_, changes)})


@dataclass(frozen=True)
class Column:
    """One column of the tables of a record: ``path`` leads from the record to its value."""

    name: str
    path: tuple[str, ...]
    read: Callable[[str], Any]
    default: Any = MISSING
    unit: str = ""
    meaning: str = ""
    equation: str = ""
    origin: str = ""
    digits: str = ".10g"
    needed: bool = True

    def value(self, record: Any) -> Any:
        """What a record has in this column."""
        return reduce(getattr, self.path, record)

    def text(self, record: Any) -> str:
        """The cell of a record: nothing for ``None`` and what is no finite number."""
        return cell(self.value(record), self.digits)


@cache
def columns_of(record: type) -> tuple[Column, ...]:
    """The columns of a record, in order, those of the records that it holds in their places."""
    hints = get_type_hints(record)
    described = any("meaning" in one.metadata for one in fields(record))
    found: list[Column] = []
    for one in fields(record):
        hint = hints[one.name]
        if is_dataclass(hint) and isinstance(hint, type):
            changes = one.metadata.get("held", ({}, {}))
            found += [_within(one.name, inner, changes) for inner in columns_of(hint)]
        elif "meaning" in one.metadata:
            found.append(_described(one.name, hint, one.default, one.metadata))
        elif not described:
            needed = one.default is MISSING
            found.append(Column(one.name, (one.name,), _reader(hint), one.default, needed=needed))
    return tuple(found)


def _within(name: str, inner: Column, changes: tuple[Any, Any]) -> Column:
    other = {**changes[0], **changes[1].get(inner.path[-1], {})}
    return Column(**{**vars(inner), **other, "path": (name, *inner.path)})


def _described(name: str, hint: Any, default: Any, told: Mapping[str, Any]) -> Column:
    unit, old, reader = told["unit"], told["old"], _reader(hint)
    suffix = re.sub(r"[\^-]", "", unit.replace("/", "_per_"))  # cm^-1: cm1
    if suffix and name.endswith(f"_{suffix}"):
        suffix = ""
    return Column(
        told["name"] or "_".join(filter(None, (name, suffix))),
        (name,),
        (lambda text: reader(old.get(text, text))) if old else reader,
        default,
        unit,
        told["meaning"],
        told["equation"],
        told["origin"],
        told["digits"],
        told["needed"],
    )


def columns(table: type) -> tuple[str, ...]:
    """Names of the columns of a table, in order."""
    return tuple(one.name for one in columns_of(table))


def line(record: Any) -> dict[str, str]:
    """The cells of a record by their columns."""
    return {one.name: one.text(record) for one in columns_of(type(record))}


def values(record: Any) -> dict[str, Any]:
    """The values of a record by their columns; ``None`` for what is no finite number."""
    return finite({one.name: one.value(record) for one in columns_of(type(record))})


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
    with table_rows(file) as lines:
        there = {name.strip(): name for name in lines.fieldnames or () if name}
        _check_columns(table, file, list(there))
        shown = [one for one in columns_of(table) if one.name in there or len(one.path) > 1]
        for found in lines:
            values: dict[str, Any] = {}
            for one in shown:
                text = (found.get(there.get(one.name, "")) or "").strip()
                try:
                    missing = not text or (text.lower() == "nan" and bool(one.unit))
                    known = one.default is not MISSING
                    value = one.default if missing and known else one.read(text)
                except ValueError as error:
                    raise InputError(
                        f"{file}: line {lines.line_num}: {one.name}: {text!r}: {error}"
                    ) from None
                reduce(lambda inner, step: inner.setdefault(step, {}), one.path[:-1], values)[
                    one.path[-1]
                ] = value
            try:
                yield _made(table, values)
            except ValueError as error:
                raise InputError(f"{file}: line {lines.line_num}: {error}") from None


def write(table: type[Row], path: str | Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` to the CSV file ``path`` atomically; see `Column.text`."""
    write_table(path, columns(table), (line(row).values() for row in rows))


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
                if len(rows.fieldnames) == 1 and re.search("[;\t]", rows.fieldnames[0]):
                    raise csv.Error("its cells are separated by semicolons or tabs, not by commas")
                rows.fieldnames = [RENAMED.get(name, name) for name in rows.fieldnames]
            yield rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{shown or file}: not readable as a table ({error}); save it as UTF-8 with commas, or"
            " run the step that writes it again"
        ) from None


def text_rows(path: str | Path, shown: str | None = None) -> Iterator[dict[str, str]]:
    """Rows of a CSV file one by one, every cell a text without surrounding spaces.

    Raises ``InputError`` that names the file (``shown``, None: by its path): not readable, not
    UTF-8, or no header.
    """
    name = shown or str(path)
    with table_rows(path, shown, restkey="") as reader:
        if not reader.fieldnames:
            raise InputError(f"{name}: empty; the step that writes it has to run again")
        for line in reader:
            yield {
                column.strip(): (line.get(column) or "").strip()
                for column in reader.fieldnames
                if column
            }


def _reader(hint: Any) -> Callable[[str], Any]:
    """How a cell becomes a value of the type ``hint``; ValueError says what is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = _reader(next(part for part in get_args(hint) if part is not type(None)))
        return lambda text: None if text == "" or text.lower() == "nan" else inner(text)
    if get_origin(hint) is Literal:
        return lambda text: _word(text, get_args(hint))
    known: dict[Any, Callable[[str], Any]] = {str: str, int: _whole, float: _number}
    return known.get(hint, _unreadable)


def _unreadable(text: str) -> Any:
    raise ValueError("a column that is written alone")


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


def number(text: str | None) -> float | None:
    """The finite number that a cell of an unknown table holds, or None."""
    try:
        return _number(text or "")
    except ValueError:
        return None


def cell(value: Any, digits: str = ".10g") -> str:
    """A value as it stands in a table: numbers with ten digits, nothing for ``None`` and what is no
    finite number, yes or no for a truth value, several values with spaces."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(cell(part) for part in value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return format(value, digits) if isinstance(value, float) else str(value)


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


def _check_columns(table: type, file: Path, there: list[str]) -> None:
    names, problems = columns(table), []
    for one in columns_of(table):
        if one.name in there or not one.needed:
            continue
        other = next((n for n in there if n not in names and _stem(n) == _stem(one.name)), None)
        if other is not None:
            problems.append(
                f"{file}: column {other}: wrong unit; convert the numbers and name the column"
                f" {one.name}"
            )
        else:
            problems.append(
                f"{file}: column {one.name} is missing; needed are"
                f" {', '.join(one.name for one in columns_of(table) if one.needed)}"
            )
    if problems:
        raise InputError(*problems)


def _made(table: type[Row], values: dict[str, Any]) -> Row:
    hints = get_type_hints(table) if any(isinstance(v, dict) for v in values.values()) else {}
    return table(
        **{
            name: _made(hints[name], value) if isinstance(value, dict) else value
            for name, value in values.items()
        }
    )


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
