"""Pictures of the diagram and of convex hulls, and all files of a diagram.

The picture of a phase diagram: P-T with bands on the left, differences of G with their points on
the right.

The picture of the hull: formation free energies over composition for two end members, distances
above the hull for more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magus_anharmonic.hull import lower_hull
from magus_anharmonic.io import pictures as style
from magus_anharmonic.io.digests import finite
from magus_anharmonic.io.files import write_json
from magus_anharmonic.io.tables import write
from magus_anharmonic.phase_diagram.boundaries import BoundaryPoint, PhaseSet, common_pressures
from magus_anharmonic.phase_diagram.diagram import (
    SURE,
    HullRow,
    PhaseDiagram,
    Stable,
    lines,
    sentences,
)
from magus_anharmonic.phase_diagram.points import GibbsPoint, write_points
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.axes import Axes


STYLES = ("-", "--", ":", "-.")
BRACKET: dict[str, Any] = {"color": "0.35", "marker": "|", "ms": 9}
"""Of a continuous transition."""
ABOVE: dict[str, Any] = {
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1.0),
    "ncols": 2,
    "fontsize": 8,
}
"""Of a legend."""


def draw(diagram: PhaseDiagram, folder: Path) -> list[Path]:
    """``phase-diagram.svg`` and ``.png`` in ``folder``: P-T with bands on the left, differences of
    G with their points on the right."""
    with style.figure(2, size=(10.0, 4.6)) as (made, (left, right)):
        colors = {p.phase: "" for p in diagram.points}
        colors = {name: style.color(index) for index, name in enumerate(colors)}
        _diagram(left, diagram, colors)
        _differences(right, diagram, colors)
        return style.save(made, folder, "phase-diagram")


def _line(index: int) -> dict[str, str]:
    """The look of the boundaries of one set of masses."""
    return {"color": "black" if index == 0 else "0.45", "ls": STYLES[index % len(STYLES)]}


def _diagram(axes: Axes, diagram: PhaseDiagram, colors: Mapping[str, str]) -> None:
    """Boundaries with 68 and 95 % bands, the points of the grid coloured by the lowest phase,
    brackets of continuous transitions."""
    order = diagram.isotopes
    _limits(axes, diagram)
    for one in diagram.stable:
        index = order.index(one.isotopes)
        axes.plot(
            one.pressure_GPa,
            one.temperature_K,
            style.marker(index) if _compared(diagram, one) else "x",
            ms=6 - 1.5 * index,
            color=colors[one.phase],
            mfc=colors[one.phase] if one.probability >= SURE else "white",
            zorder=3,
        )
    for line in lines(diagram.boundaries):
        _boundary(axes, line, _line(order.index(line[0].isotopes)))
    for one in diagram.continuous_transitions:
        if one.last is not None:
            ls = _line(order.index(one.isotopes))["ls"]
            ends = [one.last, one.first]
            axes.plot(ends, [one.temperature] * 2, **BRACKET, ls=ls, lw=1.5, zorder=2)
    _names(axes, diagram, colors)
    _legend(axes, diagram, colors)
    axes.set_xlabel("pressure (GPa)")
    axes.set_ylabel("temperature (K)")


def _names(axes: Axes, diagram: PhaseDiagram, colors: Mapping[str, str]) -> None:
    """Each phase named in the middle of its field, that of the first isotopes; at its point nearest
    to there where the middle belongs to another phase."""
    fields = {
        (one.pressure_GPa, one.temperature_K): one.phase
        for one in diagram.stable
        if one.isotopes == diagram.isotopes[0]
    }
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    for name in dict.fromkeys(fields.values()):
        mine = [at for at, phase in fields.items() if phase == name]
        middle = np.mean(mine, axis=0)

        def away(at: tuple[float, float], middle: np.ndarray = middle) -> float:
            return float(np.linalg.norm((np.array(at) - middle) / np.ptp(limits, axis=1)))

        own = fields[min(fields, key=away)] == name
        inner = limits @ [[0.9, 0.1], [0.1, 0.9]]
        where = np.clip(middle if own else min(mine, key=away), *inner.T)
        look: dict[str, Any] = {"color": colors[name], "fontsize": 11, "fontweight": "bold"}
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0}
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(name, tuple(where), (0, 7), **place, **look, bbox=box, zorder=5)


def _compared(diagram: PhaseDiagram, one: Stable) -> bool:
    """Whether another phase has a free energy there, or has transformed into this one."""
    here = (one.isotopes, one.pressure_GPa, one.temperature_K)
    merged = any(
        (p.isotopes, p.pressure_GPa, p.temperature_K) == here and p.same_as == one.phase
        for p in diagram.points
    )
    return merged or math.isfinite(one.gap_eV_per_atom)


def _boundary(axes: Axes, line: Sequence[BoundaryPoint], look: Mapping[str, str]) -> None:
    stable = any(one.stable for one in line)
    t = [one.temperature_K for one in line]
    for level, alpha in (("95", 0.12), ("68", 0.22)) if stable else ():
        left, right = (
            np.clip([getattr(one, f"{side}_{level}_GPa") for one in line], *axes.get_xlim())
            for side in ("lower", "upper")
        )
        if len(line) > 1:
            axes.fill_betweenx(t, left, right, color=look["color"], alpha=alpha, lw=0)
        else:
            axes.plot([left[0], right[0]], t * 2, color=look["color"], alpha=3 * alpha, lw=3)
    alone = {"ls": "", "marker": "d", "mfc": look["color"] if stable else "white"}
    mark: dict[str, str] = {**look} if len(line) > 1 else {**look, **alone}
    axes.plot([one.pressure_GPa for one in line], t, **mark, lw=1.6 if stable else 0.8, zorder=4)


def _legend(axes: Axes, diagram: PhaseDiagram, colors: Mapping[str, str]) -> None:
    lowest = {one.phase for one in diagram.stable}

    def entry(label: str, **look: Any) -> None:
        axes.plot([], [], label=label, **look)

    for name, color in colors.items():
        label = name if name in lowest else f"{name} (nowhere lowest)"
        entry(label, marker="o", ls="", color=color)
    if not all(_compared(diagram, one) for one in diagram.stable):
        entry("no other phase to compare with", marker="x", ls="", color="0.3")
    if any(one.probability < SURE for one in diagram.stable):
        label = "lowest with a probability below 95 %"
        entry(label, marker="o", ls="", color="0.3", mfc="white")
    if diagram.boundaries or diagram.continuous_transitions:
        for index, name in enumerate(diagram.isotopes):
            several = f", {name}" if len(diagram.isotopes) > 1 else ""
            entry(f"boundary{several}", **_line(index))
    if any(len(line) == 1 and not line[0].stable for line in lines(diagram.boundaries)):
        entry("the same, but a third phase is lower", color="0.3", ls="", marker="d", mfc="white")
    if any(one.last is not None for one in diagram.continuous_transitions):
        entry("one phase transforms into the other between", **BRACKET)
    axes.legend(**ABOVE)


def _limits(axes: Axes, diagram: PhaseDiagram) -> None:
    p = [point.pressure_GPa for point in diagram.points]
    t = [point.temperature_K for point in diagram.points]
    pad_p, pad_t = 0.05 * (max(p) - min(p)) or 5.0, 0.08 * (max(t) - min(t)) or 20.0
    axes.set_xlim(min(p) - pad_p, max(p) + pad_p)
    axes.set_ylim(min(t) - pad_t, max(t) + pad_t)
    if min(t) == max(t):
        axes.set_yticks([min(t)])


def _differences(axes: Axes, diagram: PhaseDiagram, colors: Mapping[str, str]) -> None:
    """G of each phase minus that of the one with most points, at the lowest and the highest
    temperature."""
    axes.axhline(0.0, color="0.6", lw=0.8, zorder=0)
    axes.set_xlabel("pressure (GPa)")
    drawn, reference = False, ""
    width = 0.01 * (np.ptp([p.pressure_GPa for p in diagram.points]) or 1.0)
    places = (width * (k // 2 + k % 2) * (-1) ** k for k in itertools.count())  # side by side
    for (isotopes, formula), phases in diagram.sets.items():
        if len(phases.surfaces) < 2:
            continue
        reference = max(phases.surfaces, key=lambda name: len(phases.surfaces[name].domain))
        mine = [
            p
            for p in diagram.points
            if p.formula == formula and p.isotopes == isotopes and p.usable
        ]
        temperatures = [p.temperature_K for p in mine]
        ends = sorted({min(temperatures), max(temperatures)})
        shown = [
            (temperature, alpha, name)
            for temperature, alpha in zip(ends, (1.0, 0.45), strict=False)
            for name in phases.surfaces
            if name != reference
        ]
        for temperature, alpha, name in shown:
            look = _line(diagram.isotopes.index(isotopes)) | {"color": colors[name]}
            here = temperature, mine, look, alpha, next(places)
            drawn |= _difference(axes, phases, (reference, name), *here)
    if not drawn:
        text = "no two phases with free energies\nat the same pressure and temperature"
        axes.text(0.5, 0.6, text, ha="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    several = len({formula for _, formula in diagram.sets}) > 1
    subtracted = "that of the reference phase" if several else f"G of {reference}"
    axes.set_ylabel(f"G minus {subtracted} (meV/atom)")
    axes.legend(**ABOVE)


def _difference(
    axes: Axes,
    phases: PhaseSet,
    pair: tuple[str, str],
    temperature: float,
    points: Sequence[GibbsPoint],
    look: Mapping[str, str],
    alpha: float,
    shift: float,
) -> bool:
    """G of the second phase of ``pair`` minus that of the first, its points moved by ``shift``
    (GPa); False where there is nothing to draw."""
    a, b = (phases.surfaces[name] for name in pair)
    color = look["color"]
    grid = common_pressures([a, b], temperature)
    if len(grid):
        first, second = (phases.samples[name].values(grid, temperature) for name in pair)
        low, high = np.quantile(ev_to_mev(second - first), [0.025, 0.975], axis=0)
        middle = ev_to_mev(b.gibbs(grid, temperature) - a.gibbs(grid, temperature))
        label = f"{pair[1]}, {temperature:g} K ({phases.isotopes})"
        axes.plot(grid, middle, **look, alpha=alpha, label=label)
        axes.fill_between(grid, low, high, color=color, alpha=0.15 * alpha, lw=0)
    here = [p for p in points if p.temperature_K == temperature]
    base, other = ({p.pressure_GPa: p for p in here if p.phase == name} for name in pair)
    common = sorted(base.keys() & other.keys())
    found = [(base[pressure], other[pressure]) for pressure in common]
    bars = {"fmt": "o", "ms": 4, "alpha": alpha, "capsize": 2, "color": color}
    axes.errorbar(
        [pressure + shift for pressure in common],
        [ev_to_mev(q.gibbs - p.gibbs) for p, q in found],
        yerr=[ev_to_mev(math.hypot(p.error, q.error)) for p, q in found],
        mfc=color if look["ls"] == "-" else "white",
        **bars,
    )
    return bool(len(grid) or common)


Condition = tuple[float, float]
"""GPa, K."""


def corners(rows: Sequence[HullRow]) -> list[Condition]:
    """Lowest and highest pressure at the lowest and the highest temperature, of the points that
    have a hull."""
    conditions = sorted({(row.temperature_K, row.pressure_GPa) for row in rows})
    found: list[Condition] = []
    for temperature in (conditions[0][0], conditions[-1][0]):
        mine = [pressure for t, pressure in conditions if t == temperature]
        found += [(mine[0], temperature), (mine[-1], temperature)]
    return list(dict.fromkeys(found))


def draw_hull(
    rows: Sequence[HullRow], end_members: Sequence[str], folder: str | Path, name: str = "hull"
) -> list[Path]:
    """One panel per corner of the grid (`corners`); ``NAME.svg`` and ``NAME.png`` in ``folder``."""
    conditions = corners(rows)
    columns = min(2, len(conditions))
    with style.figure(columns, -(-len(conditions) // columns)) as (made, panels):
        for axes in panels[len(conditions) :]:
            axes.set_axis_off()
        for axes, (pressure, temperature) in zip(panels, conditions, strict=False):
            here = [
                row
                for row in rows
                if (row.pressure_GPa, row.temperature_K) == (pressure, temperature)
            ]
            axes.set_title(f"{pressure:g} GPa, {temperature:g} K")
            for index, isotopes in enumerate(dict.fromkeys(row.isotopes for row in rows)):
                mine = [row for row in here if row.isotopes == isotopes]
                if mine and len(end_members) == 2:
                    _height(axes, mine, index, isotopes)
                elif mine:
                    _bars(axes, mine, index, isotopes)
            if len(end_members) == 2:
                _binary_axes(axes, here, end_members)
            else:
                axes.set_xlabel("free energy above the hull (meV/atom)")
            if len({row.isotopes for row in rows}) > 1:
                style.legend(axes)
        return style.save(made, Path(folder), name)


def _height(axes: Axes, rows: Sequence[HullRow], index: int, label: str) -> None:
    """The hull of one set of masses as a line; filled marks are on it."""
    fractions = np.array([row.entry.fractions for row in rows])
    heights = ev_to_mev(np.array([row.entry.formation for row in rows]))
    grid = np.unique(np.concatenate([fractions[:, 1], [0.0, 1.0]]))
    hull = lower_hull(fractions, heights, np.column_stack([1.0 - grid, grid]))
    axes.plot(grid, hull, "-", color=style.color(index), label=label)
    for row, height in zip(rows, heights, strict=True):
        axes.errorbar(
            row.entry.fractions[1] + 0.008 * index,
            height,
            yerr=ev_to_mev(row.entry.formation_error),
            fmt=style.marker(index),
            color=style.color(index),
            mfc=style.color(index) if row.entry.distance <= 0 else "white",
            capsize=3,
        )


def _binary_axes(axes: Axes, rows: Sequence[HullRow], end_members: Sequence[str]) -> None:
    """Each phase named once at its lowest mark: below it the lowest of a composition, above it the
    others and the end members."""
    named: set[float | str] = set()
    for row in sorted(rows, key=lambda row: row.entry.formation):
        one, x = row.entry, row.entry.fractions[1]
        if one.name in named:
            continue
        above = round(x, 6) in named or x < 0.1 or x > 0.9
        named |= {one.name, round(x, 6)}
        axes.annotate(
            one.name,
            (
                x,
                ev_to_mev(one.formation + (one.formation_error if above else -one.formation_error)),
            ),
            (0, 6 if above else -6),
            textcoords="offset points",
            fontsize=8,
            ha="left" if x < 0.1 else "right" if x > 0.9 else "center",
            va="bottom" if above else "top",
        )
    axes.margins(x=0.06, y=0.18)
    low = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    first, second = (formula.translate(low) for formula in end_members)
    axes.set_xlabel(f"atomic fraction of {second} in {first}")
    axes.set_ylabel("formation free energy (meV/atom)")


def _bars(axes: Axes, rows: Sequence[HullRow], index: int, label: str) -> None:
    """Distance above the hull of every phase, nearest first."""
    order = sorted(rows, key=lambda row: row.entry.distance)
    heights = np.arange(len(order)) + 0.2 * index
    shown = [ev_to_mev(row.entry.distance) for row in order]
    axes.errorbar(
        shown,
        heights,
        xerr=[ev_to_mev(row.entry.error) for row in order],
        fmt=style.marker(index),
        color=style.color(index),
        capsize=3,
        label=label,
    )
    if index == 0:
        axes.set_yticks(np.arange(len(order)), [row.entry.name for row in order])
        axes.invert_yaxis()
    axes.axvline(0.0, color=style.GREY, lw=0.8, zorder=0)


def write_diagram(diagram: PhaseDiagram, folder: str | Path) -> dict[str, Path]:
    """``gibbs.csv``, ``boundaries.csv``, ``stability.csv``, ``summary.json`` and the picture as SVG
    and PNG; with a hull that too.

    Returns the pictures: ``png``, ``svg`` and, with a hull, ``hull`` (PNG; ``hull.svg`` lies beside
    it).
    """
    target = Path(folder)
    write_points(target / "gibbs.csv", diagram.points)
    write(BoundaryPoint, target / "boundaries.csv", diagram.boundaries)
    write(Stable, target / "stability.csv", diagram.stable)
    svg, png = draw(diagram, target)
    pictures = {"png": png, "svg": svg}
    if diagram.hull:
        write(HullRow, target / "hull.csv", diagram.hull)
        pictures["hull"] = draw_hull(diagram.hull, diagram.end_members, target)[1]
    write_json(target / "summary.json", summary(diagram))
    return pictures


def summary(diagram: PhaseDiagram) -> dict[str, Any]:
    """Everything in one dictionary ready for JSON: words, boundaries, quality of the fits, checks;
    infinite numbers as null."""
    fits = [
        {
            "isotopes": isotopes,
            "formula": formula,
            "phase": name,
            "chi2": surface.quality.chi2,
            "degrees_of_freedom": surface.quality.dof,
            "covariance_inflation": surface.quality.inflation,
            "n": surface.quality.n,
            "rms_of_residuals_over_errors": surface.quality.rms,
            "terms": [
                {
                    "weight": m.weight,
                    "powers_of_P": m.basis.cold,
                    "powers_of_P_thermal": m.basis.thermal,
                    "einstein_K": list(m.basis.thetas),
                }
                for m in surface.models
            ],
        }
        for (isotopes, formula), phases in diagram.sets.items()
        for name, surface in phases.surfaces.items()
    ]
    return finite(
        {
            "sentences": sentences(diagram),
            "n_points": len(diagram.points),
            "n_usable": sum(point.usable for point in diagram.points),
            "models": sorted({point.model for point in diagram.points if point.model}),
            "model_error_eV_per_atom": diagram.model_error,
            "boundaries": [asdict(one) for one in diagram.boundaries],
            "continuous_transitions": [asdict(one) for one in diagram.continuous_transitions],
            "clausius_clapeyron": [
                {**asdict(one), "deviation": None if one.reason else one.deviation}
                for one in diagram.checks
            ],
            "isotope_shifts": [asdict(one) for one in diagram.shifts],
            "fits": fits,
            "notes": list(diagram.notes),
        }
    )
