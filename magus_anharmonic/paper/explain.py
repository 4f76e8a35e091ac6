"""What in a run could explain that a value differs: labels, errors of the model, supercell,
sampling, number of structures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magus_anharmonic.files import read_json
from magus_anharmonic.paper.expected import NAMES, ExpectedValue
from magus_anharmonic.paper.found_values import Found
from magus_anharmonic.paper.tables import Cost, ModelError, TableFolder
from magus_anharmonic.status import present_steps


@dataclass(frozen=True)
class ModelErrors:
    """RMSE of a model (eV/atom, eV/A, GPa; None where unknown), and on what: model, set and number
    of labels."""

    energy: float | None
    force: float | None
    where: str


@dataclass(frozen=True)
class Context:
    """What the run was: from ``run.json`` and the tables; empty or None where they do not say.

    labels : the labelers' settings in words; errors : of the foundation and the finetuned model;
    foundation : the checkpoint of the former; undone : steps that are not done, each with its state
    in words.
    """

    labels: tuple[str, ...] = ()
    supercells: tuple[str, ...] = ()
    n_configs: tuple[int, ...] = ()
    n_labels: int | None = None
    errors: dict[str, ModelErrors] = field(default_factory=dict)
    foundation: str = ""
    undone: dict[str, str] = field(default_factory=dict)


def read_context(tables: Path) -> Context:
    """Of the campaign whose tables are in ``tables``; raises ``InputError`` for files that are
    there and not readable."""
    root = tables.parent
    settings = _json(root / "run.json").get("settings", {})
    steps = present_steps(root, _json(root / "steps.json"))
    known = TableFolder(tables)
    return Context(
        labels=tuple(
            dict.fromkeys(
                _label_words(block)
                for block in _find(settings, "labeler")
                if isinstance(block, dict)
            )
        ),
        supercells=tuple(
            dict.fromkeys(
                _supercell_words(value) for value in _find(settings, "supercell") if value
            )
        ),
        n_configs=tuple(
            dict.fromkeys(
                int(value) for value in _find(settings, "n_configs") if isinstance(value, int)
            )
        ),
        n_labels=_n_labels(known.rows(Cost)),
        errors=_errors(known.rows(ModelError)),
        foundation=str(settings.get("foundation") or ""),
        undone={
            name: _state(step)
            for name, step in steps.items()
            if isinstance(step, dict) and step.get("status") not in ("done", None)
        },
    )


def _state(step: dict[str, Any]) -> str:
    reason = str(step.get("reason") or "")
    return f"{step['status']}{f': {reason}' if reason else ''}"


LEARNING = ("learn", "merge", "final")
STEPS: dict[str, tuple[str, ...]] = {
    "model_errors.csv": LEARNING,
    "enthalpies.csv": (*LEARNING, "produce", "foundation", "relax"),
    "ranking-<P>GPa.csv": (*LEARNING, "produce", "relax", "sscha"),
    "space_groups.csv": (*LEARNING, "produce", "relax", "sscha", "dft"),
    "modes.csv": (*LEARNING, "hessian"),
    "gradient_errors.csv": (*LEARNING, "hessian", "errors"),
}
"""Table -> prefixes of the names of the steps that it is computed from."""


def undone_steps(wanted: ExpectedValue, context: Context) -> list[str]:
    """``"hessian (failed: ...)"`` for every step that is not done and on which the value rests."""
    kinds = STEPS[NAMES[wanted.name].table]
    return [f"{name} ({state})" for name, state in context.undone.items() if name.startswith(kinds)]


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _find(data: Any, key: str) -> Iterator[Any]:
    """Every value under ``key``, however deep."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key:
                yield value
            else:
                yield from _find(value, key)
    elif isinstance(data, list):
        for item in data:
            yield from _find(item, key)


def _label_words(block: dict[str, Any]) -> str:
    arguments = block.get("arguments") or {}
    parts = [
        str(block.get("calculator", "?")),
        *(f"{name}={value}" for name, value in sorted(arguments.items())),
    ]
    if not arguments:
        parts.append("(its default settings)")
    spacing = block.get("k_spacing")
    return " ".join(
        [*parts, *([f"k_spacing={spacing:g} (2 pi/A)"] if isinstance(spacing, int | float) else [])]
    )


def _supercell_words(value: Any) -> str:
    return (
        "x".join(str(n) for n in value)
        if isinstance(value, list | tuple)
        else f"min_length {value.get('min_length')} A"
    )


def _errors(rows: Sequence[ModelError]) -> dict[str, ModelErrors]:
    """Of each model on the test set, else on another one."""
    found: dict[str, ModelErrors] = {}
    for chosen in ("test", "validation", "training"):
        for row in rows:
            if row.set == chosen and row.model not in found:
                where = f"{row.model} model, {row.n} {chosen} labels"
                found[row.model] = ModelErrors(
                    row.energy_rmse_eV_per_atom, row.force_rmse_eV_per_A, where
                )
    return found


def _n_labels(rows: Sequence[Cost]) -> int | None:
    return sum(row.n_labels for row in rows) if rows else None


def explanations(
    wanted: ExpectedValue, found: Found, context: Context, difference: float | None
) -> tuple[str, ...]:
    """Possible reasons, each with the run's own numbers; empty when the run shows none
    (``difference``: in the unit of the tables)."""
    reasons = [
        *_structures(wanted, found),
        *_foundation(wanted, context),
        *_model(wanted, found, context, difference),
        *_several_models(found),
        *_sampling(wanted, found, context, difference),
        *_cell(wanted, context),
        *_labels(wanted, context),
    ]
    undone = undone_steps(wanted, context)
    if undone:
        reasons.append(f"steps are not done: {', '.join(undone[:6])}")
    return tuple(reasons)


def _structures(wanted: ExpectedValue, found: Found) -> list[str]:
    if wanted.out_of is not None and found.n is not None and found.n < wanted.out_of:
        return [
            f"only {found.n} structures have a free energy, {wanted.out_of} in the expected count"
        ]
    if wanted.name in ("enthalpy_rank", "enthalpy_above_lowest") and found.n is not None:
        return [f"{found.n} structures were compared: a wider search finds more below"]
    return []


LARGEST_SHIFT_TOLD = 200.0
"""GPa; further than this a crossing moves out of any diagram."""


def _model(
    wanted: ExpectedValue, found: Found, context: Context, difference: float | None
) -> list[str]:
    """The error of the model in the unit of the value, and whether it reaches."""
    if NAMES[wanted.name].table == "model_errors.csv":
        reference = f", {wanted.n_labels} behind the expected one" if wanted.n_labels else ""
        return (
            []
            if context.n_labels is None
            else [f"the campaign made {context.n_labels} labels{reference}"]
        )
    errors = _errors_behind(wanted, context)
    if errors is None:
        return []
    rmse, where = errors.energy, f"({errors.where})"
    if wanted.name == "transition_pressure" and rmse is not None and found.slope:
        shift = math.sqrt(2.0) * rmse / found.slope
        reach = (
            "" if difference is None else ": enough" if abs(difference) <= shift else ": not enough"
        )
        far = (
            f"up to {shift:.1f} GPa{reach}"
            if shift < LARGEST_SHIFT_TOLD
            else "more than 200 GPa if none of it cancels between the two: enough"
        )
        return [
            f"the model's energy RMSE of {1e3 * rmse:.1f} meV/atom {where} moves the crossing by"
            f" {far}"
        ]
    if (
        wanted.name in ("enthalpy_above_lowest", "gibbs_minus_enthalpy", "reordering_window")
        and rmse is not None
    ):
        reach = (
            ""
            if difference is None
            else (
                ": enough" if abs(difference) <= math.sqrt(2.0) * rmse else ": not enough by itself"
            )
        )
        return [f"the model's energy RMSE is {1e3 * rmse:.1f} meV/atom {where}{reach}"]
    if (
        wanted.name
        in (
            "transition_pressure",
            "stability_sequence",
            "lowest_space_group",
            "enthalpy_rank",
            "n_transformed",
        )
        and rmse is not None
    ):
        return [
            f"the model's energy RMSE is {1e3 * rmse:.1f} meV/atom {where}: phases closer than that"
            " may change places"
        ]
    if (
        wanted.name.startswith("critical_pressure")
        and errors.force is not None
        and wanted.energies_by != "dft"
    ):
        return [f"the model's force RMSE is {1e3 * errors.force:.0f} meV/A {where}"]
    return []


def _errors_behind(wanted: ExpectedValue, context: Context) -> ModelErrors | None:
    """Errors of the model that gave the value: the foundation model where it is asked for, else the
    last one."""
    if "foundation" in (wanted.table_source, wanted.model):
        return context.errors.get("foundation")
    return context.errors.get("finetuned", context.errors.get("foundation"))


def _foundation(wanted: ExpectedValue, context: Context) -> list[str]:
    """Another foundation model than the one behind the expected value."""
    if not (wanted.foundation and context.foundation) or context.foundation == wanted.foundation:
        return []
    return [
        f"the foundation model of this run is {context.foundation}; behind the expected value:"
        f" {wanted.foundation}"
    ]


def _several_models(found: Found) -> list[str]:
    if len(found.models) > 1:
        return [f"numbers of several models are mixed ({', '.join(found.models)})"]
    return []


def _sampling(
    wanted: ExpectedValue, found: Found, context: Context, difference: float | None
) -> list[str]:
    if found.between is not None:
        low, high = found.between
        return [f"no pressure between {low:g} and {high:g} GPa was relaxed"]
    reasons = []
    if found.error is not None and difference is not None and abs(difference) <= 4.0 * found.error:
        own = f"{found.error / wanted.factor:.3g} {wanted.unit}"
        reasons.append(
            f"the value's own error is {own}: the difference is {abs(difference) / found.error:.1f}"
            " times that"
        )
    if "floor" in found.extra:
        reasons.append(
            f"{found.n} configurations: averaging alone leaves"
            f" {found.extra['floor'] / wanted.factor:.3g} {wanted.unit}"
        )
    elif NAMES[wanted.name].table in ("ranking-<P>GPa.csv", "modes.csv") and context.n_configs:
        reasons.append(f"at most {max(context.n_configs)} configurations per population")
    return reasons


def _cell(wanted: ExpectedValue, context: Context) -> list[str]:
    if (
        NAMES[wanted.name].table not in ("ranking-<P>GPa.csv", "modes.csv")
        or not context.supercells
    ):
        return []
    own = " and ".join(context.supercells)
    expected = "" if wanted.supercell is None else "x".join(str(n) for n in wanted.supercell)
    if expected and context.supercells == (expected,):
        return []
    return [f"supercell {own}" + (f", {expected} behind the expected value" if expected else "")]


def _labels(wanted: ExpectedValue, context: Context) -> list[str]:
    """The DFT of the run beside that of the expected value; nothing when the words are the same, or
    when nothing is expected."""
    if not context.labels or (
        len(context.labels) == 1 and wanted.labels in (None, context.labels[0])
    ):
        return []
    several = "labels of several settings: " if len(context.labels) > 1 else "labels by "
    other = f"; behind the expected value: {wanted.labels}" if wanted.labels else ""
    return [f"{several}{'; '.join(context.labels)}{other}"]
