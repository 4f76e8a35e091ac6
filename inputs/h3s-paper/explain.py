"""What of a run could explain that a value differs from the expected one, and why a value is not in
it: one line each, with the run's own numbers.

Lies beside the inputs of the paper; loaded by ``magus_anharmonic.paper.script``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magus_anharmonic.io.files import read_json
from magus_anharmonic.io.tables import TableFolder
from magus_anharmonic.paper.quantities import NEAR
from magus_anharmonic.paper.tables import (
    RANKING,
    TABLES,
    Cost,
    Enthalpy,
    Mode,
    ModelError,
    pressure_of_file,
    ranking_files,
)
from magus_anharmonic.runs.status import present_steps
from magus_anharmonic.structures import symbol_of

from .expected import NAMES, ExpectedValue


@dataclass(frozen=True)
class Found:
    """A value in the unit of its table, with its standard error (None: not known).

    bound : "<" or ">" where ``value`` is only a limit. words : instead of a number. n : how many
    structures or labels stand behind it. models : ids of the models behind it. between : where two
    numbers that it lies between are all that is known. slope : of a difference of enthalpies,
    eV/atom per GPa. floor : what averaging alone would leave.
    """

    value: float = math.nan
    error: float | None = None
    bound: str = ""
    words: tuple[str, ...] = ()
    n: int | None = None
    models: tuple[str, ...] = ()
    between: tuple[float, float] | None = None
    slope: float | None = None
    floor: float | None = None


def near(pressure: float, wanted: ExpectedValue) -> bool:
    """Whether a pressure (GPa) is the one that is asked for."""
    return abs(pressure - (wanted.pressure_GPa or 0.0)) < NEAR


def sources_of(wanted: ExpectedValue) -> tuple[str, ...]:
    """Of the rows of ``enthalpies.csv`` that count."""
    return (wanted.table_source,) if wanted.table_source else ("relax", "produce")


@dataclass(frozen=True)
class Context:
    """What the run was, from ``run.json``, ``steps.json`` and the tables.

    labels : the labelers' settings in words; foundation : that checkpoint; undone : steps that are
    not done, each with its state in words.
    """

    labels: tuple[str, ...] = ()
    supercells: tuple[str, ...] = ()
    n_configs: tuple[int, ...] = ()
    n_labels: int = 0
    errors: dict[str, ModelError] = field(default_factory=dict)
    foundation: str = ""
    undone: dict[str, str] = field(default_factory=dict)

    def undone_steps(self, wanted: ExpectedValue) -> str:
        """``"hessian (failed: ...)"`` for every step that is not done and on which the value
        rests."""
        kinds = ("learn", "merge", "final", *STEPS[NAMES[wanted.name].table])
        undone = [f"{k} ({state})" for k, state in self.undone.items() if k.startswith(kinds)]
        return ", ".join(undone[:6])


STEPS: dict[str, tuple[str, ...]] = {
    "model_errors.csv": (),
    "enthalpies.csv": ("produce", "foundation", "relax"),
    "ranking-<P>GPa.csv": ("produce", "relax", "sscha"),
    "space_groups.csv": ("produce", "relax", "sscha", "dft"),
    "modes.csv": ("hessian",),
    "gradient_errors.csv": ("hessian", "errors"),
}
"""Table -> prefixes of the names of the steps that it is computed from, besides learning."""


def read_context(tables: Path) -> Context:
    """Of the campaign whose tables are in ``tables``; raises ``InputError`` for files that are
    there and not readable."""
    run, steps = (
        read_json(tables.parent / name) if (tables.parent / name).is_file() else {}
        for name in ("run.json", "steps.json")
    )
    settings = run.get("settings", {})
    known = TableFolder(tables)
    errors: dict[str, ModelError] = {}
    for row in sorted(known.rows(ModelError), key=lambda row: row.set):  # the test set first
        errors.setdefault(row.model, row)
    return Context(
        labels=tuple(dict.fromkeys(map(_labels, _find(settings, "labeler")))),
        supercells=tuple(dict.fromkeys(map(_supercell, _find(settings, "supercell")))),
        n_configs=tuple(dict.fromkeys(_find(settings, "n_configs"))),
        n_labels=sum(row.n_labels for row in known.rows(Cost)),
        errors=errors,
        foundation=str(settings.get("foundation") or ""),
        undone={
            name: ": ".join(str(step[key]) for key in ("status", "reason") if step.get(key))
            for name, step in present_steps(tables.parent, steps).items()
            if step.get("status") not in ("done", None)
        },
    )


def _find(data: Any, key: str) -> Iterator[Any]:
    """Every value under ``key`` that is given, however deep."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from [value] * bool(value) if name == key else _find(value, key)
    elif isinstance(data, list):
        for item in data:
            yield from _find(item, key)


def _labels(block: dict[str, Any]) -> str:
    arguments = block.get("arguments") or {}
    words = [str(block.get("calculator", "?")), *(f"{k}={v}" for k, v in sorted(arguments.items()))]
    words += [] if arguments else ["(its default settings)"]
    spacing = block.get("k_spacing")
    return " ".join([*words, *([] if spacing is None else [f"k_spacing={spacing:g} (2 pi/A)"])])


def _supercell(value: Any) -> str:
    if isinstance(value, dict):
        return f"min_length {value.get('min_length')} A"
    return "x".join(map(str, value))


def explanations(
    wanted: ExpectedValue, found: Found, context: Context, difference: float | None
) -> list[str]:
    """What of the run could explain a difference (in the unit of the table), each with its own
    numbers."""
    table, unit = NAMES[wanted.name].table, wanted.unit
    reasons = []
    if found.n is not None and wanted.out_of is not None and found.n < wanted.out_of:
        reasons.append(f"{found.n} structures, {wanted.out_of} in the expected count")
    if table == Enthalpy.FILE and found.n is not None:
        reasons.append(f"{found.n} structures were compared")
    if wanted.foundation and context.foundation not in ("", wanted.foundation):
        reasons.append(f"foundation model {context.foundation}, expected {wanted.foundation}")
    if table == ModelError.FILE and context.n_labels:
        expected = f", expected {wanted.n_labels}" if wanted.n_labels else ""
        reasons.append(f"{context.n_labels} labels{expected}")
    by = "foundation" if "foundation" in (wanted.table_source, wanted.model) else "finetuned"
    model = context.errors.get(by, context.errors.get("foundation"))
    if model is not None and table != ModelError.FILE and wanted.energies_by != "dft":
        energy = model.energy_rmse_eV_per_atom
        shift = f", {math.sqrt(2) * energy / found.slope:.1f} GPa here" if found.slope else ""
        reasons.append(
            f"RMSE of the {by} model {1e3 * energy:.1f} meV/atom{shift},"
            f" {1e3 * model.force_rmse_eV_per_A:.0f} meV/A ({model.n} {model.set} labels)"
        )
    if len(found.models) > 1:
        reasons.append(f"several models: {', '.join(found.models)}")
    if found.between is not None:
        reasons.append("no pressure between {:g} and {:g} GPa was relaxed".format(*found.between))
    elif found.error and difference is not None:
        reasons.append(f"{abs(difference) / found.error:.1f} times the value's own error")
    if found.floor is not None:
        reasons.append(f"averaging alone leaves {found.floor / wanted.factor:.3g} {unit}")
    if table in (RANKING, Mode.FILE):
        if context.n_configs:
            reasons.append(f"{max(context.n_configs)} configurations per population at most")
        expected = _supercell(wanted.supercell) if wanted.supercell else ""
        if context.supercells and context.supercells != (expected,):
            other = f", expected {expected}" if expected else ""
            reasons.append(f"supercell {' and '.join(context.supercells)}{other}")
    if context.labels and not (
        len(context.labels) == 1 and wanted.labels in (None, *context.labels)
    ):
        other = f", expected {wanted.labels}" if wanted.labels else ""
        reasons.append(f"labels by {' and '.join(context.labels)}{other}")
    undone = context.undone_steps(wanted)
    return [*reasons, *([f"not done: {undone}"] if undone else [])]


def why_absent(wanted: ExpectedValue, tables: TableFolder) -> str:
    """One clause: which table, phase, pressure or method is missing."""
    name = NAMES[wanted.name].table
    if name == RANKING:
        files = ranking_files(tables.folder)
        pressures = sorted(pressure_of_file(path.name) for path in files)
        if not files:
            return f"there is no {name}"
        if not any(near(pressure, wanted) for pressure in pressures):
            return f"there is no ranking at this pressure ({_list(pressures)} GPa there is)"
        return "the ranking at this pressure has too few free energies for it"
    rows: list[Any] = tables.rows(next(table for table in TABLES if table.FILE == name))  # type: ignore[attr-defined]
    if not rows:
        return f"{name} is empty" if (tables.folder / name).is_file() else f"there is no {name}"
    if name == Enthalpy.FILE:
        rows = [row for row in rows if row.source in sources_of(wanted)]
    for key in ("phase", "phases", "irrep", "method", "energies_by", "model", "set", "quantity"):
        given = getattr(wanted, key)
        column = "phase" if key == "phases" else key
        for value in given if isinstance(given, list) else [given] if given is not None else []:
            names = [
                {getattr(row, column)}
                | (
                    {symbol_of(row.space_group)}
                    if key == "phase" and name == Enthalpy.FILE
                    else set()
                )
                for row in rows
            ]
            if not any(value in there for there in names):
                known = set().union(*names) - {""}
                return f"{name} has no {column} {value} (it has {_list(known)})"
            if key != "phases":
                rows = [row for row, there in zip(rows, names, strict=True) if value in there]
    pressures = sorted({row.pressure_GPa for row in rows if hasattr(row, "pressure_GPa")})
    if wanted.pressure_GPa is not None and not any(near(p, wanted) for p in pressures):
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


def _list(values: Iterable[Any]) -> str:
    """The first eight in order."""
    found = [f"{v:g}" if isinstance(v, float) else str(v) for v in sorted(values)]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return (", ".join(found[:8]) or "none") + more
