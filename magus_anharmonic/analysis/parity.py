"""Fig. 3: energies, forces and stresses of a model against the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magus_anharmonic.analysis import style
from magus_anharmonic.analysis.tables import UNITS, Parity

LABELS = {"energy": "energy (eV/atom)", "force": "force component (eV/Å)", "stress": "stress component (GPa)"}


@dataclass(frozen=True)
class ParityStatistics:
    """Agreement of one quantity on one set; in the unit given. ``r_squared`` is None where the reference does not vary."""

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
                model, name, quantity, UNITS[quantity], len(members), rmse, float(np.abs(error).mean()), float(error.mean()), r_squared
            )
        )
    return found


def draw_parity(rows: Sequence[Parity], folder: Path, model: str, name: str) -> list[Path]:
    """A panel per quantity that ``model`` has, one colour per set; points are pixels in the SVG, so that it stays small."""
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
        axes.plot(x, y, style.marker(index), color=style.color(index), ms=size, alpha=0.6, mew=0, label=name, rasterized=len(shown) > 500)
    error = np.array([row.predicted - row.reference for row in rows])
    axes.text(0.97, 0.04, f"RMSE {np.sqrt(np.mean(error**2)):.3g} {UNITS[quantity]}", ha="right", transform=axes.transAxes, fontsize=9)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_aspect("equal")
    axes.set_xlabel(f"labels: {LABELS[quantity]}")
    axes.set_ylabel("model")
