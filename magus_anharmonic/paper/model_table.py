"""Errors of models against DFT, as a table and point by point.

Fig. 3: energies, forces and stresses of a model against the labels.

Table I: errors of the models on training, validation and test labels, in the paper's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magus_anharmonic.paper.tables import UNITS, ModelError, Parity
from magus_anharmonic.phase_diagram import style

LABELS = {
    "energy": "energy (eV/atom)",
    "force": "force component (eV/Å)",
    "stress": "stress component (GPa)",
}


@dataclass(frozen=True)
class ParityStatistics:
    """Agreement of one quantity on one set; in the unit given. ``r_squared`` is None where the
    reference does not vary."""

    model: str
    set: str
    quantity: str
    unit: str
    n: int
    rmse: float
    mean_absolute: float
    mean: float
    r_squared: float | None


def parity_statistics(rows: Sequence[Parity]) -> list[ParityStatistics]:
    """RMSE, mean absolute and mean error (predicted minus reference) by model, set and quantity."""
    groups: dict[tuple[str, str, str], list[Parity]] = {}
    for row in rows:
        groups.setdefault((row.model, row.set, row.quantity), []).append(row)
    found = []
    for (model, name, quantity), members in sorted(groups.items()):
        reference = np.array([row.reference for row in members])
        error = np.array([row.predicted for row in members]) - reference
        spread = float(np.sum((reference - reference.mean()) ** 2))
        r_squared = 1.0 - float(np.sum(error**2)) / spread if spread > 0 else None
        rmse = float(np.sqrt(np.mean(error**2)))
        found.append(
            ParityStatistics(
                model,
                name,
                quantity,
                UNITS[quantity],
                len(members),
                rmse,
                float(np.abs(error).mean()),
                float(error.mean()),
                r_squared,
            )
        )
    return found


def draw_parity(rows: Sequence[Parity], folder: Path, model: str, name: str) -> list[Path]:
    """A panel per quantity that ``model`` has, one colour per set; points are pixels in the SVG, so
    that it stays small."""
    mine = [row for row in rows if row.model == model]
    quantities = [quantity for quantity in UNITS if any(row.quantity == quantity for row in mine)]
    if not quantities:
        return []
    with style.figure(len(quantities), title=f"{model} model against the labels") as (made, panels):
        for axes, quantity in zip(panels, quantities, strict=True):
            _panel(axes, [row for row in mine if row.quantity == quantity], quantity)
        style.legend(panels[0], markerscale=2)
        return style.save(made, folder, name)


def _panel(axes, rows: Sequence[Parity], quantity: str) -> None:  # type: ignore[no-untyped-def]
    values = [value for row in rows for value in (row.reference, row.predicted)]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=style.GREY, lw=1)
    for index, name in enumerate(dict.fromkeys(row.set for row in rows)):
        shown = [row for row in rows if row.set == name]
        x, y = [row.reference for row in shown], [row.predicted for row in shown]
        size = 4 if len(shown) < 500 else 1.5
        axes.plot(
            x,
            y,
            style.marker(index),
            color=style.color(index),
            ms=size,
            alpha=0.6,
            mew=0,
            label=name,
            rasterized=len(shown) > 500,
        )
    error = np.array([row.predicted - row.reference for row in rows])
    axes.text(
        0.97,
        0.04,
        f"RMSE {np.sqrt(np.mean(error**2)):.3g} {UNITS[quantity]}",
        ha="right",
        transform=axes.transAxes,
        fontsize=9,
    )
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_aspect("equal")
    axes.set_xlabel(f"labels: {LABELS[quantity]}")
    axes.set_ylabel("model")


SETS = ("training", "validation", "test")
MODELS = ("foundation", "finetuned")


@dataclass(frozen=True)
class TableOne:
    """One line of Table I."""

    set: str
    model: str
    model_id: str
    n: int
    energy_meV_per_atom: float
    force_meV_per_A: float
    stress_GPa: float | None


def table_one(rows: Sequence[ModelError]) -> list[TableOne]:
    """The lines in the paper's order: by set, foundation before finetuned; the last row of a model
    and set counts."""
    last = {(row.set, row.model): row for row in rows}
    chosen = [
        last[key] for key in ((name, model) for name in SETS for model in MODELS) if key in last
    ]
    return [
        TableOne(
            r.set,
            r.model,
            r.model_id,
            r.n,
            1e3 * r.energy_rmse_eV_per_atom,
            1e3 * r.force_rmse_eV_per_A,
            r.stress_rmse_GPa,
        )
        for r in chosen
    ]


def draw_table_one(lines: Sequence[TableOne], folder: Path, name: str = "table_1") -> list[Path]:
    """Three panels of bars: energy, force, stress by set and model."""
    with style.figure(3) as (made, panels):
        quantities = (
            ("energy RMSE (meV/atom)", "energy_meV_per_atom"),
            ("force RMSE (meV/Å)", "force_meV_per_A"),
            ("stress RMSE (GPa)", "stress_GPa"),
        )
        for axes, (label, field) in zip(panels, quantities, strict=True):
            for index, model in enumerate(MODELS):
                shown = [
                    (SETS.index(line.set), getattr(line, field))
                    for line in lines
                    if line.model == model
                ]
                shown = [(position, value) for position, value in shown if value is not None]
                if shown:
                    positions = [position + 0.4 * (index - 0.5) for position, _ in shown]
                    bars = axes.bar(
                        positions,
                        [value for _, value in shown],
                        0.36,
                        color=style.color(index),
                        label=model,
                    )
                    axes.bar_label(
                        bars,
                        fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}",
                        fontsize=8,
                        padding=2,
                    )
            axes.set_xticks(range(len(SETS)), SETS)
            axes.set_xlim(-0.6, len(SETS) - 0.4)
            axes.set_ylabel(label)
            axes.margins(y=0.12)
        style.legend(panels[0], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return style.save(made, folder, name)
