"""The picture of ``convergence.csv``: how an SSCHA run came to its end, population by
population."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

from magus_anharmonic.errors import InputError
from magus_anharmonic.io.files import replacing
from magus_anharmonic.io.tables import table_rows
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    ``folder/convergence.png``.

    Returns the picture, also one that is as new as the table; None without a table, or with a
    warning where it was changed. Error bars are
    one standard error.
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
    figure = _figure(columns, title)
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return picture


def _figure(columns: dict[str, list[float]], title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    energy, pressure, sample, gradient = figure.subplots(2, 2, sharex=True).ravel()
    x = columns["population"]
    error = [ev_to_mev(value) for value in columns["error_eV_per_atom"]]
    for name, letter, style in (
        ("gibbs_eV_per_atom", "G", "o-"),
        ("free_energy_eV_per_atom", "F", "s--"),
    ):
        last = columns[name][-1]
        heights = [ev_to_mev(value - last) for value in columns[name]]
        energy.errorbar(
            x,
            heights,
            yerr=error,
            fmt=style,
            mfc="none",
            capsize=3,
            label=f"{letter} - ({last:.4f} eV/atom)",
        )
    energy.set_ylabel("meV/atom")
    pressure.errorbar(
        x,
        columns["pressure_GPa"],
        yerr=columns.get("pressure_error_GPa"),
        fmt="o-",
        capsize=3,
        color="C2",
    )
    pressure.set_ylabel("pressure (GPa)")
    sample.plot(x, columns["effective_sample"], "o-", color="C3")
    sample.set_ylabel("effective sample / configurations")
    sample.set_ylim(bottom=0.0)
    gradient.plot(
        x,
        columns["centroid_force_eV_per_A"],
        "o-",
        color="C4",
        label="largest force on a centroid (eV/A)",
    )
    gradient.plot(
        x,
        columns["fc_gradient_eV_per_A2"],
        "s--",
        color="C5",
        mfc="none",
        label="force constants, at the end (eV/A$^2$)",
    )
    if any(
        value > 0
        for name in ("centroid_force_eV_per_A", "fc_gradient_eV_per_A2")
        for value in columns[name]
    ):
        gradient.set_yscale("log", nonpositive="mask")
    gradient.set_ylabel("gradient")
    for axes in (energy, gradient):
        axes.legend(fontsize=7, frameon=False)
    for axes in (sample, gradient):
        axes.set_xlabel("population")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
