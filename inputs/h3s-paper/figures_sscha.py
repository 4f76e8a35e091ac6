"""Figs. 4, 6, 7 and 8: modes and dispersions, what SSCHA reorders, and errors of
gradients; loaded by ``magus_anharmonic.paper.script``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magus_anharmonic.errors import InputError
from magus_anharmonic.io import pictures as style
from magus_anharmonic.io.digests import safe_name
from magus_anharmonic.paper import quantities, tables
from magus_anharmonic.ranking.candidate import Candidate
from magus_anharmonic.structures import decided_group, number_of, symbol_of

from .drawing import MANY, Drawing, Missing, diagonal, later, rows_of_step

log = logging.getLogger(__name__)

# --- Fig. 4: modes and dispersions ---


def modes(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    """Fig. 4a: squared frequencies against pressure, and where they are zero."""
    rows = rows_of_step(tables.Mode, folder, "the Hessian step")
    for phase, irrep in dict.fromkeys((row.phase, row.irrep) for row in rows):
        shown = [row for row in rows if (row.phase, row.irrep) == (phase, irrep)]
        found = quantities.critical_pressures(shown)
        labels = [quantities.METHODS[one.method, one.energies_by] for one in found]

        def draw(
            axes: Sequence[Any], shown: Any = shown, found: Any = found, labels: Any = labels
        ) -> None:
            (panel,) = axes
            panel.axhline(0.0, color=style.GREY, lw=1)
            curves = quantities.series(shown).values()
            for points, one, label in zip(curves, found, labels, strict=True):
                index, dft = (
                    list(quantities.METHODS.values()).index(label),
                    one.energies_by == "dft",
                )
                where, error = one.critical_pressure_GPa, one.error_GPa
                bars = [None if p.error_cm2 is None else p.error_cm2 / 1e6 for p in points]
                beside = 0.006 * index * np.ptp([row.pressure_GPa for row in shown])
                x = [p.pressure_GPa + beside for p in points]
                y = [p.frequency_squared_cm2 / 1e6 for p in points]
                look = {"mfc": "none"} if dft else {}
                look["linestyle"] = "none" if len(x) < 2 else "--" if dft else "-"
                label += "" if where is None else f" ({one.words})"
                style.points(panel, x, y, bars, index=index, label=label, **look)
                if where is not None and error is not None:
                    band = {"color": style.color(index), "alpha": 0.15, "lw": 0}
                    panel.axvspan(where - error, where + error, **band)
            style.room(panel, [row.pressure_GPa for row in shown])
            panel.set(xlabel="pressure (GPa)", ylabel="squared frequency (10⁶ cm⁻²)")
            style.legend(panel, fontsize=8)

        alt = "; ".join(f"{label}: {one.words}" for label, one in zip(labels, found, strict=True))
        title = f"Squared frequency of {irrep} at Γ in {phase} against pressure"
        name = f"fig_4a_modes-{safe_name(phase, irrep)}"
        yield Drawing(name, title, alt, shown, draw, found, headline=f"{phase}: {irrep} at Γ")


def bands(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    """Fig. 4b: phonon dispersions."""
    files = sorted(folder.glob(tables.DISPERSIONS))
    if not files:
        raise Missing("there is no dispersion-<phase>-<P>GPa.csv: the Hessian step is not done")
    phases: dict[str, str] = {}
    try:
        phases = {
            safe_name(row.phase): row.phase for row in tables.read_if_there(tables.Mode, folder)
        }
    except InputError as error:
        log.debug("%s: its own figure says so", error)
    for path in files:
        try:
            rows, pressure = tables.read(tables.Band, path), tables.pressure_of_file(path.name)
        except InputError as error:
            problems.append(str(error))
            continue
        if not rows:
            problems.append(f"{path.name} is empty")
            continue
        phase = tables.phase_of_file(path.name)
        title = f"Phonon dispersion of {phases.get(phase, phase)} at {pressure:g} GPa"
        methods = {m: [row for row in rows if row.method == m] for m in {r.method: 0 for r in rows}}
        alt = "; ".join(
            f"{method}: lowest {min(row.frequency_cm1 for row in mine):.0f} cm⁻¹"
            for method, mine in methods.items()
        )
        yield Drawing(f"fig_4b_{path.stem}", title, alt, rows, later(_draw_bands, methods))


def _draw_bands(axes: Sequence[Any], methods: dict[str, list[tables.Band]]) -> None:
    """Lines for the branches of each method, error bars where a point has one."""
    (panel,) = axes
    panel.axhline(0.0, color=style.GREY, lw=1)
    every = [row for rows in methods.values() for row in rows]
    for index, (method, rows) in enumerate(methods.items()):
        for branch in sorted({row.branch for row in rows}):
            mine = sorted((r for r in rows if r.branch == branch), key=lambda row: row.distance)
            x, y = [row.distance for row in mine], [row.frequency_cm1 for row in mine]
            bars = [np.nan if row.error_cm1 is None else row.error_cm1 for row in mine]
            look = {"color": style.color(index), "lw": 1, "elinewidth": 1.4, "capsize": 2}
            label, one = (
                method if branch == min(row.branch for row in rows) else None,
                len(mine) == 1,
            )
            panel.errorbar(x, y, bars, label=label, fmt=style.marker(index) if one else "-", **look)
    ticks = sorted({round(row.distance, 9): row.label for row in every if row.label}.items())
    for where, _ in ticks:
        panel.axvline(where, color=style.GREY, lw=0.6)
    if ticks:
        panel.set_xticks(*zip(*ticks, strict=True))
    else:
        panel.set_xlabel("distance in reciprocal space (2π/Å)")
    low, high = min(row.distance for row in every), max(row.distance for row in every)
    if high > low:
        panel.set_xlim(low, high)
    panel.set_ylabel("frequency (cm⁻¹; imaginary below zero)")
    style.legend(panel, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=3)


# --- Fig. 6: what SSCHA reorders ---


def reordering(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    """Fig. 6: one per ranking."""
    files = tables.ranking_files(folder)
    if not files:
        raise Missing("there is no ranking-<P>GPa.csv: the SSCHA step is not done")
    checked = tables.read_if_there(tables.SpaceGroups, folder)
    for path in files:
        try:
            rows = quantities.computed(tables.read(Candidate, path))
        except InputError as error:
            problems.append(str(error))
            continue
        if not rows:
            problems.append(f"{path.name} has no structure with a computed free energy")
            continue
        mine = [row for row in checked if row.pressure_GPa == rows[0].pressure]
        n, moved = quantities.reordering(rows, mine)
        became = f"{n.n_transformed_best} became {n.best}" if n.best else "no minimum is known"
        parts = [
            f"{n.n_changed} of {n.n} structures changed their space group, {became}",
            f"G - H is {n.shift:.0f} meV/atom",
        ]
        if n.window is not None:
            parts.append(f"reordered up to {n.window:.0f} meV/atom")
            parts.append(f"linear above {n.linear_above:.0f} meV/atom with slope {n.slope:.2f}")
        if n.n_checked_by_dft:
            parts.append(
                f"{n.n_kept_by_dft} of {n.n_checked_by_dft} relaxed by DFT keep their space group"
            )
        where = f"at {n.pressure_GPa:g} GPa"
        yield Drawing(
            f"fig_6_{path.stem}",
            f"Static enthalpy, free energy and space group {where}",
            "; ".join(parts),
            moved,
            later(_draw_reordering, n, moved),
            [n],
            (2, 1),
            f"{n.n} structures {where}: {became}",
        )


def _draw_reordering(
    axes: Sequence[Any], n: quantities.Reordering, moved: Sequence[quantities.Moved]
) -> None:
    """Space group after against before; G against H with the line and the window."""
    groups, energies = axes
    pairs = Counter(
        (number_of(m.spg_static), number_of(m.spg_quantum)) for m in moved if m.spg_quantum
    )
    groups.plot([0, 230], [0, 230], color=style.GREY, lw=1)
    for changed, word in enumerate(("kept", "changed")):
        shown = {pair: k for pair, k in pairs.items() if (pair[0] != pair[1]) == bool(changed)}
        if shown:
            x, y = zip(*shown, strict=True)
            look = {"color": style.color(changed), "marker": style.marker(changed), "alpha": 0.7}
            sizes = [13.0 + 12.0 * count for count in shown.values()]
            groups.scatter(x, y, s=sizes, label=f"{word}: {sum(shown.values())}", **look)
    labels = {"xlabel": "space group number, static", "ylabel": "space group number, SSCHA"}
    groups.set(xlim=(0, 235), ylim=(0, 235), **labels)
    style.legend(groups, loc="lower right")
    in_best = [symbol_of(decided_group(m.spg_quantum)) == n.best for m in moved]
    for index, label in enumerate(("other", f"ended in {n.best}")):
        mine = [m for m, inside in zip(moved, in_best, strict=True) if inside == bool(index)]
        if mine:
            x, y = [m.enthalpy_meV_per_atom for m in mine], [m.gibbs_meV_per_atom for m in mine]
            bars = [m.gibbs_error_meV_per_atom for m in mine]
            look = {"linestyle": "none", "capsize": 2, "alpha": 0.8, "rasterized": len(mine) > MANY}
            style.points(energies, x, y, bars, index=index, label=label, **look)
    heights = [m.enthalpy_meV_per_atom for m in moved]
    if n.slope is not None and n.offset is not None:
        x = np.array([n.linear_above, max(heights)])
        label = f"line, slope {n.slope:.2f}"
        energies.plot(x, n.offset + n.slope * x, color=style.GREY, label=label)
    if n.window:
        look = {"color": style.color(4), "alpha": 0.15, "lw": 0}
        energies.axvspan(0.0, n.window, label=f"reordered up to {n.window:.0f} meV/atom", **look)
    style.room(energies, heights)
    energies.set_xlabel("static enthalpy\nabove the lowest (meV/atom)")
    energies.set_ylabel("free energy\nabove the lowest (meV/atom)")
    style.legend(energies, fontsize=8)


# --- Figs. 7 and 8: the model against DFT in an ensemble ---

QUANTITIES = {
    "force": "forces",
    "gradient_centroid": "gradient by centroids",
    "gradient_force_constants": "gradient by force constants",
    "bo_force_centroid": "forces at the centroids",
}


def gradients(folder: Path, problems: list[str]) -> Iterator[Drawing]:
    """Figs. 7 and 8: one per phase and pressure."""
    rows = rows_of_step(tables.GradientError, folder, "the step errors")
    parts = [
        rows,
        *(tables.read_if_there(t, folder) for t in (tables.GradientBin, tables.GradientParity)),
    ]
    for phase, pressure in dict.fromkeys((row.phase, row.pressure_GPa) for row in rows):
        name = f"fig_7_gradient_errors-{safe_name(phase)}-{pressure:g}GPa"
        key = phase, pressure
        mine = [[r for r in part if (r.phase, r.pressure_GPa) == key] for part in parts]
        yield gradient_figure(name, *mine)


def gradient_figure(
    name: str,
    rows: Sequence[tables.GradientError],
    bins: Sequence[tables.GradientBin],
    points: Sequence[tables.GradientParity],
) -> Drawing:
    """Four panels for one phase: RMSEs with their parts, the two distributions, and the parity of
    the averaged gradients."""
    where = f"{rows[0].phase} at {rows[0].pressure_GPa:g} GPa"

    def draw(axes: Sequence[Any]) -> None:
        _bars(axes[0], rows)
        _distribution(axes[1], [row for row in bins if row.unit == "eV/A"], "Å")
        _distribution(axes[2], [row for row in bins if row.unit != "eV/A"], "Å²")
        for index, quantity in enumerate(("gradient_centroid", "bo_force_centroid")):
            mine = [row for row in points if row.quantity == quantity]
            if mine:
                diagonal(axes[3], mine, index + 1, QUANTITIES[quantity], 3)
        if axes[3].get_legend_handles_labels()[0]:
            axes[3].set(xlabel="reference (eV/Å)", ylabel="model (eV/Å)")
            style.legend(axes[3], fontsize=8)
        else:
            style.say(axes[3], "no components were kept")

    alt = "; ".join(f"{QUANTITIES[r.quantity]}: {1e3 * r.rmse:.3g} m{r.unit}" for r in rows)
    title = f"Errors of forces and of free-energy gradients in {where}"
    headline = f"{where}, {rows[0].n_configs} configurations: model against reference"
    return Drawing(name, title, alt, rows, draw, panels=(2, 2), headline=headline)


def _bars(axes: Any, rows: Sequence[tables.GradientError]) -> None:
    """RMSE of each quantity that is a force, the systematic part of the averaged one, the floor."""
    shown: list[tuple[str, float, float, int]] = []
    for row in (row for row in rows if row.unit == "eV/A"):
        shown.append((QUANTITIES[row.quantity].replace(" ", "\n", 1), row.rmse, 0.0, 0))
        if row.systematic is not None:
            shown.append(("its systematic\npart", row.systematic, row.systematic_error or 0.0, 1))
        if row.floor is not None:
            line = axes.axhline(1e3 * row.floor, color=style.GREY, ls="--", lw=1)
            axes.legend([line], ["floor RMSE/√n"], fontsize=8, loc="upper right")
    labels, heights, errors, colors = zip(*shown, strict=True) if shown else ((), (), (), ())
    look = {"color": [style.color(index) for index in colors], "capsize": 3, "width": 0.65}
    heights = [1e3 * height for height in heights]
    bars = axes.bar(range(len(shown)), heights, yerr=[1e3 * error for error in errors], **look)
    axes.bar_label(bars, fmt="{:.3g}", fontsize=8, padding=2)
    axes.set_xticks(range(len(shown)), labels, fontsize=7)
    if any(height > 0 for height in heights):
        style.log_scale(axes)
        smallest = min(height for height in heights if height > 0)
        axes.set_ylim(max(smallest / 5, 1e-4 * max(heights)), 3 * max(heights))
    axes.set_ylabel("RMSE (meV/Å)")


def _distribution(axes: Any, bins: Sequence[tables.GradientBin], unit: str) -> None:
    for index, key in enumerate(dict.fromkeys((row.quantity, row.averaged) for row in bins)):
        mine = [row for row in bins if (row.quantity, row.averaged) == key]
        total = sum(row.count for row in mine)
        edges = [1e3 * row.low for row in mine] + [1e3 * mine[-1].high]
        density = [row.count / total / (1e3 * (row.high - row.low)) for row in mine if total]
        label = QUANTITIES[key[0]] + (", averaged" if key[1] else ", one by one")
        if total:
            look = {"fill": index == 0, "alpha": 0.45 if index == 0 else 1.0}
            axes.stairs(density, edges, color=style.color(index), label=label, **look)
    if not axes.get_legend_handles_labels()[0]:
        style.say(axes, "no distribution was kept")
        return
    style.log_scale(axes)
    axes.set(xlabel=f"model - reference (meV/{unit})", ylabel="probability density")
    style.legend(axes, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.22))
