"""Table I and the figures of the paper.

Fig. 4b: dispersions from the free-energy Hessian (and what is to be compared with them).

Every figure that the tables of a campaign allow, each with its numbers as CSV; and what is missing,
with the reason.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from magus_anharmonic.errors import InputError
from magus_anharmonic.files import remove, safe_name
from magus_anharmonic.paper import enthalpies, model_table, reordering, small_figures, tables
from magus_anharmonic.paper.tables import Band
from magus_anharmonic.phase_diagram import style
from magus_anharmonic.ranking.candidate import Candidate


def ticks(rows: Sequence[Band]) -> list[tuple[float, str]]:
    """(distance, label) of the special points, in order."""
    found = {round(row.distance, 9): row.label for row in rows if row.label}
    return sorted(found.items())


def lowest(rows: Sequence[Band]) -> dict[str, float]:
    """Method -> lowest frequency of its dispersion, cm^-1 (imaginary: negative)."""
    return {
        method: min(row.frequency_cm1 for row in rows if row.method == method)
        for method in dict.fromkeys(row.method for row in rows)
    }


def draw_bands(rows: Sequence[Band], folder: Path, title: str, name: str) -> list[Path]:
    """Lines for the branches of each method, error bars where a point has one; imaginary
    frequencies below zero."""
    with style.figure(title=title) as (made, (axes,)):
        axes.axhline(0.0, color=style.GREY, lw=1)
        for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
            curves: dict[int, list[Band]] = {}
            for row in rows:
                if row.method == method:
                    curves.setdefault(row.branch, []).append(row)
            for position, branch in enumerate(sorted(curves)):
                _branch(
                    axes,
                    sorted(curves[branch], key=lambda row: row.distance),
                    index,
                    method if position == 0 else "",
                )
        for where, _ in ticks(rows):
            axes.axvline(where, color=style.GREY, lw=0.6)
        if ticks(rows):
            axes.set_xticks(
                [where for where, _ in ticks(rows)], [label for _, label in ticks(rows)]
            )
        else:
            axes.set_xlabel("distance in reciprocal space (2π/Å)")
        distances = [row.distance for row in rows]
        if max(distances) > min(distances):
            axes.set_xlim(min(distances), max(distances))
        axes.set_ylabel("frequency (cm⁻¹; imaginary below zero)")
        style.legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)
        return style.save(made, folder, name)


def _branch(axes, points: Sequence[Band], index: int, label: str) -> None:  # type: ignore[no-untyped-def]
    x, y = [p.distance for p in points], [p.frequency_cm1 for p in points]
    line = "-" if len(points) > 1 else "none"
    axes.plot(
        x,
        y,
        color=style.color(index),
        ls=line,
        marker=None if len(points) > 1 else style.marker(index),
        lw=1,
        label=label or None,
    )
    certain = [p for p in points if p.error_cm1 is not None]
    if certain:
        bars = [p.error_cm1 for p in certain]
        axes.errorbar(
            [p.distance for p in certain],
            [p.frequency_cm1 for p in certain],
            yerr=bars,
            fmt="none",
            color=style.color(index),
            capsize=2,
        )


log = logging.getLogger(__name__)

REFERENCE_PHASE = "Im-3m"
"""Phase that the relative enthalpies refer to where the campaign names none and has it."""


@dataclass(frozen=True)
class FigureMade:
    """A figure: name of its files in ``figures/``, caption, alternative text for those who cannot
    see it, and the files.

    ``csv`` holds the points, ``summary`` what follows from them (ranks, critical pressures,
    transitions); None where nothing does.
    """

    name: str
    title: str
    alt: str
    csv: Path
    svg: Path
    png: Path
    summary: Path | None = None


@dataclass(frozen=True)
class FigureMissing:
    """A figure that the campaign does not allow yet, and why."""

    name: str
    reason: str


class Figures(NamedTuple):
    """What `make_figures` did."""

    made: list[FigureMade]
    missing: list[FigureMissing]


class Missing(Exception):
    """Why a figure cannot be made."""


@dataclass(frozen=True)
class Drawing:
    """A figure to be written: its points and what follows from them (rows of one dataclass each),
    and who draws them into a folder."""

    name: str
    title: str
    alt: str
    rows: Sequence[Any]
    draw: Callable[[Path], list[Path]]
    summary: Sequence[Any] = ()


def make_figures(campaign_folder: str | Path) -> Figures:
    """Write every figure to ``campaign/figures/`` as ``NAME.csv`` (and ``NAME-summary.csv``),
    ``NAME.svg`` and ``NAME.png``.

    ``campaign_folder`` is ``PATH/campaign`` or the PATH above it. Files of figures that are no
    longer possible are removed. A table that is missing or wrong costs its figures alone. Raises
    ``InputError`` when there is no such folder.
    """
    campaign = find_campaign(campaign_folder)
    folder = campaign / "figures"
    made, missing = [], []
    for name, maker in MAKERS:
        try:
            for drawing in maker(campaign / tables.TABLES_FOLDER):
                made.append(_write(drawing, folder))
        except (Missing, InputError) as reason:
            missing.append(FigureMissing(name, str(reason)))
    _remove_stale(folder, {figure.name for figure in made})
    log.info("%d figures in %s, %d missing", len(made), folder, len(missing))
    return Figures(made, missing)


def find_campaign(folder: str | Path) -> Path:
    """The folder that holds ``tables/``: the given one or its ``campaign/``; raises ``InputError``
    when neither is a folder."""
    path = Path(folder)
    if (path / "campaign").is_dir() and not (path / tables.TABLES_FOLDER).is_dir():
        return path / "campaign"
    if not path.is_dir():
        raise InputError(
            f"{path}: no such folder; give the folder of campaign.yaml, or its campaign/"
        )
    return path


def _write(drawing: Drawing, folder: Path) -> FigureMade:
    numbers = folder / f"{drawing.name}.csv"
    tables.write(type(drawing.rows[0]), numbers, drawing.rows)
    summary = folder / f"{drawing.name}-summary.csv" if drawing.summary else None
    if summary is not None:
        tables.write(type(drawing.summary[0]), summary, drawing.summary)
    svg, png = drawing.draw(folder)
    return FigureMade(drawing.name, drawing.title, drawing.alt, numbers, svg, png, summary)


def _remove_stale(folder: Path, names: set[str]) -> None:
    ours = re.compile(r"(table_1|fig_\d.*|learning)$")
    for path in folder.glob("*"):
        if (
            path.suffix in (".csv", ".svg", ".png")
            and ours.match(path.stem)
            and path.stem.removesuffix("-summary") not in names
        ):
            remove(path)


def _rows(table: type, folder: Path, step: str) -> list[Any]:
    """Rows of a table; `Missing` says which step makes it."""
    path = folder / table.FILE  # type: ignore[attr-defined]
    if not path.is_file():
        raise Missing(f"{path.name} is not there: {step} is not done")
    rows = tables.read(table, path)
    if not rows:
        raise Missing(f"{path.name} is empty: {step} left nothing")
    return rows


def _table_one(folder: Path) -> Iterator[Drawing]:
    lines = model_table.table_one(_rows(tables.ModelError, folder, "training the final model"))
    parts = [
        f"{r.model} on {r.set}: {r.energy_meV_per_atom:.1f} meV/atom, {r.force_meV_per_A:.0f} meV/Å"
        for r in lines
    ]
    title = "Table I: root-mean-square errors of the foundation and the finetuned model"
    yield Drawing(
        "table_1",
        title,
        "; ".join(parts),
        lines,
        lambda out: model_table.draw_table_one(lines, out),
    )


def _enthalpy_volume(folder: Path) -> Iterator[Drawing]:
    rows = [
        row
        for row in _rows(tables.Enthalpy, folder, "the production search")
        if row.source == "foundation"
    ]
    if not rows:
        raise Missing("enthalpies.csv has no rows of the foundation model")
    for pressure in sorted({row.pressure_GPa for row in rows}):
        shown = [row for row in rows if row.pressure_GPa == pressure]
        found = enthalpies.ranks(shown)
        words = [
            f"{r.phase} is number {r.rank} of {r.n_distinct}, {r.above_lowest_meV_per_atom:.0f}"
            " meV/atom above the lowest"
            for r in found
        ]
        name, title = (
            f"fig_2_enthalpy_volume-{pressure:g}GPa",
            f"Enthalpy against volume by the foundation model at {pressure:g} GPa",
        )
        alt = "; ".join(words) or f"{len(shown)} structures, none of them named"
        yield Drawing(
            name,
            title,
            alt,
            shown,
            _later(enthalpies.draw_enthalpy_volume, shown, title=title, name=name),
            found,
        )


def _parity(folder: Path) -> Iterator[Drawing]:
    rows = _rows(tables.Parity, folder, "training the final model")
    for model in dict.fromkeys(row.model for row in rows):
        numbers = model_table.parity_statistics([row for row in rows if row.model == model])
        alt = "; ".join(
            f"{n.quantity}, {n.set}: RMSE {n.rmse:.3g} {n.unit} over {n.n} values" for n in numbers
        )
        name = f"fig_3_parity-{safe_name(model)}"
        yield Drawing(
            name,
            f"The {model} model against the labels",
            alt,
            numbers,
            _later(model_table.draw_parity, rows, model=model, name=name),
        )


def _modes(folder: Path) -> Iterator[Drawing]:
    rows = _rows(tables.Mode, folder, "the Hessian step")
    for phase, irrep in dict.fromkeys((row.phase, row.irrep) for row in rows):
        shown = [row for row in rows if (row.phase, row.irrep) == (phase, irrep)]
        found = reordering.critical_pressures(shown)
        alt = "; ".join(
            f"{reordering.WORDS[c.method, c.energies_by]}: {_critical(c)}" for c in found
        )
        name = f"fig_4a_modes-{safe_name(phase, irrep)}"
        title = f"Squared frequency of {irrep} at Γ in {phase} against pressure"
        yield Drawing(
            name, title, alt, shown, _later(reordering.draw_modes, shown, name=name), found
        )


def _critical(found: reordering.CriticalPressure) -> str:
    if found.critical_pressure_GPa is None:
        return found.reason
    spread = "" if found.error_GPa is None else f" ± {found.error_GPa:.1f}"
    return f"zero at {found.critical_pressure_GPa:.1f}{spread} GPa"


def _bands(folder: Path) -> Iterator[Drawing]:
    files = sorted(folder.glob(tables.DISPERSIONS))
    if not files:
        raise Missing("there is no dispersion-<phase>-<P>GPa.csv: the Hessian step is not done")
    phases: dict[str, str] = {}
    with contextlib.suppress(InputError, Missing):  # the table of modes says so in its own figure
        phases = {
            safe_name(row.phase): row.phase
            for row in _rows(tables.Mode, folder, "the Hessian step")
        }
    problems = []
    for path in files:
        try:
            rows, pressure = tables.read(tables.Band, path), tables.pressure_of_file(path.name)
        except InputError as error:
            problems.append(str(error))
            continue
        if not rows:
            problems.append(f"{path.name} is empty")
            continue
        name_of_phase = tables.phase_of_file(path.name)
        phase = phases.get(name_of_phase, name_of_phase)
        name, title = f"fig_4b_{path.stem}", f"Phonon dispersion of {phase} at {pressure:g} GPa"
        alt = "; ".join(
            f"{method}: lowest {value:.0f} cm⁻¹" for method, value in lowest(rows).items()
        )
        yield Drawing(name, title, alt, rows, _later(draw_bands, rows, title=title, name=name))
    if problems:
        raise Missing("; ".join(problems))


def _reference_phase(campaign: Path) -> str:
    """``figures.reference_phase`` of the campaign's settings, as its run record has them."""
    try:
        named = json.loads((campaign / "run.json").read_text(encoding="utf-8"))["settings"][
            "figures"
        ]["reference_phase"]
    except (OSError, ValueError, KeyError, TypeError) as reason:
        log.info(
            "no figures.reference_phase in %s (%s): %s",
            campaign / "run.json",
            type(reason).__name__,
            REFERENCE_PHASE,
        )
        named = None
    return named if isinstance(named, str) else REFERENCE_PHASE


def _relative_enthalpy(folder: Path) -> Iterator[Drawing]:
    rows = _rows(tables.Enthalpy, folder, "the relaxation at more pressures")
    found = enthalpies.relative_enthalpies(rows, _reference_phase(folder.parent))
    if not found:
        raise Missing("enthalpies.csv names no phase that the finetuned model relaxed")
    changes = enthalpies.transitions(rows)
    alt = (
        "; ".join(f"{c.below} to {c.above} at {c.where}" for c in changes)
        or "no transition between the pressures given"
    )
    name = "fig_5_relative_enthalpy"
    title = f"Static enthalpy of the phases relative to {found[0].reference} against pressure"
    yield Drawing(
        name,
        title,
        alt,
        found,
        _later(enthalpies.draw_relative_enthalpy, found, changes, name=name),
        changes,
    )


def _reordering(folder: Path) -> Iterator[Drawing]:
    files = tables.ranking_files(folder)
    if not files:
        raise Missing("there is no ranking-<P>GPa.csv: the SSCHA step is not done")
    checked = tables.read_if_there(tables.SpaceGroups, folder)
    problems = []
    for path in files:
        try:
            rows = reordering.computed(tables.read(Candidate, path))
        except InputError as error:
            problems.append(str(error))
            continue
        if not rows:
            problems.append(f"{path.name} has no structure with a computed free energy")
            continue
        numbers, moved = reordering.reordering(
            rows, [row for row in checked if row.pressure_GPa == rows[0].pressure]
        )
        name = f"fig_6_{path.stem}"
        title = f"Static enthalpy, free energy and space group at {numbers.pressure_GPa:g} GPa"
        yield Drawing(
            name,
            title,
            _words(numbers),
            moved,
            _later(reordering.draw_reordering, numbers, moved, name=name),
            [numbers],
        )
    if problems:
        raise Missing("; ".join(problems))


def _words(n: reordering.Reordering) -> str:
    text = (
        f"{n.n_changed} of {n.n} structures changed their space group,"
        f" {n.n_transformed_best} became {n.best}; G - H is {n.shift:.0f} meV/atom"
    )
    if n.window is not None:
        text += (
            f"; reordered up to {n.window:.0f} meV/atom, linear above {n.linear_above:.0f} with"
            f" slope {n.slope:.2f}"
        )
    if n.n_checked_by_dft:
        text += (
            f"; {n.n_kept_by_dft} of {n.n_checked_by_dft} relaxed by DFT keep their space group"
            " there"
        )
    return text


def _gradients(folder: Path) -> Iterator[Drawing]:
    rows = _rows(tables.GradientError, folder, "the step errors")
    bins, points = (
        tables.read_if_there(tables.GradientBin, folder),
        tables.read_if_there(tables.GradientParity, folder),
    )
    for phase, pressure in dict.fromkeys((row.phase, row.pressure_GPa) for row in rows):
        mine = [
            [row for row in part if (row.phase, row.pressure_GPa) == (phase, pressure)]
            for part in (rows, bins, points)
        ]
        name = f"fig_7_gradient_errors-{safe_name(phase)}-{pressure:g}GPa"
        title = f"Errors of forces and of free-energy gradients in {phase} at {pressure:g} GPa"
        alt = "; ".join(
            f"{small_figures.WORDS[row.quantity]}: {1e3 * row.rmse:.3g} m{row.unit}"
            for row in mine[0]
        )
        yield Drawing(
            name, title, alt, mine[0], _later(small_figures.draw_gradient_errors, *mine, name=name)
        )


def _learning(folder: Path) -> Iterator[Drawing]:
    rows = _rows(tables.LearningPoint, folder, "the first learning search")
    last = rows[-1]
    error = (
        ""
        if last.energy_rmse_eV_per_atom is None
        else f", energy RMSE {1e3 * last.energy_rmse_eV_per_atom:.1f} meV/atom"
    )
    alt = f"{len(rows)} points; the last is {last.step}, round {last.generation}, {last.set}{error}"
    yield Drawing(
        "learning",
        "Errors of the models while they learn",
        alt,
        rows,
        _later(small_figures.draw_learning, rows),
    )


def _later(
    function: Callable[..., list[Path]], *arguments: Any, **options: Any
) -> Callable[[Path], list[Path]]:
    """``function(*arguments, folder=..., **options)`` once the folder is known."""
    return lambda folder: function(*arguments, folder=folder, **options)


MAKERS: tuple[tuple[str, Callable[[Path], Iterator[Drawing]]], ...] = (
    ("table_1", _table_one),
    ("fig_2_enthalpy_volume", _enthalpy_volume),
    ("fig_3_parity", _parity),
    ("fig_4a_modes", _modes),
    ("fig_4b_dispersion", _bands),
    ("fig_5_relative_enthalpy", _relative_enthalpy),
    ("fig_6_ranking", _reordering),
    ("fig_7_gradient_errors", _gradients),
    ("learning", _learning),
)
"""Name of a figure (the beginning of its files' names) and who makes it."""
