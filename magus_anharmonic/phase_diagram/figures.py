"""Pictures of the diagram and of convex hulls.

The picture of a phase diagram: P-T with bands on the left, differences of G with their points on
the right.

The picture of the hull: formation free energies over composition for two end members, distances
above the hull for more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magus_anharmonic.hull import lower_hull
from magus_anharmonic.io.files import replacing
from magus_anharmonic.phase_diagram import style
from magus_anharmonic.phase_diagram.boundaries import BoundaryPoint, PhaseSet, common_pressures
from magus_anharmonic.phase_diagram.diagram import PhaseDiagram, Stable, lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from magus_anharmonic.phase_diagram.diagram import HullRow


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito: told apart by everybody."""
STYLES = ("-", "--", ":", "-.")
SURE = 0.95
MARKERS = ("o", "s", "^", "D")


def draw(diagram: PhaseDiagram, path: str | Path) -> Path:
    """Draw to SVG or PNG by the suffix of ``path``, atomically."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "svg.hashsalt": "magus-anharmonic",
            "svg.fonttype": "none",
            "font.size": 9,
            "text.parse_math": False,
        }
    ):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.0, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _diagram(left, diagram)
        _differences(right, diagram)
        for axes in (left, right):
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        target = Path(path)
        with replacing(target) as temporary:
            kind = target.suffix.lstrip(".") or "png"
            figure.savefig(
                temporary, dpi=160, format=kind, metadata={"Date": None} if kind == "svg" else None
            )
    return target


def _phase_colors(diagram: PhaseDiagram) -> dict[str, str]:
    names = list(dict.fromkeys(point.phase for point in diagram.points))
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def _diagram(axes: Any, diagram: PhaseDiagram) -> None:
    """Boundaries with 68 and 95 % bands, the points of the grid coloured by the lowest phase,
    brackets of continuous transitions."""
    order = diagram.isotopes
    colors = _phase_colors(diagram)
    _limits(axes, diagram)
    for one in diagram.stable:
        index = order.index(one.isotopes)
        marker = MARKERS[index % 4] if _compared(diagram, one) else "x"
        face = colors[one.phase] if one.probability >= SURE else "white"
        axes.plot(
            [one.pressure],
            [one.temperature],
            marker,
            ms=6 - 1.5 * index,
            color=colors[one.phase],
            mfc=face,
            zorder=3,
        )
    for line in lines(diagram.boundaries):
        _boundary(axes, line, order)
    for one in diagram.continuous_transitions:
        if one.last is not None:
            index = order.index(one.isotopes)
            low, high = sorted((one.last, one.first))
            axes.plot(
                [low, high],
                [one.temperature] * 2,
                color="0.35",
                ls=STYLES[index % 4],
                lw=1.5,
                marker="|",
                ms=9,
                zorder=2,
            )
    _legend(axes, diagram, colors)
    axes.set_xlabel("pressure (GPa)")
    axes.set_ylabel("temperature (K)")


def _compared(diagram: PhaseDiagram, one: Stable) -> bool:
    """Whether another phase has a free energy there, or has transformed into this one."""
    here = (one.isotopes, one.pressure, one.temperature)
    merged = any(
        (p.isotopes, p.pressure_GPa, p.temperature_K) == here and p.same_as == one.phase
        for p in diagram.points
    )
    return merged or math.isfinite(one.gap)


def _boundary(axes: Any, line: Sequence[BoundaryPoint], order: Sequence[str]) -> None:
    style = STYLES[order.index(line[0].isotopes) % len(STYLES)]
    color = "black" if order.index(line[0].isotopes) == 0 else "0.45"
    t = np.array([one.temperature for one in line])
    p = np.array([one.pressure for one in line])
    edges = {
        name: np.array([getattr(one, name) for one in line])
        for name in ("lower_95", "lower_68", "upper_68", "upper_95")
    }
    low, high = axes.get_xlim()
    stable = any(one.stable for one in line)
    for level, alpha in (("95", 0.12), ("68", 0.22)) if stable else ():
        left = np.clip(edges[f"lower_{level}"], low, high)
        right = np.clip(edges[f"upper_{level}"], low, high)
        if len(line) > 1:
            axes.fill_betweenx(t, left, right, color=color, alpha=alpha, lw=0)
        else:
            axes.plot([left[0], right[0]], [t[0], t[0]], color=color, alpha=3 * alpha, lw=3)
    axes.plot(
        p, t, style if len(line) > 1 else "d", color=color, lw=1.6 if stable else 0.8, zorder=4
    )


def _legend(axes: Any, diagram: PhaseDiagram, colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    lowest = {one.phase for one in diagram.stable}
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            ls="",
            color=color,
            label=name + ("" if name in lowest else " (nowhere lowest)"),
        )
        for name, color in colors.items()
    ]
    if not all(_compared(diagram, one) for one in diagram.stable):
        handles.append(
            Line2D([], [], marker="x", ls="", color="0.3", label="no other phase to compare with")
        )
    if any(one.probability < SURE for one in diagram.stable):
        handles.append(
            Line2D(
                [],
                [],
                marker="o",
                ls="",
                color="0.3",
                mfc="white",
                label="lowest with a probability below 95 %",
            )
        )
    if diagram.boundaries or diagram.continuous_transitions:
        for i, name in enumerate(diagram.isotopes):
            color = "black" if i == 0 else "0.45"
            label = f"boundary, {name}" if len(diagram.isotopes) > 1 else "boundary"
            handles.append(Line2D([], [], ls=STYLES[i % 4], color=color, label=label))
    if any(one.last is not None for one in diagram.continuous_transitions):
        handles.append(
            Line2D(
                [],
                [],
                color="0.35",
                marker="|",
                ms=9,
                label="one phase transforms into the other between",
            )
        )
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8,
    )


def _limits(axes: Any, diagram: PhaseDiagram) -> None:
    p = [point.pressure_GPa for point in diagram.points]
    t = [point.temperature_K for point in diagram.points]
    pad_p, pad_t = 0.05 * (max(p) - min(p)) or 5.0, 0.08 * (max(t) - min(t)) or 20.0
    axes.set_xlim(min(p) - pad_p, max(p) + pad_p)
    axes.set_ylim(min(t) - pad_t, max(t) + pad_t)


def _differences(axes: Any, diagram: PhaseDiagram) -> None:
    """G of each phase minus that of the one with most points, at the lowest and the highest
    temperature."""
    colors = _phase_colors(diagram)
    drawn = False
    order = diagram.isotopes
    reference = ""
    for (isotopes, formula), phases in diagram.sets.items():
        names = list(phases.surfaces)
        if len(names) < 2:
            continue
        reference = max(names, key=lambda name: len(phases.surfaces[name].domain))
        mine = [
            p
            for p in diagram.points
            if p.formula == formula and p.isotopes == isotopes and p.usable
        ]
        temperatures = sorted({p.temperature_K for p in mine})
        for warm, temperature in enumerate(dict.fromkeys((temperatures[0], temperatures[-1]))):
            for name in names:
                if name != reference:
                    style = STYLES[order.index(isotopes) % 4]
                    drawn |= _difference(
                        axes,
                        phases,
                        reference,
                        name,
                        temperature,
                        colors[name],
                        style,
                        bool(warm),
                        mine,
                    )
    axes.axhline(0.0, color="0.6", lw=0.8, zorder=0)
    axes.set_xlabel("pressure (GPa)")
    if not drawn:
        axes.text(
            0.5,
            0.6,
            "no two phases with free energies\nat the same pressure and temperature",
            ha="center",
            transform=axes.transAxes,
        )
        axes.set_yticks([])
        return
    axes.set_ylabel(
        f"G minus G of {reference} (meV/atom)"
        if len(diagram.sets) == 1 or len({f for _, f in diagram.sets}) == 1
        else "G minus that of the reference phase (meV/atom)"
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)


def _difference(
    axes: Any,
    phases: PhaseSet,
    reference: str,
    name: str,
    temperature: float,
    color: str,
    style: str,
    warm: bool,
    points: Sequence[Any],
) -> bool:
    a, b = phases.surfaces[reference], phases.surfaces[name]
    grid = common_pressures([a, b], temperature)
    label = f"{name}, {temperature:g} K ({phases.isotopes})"
    shade = 0.45 if warm else 1.0
    if len(grid):
        samples = 1000.0 * (
            phases.samples[name].values(grid, temperature)
            - phases.samples[reference].values(grid, temperature)
        )
        middle = 1000.0 * (b.gibbs(grid, temperature) - a.gibbs(grid, temperature))
        low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        axes.plot(grid, middle, style, color=color, alpha=shade, label=label)
        axes.fill_between(grid, low, high, color=color, alpha=0.15 * shade, lw=0)
    by_point = {(p.phase, p.pressure_GPa): p for p in points if p.temperature_K == temperature}
    pairs = [
        (p, by_point[name, p.pressure_GPa])
        for p in by_point.values()
        if p.phase == reference and (name, p.pressure_GPa) in by_point
    ]
    for one, other in pairs:
        height, error = (
            1000 * (other.gibbs_eV_per_atom - one.gibbs_eV_per_atom),
            1000 * math.hypot(one.error, other.error),
        )
        face = color if style == "-" else "white"
        axes.errorbar(
            [one.pressure_GPa],
            [height],
            yerr=[error],
            fmt="o",
            ms=4,
            color=color,
            alpha=shade,
            capsize=2,
            mfc=face,
        )
    return bool(len(grid)) or bool(pairs)


FORMATION = "formation free energy (meV/atom)"
Condition = tuple[float, float]
"""GPa, K."""


def corners(rows: Sequence[HullRow]) -> list[Condition]:
    """Lowest and highest pressure at the lowest and the highest temperature, of the points that
    have a hull."""
    conditions = sorted({(row.temperature, row.pressure) for row in rows})
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
                row for row in rows if (row.pressure, row.temperature) == (pressure, temperature)
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
    heights = 1e3 * np.array([row.entry.formation for row in rows])
    grid = np.unique(np.concatenate([fractions[:, 1], [0.0, 1.0]]))
    hull = lower_hull(fractions, heights, np.column_stack([1.0 - grid, grid]))
    axes.plot(grid, hull, "-", color=style.color(index), label=label)
    for row, height in zip(rows, heights, strict=True):
        axes.errorbar(
            row.entry.fractions[1],
            height,
            yerr=1e3 * row.entry.formation_error,
            fmt=style.marker(index),
            color=style.color(index),
            mfc=style.color(index) if row.entry.distance <= 0 else "white",
            capsize=3,
        )


def _binary_axes(axes: Axes, rows: Sequence[HullRow], end_members: Sequence[str]) -> None:
    """Each phase named once at its lowest mark: below it the lowest of a composition, above it the
    others and the end members."""
    lowest: dict[str, HullRow] = {}
    for row in rows:
        if (
            row.entry.name not in lowest
            or row.entry.formation < lowest[row.entry.name].entry.formation
        ):
            lowest[row.entry.name] = row
    named: set[float] = set()
    for row in sorted(lowest.values(), key=lambda row: row.entry.formation):
        x, error = row.entry.fractions[1], row.entry.formation_error
        above = round(x, 6) in named or x < 0.1 or x > 0.9
        named.add(round(x, 6))
        axes.annotate(
            row.entry.name,
            (x, 1e3 * (row.entry.formation + (error if above else -error))),
            (0, 6 if above else -6),
            textcoords="offset points",
            fontsize=8,
            ha="left" if x < 0.1 else "right" if x > 0.9 else "center",
            va="bottom" if above else "top",
        )
    axes.margins(x=0.06, y=0.18)
    axes.set_xlabel(
        f"atomic fraction of {_subscripts(end_members[1])} in {_subscripts(end_members[0])}"
    )
    axes.set_ylabel(FORMATION)


def _bars(axes: Axes, rows: Sequence[HullRow], index: int, label: str) -> None:
    """Distance above the hull of every phase, nearest first."""
    order = sorted(rows, key=lambda row: row.entry.distance)
    heights = np.arange(len(order)) + 0.2 * index
    shown = [1e3 * row.entry.distance for row in order]
    axes.errorbar(
        shown,
        heights,
        xerr=[1e3 * row.entry.error for row in order],
        fmt=style.marker(index),
        color=style.color(index),
        capsize=3,
        label=label,
    )
    if index == 0:
        axes.set_yticks(np.arange(len(order)), [row.entry.name for row in order])
        axes.invert_yaxis()
    axes.axvline(0.0, color=style.GREY, lw=0.8, zorder=0)


def _subscripts(formula: str) -> str:
    return formula.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
