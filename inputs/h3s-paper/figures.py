"""Table I and the figures of the paper: every one that the tables of a campaign allow, each with
its numbers as CSV; and what is missing, with the reason.

Lies beside the inputs of the paper; loaded by ``magus_anharmonic.paper.script``. The
numbers are those of ``magus_anharmonic.paper.quantities`` and ``enthalpies``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures as style
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.io.files import read_json, remove
from magus_anharmonic.paper import enthalpies, quantities, tables
from magus_anharmonic.runs.folder import CampaignFolder

from . import figures_sscha
from .drawing import MANY, Drawing, Missing, diagonal, rows_of_step

log = logging.getLogger(__name__)

REFERENCE_PHASE = "Im-3m"
"""Phase that the relative enthalpies refer to where the campaign names none and has it."""
HIGHEST_SHOWN = 500.0
"""meV/atom above the lowest, where Fig. 2 ends."""


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


def make_figures(campaign_folder: str | Path) -> Figures:
    """Write every figure to ``campaign/figures/`` as ``NAME.csv`` (and ``NAME-summary.csv``),
    ``NAME.svg`` and ``NAME.png``.

    ``campaign_folder`` is ``PATH/campaign`` or the PATH above it. Files of figures that are no
    longer possible are removed. A table that is missing or wrong costs its figures alone. Raises
    ``InputError`` when there is no such folder.
    """
    campaign = CampaignFolder.find(campaign_folder) or CampaignFolder(Path(campaign_folder))
    folder, made, missing = campaign.figures, [], []
    for name, maker in MAKERS.items():
        problems: list[str] = []
        try:
            for drawing in maker(campaign.tables, problems):
                made.append(_write(drawing, folder))
        except (Missing, InputError) as reason:
            problems.append(str(reason))
        if problems:
            missing.append(FigureMissing(name, "; ".join(problems)))
    names = {figure.name for figure in made}
    ours = re.compile(r"(table_1|fig_\d.*|learning)$")
    for path in folder.glob("*.*"):
        known = path.stem.removesuffix("-summary") in names
        if path.suffix in (".csv", ".svg", ".png") and ours.match(path.stem) and not known:
            remove(path)
    log.info("%d figures in %s, %d missing", len(made), folder, len(missing))
    return Figures(made, missing)


def _write(drawing: Drawing, folder: Path) -> FigureMade:
    numbers, summary = folder / f"{drawing.name}.csv", None
    tables.write(type(drawing.rows[0]), numbers, drawing.rows)
    if drawing.summary:
        summary = folder / f"{drawing.name}-summary.csv"
        tables.write(type(drawing.summary[0]), summary, drawing.summary)
    pictures = drawing.save(folder)
    return FigureMade(drawing.name, drawing.title, drawing.alt, numbers, *pictures, summary)


# --- Table I, Fig. 3 and learning: models against labels ---


def _table_one(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    lines = quantities.table_one(
        rows_of_step(tables.ModelError, folder, "training the final model")
    )
    panels = {
        "energy RMSE (meV/atom)": "energy_meV_per_atom",
        "force RMSE (meV/Å)": "force_meV_per_A",
        "stress RMSE (GPa)": "stress_GPa",
    }

    def draw(axes: Sequence[Any]) -> None:
        for panel, (label, column) in zip(axes, panels.items(), strict=True):
            for index, model in enumerate(quantities.MODELS):
                mine = [one for one in lines if one.model == model and getattr(one, column)]
                x = [quantities.SETS.index(one.set) + 0.4 * (index - 0.5) for one in mine]
                heights = [getattr(one, column) for one in mine]
                bars = panel.bar(x, heights, 0.36, color=style.color(index), label=model)
                panel.bar_label(bars, fmt=_short, fontsize=8, padding=2)
            panel.set_xticks(range(len(quantities.SETS)), quantities.SETS)
            panel.set(xlim=(-0.6, len(quantities.SETS) - 0.4), ylabel=label)
            panel.margins(y=0.12)
        style.legend(axes[0], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    alt = "; ".join(
        f"{r.model} on {r.set}: {r.energy_meV_per_atom:.1f} meV/atom, {r.force_meV_per_A:.0f} meV/Å"
        for r in lines
    )
    title = "Table I: root-mean-square errors of the foundation and the finetuned model"
    yield Drawing("table_1", title, alt, lines, draw, panels=(3, 1), headline="")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _parity(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    every = rows_of_step(tables.Parity, folder, "training the final model")
    for model in dict.fromkeys(row.model for row in every):
        rows = [row for row in every if row.model == model]
        found = quantities.parity_statistics(rows)
        shown = [
            quantity for quantity in tables.UNITS if any(n.quantity == quantity for n in found)
        ]

        def draw(
            axes: Sequence[Any], rows: Any = rows, found: Any = found, shown: Any = shown
        ) -> None:
            for panel, quantity in zip(axes, shown, strict=True):
                mine = [n for n in found if n.quantity == quantity]
                for index, n in enumerate(mine):
                    points = [r for r in rows if (r.set, r.quantity) == (n.set, quantity)]
                    label = f"{n.set}: RMSE {n.rmse:.3g}"
                    diagonal(panel, points, index, label, 4 if len(points) < MANY else 1.5)
                panel.set_aspect("equal")
                unit = mine[0].unit.replace("A", "Å")
                panel.set(xlabel=f"labels: {quantity} ({unit})", ylabel="model")
                style.legend(panel, markerscale=2, fontsize=8)

        alt = "; ".join(
            f"{n.quantity}, {n.set}: RMSE {n.rmse:.3g} {n.unit} over {n.n} values" for n in found
        )
        name, title = f"fig_3_parity-{safe_name(model)}", f"The {model} model against the labels"
        yield Drawing(name, title, alt, found, draw, panels=(len(shown), 1))


def _learning(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    yield learning(rows_of_step(tables.LearningPoint, folder, "the first learning search"))


def learning(rows: Sequence[tables.LearningPoint]) -> Drawing:
    """Errors against the round of learning; a line joins rounds that were judged by the same
    labels."""
    curves = quantities.learning_curves(rows)
    panels = {
        "energy RMSE (meV/atom)": ("energy_rmse_eV_per_atom", 1e3),
        "force RMSE (meV/Å)": ("force_rmse_eV_per_A", 1e3),
        "stress RMSE (GPa)": ("stress_rmse_GPa", 1.0),
    }
    steps = list(dict.fromkeys(step for step, *_ in curves))

    def draw(axes: Sequence[Any]) -> None:
        for panel, (label, (column, factor)) in zip(axes, panels.items(), strict=True):
            named: set[tuple[str, str, int | None]] = set()
            for key, points in curves.items():
                mine = [row for row in points if getattr(row, column) is not None]
                heights = [factor * getattr(row, column) for row in mine]
                style.points(
                    panel,
                    [row.generation for row in mine],
                    heights,
                    index=steps.index(key[0]),
                    label="" if key[:3] in named else _set_in_words(*key[:3]),
                    mfc="white" if key[1] == "validation" else None,
                )
                named.add(key[:3])
            panel.set(xlabel="round of learning", ylabel=label)
            panel.set_ylim(bottom=0.0)
            style.room(panel, [float(row.generation) for row in rows])
            panel.xaxis.get_major_locator().set_params(integer=True)
        style.legend(axes[0], fontsize=8)

    told = []
    for (step, name, n, *_), points in curves.items():
        first, last = points[0], points[-1]
        if first.energy_rmse_eV_per_atom is not None and last.energy_rmse_eV_per_atom is not None:
            energies = (1e3 * row.energy_rmse_eV_per_atom for row in (first, last))
            ends = dict.fromkeys(f"{energy:.3g}" for energy in energies)
            told.append(f"{_set_in_words(step, name, n)}: energy {' to '.join(ends)} meV/atom")
    title = "Errors of the models while they learn"
    return Drawing("learning", title, "; ".join(told), rows, draw, panels=(3, 1), headline="")


def _set_in_words(step: str, name: str, n: int | None) -> str:
    return f"{step}, {name}" + ("" if n is None else f" ({n} labels)")


# --- Figs. 2 and 5: static enthalpies ---


def _enthalpy_volume(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    every = rows_of_step(tables.Enthalpy, folder, "the production search")
    rows = [row for row in every if row.source == "foundation"]
    if not rows:
        raise Missing("enthalpies.csv has no rows of the foundation model")
    for pressure in sorted({row.pressure_GPa for row in rows}):
        shown = [row for row in rows if row.pressure_GPa == pressure]
        found = enthalpies.ranks(shown)

        def draw(axes: Sequence[Any], shown: Any = shown, found: Any = found) -> None:
            (panel,) = axes
            lowest = min(row.enthalpy_eV_per_atom for row in shown)
            x = np.array([row.volume_A3_per_atom for row in shown])
            y = np.array([1e3 * (row.enthalpy_eV_per_atom - lowest) for row in shown])
            look = {"color": style.GREY, "ms": 4, "alpha": 0.5, "rasterized": len(shown) > MANY}
            panel.plot(x, y, ".", label=f"{len(shown)} structures", **look)
            for index, one in enumerate(found):
                where = (
                    f"{one.rank} of {one.n_distinct}, +{one.above_lowest_meV_per_atom:.0f} meV/atom"
                )
                point = [one.volume_A3_per_atom], [one.above_lowest_meV_per_atom]
                look = {"color": style.color(index), "ms": 8, "label": f"{one.phase}: {where}"}
                panel.plot(*point, style.marker(index), **look)
            inside = x[y <= HIGHEST_SHOWN]
            margin = 0.05 * np.ptp(inside) or 0.2
            panel.set_xlim(inside.min() - margin, inside.max() + margin)
            panel.set_ylim(
                -0.03 * min(HIGHEST_SHOWN, y.max()) - 1, min(HIGHEST_SHOWN, 1.1 * y.max() + 5)
            )
            panel.set(xlabel="volume (Å³/atom)", ylabel="enthalpy above the lowest (meV/atom)")
            style.legend(panel, loc="upper right", frameon=True)

        alt = "; ".join(
            f"{r.phase} is number {r.rank} of {r.n_distinct}, {r.above_lowest_meV_per_atom:.0f}"
            " meV/atom above the lowest"
            for r in found
        )
        alt = alt or f"{len(shown)} structures, none of them named"
        title = f"Enthalpy against volume by the foundation model at {pressure:g} GPa"
        yield Drawing(f"fig_2_enthalpy_volume-{pressure:g}GPa", title, alt, shown, draw, found)


def _relative_enthalpy(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    rows = rows_of_step(tables.Enthalpy, folder, "the relaxation at more pressures")
    found = enthalpies.relative_enthalpies(rows, _reference_phase(folder.parent))
    if not found:
        raise Missing("enthalpies.csv names no phase that the finetuned model relaxed")
    changes = enthalpies.transitions(rows)

    def draw(axes: Sequence[Any]) -> None:
        (panel,) = axes
        phases = dict.fromkeys(row.phase for row in found)
        for index, phase in enumerate(phases):
            mine = [row for row in found if row.phase == phase]
            x, y = [r.pressure_GPa for r in mine], [r.relative_meV_per_atom for r in mine]
            style.points(panel, x, y, index=index, label=phase)
        style.room(panel, [row.pressure_GPa for row in found])
        if len({row.relative_meV_per_atom for row in found}) == 1:
            panel.set_ylim(-10.0, 10.0)
        mark_transitions(panel, changes)
        label = f"enthalpy relative to {found[0].reference} (meV/atom)"
        panel.set(xlabel="pressure (GPa)", ylabel=label)
        outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        style.legend(panel, **(outside if len(phases) > 4 else {}))

    alt = "; ".join(f"{c.below} to {c.above} at {c.where}" for c in changes)
    alt = alt or "no transition between the pressures given"
    title = f"Static enthalpy of the phases relative to {found[0].reference} against pressure"
    yield Drawing("fig_5_relative_enthalpy", title, alt, found, draw, changes, headline="")


def _reference_phase(campaign: Path) -> str:
    """``figures.reference_phase`` of the campaign's settings, as its run record has them."""
    try:
        named = read_json(campaign / "run.json")["settings"]["figures"]["reference_phase"]
    except (OSError, InputError, KeyError, TypeError) as reason:
        log.info("no figures.reference_phase (%s): %s", reason, REFERENCE_PHASE)
        named = None
    return named if isinstance(named, str) else REFERENCE_PHASE


def mark_transitions(axes: Any, changes: Sequence[enthalpies.Transition]) -> None:
    """A dotted line and a label above the panel at each, inwards from its line; the further out the
    line, the higher its row, so that few lines cross text."""
    low, high = axes.get_xlim()
    axes.set_xlim(low, high)
    turn = low + 0.65 * (high - low)
    for row, one in enumerate(sorted(changes, key=lambda c: abs(c.pressure_GPa - turn)), start=1):
        axes.axvline(one.pressure_GPa, color=style.GREY, lw=1, ls=":")
        left = one.pressure_GPa <= turn
        where = {"xy": (one.pressure_GPa, 1.0), "xycoords": ("data", "axes fraction")}
        line = {"arrowstyle": "-", "color": style.GREY, "ls": ":", "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            "", xytext=(0, 11 * row), textcoords="offset points", arrowprops=line, **where
        )
        axes.annotate(
            f"{one.below} → {one.above}: {one.where}",
            xytext=(3 if left else -3, 11 * row),
            textcoords="offset points",
            fontsize=8,
            ha="left" if left else "right",
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            **where,
        )


MAKERS: dict[str, Callable[[Path, list[str]], Iterator[Drawing]]] = {
    "table_1": _table_one,
    "fig_2_enthalpy_volume": _enthalpy_volume,
    "fig_3_parity": _parity,
    "fig_4a_modes": figures_sscha.modes,
    "fig_4b_dispersion": figures_sscha.bands,
    "fig_5_relative_enthalpy": _relative_enthalpy,
    "fig_6_ranking": figures_sscha.reordering,
    "fig_7_gradient_errors": figures_sscha.gradients,
    "learning": _learning,
}
"""Name of a figure (the beginning of its files' names) -> who makes it; problems of single files go
to the list."""
