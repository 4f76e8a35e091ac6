"""The picture of ``convergence.csv``: how an SSCHA run came to its end, population by
population."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures
from magus_anharmonic.io.tables import table_rows
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

NAME = "convergence.png"


def read_convergence(path: Path) -> dict[str, list[float]]:
    """The columns of a ``convergence.csv``; NaN where a field is empty."""
    with table_rows(path) as reader:
        rows = list(reader)
    names = rows[0].keys() if rows else ()
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def draw_convergence(folder: str | Path, title: str = "") -> Path | None:
    """Draw F and G, pressure, effective sample and gradients against population into
    ``folder/convergence.png`` and ``.svg``.

    Returns the picture, also one that is as new as the table; None without a table, or with a
    warning where it was changed. Error bars are one standard error.
    """
    table, picture = Path(folder) / "convergence.csv", Path(folder) / NAME
    if not table.is_file():
        return None
    if picture.is_file() and picture.stat().st_mtime >= table.stat().st_mtime:
        return picture
    try:
        columns = read_convergence(table)
    except InputError as error:
        log.warning("no picture of the convergence: %s", error)
        return None
    if not columns:
        return None
    with pictures.figure(2, 2, title=title) as (figure, panels):
        _draw(panels, columns)
        return pictures.save(figure, picture.parent, picture.stem)[1]


def _draw(panels: Sequence[Axes], columns: dict[str, list[float]]) -> None:
    energy, pressure, sample, gradient = panels
    x = columns["population"]
    error = [ev_to_mev(value) for value in columns["error_eV_per_atom"]]
    for index, (name, letter) in enumerate(
        (("gibbs_eV_per_atom", "G"), ("free_energy_eV_per_atom", "F"))
    ):
        last = columns[name][-1]
        heights = [ev_to_mev(value - last) for value in columns[name]]
        label = f"{letter} - ({last:.4f} eV/atom)"
        pictures.points(energy, x, heights, error, index=index, label=label, mfc="none")
    energy.set_ylabel("meV/atom")
    pictures.points(pressure, x, columns["pressure_GPa"], columns.get("pressure_error_GPa"))
    pressure.set_ylabel("pressure (GPa)")
    pictures.points(sample, x, columns["effective_sample"])
    sample.set_ylabel("effective sample / configurations")
    sample.set_ylim(bottom=0.0)
    gradients = {
        "centroid_force_eV_per_A": "largest force on a centroid (eV/\N{ANGSTROM SIGN})",
        "fc_gradient_eV_per_A2": "force constants, at the end (eV/\N{ANGSTROM SIGN}²)",
    }
    for index, (name, label) in enumerate(gradients.items()):
        pictures.points(gradient, x, columns[name], index=index, label=label, mfc="none")
    if any(value > 0 for name in gradients for value in columns[name]):
        pictures.log_scale(gradient)
    gradient.set_ylabel("gradient")
    for axes in (energy, gradient):
        pictures.legend(axes, fontsize=8)
    for axes in panels:
        axes.set_xlabel("population")
        axes.xaxis.get_major_locator().set_params(integer=True)
