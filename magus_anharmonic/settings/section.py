"""What every block of keys is made of: types with units, folding of names, reading, and errors that
name the key path."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from magus_anharmonic.errors import InputError, one_line
from magus_anharmonic.units import NUMBER, UNITS, dimension_of, quantity


@dataclass(frozen=True)
class In:
    """The unit of a key's bare numbers; a text with another unit (``150 GPa``) is converted."""

    unit: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        reader = BeforeValidator(lambda value: quantity(value, self.unit))
        return reader.__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        units = "|".join(re.escape(name) for name in UNITS[dimension_of(self.unit)])
        text = {"type": "string", "pattern": rf"^\s*{NUMBER}\s*({units})?\s*$"}
        return {"anyOf": [handler(schema["schema"]), text]}


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[int, Field(ge=0, strict=True)]


def ascending(values: list[float]) -> list[float]:
    """The same values; ValueError unless each is given once, ascending."""
    for first, second in pairwise(values):
        if second <= first:
            raise ValueError(
                f"out of order: {second:g} comes after {first:g}; give each once, ascending"
            )
    return values


def element(symbol: str) -> str:
    """The same symbol; ValueError unless it is that of a chemical element."""
    from ase.data import atomic_numbers

    from magus_anharmonic.structures import HYDROGEN

    if symbol == "X" or symbol not in atomic_numbers:
        hint = "; write H, and give its mass where masses are asked for" * (symbol in HYDROGEN)
        raise ValueError(f"{symbol!r} is not a chemical element{hint}")
    return symbol


def _even(number: int) -> int:
    if number % 2:
        raise ValueError("must be even: configurations come in +u/-u pairs")
    return number


def _three(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError("must be three whole numbers, e.g. [8, 1, 1]")
    return tuple(value)


Even = Annotated[int, Field(ge=2, strict=True), AfterValidator(_even)]
EvenFrom4 = Annotated[int, Field(ge=4, strict=True), AfterValidator(_even)]
OfThree = BeforeValidator(_three)
Three = Annotated[tuple[Count, Count, Count], OfThree]
Element = Annotated[str, AfterValidator(element)]
Seed = Annotated[int, Field(ge=0, description="same input and seed, same result")]
Device = Annotated[
    Literal["cpu", "cuda"] | None,
    Field(description="cpu or cuda; left out: cuda when there is one"),
]

Energy = Annotated[Positive, In("eV/atom")]
Force = Annotated[Positive, In("eV/A")]
Length = Annotated[Positive, In("A")]
Symprec = Annotated[Positive, Field(le=1.0), In("A")]
"""Above, neighbours pass for one site: spglib finds no group, or ends the process."""
Spacing = Annotated[Positive, In("2 pi/A")]
Seconds = Annotated[Positive, In("s")]
Kelvin = Annotated[NonNegative, In("K")]

MAX_PRESSURE_GPA = 2000.0


def snake_case(key: str) -> str:
    """``nSample`` -> ``n_sample``, ``MainCalculator`` -> ``main_calculator``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()


def check_pressure(value: Any) -> float:
    """A pressure in GPa, or a text with its unit; refuses numbers that were meant in Pa or kbar.
    Raises ValueError."""
    pressure = quantity(value, "GPa")
    if not math.isfinite(pressure):
        raise ValueError("must be one number in GPa")
    if pressure < 0:
        raise ValueError("must not be negative (GPa, positive = compressed)")
    if pressure >= 1e6:
        raise ValueError(
            f"looks like Pa: {pressure:g} Pa = {pressure / 1e9:g} GPa; give {pressure / 1e9:g} GPa"
        )
    if pressure > MAX_PRESSURE_GPA:
        raise ValueError(
            f"looks like kbar or MPa; give GPa, at most {MAX_PRESSURE_GPA:g} ({pressure:g} kbar ="
            f" {pressure / 10:g} GPa)"
        )
    return float(pressure)


PressureGPa = Annotated[float, BeforeValidator(check_pressure), In("GPa")]
Ascending = AfterValidator(ascending)
PressuresGPa = Annotated[list[PressureGPa], Field(min_length=1), Ascending]


def check_path(value: Any) -> Any:
    """A path (or name) that stays below the project folder, or is absolute; raises ValueError."""
    if isinstance(value, str) and (
        os.path.normpath(value).split(os.sep)[0] == ".." or "\0" in value
    ):
        raise ValueError("leaves the project folder; give an absolute path if that is meant")
    return value


InsidePath = Annotated[str, BeforeValidator(check_path)]
Checkpoint = Annotated[
    InsidePath,
    Field(
        description=(
            "a name MatterSim knows, a path, or a checkpoint this package ships; in a search that"
            " learns also scratch: new weights, see learning.scratch"
        )
    ),
]
SCRATCH = "scratch"
"""In place of a checkpoint: there is none, the search makes its first model."""
FOUNDATION = "mattersim-v1.0.0-1M"
"""The model where no key names another."""


def absolute_file(typed: str) -> str:
    """What was typed on the command line, which may lie anywhere: an absolute path when it is a
    file, else the name as it is."""
    return os.path.abspath(typed) if os.path.isfile(typed) else typed


class Section(BaseModel):
    """Base of every block of keys: frozen, unknown keys refused, camelCase folded to snake_case.

    ``old_names``: keys that earlier versions had, and what they are called now; both are read.
    """

    old_names: ClassVar[dict[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _fold_case(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        folded: dict[str, Any] = {}
        for key, value in data.items():
            name = snake_case(str(key)) if str(key) not in cls.model_fields else str(key)
            name = cls.old_names.get(name, name)
            name = name if name in cls.model_fields else str(key)
            if name in folded:
                raise ValueError(f"{key} is given twice (camelCase and snake_case, or an old name)")
            # who calls from Python has numbers and matrices of numpy
            folded[name] = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        return folded


T = TypeVar("T", bound=Section)


def parse(model: type[T], data: Any, path: str = "") -> T:
    """Validate ``data`` as ``model``; raises ``InputError`` whose lines start with the key path."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = (_explain(model, item, path).splitlines() for item in error.errors())
        raise InputError(*chain.from_iterable(lines)) from None


def _explain(model: type[BaseModel], item: dict[str, Any], path: str) -> str:
    # of a union pydantic names the member that was tried: literal['a','b'], list[int]; a key may
    # hold a bracket too
    about_a_key = item["type"] in ("extra_forbidden", "missing")
    last = len(item["loc"]) - 1
    location = [
        str(part)
        for index, part in enumerate(item["loc"])
        if "[" not in str(part) or (about_a_key and index == last)
    ]
    where = ".".join([path, *location] if path else location)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(location[-1], fields_at(model, location[:-1]))}"
    if item["type"] == "missing":
        return f"{where}: is missing ({fields_at(model, location[:-1]).get(location[-1], '')})"
    text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not where:  # what is wrong between blocks names them itself
        return text
    shown = "" if isinstance(value, dict) else f"{value!r}: "
    return f"{where}: {shown}{text}"


def fields_at(model: type[BaseModel], location: list[str]) -> dict[str, str]:
    """Names and descriptions of the keys of the section at ``location`` below ``model``."""
    for part in location:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [
                a
                for a in getattr(annotation, "__args__", (annotation,))
                if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = inner[0] if inner else model
    return {name: field.description or "" for name, field in model.model_fields.items()}


def nearest(key: str, names: Any) -> str:
    """``'; did you mean n_sample?'`` when a valid name is close, else the list of valid names."""
    names = list(names)
    close = difflib.get_close_matches(
        snake_case(key), names, n=1, cutoff=0.6
    ) or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; allowed: {', '.join(sorted(names))}" if len(names) <= 30 else ""


LARGEST_FILE = 1_000_000
"""Bytes of a file of settings; PyYAML takes a second for some 100,000."""
LARGEST_BY_ALIASES = 1e5
"""Characters to which a short file may grow by its aliases: a kilobyte of them can stand for more
than any memory holds."""


LARGEST_NUMBER, LONGEST_NUMBER = 2**63, 400
"""Of whole numbers, what 64 bits hold; of every number, its characters."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, which makes whole numbers of any size, at a cost that grows with the square of
    their digits."""

    def construct_number(self, node: yaml.ScalarNode) -> float:
        integer = node.tag.endswith(":int")
        if len(node.value) <= LONGEST_NUMBER:
            value = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
            if not integer or abs(value) < LARGEST_NUMBER:
                return value
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value[:20]}...: a number too large or too long", node.start_mark
        )


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def _safe_load(file: Path) -> Any:
    n_bytes = file.stat().st_size
    if n_bytes > LARGEST_FILE:
        raise InputError(
            f"{file}: has {n_bytes / 1e6:.1f} MB, and settings at most {LARGEST_FILE / 1e6:g}:"
            " is it the file that is meant? Structures, labels and tables have files of their own"
        )
    loader = _Loader(file.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if problems := list(_misuses(node, "", set(), frozenset())):
            raise InputError(*(f"{file}: {problem}" for problem in problems))
        size = _written_out(node, {})
        if size > LARGEST_BY_ALIASES + 10 * loader.index:
            raise InputError(
                f"{file}: its aliases (*) stand for more than {size:.1e} characters; write out what"
                " is meant"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _written_out(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Characters of a block in which every alias is replaced by what it stands for."""
    if node not in known:
        parts = (
            chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        )
        known[node] = 1.0 + (
            len(node.value)
            if isinstance(node, yaml.ScalarNode)
            else sum(_written_out(part, known) for part in parts)
        )
    return known[node]


def _misuses(
    node: yaml.Node, path: str, seen: set[yaml.Node], outer: frozenset[yaml.Node]
) -> Iterator[str]:
    """Keys that are given twice in one block, of which YAML would silently take the last, and
    blocks that hold themselves."""
    if node in outer:
        yield (
            f"{path}: holds itself (line {node.start_mark.line + 1}, by an alias *); write out what"
            " is meant"
        )
    if node in seen or not isinstance(node.value, list):
        return
    seen.add(node)
    lines: dict[tuple[str, str], int] = {}
    for key, item in node.value if isinstance(node, yaml.MappingNode) else enumerate(node.value):
        where = f"{path}.{getattr(key, 'value', key)}".lstrip(".")
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines and not key.tag.endswith(":merge"):
                yield (
                    f"{where}: is given twice, in lines {lines[key.tag, key.value]} and {line};"
                    " keep one"
                )
            lines[key.tag, key.value] = line
        yield from _misuses(item, where, seen, outer | {node})


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping safely; raises ``InputError`` that names file and line, also for a key
    given twice and for what holds itself."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file (give the input with -i FILE)")
    try:
        data = _safe_load(file)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        RecursionError,
        OverflowError,
        OSError,
    ) as error:  # a date 2026-99-99 is a ValueError, a deep list a RecursionError
        raise InputError(f"{file}: not readable as YAML: {one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{file}: must hold keys and values, found {type(data).__name__}")
    return data
