"""Table I: errors of the models on training, validation and test labels, in the paper's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from magus_anharmonic.analysis import style
from magus_anharmonic.analysis.tables import ModelError

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
    """The lines in the paper's order: by set, foundation before finetuned; the last row of a model and set counts."""
    last = {(row.set, row.model): row for row in rows}
    chosen = [last[key] for key in ((name, model) for name in SETS for model in MODELS) if key in last]
    return [
        TableOne(r.set, r.model, r.model_id, r.n, 1e3 * r.energy_rmse_eV_per_atom, 1e3 * r.force_rmse_eV_per_A, r.stress_rmse_GPa)
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
                shown = [(SETS.index(line.set), getattr(line, field)) for line in lines if line.model == model]
                shown = [(place, value) for place, value in shown if value is not None]
                if shown:
                    places = [place + 0.4 * (index - 0.5) for place, _ in shown]
                    bars = axes.bar(places, [value for _, value in shown], 0.36, color=style.color(index), label=model)
                    axes.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}", fontsize=8, padding=2)
            axes.set_xticks(range(len(SETS)), SETS)
            axes.set_xlim(-0.6, len(SETS) - 0.4)
            axes.set_ylabel(label)
            axes.margins(y=0.12)
        style.legend(panels[0], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return style.save(made, folder, name)
