"""Learning curves: errors of the models of a search, round by round.

Figs. 7 and 8: how errors of forces shrink when the SSCHA averages them into gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from magus_anharmonic.paper.tables import GradientBin, GradientError, GradientParity, LearningPoint
from magus_anharmonic.phase_diagram.style import (
    GREY,
    color,
    figure,
    legend,
    log_scale,
    marker,
    points,
    save,
    say,
)

QUANTITIES = (
    ("energy RMSE (meV/atom)", "energy_rmse_eV_per_atom", 1e3),
    ("force RMSE (meV/Å)", "force_rmse_eV_per_A", 1e3),
    ("stress RMSE (GPa)", "stress_rmse_GPa", 1.0),
)


def draw_learning(
    rows: Sequence[LearningPoint], folder: Path, name: str = "learning"
) -> list[Path]:
    """Three panels of errors against the round, one curve per step and set."""
    with figure(3) as (made, panels):
        curves = list(dict.fromkeys((row.step, row.set) for row in rows))
        for axes, (label, field, factor) in zip(panels, QUANTITIES, strict=True):
            for index, (step, name_of_set) in enumerate(curves):
                mine = [
                    row
                    for row in rows
                    if (row.step, row.set) == (step, name_of_set)
                    and getattr(row, field) is not None
                ]
                if mine:
                    heights = [factor * getattr(row, field) for row in mine]
                    points(
                        axes,
                        [row.generation for row in mine],
                        heights,
                        index=index,
                        label=f"{step}, {name_of_set}",
                    )
            axes.set_xlabel("round")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0.0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        legend(panels[0], fontsize=8)
        return save(made, folder, name)


WORDS = {
    "force": "forces",
    "gradient_centroid": "gradient by centroids",
    "gradient_force_constants": "gradient by force constants",
    "bo_force_centroid": "forces at the centroids",
}


SMALLEST = 0.01
"""meV/A; what is smaller is rounding, and written as such."""


def unit_of(unit: str) -> tuple[float, str]:
    """Factor and unit on the axes: meV instead of eV."""
    return 1e3, f"m{unit}".replace("^2", "²").replace("A", "Å")


def draw_gradient_errors(
    rows: Sequence[GradientError],
    bins: Sequence[GradientBin],
    parity: Sequence[GradientParity],
    folder: Path,
    name: str = "gradient_errors",
) -> list[Path]:
    """Four panels for one phase: RMSEs with their parts, the two distributions, and the parity of
    the averaged gradients."""
    if not rows:
        return []
    title = (
        f"{rows[0].phase} at {rows[0].pressure_GPa:g} GPa, {rows[0].n_configs} configurations:"
        " model against reference"
    )
    with figure(2, 2, title=title) as (made, panels):
        _bars(panels[0], rows)
        _distribution(
            panels[1], bins, (("force", 0), ("gradient_centroid", 1), ("bo_force_centroid", 1))
        )
        _distribution(
            panels[2], bins, (("gradient_force_constants", 0), ("gradient_force_constants", 1))
        )
        _parity(panels[3], parity)
        return save(made, folder, name)


def _bars(axes, rows: Sequence[GradientError]) -> None:  # type: ignore[no-untyped-def]
    """RMSE of each quantity that is a force, the two parts of the averaged one, and the floor."""
    shown = [row for row in rows if row.unit == "eV/A"]
    labels, heights, colors, errors = [], [], [], []
    for row in shown:
        labels.append(WORDS[row.quantity].replace(" ", "\n", 1))
        heights.append(1e3 * row.rmse)
        colors.append(color(0))
        errors.append(0.0)
        if row.systematic is not None:
            labels.append("its systematic\npart")
            heights.append(1e3 * row.systematic)
            errors.append(1e3 * (row.systematic_error or 0.0))
            colors.append(color(1))
        if row.floor is not None:
            axes.axhline(1e3 * row.floor, color=GREY, ls="--", lw=1, label="floor RMSE/√n")
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.bar(range(len(shown := labels)), heights, color=colors, yerr=errors, capsize=3, width=0.65)
    for position, (height, error) in enumerate(zip(heights, errors, strict=True)):
        text = (
            f"{height:.3g}" if height >= SMALLEST or max(heights) < SMALLEST else f"< {SMALLEST:g}"
        )
        axes.annotate(
            text,
            (position, max(height + error, SMALLEST if max(heights) > SMALLEST else 0.0)),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(shown)), labels, fontsize=7)
    if any(height > 0 for height in heights):
        log_scale(axes)
        positive = min(height for height in heights if height > 0)
        axes.set_ylim(
            max(SMALLEST, positive / 5) if max(heights) > SMALLEST else positive / 5,
            3 * max(heights),
        )
    axes.set_ylabel("RMSE (meV/Å)")


def _distribution(axes, bins: Sequence[GradientBin], wanted: Sequence[tuple[str, int]]) -> None:  # type: ignore[no-untyped-def]
    for index, (quantity, averaged) in enumerate(wanted):
        found = [row for row in bins if row.quantity == quantity and row.averaged == averaged]
        total = sum(row.count for row in found)
        if not total:
            continue
        factor, unit = unit_of(found[0].unit)
        edges = [factor * row.low for row in found] + [factor * found[-1].high]
        density = [row.count / total / (factor * (row.high - row.low)) for row in found]
        label = (
            WORDS[quantity]
            + ("" if averaged or quantity == "force" else ", one by one")
            + (", averaged" if averaged and len(wanted) == 2 else "")
        )
        axes.stairs(
            density,
            edges,
            color=color(index),
            label=label,
            fill=index == 0,
            alpha=0.45 if index == 0 else 1.0,
        )
        axes.set_xlabel(f"model - reference ({unit})")
    if not axes.get_legend_handles_labels()[0]:
        say(axes, "no distribution was kept")
        return
    log_scale(axes)
    axes.set_ylabel("probability density")
    legend(axes, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.22))


def _parity(axes, parity: Sequence[GradientParity]) -> None:  # type: ignore[no-untyped-def]
    shown = [row for row in parity if row.unit == "eV/A"]
    if not shown:
        say(axes, "no components were kept")
        return
    values = [value for row in shown for value in (row.reference, row.predicted)]
    limits = [min(1e3 * min(values), -1.0), max(1e3 * max(values), 1.0)]
    axes.plot(limits, limits, color=GREY, lw=1)
    for index, quantity in enumerate(("gradient_centroid", "bo_force_centroid")):
        rows = [row for row in shown if row.quantity == quantity]
        if rows:
            x, y = [1e3 * row.reference for row in rows], [1e3 * row.predicted for row in rows]
            axes.plot(
                x, y, marker(index), color=color(index + 1), ms=3, alpha=0.7, label=WORDS[quantity]
            )
    axes.set_xlabel("reference (meV/Å)")
    axes.set_ylabel("model (meV/Å)")
    legend(axes, fontsize=8)
