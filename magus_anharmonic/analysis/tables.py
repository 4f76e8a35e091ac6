"""The tables of a campaign (``campaign/tables/*.csv``): their columns in one place, read and written with types.

One frozen dataclass per table; its fields are the columns, in order, units in the names. A field that may be ``None`` is an empty cell.
Reading fails with an ``InputError`` that names file, line and column; columns that are not named here are left alone.
"""

from __future__ import annotations

import csv
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import replacing, table_rows

UNITS = {"energy": "eV/atom", "force": "eV/A", "stress": "GPa"}
"""Unit of each quantity of ``parity.csv``."""

GRADIENT_UNITS = {"force": "eV/A", "gradient_centroid": "eV/A", "gradient_force_constants": "eV/A^2", "bo_force_centroid": "eV/A"}
"""Unit of each quantity of ``gradient_errors.csv``."""


@dataclass(frozen=True)
class ModelError:
    """Table I: root-mean-square errors of a model on a set of labels."""

    FILE: ClassVar[str] = "model_errors.csv"
    model: Literal["foundation", "finetuned"]
    model_id: str
    set: Literal["training", "validation", "test"]
    n: int
    energy_rmse_eV_per_atom: float
    force_rmse_eV_per_A: float
    stress_rmse_GPa: float | None


@dataclass(frozen=True)
class Parity:
    """Fig. 3: one number by the labels (``reference``) and by the model (``predicted``)."""

    FILE: ClassVar[str] = "parity.csv"
    model: str
    set: str
    quantity: Literal["energy", "force", "stress"]
    unit: str
    reference: float
    predicted: float

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, UNITS)


@dataclass(frozen=True)
class Enthalpy:
    """Figs. 2 and 5: a relaxed structure at a pressure; ``phase`` is its name or empty."""

    FILE: ClassVar[str] = "enthalpies.csv"
    id: str
    phase: str
    formula: str
    natoms: int
    space_group: str
    pressure_GPa: float
    volume_A3_per_atom: float
    enthalpy_eV_per_atom: float
    model_id: str
    source: Literal["produce", "relax", "foundation"]


@dataclass(frozen=True)
class Ranked:
    """Fig. 6: the first columns of ``ranking.csv``; files are named by `ranking_file`."""

    FILE: ClassVar[str] = "ranking-<P>GPa.csv"
    id: str
    formula: str
    natoms: int
    pressure_GPa: float
    temperature_K: float
    spg_static: str
    spg_quantum: str
    enthalpy_eV_per_atom: float | None
    gibbs_eV_per_atom: float | None
    gibbs_error_eV_per_atom: float | None
    n_evaluations: int
    model: str
    status: str
    reason: str
    same_as: str = ""


@dataclass(frozen=True)
class SpaceGroups:
    """The space group of a candidate as it was found, after relaxation by DFT, and with moving ions."""

    FILE: ClassVar[str] = "space_groups.csv"
    id: str
    pressure_GPa: float
    spg_static: str
    spg_dft: str
    spg_quantum: str
    enthalpy_dft_eV_per_atom: float | None
    reason: str


@dataclass(frozen=True)
class Mode:
    """Fig. 4a: squared frequency of one irreducible representation at Gamma (imaginary: negative)."""

    FILE: ClassVar[str] = "modes.csv"
    phase: str
    space_group: str
    irrep: str
    pressure_GPa: float
    method: Literal["harmonic", "sscha-hessian"]
    energies_by: Literal["model", "dft"]
    frequency_squared_cm2: float
    error_cm2: float | None
    model_id: str


@dataclass(frozen=True)
class Band:
    """Fig. 4b: one point of a dispersion (imaginary frequencies negative); files are named by `dispersion_file`."""

    FILE: ClassVar[str] = "dispersion-<phase>-<P>GPa.csv"
    distance: float
    label: str
    branch: int
    frequency_cm1: float
    error_cm1: float | None
    method: str


@dataclass(frozen=True)
class GradientError:
    """Figs. 7 and 8 (Eqs. 11 to 15): what averaging over an ensemble leaves of the errors of the forces.

    ``rmse`` is what the ensemble of ``n_configs`` gives, its square the sum of those of ``systematic`` (what an infinite ensemble would
    leave, with ``systematic_error``) and ``statistical``; ``floor`` is ``single``, the RMSE of one configuration, over sqrt(n_configs).
    """

    FILE: ClassVar[str] = "gradient_errors.csv"
    phase: str
    pressure_GPa: float
    n_configs: int
    quantity: Literal["force", "gradient_centroid", "gradient_force_constants", "bo_force_centroid"]
    unit: str
    rmse: float
    systematic: float | None
    statistical: float | None
    floor: float | None
    systematic_error: float | None = None
    single: float | None = None

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GradientBin:
    """Figs. 7 and 8: how the errors (model minus reference) of a quantity are distributed; ``count`` of them from ``low`` to ``high``."""

    FILE: ClassVar[str] = "gradient_histogram.csv"
    phase: str
    pressure_GPa: float
    quantity: Literal["force", "gradient_centroid", "gradient_force_constants", "bo_force_centroid"]
    averaged: int
    unit: str
    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GradientParity:
    """Figs. 7 and 8: one component of an averaged gradient by the reference and by the model."""

    FILE: ClassVar[str] = "gradient_parity.csv"
    phase: str
    pressure_GPa: float
    quantity: Literal["force", "gradient_centroid", "gradient_force_constants", "bo_force_centroid"]
    unit: str
    reference: float
    predicted: float

    def __post_init__(self) -> None:
        _check_unit(self.quantity, self.unit, GRADIENT_UNITS)


@dataclass(frozen=True)
class GibbsCorrection:
    """G by DFT minus G by the model from the labels of one ensemble: first order, its standard error, second order."""

    FILE: ClassVar[str] = "gibbs_correction.csv"
    phase: str
    pressure_GPa: float
    n_labels: int
    correction_eV_per_atom: float
    correction_error_eV_per_atom: float | None
    second_order_eV_per_atom: float | None


@dataclass(frozen=True)
class LearningPoint:
    """A model after one round of learning, and its errors on one set."""

    FILE: ClassVar[str] = "learning.csv"
    step: str
    generation: int
    model_id: str
    set: str
    energy_rmse_eV_per_atom: float | None
    force_rmse_eV_per_A: float | None
    stress_rmse_GPa: float | None
    n_labels: int


@dataclass(frozen=True)
class Cost:
    """What a step of the campaign took."""

    FILE: ClassVar[str] = "cost.csv"
    step: str
    n_structures: int
    n_evaluations: int
    n_labels: int
    wall_s: float


@dataclass(frozen=True)
class FailureRow:
    """A structure that a step gave up, and why."""

    FILE: ClassVar[str] = "failures.csv"
    step: str
    id: str
    reason: str


Row = TypeVar("Row")

TABLES: tuple[type, ...] = (
    ModelError,
    Parity,
    Enthalpy,
    Ranked,
    SpaceGroups,
    Mode,
    Band,
    GradientError,
    GradientBin,
    GradientParity,
    GibbsCorrection,
    LearningPoint,
    Cost,
    FailureRow,
)
"""Every table of a campaign."""

TABLES_FOLDER = "tables"
"""Below ``campaign/``."""


def columns(table: type) -> tuple[str, ...]:
    """Names of the columns of a table, in order."""
    return tuple(field.name for field in fields(table))


def ranking_file(pressure: float) -> str:
    """``ranking-100GPa.csv``."""
    return f"ranking-{pressure:g}GPa.csv"


def dispersion_file(phase: str, pressure: float) -> str:
    """``dispersion-Im-3m-60GPa.csv``; characters that file names should not hold become underscores."""
    return f"dispersion-{re.sub(r'[^A-Za-z0-9_.+-]', '_', phase)}-{pressure:g}GPa.csv"


def pressure_of_file(name: str) -> float:
    """The pressure (GPa) in the name of a ranking or dispersion; raises ``InputError`` when there is none."""
    found = re.search(r"-(\d+(?:\.\d+)?)GPa\.csv$", name)
    if not found:
        raise InputError(f"{name}: the name must end in -<pressure>GPa.csv, e.g. {ranking_file(100)}")
    return float(found[1])


def phase_of_file(name: str) -> str:
    """The phase in the name of a dispersion."""
    return re.sub(r"-(\d+(?:\.\d+)?)GPa\.csv$", "", name).removeprefix("dispersion-")


def read(table: type[Row], path: str | Path) -> list[Row]:
    """All rows of ``path``, in the order of the file; see `rows_of`."""
    return list(rows_of(table, path))


def read_if_there(table: type[Row], folder: str | Path, name: str | None = None) -> list[Row]:
    """All rows of ``folder / name`` (None: the table's own file), none when there is no such file."""
    path = Path(folder) / (name or table.FILE)  # type: ignore[attr-defined]
    return read(table, path) if path.is_file() else []


def rows_of(table: type[Row], path: str | Path) -> Iterator[Row]:
    """Rows of the CSV file ``path`` one by one, as instances of ``table``.

    Raises ``InputError`` (on the first row asked for) when the file is missing, a column is missing or has another unit in its name, a
    cell is no number, a word is not one of those allowed, or a unit is not the one of the quantity.
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
                    values[name] = default if text is None and default is not _REQUIRED else convert((text or "").strip())
                except ValueError as error:
                    raise InputError(f"{file}: line {lines.line_num}: {name}: {text!r}: {error}") from None
            try:
                yield table(**values)
            except ValueError as error:
                raise InputError(f"{file}: line {lines.line_num}: {error}") from None


def write(table: type[Row], path: str | Path, rows: Iterable[Row]) -> None:
    """Write ``rows`` to the CSV file ``path`` atomically; numbers with ten digits, ``None`` and NaN as empty cells."""
    names = columns(table)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([cell(getattr(row, name)) for name in names] for row in rows)


_REQUIRED: Any = object()


@cache
def _readers(table: type) -> dict[str, tuple[Callable[[str], Any], Any]]:
    hints = get_type_hints(table)
    missing = fields(table)[0].default
    return {field.name: (_reader(hints[field.name]), _REQUIRED if field.default is missing else field.default) for field in fields(table)}


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
    """A value as it stands in a table: numbers with ten digits, nothing for ``None`` and what is no finite number."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _check_unit(quantity: str, unit: str, allowed: dict[str, str]) -> None:
    if unit != allowed.get(quantity, unit):
        raise ValueError(f"unit: {unit!r}: {quantity} must be in {allowed[quantity]}; convert the numbers")


_UNIT_WORDS = r"_(?:m?eV|meV|Ry|Ha|kJ|kcal|J|GPa|kbar|Mbar|bar|Pa|A3?|bohr3?|nm3?|cm1|cm2|THz2?|K|s|h|per|atom|mol|cell|fu)(?=_|$)"


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
        other = next((known for known in there if known not in columns(table) and _stem(known) == _stem(name)), None)
        if other is not None:
            problems.append(f"{file}: column {other}: wrong unit; convert the numbers and name the column {name}")
        else:
            problems.append(f"{file}: column {name} is missing; needed are {', '.join(columns(table))}")
    if problems:
        raise InputError(*problems)
