"""Learning curves: errors of the models of a search, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magus_anharmonic.analysis import style
from magus_anharmonic.analysis.tables import LearningPoint

QUANTITIES = (
    ("energy RMSE (meV/atom)", "energy_rmse_eV_per_atom", 1e3),
    ("force RMSE (meV/Å)", "force_rmse_eV_per_A", 1e3),
    ("stress RMSE (GPa)", "stress_rmse_GPa", 1.0),
)


def draw_learning(rows: Sequence[LearningPoint], folder: Path, name: str = "learning") -> list[Path]:
    """Three panels of errors against the round, one curve per step and set."""
    with style.figure(3) as (made, panels):
        curves = list(dict.fromkeys((row.step, row.set) for row in rows))
        for axes, (label, field, factor) in zip(panels, QUANTITIES, strict=True):
            for index, (step, name_of_set) in enumerate(curves):
                mine = [row for row in rows if (row.step, row.set) == (step, name_of_set) and getattr(row, field) is not None]
                if mine:
                    heights = [factor * getattr(row, field) for row in mine]
                    style.points(axes, [row.generation for row in mine], heights, index=index, label=f"{step}, {name_of_set}")
            axes.set_xlabel("round")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0.0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        style.legend(panels[0], fontsize=8)
        return style.save(made, folder, name)
