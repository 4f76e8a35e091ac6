"""What a ranking says: the table, the plain words, and the picture, all from ``ranking.csv``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from magus_anharmonic.ranking.candidate import Candidate, by_composition, numbered
from magus_anharmonic.sscha.record import WITH_ERROR
from magus_anharmonic.structures import UNDECIDED, decided_group, symbol_of
from magus_anharmonic.units import ev_to_mev

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def hull_sentences(rows: Sequence[Candidate]) -> list[str]:
    """Who is on the hull of free energies, and how far above it the lowest of the other
    compositions are; empty for one composition."""
    blocks = by_composition(rows)
    lowest = [
        min((row for row in block if row.phase_ranked), key=lambda row: row.gibbs, default=None)
        for block in blocks
    ]
    known = [row for row in lowest if row is not None and row.gibbs_above_hull is not None]
    if len(blocks) < 2 or not known:
        return []
    on = [
        f"{row.composition} {row.label}{_probability_in_words(row)}"
        for row in known
        if row.gibbs_above_hull == 0.0
    ]
    above = [
        f"{row.composition} {ev_to_mev(row.gibbs_above_hull):.1f} +-"
        f" {ev_to_mev(row.gibbs_above_hull_error or 0.0):.1f}"
        for row in known
        if row.gibbs_above_hull
    ]
    lines = [
        f"On the hull of the free energies of these structures (probability by sampling):"
        f" {', '.join(on)}."
    ]
    lines += (
        [f"Above it (meV/atom), the lowest of each composition: {', '.join(above)}."]
        if above
        else []
    )
    without = [
        block[0].composition for block, row in zip(blocks, lowest, strict=True) if row is None
    ]
    return (
        [*lines, f"Without a computed free energy, and no part of the hull: {', '.join(without)}."]
        if without
        else lines
    )


def _probability_in_words(row: Candidate) -> str:
    return "" if row.p_on_hull_sampling is None else f" ({row.p_on_hull_sampling:.0%})"


COLUMNS = {
    "rank": 4, "id": 8, "atoms": 5, "space group": 8, "static H": 6, "G": 5, "+-": 3,
    "rank by H": 4, "change": 6, "status": 11,
}  # fmt: skip
"""Of the table on the screen, and how many letters of each are never folded."""


def table(
    rows: Sequence[Candidate],
    limit: int = 10,
    title: str = "Ranking by free energy",
    width: int = 120,
) -> Table:
    """The ranking of one composition as a rich table for a screen of this ``width``: ranked
    structures by G, then the rest by enthalpy.

    Where nothing is ranked, no G is: an upper bound has no lowest to stand above.
    """
    rows = numbered(rows)
    reference = min((row.enthalpy for row in rows if row.enthalpy is not None), default=0.0)
    lowest = min((row.gibbs for row in rows if row.phase_ranked), default=None)
    wide = width > 100
    result = Table(
        title=f"{title} (energies in meV/atom above the lowest)",
        padding=(0, int(wide)),
        show_edge=wide,
    )
    for name, least in COLUMNS.items():
        head = name if wide else name.replace(" ", "\n", 1)
        text = name in ("id", "space group", "status")
        result.add_column(head, justify="left" if text else "right", min_width=least)
    for row in rows[:limit]:
        result.add_row(
            str(row.rank_quantum or "-"),
            row.label,
            str(row.natoms),
            " -> ".join(symbol_of(group) for group in (row.spg_static, row.spg_quantum) if group),
            _milli(row.enthalpy, reference),
            _height(row, lowest),
            "-" if lowest is None or row.status not in WITH_ERROR else _milli(row.gibbs_error, 0.0),
            str(row.rank_static or "-"),
            _change(row, rows),
            f"same as {label_of(row.same_as, rows)}" if row.same_as else row.status,
        )
    if len(rows) > limit:
        result.caption = f"{len(rows) - limit} more in ranking.csv"
    return result


def label_of(identity: str, rows: Sequence[Candidate]) -> str:
    """What the candidate with this id is called."""
    return next((row.label for row in rows if row.id == identity), identity[:8])


def _milli(value: float | None, reference: float) -> str:
    return "-" if value is None else f"{ev_to_mev(value - reference):.1f}"


def _height(row: Candidate, lowest: float | None) -> str:
    """G above the lowest phase."""
    if lowest is None and row.status == "unconverged":
        return "not\nconverged"
    return "-" if lowest is None or row.status == "failed" else _milli(row.gibbs, lowest)


def _change(row: Candidate, rows: Sequence[Candidate]) -> str:
    """Places gained or lost among the structures that have a free energy of their own."""
    compared = [other for other in rows if other.phase_ranked and other.enthalpy is not None]
    ranks = {other.id: other for other in numbered(compared)}
    if row.id not in ranks:
        return "-"
    gained = (ranks[row.id].rank_static or 0) - (ranks[row.id].rank_quantum or 0)
    return f"{gained:+d}" if gained else "0"


def sentences(rows: Sequence[Candidate]) -> list[str]:
    """What SSCHA changed, in plain words, from the numbers in ``rows`` alone."""
    done = sorted((row for row in rows if row.ranked), key=lambda row: row.gibbs)
    ranked = [row for row in done if row.phase_ranked]
    static = [row for row in done if row.enthalpy is not None]
    if not ranked:
        unfinished = _unconverged(rows)
        nothing = "No free energy has converged" if unfinished else "No structure has a free energy"
        return [
            *_saddles(rows),
            *unfinished,
            f"{nothing}; the order is that of the static enthalpy.",
        ]
    lines = []
    condition = f"at {ranked[0].pressure:g} GPa and {ranked[0].temperature:g} K"
    moved = [row for row in done if decided_group(row.spg_quantum) not in ("", row.spg_static)]
    for row in moved:
        lines.append(f"{row.label}: static {row.spg_static}, quantum (SSCHA) {row.spg_quantum}.")
    if not moved:
        surely = " for certain" if any(UNDECIDED in row.spg_quantum for row in done) else ""
        lines.append(
            f"None of the {len(done)} structures changed its space group{surely} when the ions"
            " moved."
        )
    shifts = [ev_to_mev(row.gibbs - row.enthalpy) for row in done if row.enthalpy is not None]
    if shifts:
        span = f"{shifts[0]:.0f}" if len(shifts) == 1 else f"{min(shifts):.0f} to {max(shifts):.0f}"
        lines.append(
            f"The motion of the ions adds {span} meV/atom to the static enthalpy {condition}."
        )
    best = ranked[0]
    static_best = min(static, key=lambda row: row.enthalpy) if static else best
    lines.extend(_continuous_transitions(done))
    lines.extend(_saddles(rows))
    if best.parent:
        lines.append(
            f"{best.label} ({best.spg_quantum}) is lowest; it was found below the saddle point"
            f" {label_of(best.parent, rows)}."
        )
    elif static_best is best:
        same = best.spg_quantum in ("", best.spg_static)
        phase = (
            f"{best.spg_static} both times"
            if same
            else f"as {best.spg_static} without and as {best.spg_quantum} with it"
        )
        lines.append(f"{best.label} is lowest with and without the motion, {phase}.")
    elif static_best.same_as == best.id:
        lines.append(
            f"{static_best.label} ({static_best.spg_static}) has the lowest enthalpy, and becomes"
            f" the phase of the lowest free energy, {best.spg_quantum or best.spg_static}."
        )
    else:
        gain, (error, _) = ev_to_mev(static_best.gibbs - best.gibbs), _error(static_best, best)
        lines.append(
            f"The order changed: {static_best.label} has the lowest enthalpy, {best.label}"
            f" ({best.spg_quantum or best.spg_static}) the lowest free energy, by {gain:.1f} +-"
            f" {error:.1f} meV/atom."
        )
    lines.extend(_undecided(ranked))
    lines.extend(_unconverged(rows))
    return lines


def _continuous_transitions(done: Sequence[Candidate]) -> list[str]:
    """Which structures ended in one phase."""
    lines = []
    for row in done:
        duplicates = [other for other in done if other.same_as == row.id]
        if duplicates:
            names = " and ".join(f"{one.label} ({one.spg_static})" for one in [row, *duplicates])
            lines.append(f"{names} are one and the same phase with SSCHA: {row.spg_quantum}.")
    return lines


def _saddles(rows: Sequence[Candidate]) -> list[str]:
    """What the Hessian took out of the ranking, and what was found below."""
    lines = []
    for row in rows:
        if row.status != "saddle":
            continue
        below = next((other for other in rows if other.parent == row.id), None)
        lowest, error = row.free_energy.hessian_deciding, row.free_energy.hessian_error or 0.0
        mode = "" if lowest is None else f" (a mode at {lowest:.0f} +- {error:.0f} cm^-1)"
        found = (
            "what lies below it was not found"
            if below is None
            else f"below it lies {below.label} ({below.spg_quantum})"
        )
        if below is not None and below.status == "unconverged":
            found = f"{below.label}, which started below it, is not converged"
        lines.append(
            f"{row.label} ({row.spg_quantum}) is a saddle point of the free energy{mode} and not"
            f" ranked: {found}."
        )
    return lines


def _unconverged(rows: Sequence[Candidate]) -> list[str]:
    """Who is missing from the ranking for lack of populations."""
    names = [row.label for row in rows if row.status == "unconverged"]
    if not names:
        return []
    them = "it is" if len(names) == 1 else "they are"
    return [
        f"Not converged within the budget: {', '.join(names)}. Where {them} in the order is not"
        " known (G in the table is an upper bound): raise max_populations, n_configs or the"
        " budget."
    ]


def _undecided(ranked: Sequence[Candidate]) -> list[str]:
    if len(ranked) < 2:
        return []
    best, second = ranked[0], ranked[1]
    gap, (error, parts) = ev_to_mev(second.gibbs - best.gibbs), _error(second, best)
    if gap >= 2 * error:
        return []
    return [
        f"The first two ({gap:.1f} meV/atom apart) are not told apart: the error of the difference"
        f" is {error:.1f} ({parts})."
    ]


def _error(row: Candidate, best: Candidate) -> tuple[float, str]:
    """Total error of the difference of G to the lowest phase, meV/atom, and its parts in words."""
    if row.difference_sampling_error is None:  # another stands for it, or a table of earlier
        both = math.hypot(row.gibbs_error or 0.0, best.gibbs_error or 0.0)
        return ev_to_mev(both), "sampling alone"
    parts = {
        "sampling": row.difference_sampling_error,
        "finite size": row.difference_finite_size_error,
        "model": row.difference_model_error,
    }
    told = (f"{name} {_milli(part, 0.0).replace('-', 'unknown')}" for name, part in parts.items())
    total = math.hypot(*(part for part in parts.values() if part is not None))
    return ev_to_mev(total), ", ".join(told)


def picture(rows: Sequence[Candidate], path: str | Path) -> Path:
    """Draw static enthalpy against free energy order of one composition as a slope chart; PNG or
    SVG by suffix."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    slope_chart(rows).savefig(target, dpi=160)
    return target


def slope_chart(rows: Sequence[Candidate]) -> Figure:
    """The figure of `picture`."""
    from matplotlib.figure import Figure

    done = sorted((row for row in rows if row.ranked), key=lambda row: row.gibbs)[:10]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel("meV/atom above the lowest")
    axes.set_xticks([0, 1], ["static enthalpy H", "free energy G (SSCHA)"])
    axes.set_xlim(-0.55, 1.55)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not done:
        axes.text(0.5, 0.5, "no free energies", ha="center", transform=axes.transAxes)
    lowest_h = min((row.enthalpy for row in done if row.enthalpy is not None), default=0.0)
    lowest_g = min((row.gibbs for row in done), default=0.0)
    # what was found below a saddle point has no static enthalpy of its own and stands on the right
    # alone
    heights = [
        (ev_to_mev((row.enthalpy or lowest_h) - lowest_h), ev_to_mev(row.gibbs - lowest_g))
        for row in done
    ]
    span = max((max(pair) for pair in heights), default=1.0) or 1.0
    left = _spread([h for h, _ in heights], span)
    right = _spread([g for _, g in heights], span)
    for index, (row, (h, g)) in enumerate(zip(done, heights, strict=True)):
        color = f"C{index}"
        if row.enthalpy is not None:
            axes.plot([0, 1], [h, g], color=color, lw=1.2, alpha=0.8)
            axes.plot([0], [h], "o", color=color)
            axes.text(
                -0.06,
                left[index],
                f"{row.spg_static}  {row.label}",
                ha="right",
                va="center",
                fontsize=8,
                color=color,
            )
        axes.errorbar(
            [1], [g], yerr=[ev_to_mev(row.gibbs_error or 0.0)], fmt="o", color=color, capsize=3
        )
        axes.text(
            1.06,
            right[index],
            row.spg_quantum or row.spg_static,
            ha="left",
            va="center",
            fontsize=8,
            color=color,
        )
    if done:
        axes.set_title(
            f"{done[0].formula} at {done[0].pressure:g} GPa, {done[0].temperature:g} K", fontsize=10
        )
    return figure


def _spread(heights: Sequence[float], span: float) -> list[float]:
    """Label heights pushed apart so that none overlap (at least 5 % of the axis between two)."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for below, above in zip(order, order[1:], strict=False):
        placed[above] = max(placed[above], placed[below] + 0.05 * span)
    return placed
